"""Attention: multi-head, grouped-query and multi-query; self and cross."""

import dataclasses
import enum
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.cache import CacheConfig, Extension, KeyValueCache, PackedTexts, held_positions
from jaxlm.layers.context import Context
from jaxlm.layers.norms import Norm, NormConfig
from jaxlm.layers.parameters import Linear, ParameterMaker, Parametrization, PathKey
from jaxlm.layers.positions import Alibi, RelativePositions, RelativeTable, Rope, Rotation, rotate
from jaxlm.layers.remat import name_activation
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.biases import Bias, PlacedBias
from pallas_kernels.masks import Mask, Window


class QKNorm(enum.Enum):
    """Normalised queries and keys: NONE, each HEAD by itself (OpenELM, Qwen 3), or ALL heads together (OLMo 2)."""

    NONE = "none"
    HEAD = "head"
    ALL = "all"


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One attention layer.

    Attributes:
      num_heads: query heads (H).
      head_dim: size of a head (D); need not be width / num_heads.
      num_kv_heads: key and value heads; None is num_heads (multi-head), 1 is multi-query, else grouped.
      position: Rope, RelativePositions (a table of this layer's own), Alibi, or None.
      window: (left, right): a query sees that many keys on either side of it, and itself; None sees all.
      qk_norm: see `QKNorm`; after the projection, before RoPE.
      qk_norm_config: the norm of queries and keys; needed unless qk_norm is none.
      soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2: 50); None leaves them.
      scale: factor on q . k; None is the parametrisation's (1 / sqrt(head_dim)); T5 has 1.
      qkv_bias: biases on queries, keys and values.
      output_bias: bias on the output projection.
      sinks: a learned logit a head that takes part in the softmax without a value (attention sinks).
      dropout: rate on the attention weights.
      backend: who computes it, a name in `pallas_kernels.attention_backends`, or "auto": the fastest that can.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    position: Rope | RelativePositions | Alibi | None = None
    window: tuple[int, int] | None = None
    qk_norm: QKNorm = QKNorm.NONE
    qk_norm_config: NormConfig | None = None
    soft_cap: float | None = None
    scale: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    dropout: float = 0.0
    backend: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "qk_norm", QKNorm(self.qk_norm))
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"AttentionConfig.num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}, so that each "
                f"key head serves as many query heads."
            )
        if (self.qk_norm is not QKNorm.NONE) != (self.qk_norm_config is not None):
            raise ValueError(
                f"AttentionConfig.qk_norm={self.qk_norm.value!r} and qk_norm_config={self.qk_norm_config} do not go "
                f"together: set both or neither."
            )
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 0):
            raise ValueError(f"AttentionConfig.window must be (left, right), neither negative; got {self.window}.")
        if isinstance(self.position, Rope) and self.position.rotated_dims(self.head_dim) == 0:
            raise ValueError(
                f"Rope.fraction={self.position.fraction} of head_dim={self.head_dim} leaves no pair of dimensions to "
                f"rotate; use position=None for no positions."
            )
        ATTENTION.check_name(self.backend, "AttentionConfig.backend")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    runs: ClassVar[bool] = False  # carries no state along the row

    @property
    def score_heads(self) -> int | None:
        """Heads whose scores take a bias of the stack's relative positions."""
        return self.num_heads

    @property
    def pair_flops(self) -> float:
        """Floating-point operations forwards and backwards for a (query, key) pair that the mask shows."""
        return 12.0 * self.num_heads * self.head_dim

    def mixing_flops(self, length: int, *, both_sides: bool) -> float:
        """Of a row of so many tokens that see each other, or only those before them."""
        left, right = self.window or (length, length)
        sides = (left, right) if both_sides else (left,)
        pairs = length * sum(w - w * w / (2 * length) for w in (min(side, length) for side in sides))
        return self.pair_flops * pairs

    def token_sizes(self, ways: Callable[[str, int], int]) -> tuple[int, int]:
        """Numbers that a token has on one device: in the result, and in queries, keys, values and result."""
        heads = self.num_heads * self.head_dim // ways("heads", self.num_heads)
        return heads, 2 * heads + 2 * self.kv_heads * self.head_dim // ways("kv_heads", self.kv_heads)

    def score_scale(self, parametrization: Parametrization) -> float:
        """The factor on q . k: `scale`, or what None stands for."""
        return parametrization.attention_scale(self.head_dim) if self.scale is None else self.scale

    def build(
        self,
        make: ParameterMaker,
        *,
        residual_gain: float,
        dtype: jnp.dtype,
        key: PathKey,
        source_width: int | None = None,
    ) -> "Attention":
        """The module; a subclass may build another with the same call.

        Arguments as for `FeedForwardConfig.build`, and `source_width`: of what keys and values are made of, if not the
        model's width.
        """
        return Attention(self, make, residual_gain=residual_gain, dtype=dtype, key=key, source_width=source_width)


