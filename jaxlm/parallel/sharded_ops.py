"""What a model needs of the mesh: constraints, attention, cross-entropy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.pipeline import Layer, StackedLayers, run_in_sequence, run_in_stages
from jaxlm.parallel.rules import degree
from jaxlm.parallel.sharded_attention import ShardedAttention
from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import OutputProjection, TokenScores, cross_entropy


@dataclasses.dataclass(frozen=True)
class ShardedOps:
    """Operations on a mesh, handed to the layers through `jaxlm.layers.context.Context.ops`.

    Attributes:
      parallel: the mesh and how arrays lie on it.
      rows: int32 [B], which rows of the whole batch a layer is given, inside a pipeline; None: it is given all.
    """

    parallel: Parallelism
    rows: jax.Array | None = None

    @property
    def splits_length(self) -> bool:
        """Whether rows are spread over devices along their length (sequence parallelism)."""
        return bool(self.parallel.spec(("length",)))

    def constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """`x`, laid out on the mesh as its logical axis names say; dimensions that do not divide are replicated."""
        return self._place(x, self.parallel.spec(names, x.shape))

    def attention(
        self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """`pallas_kernels.attention.attention`, each device on its own examples and heads.

        Args:
          q: [B, T, H, D].
          k, v: [B, S, G, D], G key-value heads.
          **options: mask, bias, scale, backend, ... passed on.

        Returns:
          [B, T, H, D], and the log-sum-exp [B, H, T] with `return_lse`.

        Raises:
          UnsupportedAttention: the backend refuses, or is not "xla" where rows are spread along their length.
        """
        with jax.sharding.use_abstract_mesh(self.parallel.mesh.abstract_mesh):  # kernels ask it what they will run on
            if self.parallel.mesh.size == 1:
                return attention(q, k, v, **options)
            sharded = ShardedAttention(self.parallel)
            if self.splits_length:
                return sharded.along_rows(q, k, v, **options)
            return sharded.by_examples_and_heads(q, k, v, rows=self.row_numbers(len(q)), **options)

    def row_numbers(self, count: int) -> jax.Array:
        """int32 [count]: which rows of the whole batch a layer is given."""
        return jnp.arange(count, dtype=jnp.int32) if self.rows is None else self.rows

    def run_layers(
        self, layer: Layer, layers: StackedLayers, x: jax.Array, rows: Any, shared: Any
    ) -> tuple[jax.Array, Any]:
        """The repeats of a stack one after the other, in pipeline stages if the mesh has them; see `run_in_stages`."""
        if self.parallel.mesh.shape["stage"] == 1:
            return run_in_sequence(layer, layers, x, rows, shared, ops=self)
        return run_in_stages(layer, layers, x, rows, shared, parallel=self.parallel, ops=ShardedOps)

    def cross_entropy(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array, **options: Any
    ) -> tuple[jax.Array, TokenScores]:
        """`pallas_kernels.cross_entropy.cross_entropy` of tokens spread over the mesh.

        Args:
          features: [B, T, E].
          projection: its matrix may be split over either axis.
          labels, weights: [B, T].
          **options: z_loss, chunk, ... passed on; a chunk is of each device's tokens.

        Returns:
          The sum, and `TokenScores` [B, T].
        """
        batch, length = labels.shape
        places = self.parallel.spec(("batch", "length"), labels.shape)
        rows, columns = (degree(self.parallel.mesh, places, axis) for axis in (0, 1))

        def to_groups(x):  # [B, T, ...] -> [row groups, column groups, tokens of a group, ...]
            x = x.reshape(rows, batch // rows, columns, length // columns, *x.shape[2:])
            x = jnp.moveaxis(x, 2, 1).reshape(rows, columns, -1, *x.shape[4:])
            return self._place(x, places)

        def from_groups(x):
            x = x.reshape(rows, columns, batch // rows, length // columns)
            return self._place(jnp.moveaxis(x, 1, 2).reshape(batch, length), places)

        if self.parallel.mesh.size > 1:  # GSPMD partitions the plain form, and cannot partition a kernel
            options["backend"] = "xla"
        total, scores = cross_entropy(to_groups(features), projection, to_groups(labels), to_groups(weights), **options)
        return total, jax.tree.map(from_groups, scores)

    def _place(self, x: jax.Array, places: PartitionSpec) -> jax.Array:
        return (
            x
            if self.parallel.mesh.size == 1
            else jax.lax.with_sharding_constraint(x, NamedSharding(self.parallel.mesh, places))
        )
