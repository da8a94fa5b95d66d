"""The backward attention kernel for TPUs: all gradients in one pass over the blocks a mask shows.

Keys lie along sublanes, queries along lanes, so that what belongs to a query (log-sum-exp, intervals) is a row that
needs no spreading, and no product needs scores transposed: dq is summed transposed instead. Blocks come row after row
as in the forward kernel: a row's dq is complete when the row ends, while dk and dv of all keys of a key head stay on
the chip in float32 until every query head that shares it is done. Where they have no room, the keys are taken in parts.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms
from pallas_kernels.fused import Inputs
from pallas_kernels.tpu import operands, scores
from pallas_kernels.tpu.attention_forward import precision, scaled
from pallas_kernels.tpu.operands import Operand, Sizes
from pallas_kernels.tpu.schedule import Walk, current_step
from pallas_kernels.tpu.scores import Scoring
from pallas_kernels.tpu.tile_inputs import Here

_KEYS_AXIS = 0


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    inputs: Inputs,
    lse: jax.Array,
    delta: jax.Array,
    gradient: jax.Array,
    walk: Walk,
    sizes: Sizes,
    first_key_block: jax.Array | int,
) -> dict[str, jax.Array]:
    """What one part of the keys contributes to the gradients.

    Args:
      q, k, v, inputs, lse, delta, gradient: as of `pallas_kernels.fused.Kernels.backward`.
      walk: over the part's blocks, counted from its first.
      sizes: of the call.
      first_key_block: the first block of the part of the keys.

    Returns:
      "dq" [B, Tq, Hq, D], float32 if there are several parts, "dk" [B, keys of the part, Hkv, D] and "dv"; and if the
      call has them "diagonals" [H, Tq + Tk - 1] and "dense_bias" [B, Hq, Tq, keys of the part], both float32.
    """
    scoring = Scoring(inputs.scale, inputs.soft_cap, inputs.dropout_rate)
    lse = jnp.where(jnp.isneginf(lse), scores.UNSEEN_LSE, lse * scores.LOG2_E)
    given = {
        "q": operands.by_query(sizes, operands.heads_first(scaled(q, scoring), sizes.padded_queries)),
        "k": operands.by_key(sizes, operands.heads_first(k, sizes.padded_keys)),
        "v": operands.by_key(sizes, operands.heads_first(v, sizes.padded_keys)),
        "gradient": operands.by_query(sizes, operands.heads_first(gradient, sizes.padded_queries)),
        "lse": operands.row_numbers(sizes, lse),
        "delta": operands.row_numbers(sizes, delta),
        **(operands.intervals(sizes, inputs) if walk.has_partial else {}),
        **operands.biases(sizes, inputs, _KEYS_AXIS),
    }
    keys = sizes.part_blocks * sizes.blocks.keys
    results = _results(q, k, v, inputs, sizes, keys)
    # Blocks that are not visited keep what this array has.
    zeros = {"dense_bias": jnp.zeros(results["dense_bias"].array.shape, jnp.float32)} if "dense_bias" in results else {}
    scratch = {
        "dq": pltpu.VMEM((sizes.size, sizes.blocks.queries), jnp.float32),
        "dk": pltpu.VMEM((keys, sizes.size), jnp.float32),
        "dv": pltpu.VMEM((keys, sizes.v_size), jnp.float32),
    }
    before = len(walk.prefetch) + 1 + len(given)
    found = pl.pallas_call(
        functools.partial(_kernel, walk=walk, sizes=sizes, scoring=scoring, has_seed=inputs.seed is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk.prefetch) + 1,
            grid=walk.grid,
            in_specs=[
                {name: operand.spec(walk) for name, operand in given.items()},
                {name: pl.BlockSpec(memory_space=pl.ANY) for name in zeros},
            ],
            out_specs={name: operand.spec(walk) for name, operand in results.items()},
            scratch_shapes=[scratch],
        ),
        out_shape={name: operand.array for name, operand in results.items()},
        input_output_aliases={before: sorted(results).index("dense_bias")} if zeros else {},
        compiler_params=operands.compiler_params(walk, sizes, [*given.values(), *results.values()], scratch.values()),
        cost_estimate=operands.cost(walk, sizes, 3, 2, given, results),
        interpret=platforms.tpu_interpret(),
        name="attention_backward",
    )(*walk.prefetch, operands.scalars(inputs, first_key_block), {n: o.array for n, o in given.items()}, zeros)
    found["dq"] = found["dq"][:, :, : sizes.queries].swapaxes(1, 2)
    found |= {name: found[name].swapaxes(1, 2) for name in ("dk", "dv")}
    if "diagonals" in found:
        found["diagonals"] = operands.cut_diagonals(sizes, found["diagonals"].sum(axis=(0, 2)), _KEYS_AXIS)
    if "dense_bias" in found:
        found["dense_bias"] = found["dense_bias"][:, :, : sizes.queries]
    return found


def _results(q, k, v, inputs: Inputs, sizes: Sizes, keys: int) -> dict[str, Operand]:
    group = sizes.group

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((sizes.batch, *shape), dtype)

    def of_scope(step, _):
        return step.example, step.head // group, 0, 0

    dq_type = q.dtype if sizes.key_parts == 1 else jnp.float32
    dq = array(sizes.heads, sizes.padded_queries, sizes.size, dtype=dq_type)
    dk = array(sizes.kv_heads, keys, sizes.size, dtype=k.dtype)
    dv = array(sizes.kv_heads, keys, sizes.v_size, dtype=v.dtype)
    found = {
        "dq": operands.by_query(sizes, dq),
        "dk": Operand(dk, (None, None, keys, sizes.size), of_scope),
        "dv": Operand(dv, (None, None, keys, sizes.v_size), of_scope),
    }
    if inputs.diagonals is not None:
        length = sizes.padded_queries + sizes.padded_keys
        found["diagonals"] = Operand(
            array(sizes.heads, 1, length),
            (None, None, 1, length),
            lambda step, _: (step.example, step.head, 0, 0),
        )
    if inputs.dense_bias_gradient:
        found["dense_bias"] = Operand(
            array(sizes.heads, sizes.padded_queries, keys),
            (None, None, sizes.blocks.queries, sizes.blocks.keys),
            lambda step, _: (step.example, step.head, step.query_block, step.key_block),
        )
    return found


def _kernel(*refs, walk: Walk, sizes: Sizes, scoring: Scoring, has_seed: bool):
    *prefetch, scalars, given, _, results, sums = refs
    step = current_step(walk, prefetch)

    @pl.when(step.opens_scope)
    def _():
        sums["dk"][...] = jnp.zeros_like(sums["dk"])
        sums["dv"][...] = jnp.zeros_like(sums["dv"])

    @pl.when(step.opens_row)
    def _():
        sums["dq"][...] = jnp.zeros_like(sums["dq"])

    if "diagonals" in results:

        @pl.when(step.opens_head)
        def _():
            results["diagonals"][...] = jnp.zeros_like(results["diagonals"])

    if "dense_bias" in results:  # of a row that sees nothing
        pl.when(step.opens_row)(lambda: _clear(results["dense_bias"]))

    def differentiate(masked: bool):
        for place in sizes.blocks.tiles():
            here = Here(given, scalars, step, sizes, _KEYS_AXIS, *place)
            _differentiate(here, results, sums, masked, scoring, has_seed)

    pl.when(step.full)(lambda: differentiate(masked=False))
    pl.when(step.partial)(lambda: differentiate(masked=True))

    @pl.when(step.closes_row)
    def _():
        results["dq"][...] = (sums["dq"][...].T * scoring.scale).astype(results["dq"].dtype)

    @pl.when(step.closes_scope)
    def _():
        results["dk"][...] = (sums["dk"][...] * (scoring.scale / scoring.query_factor)).astype(results["dk"].dtype)
        results["dv"][...] = (sums["dv"][...] / scoring.kept).astype(results["dv"].dtype)


def _clear(ref):
    ref[...] = jnp.zeros_like(ref)


def _differentiate(here: Here, results, sums, masked: bool, scoring: Scoring, has_seed: bool):
    """Adds what one tile contributes to the gradients of its queries and keys."""
    given, tile = here.given, here.tile
    queries = here.queries
    q, gradient = given["q"][queries, :], given["gradient"][queries, :]
    k, v = given["k"][here.keys, :], given["v"][here.keys, :]
    exact = precision(q.dtype)

    def product(a, b, axis_a, axis_b):
        dimensions = (((axis_a,), (axis_b,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)

    products = product(k, q, 1, 1)  # [keys, queries], like all scores here
    score = here.add_bias(scoring.score(products))
    if masked:
        visible = tile.visible(here.bounds("starts"), here.bounds("counts"))
        score = jnp.where(visible, score, scores.HIDDEN_SCORE)
    weight = jnp.exp2(score - given["lse"][:, queries])
    d_weight = product(v, gradient, 1, 1)
    used = weight
    if has_seed:
        kept = here.kept(scoring.dropout_rate)
        used = jnp.where(kept, weight, 0.0)
        d_weight = jnp.where(kept, d_weight / scoring.kept, 0.0)
    d_score = weight * (d_weight - given["delta"][:, queries])
    if "diagonals" in results:
        _add_diagonals(results["diagonals"], d_score, here)
    if "dense_bias" in results:
        results["dense_bias"][queries, here.keys] = d_score.T
    d_product = (d_score * scoring.slope(products)).astype(q.dtype)
    keys = pl.ds(
        pl.multiple_of(here.step.key_block * here.sizes.blocks.keys, scores.LANES) + here.keys.start, k.shape[0]
    )
    sums["dv"][keys, :] += product(used.astype(gradient.dtype), gradient, 1, 0)
    sums["dk"][keys, :] += product(d_product, q, 1, 0)
    sums["dq"][:, queries] += product(k, d_product, 0, 0)


def _add_diagonals(total, d_score: jax.Array, here: Here):
    """Adds the sums of a tile's diagonals to `total` [1, n]."""
    height, width = here.squares()
    side = scores.LANES
    for diagonal in here.diagonals():
        squares = [
            d_score[x * side : (x + 1) * side, (x + diagonal) * side : (x + diagonal + 1) * side]
            for x in range(height)
            if 0 <= x + diagonal < width
        ]
        total[:, here.window(diagonal)] += scores.sum_diagonals(sum(squares))
