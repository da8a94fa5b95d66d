"""DeBERTa's disentangled attention (arXiv 2006.03654, 3.1): content and relative position meet in the scores.

The score of a query at i for a key at j is q_i . k_j + q_i . K_d + k_j . Q_d, where K and Q are projections of a vector
for each relative position d of i and j: content to content, content to position, position to content. The last two are
a bias of its own for each example and head: [B, H, T, T] numbers, twice while they are computed, whatever computes the
attention. Kernels that take no such bias refuse it by name, as do rows that are split along their length.
"""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.layers.attention import Attention, AttentionConfig, QKNorm
from jaxlm.layers.context import Context
from jaxlm.layers.norms import Norm, NormConfig
from jaxlm.layers.parameters import Linear, ParameterMaker, Parametrization, PathKey
from pallas_kernels.biases import DenseBias
from pallas_kernels.masks import Mask


@dataclasses.dataclass(frozen=True)
class RelativeEmbeddings:
    """A vector for each relative position, which all layers of a stack share.

    Attributes:
      span: half of the table's rows (K): relative positions -K ... K - 1, those further away being the last on their
        side.
      max_distance: with logarithmic buckets: distances up to K / 2 have a vector each, those up to this one the other
        half. None: no buckets.
      norm: of the vectors, or None.
    """

    span: int
    max_distance: int | None = None
    norm: NormConfig | None = None

    def __post_init__(self):
        if self.span < 1 or (self.max_distance is not None and not 1 < self.span // 2 < self.max_distance - 1):
            raise ValueError(
                f"RelativeEmbeddings.span={self.span} must be positive, and with buckets half of it must lie between 1 "
                f"and max_distance - 1, with max_distance={self.max_distance}."
            )

    def rows(self, offsets: np.ndarray) -> np.ndarray:
        """The table's row for each offset, query position minus key position: int32 of the shape of `offsets`."""
        return np.clip(self._buckets(offsets) + self.span, 0, 2 * self.span - 1).astype(np.int32)

    def _buckets(self, offsets: np.ndarray) -> np.ndarray:
        if self.max_distance is None:
            return offsets
        exact = self.span // 2
        distance = np.maximum(np.abs(offsets), exact).astype(np.float32)
        # float32, as in the released code: bucket borders lie where its rounding puts them.
        ratio = np.log(distance / np.float32(exact)) / np.log(np.float32((self.max_distance - 1) / exact))
        shared = np.ceil(ratio * np.float32(exact - 1)) + exact
        return np.where(np.abs(offsets) <= exact, offsets, np.sign(offsets) * shared).astype(np.int64)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RelativeVectors:
    """What a stack's `RelativeEmbeddings` give its layers.

    Attributes:
      table: [2 K, E], in the type of activations.
      config: whose they are.
    """

    table: jax.Array
    config: RelativeEmbeddings = dataclasses.field(metadata={"static": True})

    @property
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """What the axes of its arrays run over, as `pallas_kernels.biases.Bias.axes`."""
        return (("relpos_buckets", "embed"),)


class RelativeEmbeddingTable(nnx.Module):
    """The table of `RelativeEmbeddings`."""

    def __init__(self, config: RelativeEmbeddings, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey):
        embed = (("embed", make.width),)
        self.table = make.embedding(key.at("table"), (("relpos_buckets", 2 * config.span), *embed))
        self.norm = Norm(config.norm, make, embed) if config.norm else None
        self.config, self.dtype = config, dtype

    def __call__(self) -> RelativeVectors:
        """The vectors for attention."""
        table = self.table[...]
        return RelativeVectors((table if self.norm is None else self.norm(table)).astype(self.dtype), self.config)


@dataclasses.dataclass(frozen=True)
class DisentangledAttentionConfig(AttentionConfig):
    """Self-attention whose scores see relative positions by vectors; the stack has `RelativeEmbeddings`.

    `dropout` is also the rate on these vectors before they are projected, in each layer others (github.com/microsoft/
    DeBERTa, DeBERTa/deberta/disentangled_attention.py, pos_dropout).

    Attributes:
      content_to_position: q_i . K_d takes part.
      position_to_content: k_j . Q_d takes part.
      shared_projections: K and Q are made by the projections of keys and queries (DeBERTaV3), not by ones of their own.
    """

    content_to_position: bool = True
    position_to_content: bool = True
    shared_projections: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.terms:
            raise ValueError(
                "DisentangledAttentionConfig has neither content_to_position nor position_to_content; use "
                "AttentionConfig, which has no relative positions either."
            )
        if self.kv_heads != self.num_heads or self.qk_norm is not QKNorm.NONE:
            raise ValueError(
                f"Disentangled attention has as many key heads as query heads and does not normalise them, got "
                f"num_heads={self.num_heads}, num_kv_heads={self.kv_heads}, qk_norm={self.qk_norm.value!r}."
            )

    @property
    def terms(self) -> int:
        """How many of the two terms with positions take part."""
        return self.content_to_position + self.position_to_content

    @override
    def score_scale(self, parametrization: Parametrization) -> float:
        return super().score_scale(parametrization) / (1.0 if self.scale is not None else (1 + self.terms) ** 0.5)

    @override
    def build(
        self,
        make: ParameterMaker,
        *,
        residual_gain: float,
        dtype: jnp.dtype,
        key: PathKey,
        source_width: int | None = None,
    ) -> "DisentangledAttention":
        if source_width is not None:
            raise ValueError("Disentangled attention compares positions of one text; cross-attention needs another.")
        return DisentangledAttention(
            self, make, residual_gain=residual_gain, dtype=dtype, key=key, source_width=make.width
        )


class DisentangledAttention(Attention):
    """Attention with a bias made of queries, keys and `RelativeVectors`, which come in place of a stack's bias."""

    def __init__(
        self, config: DisentangledAttentionConfig, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey, **options
    ):
        super().__init__(config, make, dtype=dtype, key=key, **options)
        embed, heads = (("embed", make.width),), (("heads", config.num_heads), ("head_dim", config.head_dim))

        def projection(name: str, needed: bool) -> Linear | None:
            if config.shared_projections or not needed:
                return None
            return Linear(make, embed, heads, bias=config.qkv_bias, dtype=dtype, key=key.at(name))

        self.position_key = projection("position_key", config.content_to_position)
        self.position_query = projection("position_query", config.position_to_content)

    @override
    def prefill(self, *args, **options):
        raise ValueError(
            "Disentangled attention has no cache to generate from; it serves encoders, and AttentionConfig decoders."
        )

    @override
    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, bias: RelativeVectors, context: Context
    ) -> jax.Array:
        return super()._attend(q, k, v, mask, self._positions(q, k, bias, context), context)

    def _positions(self, q: jax.Array, k: jax.Array, vectors: RelativeVectors, context: Context) -> DenseBias:
        """The scaled terms with positions, float32 [B, H, T, T]."""
        config, length = self.config, q.shape[1]
        if context.ops.splits_length:
            raise ValueError(
                "Disentangled attention needs its rows whole, but the mesh splits them along their length; set "
                "MeshConfig.sequence to 1."
            )
        table = context.fold("positions").table_dropout(vectors.table, config.dropout)
        offsets = np.arange(length - 1, -length, -1)  # query minus key, for key minus query -(T - 1) ... T - 1

        def term(x: jax.Array, projection: Linear, rows: np.ndarray) -> jax.Array:
            """x [B, T, H, D] times the projected vectors; entry (i, j) is that of row i at j - i."""
            projected = projection(table, context)  # [2 K, H, D]
            products = jnp.einsum("bthd,khd->bhtk", x, projected, preferred_element_type=jnp.float32)
            return _by_diagonal(jnp.take(products, rows, axis=-1))

        scores = 0.0
        if config.content_to_position:
            scores = term(q, self.position_key or self.key, vectors.config.rows(offsets))
        if config.position_to_content:
            by_key = term(k, self.position_query or self.query, vectors.config.rows(-offsets))
            scores = scores + by_key.swapaxes(-1, -2)
        scores = context.ops.constrain(scores * self.scale, ("batch", "heads", None, None))
        return DenseBias(scores, differentiable=True)


def _by_diagonal(x: jax.Array) -> jax.Array:
    """[..., T, 2 T - 1] -> [..., T, T], whose entry (i, j) is x's (i, j - i + T - 1).

    Rows of one entry less, cut from the same numbers laid end to end, shift by one each.
    """
    *leading, length, period = x.shape
    flat = x.reshape(*leading, length * period)[..., length - 1 : length - 1 + length * (period - 1)]
    return flat.reshape(*leading, length, period - 1)[..., :length]
