"""FlexPrefill (arXiv 2502.20766): without training, the blocks of keys that hold most of each head's attention.

    chosen = flex_prefill(q, k)
    out = attention(q, k, v, mask=chosen.mask)

The last queries of a text stand for all: their attention is computed exactly. A head whose pooled keys predict that
attention well is *query-aware*: pooled queries and keys choose its blocks. Any other is *vertical-slash*: it keeps the
columns and diagonals that hold gamma of the attention of those last queries (section 3, algorithms 1 to 4).

Selecting costs block / T of the dense scores for the last queries, 1 / block^2 of them for the pooled ones, and a sort
of (T / block)^2 numbers a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.diagonals import diagonal_sums
from pallas_kernels.masks import BlockSparse, Causal, Mask
from pallas_kernels.plans import Rows
from pallas_kernels.sparse import selection
from pallas_kernels.sparse.selection import Chooser


class Chosen(NamedTuple):
    """What was selected.

    Attributes:
      mask: `BlockSparse` lists by example and head, and the mask that was narrowed.
      query_aware: bool [B, H], the heads whose blocks pooled queries and keys chose.
    """

    mask: Mask
    query_aware: jax.Array


def flex_prefill(
    q: jax.Array,
    k: jax.Array,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    gamma: float = 0.9,
    tau: float = 0.1,
    block: int = 128,
    min_budget: int = 512,
    max_blocks: int | None = None,
) -> Chosen:
    """Narrows `mask` to the blocks that matter, for each example and head.

    In a vertical-slash head the kept columns hold gamma of the attention of the last queries, and so do the kept
    diagonals; in a query-aware head the kept blocks hold gamma of the pooled attention of all queries together. Each
    block of queries also keeps its own block of keys and the first that it sees.

    Where the released implementation differs: it takes as many blocks as gamma's share of *tokens* would fill, which
    may hold less than gamma; and it keeps one diagonal of blocks for a run of `block` diagonals of tokens, which spans
    two. Both are kept here.

    Args:
      q: [B, T, H, D].
      k: [B, T, Hkv, D].
      mask: made of key intervals; None is `Causal()`. A row should hold one text, with ids 1 and 0 for padding after
        it (`Causal() & Segments(ids)`). In a packed row the last text's queries stand for all, and of the columns they
        choose other texts see none. No block is chosen that the mask hides.
      scale: of the scores, as in `attention`.
      gamma: share of the attention to keep; 1 keeps every visible block.
      tau: largest sqrt(Jensen-Shannon divergence), natural logarithm, between pooled and exact attention over blocks
        of keys, of a query-aware head; 0 makes every head vertical-slash.
      block: queries, and keys, of a block.
      min_budget: at least so many tokens of columns, and of diagonals, are kept.
      max_blocks: the longest list of a block of queries, which bounds the work whatever the text; lists longer than
        that lose the blocks with the least pooled attention, and gamma is no longer promised. None is no bound.

    Raises:
      TypeError: the mask has no intervals, or has lists of blocks already.
      ValueError: q and k do not fit each other.
    """
    selection.check_shapes(q, k, "flex_prefill")
    length = q.shape[1]
    mask = Causal() if mask is None else mask
    q, k = jax.lax.stop_gradient((q, k))
    rows = selection.interval_rows(mask, length, "flex_prefill")
    visible = selection.visible_blocks(mask, length, block, block)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    pooled_keys = selection.pool_keys(k, rows, block)
    last = _last_queries(q, k, rows, min(block, length), scale)
    columns = selection.sum_blocks(last.weights.sum(axis=2), block)
    query_aware = _misprediction(last, columns, pooled_keys, scale, block) < tau

    pooled_queries = selection.pool_queries(q, rows, block, Chooser.MEAN)
    pooled = selection.softmax(selection.products(pooled_queries, pooled_keys) * scale, visible)
    by_block = selection.cover(pooled.reshape(*pooled.shape[:2], -1), gamma).reshape(pooled.shape)

    # A query-aware head keeps the least budget of columns and diagonals beside its blocks.
    least = -(-min_budget // block)
    share = jnp.where(query_aware, 0.0, gamma)[..., None]
    columns = selection.cover(columns, share, least)
    diagonals = selection.cover(_diagonal_blocks(last, block), share, least)
    kept = (columns[:, :, None] | _along_diagonals(diagonals) | _first_and_own(visible)) & visible
    kept = jnp.where(query_aware[..., None, None], kept | (by_block & visible), kept)
    if max_blocks is None:
        lists = BlockSparse.of_map(kept, (block, block))
    else:
        lists = BlockSparse(*selection.best(pooled, kept, _first_and_own(visible), max_blocks), (block, block))
    return Chosen(lists & mask, query_aware)


class _LastQueries(NamedTuple):
    """The last n queries of each row that see anything.

    Attributes:
      weights: float32 [B, H, n, T], their attention; of each head it sums up to 1 over queries and keys.
      visible: bool [B, 1, n, T].
      mean: float32 [B, H, 1, D], the mean query.
      start: int32 [B], the position of the first.
    """

    weights: jax.Array
    visible: jax.Array
    mean: jax.Array
    start: jax.Array


def _last_queries(q: jax.Array, k: jax.Array, rows: Rows, n: int, scale: float) -> _LastQueries:
    batch, length = q.shape[:2]
    lo, hi = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (rows.lo, rows.hi))
    sees = (lo < hi).any(axis=1)
    end = length - jnp.argmax(sees[:, ::-1], axis=1)
    start = jnp.maximum(end - n, 0).astype(jnp.int32)

    def cut(x, axis):
        return jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, n, axis - 1))(x, start)

    queries, visible = cut(q, 1).swapaxes(1, 2), Rows(cut(lo, 2), cut(hi, 2)).dense(length)
    weights = selection.softmax(selection.products(queries, k.swapaxes(1, 2)) * scale, visible)
    sees = cut(sees, 1)[:, None, :, None]
    number = jnp.maximum(sees.sum(axis=2, keepdims=True), 1)
    mean = jnp.where(sees, queries.astype(jnp.float32), 0.0).sum(axis=2, keepdims=True) / number
    return _LastQueries(weights / number, visible, mean, start)


def _misprediction(
    last: _LastQueries, columns: jax.Array, pooled_keys: jax.Array, scale: float, block: int
) -> jax.Array:
    """[B, H]: sqrt(Jensen-Shannon divergence) of pooled from exact attention of the last queries (algorithm 2)."""
    visible = selection.sum_blocks(last.visible.any(axis=2, keepdims=True), block) > 0
    pooled = selection.softmax(selection.products(last.mean, pooled_keys) * scale, visible)[:, :, 0]
    middle = (pooled + columns) / 2

    def divergence(p):
        return jnp.where(p > 0.0, p * jnp.log(p / jnp.where(p > 0.0, middle, 1.0)), 0.0).sum(axis=-1)

    return jnp.sqrt(jnp.maximum((divergence(pooled) + divergence(columns)) / 2, 0.0))


def _diagonal_blocks(last: _LastQueries, block: int) -> jax.Array:
    """[B, H, 2 nk]: the attention of the last queries by distance q - k, entry o + nk for o block, o block + 1, ..."""
    batch, heads, n, length = last.weights.shape
    blocks = -(-length // block)
    sums = diagonal_sums(last.weights)
    distance = last.start[:, None] + n - 1 - jnp.arange(sums.shape[-1])
    into = jnp.zeros((batch, 2 * blocks, heads), jnp.float32)
    added = into.at[jnp.arange(batch)[:, None], distance // block + blocks].add(sums.swapaxes(1, 2))
    return added.swapaxes(1, 2)


def _along_diagonals(kept: jax.Array) -> jax.Array:
    """The blocks [B, H, nk, nk] that contain kept distances, bool [B, H, 2 nk] as in `_diagonal_blocks`.

    Distances o block ... (o + 1) block - 1 lie in blocks that are o or o + 1 apart.
    """
    either = kept | jnp.pad(kept, [(0, 0), (0, 0), (1, 0)])[..., :-1]
    blocks = jnp.arange(kept.shape[-1] // 2)
    return either[..., blocks[:, None] - blocks + len(blocks)]


def _first_and_own(visible: jax.Array) -> jax.Array:
    """bool [B|1, 1, nk, nk]: the first block that each block of queries sees, where a text's sink is, and its own."""
    first = visible & (jnp.cumsum(visible, axis=-1) == 1)
    return first | jnp.eye(visible.shape[-1], dtype=bool)
