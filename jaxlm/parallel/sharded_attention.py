"""Attention on a mesh: each device on its own examples and heads."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.rules import degree
from pallas_kernels.attention import Origin, UnsupportedAttention, attention
from pallas_kernels.biases import Bias, DenseBias
from pallas_kernels.masks import Mask


@dataclasses.dataclass(frozen=True)
class ShardedAttention:
    """`pallas_kernels.attention.attention` of whole arrays; see `ShardedOps.attention`.

    GSPMD cannot split a kernel, so every device calls `attention` on its part (`shard_map`), and who computes it is
    chosen for that part. Where key heads are too few to be split, a device takes those that its query heads use. Rows
    that lie on several devices are left to GSPMD and the reference.

    Attributes:
      parallel: a mesh of more than one device, and how arrays lie on it.
    """

    parallel: Parallelism

    def along_rows(self, q: jax.Array, k: jax.Array, v: jax.Array, *, backend: str = "auto", **options: Any) -> Any:
        """Of rows split along their length: plain XLA, which GSPMD partitions by itself.

        Raises:
          UnsupportedAttention: the backend is another.
        """
        if backend not in ("auto", "xla"):
            raise UnsupportedAttention(
                f"{backend} cannot work on rows that the mesh splits along their length (sequence parallelism, "
                f"MeshConfig.sequence); use the backend xla or auto there."
            )
        queries, keys = ("batch", "length", "heads", None), ("batch", None, "kv_heads", None)
        q, k, v = self._place(q, queries), self._place(k, keys), self._place(v, keys)
        result = attention(q, k, v, backend="xla", **options)
        return jax.tree.map(lambda x: self._place(x, queries) if x.ndim == 4 else x, result)

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
        """Of whole rows; the arguments are those of `attention`.

        And rows: int32 [B], which rows of the whole batch these are; neighbours on each device.
        """
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

    def _place(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        places = self.parallel.spec(names, x.shape)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.parallel.mesh, places))


def _index(axes: str | tuple[str, ...] | None) -> jax.Array | int:
    """Which part of what these mesh axes split this device has, inside shard_map."""
    return jax.lax.axis_index(axes) if axes else 0


def _heads_of(x: jax.Array, first: jax.Array | int, count: int, group: int) -> jax.Array:
    """Of keys or values [B, S, G, D] the heads that query heads first ... first + count - 1 use.

    Query head h uses head h // group. Each is taken as often as equal shares need.
    """
    share = math.gcd(group, count)
    return jnp.take(x, (first + jnp.arange(0, count, share)) // group, axis=2)
