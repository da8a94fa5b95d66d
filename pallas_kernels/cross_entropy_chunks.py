"""Cross-entropy in plain jax: logits of some tokens and some ids at a time.

Both forms walk over blocks of ids, once for the statistics of the logits and once for the gradients. The sum does so
for a chunk of tokens at a time and keeps the chunk's logits in between; the scores do so for all tokens, and compute
the logits again. A block's part of the matrix's gradient is small: added to a sum as a whole, a product would need the
memory of the matrix a second time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, override

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.cross_entropy import (
    Backend,
    OutputProjection,
    Request,
    Statistics,
    TokenScores,
    assembled,
    chunk_tokens,
    merged,
    sum_cotangents,
    weighted_sum,
)

_BLOCK_IDS = 2048

Logits = tuple[jax.Array | None, jax.Array | None]  # of blocks of ids: [blocks, N, ids] of whole ones, and of the rest


class XlaBackend(Backend):
    """Chunks in plain jax, on any device. Refuses nothing."""

    name = "xla"

    @override
    def refuses(self, hidden: jax.Array, projection: OutputProjection, request: Request) -> list[str]:
        return []

    @override
    def summed(
        self,
        hidden: jax.Array,
        projection: OutputProjection,
        labels: jax.Array,
        weights: jax.Array,
        request: Request,
    ) -> tuple[jax.Array, TokenScores]:
        return _summed(request, hidden, projection, labels, weights)

    @override
    def statistics(
        self, hidden: jax.Array, projection: OutputProjection, labels: jax.Array, request: Request
    ) -> Statistics:
        return _statistics(request, hidden, projection, labels)


# The sum, over chunks of tokens.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    request: Request, hidden: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, TokenScores]:
    def chunk(carry: None, tokens: tuple[jax.Array, ...]) -> tuple[None, TokenScores]:
        hidden, labels, _ = tokens
        found, _ = _statistics_of(hidden, projection, labels, request, _block_of_sum(projection))
        return carry, assembled(merged(found, request), labels, request)

    _, scores = _over_token_chunks(chunk, None, (hidden, labels, weights), projection, request)
    return weighted_sum(scores, weights, request) / request.parts, scores


def _summed_forward(request, hidden, projection, labels, weights):
    def chunk(carry, tokens):
        hidden, labels, weights = tokens
        found, logits = _statistics_of(hidden, projection, labels, request, _block_of_sum(projection), keep=True)
        found = merged(found, request)
        cotangents = sum_cotangents(found.log_z, weights, request, projection)
        of_hidden, carry = _gradients_of(
            hidden, projection, labels, found.log_z, cotangents, _block_of_sum(projection), carry, _add, logits
        )
        return carry, (assembled(found, labels, request), of_hidden.astype(hidden.dtype))

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), projection)
    sums, (scores, of_hidden) = _over_token_chunks(chunk, sums, (hidden, labels, weights), projection, request)
    of_projection = jax.tree.map(lambda total, x: total.astype(x.dtype), sums, projection)
    return (weighted_sum(scores, weights, request) / request.parts, scores), (of_hidden, of_projection)


def _summed_backward(request, gradients, cotangents):
    by = cotangents[0]  # the scores are given without gradient
    return *jax.tree.map(lambda x: (by * x).astype(x.dtype), gradients), None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _block_of_sum(projection: OutputProjection) -> int:
    # XLA for TPUs adds a product to its sum in place, and would copy the whole sum to write it in blocks.
    return projection.vocab_size if platforms.current().kind == "tpu" else _BLOCK_IDS


def _over_token_chunks(
    function: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    arrays: tuple[jax.Array, ...],
    projection: OutputProjection,
    request: Request,
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `function` over chunks of the first axis of `arrays` [tokens, ...].

    Tokens are filled up to whole chunks with zeros, so with weight 0; a single chunk runs without a loop.
    """
    tokens = len(arrays[0])
    chunks = -(-tokens // (request.chunk or chunk_tokens(tokens, projection.vocab_size)))
    if chunks <= 1:
        return function(carry, arrays)
    size = -(-tokens // chunks)

    def cut(x):  # [tokens, ...] -> [chunks, size, ...]
        x = jnp.pad(x, ((0, chunks * size - tokens), *((0, 0) for _ in x.shape[1:])))
        return x.reshape(chunks, size, *x.shape[1:])

    carry, results = jax.lax.scan(function, carry, tuple(map(cut, arrays)))
    return carry, jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:tokens], results)


# Statistics with a gradient, over all tokens.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(request: Request, hidden: jax.Array, projection: OutputProjection, labels: jax.Array) -> Statistics:
    return _statistics_of(hidden, projection, labels, request, request.chunk or _BLOCK_IDS)[0]


def _statistics_forward(request, hidden, projection, labels):
    found = _statistics(request, hidden, projection, labels)
    return found, (hidden, projection, labels, found.log_z)


def _statistics_backward(request, saved, of):
    hidden, projection, labels, log_z = saved
    counts = (of.label != 0.0) | (of.log_z != 0.0) | (of.mean != 0.0)  # the largest logit only tells what is correct
    of_each = of.mean / projection.vocab_size if request.mean_logit else None
    of_hidden, of_projection = _gradients_of(
        jnp.where(counts[:, None], hidden, 0),
        projection,
        labels,
        jnp.where(counts, log_z, jnp.inf),
        (of.label, of.log_z, of_each),
        request.chunk or _BLOCK_IDS,
        jax.tree.map(jnp.zeros_like, projection),
        _write,
    )
    return of_hidden.astype(hidden.dtype), of_projection, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


# Both forms, over blocks of ids.