class Attention(nnx.Module):
    """Queries of one sequence attend to keys and values of the same or another one."""

    def __init__(
        self,
        config: AttentionConfig,
        make: ParameterMaker,
        *,
        residual_gain: float,
        dtype: jnp.dtype,
        key: PathKey,
        source_width: int | None = None,
    ):
        embed, source = (("embed", make.width),), (("embed", source_width or make.width),)
        heads = (("heads", config.num_heads), ("head_dim", config.head_dim))
        kv_heads = (("kv_heads", config.kv_heads), ("head_dim", config.head_dim))

        def linear(name, inputs, outputs, bias, gain=1.0):
            return Linear(make, inputs, outputs, bias=bias, gain=gain, dtype=dtype, key=key.at(name))

        query_gain = config.head_dim**-0.5 if make.init.scaled_query else 1.0
        self.query = linear("query", embed, heads, config.qkv_bias, query_gain)
        self.key = linear("key", source, kv_heads, config.qkv_bias)
        self.value = linear("value", source, kv_heads, config.qkv_bias)
        self.output = linear("output", heads, embed, config.output_bias, residual_gain)
        first = 1 if config.qk_norm is QKNorm.HEAD else 0  # the axes a norm runs over: (D,) or (H, D)
        normed = config.qk_norm is not QKNorm.NONE
        self.query_norm = Norm(config.qk_norm_config, make, heads[first:]) if normed else None
        self.key_norm = Norm(config.qk_norm_config, make, kv_heads[first:]) if normed else None
        self.sinks = make.vector(heads[:1], 0.0) if config.sinks else None
        own_table = isinstance(config.position, RelativePositions)
        self.relative = (
            RelativeTable(config.position, make, config.num_heads, key=key.at("relative")) if own_table else None
        )
        self.config = config
        self.scale = config.score_scale(make.parametrization)

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
        """What x finds in `source`.

        Args:
          x: [B, T, E].
          source: [B, S, source width]; x itself for self-attention.
          mask: which query sees which key, `Intervals` where there are `positions`; `config.window` narrows it.
          rotation: cosines and sines for `config.position`, if it is a Rope.
          bias: of a table shared by the stack; added to none of the layer's own.
          context: operations and dropout key.
          positions: int32 [B, T], of the tokens of both in their text, where columns do not say them; None: they do.

        Returns:
          [B, T, E].
        """
        q = self.queries(x, rotation, context)
        k, v = self.keys_and_values(source, rotation, context)
        bias, mask = self._bias(bias), self._narrowed(mask, positions)
        if bias is not None and positions is not None:
            bias = PlacedBias(bias, positions, positions)
        return self.output(self._attend(q, k, v, mask, bias, context), context)

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
    ) -> tuple[jax.Array, KeyValueCache]:
        """As `__call__`, and what is to be remembered of the `texts` in the rows of `source`."""
        q = self.queries(x, rotation, context)
        k, v = self.keys_and_values(source, rotation, context)
        cache = KeyValueCache.of(k, v, texts, caching, window=self._left)
        mask, bias = self._narrowed(mask), self._bias(bias)
        return self.output(self._attend(q, k, v, mask, bias, context), context), cache

    def extend(
        self,
        x: jax.Array,
        cache: KeyValueCache,
        new: Extension,
        *,
        rotation: Rotation | None,
        bias: Bias | None,
        context: Context,
    ) -> tuple[jax.Array, KeyValueCache]:
        """What t new tokens a slot find in their text and in each other, causally.

        Args:
          x: [B, t, E].
          cache: the text before them.
          new: where they stand.
          rotation: cosines and sines at their positions, if `config.position` is a Rope.
          bias: of a table shared by the stack; added to none of the layer's own.
          context: operations.

        Returns:
          [B, t, E], and the cache with them in it.
        """
        left, count = self._left, x.shape[1]
        if cache.limit is not None and left + count > cache.limit:
            raise ValueError(
                f"{count} tokens at once extend a layer with a window, whose cache was made for {cache.limit - left}; "
                f"set CacheConfig.extension to {count}."
            )
        cache = cache.append(*self.keys_and_values(x, rotation, context), new.lengths)
        held = held_positions(new.lengths + count, cache.entries)[:, None]  # [B, 1, S]
        at = new.positions[..., None]  # [B, t, 1]
        visible = (held >= 0) & (held <= at)
        if left is not None:
            visible &= held >= at - left
        own = self._bias(bias)
        scores_bias = None if own is None else own.between(new.positions, held[:, 0])
        return self._recall(self.queries(x, rotation, context), cache, visible, scores_bias, context), cache

    def recall(self, x: jax.Array, cache: KeyValueCache, lengths: jax.Array, *, context: Context) -> jax.Array:
        """What t new tokens a slot [B, t, E] find in another text, of which the cache holds `lengths` [B] tokens."""
        visible = jnp.arange(cache.entries) < lengths[:, None]  # [B, S]
        return self._recall(self.queries(x, None, context), cache, visible[:, None], None, context)

    def queries(self, x: jax.Array, rotation: Rotation | None, context: Context) -> jax.Array:
        """[B, T, E] -> [B, T, H, D], normalised and rotated."""
        q = self.query(x, context)
        if self.query_norm is not None:
            q = self.query_norm(q)
        return name_activation(q if rotation is None else rotate(q, rotation), "query")

    def keys_and_values(
        self, source: jax.Array, rotation: Rotation | None, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        """[B, S, E] -> [B, S, Hkv, D] each, the keys normalised and rotated."""
        k, v = self.key(source, context), self.value(source, context)
        if self.key_norm is not None:
            k = self.key_norm(k)
        if rotation is not None:
            k = rotate(k, rotation)
        return name_activation(k, "key"), name_activation(v, "value")

    @property
    def _left(self) -> int | None:
        """How many tokens back a query sees, itself not counted."""
        return None if self.config.window is None else self.config.window[0]

    def _narrowed(self, mask: Mask, positions: jax.Array | None = None) -> Mask:
        """What a query sees in its window: by columns, or by `positions`."""
        window = self.config.window
        if window is None:
            return mask
        return mask & Window(*window) if positions is None else mask.near(*window, positions)

    def _bias(self, shared: Bias | None) -> Bias | None:
        """What is added to the scores: the layer's own bias, or else the stack's."""
        if self.relative is not None:
            return self.relative()
        if isinstance(self.config.position, Alibi):
            return self.config.position.bias(self.config.num_heads)
        return shared

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, bias: Bias | None, context: Context
    ) -> jax.Array:
        config = self.config
        return context.ops.attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            scale=self.scale,
            soft_cap=config.soft_cap,
            sinks=None if self.sinks is None else self.sinks[...],
            dropout_rate=config.dropout,
            dropout_key=context.dropout_key,
            backend=config.backend,
        )

    def _recall(
        self, q: jax.Array, cache: KeyValueCache, visible: jax.Array, bias: jax.Array | None, context: Context
    ) -> jax.Array:
        out = attend_to_cache(
            q,
            cache.keys.read(q.dtype),
            cache.values.read(q.dtype),
            visible,
            bias=bias,
            scale=self.scale,
            soft_cap=self.config.soft_cap,
            sinks=None if self.sinks is None else self.sinks[...],
        )
        return self.output(out, context)


