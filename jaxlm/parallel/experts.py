"""Tokens to experts and back: sorted on one device, exchanged on a mesh. No token is dropped and none is padded."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel.collectives import gather, scatter_sum
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.rules import mesh_axes

Kernels = Mapping[str, jax.Array]
"""Matrices by name, each with a leading axis over experts."""

Apply = Callable[[jax.Array, Kernels, jax.Array], jax.Array]
"""What experts do: (rows [M, E] sorted by expert, their kernels, int32 [X] rows of each expert) -> [M, E].

Rows past the last expert's give 0 and pass no gradient. With a part of the kernels' "mlp" axis it gives a summand.
"""


def through_experts(
    apply: Apply, kernels: Kernels, x: jax.Array, chosen: jax.Array, weights: jax.Array, *, first: jax.Array | int = 0
) -> jax.Array:
    """The weighted sum of what its experts make of each token, on one device.

    Args:
      apply: what experts do.
      kernels: of the experts first, first + 1, ..., X of them; choices of others add nothing.
      x: [*tokens, E].
      chosen: int32 [*tokens, K], different experts for a token; any number that is no expert chooses none.
      weights: float32 [*tokens, K].
      first: see `kernels`; may be traced.

    Returns:
      [*tokens, E] in x's type; the sum is taken in float32.
    """
    (num_experts,) = {len(kernel) for kernel in kernels.values()}
    shape = x.shape
    x, chosen, weights = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights))
    tokens, choices = chosen.shape
    experts = chosen.ravel() - first
    experts = jnp.where((experts >= 0) & (experts < num_experts), experts, num_experts)
    group_sizes = jnp.sum(experts[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    order = jnp.argsort(experts)  # stable; choices of no expert here come last
    places = jnp.argsort(order).astype(jnp.int32)  # where choice n * K + k has its row
    order = order[: tokens * min(choices, num_experts)]  # a token's choices differ: no more can be of these experts
    rows = apply(_to_rows(x, order, places), kernels, group_sizes)
    return _from_rows(rows, weights, order, places).reshape(shape)


# Both ways are gathers, and so are their gradients: XLA would make scatters of them, which are slow on TPUs.
@jax.custom_vjp
def _to_rows(x: jax.Array, order: jax.Array, places: jax.Array) -> jax.Array:
    """[N, E] -> [M, E]: a row for each of the first M choices in `order`."""
    return x[order // (len(places) // len(x))]


def _to_rows_forward(x, order, places):
    return _to_rows(x, order, places), (len(x), places)


def _to_rows_backward(residuals, rows):
    tokens, places = residuals
    return _choices(rows, places, tokens).sum(1, dtype=jnp.float32).astype(rows.dtype), None, None


_to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def _from_rows(rows: jax.Array, weights: jax.Array, order: jax.Array, places: jax.Array) -> jax.Array:
    """[M, E] -> [N, E]: the weighted sums of the tokens' rows."""
    chosen = _choices(rows, places, len(weights))
    return jnp.einsum("nke,nk->ne", chosen.astype(jnp.float32), weights).astype(rows.dtype)


def _from_rows_forward(rows, weights, order, places):
    return _from_rows(rows, weights, order, places), (rows, weights, order, places)


def _from_rows_backward(residuals, out):
    rows, weights, order, places = residuals
    out = out.astype(jnp.float32)
    to_rows = weights.ravel()[order][:, None] * out[order // weights.shape[1]]
    chosen = _choices(rows, places, len(weights)).astype(jnp.float32)
    return to_rows.astype(rows.dtype), jnp.einsum("nke,ne->nk", chosen, out), None, None


_from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def _choices(rows: jax.Array, places: jax.Array, tokens: int) -> jax.Array:
    """[M, E] -> [N, K, E]: the row of each choice, 0 of those that have none."""
    return rows.at[places].get(mode="fill", fill_value=0).reshape(tokens, -1, rows.shape[1])


@dataclasses.dataclass(frozen=True)
class ShardedExperts:
    """`through_experts` on a mesh, each device with its own experts.

    Devices that have different experts also have different tokens (both are split over the mesh axis `expert`): they
    gather each other's, each computes what its experts make of them, and the sums are scattered back to the tokens'
    devices. Matrices that are split over their hidden width (`tensor`) give summands too; those that are stored in
    parts (`fsdp`) are gathered first.

    Attributes:
      parallel: a mesh of more than one device, and how arrays lie on it.
    """

    parallel: Parallelism

    def __call__(
        self,
        apply: Apply,
        kernels: Kernels,
        axes: Mapping[str, tuple[str, ...]],
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
    ) -> jax.Array:
        """See `jaxlm.layers.context.Ops.through_experts`."""
        places = {name: self.parallel.spec(axes[name], kernel.shape) for name, kernel in kernels.items()}
        tokens = self.parallel.spec(("batch", "length"), chosen.shape[:2])

        def splitting(name: str, axis: str) -> tuple[str, ...]:
            return _entry(places[name], axes[name].index(axis))

        (over_experts,) = {splitting(name, "experts") for name in kernels}
        (over_hidden,) = {splitting(name, "mlp") for name in kernels}
        exchanged = tuple(axis for axis in (*over_experts, *over_hidden) if axis in mesh_axes(tokens))
        summed = tuple(axis for axis in (*over_experts, *over_hidden) if axis not in exchanged)

        def on_one_device(kernels, x, chosen, weights):
            here = len(next(iter(kernels.values())))
            first = jax.lax.axis_index(over_experts) * here if over_experts else 0
            kernels = {
                name: gather(kernel, stored, axes[name].index("embed"))
                if (stored := splitting(name, "embed"))
                else kernel
                for name, kernel in kernels.items()
            }
            if exchanged:
                # Of a token's summands, forward and backward, all but its experts' are 0: a sum in x's type is as good.
                x, weights = gather(x, exchanged, 0, x.dtype), gather(weights, exchanged, 0)
                chosen = jax.lax.all_gather(chosen, exchanged, tiled=True)
            out = through_experts(apply, kernels, x, chosen, weights, first=first)
            if summed:
                out = jax.lax.psum(out, summed)
            if exchanged:
                out = scatter_sum(out, exchanged, 0, out.dtype)
            return out

        rows = PartitionSpec(*tokens)
        return jax.shard_map(
            on_one_device,
            mesh=self.parallel.mesh,
            axis_names=self.parallel.free_axes,
            in_specs=(places, rows, rows, rows),
            out_specs=rows,
            check_vma=False,  # a pallas_call does not say over which axes its results vary
        )(dict(kernels), x, chosen, weights)


def _entry(partition: PartitionSpec, dimension: int) -> tuple[str, ...]:
    """The mesh axes that split a dimension."""
    entry = partition[dimension] if dimension < len(partition) else None
    return (entry,) if isinstance(entry, str) else entry or ()
