"""What a model needs of the mesh: constraints, attention, recurrent mixers, experts, cross-entropy."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.parallel.experts import Apply, Kernels, ShardedExperts, through_experts
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.pipeline import Layer, StackedLayers, run_in_sequence, run_in_stages
from jaxlm.parallel.sharded_attention import ShardedAttention
from jaxlm.parallel.sharded_cross_entropy import ShardedCrossEntropy
from jaxlm.parallel.sharded_mixers import ShardedMixers
from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import OutputProjection, TokenScores, cross_entropy, token_scores
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.selective_scan import selective_scan


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gradient_placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`x`, whose gradient lies as `sharding` says."""
    return x


_gradient_placed.defvjp(
    lambda x, sharding: (x, None), lambda sharding, _, gradient: (jax.lax.with_sharding_constraint(gradient, sharding),)
)


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

    def parameter(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """A layer's parameter `x`, of whose gradient each device is to get the piece that it stores.

        Said here, in the loop over layers, gradients are scattered layer by layer; said of the gradients of all layers
        after the loop, each would first be summed as a whole on every device.
        """
        return _gradient_placed(x, self.parallel.stored(names, x.shape)) if self.parallel.gathers else x

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
        with self._platform():
            if self.parallel.mesh.size == 1:
                return attention(q, k, v, **options)
            return ShardedAttention(self.parallel)(q, k, v, rows=self.row_numbers(len(q)), **options)

    def linear_attention(
        self, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """`pallas_kernels.linear_attention.linear_attention`, each device on its own examples and heads.

        Raises:
          ValueError: rows are split along their length.
        """
        with self._platform():
            if self.parallel.mesh.size == 1:
                return linear_attention(q, k, v, log_decay, **options)
            return ShardedMixers(self.parallel).linear_attention(q, k, v, log_decay, **options)

    def selective_scan(
        self, x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """`pallas_kernels.selective_scan.selective_scan`, each device on its own examples and channels.

        Raises:
          ValueError: rows are split along their length.
        """
        with self._platform():
            if self.parallel.mesh.size == 1:
                return selective_scan(x, dt, a, b, c, d, **options)
            return ShardedMixers(self.parallel).selective_scan(x, dt, a, b, c, d, **options)

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
        with self._platform():
            if self.parallel.mesh.size == 1:
                return through_experts(apply, kernels, x, chosen, weights)
            return ShardedExperts(self.parallel)(apply, kernels, axes, x, chosen, weights)

    def cross_entropy(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array, **options: Any
    ) -> tuple[jax.Array, TokenScores]:
        """`pallas_kernels.cross_entropy.cross_entropy` of tokens spread over the mesh.

        Args:
          features: [B, T, E], in the mesh's order.
          projection: its matrix and bias lie on the mesh as "embed" and "vocab" say.
          labels, weights: [B, T], in the rows' own order.
          **options: z_loss, recompute, backend, ... passed on; a chunk is of each device's tokens or ids.

        Returns:
          The sum, and `TokenScores` [B, T], in the rows' own order.
        """
        with self._platform():
            if self.parallel.mesh.size == 1:
                return cross_entropy(features, projection, labels, weights, **options)
            labels, weights = self.arrange(labels), self.arrange(weights)
            total, scores = ShardedCrossEntropy(self.parallel).summed(features, projection, labels, weights, **options)
            return total, jax.tree.map(self.restore, scores)

    def token_scores(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, **options: Any
    ) -> TokenScores:
        """`pallas_kernels.cross_entropy.token_scores`, [B, T], of tokens spread over the mesh; see `cross_entropy`."""
        with self._platform():
            if self.parallel.mesh.size == 1:
                return token_scores(features, projection, labels, **options)
            scores = ShardedCrossEntropy(self.parallel).scores(features, projection, self.arrange(labels), **options)
            return jax.tree.map(self.restore, scores)

    def _platform(self) -> contextlib.AbstractContextManager[Any]:
        """Kernels ask the mesh in use what they will run on."""
        return jax.sharding.use_abstract_mesh(self.parallel.mesh.abstract_mesh)

    def _place(self, x: jax.Array, places: PartitionSpec) -> jax.Array:
        return (
            x
            if self.parallel.mesh.size == 1
            else jax.lax.with_sharding_constraint(x, NamedSharding(self.parallel.mesh, places))
        )
