"""The arrays that kernels read beside q, k and v: padding, lists of the blocks to visit, biases, hashes of dropout."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import dropout
from pallas_kernels.fused import Inputs
from pallas_kernels.gpu.tiles import ROWS
from pallas_kernels.plans import FULL, HIDDEN, Plan, plan_of_rows


def round_up(length: int, block: int) -> int:
    """The next multiple of `block`."""
    return -(-length // block) * block


def pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    """`x` with zeros at the end of `axis`, `length` long."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths) if widths[axis][1] else x


def plan_of(inputs: Inputs, tk: int, block: tuple[int, int]) -> Plan:
    """The block plan of the inputs' mask."""
    plan = plan_of_rows(inputs.rows, tk, block)
    if inputs.block_sparse is None:
        return plan
    listed = inputs.block_sparse.map(inputs.rows.lo.shape[-1], tk, *block)
    return dataclasses.replace(plan, state=jnp.where(listed, plan.state, HIDDEN))


def visits(plan: Plan, *, by_keys: bool = False) -> dict[str, jax.Array]:
    """The plan as `count` [B|1, H|1, n] and `visits` [B|1, H|1, n, m]: 2 * block, and 1 more if the block is FULL."""
    count, index = plan.lists(by_keys=by_keys)
    state = plan.state.swapaxes(-1, -2) if by_keys else plan.state
    full = jnp.take_along_axis(state, index, axis=-1) == FULL
    return {"count": count, "visits": 2 * index + full}


def bounds(inputs: Inputs, tq: int) -> jax.Array:
    """int32 [B|1, 2R, tq]: lo of the R intervals, then hi; added queries see nothing."""
    rows = inputs.rows.pad(tq)
    return jnp.concatenate([rows.lo, rows.hi], axis=1)


def bias_arrays(inputs: Inputs, tq: int, tk: int, query_axis: int) -> dict[str, jax.Array]:
    """What `Tile.scores` reads.

    Args:
      inputs: of the call.
      tq, tk: lengths after padding.
      query_axis: of the tiles.
    """
    arrays = {}
    if inputs.slopes is not None:
        arrays["slopes"] = inputs.slopes
    if inputs.diagonals is not None:
        arrays["diagonals"] = _skewed(inputs, max(tq, tk), query_axis)
    if inputs.dense_bias is not None:
        bias = inputs.dense_bias
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        shape = (*bias.shape[:2], inputs.rows.lo.shape[-1], tk if bias.shape[3] == 1 else bias.shape[3])
        bias = pad(pad(jnp.broadcast_to(bias, shape), 2, tq), 3, tk)
        arrays["dense_bias"] = bias.swapaxes(2, 3) if query_axis else bias
    return arrays


def _skewed(inputs: Inputs, half: int, query_axis: int) -> jax.Array:
    """float32 [H, 64, 2 * half]: entry [h, r, half + x] is the bias of a column that lies x - r behind its row.

    So the bias of a tile from (row, column) on is the rectangle [h, :, half + column - row:], which a GPU can load; in
    the diagonals themselves each row of a tile starts elsewhere. This is 64 times their memory, and not Tq * Tk.
    """
    tq = inputs.rows.lo.shape[-1]
    behind = jnp.arange(2 * half)[None] - half - jnp.arange(ROWS)[:, None]
    offset = -behind if query_axis else behind
    return jnp.take(inputs.diagonals, offset + tq - 1, axis=1, mode="clip")


def dropout_arrays(inputs: Inputs, batch: int, heads: int, tq: int) -> dict[str, jax.Array]:
    """`hashes` uint32 [B, H, tq] of the rows, and `first_key` int32 [1]; empty without dropout."""
    if inputs.seed is None:
        return {}
    origin = inputs.origin
    indices = jnp.indices((batch, heads, tq), sparse=True)
    hashes = dropout.row(inputs.seed, *(i + o for i, o in zip(indices, (origin.batch, origin.head, origin.query))))
    return {"hashes": hashes, "first_key": jnp.asarray(origin.key, jnp.int32).reshape(1)}
