"""Attention's backward kernels for Hopper GPUs: the gradient of q, and those of k and v.

Both compute the weights again from q, k and the log-sum-exp (FlashAttention, arXiv 2205.14135, algorithm 4). One goes
over the keys that a block of queries sees, the other over the queries that see a block of keys, so that each result has
one writer and needs no atomic additions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import plans
from pallas_kernels.fused import Inputs
from pallas_kernels.gpu import operands
from pallas_kernels.gpu.blocks import KeyBlocks, QueryBlocks
from pallas_kernels.gpu.products import accumulate, product
from pallas_kernels.gpu.shared_memory import Ring, matrix
from pallas_kernels.gpu.tiles import HIDDEN, LOG2_E, ROWS, Refs, Tile, at, thin, zeros
from pallas_kernels.gpu.visible_keys import VisibleKeys
from pallas_kernels.gpu.warpgroups import launch, specialise


@dataclasses.dataclass(frozen=True)
class Saved:
    """What the backward kernels start from; fields as in `fused.Kernels.backward`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    inputs: Inputs
    lse: jax.Array
    delta: jax.Array
    gradient: jax.Array

    def arrays(self, tq: int, tk: int, query_axis: int) -> dict[str, jax.Array]:
        """What both kernels read, for tq queries and tk keys after padding and tiles with this axis of queries."""
        # Of a query that sees nothing the log-sum-exp is -inf: one far above all scores makes its weights 0.
        lse = jnp.where(jnp.isneginf(self.lse), -HIDDEN, self.lse * LOG2_E)
        return {
            "q": operands.pad(self.q, 1, tq),
            "k": operands.pad(self.k, 1, tk),
            "v": operands.pad(self.v, 1, tk),
            "gradient": operands.pad(self.gradient.astype(self.v.dtype), 1, tq),
            "statistics": operands.pad(jnp.stack([lse, self.delta], axis=2), 3, tq),
            "bounds": operands.bounds(self.inputs, tq),
            **operands.bias_arrays(self.inputs, tq, tk, query_axis),
            **operands.dropout_arrays(self.inputs, self.q.shape[0], self.q.shape[2], tq),
        }

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[2] // self.k.shape[2]


class PerQuery(NamedTuple):
    """Numbers of each query of a tile, each loaded when called: as columns they are too many to keep in registers.

    Attributes:
      lse: log-sum-exp of the scores, base 2.
      delta: see `fused.Kernels.backward`.
      bounds: intervals of keys.
      hashes: of dropout.
    """

    lse: Callable[[], jax.Array]
    delta: Callable[[], jax.Array]
    bounds: Callable[[], list[tuple[jax.Array, jax.Array]]]
    hashes: Callable[[], jax.Array]

    @classmethod
    def of_rows(cls, tile: Tile, refs: Refs, *, keep_bounds: bool = True) -> "PerQuery":
        """Of queries that are rows: loaded once, but for bounds that are not kept, which masked tiles alone load."""
        statistics = refs["statistics"].at[tile.batch, tile.head]
        lse, delta = tile.per_query(statistics.at[0]), tile.per_query(statistics.at[1])
        bounds = tile.bounds(refs) if keep_bounds else None
        hashes = tile.hashes(refs) if "hashes" in refs else None
        return cls(lambda: lse, lambda: delta, lambda: bounds or tile.bounds(refs), lambda: hashes)

    @classmethod
    def of_columns(cls, tile: Tile, refs: Refs, statistics: jax.Ref) -> "PerQuery":
        """Of queries that are columns; `statistics` are theirs, in shared memory."""
        lse, delta = (lambda row=row: plgpu.load(statistics.at[row], layout=tile.layout) for row in (0, 1))
        return cls(lse, delta, lambda: tile.bounds(refs), lambda: tile.hashes(refs))


