"""What a model needs of the mesh: constraints, attention, experts, cross-entropy."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.parallel.collectives import gather
from jaxlm.parallel.experts import Apply, Kernels, ShardedExperts, through_experts
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.pipeline import Layer, StackedLayers, run_in_sequence, run_in_stages
from jaxlm.parallel.rules import degree, mesh_axes
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

    def arrange(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] in the order in which tokens lie on the mesh; see `jaxlm.parallel.row_order.RowOrder`."""
        order = self.parallel.row_order(x.shape[1])
        return x if order is None else order.arrange(x)

    def restore(self, x: jax.Array) -> jax.Array:
        """The reverse of `arrange`."""
        order = self.parallel.row_order(x.shape[1])
        return x if order is None else order.restore(x)

    def constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """`x`, laid out on the mesh as its logical axis names say; dimensions that do not divide are replicated."""
        return self._place(x, self.parallel.spec(names, x.shape))

    def attention(
        self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """`pallas_kernels.attention.attention`, each device on its own examples, heads and queries.

        Args:
          q: [B, T, H, D].
          k, v: [B, S, G, D], G key-value heads.
          **options: mask, bias, scale, backend, ... passed on. Mask and bias are about rows before `arrange`.

        Returns:
          [B, T, H, D], and the log-sum-exp [B, H, T] with `return_lse`.

        Raises:
          UnsupportedAttention: the backend refuses, or mask or bias cannot be split where rows are.
        """
        with jax.sharding.use_abstract_mesh(self.parallel.mesh.abstract_mesh):  # kernels ask it what they will run on
            if self.parallel.mesh.size == 1:
                return attention(q, k, v, **options)
            return ShardedAttention(self.parallel)(q, k, v, rows=self.row_numbers(len(q)), **options)

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

    def through_experts(
        self,
        apply: Apply,
        kernels: Kernels,
        axes: Mapping[str, tuple[str, ...]],
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
    ) -> jax.Array:
        """Tokens through their experts, wherever these are; see `jaxlm.layers.context.Ops`."""
        with jax.sharding.use_abstract_mesh(self.parallel.mesh.abstract_mesh):  # kernels ask it what they will run on
            if self.parallel.mesh.size == 1:
                return through_experts(apply, kernels, x, chosen, weights)
            return ShardedExperts(self.parallel)(apply, kernels, axes, x, chosen, weights)

    def cross_entropy(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array, **options: Any
    ) -> tuple[jax.Array, TokenScores]:
        """`pallas_kernels.cross_entropy.cross_entropy` of tokens spread over the mesh.

        Args:
          features: [B, T, E], in the mesh's order.
          projection: its matrix may be split over either axis.
          labels, weights: [B, T], in the rows' own order.
          **options: z_loss, chunk, ... passed on; a chunk is of each device's tokens.

        Returns:
          The sum, and `TokenScores` [B, T], in the rows' own order.
        """
        labels, weights = self.arrange(labels), self.arrange(weights)
        if self.parallel.mesh.size > 1 and not self.parallel.spec(("vocab",)):
            total, scores = self._cross_entropy_by_tokens(features, projection, labels, weights, options)
            return total, jax.tree.map(self.restore, scores)
        batch, length = labels.shape
        places = self.parallel.spec(("batch", "length"), labels.shape)
        rows, columns = (degree(self.parallel.mesh, places, axis) for axis in (0, 1))

        def to_groups(x):  # [B, T, ...] -> [row groups, column groups, tokens of a group, ...]
            x = x.reshape(rows, batch // rows, columns, length // columns, *x.shape[2:])
            x = jnp.moveaxis(x, 2, 1).reshape(rows, columns, -1, *x.shape[4:])
            return self._place(x, places)

        def from_groups(x):
            x = x.reshape(rows, columns, batch // rows, length // columns)
            return self.restore(self._place(jnp.moveaxis(x, 1, 2).reshape(batch, length), places))

        if self.parallel.mesh.size > 1:  # GSPMD partitions the plain form, and cannot partition a kernel
            options["backend"] = "xla"
        total, scores = cross_entropy(to_groups(features), projection, to_groups(labels), to_groups(weights), **options)
        return total, jax.tree.map(from_groups, scores)

    def _cross_entropy_by_tokens(
        self,
        features: jax.Array,
        projection: OutputProjection,
        labels: jax.Array,
        weights: jax.Array,
        options: dict[str, Any],
    ) -> tuple[jax.Array, TokenScores]:
        """Each device on its own tokens, with the whole vocabulary.

        The matrix is gathered once, in the products' type, and its gradient is scattered as it is summed: left to
        GSPMD it is gathered for every chunk of tokens, and summed whole on every device.
        """
        names = ("embed", "vocab") if projection.vocab_axis == 1 else ("vocab", "embed")
        tokens = self.parallel.spec(("batch", "length"), labels.shape)
        split = self.parallel.spec(names, projection.matrix.shape)
        everywhere = PartitionSpec()

        def on_one_device(features, matrix, bias, labels, weights):
            matrix = matrix.astype(features.dtype)
            for axis, entry in enumerate(split):
                if entry:
                    matrix = gather(matrix, entry, axis)
            whole = dataclasses.replace(projection, matrix=matrix, bias=bias)
            flat = features.reshape(-1, features.shape[-1]), whole, labels.ravel(), weights.ravel()
            total, scores = cross_entropy(*flat, **options)
            return total[None], jax.tree.map(lambda x: x.reshape(labels.shape), scores)

        totals, scores = jax.shard_map(
            on_one_device,
            mesh=self.parallel.mesh,
            in_specs=(tokens, split, everywhere, tokens, tokens),
            out_specs=(PartitionSpec(mesh_axes(tokens)), tokens),
            check_vma=False,  # a pallas_call does not say over which axes its results vary
        )(features, projection.matrix, projection.bias, labels, weights)
        return totals.sum(), scores

    def _place(self, x: jax.Array, places: PartitionSpec) -> jax.Array:
        return (
            x
            if self.parallel.mesh.size == 1
            else jax.lax.with_sharding_constraint(x, NamedSharding(self.parallel.mesh, places))
        )
