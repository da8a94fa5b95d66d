"""Mamba-2's mixer (arXiv 2405.21060, sections 6 and 7): heads with one decay each, computed as linear attention."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.cache import PackedTexts, RecurrentCache, run_steps
from jaxlm.layers.context import Context
from jaxlm.layers.feed_forward import Activation
from jaxlm.layers.parameters import Linear, ParameterMaker, PathKey
from jaxlm.layers.remat import name_activation
from jaxlm.layers.short_convolution import ShortConvolution
from jaxlm.layers.step_sizes import StepSizes, refuse_scaling
from pallas_kernels.linear_attention import LINEAR_ATTENTION, linear_attention_step
from pallas_kernels.residuals import ATTENTION_OUT

# Of the state and of the three convolutions' windows.
_AXES = (("heads", None, "head_dim"), (None, "heads", "head_dim"), (None, None, None), (None, None, None))


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """One Mamba-2 mixer.

    Attributes:
      num_heads: heads (H); the paper has heads of 64 that together are twice as wide as the model.
      head_dim: size of a head (P).
      state: entries of the state of each of a head's channels (N).
      groups: groups of heads (G) that share what they write with and read with, and a norm.
      taps: tokens that the convolution sees.
      convolution_bias: bias of the convolution.
      bias: biases of the projections into and out of the mixer.
      activation: after the convolution; the gate's is always SILU.
      steps: where step sizes start; None: as `StepSizes` has it.
      step_limit: (least, most) that step sizes are kept between; None leaves them, as a most of None does on that side.
      epsilon: of the norm before the output.
      backend: who computes it, a name in `pallas_kernels.linear_attention`, or "auto": the fastest that can.
    """

    num_heads: int
    head_dim: int = 64
    state: int = 128
    groups: int = 1
    taps: int = 4
    convolution_bias: bool = True
    bias: bool = False
    activation: Activation = Activation.SILU
    steps: StepSizes | None = None
    step_limit: tuple[float, float | None] | None = None
    epsilon: float = 1e-5
    backend: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "activation", Activation(self.activation))
        LINEAR_ATTENTION.check_name(self.backend, "Mamba2Config.backend")
        if self.num_heads % self.groups:
            raise ValueError(
                f"Mamba2Config.groups={self.groups} must divide num_heads={self.num_heads}, so that groups are alike."
            )
        if self.step_limit is not None:
            least, most = self.step_limit
            if not 0 <= least < (math.inf if most is None else most):
                raise ValueError(
                    f"Mamba2Config.step_limit must be (least, most), 0 <= least < most; got {self.step_limit}."
                )

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    def mixing_flops(self, length: int) -> float:
        """Forwards and backwards, of a row of so many tokens, beside the products with matrices.

        As for `MambaConfig.mixing_flops`; that chunks of tokens meet in products of matrices is the kernel's affair.
        """
        convolved = self.inner + 2 * self.groups * self.state
        return length * (12.0 * self.inner * self.state + 6.0 * convolved * self.taps)

    def token_sizes(self, ways: Callable[[str, int], int]) -> tuple[int, int, int]:
        """See `jaxlm.layers.block.TokenSizes`."""
        split = ways("heads", self.num_heads)
        inner, shared = self.inner // split, 2 * self.groups * self.state
        products = 2 * inner + shared + self.num_heads // split
        keys = 2 * self.num_heads * self.state // split  # repeated for each head
        return inner, products + inner, products + 4 * inner + 2 * shared + keys

    def build(self, make: ParameterMaker, *, residual_gain: float, dtype: jnp.dtype, key: PathKey) -> "Mamba2":
        """The module; arguments as for `FeedForwardConfig.build`."""
        return Mamba2(self, make, residual_gain=residual_gain, dtype=dtype, key=key)


class Mamba2(nnx.Module):
    """[B, T, E] -> [B, T, E].

    Of u, B, C = act(conv(x [W_value W_write W_read])) and dt = softplus(x W_step + bias), a head's state goes as
    S_t = exp(dt A) S_{t-1} + B_t (dt u_t)^T and gives y_t = C_t S_t + D u_t; the result is rms(y * silu(x W_gate))
    W_output, where the norm runs over each group. Step sizes, decays and states are float32.
    """

    def __init__(
        self, config: Mamba2Config, make: ParameterMaker, *, residual_gain: float, dtype: jnp.dtype, key: PathKey
    ):
        refuse_scaling(make, "Mamba-2")
        embed, heads = (("embed", make.width),), (("heads", config.num_heads),)
        inner = (*heads, ("head_dim", config.head_dim))
        # Few groups serve many heads: each device has them all.
        shared = ((None, config.groups), (None, config.state))

        def linear(name, inputs, outputs, **options):
            return Linear(make, inputs, outputs, key=key.at(name), **({"dtype": dtype, "bias": config.bias} | options))

        def convolution(name, channels):
            where = key.at(f"{name}_convolution")
            return ShortConvolution(make, channels, config.taps, bias=config.convolution_bias, dtype=dtype, key=where)

        self.gate = linear("gate", embed, inner)
        self.value = linear("value", embed, inner)
        self.write = linear("write", embed, shared)  # B
        self.read = linear("read", embed, shared)  # C
        self.step = linear("step", embed, heads, dtype=jnp.float32)
        self.value_convolution = convolution("value", inner)
        self.write_convolution = convolution("write", shared)
        self.read_convolution = convolution("read", shared)
        self.step_bias = make.vector_of(
            (config.steps or StepSizes()).biases(key.at("step_bias"), (config.num_heads,)), heads
        )
        # A uniform between -1 and -16, as in the paper's code.
        decays = jax.random.uniform(key.at("log_decay").key, (config.num_heads,), minval=1.0, maxval=16.0)
        self.log_decay = make.vector_of(jnp.log(decays), heads)
        self.skip = make.vector(heads, 1.0)  # D
        self.scale = make.vector(inner, 1.0)
        self.output = linear("output", inner, embed, gain=residual_gain)
        self.config = config

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None, context: Context) -> jax.Array:
        """Of whole rows; arguments as for `Mamba`."""
        gate = name_activation(self.gate(x, context), "gate")
        parts = zip(self._projected(x, context), self._convolutions, strict=True)
        u, write, read = self._activated([convolution(part, segment_ids) for part, convolution in parts], context)
        dt, log_decay = self._steps(x, context)
        y, _ = context.ops.linear_attention(
            *self._keyed(u, write, read, dt), log_decay, segment_ids=segment_ids, backend=self.config.backend
        )
        return self._normed(y, u, gate, context)

    def prefill(
        self, x: jax.Array, segment_ids: jax.Array | None, texts: PackedTexts, context: Context
    ) -> tuple[jax.Array, RecurrentCache]:
        """As `__call__`, and the state after each of the texts in these rows. The scan has one text a row."""
        gate, parts = name_activation(self.gate(x, context), "gate"), self._projected(x, context)
        convolved = [convolution(part, segment_ids) for part, convolution in zip(parts, self._convolutions)]
        u, write, read = self._activated(convolved, context)
        dt, log_decay = self._steps(x, context)
        scanned = (texts.unpacked(part) for part in (*self._keyed(u, write, read, dt), log_decay))
        y, state = context.ops.linear_attention(
            *scanned, segment_ids=texts.present(x.shape[1]), backend=self.config.backend
        )
        windows = tuple(convolution.window(part, texts) for part, convolution in zip(parts, self._convolutions))
        cache = RecurrentCache(state, windows, _AXES)
        return self._normed(texts.packed(y, len(x)), u, gate, context), cache

    def extend(
        self, x: jax.Array, cache: RecurrentCache, present: jax.Array | None, context: Context
    ) -> tuple[jax.Array, RecurrentCache]:
        """Of t new tokens a slot, x [B, t, E], those that are `present`; and the cache with them in it."""
        gate = self.gate(x, context)
        parts = zip(self._projected(x, context), self._convolutions, cache.windows, strict=True)
        extended = [convolution.extend(part, window, present) for part, convolution, window in parts]
        u, write, read = self._activated([convolved for convolved, _ in extended], context)
        dt, log_decay = self._steps(x, context)
        inputs = (*self._keyed(u, write, read, dt), log_decay)
        y, state = run_steps(linear_attention_step, cache.state, inputs, present)
        cache = RecurrentCache(state, tuple(window for _, window in extended), _AXES)
        return self._normed(y, u, gate, context), cache

    @property
    def _convolutions(self) -> tuple[ShortConvolution, ...]:
        return self.value_convolution, self.write_convolution, self.read_convolution

    def _projected(self, x: jax.Array, context: Context) -> tuple[jax.Array, ...]:
        """What is convolved: [B, T, H, P], and [B, T, G, N] twice."""
        return name_activation(self.value(x, context), "up"), self.write(x, context), self.read(x, context)

    def _activated(self, parts: list[jax.Array], context: Context) -> list[jax.Array]:
        u, write, read = (self.config.activation(part) for part in parts)
        return [context.ops.constrain(u, ("batch", "length", "heads", "head_dim")), write, read]

    def _steps(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Step sizes and the logarithms of decays, float32 [B, T, H] each."""
        dt = jax.nn.softplus(self.step(x.astype(jnp.float32), context) + self.step_bias[...])
        if self.config.step_limit is not None:
            dt = jnp.clip(dt, *self.config.step_limit)
        return dt, -jnp.exp(self.log_decay[...]) * dt

    def _keyed(
        self, u: jax.Array, write: jax.Array, read: jax.Array, dt: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys [B, T, H, N], values [B, T, H, P]."""
        each = self.config.num_heads // self.config.groups
        q, k = jnp.repeat(read, each, axis=2), jnp.repeat(write, each, axis=2)
        return q, k, (u * dt[..., None]).astype(u.dtype)

    def _normed(self, y: jax.Array, u: jax.Array, gate: jax.Array, context: Context) -> jax.Array:
        """[B, T, E] from what was read of the state."""
        y = name_activation(y, ATTENTION_OUT).astype(jnp.float32) + self.skip[...][:, None] * u.astype(jnp.float32)
        y = y * jax.nn.silu(gate.astype(jnp.float32))
        grouped = y.reshape(*y.shape[:2], self.config.groups, -1)
        grouped = grouped * jax.lax.rsqrt(jnp.mean(grouped * grouped, -1, keepdims=True) + self.config.epsilon)
        return self.output((grouped.reshape(y.shape) * self.scale[...]).astype(u.dtype), context)