class Weights(NamedTuple):
    """The attention weights of a tile, and what their gradient needs.

    Attributes:
      values: before dropout.
      slope: of the soft cap, or None.
      kept: by dropout, or None.
    """

    values: jax.Array
    slope: jax.Array | None
    kept: jax.Array | None

    @classmethod
    def of(
        cls, products: jax.Array, tile: Tile, inputs: Inputs, refs: Refs, queries: PerQuery, whole: jax.Array
    ) -> "Weights":
        scores, slope = tile.scores(products, inputs, refs)
        values = jnp.exp2(tile.hide(scores, queries.bounds, whole) - tile.spread(queries.lse()))
        kept = tile.keeps(queries.hashes(), refs, inputs.dropout_rate) if "hashes" in refs else None
        return cls(values, slope, kept)

    def score_gradient(self, d_weights: jax.Array, tile: Tile, inputs: Inputs, queries: PerQuery) -> jax.Array:
        """Gradient of the biased scores, from that of the weights after dropout (gradient . v)."""
        return self.values * (thin(d_weights, self.kept, inputs.dropout_rate) - tile.spread(queries.delta()))

    def product_gradient(self, score_gradient: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Gradient of scale * q . k, from that of the biased scores."""
        return (score_gradient if self.slope is None else score_gradient * self.slope).astype(dtype)


def query_gradient(saved: Saved, blocks: QueryBlocks, interpret: dict[str, Any]) -> tuple[jax.Array, jax.Array | None]:
    """The gradient of q, and if asked for that of the dense bias: float32 [B, Hq, Tq, Tk]."""
    inputs, (batch, tq, heads, size), (tk, _, v_size) = saved.inputs, saved.q.shape, saved.v.shape[1:]
    padded_tq, padded_tk = operands.round_up(tq, blocks.queries), operands.round_up(tk, blocks.keys)
    plan = operands.plan_of(inputs, tk, (blocks.queries, blocks.keys))
    kernel = _QueryGradient(inputs, blocks, saved.group, bool(interpret))
    out_type = [jax.ShapeDtypeStruct((batch, padded_tq, heads, size), saved.q.dtype)]
    if inputs.dense_bias_gradient:
        out_type.append(jax.ShapeDtypeStruct((batch, heads, padded_tq, padded_tk), jnp.float32))
    dq, *d_bias = launch(
        kernel.body,
        saved.arrays(padded_tq, padded_tk, query_axis=0) | operands.visits(plan),
        name="attention_query_gradient",
        out_type=tuple(out_type),
        scratch=kernel.scratch(size, v_size, saved.v.dtype),
        grid={"batch": batch, "head": heads, "block": padded_tq // blocks.queries},
        computing=blocks.warpgroups,
        interpret=interpret,
    )
    return dq[:, :tq], _zero_where_hidden(d_bias[0], plan)[:, :, :tq, :tk] if d_bias else None


def _zero_where_hidden(d_bias: jax.Array, plan: plans.Plan) -> jax.Array:
    """The gradient of a dense bias whose hidden blocks nobody has written."""
    batch, heads, tq, tk = d_bias.shape
    (bq, bk), seen = plan.block, plan.state != plans.HIDDEN
    blocks = d_bias.reshape(batch, heads, tq // bq, bq, tk // bk, bk)
    return jnp.where(seen[:, :, :, None, :, None], blocks, 0.0).reshape(d_bias.shape)


@dataclasses.dataclass(frozen=True)
class _QueryGradient:
    """The kernel of the gradient of q, with what is known when it is traced."""

    inputs: Inputs
    blocks: QueryBlocks
    group: int
    interpreted: bool

    def scratch(self, size: int, v_size: int, dtype: jnp.dtype) -> dict[str, Any]:
        """What `body` takes as keyword arguments."""
        blocks, computing = self.blocks, self.blocks.warpgroups
        return {
            "queries": matrix((computing, ROWS, size), dtype),
            "gradients": matrix((computing, ROWS, v_size), dtype),
            **VisibleKeys.scratch(blocks, size, v_size, dtype),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=computing),
        }

    def body(self, refs: Refs, dq: jax.Ref, *d_bias: jax.Ref, queries, gradients, keys, values, loaded):
        """What a thread block does."""
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block = dq.shape[1] // self.blocks.queries - 1 - lax.axis_index("block")
        seen = VisibleKeys.of(self.blocks, refs, batch, head, block, keys, values)

        def copy():
            seen.copy(refs, batch, lax.div(head, jnp.int32(self.group)))

        def compute(warpgroup):
            tile = Tile(self.blocks.keys, 0, batch, head, block * self.blocks.queries + warpgroup * ROWS, 0)
            rows = pl.ds(tile.query, ROWS)
            q, barrier = queries.at[warpgroup], loaded.at[warpgroup]
            plgpu.copy_gmem_to_smem(refs["q"].at[batch, rows, head], q, barrier)
            plgpu.copy_gmem_to_smem(refs["gradient"].at[batch, rows, head], gradients.at[warpgroup], barrier)
            # Beside the widest heads' sum there are no registers for what is not needed all the time.
            widest = max(q.shape[-1], gradients.shape[-1]) == 256
            per_query = PerQuery.of_rows(tile, refs, keep_bounds=not widest)
            plgpu.barrier_wait(barrier)

            def step(number, total):
                visit = seen.visits[number]
                here = dataclasses.replace(tile, key=seen.place(visit))
                k = seen.keys.wait(number)
                # An index that seems to change with the step, but is 0: else the compiler computes all addresses in an
                # operand before the loop.
                mine = warpgroup + (visit >> 30 if widest else 0)
                products = product(queries.at[mine], k.T)
                weights = Weights.of(products, here, self.inputs, refs, per_query, whole=visit & 1)
                d_weights = product(gradients.at[mine], seen.values.wait(number).T)
                seen.values.free(number)
                d_scores = weights.score_gradient(d_weights, here, self.inputs, per_query)
                if d_bias:
                    d_bias[0][batch, head, rows, pl.ds(here.key, self.blocks.keys)] = d_scores
                total = accumulate(total, weights.product_gradient(d_scores, q.dtype), k, self.interpreted)
                seen.keys.free(number)
                return total

            total = lax.fori_loop(0, seen.steps, step, zeros((ROWS, q.shape[-1])))
            q[...] = (total * self.inputs.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        specialise(copy, compute, computing=self.blocks.warpgroups)


def key_value_gradients(saved: Saved, blocks: KeyBlocks, interpret: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v."""
    inputs, tq, (batch, tk, kv_heads, v_size) = saved.inputs, saved.q.shape[1], saved.v.shape
    size = saved.q.shape[-1]
    padded_tq, padded_tk = operands.round_up(tq, blocks.queries), operands.round_up(tk, blocks.keys)
    plan = operands.plan_of(inputs, tk, (blocks.queries, blocks.keys))
    kernel = _KeyValueGradients(inputs, blocks, saved.group, bool(interpret))
    dk, dv = launch(
        kernel.body,
        saved.arrays(padded_tq, padded_tk, query_axis=1) | operands.visits(plan, by_keys=True),
        name="attention_key_value_gradients",
        out_type=(
            jax.ShapeDtypeStruct((batch, padded_tk, kv_heads, size), saved.k.dtype),
            jax.ShapeDtypeStruct((batch, padded_tk, kv_heads, v_size), saved.v.dtype),
        ),
        scratch=kernel.scratch(size, v_size, saved.v.dtype),
        grid={"batch": batch, "head": kv_heads, "block": padded_tk // blocks.keys},
        computing=blocks.warpgroups,
        interpret=interpret,
    )
    return dk[:, :tk], dv[:, :tk]


@dataclasses.dataclass(frozen=True)
class _KeyValueGradients:
    """The kernel of the gradients of k and v, with what is known when it is traced."""

    inputs: Inputs
    blocks: KeyBlocks
    group: int
    interpreted: bool

    def scratch(self, size: int, v_size: int, dtype: jnp.dtype) -> dict[str, Any]:
        """What `body` takes as keyword arguments."""
        blocks, computing = self.blocks, self.blocks.warpgroups
        tiles = blocks.keys // ROWS
        return {
            "keys": matrix((tiles, ROWS, size), dtype),
            "values": matrix((tiles, ROWS, v_size), dtype),
            "queries": Ring.scratch(matrix((blocks.stages, blocks.queries, size), dtype), computing),
            "gradients": Ring.scratch(matrix((blocks.stages, blocks.queries, v_size), dtype), computing),
            "statistics": Ring.scratch(plgpu.SMEM((blocks.stages, 2, blocks.queries), jnp.float32), computing),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tiles),
            "finished": plgpu.Barrier(num_arrivals=computing),
        }

    def body(
        self, refs: Refs, dk: jax.Ref, dv: jax.Ref, *, keys, values, queries, gradients, statistics, loaded, finished
    ):
        """What a thread block does."""
        batch, kv_head, block = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("block")
        queries, gradients, statistics = Ring(*queries), Ring(*gradients), Ring(*statistics)
        tiles = self.blocks.keys // ROWS

        def over_visits(visit, start):
            """Folds `visit(number, head, entry, *carry)` over the blocks of queries that see these keys, by head."""

            def over_head(member, carry):
                head = kv_head * self.group + member
                visits = at(refs["visits"], batch, head).at[block]

                def step(number, carry):
                    done, *rest = carry
                    return done + 1, *visit(done, head, visits[number], *rest)

                return lax.fori_loop(0, at(refs["count"], batch, head)[block], step, carry)

            return lax.fori_loop(0, self.group, over_head, (jnp.int32(0), *start))

        def copy():
            for number in range(tiles):
                rows = pl.ds(block * self.blocks.keys + number * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(refs["k"].at[batch, rows, kv_head], keys.at[number], loaded.at[number])
                plgpu.copy_gmem_to_smem(refs["v"].at[batch, rows, kv_head], values.at[number], loaded.at[number])

            def fill(number, head, visit):
                rows = pl.ds((visit >> 1) * self.blocks.queries, self.blocks.queries)
                queries.fill(number, refs["q"].at[batch, rows, head])
                gradients.fill(number, refs["gradient"].at[batch, rows, head])
                statistics.fill(number, refs["statistics"].at[batch, head, :, rows])
                return ()

            (steps,) = over_visits(fill, ())
            queries.drain(steps)
            gradients.drain(steps)
            statistics.drain(steps)

        def compute(number, wants_k, wants_v):
            k, v = keys.at[number], values.at[number]
            first_key = block * self.blocks.keys + number * ROWS
            plgpu.barrier_wait(loaded.at[number])

            def step(number, head, visit, *totals):
                totals = list(totals)
                tile = Tile(self.blocks.queries, 1, batch, head, (visit >> 1) * self.blocks.queries, first_key)
                per_query = PerQuery.of_columns(tile, refs, statistics.wait(number))
                q = queries.wait(number)
                weights = Weights.of(product(k, q.T), tile, self.inputs, refs, per_query, whole=visit & 1)
                gradient = gradients.wait(number)
                if wants_v:
                    thinned = thin(weights.values, weights.kept, self.inputs.dropout_rate)
                    totals[-1] = accumulate(totals[-1], thinned.astype(v.dtype), gradient, self.interpreted)
                if wants_k:
                    d_weights = product(v, gradient.T)
                gradients.free(number)
                if wants_k:
                    d_scores = weights.score_gradient(d_weights, tile, self.inputs, per_query)
                    totals[0] = accumulate(totals[0], weights.product_gradient(d_scores, q.dtype), q, self.interpreted)
                queries.free(number)
                statistics.free(number)
                return totals

            places = [k] * wants_k + [v] * wants_v
            _, *totals = over_visits(step, [zeros(place.shape) for place in places])
            if self.blocks.shared:  # The results take the place of k and v, which the other may still be reading.
                plgpu.barrier_arrive(finished)
                plgpu.barrier_wait(finished)
            if wants_k:
                totals[0] = totals[0] * self.inputs.scale
            for place, total in zip(places, totals):
                place[...] = total.astype(place.dtype)
            plgpu.commit_smem()
            rows = pl.ds(first_key, ROWS)
            for place, result in zip(places, [dk] * wants_k + [dv] * wants_v):
                plgpu.copy_smem_to_gmem(place, result.at[batch, rows, kv_head])
            plgpu.wait_smem_to_gmem(0)

        if self.blocks.shared:
            work = (lambda _: compute(0, False, True)), (lambda _: compute(0, True, False))
        else:
            work = (lambda warpgroup: compute(warpgroup, True, True),)
        specialise(copy, *work, computing=self.blocks.warpgroups)
