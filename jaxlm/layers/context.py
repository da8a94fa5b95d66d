"""Context: what a layer needs of the outside world. The operations of the mesh, and the dropout key."""

import dataclasses
import math
import zlib
from typing import Any, Protocol, override

import jax
import jax.numpy as jnp

from jaxlm.parallel.pipeline import Layer, StackedLayers, run_in_sequence
from pallas_kernels import dropout
from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import OutputProjection, TokenScores, cross_entropy


class Ops(Protocol):
    """Operations whose implementation depends on the mesh: `LocalOps`, `jaxlm.parallel.sharded_ops.ShardedOps`.

    Attributes:
      splits_length: whether rows are spread over devices along their length (sequence parallelism).
    """

    splits_length: bool = False

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        """`pallas_kernels.attention.attention`."""

    def cross_entropy(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array, **options: Any
    ) -> tuple[jax.Array, TokenScores]:
        """`pallas_kernels.cross_entropy.cross_entropy` of features [B, T, E], labels and weights [B, T]."""

    def constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """`x`, laid out as its logical axis names say."""

    def row_numbers(self, count: int) -> jax.Array:
        """int32 [count]: which rows of the whole batch a layer is given (in a pipeline, those of a microbatch)."""

    def run_layers(
        self, layer: Layer, layers: StackedLayers, x: jax.Array, rows: Any, shared: Any
    ) -> tuple[jax.Array, Any]:
        """The repeats of a stack one after the other; see `jaxlm.parallel.pipeline.run_in_stages`."""


class LocalOps(Ops):
    """Operations on one device."""

    @override
    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        return attention(q, k, v, **options)

    @override
    def cross_entropy(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array, **options: Any
    ) -> tuple[jax.Array, TokenScores]:
        flat = features.reshape(-1, features.shape[-1]), projection, labels.ravel(), weights.ravel()
        total, scores = cross_entropy(*flat, **options)
        return total, jax.tree.map(lambda x: x.reshape(labels.shape), scores)

    @override
    def constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return x

    @override
    def row_numbers(self, count: int) -> jax.Array:
        return jnp.arange(count, dtype=jnp.int32)

    @override
    def run_layers(
        self, layer: Layer, layers: StackedLayers, x: jax.Array, rows: Any, shared: Any
    ) -> tuple[jax.Array, Any]:
        return run_in_sequence(layer, layers, x, rows, shared, ops=self)


@dataclasses.dataclass(frozen=True)
class Context:
    """Passed down through every layer's call.

    Attributes:
      ops: see `Ops`.
      dropout_key: jax key, or None: deterministic, no dropout.
    """

    ops: Ops = LocalOps()
    dropout_key: jax.Array | None = None

    def fold(self, where: int | jax.Array | str) -> "Context":
        """A context for a part of the model, with a key of its own; `where` may be traced (a layer's index)."""
        if self.dropout_key is None:
            return self
        index = zlib.crc32(where.encode()) if isinstance(where, str) else where
        return dataclasses.replace(self, dropout_key=jax.random.fold_in(self.dropout_key, index))

    def dropout(self, x: jax.Array, rate: float) -> jax.Array:
        """`x` [B, ...] with a share `rate` of its entries set to 0 and the rest grown by 1 / (1 - rate)."""
        if self.dropout_key is None or rate == 0.0:
            return x
        indices = list(jnp.indices(x.shape, sparse=True))
        indices[0] = self.ops.row_numbers(len(x)).reshape(indices[0].shape)
        kept = dropout.keep_entries(dropout.seed_of(self.dropout_key), indices, rate)
        return jnp.where(kept, x / (1.0 - rate), 0)

    def matmul(self, x: jax.Array, kernel: jax.Array, contracted: int, *, result: Any = None) -> jax.Array:
        """x times kernel over x's last and kernel's first `contracted` axes.

        All other axes of x become one, tokens, if they can: XLA's CPU backend then takes a third less time for a
        training step (it transposes operands of more than two axes before it multiplies them for gradients), and
        accelerators lose nothing. They cannot where rows are spread along their length: tokens would have to move.

        Args:
          x: [*tokens, *inputs].
          kernel: [*inputs, *outputs].
          contracted: number of input axes.
          result: type of the result; None is that of the operands.

        Returns:
          [*tokens, *outputs].
        """
        if self.ops.splits_length:
            axes = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted)))
            return jax.lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=result)
        tokens, outputs = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
        x = x.reshape(math.prod(tokens), -1)
        kernel = kernel.reshape(x.shape[1], math.prod(outputs))
        return jnp.matmul(x, kernel, preferred_element_type=result).reshape(*tokens, *outputs)


LOCAL = Context()  # one device, no dropout
