"""Attention's forward kernel for Hopper GPUs (FlashAttention-3, arXiv 2407.08608, 3.1, over a plan of blocks).

A thread block has one tile of 64 queries for each of its computing warpgroups, and visits the blocks of keys that its
plan lists. One more warpgroup copies those blocks into a ring of buffers in shared memory, ahead of the others.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fused import Inputs
from pallas_kernels.gpu import operands
from pallas_kernels.gpu.products import accumulate, product
from pallas_kernels.gpu.shared_memory import Ring, matrix
from pallas_kernels.gpu.tiles import LOG2_E, LOWEST, ROWS, Refs, Tile, at, per_row, zeros
from pallas_kernels.gpu.warpgroups import COMPUTING_REGISTERS, COPYING_REGISTERS


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      warpgroups: that compute, each on 64 queries.
      keys: of a block.
      stages: blocks of keys, and of values, that shared memory has room for.
    """

    warpgroups: int
    keys: int
    stages: int

    @property
    def queries(self) -> int:
        return ROWS * self.warpgroups


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs, blocks: Blocks, interpret: dict
) -> tuple[jax.Array, jax.Array]:
    """The output [B, Tq, Hq, Dv] in v's type and the log-sum-exp float32 [B, Hq, Tq]; see `fused.Kernels.forward`.

    Args:
      q, k, v, inputs: of the call.
      blocks: how to cut it.
      interpret: `platforms.gpu_interpret()`.
    """
    (batch, tq, heads, size), (tk, kv_heads, v_size) = q.shape, v.shape[1:]
    padded_tq, padded_tk = operands.round_up(tq, blocks.queries), operands.round_up(tk, blocks.keys)
    arrays = {
        "q": operands.pad(q, 1, padded_tq),
        "k": operands.pad(k, 1, padded_tk),
        "v": operands.pad(v, 1, padded_tk),
        **operands.bounds(inputs, padded_tq),
        **operands.visits(operands.plan_of(inputs, tk, (blocks.queries, blocks.keys))),
        **operands.bias_arrays(inputs, padded_tq, padded_tk, query_axis=0),
        **operands.dropout_arrays(inputs, batch, heads, padded_tq),
    }
    kernel = _Kernel(inputs, blocks, heads // kv_heads, bool(interpret))
    out, lse = plgpu.kernel(
        kernel.run,
        out_type=(
            jax.ShapeDtypeStruct((batch, padded_tq, heads, v_size), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, padded_tq), jnp.float32),
        ),
        scratch_types=kernel.scratch(size, v_size, v.dtype),
        grid=(batch, heads, padded_tq // blocks.queries),
        grid_names=("batch", "head", "block"),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **interpret,
    )(arrays)
    return out[:, :tq], lse[:, :, :tq]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel's body, with what is known when it is traced."""

    inputs: Inputs
    blocks: Blocks
    group: int
    interpreted: bool

    def scratch(self, size: int, v_size: int, dtype: jnp.dtype) -> dict:
        """What the body takes as keyword arguments."""
        computing, blocks = self.blocks.warpgroups, (self.blocks.stages, self.blocks.keys)
        return {
            "queries": matrix((computing, ROWS, size), dtype),
            "keys": Ring.scratch(matrix((*blocks, size), dtype), computing),
            "values": Ring.scratch(matrix((*blocks, v_size), dtype), computing),
            # If it is of their size, the output takes the queries' place.
            "result": None if v_size == size else matrix((computing, ROWS, v_size), dtype),
            "lse_result": plgpu.SMEM((computing, ROWS), jnp.float32),
            "loaded": plgpu.Barrier(num_barriers=computing),
        }

    def run(self, refs: Refs, out: jax.Ref, lse: jax.Ref, *, keys, values, queries, result, lse_result, loaded):
        """What each warpgroup does: the last one copies, the others compute."""
        warpgroup = lax.axis_index("warpgroup")
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        # Under a causal mask later queries see more keys: what takes longest starts first.
        block = out.shape[1] // self.blocks.queries - 1 - lax.axis_index("block")
        keys, values = Ring(*keys), Ring(*values)
        steps, visits = (at(refs[name], batch, head).at[block] for name in ("count", "visits"))
        steps = steps[...]

        @pl.when(warpgroup == self.blocks.warpgroups)
        def _():
            self._copy(refs, keys, values, batch, head, steps, visits)

        @pl.when(warpgroup < self.blocks.warpgroups)
        def _():
            if self.blocks.warpgroups == 2:
                plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
            tile = Tile(self.blocks.keys, 0, batch, head, block * self.blocks.queries + warpgroup * ROWS, 0)
            q = queries.at[warpgroup]
            rows = pl.ds(tile.query, ROWS)
            plgpu.copy_gmem_to_smem(refs["q"].at[batch, rows, head], q, loaded.at[warpgroup])
            plgpu.barrier_wait(loaded.at[warpgroup])
            total, maximum, normaliser = self._attend(refs, tile, q, keys, values, steps, visits)
            seen = normaliser > 0.0
            share = jnp.where(seen, 1.0 / normaliser, 0.0)
            mine = (queries if result is None else result).at[warpgroup]
            mine[...] = (total * lax.broadcast_in_dim(share, total.shape, [0])).astype(mine.dtype)
            lse_result[warpgroup] = jnp.where(seen, maximum / LOG2_E + jnp.log(normaliser), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_result.at[warpgroup], lse.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

    def _copy(self, refs: Refs, keys: Ring, values: Ring, batch, head, steps, visits) -> None:
        """Brings the blocks that the plan lists into shared memory."""
        if self.blocks.warpgroups == 2:
            plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        kv_head = lax.div(head, jnp.int32(self.group))

        @pl.loop(0, steps)
        def _(step):
            rows = pl.ds(lax.div(visits[step], 2) * self.blocks.keys, self.blocks.keys)
            keys.fill(step, refs["k"].at[batch, rows, kv_head])
            values.fill(step, refs["v"].at[batch, rows, kv_head])

        keys.drain(steps)
        values.drain(steps)

    def _attend(self, refs: Refs, tile: Tile, q, keys: Ring, values: Ring, steps, visits):
        """Sum of weight * v [64, Dv], maximum (base 2) and sum of weights [64] of each query, by online softmax."""
        bounds, hashes = tile.bounds(refs), tile.hashes(refs)

        def step(number, carry):
            total, maximum, normaliser = carry
            visit = visits[number]
            here = dataclasses.replace(tile, key=lax.div(visit, 2) * self.blocks.keys)
            products = product(q, keys.wait(number).T)
            keys.free(number)
            scores, _ = here.scores(products, self.inputs, refs)
            scores = here.hide(scores, bounds, whole=lax.rem(visit, 2) == 1)
            highest = jnp.maximum(maximum, scores.max(axis=1))
            weights = jnp.exp2(scores - here.spread(highest))
            shrink = jnp.exp2(maximum - highest)
            normaliser = normaliser * shrink + weights.sum(axis=1)
            if hashes is not None:
                weights = here.drop(weights, hashes, refs, self.inputs.dropout_rate)
            total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
            total = accumulate(total, weights.astype(q.dtype), values.wait(number), self.interpreted)
            values.free(number)
            return total, highest, normaliser

        v_size = values.buffers.shape[-1]
        start = zeros((ROWS, v_size)), per_row(LOWEST), per_row(0.0)
        return lax.fori_loop(0, steps, step, start)
