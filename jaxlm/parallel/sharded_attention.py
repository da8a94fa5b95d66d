"""Attention on a mesh: each device on its own examples, heads and queries."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel.parallelism import KeysMove, Parallelism
from jaxlm.parallel.ring_attention import Options, Route, Surroundings, split_attention
from jaxlm.parallel.row_order import RowOrder
from jaxlm.parallel.rules import degree
from pallas_kernels.attention import Origin, UnsupportedAttention, attention, with_sinks
from pallas_kernels.biases import Bias, DenseBias
from pallas_kernels.masks import Mask


@dataclasses.dataclass(frozen=True)
class ShardedAttention:
    """`pallas_kernels.attention.attention` of whole arrays; see `ShardedOps.attention`.

    GSPMD cannot split a kernel, so every device calls `attention` on its part (`shard_map`), and who computes it is
    chosen for that part. Where key heads are too few to be split, a device takes those that its query heads use. Where
    rows lie on several devices, their keys travel (`jaxlm.parallel.ring_attention`).

    Attributes:
      parallel: a mesh of more than one device, and how arrays lie on it.
    """

    parallel: Parallelism

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> Any:
        """Arguments and results are those of `attention`, the tokens of q, k and v in the mesh's order.

        And rows: int32 [B], which rows of the whole batch these are; neighbours on each device.
        """
        whole = self.parallel.row_order(q.shape[1]) is None
        return (self.by_examples_and_heads if whole else self.along_rows)(q, k, v, **options)

    def along_rows(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: Mask,
        rows: jax.Array,
        bias: Bias | jax.Array | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        sinks: jax.Array | None = None,
        dropout_rate: float = 0.0,
        dropout_key: jax.Array | None = None,
        return_lse: bool = False,
        backend: str = "auto",
    ) -> Any:
        """Of rows split along their length, in the mesh's order; mask and bias are about the rows as they were.

        Raises:
          UnsupportedAttention: mask or bias cannot be taken apart.
        """
        mesh, axes, sizes = self.parallel.mesh, ("batch", "length", "heads"), (q.shape[1], k.shape[1])
        queries, keys = (self.parallel.row_order(size) for size in sizes)
        mask.check(q.shape[0], q.shape[2], *sizes)
        seen, sparse = mask.rows(*sizes), mask.block_sparse
        if reason := _not_splittable(mask, bias, queries, keys):
            raise UnsupportedAttention(
                f"{reason} cannot be split along rows (sequence parallelism, MeshConfig.sequence = {queries.devices})."
            )
        if bias is not None:
            bias.check(q.shape[0], q.shape[2], *sizes)
            bias = bias.guarded()
        places = self.parallel.spec((*axes, None), q.shape)
        batch, length, heads = (*places, None, None)[:3]
        split_keys = k.shape[2] % degree(mesh, places, 2) == 0
        route = self._route(q, k, mask, queries, keys, length)
        options = Options(scale, soft_cap, dropout_rate, backend, None if sparse is None else sparse.block)

        seen = jax.tree.map(lambda x: queries.arrange(x, axis=2), seen)
        blocks = None
        if sparse is not None:
            blocks = sparse.map(*sizes, *sparse.block)
            blocks = dataclasses.replace(queries, length=blocks.shape[2]).arrange(blocks, axis=2)
        around = Surroundings(seen, blocks, dropout_key, 0, 0)

        def part(x, *names):  # along an axis of size 1 an array serves all
            return PartitionSpec(*(name if size > 1 else None for name, size in zip(names, x.shape)))

        around_places = Surroundings(
            jax.tree.map(lambda x: part(x, batch, None, length), seen),
            None if blocks is None else part(blocks, batch, heads, length),
            PartitionSpec(),
            PartitionSpec(),
            PartitionSpec(),
        )
        bias_leaves, bias_structure = jax.tree.flatten(bias)
        bias_axes = () if bias is None else bias.axes
        bias_places = [PartitionSpec(*(heads if name == "heads" else None for name in names)) for names in bias_axes]

        def on_one_device(q, k, v, bias_leaves, around, rows):
            head = _index(heads) * q.shape[2]
            if not split_keys:
                k, v = (_heads_of(x, head, q.shape[2], group) for x in (k, v))
            bias = jax.tree.unflatten(bias_structure, bias_leaves)
            around = dataclasses.replace(around, batch=rows[0], head=head)
            return split_attention(route, options, q, k, v, bias, around)

        group = q.shape[2] // k.shape[2]
        q_places = PartitionSpec(batch, length, heads)
        k_places = PartitionSpec(batch, None if keys is None else length, heads if split_keys else None)
        out, lse = jax.shard_map(
            on_one_device,
            mesh=mesh,
            axis_names=self.parallel.free_axes,
            in_specs=(q_places, k_places, k_places, bias_places, around_places, PartitionSpec(batch)),
            out_specs=(q_places, PartitionSpec(batch, heads, length)),
            check_vma=False,
        )(q, k, v, bias_leaves, around, rows)
        if sinks is not None:
            out, lse = with_sinks(out, lse, sinks)
        return (out, lse) if return_lse else out

    def _route(self, q, k, mask: Mask, queries: RowOrder, keys: RowOrder | None, axis) -> Route:
        if keys is None:
            return Route(axis, queries, None)
        ring = Route.ring(axis, queries, keys, mask)
        wanted = self.parallel.sequence.keys
        if wanted is KeysMove.AUTO:
            all_keys, own_queries = k.shape[1] * k.shape[2], q.shape[1] // queries.devices * q.shape[2]
            short_way = ring.forward + ring.backward < keys.devices - 1
            wanted = KeysMove.RING if short_way or all_keys > own_queries else KeysMove.ALL_GATHER
        return ring if wanted is KeysMove.RING else Route(axis, queries, keys, gathered=True)

    def by_examples_and_heads(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: Mask,
        rows: jax.Array,
        bias: Bias | jax.Array | None = None,
        sinks: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        """Of whole rows."""
        if bias is not None and not isinstance(bias, Bias):
            bias = DenseBias(bias)
        for part in (mask, bias):
            if part is not None:
                part.check(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        places = self.parallel.spec(("batch", None, "heads", None), q.shape)
        batch, _, heads, _ = (*places, None, None, None, None)[:4]
        split_keys = k.shape[2] % degree(self.parallel.mesh, places, 2) == 0
        group = q.shape[2] // k.shape[2]

        # Python's numbers stay what they are: to some backends they are part of a mask's static form.
        leaves, structure = jax.tree.flatten((mask, bias))
        axes = [*mask.axes, *(() if bias is None else bias.axes)]
        on_mesh = {"batch": batch, "heads": heads, None: None}
        arrays = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, int | float)}
        array_places = {i: PartitionSpec(*(on_mesh[name] for name in axes[i])) for i in arrays}

        def on_one_device(q, k, v, arrays, sinks, dropout_key, rows):
            mask, bias = jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
            origin = Origin(batch=rows[0], head=_index(heads) * q.shape[2])
            if not split_keys:
                k, v = (_heads_of(x, origin.head, q.shape[2], group) for x in (k, v))
            special = dict(mask=mask, bias=bias, sinks=sinks, dropout_key=dropout_key, origin=origin)
            return attention(q, k, v, **special, return_lse=return_lse, **options)

        queries, keys = PartitionSpec(batch, None, heads), PartitionSpec(batch, None, heads if split_keys else None)
        return jax.shard_map(
            on_one_device,
            mesh=self.parallel.mesh,
            axis_names=self.parallel.free_axes,
            in_specs=(queries, keys, keys, array_places, PartitionSpec(heads), PartitionSpec(), PartitionSpec(batch)),
            out_specs=(queries, PartitionSpec(batch, heads)) if return_lse else queries,
            check_vma=False,  # a pallas_call does not say over which axes its results vary
        )(q, k, v, arrays, sinks, dropout_key, rows)


def _index(axes: str | tuple[str, ...] | None) -> jax.Array | int:
    """Which part of what these mesh axes split this device has, inside shard_map."""
    return jax.lax.axis_index(axes) if axes else 0


def _heads_of(x: jax.Array, first: jax.Array | int, count: int, group: int) -> jax.Array:
    """Of keys or values [B, S, G, D] the heads that query heads first ... first + count - 1 use.

    Query head h uses head h // group. Each is taken as often as equal shares need.
    """
    share = math.gcd(group, count)
    return jnp.take(x, (first + jnp.arange(0, count, share)) // group, axis=2)


def _not_splittable(mask: Mask, bias: Bias | jax.Array | None, queries: RowOrder, keys: RowOrder | None) -> str | None:
    """What of the call cannot be taken apart by runs of queries and keys; None if all can."""
    if mask.intervals is None:
        return f"The mask {mask}, which is not made of key intervals,"
    if bias is not None and (not isinstance(bias, Bias) or isinstance(bias, DenseBias)):
        return "A bias given as an array (use RelativeBias or AlibiBias)"
    if (sparse := mask.block_sparse) is not None:
        runs = [order.run_length for order in (queries, keys) if order is not None]
        if any(run % side for run, side in zip(runs, sparse.block)):
            return f"BlockSparse.block={sparse.block}, whose sides do not divide the runs of {runs} tokens on a device,"
    return None
