"""Grouped matrix product behind one call: the rows of each group times a matrix of the group's own.

What a mixture of experts does once its tokens are sorted by expert. A backend gives the two products that forward and
backward passes are made of; the gradient, and the rows that are in no group, are seen to here for all of them.
"""

import functools
from typing import Protocol, override

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.choice import Candidate, Choice
from pallas_kernels.gpu import grouped_matmul as hopper


class UnsupportedGroupedMatmul(ValueError):
    """The named backend cannot do what was asked for, or does not exist."""


class Backend(Protocol):
    """One implementation. Rows past sum(group_sizes) hold anything, NaN too, and must not be felt elsewhere."""

    name: str

    def refuses(self, x: jax.Array, w: jax.Array) -> list[str]:
        """Reasons why this backend cannot serve the call; empty if it can. Looks at shapes, types and platform only."""

    def by_rows(self, x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
        """x[m] w[g] for each row m of group g, [M, N]; or x[m] w[g]^T, [M, K], of x [M, N]. Other rows: anything."""

    def by_groups(self, x: jax.Array, y: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """x_g^T y_g over the rows of each group g, [G, K, N], of x [M, K] and y [M, N]; 0 for empty groups."""


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, backend: str = "auto") -> jax.Array:
    """x[m] w[g] for each row m, where group g is the g-th stretch of rows; sums are float32.

    Rows past sum(group_sizes) give 0, whatever they hold, and pass no gradient. Groups may be empty.

    Args:
      x: [M, K], sorted by group.
      w: [G, K, N], of x's type.
      group_sizes: int32 [G], rows in each group; they add up to M at most. May depend on data.
      backend: a name from `GROUPED_MATMUL`, or "auto": the first in the platform's order that can.

    Returns:
      [M, N], in x's type. Differentiable in x and w, in reverse mode.

    Raises:
      UnsupportedGroupedMatmul: the named backend does not exist or refuses.
      ValueError: shapes or types do not fit.
    """
    _check(x, w, group_sizes)
    return _grouped_matmul(x, w, group_sizes, GROUPED_MATMUL.choose(backend, x, w))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, backend: Backend) -> jax.Array:
    return _zero_tail(backend.by_rows(x, w, group_sizes, transposed=False), group_sizes)


def _forward(x, w, group_sizes, backend):
    return _grouped_matmul(x, w, group_sizes, backend), (x, w, group_sizes)


def _backward(backend, residuals, dy):
    x, w, group_sizes = residuals
    dx = _zero_tail(backend.by_rows(dy, w, group_sizes, transposed=True), group_sizes)
    return dx, backend.by_groups(x, dy, group_sizes), None


_grouped_matmul.defvjp(_forward, _backward)


def _zero_tail(y: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(y.shape[0])[:, None] < jnp.sum(group_sizes), y, jnp.zeros((), y.dtype))


