"""Linear attention: a matrix a head takes the place of keys and values, without decay, or with one of several.

| decay | model |
|---|---|
| None | Katharopoulos et al. (arXiv 2006.16236) with `normalized` and a positive feature map |
| `FixedDecay` | retention (RetNet, arXiv 2307.08621) with RoPE, `output_norm` and a gate |
| `HeadDecay` | gated retention (YOCO, arXiv 2405.05254, 3.2) |
| `ChannelDecay` | gated linear attention (GLA, arXiv 2312.06635, 4) |
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.cache import CacheConfig, Extension, PackedTexts, RecurrentCache, run_steps
from jaxlm.layers.context import Context
from jaxlm.layers.feed_forward import Activation
from jaxlm.layers.norms import Norm, NormConfig
from jaxlm.layers.parameters import Dims, Linear, ParameterMaker, PathKey
from jaxlm.layers.positions import Rope, Rotation, rotate
from jaxlm.layers.remat import name_activation
from pallas_kernels.biases import Bias
from pallas_kernels.linear_attention import LINEAR_ATTENTION, linear_attention_step
from pallas_kernels.masks import Mask, running_segments
from pallas_kernels.residuals import ATTENTION_OUT

_AXES = (("heads", "head_dim", None),)  # of the state


class FeatureMap(enum.Enum):
    """What queries and keys go through, each head by itself, in float32.

    IDENTITY: nothing. SILU: x sigmoid(x) (Lightning Attention, arXiv 2307.14995). Positive are RELU, ELU_PLUS_ONE
    (arXiv 2006.16236, 3.2.1) and SOFTMAX over the head's dimensions (Hedgehog, arXiv 2402.04347).
    """

    IDENTITY = "identity"
    SILU = "silu"
    RELU = "relu"
    ELU_PLUS_ONE = "elu_plus_one"
    SOFTMAX = "softmax"

    @property
    def positive(self) -> bool:
        """Whether products of queries and keys are weights."""
        return self in (FeatureMap.RELU, FeatureMap.ELU_PLUS_ONE, FeatureMap.SOFTMAX)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of x [..., D]."""
        y = x.astype(jnp.float32)
        match self:
            case FeatureMap.IDENTITY:
                return x
            case FeatureMap.SILU:
                y = jax.nn.silu(y)
            case FeatureMap.RELU:
                y = jax.nn.relu(y)
            case FeatureMap.ELU_PLUS_ONE:
                y = jax.nn.elu(y) + 1.0
            case FeatureMap.SOFTMAX:
                y = jax.nn.softmax(y, axis=-1)
        return y.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class FixedDecay:
    """Head h keeps 1 - 2^-(first + step h) of its state at each token (RetNet, arXiv 2307.08621, equation 8).

    Attributes:
      first: of head 0.
      step: from head to head.
    """

    first: float = 5.0
    step: float = 1.0

    def __post_init__(self):
        if self.first <= 0 or self.step < 0:
            raise ValueError(f"FixedDecay needs first > 0 and step >= 0, not {self.first} and {self.step}.")

    def build(self, config: "LinearAttentionConfig", make: ParameterMaker, *, key: PathKey) -> "Fixed":
        """The module."""
        del make, key
        return Fixed(self, config.num_heads)


@dataclasses.dataclass(frozen=True)
class HeadDecay:
    """Each head keeps sigmoid(x W + b)^(1 / temperature) of its state.

    Attributes:
      temperature: 16 in the papers; the larger, the longer it remembers at the start.
    """

    temperature: float = 16.0

    def build(self, config: "LinearAttentionConfig", make: ParameterMaker, *, key: PathKey) -> "Gated":
        """The module."""
        return Gated(self.temperature, None, (("heads", config.num_heads),), make, key=key)


