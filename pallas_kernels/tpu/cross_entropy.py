"""Cross-entropy's TPU kernels: statistics of the logits, and the gradients, in tiles that never leave the chip.

Three kernels, each with the logits of one tile [tokens, ids] in VMEM: the statistics pass over the vocabulary for each
block of tokens, the gradient of the hidden states does so again, and that of the matrix passes over the tokens for each
block of ids. Five matrix products in all, where the chunks in plain jax take three or four; in return no logit and no
partial sum goes through the chip's main memory, so the sum is taken in the same way. Exponentials are taken in base 2,
which is what the hardware has.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, override

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms
from pallas_kernels.cross_entropy import (
    Backend,
    OutputProjection,
    Request,
    Statistics,
    TokenScores,
    scores_by,
    weighted_sum,
)
from pallas_kernels.tpu import costs

_LANES = 128
_LOG2_E, _LN_2 = math.log2(math.e), math.log(2.0)
# Maxima start here: below any logit, and finite, so that differences of two such are 0.
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
_VMEM = 56 * 2**20  # of 64 MiB on the chip that has least
# Bytes of one block of hidden states or of the matrix. The statistics hold two of each kind; the gradients also a sum
# of twice the size, and two blocks of results.
_BLOCK_BYTES, _GRADIENT_BLOCK_BYTES = 8 * 2**20, 4 * 2**20


class TpuBackend(Backend):
    """The TPU kernels, which compute logits again in the backward pass whether asked to or not."""

    name = "pallas_tpu"

    @override
    def refuses(self, hidden: jax.Array, projection: OutputProjection, request: Request) -> list[str]:
        reasons, width, vocabulary = [], hidden.shape[-1], projection.vocab_size
        if platforms.current().kind not in ("tpu", "cpu"):
            reasons.append(f"it runs on TPUs, not on a {platforms.current().kind}")
        if hidden.dtype not in (jnp.bfloat16, jnp.float32):
            reasons.append(f"hidden states are {hidden.dtype}, not bfloat16 or float32")
        if width % _LANES:
            reasons.append(f"width {width} is not a multiple of {_LANES}")
        if vocabulary < _LANES:
            reasons.append(f"{vocabulary} ids are fewer than {_LANES}")
        if request.recompute and request.chunk is not None and request.chunk % _LANES:
            reasons.append(f"chunk {request.chunk} is not a multiple of {_LANES}")
        mesh = jax.sharding.get_abstract_mesh()
        if math.prod(mesh.shape[axis] for axis in mesh.auto_axes) > 1:
            reasons.append("the mesh has several devices, over which only shard_map spreads a kernel")
        return reasons

    @override
    def summed(
        self,
        hidden: jax.Array,
        projection: OutputProjection,
        labels: jax.Array,
        weights: jax.Array,
        request: Request,
    ) -> tuple[jax.Array, TokenScores]:
        as_scores = dataclasses.replace(request, recompute=True, chunk=None)  # the chunk was one of tokens
        scores = scores_by(self, hidden, projection, labels, as_scores)
        return weighted_sum(scores, weights, request) / request.parts, scores

    @override
    def statistics(
        self, hidden: jax.Array, projection: OutputProjection, labels: jax.Array, request: Request
    ) -> Statistics:
        return _statistics(request, hidden, projection, labels[:, None])


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Sizes of a problem and of the blocks it is cut into.

    Attributes:
      tokens, width, ids: N, E, V.
      block_tokens, block_ids: of one tile; the last ones reach beyond the arrays where they do not divide them.
      vocab_axis, soft_cap: of the projection.
    """

    tokens: int
    width: int
    ids: int
    block_tokens: int
    block_ids: int
    vocab_axis: int
    soft_cap: float | None

    @property
    def token_blocks(self) -> int:
        return pl.cdiv(self.tokens, self.block_tokens)

    @property
    def id_blocks(self) -> int:
        return pl.cdiv(self.ids, self.block_ids)

    def matrix_block(self, which: Any) -> pl.BlockSpec:
        """Blocks of the matrix, and of its gradient; `which` gives the block of ids from the grid's indices."""
        if self.vocab_axis == 1:
            return pl.BlockSpec((self.width, self.block_ids), lambda *grid: (0, which(*grid)))
        return pl.BlockSpec((self.block_ids, self.width), lambda *grid: (which(*grid), 0))

    def bias_block(self, which: Any) -> pl.BlockSpec:
        """As `matrix_block`, of the bias as [1, V]."""
        return pl.BlockSpec((1, self.block_ids), lambda *grid: (0, which(*grid)))

    def logits(self, hidden: jax.Array, matrix: jax.Array, bias: jax.Array) -> jax.Array:
        """f32 [block_tokens, block_ids]."""
        logits = _dot(hidden, matrix, 1, 1 - self.vocab_axis) + bias
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits * (1.0 / self.soft_cap))

    def cost(self, products: int, *moved: tuple[Any, int]) -> pl.CostEstimate:
        """Of a kernel that passes over all logits with so many matrix products."""
        entries = self.tokens * self.ids
        return costs.estimate(2 * products * entries * self.width, entries, *moved)

    def ids_of(self, block: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
        """The id of each entry of a block of `shape` whose `axis` is the vocabulary."""
        return block * self.block_ids + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _tiles(hidden: jax.Array, projection: OutputProjection, request: Request, block_bytes: int) -> _Tiles:
    (tokens, width), ids = hidden.shape, projection.vocab_size
    largest = max(block_bytes // (width * hidden.dtype.itemsize) // _LANES * _LANES, _LANES)
    return _Tiles(
        tokens,
        width,
        ids,
        block_tokens=min(largest, 1024, pl.cdiv(tokens, 16) * 16),
        block_ids=min(request.chunk or min(largest, 1024), ids // _LANES * _LANES),
        vocab_axis=projection.vocab_axis,
        soft_cap=projection.soft_cap,
    )


# Statistics.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(request: Request, hidden: jax.Array, projection: OutputProjection, labels: jax.Array) -> Statistics:
    """Of the logits of hidden [N, E]; labels [N, 1]."""
    tiles = _tiles(hidden, projection, request, _BLOCK_BYTES)
    row = lambda width: pl.BlockSpec((tiles.block_tokens, width), lambda i, j: (i, 0))  # noqa: E731
    matrix, bias = _operands(projection, hidden.dtype)
    result = jax.ShapeDtypeStruct((tiles.tokens, 4), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_statistics_kernel, tiles, request.mean_logit),
        grid=(tiles.token_blocks, tiles.id_blocks),
        in_specs=[row(tiles.width), tiles.matrix_block(lambda i, j: j), tiles.bias_block(lambda i, j: j), row(1)],
        out_specs=row(4),
        out_shape=result,
        scratch_shapes=[pltpu.VMEM((tiles.block_tokens, _LANES), jnp.float32)] * 4,
        compiler_params=_parameters(),
        cost_estimate=tiles.cost(1, ([matrix, bias], tiles.token_blocks), ([hidden, labels, result], 1)),
        interpret=platforms.tpu_interpret(),
        name="cross_entropy_statistics",
    )(hidden, matrix, bias, labels)
    return Statistics(*(found[:, i] for i in range(4)))


def _statistics_kernel(
    tiles: _Tiles,
    with_mean: bool,
    hidden_ref: Any,
    matrix_ref: Any,
    bias_ref: Any,
    labels_ref: Any,
    out_ref: Any,
    largest_ref: Any,
    total_ref: Any,
    label_ref: Any,
    sum_ref: Any,
) -> None:
    """One tile. Each of the 128 lanes keeps a maximum and sums of its own, and they meet after the last tile."""
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, _LOWEST)
        for ref in (total_ref, label_ref, sum_ref):
            ref[...] = jnp.zeros_like(ref)

    logits = tiles.logits(hidden_ref[...], matrix_ref[...], bias_ref[...]) * _LOG2_E
    ids = tiles.ids_of(block, logits.shape, 1)
    hits = jnp.where(ids == labels_ref[...], logits, 0.0)
    if with_mean:
        known = jnp.where(ids < tiles.ids, logits, 0.0) if tiles.ids % tiles.block_ids else logits
        sum_ref[...] += _over_lanes(jnp.add, known)
    if tiles.ids % tiles.block_ids:
        logits = jnp.where(ids < tiles.ids, logits, _LOWEST)
    before = largest_ref[...]
    largest = jnp.maximum(before, _over_lanes(jnp.maximum, logits))
    slices = [jnp.exp2(part - largest) for part in _lane_slices(logits)]
    total_ref[...] = total_ref[...] * jnp.exp2(before - largest) + functools.reduce(jnp.add, slices)
    largest_ref[...] = largest
    label_ref[...] += _over_lanes(jnp.add, hits)

    @pl.when(block == tiles.id_blocks - 1)
    def _():
        of_lanes = largest_ref[...]
        largest = of_lanes.max(-1, keepdims=True)
        total = (total_ref[...] * jnp.exp2(of_lanes - largest)).sum(-1, keepdims=True)
        out_ref[:, 0:1] = label_ref[...].sum(-1, keepdims=True) * _LN_2
        out_ref[:, 1:2] = largest * _LN_2 + jnp.log(total)
        out_ref[:, 2:3] = sum_ref[...].sum(-1, keepdims=True) * (_LN_2 / tiles.ids)
        out_ref[:, 3:4] = largest * _LN_2


def _lane_slices(x: jax.Array) -> list[jax.Array]:
    return [x[:, i : i + _LANES] for i in range(0, x.shape[1], _LANES)]


def _over_lanes(combine: Any, x: jax.Array) -> jax.Array:
    """[tokens, 128]: the columns of x that share a lane, combined; no data crosses lanes."""
    return functools.reduce(combine, _lane_slices(x))


# Gradients.


def _statistics_forward(request, hidden, projection, labels):
    found = _statistics(request, hidden, projection, labels)
    return found, (hidden, projection, labels, found.log_z)


def _statistics_backward(request, saved, of):
    hidden, projection, labels, log_z = saved
    counts = (of.label != 0.0) | (of.log_z != 0.0) | (of.mean != 0.0)  # the largest logit only tells what is correct
    hidden = jnp.where(counts[:, None], hidden, 0)
    log_z = jnp.where(counts, log_z, jnp.inf)
    # What a token's logits need to know of it, in one array for one copy a tile.
    rows = jnp.stack([log_z * _LOG2_E, of.label, of.log_z, of.mean / projection.vocab_size], axis=1)
    tiles = _tiles(hidden, projection, request, _GRADIENT_BLOCK_BYTES)
    operands = (hidden, *_operands(projection, hidden.dtype), labels, rows)
    of_matrix, of_bias = _matrix_gradient(tiles, projection.matrix.dtype, operands)
    of_bias = None if projection.bias is None else of_bias[0].astype(projection.bias.dtype)
    of_projection = dataclasses.replace(projection, matrix=of_matrix, bias=of_bias)
    return _hidden_gradient(tiles, operands), of_projection, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _hidden_gradient(tiles: _Tiles, operands: tuple[jax.Array, ...]) -> jax.Array:
    hidden = operands[0]
    return _gradient(_hidden_gradient_kernel, tiles, True, operands, {"rows": hidden})[0]


def _matrix_gradient(tiles: _Tiles, dtype: jnp.dtype, operands: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Of the matrix, in `dtype`, and of the bias, f32 [1, V]."""
    _, matrix, bias, _, _ = operands
    results = {"matrix": jax.ShapeDtypeStruct(matrix.shape, dtype), "bias": bias}
    return _gradient(_matrix_gradient_kernel, tiles, False, operands, results)


def _gradient(
    kernel: Callable[..., None],
    tiles: _Tiles,
    by_tokens: bool,
    operands: tuple[jax.Array, ...],
    results: dict[str, jax.Array | jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Runs a kernel over all tiles, blocks of tokens outermost or blocks of ids; it sums up results in float32."""
    token = lambda i, j: i if by_tokens else j  # noqa: E731
    of_ids = lambda i, j: j if by_tokens else i  # noqa: E731
    row = lambda width: pl.BlockSpec((tiles.block_tokens, width), lambda *grid: (token(*grid), 0))  # noqa: E731
    specs = {"rows": row(tiles.width), "matrix": tiles.matrix_block(of_ids), "bias": tiles.bias_block(of_ids)}
    out_specs = [specs[name] for name in results]
    hidden, matrix, *others = operands
    again, once = ([matrix], [hidden]) if by_tokens else ([hidden], [matrix])
    grid = tiles.token_blocks, tiles.id_blocks
    outer, _ = grid = grid if by_tokens else grid[::-1]
    return pl.pallas_call(
        functools.partial(kernel, tiles),
        grid=grid,
        in_specs=[specs["rows"], specs["matrix"], specs["bias"], row(1), row(4)],
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results.values()],
        scratch_shapes=[pltpu.VMEM(spec.block_shape, jnp.float32) for spec in out_specs],
        compiler_params=_parameters(),
        cost_estimate=tiles.cost(2, (again, outer), ([*once, *others, *results.values()], 1)),
        interpret=platforms.tpu_interpret(),
        name="cross_entropy" + kernel.__name__.removesuffix("_kernel"),
    )(*operands)


def _hidden_gradient_kernel(
    tiles: _Tiles,
    hidden_ref: Any,
    matrix_ref: Any,
    bias_ref: Any,
    labels_ref: Any,
    rows_ref: Any,
    out_ref: Any,
    sum_ref: Any,
) -> None:
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    matrix = matrix_ref[...]
    if tiles.ids % tiles.block_ids:  # what lies beyond the array may be NaN, which a product with 0 would keep
        matrix = jnp.where(tiles.ids_of(block, matrix.shape, tiles.vocab_axis) < tiles.ids, matrix, 0)
    d_logits = _logit_cotangents(tiles, block, hidden_ref[...], matrix, bias_ref, labels_ref, rows_ref)
    sum_ref[...] += _dot(d_logits.astype(matrix.dtype), matrix, 1, tiles.vocab_axis)

    @pl.when(block == tiles.id_blocks - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _matrix_gradient_kernel(
    tiles: _Tiles,
    hidden_ref: Any,
    matrix_ref: Any,
    bias_ref: Any,
    labels_ref: Any,
    rows_ref: Any,
    out_ref: Any,
    bias_out_ref: Any,
    sum_ref: Any,
    bias_sum_ref: Any,
) -> None:
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        bias_sum_ref[...] = jnp.zeros_like(bias_sum_ref)

    hidden = hidden_ref[...]
    d_logits = _logit_cotangents(tiles, pl.program_id(0), hidden, matrix_ref[...], bias_ref, labels_ref, rows_ref)
    if tiles.tokens % tiles.block_tokens:  # tokens beyond the array
        inside = (
            jax.lax.broadcasted_iota(jnp.int32, (tiles.block_tokens, 1), 0) < tiles.tokens - block * tiles.block_tokens
        )
        hidden, d_logits = jnp.where(inside, hidden, 0), jnp.where(inside, d_logits, 0.0)
    bias_sum_ref[...] += d_logits.sum(0, keepdims=True)
    d_logits = d_logits.astype(hidden.dtype)
    pair = (hidden, d_logits) if tiles.vocab_axis == 1 else (d_logits, hidden)
    sum_ref[...] += _dot(*pair, 0, 0)

    @pl.when(block == tiles.token_blocks - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)
        bias_out_ref[...] = bias_sum_ref[...]


def _logit_cotangents(tiles: _Tiles, block, hidden, matrix, bias_ref, labels_ref, rows_ref) -> jax.Array:
    """Cotangents of a tile's logits before the soft cap; 0 for ids beyond the vocabulary."""
    logits = tiles.logits(hidden, matrix, bias_ref[...])
    log2_z, of_label, of_log_z, of_each = (rows_ref[:, i : i + 1] for i in range(4))
    ids = tiles.ids_of(block, logits.shape, 1)
    found = jnp.exp2(logits * _LOG2_E - log2_z) * of_log_z + of_each + jnp.where(ids == labels_ref[...], of_label, 0.0)
    if tiles.soft_cap is not None:
        found *= 1.0 - jnp.square(logits * (1.0 / tiles.soft_cap))
    return jnp.where(ids < tiles.ids, found, 0.0) if tiles.ids % tiles.block_ids else found


def _operands(projection: OutputProjection, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The matrix in the type of the products, and the bias as [1, V], zeros where there is none."""
    bias = jnp.zeros(projection.vocab_size) if projection.bias is None else projection.bias
    return projection.matrix.astype(dtype), bias.astype(jnp.float32)[None]


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM)
