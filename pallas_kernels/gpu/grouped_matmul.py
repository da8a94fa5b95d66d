"""The two products of a grouped matmul for Hopper: tensor-core tiles fed by asynchronous copies, one warpgroup each.

Rows are cut into blocks without regard to groups. A block is visited once for each group with rows in it, and a visit
stores its own group's rows only; so no row is moved, and the work is at most one visit a group more than there are
blocks. Both kernels keep several tiles on their way (`_STAGES`) and fit twice on a multiprocessor, so that one's
arithmetic hides the other's start and end.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import platforms

_ROWS = 128  # of a block, and of the tile that a visit computes
_DEPTH = 64  # of the contraction, in one step: 128 bytes of 16-bit numbers, the widest swizzle
_HALF = 64  # rows of one tensor-core instruction, and of what is stored at once
_STAGES = 3  # 3 x 32 KB of tiles and 16 KB to store from: twice that is what a multiprocessor has


def refuses(x: jax.Array, w: jax.Array) -> list[str]:
    """Reasons why these kernels cannot serve x [M, K] and w [G, K, N]; empty if they can."""
    reasons = []
    platform = platforms.current()
    if platform.kind != "cpu" and platform.chip not in ("h100", "h200"):
        reasons.append(f"it runs on Hopper GPUs, and interpreted on CPUs, not on {platform.chip}")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"it multiplies bfloat16 and float16, not {x.dtype}")
    if w.shape[1] % 64 or w.shape[2] % 64:
        reasons.append(f"K and N must be multiples of 64, not {w.shape[1]} and {w.shape[2]}")
    return reasons


def by_rows(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    """x[m] w[g] for each row m of group g, [M, N]; or x[m] w[g]^T, [M, K], of x [M, N]. Other rows: anything."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu  # slow to import, and needed on GPUs alone

    rows, out_size = x.shape[0], w.shape[1] if transposed else w.shape[2]
    columns, steps = _tile(out_size), x.shape[1] // _DEPTH
    x = _pad_rows(x)
    visits = _visits(group_sizes, x.shape[0] // _ROWS)

    def kernel(block_ref, group_ref, start_ref, end_ref, x_ref, w_ref, out_ref, x_tiles, w_tiles, out_tile, loaded):
        visit = jax.lax.axis_index("visit")
        first_column = jax.lax.axis_index("column") * columns
        block, group = block_ref[visit], group_ref[visit]
        start, end = start_ref[visit], end_ref[visit]

        def fetch(step, slot):
            depth = pl.ds(step * _DEPTH, _DEPTH)
            across = pl.ds(first_column, columns)
            w_tile = w_ref.at[group, across, depth] if transposed else w_ref.at[group, depth, across]
            x_tile = x_ref.at[pl.ds(block * _ROWS, _ROWS), depth]
            plgpu.copy_gmem_to_smem(x_tile, x_tiles.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(w_tile, w_tiles.at[slot], loaded.at[slot])

        def multiply(step, slot, accumulators):
            w_tile = w_tiles.at[slot]
            for half, accumulator in enumerate(accumulators):
                x_half = x_tiles.at[slot, pl.ds(half * _HALF, _HALF)]
                plgpu.wgmma(accumulator, x_half, w_tile.T if transposed else w_tile)

        def store(half, product):
            """Stores this group's rows of one half: a copy's length is static, so as 64, 32, ..., 1 rows as needed."""
            out_tile[...] = product.astype(out_tile.dtype)
            plgpu.commit_smem()
            half_start = block * _ROWS + half * _HALF
            first = jnp.clip(start - half_start, 0, _HALF)
            count = jnp.clip(end - half_start, 0, _HALF) - first
            length = _HALF
            while length:

                @pl.when(count & length != 0)
                def _(length=length, first=first):
                    to = out_ref.at[pl.ds(half_start + first, length), pl.ds(first_column, columns)]
                    plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(first, length)], to)

                first = first + (count & length)
                length //= 2
            plgpu.wait_smem_to_gmem(0)

        @pl.when(start < end)
        def _():
            products = _pipeline(steps, fetch, multiply, loaded, (_ROWS, columns))
            for half, product in enumerate(products):
                store(half, product)

    x_tile, swizzled = (_STAGES, _ROWS, _DEPTH), _swizzled()
    w_tile = (_STAGES, columns, _DEPTH) if transposed else (_STAGES, _DEPTH, columns)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x.shape[0], out_size), x.dtype),
        grid=(out_size // columns, visits[0].size),
        grid_names=("column", "visit"),
        scratch_types=[
            plgpu.SMEM(x_tile, x.dtype, transforms=swizzled),
            plgpu.SMEM(w_tile, x.dtype, transforms=swizzled),
            plgpu.SMEM((_HALF, columns), x.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        ],
        kernel_name="grouped_matmul_by_rows",
        **platforms.gpu_interpret(),
    )(*visits, x, w)
    return out[:rows]


def by_groups(x: jax.Array, y: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """x_g^T y_g over the rows of each group g, [G, K, N], of x [M, K] and y [M, N]; 0 for empty groups."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    high, wide = _tile(x.shape[1]), _tile(y.shape[1])
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes

    def kernel(start_ref, end_ref, x_ref, y_ref, out_ref, x_tiles, y_tiles, out_tile, loaded):
        group = jax.lax.axis_index("group")
        down, across = (pl.ds(jax.lax.axis_index(a) * s, s) for a, s in (("row", high), ("column", wide)))
        start, end = start_ref[group], end_ref[group]
        first = start // _DEPTH
        steps = jnp.where(start < end, (end + _DEPTH - 1) // _DEPTH - first, 0)

        def fetch(step, slot):
            rows = pl.ds((first + step) * _DEPTH, _DEPTH)
            plgpu.copy_gmem_to_smem(x_ref.at[rows, down], x_tiles.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(y_ref.at[rows, across], y_tiles.at[slot], loaded.at[slot])

        def hide_other_groups(step, tile):
            row = (first + step) * _DEPTH + plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
            values = plgpu.load(tile, layout=plgpu.Layout.WGMMA, optimized=False)
            tile[...] = jnp.where((row >= start) & (row < end), values, jnp.zeros_like(values))

        def multiply(step, slot, accumulators):
            @pl.when((step == 0) | (step == steps - 1))
            def _():  # Both: a hidden row may hold infinities, which times 0 are not 0.
                hide_other_groups(step, x_tiles.at[slot])
                hide_other_groups(step, y_tiles.at[slot])
                plgpu.commit_smem()

            for half, accumulator in enumerate(accumulators):
                x_half = x_tiles.at[slot, :, pl.ds(half * _HALF, _HALF)]
                plgpu.wgmma(accumulator, x_half.T, y_tiles.at[slot])

        products = _pipeline(steps, fetch, multiply, loaded, (high, wide))
        for half, product in enumerate(products):
            out_tile[...] = product.astype(out_tile.dtype)
            plgpu.commit_smem()
            to = out_ref.at[group, pl.ds(jax.lax.axis_index("row") * high + half * _HALF, _HALF), across]
            plgpu.copy_smem_to_gmem(out_tile, to)
            plgpu.wait_smem_to_gmem(0)

    swizzled = _swizzled()
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((group_sizes.size, x.shape[1], y.shape[1]), x.dtype),
        grid=(x.shape[1] // high, y.shape[1] // wide, group_sizes.size),
        grid_names=("row", "column", "group"),
        scratch_types=[
            plgpu.SMEM((_STAGES, _DEPTH, high), x.dtype, transforms=swizzled),
            plgpu.SMEM((_STAGES, _DEPTH, wide), x.dtype, transforms=swizzled),
            plgpu.SMEM((_HALF, wide), x.dtype, transforms=swizzled),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        ],
        kernel_name="grouped_matmul_by_groups",
        **platforms.gpu_interpret(),
    )(starts, ends, _pad_rows(x), _pad_rows(y))


def _pipeline(
    steps: int | jax.Array,
    fetch: Callable[[Any, Any], None],
    multiply: Callable[[Any, Any, Any], None],
    loaded: Any,
    tile: tuple[int, int],
) -> list[jax.Array]:
    """Sums of `steps` products, float32, in pieces of `_HALF` rows of `tile`.

    `fetch(step, slot)` starts copies that arrive at `loaded[slot]`; `multiply(step, slot, accumulators)` starts one
    product a piece. A slot is filled anew when the products of the step after it have been started, and its own are
    done.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    pieces = tile[0] // _HALF

    def body(*accumulators):
        for slot in range(_STAGES - 1):
            pl.when(slot < steps)(lambda slot=slot: fetch(slot, slot))

        @pl.loop(0, steps)
        def _(step):
            slot = jax.lax.rem(step, _STAGES)
            plgpu.barrier_wait(loaded.at[slot])
            multiply(step, slot, accumulators)
            plgpu.wgmma_wait(pieces)  # all but the products just started are done
            ahead = step + _STAGES - 1
            pl.when(ahead < steps)(lambda: fetch(ahead, jax.lax.rem(ahead, _STAGES)))

        plgpu.wgmma_wait(0)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(body, *[plgpu.ACC((_HALF, tile[1]), jnp.float32)] * pieces)


def _visits(group_sizes: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """int32 block, group, first row and row past the last of each visit; at most one a group more than blocks.

    Visits that are not needed have no rows.
    """
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    first_block = starts // _ROWS
    count = jnp.where(group_sizes > 0, (ends - 1) // _ROWS - first_block + 1, 0)
    until = jnp.cumsum(count)
    visit = jnp.arange(blocks + group_sizes.size, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(until, visit, side="right"), group_sizes.size - 1).astype(jnp.int32)
    block = jnp.minimum(first_block[group] + visit - (until - count)[group], blocks - 1)
    needed = visit < until[-1]
    first = jnp.maximum(starts[group], block * _ROWS)
    end = jnp.where(needed, jnp.minimum(ends[group], (block + 1) * _ROWS), first)
    return block, group, first, end


def _tile(size: int) -> int:
    return 128 if size % 128 == 0 else 64


def _pad_rows(x: jax.Array) -> jax.Array:
    missing = -x.shape[0] % _ROWS
    return jnp.pad(x, ((0, missing), (0, 0))) if missing else x


def _swizzled() -> tuple[Any, ...]:
    """How tiles lie in shared memory, as the tensor cores read them."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