def _statistics_of(
    hidden: jax.Array,
    projection: OutputProjection,
    labels: jax.Array,
    request: Request,
    block: int,
    keep: bool = False,
) -> tuple[Statistics, Logits]:
    """The statistics, with a running maximum and sum; and, if kept, the logits."""
    zeros = jnp.zeros(labels.shape, jnp.float32)

    def step(carry, start, size, _):
        largest, total, label, sum_of_logits = carry
        logits = projection.part(start, size).logits(hidden)
        new = jnp.maximum(largest, logits.max(-1))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[:, None]).sum(-1)
        local = labels - start
        label = jnp.where((local >= 0) & (local < size), _logit_at(logits, local), label)
        if request.mean_logit:
            sum_of_logits += logits.sum(-1)
        return (new, total, label, sum_of_logits), logits if keep else None

    start = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros)
    (largest, total, label, sum_of_logits), kept = _over_ids(step, start, projection, block)
    return Statistics(label, largest + jnp.log(total), sum_of_logits / projection.vocab_size, largest), kept


def _gradients_of(
    hidden: jax.Array,
    projection: OutputProjection,
    labels: jax.Array,
    log_z: jax.Array,
    cotangents: tuple[jax.Array, jax.Array, jax.Array | None],
    block: int,
    into: OutputProjection,
    put: Callable[[jax.Array, jax.Array, jax.Array | int, int], jax.Array],
    kept: Logits = (None, None),
) -> tuple[jax.Array, OutputProjection]:
    """Gradients of the hidden states, f32 [N, E], and of the projection, which `put` brings into arrays of its form."""

    def step(carry, start, size, logits):
        of_hidden, of_projection = carry
        part = projection.part(start, size)
        logits = part.logits(hidden) if logits is None else logits
        d_logits = _logit_cotangents(logits, projection.soft_cap, labels - start, log_z, *cotangents)
        of_bias = of_projection.bias
        if of_bias is not None:
            of_bias = put(of_bias, d_logits.sum(0), start, 0)
        d_logits = d_logits.astype(hidden.dtype)
        of_matrix = put(
            of_projection.matrix, _matrix_gradient(hidden, d_logits, part.vocab_axis), start, part.vocab_axis
        )
        of_hidden += _dot(d_logits, part.matrix.astype(hidden.dtype), 1, part.vocab_axis)
        return (of_hidden, dataclasses.replace(of_projection, matrix=of_matrix, bias=of_bias)), None

    carry, _ = _over_ids(step, (jnp.zeros(hidden.shape, jnp.float32), into), projection, block, kept)
    return carry


def _over_ids(
    function: Callable[[Any, jax.Array | int, int, jax.Array | None], tuple[Any, jax.Array | None]],
    carry: Any,
    projection: OutputProjection,
    block: int,
    logits: Logits = (None, None),
) -> tuple[Any, Logits]:
    """carry, kept = function(carry, first id, number of ids, their logits) for each block; the last may be smaller."""
    size = min(block, projection.vocab_size)
    whole = projection.vocab_size // size
    of_whole, of_rest = logits
    if whole > 1:
        starts = jnp.arange(whole, dtype=jnp.int32) * size
        carry, of_whole = jax.lax.scan(lambda carry, x: function(carry, x[0], size, x[1]), carry, (starts, of_whole))
    else:
        carry, of_whole = function(carry, 0, size, of_whole)
    if rest := projection.vocab_size - whole * size:
        carry, of_rest = function(carry, whole * size, rest, of_rest)
    return carry, (of_whole, of_rest)


def _logit_cotangents(
    logits: jax.Array,
    soft_cap: float | None,
    labels: jax.Array,
    log_z: jax.Array,
    of_label: jax.Array,
    of_log_z: jax.Array,
    of_each: jax.Array | None,
) -> jax.Array:
    """Cotangents of the logits before the soft cap, f32 [N, ids], from those of the statistics of the logits.

    Args:
      logits: [N, ids], after the soft cap.
      soft_cap: of the projection.
      labels: [N] ids, counted from the first of these; those outside of them have no logit here.
      log_z: [N]. Infinity stands for a row without gradient.
      of_label, of_log_z: [N] cotangents of the label's logit and of log Z.
      of_each: [N], added to every logit's (the mean's share), or None.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    found = jnp.exp(logits - log_z[:, None]) * of_log_z[:, None]
    found += jnp.where(ids == labels[:, None], of_label[:, None], 0.0)
    if of_each is not None:
        found += of_each[:, None]
    return found if soft_cap is None else found * (1.0 - jnp.square(logits / soft_cap))


def _matrix_gradient(hidden: jax.Array, d_logits: jax.Array, vocab_axis: int) -> jax.Array:
    """f32 [E, ids], or [ids, E] with vocab_axis 0."""
    if vocab_axis == 1:
        return _dot(hidden, d_logits, 0, 0)
    if platforms.current().kind == "cpu":
        # Without the barrier XLA turns the product round, which is the slower way on CPUs.
        return jax.lax.optimization_barrier(_dot(hidden, d_logits, 0, 0)).T
    return _dot(d_logits, hidden, 0, 0)


def _logit_at(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """logits[:, labels]; where the label is outside of them, any number."""
    if platforms.current().kind == "tpu":  # where a gather takes longer than a matrix product
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        return jnp.where(ids == labels[:, None], logits, 0.0).sum(-1)
    # On a CPU a gather takes less time than such a sum.
    labels = jnp.clip(labels, 0, logits.shape[1] - 1)
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _write(target: jax.Array, value: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(target, value.astype(target.dtype), start, axis)


def _add(target: jax.Array, value: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    before = jax.lax.dynamic_slice_in_dim(target, start, value.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(target, before + value, start, axis)
