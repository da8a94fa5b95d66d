"""Attention's forward kernel for Hopper GPUs (FlashAttention-3, arXiv 2407.08608, 3.1, over a plan of blocks).

A thread block has 64 queries for each of its computing warpgroups, and visits the blocks of keys that its plan lists.
One more warpgroup copies those blocks into rings of buffers in shared memory, ahead of the others.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fused import Inputs
from pallas_kernels.gpu import operands
from pallas_kernels.gpu.blocks import QueryBlocks
from pallas_kernels.gpu.products import accumulate, product
from pallas_kernels.gpu.shared_memory import matrix
from pallas_kernels.gpu.tiles import LOG2_E, LOWEST, ROWS, Refs, Tile, per_row, thin, zeros
from pallas_kernels.gpu.visible_keys import VisibleKeys
from pallas_kernels.gpu.warpgroups import Turns, launch, specialise


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs, blocks: QueryBlocks, interpret: dict[str, Any]
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
        "bounds": operands.bounds(inputs, padded_tq),
        **operands.visits(operands.plan_of(inputs, tk, (blocks.queries, blocks.keys))),
        **operands.bias_arrays(inputs, padded_tq, padded_tk, query_axis=0),
        **operands.dropout_arrays(inputs, batch, heads, padded_tq),
    }
    kernel = _Forward(inputs, blocks, heads // kv_heads, bool(interpret))
    out, lse = launch(
        kernel.body,
        arrays,
        name="attention_forward",
        out_type=(
            jax.ShapeDtypeStruct((batch, padded_tq, heads, v_size), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, padded_tq), jnp.float32),
        ),
        scratch=kernel.scratch(size, v_size, v.dtype),
        grid={"batch": batch, "head": heads, "block": padded_tq // blocks.queries},
        computing=blocks.warpgroups,
        interpret=interpret,
    )
    return out[:, :tq], lse[:, :, :tq]


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The kernel, with what is known when it is traced."""

    inputs: Inputs
    blocks: QueryBlocks
    group: int
    interpreted: bool

    def scratch(self, size: int, v_size: int, dtype: jnp.dtype) -> dict[str, Any]:
        """What `body` takes as keyword arguments."""
        blocks, computing = self.blocks, self.blocks.warpgroups
        return {
            "queries": matrix((computing, ROWS, size), dtype),
            **VisibleKeys.scratch(blocks, size, v_size, dtype),
            # An output of the queries' size takes their place.
            "result": None if v_size == size else matrix((computing, ROWS, v_size), dtype),
            "lse_result": plgpu.SMEM((computing, ROWS), jnp.float32),
            "loaded": plgpu.Barrier(num_barriers=computing),
            "turns": Turns.scratch(blocks.turns),
        }

    def body(self, refs: Refs, out: jax.Ref, lse: jax.Ref, *, keys, values, queries, result, lse_result, loaded, turns):
        """What a thread block does."""
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        # Under a causal mask later queries see more keys: what takes longest starts first.
        block = out.shape[1] // self.blocks.queries - 1 - lax.axis_index("block")
        seen, turns = VisibleKeys.of(self.blocks, refs, batch, head, block, keys, values), Turns(turns)

        def copy():
            seen.copy(refs, batch, lax.div(head, jnp.int32(self.group)))

        def compute(warpgroup):
            tile = Tile(self.blocks.keys, 0, batch, head, block * self.blocks.queries + warpgroup * ROWS, 0)
            rows = pl.ds(tile.query, ROWS)
            q = queries.at[warpgroup]
            plgpu.copy_gmem_to_smem(refs["q"].at[batch, rows, head], q, loaded.at[warpgroup])
            plgpu.barrier_wait(loaded.at[warpgroup])
            turns.begin(warpgroup)
            total, maximum, normaliser = self._attend(refs, tile, q, seen, turns)
            turns.end(warpgroup)
            sees = normaliser > 0.0
            share = jnp.where(sees, 1.0 / normaliser, 0.0)
            mine = (queries if result is None else result).at[warpgroup]
            mine[...] = (total * lax.broadcast_in_dim(share, total.shape, [0])).astype(mine.dtype)
            lse_result[warpgroup] = jnp.where(sees, maximum * (1.0 / LOG2_E) + jnp.log(normaliser), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_result.at[warpgroup], lse.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        specialise(copy, compute, computing=self.blocks.warpgroups)

    def _attend(self, refs: Refs, tile: Tile, q: jax.Ref, seen: VisibleKeys, turns: Turns):
        """Sum of weight * v [64, Dv], maximum (base 2) and sum of weights [64] of each query, by online softmax."""
        bounds = tile.bounds(refs)
        hashes = tile.hashes(refs) if "hashes" in refs else None

        def step(number, carry):
            total, maximum, normaliser = carry
            visit = seen.visits[number]
            here = dataclasses.replace(tile, key=seen.place(visit))
            products = product(q, seen.keys.wait(number).T, meanwhile=turns.switch)
            seen.keys.free(number)
            scores, _ = here.scores(products, self.inputs, refs)
            scores = here.hide(scores, lambda: bounds, whole=visit & 1)
            highest = jnp.maximum(maximum, scores.max(axis=1))
            weights = jnp.exp2(scores - here.spread(highest))
            shrink = jnp.exp2(maximum - highest)
            normaliser = normaliser * shrink + weights.sum(axis=1)
            rate = self.inputs.dropout_rate
            weights = thin(weights, None if hashes is None else here.keeps(hashes, refs, rate), rate)
            total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
            v = seen.values.wait(number)
            turns.switch()
            total = accumulate(total, weights.astype(q.dtype), v, self.interpreted)
            seen.values.free(number)
            return total, highest, normaliser

        v_size = seen.values.buffers.shape[-1]
        return lax.fori_loop(0, seen.steps, step, (zeros((ROWS, v_size)), per_row(LOWEST), per_row(0.0)))