def attend_to_cache(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: jax.Array,
    *,
    bias: jax.Array | None,
    scale: float,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Attention of a few new queries to what caches hold, by the definition of `pallas_kernels.attention`.

    t is small, so the scores are t rows of what the cache holds and no kernel has anything to save on a CPU. What one
    would save on a TPU is reading entries beyond a slot's length, which here are read and hidden.

    Args:
      q: [B, t, H, D].
      keys, values: [B, G, S, D]; query head h uses key head h // (H / G).
      visible: bool [B, t|1, S].
      bias: float32 [B|1, H, t, S] added to the scores, or None.
      scale, soft_cap, sinks: as for `pallas_kernels.attention.attention`.

    Returns:
      [B, t, H, D].
    """
    batch, count, heads, size = q.shape
    groups, entries = keys.shape[1:3]
    each = heads // groups
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, count, groups, each, size)
    # Queries that share a key head are rows of one product.
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, groups, each * count, size)
    scores = jnp.einsum("bgnd,bgsd->bgns", q, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, count, entries)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    # A slot that holds nothing yet sees nothing; 0 is then as good a maximum as any.
    highest = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)[None, :, None, None]
        highest = jnp.maximum(highest, sinks)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - highest)
    weights = (weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(values.dtype)
    out = jnp.einsum("bgns,bgsd->bgnd", weights.reshape(batch, groups, each * count, entries), values)
    return out.reshape(batch, groups, each, count, size).transpose(0, 3, 1, 2, 4).reshape(batch, count, heads, size)
