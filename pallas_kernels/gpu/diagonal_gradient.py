"""The gradient of a bias along diagonals (T5's): the gradients of all scores summed, for each k - q.

A pass of its own: a thread block goes along one diagonal of 64 x 64 tiles, over all examples, and sums their gradients
in registers. The kernel of q's gradient, which goes across the diagonals, would need an atomic addition for each score.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.fused import Inputs
from pallas_kernels.gpu import operands
from pallas_kernels.gpu.attention_backward import PerQuery, Saved, Weights
from pallas_kernels.gpu.products import product
from pallas_kernels.gpu.shared_memory import Ring, matrix
from pallas_kernels.gpu.tiles import ROWS, Refs, Tile, at, zeros
from pallas_kernels.gpu.warpgroups import launch, specialise
from pallas_kernels.plans import HIDDEN

_STAGES = 1  # tiles of each kind in shared memory, of which several thread blocks share a multiprocessor


def diagonal_gradient(saved: Saved, interpret: dict[str, Any]) -> jax.Array:
    """The gradient of `Inputs.diagonals`, float32 [H, Tq + Tk - 1].

    Args:
      saved: of the call.
      interpret: `platforms.gpu_interpret()`.
    """
    inputs, (batch, tq, heads, size), (tk, _, v_size) = saved.inputs, saved.q.shape, saved.v.shape[1:]
    padded_tq, padded_tk = operands.round_up(tq, ROWS), operands.round_up(tk, ROWS)
    nq, nk = padded_tq // ROWS, padded_tk // ROWS
    kernel = _DiagonalGradient(inputs, saved.group, batch, nq, nk)
    state = operands.plan_of(inputs, tk, (ROWS, ROWS)).state.astype(jnp.int32)
    (tiles,) = launch(
        kernel.body,
        saved.arrays(padded_tq, padded_tk, query_axis=0) | {"state": state},
        name="attention_diagonal_gradient",
        out_type=(jax.ShapeDtypeStruct((heads, nq + nk - 1, ROWS, ROWS), jnp.float32),),
        scratch={
            name: Ring.scratch(matrix((_STAGES, ROWS, width), saved.v.dtype), readers=1)
            for name, width in (("queries", size), ("gradients", v_size), ("keys", size), ("values", v_size))
        },
        grid={"head": heads, "diagonal": nq + nk - 1},
        computing=1,
        interpret=interpret,
    )
    return _sums_along_diagonals(tiles)[:, padded_tq - tq :][:, : tq + tk - 1]


@dataclasses.dataclass(frozen=True)
class _DiagonalGradient:
    """The kernel, with what is known when it is traced."""

    inputs: Inputs
    group: int
    batch: int
    nq: int
    nk: int

    def body(self, refs: Refs, result: jax.Ref, *, queries, gradients, keys, values):
        """What a thread block does."""
        head, diagonal = lax.axis_index("head"), lax.axis_index("diagonal")
        queries, gradients, keys, values = Ring(*queries), Ring(*gradients), Ring(*keys), Ring(*values)
        ahead = diagonal - (self.nq - 1)  # block of keys minus block of queries

        def over_tiles(visit, start):
            """Folds `visit(number, tile, carry)` over the diagonal's tiles that have something to see."""

            def over_examples(batch, carry):
                def step(block, carry):
                    tile = Tile(ROWS, 0, batch, head, block * ROWS, (block + ahead) * ROWS)
                    seen = at(refs["state"], batch, head)[block, block + ahead] != HIDDEN

                    def visited():
                        return carry[0] + 1, *visit(carry[0], tile, *carry[1:])

                    return lax.cond(seen, visited, lambda: carry)

                first, end = jnp.maximum(0, -ahead), jnp.minimum(self.nq, self.nk - ahead)
                return lax.fori_loop(first, end, step, carry)

            return lax.fori_loop(0, self.batch, over_examples, (jnp.int32(0), *start))

        def copy():
            kv_head = lax.div(head, jnp.int32(self.group))

            def fill(number, tile):
                rows, columns = pl.ds(tile.query, ROWS), pl.ds(tile.key, ROWS)
                queries.fill(number, refs["q"].at[tile.batch, rows, head])
                keys.fill(number, refs["k"].at[tile.batch, columns, kv_head])
                gradients.fill(number, refs["gradient"].at[tile.batch, rows, head])
                values.fill(number, refs["v"].at[tile.batch, columns, kv_head])
                return ()

            (steps,) = over_tiles(fill, ())
            for ring in (queries, keys, gradients, values):
                ring.drain(steps)

        def compute(_):
            def step(number, tile, total):
                per_query = PerQuery.of_rows(tile, refs)
                products = product(queries.wait(number), keys.wait(number).T)
                weights = Weights.of(products, tile, self.inputs, refs, per_query, whole=jnp.int32(0))
                d_weights = product(gradients.wait(number), values.wait(number).T)
                for ring in (queries, keys, gradients, values):
                    ring.free(number)
                return (total + weights.score_gradient(d_weights, tile, self.inputs, per_query),)

            _, total = over_tiles(step, (zeros((ROWS, ROWS)),))
            result[head, diagonal] = total

        specialise(copy, compute, computing=1)


def _sums_along_diagonals(tiles: jax.Array) -> jax.Array:
    """float32 [H, 64 (n + 1)] from [H, n, 64, 64]: entry p sums the tiles' [t, r, c] with 64 t + c - r + 63 = p."""
    heads, count = tiles.shape[:2]
    # Rows of a matrix of 128 columns, read as rows of 127, move one to the right each; reversed, so that c - r counts.
    wide = jnp.pad(tiles[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, ROWS))).reshape(heads, count, -1)
    sums = wide[:, :, : ROWS * (2 * ROWS - 1)].reshape(heads, count, ROWS, 2 * ROWS - 1).sum(axis=2)
    own, next_one = sums[:, :, :ROWS], jnp.pad(sums[:, :, ROWS:], ((0, 0), (0, 0), (0, 1)))
    own, next_one = (x.reshape(heads, count * ROWS) for x in (own, next_one))
    return jnp.pad(own, ((0, 0), (0, ROWS))) + jnp.pad(next_one, ((0, 0), (ROWS, 0)))
