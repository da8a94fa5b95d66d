"""Mixers with a running state on a mesh: each device on its own examples, and its own heads or channels."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxlm.parallel.parallelism import Parallelism
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.selective_scan import selective_scan

Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ShardedMixers:
    """`linear_attention` and `selective_scan` of whole arrays; see `ShardedOps`.

    GSPMD cannot split a kernel, so that every device calls it on its part (`shard_map`). Heads and channels do not
    touch each other. A row's tokens do, one after the other: they must lie on one device.

    Attributes:
      parallel: a mesh of more than one device, and how arrays lie on it.
    """

    parallel: Parallelism

    def linear_attention(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        log_decay: jax.Array | None,
        *,
        segment_ids: jax.Array | None = None,
        initial_state: jax.Array | None = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Arguments and results are those of `pallas_kernels.linear_attention.linear_attention`."""
        by_head = ("batch", None, "heads", None)
        arrays = {
            "q": (q, by_head),
            "k": (k, by_head),
            "v": (v, by_head),
            "log_decay": (log_decay, by_head),
            "segment_ids": (segment_ids, ("batch", None)),
            "initial_state": (initial_state, ("batch", "heads", None, None)),
        }
        results = ((v.shape, by_head), ((len(q), *q.shape[2:], v.shape[3]), ("batch", "heads", None, None)))
        return self._on_each_device(functools.partial(linear_attention, **options), arrays, results)

    def selective_scan(
        self,
        x: jax.Array,
        dt: jax.Array,
        a: jax.Array,
        b: jax.Array,
        c: jax.Array,
        d: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        initial_state: jax.Array | None = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Arguments and results are those of `pallas_kernels.selective_scan.selective_scan`."""
        by_channel, by_entry = ("batch", None, "mlp"), ("batch", None, None)
        arrays = {
            "x": (x, by_channel),
            "dt": (dt, by_channel),
            "a": (a, ("mlp", None)),
            "b": (b, by_entry),
            "c": (c, by_entry),
            "d": (d, ("mlp",)),
            "segment_ids": (segment_ids, ("batch", None)),
            "initial_state": (initial_state, ("batch", "mlp", None)),
        }
        results = ((x.shape, by_channel), ((len(x), *a.shape), ("batch", "mlp", None)))
        return self._on_each_device(functools.partial(selective_scan, **options), arrays, results)

    def _on_each_device(
        self,
        mixer: Callable[..., Any],
        arrays: dict[str, tuple[jax.Array | None, Names]],
        results: tuple[tuple[tuple[int, ...], Names], ...],
    ) -> tuple[jax.Array, jax.Array]:
        if self.parallel.spec(("length",)):
            raise ValueError(
                f"A layer with a running state goes through a row token by token, so rows cannot be split over "
                f"{self.parallel.mesh.shape['sequence']} devices along their length; set MeshConfig.sequence to 1."
            )
        given = {name: (x, axes[: x.ndim]) for name, (x, axes) in arrays.items() if x is not None}
        return jax.shard_map(
            lambda parts: mixer(**parts),
            mesh=self.parallel.mesh,
            axis_names=self.parallel.free_axes,
            in_specs=({name: self.parallel.spec(axes, x.shape) for name, (x, axes) in given.items()},),
            out_specs=tuple(self.parallel.spec(axes, shape) for shape, axes in results),
            check_vma=False,
        )({name: x for name, (x, _) in given.items()})