@dataclasses.dataclass(frozen=True)
class ChannelDecay:
    """Each key channel of each head keeps sigmoid(x W_down W_up + b)^(1 / temperature) of its state.

    Attributes:
      rank: of W_down W_up.
      temperature: as for `HeadDecay`.
    """

    rank: int = 16
    temperature: float = 16.0

    def build(self, config: "LinearAttentionConfig", make: ParameterMaker, *, key: PathKey) -> "Gated":
        """The module."""
        dims = (("heads", config.num_heads), ("head_dim", config.head_dim))
        return Gated(self.temperature, self.rank, dims, make, key=key)


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """One linear attention layer, to stand in `BlockConfig.attention` of a causal decoder.

    Attributes:
      num_heads: heads (H).
      head_dim: size of queries and keys (Dk).
      value_dim: size of values (Dv); None is head_dim.
      position: Rope, after the feature map, or None.
      feature_map: see `FeatureMap`.
      decay: `FixedDecay`, `HeadDecay`, `ChannelDecay`, or None for none.
      normalized: results are divided by the sum of their weights; needs a positive feature map and no position.
      output_norm: norm of each head's result, or None.
      gate: activation of a gate x W_gate on the result, or None for no gate.
      scale: factor on q . k; None is the parametrisation's (1 / sqrt(head_dim)).
      qkv_bias: biases on queries, keys and values.
      output_bias: bias on the output projection.
      backend: who computes it, a name in `pallas_kernels.linear_attention`, or "auto": the fastest that can.
    """

    num_heads: int
    head_dim: int
    value_dim: int | None = None
    position: Rope | None = None
    feature_map: FeatureMap = FeatureMap.IDENTITY
    decay: FixedDecay | HeadDecay | ChannelDecay | None = None
    normalized: bool = False
    output_norm: NormConfig | None = None
    gate: Activation | None = None
    scale: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    backend: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "feature_map", FeatureMap(self.feature_map))
        if self.gate is not None:
            object.__setattr__(self, "gate", Activation(self.gate))
        LINEAR_ATTENTION.check_name(self.backend, "LinearAttentionConfig.backend")
        if self.normalized and (not self.feature_map.positive or self.position is not None):
            raise ValueError(
                f"LinearAttentionConfig.normalized divides by a sum of weights, which feature_map="
                f"{self.feature_map.value!r} with position={self.position} lets be 0 or negative; choose 'relu', "
                f"'elu_plus_one' or 'softmax' without position, or output_norm in its place."
            )

    runs: ClassVar[bool] = True  # carries a state along the row, which knows only what came before
    score_heads: ClassVar[None] = None  # there are no scores that a bias could be added to

    @property
    def values(self) -> int:
        """Size of a head's values (Dv)."""
        return self.head_dim if self.value_dim is None else self.value_dim

    def mixing_flops(self, length: int, *, both_sides: bool) -> float:
        """Of a row of so many tokens: each writes to its heads' states and reads them.

        That chunks of tokens meet in products of matrices is the kernel's affair.
        """
        return length * 12.0 * self.num_heads * self.head_dim * self.values

    def token_sizes(self, ways: Callable[[str, int], int]) -> tuple[int, int]:
        """Numbers that a token has on one device: in the result, and in queries, keys, values, gate and result."""
        heads = self.num_heads // ways("heads", self.num_heads)
        gates = 0 if self.gate is None else 1
        return heads * self.values, heads * (2 * self.head_dim + (2 + gates) * self.values)

    def build(self, make: ParameterMaker, *, residual_gain: float, dtype: jnp.dtype, key: PathKey) -> "LinearAttention":
        """The module; arguments as for `FeedForwardConfig.build`."""
        return LinearAttention(self, make, residual_gain=residual_gain, dtype=dtype, key=key)


class Fixed(nnx.Module):
    """Decays that do not look at the text."""

    def __init__(self, config: FixedDecay, heads: int):
        self.config, self.heads = config, heads

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Their logarithms, float32 [B, T, H]."""
        del context
        kept = [1.0 - 2.0 ** -(self.config.first + self.config.step * head) for head in range(self.heads)]
        return jnp.broadcast_to(jnp.asarray([math.log(k) for k in kept], jnp.float32), (*x.shape[:2], self.heads))


class Gated(nnx.Module):
    """Decays that the text selects."""

    def __init__(self, temperature: float, rank: int | None, dims: Dims, make: ParameterMaker, *, key: PathKey):
        embed, inner = (("embed", make.width),), ((None, rank),)
        f32 = jnp.dtype("float32")
        self.down = None if rank is None else Linear(make, embed, inner, dtype=f32, key=key.at("down"))
        self.up = Linear(make, embed if rank is None else inner, dims, bias=True, dtype=f32, key=key.at("up"))
        self.temperature = temperature

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Their logarithms, float32 [B, T, H] or [B, T, H, Dk]."""
        x = x.astype(jnp.float32)
        inner = x if self.down is None else self.down(x, context)
        return jax.nn.log_sigmoid(self.up(inner, context)) / self.temperature