class RaggedDotBackend(Backend):
    """XLA's `ragged_dot`: the reference. On a CPU it multiplies every row by every group's matrix."""

    name = "ragged_dot"

    @override
    def refuses(self, x: jax.Array, w: jax.Array) -> list[str]:
        return []

    @override
    def by_rows(self, x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
        over = 2 if transposed else 1
        return _ragged_dot(x, w, group_sizes, contracting=((1,), (over,)), groups=(0,))

    @override
    def by_groups(self, x: jax.Array, y: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return _ragged_dot(x, y, group_sizes, contracting=((0,), (0,)), groups=())


def _ragged_dot(
    x: jax.Array,
    y: jax.Array,
    group_sizes: jax.Array,
    contracting: tuple[tuple[int, ...], tuple[int, ...]],
    groups: tuple[int, ...],
) -> jax.Array:
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracting, ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=groups
    )
    product = jax.lax.ragged_dot_general(x, y, group_sizes, dimensions, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)


class MegabloxBackend(Backend):
    """Jax's own TPU kernels (after MegaBlocks, arXiv 2211.15841): tiles of rows, each visited by the groups in it."""

    name = "megablox"

    @override
    def refuses(self, x: jax.Array, w: jax.Array) -> list[str]:
        reasons = []
        if platforms.current().kind == "gpu":
            reasons.append("it runs on TPUs, and interpreted on CPUs")
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            reasons.append(f"it multiplies bfloat16 and float32, not {x.dtype}")
        return reasons

    @override
    def by_rows(self, x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # slow to import, and needed on TPUs alone

        out = w.shape[1] if transposed else w.shape[2]
        tiles = megablox_tiles(x.shape[0], x.shape[1], out, w.shape[0], x.dtype)
        y = gmm(
            _pad_rows(x, tiles[0]),
            w,
            group_sizes,
            x.dtype,
            tiles,
            transpose_rhs=transposed,
            interpret=platforms.tpu_interpret(),
        )
        return y[: x.shape[0]]

    @override
    def by_groups(self, x: jax.Array, y: jax.Array, group_sizes: jax.Array) -> jax.Array:
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        tiles = megablox_tiles(x.shape[0], x.shape[1], y.shape[1], group_sizes.shape[0], x.dtype)
        x, y = _pad_rows(x, tiles[0]), _pad_rows(y, tiles[0])
        return tgmm(x.T, y, group_sizes, x.dtype, tiles, interpret=platforms.tpu_interpret())


def megablox_tiles(rows: int, inner: int, outer: int, groups: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    """Tile sizes (rows, x's columns, w's columns): of no more rows than a group has on average, and else large.

    A matrix whose K lies in one tile stays on the chip while its group's rows pass; splitting K doubles the cycles of
    the compiler's estimate (`benchmarks/results/grouped_matmul.json`). Larger tiles than these take minutes to compile.
    """
    high = min(256, max(128, rows // groups // 128 * 128))
    wide = 2048 // jnp.dtype(dtype).itemsize
    return min(high, -(-rows // 16) * 16), min(wide, -(-inner // 128) * 128), min(wide, -(-outer // 128) * 128)


def _pad_rows(x: jax.Array, multiple: int) -> jax.Array:
    missing = -x.shape[0] % multiple
    return jnp.pad(x, ((0, missing), (0, 0))) if missing else x


class PallasGpuBackend(Backend):
    """Our kernels for Hopper, see `pallas_kernels.gpu.grouped_matmul`."""

    name = "pallas_gpu"

    @override
    def refuses(self, x: jax.Array, w: jax.Array) -> list[str]:
        return hopper.refuses(x, w)

    @override
    def by_rows(self, x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
        return hopper.by_rows(x, w, group_sizes, transposed)

    @override
    def by_groups(self, x: jax.Array, y: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return hopper.by_groups(x, y, group_sizes)


_PLAIN = Candidate("ragged_dot", "XLA's own; refuses nothing.")

GROUPED_MATMUL: Choice[Backend] = Choice(
    "grouped_matmul",
    backends={b.name: b for b in (RaggedDotBackend(), MegabloxBackend(), PallasGpuBackend())},
    order={
        "cpu": (_PLAIN,),
        "tpu": (Candidate("megablox", "Multiplies each row by its own matrix alone."), _PLAIN),
        "gpu": (Candidate("pallas_gpu", "Multiplies each row by its own matrix alone."), _PLAIN),
    },
    error=UnsupportedGroupedMatmul,
)


def _check(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> None:
    seen = f"got x {x.shape}, w {w.shape}, group_sizes {group_sizes.shape}"
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"grouped_matmul takes x [M, K] and w [G, K, N]; {seen}.")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(f"grouped_matmul takes group_sizes [G], one of each matrix in w [G, K, N]; {seen}.")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be int32, not {group_sizes.dtype}: convert it.")
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must be of one type, not {x.dtype} and {w.dtype}: convert one of them.")
