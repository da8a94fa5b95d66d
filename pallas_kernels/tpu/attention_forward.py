"""The forward attention kernel for TPUs: online softmax (FlashAttention-2, arXiv 2307.08691) over what a mask shows.

Queries lie along sublanes, keys along lanes. The running maximum is kept equal along 128 lanes, as it is used; the
running sum is kept as 128 partial sums, which are added up once at the end of the row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms
from pallas_kernels.fused import Inputs
from pallas_kernels.tpu import operands, scores
from pallas_kernels.tpu.operands import Operand, Sizes
from pallas_kernels.tpu.schedule import Walk, current_step
from pallas_kernels.tpu.scores import LANES, Scoring
from pallas_kernels.tpu.tile_inputs import Here

_KEYS_AXIS = 1


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs, walk: Walk, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    """Output [B, Tq, Hq, Dv] and natural log-sum-exp [B, Hq, Tq]; see `pallas_kernels.fused.Kernels`."""
    scoring = Scoring(inputs.scale, inputs.soft_cap, inputs.dropout_rate)
    given = {
        "q": operands.by_query(sizes, operands.heads_first(scaled(q, scoring), sizes.padded_queries)),
        "k": operands.by_key(sizes, operands.heads_first(k, sizes.padded_keys)),
        "v": operands.by_key(sizes, operands.heads_first(v, sizes.padded_keys)),
        **(operands.intervals(sizes, inputs) if walk.has_partial else {}),
        **operands.biases(sizes, inputs, _KEYS_AXIS),
    }
    out = jax.ShapeDtypeStruct((sizes.batch, sizes.heads, sizes.padded_queries, sizes.v_size), v.dtype)
    lse = jax.ShapeDtypeStruct((sizes.batch, sizes.heads, 1, sizes.padded_queries), jnp.float32)
    results = {
        "out": operands.by_query(sizes, out),
        "lse": Operand(
            lse, (None, None, 1, sizes.blocks.queries), lambda step, _: (step.example, step.head, 0, step.query_block)
        ),
    }
    queries = sizes.blocks.queries
    scratch = {
        "maximum": pltpu.VMEM((queries, LANES), jnp.float32),
        "total": pltpu.VMEM((queries, LANES), jnp.float32),
        "sum": pltpu.VMEM((queries, sizes.v_size), jnp.float32),
    }
    if walk.has_partial:
        bounds = [name for name in ("starts", "counts") if name in given]
        shape = (inputs.rows.lo.shape[1], queries, LANES)
        scratch |= {f"row_{name}": pltpu.VMEM(shape, jnp.int32) for name in bounds}
    found = pl.pallas_call(
        functools.partial(_kernel, walk=walk, sizes=sizes, scoring=scoring, has_seed=inputs.seed is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk.prefetch) + 1,
            grid=walk.grid,
            in_specs=[{name: operand.spec(walk) for name, operand in given.items()}],
            out_specs={name: operand.spec(walk) for name, operand in results.items()},
            scratch_shapes=[scratch],
        ),
        out_shape={name: operand.array for name, operand in results.items()},
        compiler_params=operands.compiler_params(walk, sizes, [*given.values(), *results.values()], scratch.values()),
        cost_estimate=operands.cost(walk, sizes, 1, 1, given, results),
        interpret=platforms.tpu_interpret(),
        name="attention_forward",
    )(*walk.prefetch, operands.scalars(inputs), {name: operand.array for name, operand in given.items()})
    return found["out"][:, :, : sizes.queries].swapaxes(1, 2), found["lse"][:, :, 0, : sizes.queries]


def scaled(q: jax.Array, scoring: Scoring) -> jax.Array:
    """Queries times `query_factor`."""
    factor = scoring.query_factor
    return q if factor == 1.0 else (q.astype(jnp.float32) * factor).astype(q.dtype)


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32: by default a matrix unit rounds its operands to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _kernel(*refs, walk: Walk, sizes: Sizes, scoring: Scoring, has_seed: bool):
    *prefetch, scalars, given, results, scratch = refs
    step = current_step(walk, prefetch)
    row = {**given, **scratch}

    @pl.when(step.opens_row)
    def _():
        row["maximum"][...] = jnp.full_like(row["maximum"], scores.LOWEST_MAXIMUM)
        row["total"][...] = jnp.zeros_like(row["total"])
        row["sum"][...] = jnp.zeros_like(row["sum"])
        if walk.has_partial:
            for name in ("starts", "counts"):
                for n in range(row[name].shape[0] if name in row else 0):
                    row[f"row_{name}"][n] = _down(row[name][n : n + 1])

    def attend(masked: bool):
        tiles = [Here(row, scalars, step, sizes, _KEYS_AXIS, *place) for place in sizes.blocks.tiles()]
        product = _product(row, tiles[0])
        for here, following in zip(tiles, [*tiles[1:], None]):
            # The next tile's product comes first, so that the matrix units are at work during this tile's softmax.
            coming = None if following is None else _product(row, following)
            _attend(row, here, product, masked, scoring, has_seed)
            product = coming

    pl.when(step.full)(lambda: attend(masked=False))
    pl.when(step.partial)(lambda: attend(masked=True))

    @pl.when(step.closes_row)
    def _():
        total = jnp.broadcast_to(row["total"][...].sum(axis=1, keepdims=True), row["total"].shape)
        seen = total > 0.0
        share = jnp.where(seen, 1.0 / (jnp.where(seen, total, 1.0) * scoring.kept), 0.0)
        results["out"][...] = (row["sum"][...] * _wide(share, sizes.v_size)).astype(results["out"].dtype)
        lse = row["maximum"][...] * scores.LN_2 + jnp.log(total)
        results["lse"][...] = jnp.where(seen, lse, -jnp.inf).T[:1]


def _product(row, here: Here) -> jax.Array:
    q, k = row["q"][here.queries, :], row["k"][here.keys, :]
    return jax.lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), precision=precision(q.dtype), preferred_element_type=jnp.float32
    )


def _attend(row, here: Here, product: jax.Array, masked: bool, scoring: Scoring, has_seed: bool):
    """Takes the keys of one tile into the running softmax of its queries."""
    tile, queries = here.tile, here.queries
    score = here.add_bias(scoring.score(product))
    if masked:
        starts, counts = here.bounds("row_starts"), here.bounds("row_counts")
        score = jnp.where(tile.visible(starts, counts), score, scores.HIDDEN_SCORE)
    before = row["maximum"][queries, :]
    maximum = jnp.maximum(before, score.max(axis=1, keepdims=True))
    weight = jnp.exp2(score - tile.spread(maximum))
    shrink = jnp.exp2(before - maximum)
    row["total"][queries, :] = shrink * row["total"][queries, :] + sum(
        weight[:, lane : lane + LANES] for lane in range(0, tile.shape[1], LANES)
    )
    row["maximum"][queries, :] = maximum
    if has_seed:
        weight = jnp.where(here.kept(scoring.dropout_rate), weight, 0.0)
    v = row["v"][here.keys, :]
    values = jax.lax.dot(weight.astype(v.dtype), v, precision=precision(v.dtype), preferred_element_type=jnp.float32)
    row["sum"][queries, :] = _wide(shrink, v.shape[1]) * row["sum"][queries, :] + values


def _down(by_lane: jax.Array) -> jax.Array:
    """[n, 128] of [1, n]: from along lanes to along sublanes, equal along lanes."""
    return jnp.broadcast_to(by_lane, (LANES, by_lane.shape[1])).T


def _wide(by_query: jax.Array, size: int) -> jax.Array:
    """[n, size] of [n, 128] that is equal along lanes."""
    return jnp.tile(by_query, (1, -(-size // LANES)))[:, :size]