class LinearAttention(nnx.Module):
    """S_t = diag(decay_t) S_{t-1} + k_t v_t^T and o_t = scale q_t S_t for each head; the state is float32."""

    def __init__(
        self,
        config: LinearAttentionConfig,
        make: ParameterMaker,
        *,
        residual_gain: float,
        dtype: jnp.dtype,
        key: PathKey,
    ):
        embed, heads = (("embed", make.width),), (("heads", config.num_heads),)
        keys, values = (*heads, ("head_dim", config.head_dim)), (*heads, ("head_dim", config.values))

        def linear(name, inputs, outputs, bias, gain=1.0):
            return Linear(make, inputs, outputs, bias=bias, gain=gain, dtype=dtype, key=key.at(name))

        self.query = linear("query", embed, keys, config.qkv_bias)
        self.key = linear("key", embed, keys, config.qkv_bias)
        self.value = linear("value", embed, values, config.qkv_bias)
        self.decay = None if config.decay is None else config.decay.build(config, make, key=key.at("decay"))
        self.norm = None if config.output_norm is None else Norm(config.output_norm, make, values[1:])
        self.gate = None if config.gate is None else linear("gate", embed, values, False)
        self.output = linear("output", values, embed, config.output_bias, residual_gain)
        self.config = config
        self.scale = make.parametrization.attention_scale(config.head_dim) if config.scale is None else config.scale

    def __call__(
        self,
        x: jax.Array,
        source: jax.Array,
        mask: Mask,
        *,
        rotation: Rotation | None,
        bias: Bias | None,
        context: Context,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """What x [B, T, E] finds in itself; arguments as for `Attention`.

        Raises:
          TypeError: the mask is another than a packed causal one.
        """
        del source, bias, positions  # a block's attention is to itself, and there are no scores to add to
        out, _ = context.ops.linear_attention(
            *self._keyed(x, rotation, context),
            segment_ids=running_segments(mask),
            scale=self.scale,
            backend=self.config.backend,
        )
        return self._gated(out, x, context)

    def prefill(
        self,
        x: jax.Array,
        source: jax.Array,
        mask: Mask,
        *,
        rotation: Rotation | None,
        bias: Bias | None,
        texts: PackedTexts,
        caching: CacheConfig,
        context: Context,
    ) -> tuple[jax.Array, RecurrentCache]:
        """As `__call__`, and the state after each of the texts in these rows. The state runs along one text a row."""
        del source, bias, caching
        running_segments(mask)
        inputs = [None if y is None else texts.unpacked(y) for y in self._keyed(x, rotation, context)]
        out, state = context.ops.linear_attention(
            *inputs, segment_ids=texts.present(x.shape[1]), scale=self.scale, backend=self.config.backend
        )
        return self._gated(texts.packed(out, len(x)), x, context), RecurrentCache(state, (), _AXES)

    def extend(
        self,
        x: jax.Array,
        cache: RecurrentCache,
        new: Extension,
        *,
        rotation: Rotation | None,
        bias: Bias | None,
        context: Context,
    ) -> tuple[jax.Array, RecurrentCache]:
        """Of t new tokens a slot, x [B, t, E]; and the cache with them in it. Arguments as for `Attention.extend`."""
        del bias
        step = functools.partial(linear_attention_step, scale=self.scale)
        out, state = run_steps(step, cache.state, self._keyed(x, rotation, context), new.present)
        return self._gated(out, x, context), RecurrentCache(state, (), _AXES)

    def _keyed(self, x: jax.Array, rotation: Rotation | None, context: Context) -> tuple[jax.Array | None, ...]:
        """Queries and keys [B, T, H, Dk], values [B, T, H, Dv] (with a 1 if normalized), logarithms of decays."""
        q, k = (self.config.feature_map(projection(x, context)) for projection in (self.query, self.key))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        v = self.value(x, context)
        q, k, v = name_activation(q, "query"), name_activation(k, "key"), name_activation(v, "value")
        if self.config.normalized:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        return q, k, v, None if self.decay is None else self.decay(x, context)

    def _gated(self, out: jax.Array, x: jax.Array, context: Context) -> jax.Array:
        """[B, T, E] from what was read of the state."""
        out = name_activation(out, ATTENTION_OUT)
        if self.config.normalized:
            out, total = out[..., :-1].astype(jnp.float32), out[..., -1:].astype(jnp.float32)
            out = (out / jnp.where(total > 0, total, 1.0)).astype(x.dtype)  # padding has no weights
        if self.norm is not None:
            out = self.norm(out)
        if self.gate is not None:
            out = out * self.config.gate(name_activation(self.gate(x, context), "gate"))
        return self.output(out, context)
