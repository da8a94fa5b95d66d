"""What a model needs of the mesh: `constrain` an activation, and attention. The one place that may use `shard_map`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.parallel.rules import Rules, spec

_MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardedOps:
    """Operations on a mesh, handed to the layers through `jaxlm.layers.context.Context.ops`.

    Attributes:
      mesh: the device mesh.
      rules: logical-axis rules, see `jaxlm.parallel.rules`.
    """

    mesh: Mesh
    rules: Rules

    @property
    def splits_length(self) -> bool:
        """Whether rows are spread over devices along their length (sequence parallelism)."""
        axes = dict(self.rules).get("length", ())
        return any(self.mesh.shape[axis] > 1 for axis in axes)

    def constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """`x`, laid out on the mesh as its logical axis names say; dimensions that do not divide are replicated."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, spec(names, self.rules, self.mesh, x.shape))
        )

    def attention(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, backend: str = "auto", **options: Any
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """`pallas_kernels.attention.attention`: each device on its own examples and heads.

        GSPMD cannot split a kernel, so every device calls `attention` on its part (`shard_map`), and who computes it is
        chosen for that part. Where key heads are too few to be split, a device takes those that its query heads use.
        Rows spread along their length are left to GSPMD and the reference.

        Args:
          q: [B, T, H, D].
          k, v: [B, S, G, D], G key-value heads.
          backend: see there.
          **options: mask, bias, scale, ... passed on.

        Returns:
          [B, T, H, D], and the log-sum-exp [B, H, T] with `return_lse`.

        Raises:
          UnsupportedAttention: the backend refuses, or is not "xla" where rows are spread along their length.
        """
        from pallas_kernels.attention import attention

        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # kernels ask it what they will run on
            if self.mesh.size == 1:
                return attention(q, k, v, backend=backend, **options)
            if self.splits_length:
                return self._along_rows(q, k, v, backend=backend, **options)
            return self._by_examples_and_heads(q, k, v, backend=backend, **options)

    def _along_rows(self, q: jax.Array, k: jax.Array, v: jax.Array, *, backend: str, **options: Any) -> Any:
        """Plain XLA, which GSPMD partitions by itself."""
        from pallas_kernels.attention import UnsupportedAttention, attention

        if backend not in ("auto", "xla"):
            raise UnsupportedAttention(
                f"{backend} cannot work on rows that the mesh splits along their length (sequence parallelism, "
                f"MeshConfig.sequence); use the backend xla or auto there."
            )
        queries, keys = ("batch", "length", "heads", None), ("batch", None, "kv_heads", None)
        q, k, v = self.constrain(q, queries), self.constrain(k, keys), self.constrain(v, keys)
        result = attention(q, k, v, backend="xla", **options)
        out, *rest = result if isinstance(result, tuple) else (result,)
        out = self.constrain(out, queries)
        return (out, *rest) if rest else out

    def _by_examples_and_heads(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: Any,
        bias: Any = None,
        sinks: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        from pallas_kernels.attention import Origin, attention
        from pallas_kernels.biases import Bias, DenseBias

        batch, _, heads, _ = (*spec(("batch", None, "heads", None), self.rules, self.mesh, q.shape), None, None, None)[
            :4
        ]
        mesh_axes = {"batch": batch, "heads": heads, None: None}
        if bias is not None and not isinstance(bias, Bias):
            bias = DenseBias(bias)
        for part in (mask, bias):
            if part is not None:
                part.check(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        split_keys = k.shape[2] % self._degree(heads) == 0
        group = q.shape[2] // k.shape[2]

        # Numbers of Python stay what they are: to some backends they are part of a mask's static form.
        leaves, structure = jax.tree.flatten((mask, bias))
        axes = [*mask.axes, *(() if bias is None else bias.axes)]
        arrays = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, int | float)}
        array_specs = {i: PartitionSpec(*(mesh_axes[name] for name in axes[i])) for i in arrays}

        def on_one_device(q, k, v, arrays, sinks, dropout_key):
            mask, bias = jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
            origin = Origin(batch=self._index(batch) * q.shape[0], head=self._index(heads) * q.shape[2])
            if not split_keys:
                k, v = (_heads_of(x, origin.head, q.shape[2], group) for x in (k, v))
            return attention(
                q,
                k,
                v,
                mask=mask,
                bias=bias,
                sinks=sinks,
                dropout_key=dropout_key,
                origin=origin,
                return_lse=return_lse,
                **options,
            )

        queries = PartitionSpec(batch, None, heads)
        keys = PartitionSpec(batch, None, heads if split_keys else None)
        return jax.shard_map(
            on_one_device,
            mesh=self.mesh,
            in_specs=(queries, keys, keys, array_specs, PartitionSpec(heads), PartitionSpec()),
            out_specs=(queries, PartitionSpec(batch, heads)) if return_lse else queries,
            check_vma=False,  # a pallas_call does not say over which axes its results vary
        )(q, k, v, arrays, sinks, dropout_key)

    def _degree(self, axes: _MeshAxes) -> int:
        return math.prod(self.mesh.shape[axis] for axis in _names(axes))

    def _index(self, axes: _MeshAxes) -> jax.Array | int:
        """Which part of what `axes` split this device has, inside shard_map."""
        return jax.lax.axis_index(_names(axes)) if axes else 0


def _names(axes: _MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _heads_of(x: jax.Array, first: jax.Array | int, count: int, group: int) -> jax.Array:
    """Of keys or values [B, S, G, D] the heads that query heads first ... first + count - 1 use.

    Query head h uses head h // group. Each is taken as often as needed for equal shares.
    """
    share = math.gcd(group, count)
    return jnp.take(x, (first + jnp.arange(0, count, share)) // group, axis=2)
