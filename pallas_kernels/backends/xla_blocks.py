"""Attention in plain jax that computes the visible blocks and no others, a few pairs of blocks at a time.

Work is proportional to the pairs of blocks that the mask's plan visits, whatever their shape: causal, packed, windows,
or lists that differ by head. Memory is O(T) for the arrays and O((T / block)^2) integers for the list of pairs.
"""

import dataclasses
import functools
from typing import NamedTuple, override

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dropout, platforms
from pallas_kernels.biases import Bias, DenseBias, PlacedBias, RelativeBias
from pallas_kernels.diagonals import diagonal_sums
from pallas_kernels.fused import Inputs, fused_attention, fused_gradients, inputs_of
from pallas_kernels.plans import HIDDEN, plan_of_rows
from pallas_kernels.requests import Backend, Request

_BLOCK = 128  # queries, and keys, of a block if the mask does not say
_SCORES_AT_ONCE = {"cpu": 2**18, "gpu": 2**24, "tpu": 2**24}  # what a cache holds; enough to keep all units busy
_HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # finite: differences of two of them are numbers

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class XlaBlocksBackend(Backend):
    """Masks made of key intervals and lists of blocks, on any platform."""

    name = "xla_blocks"

    @override
    def refuses(self, request: Request) -> list[str]:
        reasons = []
        if request.mask.intervals is None:
            reasons.append(f"the mask {request.mask} is not made of key intervals")
        if isinstance(request.bias, DenseBias):
            reasons.append("a dense bias")
        (batch, tq, heads, _), tk, (bq, bk) = request.q_shape, request.k_shape[1], _block(request)
        if batch * heads * -(-tq // bq) * -(-tk // bk) >= 2**31:
            reasons.append("more pairs of blocks than an int32 counts")
        return reasons

    @override
    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, jax.Array]:
        return fused_attention(BlockKernels(_block(request)), q, k, v, _inputs(request))

    @override
    def gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        request: Request,
        lse: jax.Array,
        delta: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Bias | None]:
        return fused_gradients(BlockKernels(_block(request)), q, k, v, request, lse, delta, gradient)


def _inputs(request: Request) -> Inputs:
    """The request in the kernels' form. Positions that are given are looked up: no array of all pairs is made."""
    placed = request.bias
    if not isinstance(placed, PlacedBias):
        return inputs_of(request)
    inputs = inputs_of(dataclasses.replace(request, bias=placed.bias))
    diagonals = None
    if isinstance(placed.bias, RelativeBias):  # beyond max_distance all are the same
        diagonals = placed.bias.by_offset(np.arange(-placed.bias.max_distance, placed.bias.max_distance + 1))
    places = jnp.asarray(placed.queries), jnp.asarray(placed.keys)
    return dataclasses.replace(inputs, diagonals=diagonals, places=places)


def _block(request: Request) -> tuple[int, int]:
    lists = request.mask.block_sparse
    return (min(_BLOCK, request.q_shape[1]), min(_BLOCK, request.k_shape[1])) if lists is None else lists.block


@dataclasses.dataclass(frozen=True)
class BlockKernels:
    """Forward and backward over blocks of `block` queries and keys."""

    block: tuple[int, int]

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """See `fused.Kernels`."""
        sizes = _sizes(q, k, self.block)
        pairs = _visited(inputs, sizes)
        qs, ks, vs = _blocks(q, sizes.bq), _blocks(k, sizes.bk), _blocks(v, sizes.bk)
        window = sizes.at_once

        # The pairs of a block of queries follow each other in the list, so those of one step touch at most `window`
        # neighbouring rows of what is accumulated here by rank: the number of blocks of queries before it that have
        # anything to see.
        def step(n, state):
            pair = pairs.take(n)
            scores = _scores(qs[pair.q_block], ks[pair.k_block], pair, inputs, sizes).masked
            first = pair.rank[0]
            row = pair.rank - first
            highest, total, out = (jax.lax.dynamic_slice_in_dim(x, first, window) for x in state)
            grown = highest.at[row].max(scores.max(axis=-1))
            shrink = jnp.exp(highest - grown)
            weights = jnp.where(scores > 0.5 * _HIDDEN, jnp.exp(scores - grown[row][..., None]), 0.0)
            total = (total * shrink).at[row].add(weights.sum(axis=-1))
            weights = _drop(weights, pair, inputs, sizes).astype(v.dtype)
            added = _product("pqk,pkd->pqd", weights, vs[pair.k_block])
            out = (out * shrink[..., None]).at[row].add(added)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=0) for x, y in zip(state, (grown, total, out))
            )

        rows = sizes.batch * sizes.heads * sizes.nq + window
        state = (
            jnp.full((rows, sizes.bq), _HIDDEN, jnp.float32),
            jnp.zeros((rows, sizes.bq), jnp.float32),
            jnp.zeros((rows, sizes.bq, v.shape[-1]), jnp.float32),
        )
        highest, total, out = jax.lax.fori_loop(0, pairs.steps, step, state)
        highest, total, out = highest[pairs.rank], total[pairs.rank], out[pairs.rank]
        seen = pairs.any[:, None] & (total > 0.0)
        out = jnp.where(seen[..., None], out / jnp.where(seen, total, 1.0)[..., None], 0.0)
        lse = jnp.where(seen, highest + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
        lse = lse.reshape(sizes.batch, sizes.heads, -1)[..., : sizes.tq]
        return _unblocks(out.astype(v.dtype), sizes.batch, sizes.tq), lse

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        inputs: Inputs,
        lse: jax.Array,
        delta: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, None]:
        """See `fused.Kernels`."""
        sizes = _sizes(q, k, self.block)
        pairs = _visited(inputs, sizes)
        qs, gs = _blocks(q, sizes.bq), _blocks(gradient, sizes.bq)
        ks, vs = _blocks(k, sizes.bk), _blocks(v, sizes.bk)
        lse, delta = (_blocks(x.swapaxes(1, 2)[..., None], sizes.bq)[..., 0] for x in (lse, delta))

        def step(n, state):
            dq, dk, dv, d_diagonals = state
            pair = pairs.take(n)
            qp, kp, vp, gp = qs[pair.q_block], ks[pair.k_block], vs[pair.k_block], gs[pair.q_block]
            scores = _scores(qp, kp, pair, inputs, sizes)
            visible = scores.masked > 0.5 * _HIDDEN
            weights = jnp.where(visible, jnp.exp(scores.masked - lse[pair.q_block][..., None]), 0.0)
            d_weights = _product("pqd,pkd->pqk", gp, vp)
            d_weights = _drop(d_weights, pair, inputs, sizes)
            d_scores = weights * (d_weights - delta[pair.q_block][..., None])
            if d_diagonals is not None:
                d_diagonals = _add_diagonals(d_diagonals, d_scores, pair, sizes)
            d_scores = (d_scores * scores.slope * inputs.scale).astype(q.dtype)
            weights = _drop(weights, pair, inputs, sizes).astype(gradient.dtype)
            # A key that nobody here sees has weight 0 and may be anything, even NaN.
            kp = jnp.where(visible.any(axis=1)[..., None], kp, 0)
            dq = dq.at[pair.q_block].add(_product("pqk,pkd->pqd", d_scores, kp))
            # With the keys last, as XLA for CPUs is fastest.
            dk = dk.at[pair.k_block].add(_product("pqd,pqk->pdk", qp, d_scores))
            dv = dv.at[pair.k_block].add(_product("pqd,pqk->pdk", gp, weights))
            return dq, dk, dv, d_diagonals

        d_diagonals = None
        if inputs.diagonals is not None and inputs.places is None:
            d_diagonals = jnp.zeros((sizes.heads, sizes.nq * sizes.bq + sizes.nk * sizes.bk - 1), jnp.float32)
        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (qs, ks.mT, vs.mT))
        dq, dk, dv, d_diagonals = jax.lax.fori_loop(0, pairs.steps, step, (*zeros, d_diagonals))
        if d_diagonals is not None:
            start = sizes.nq * sizes.bq - sizes.tq
            d_diagonals = d_diagonals[:, start : start + sizes.tq + sizes.tk - 1]
        dq = _unblocks(dq.astype(q.dtype), sizes.batch, sizes.tq)
        dk, dv = (_unblocks(x.mT.astype(y.dtype), sizes.batch, sizes.tk) for x, y in ((dk, k), (dv, v)))
        return dq, dk, dv, d_diagonals, None


class _Sizes(NamedTuple):
    batch: int
    heads: int
    group: int  # query heads that share a key head
    tq: int
    tk: int
    bq: int
    bk: int
    nq: int
    nk: int
    at_once: int  # pairs of blocks a step computes


def _sizes(q: jax.Array, k: jax.Array, block: tuple[int, int]) -> _Sizes:
    batch, tq, heads, _ = q.shape
    tk, kv_heads = k.shape[1:3]
    bq, bk = block
    nq, nk = -(-tq // bq), -(-tk // bk)
    at_once = min(max(1, _SCORES_AT_ONCE[platforms.current().kind] // (bq * bk)), batch * heads * nq * nk)
    return _Sizes(batch, heads, heads // kv_heads, tq, tk, bq, bk, nq, nk, at_once)


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, H, D] as blocks of `size` positions: [B * H * n, size, D], zeros after the last position."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)])
    return x.swapaxes(1, 2).reshape(-1, size, x.shape[-1])


def _unblocks(x: jax.Array, batch: int, length: int) -> jax.Array:
    """The inverse of `_blocks`."""
    blocks, size, width = x.shape
    heads = blocks * size // (batch * -(-length // size) * size)
    return x.reshape(batch, heads, -1, width)[:, :, :length].swapaxes(1, 2)


class _Step(NamedTuple):
    """The pairs of blocks of one step, [P] each.

    Attributes:
      valid: whether the list reaches this far; beyond its end the others repeat the last pair.
      batch, head, query, key: the pair's example and head, and which of its blocks of queries and of keys.
      q_block, k_block: the blocks' places in `_blocks`.
      rank: see `_Visited`.
    """

    valid: jax.Array
    batch: jax.Array
    head: jax.Array
    query: jax.Array
    key: jax.Array
    q_block: jax.Array
    k_block: jax.Array
    rank: jax.Array


@dataclasses.dataclass(frozen=True)
class _Visited:
    """The pairs of blocks to compute, in the order of examples, heads, queries, keys.

    Attributes:
      pairs: int32 [N], flat indices into [B, H, nq, nk], of which the first `count` mean something.
      count: int32 scalar.
      any: bool [B * H * nq], whether a block of queries is in the list.
      rank: int32 [B * H * nq], how many blocks of queries before this one are.
    """

    pairs: jax.Array
    count: jax.Array
    any: jax.Array
    rank: jax.Array
    sizes: _Sizes

    @property
    def steps(self) -> jax.Array:
        """int32 scalar: how many steps take all pairs."""
        return -(-self.count // self.sizes.at_once)

    def take(self, n: jax.Array) -> _Step:
        """The pairs of step n."""
        sizes = self.sizes
        places = n * sizes.at_once + jnp.arange(sizes.at_once)
        flat = self.pairs[jnp.minimum(places, self.count - 1)]
        q_block, key = flat // sizes.nk, flat % sizes.nk
        kv_head = q_block // sizes.nq // sizes.group
        return _Step(
            valid=places < self.count,
            batch=q_block // (sizes.heads * sizes.nq),
            head=q_block // sizes.nq % sizes.heads,
            query=q_block % sizes.nq,
            key=key,
            q_block=q_block,
            k_block=kv_head * sizes.nk + key,
            rank=self.rank[q_block],
        )


def _visited(inputs: Inputs, sizes: _Sizes) -> _Visited:
    visited = plan_of_rows(inputs.rows, sizes.tk, (sizes.bq, sizes.bk)).state != HIDDEN
    if inputs.block_sparse is not None:
        visited = visited & inputs.block_sparse.map(sizes.tq, sizes.tk, sizes.bq, sizes.bk)
    visited = jnp.broadcast_to(visited, (sizes.batch, sizes.heads, sizes.nq, sizes.nk))
    seeing = visited.any(axis=-1).reshape(-1)
    pairs = jnp.nonzero(visited.reshape(-1), size=visited.size)[0].astype(jnp.int32)
    count = visited.sum(dtype=jnp.int32)
    return _Visited(pairs, count, seeing, jnp.cumsum(seeing, dtype=jnp.int32) - seeing, sizes)


class _Scores(NamedTuple):
    """Attributes: masked, float32 [P, bq, bk], `_HIDDEN` where hidden; slope, of the soft cap at each score."""

    masked: jax.Array
    slope: jax.Array | float


def _scores(q: jax.Array, k: jax.Array, pair: _Step, inputs: Inputs, sizes: _Sizes) -> _Scores:
    scores = _product("pqd,pkd->pqk", q, k) * inputs.scale
    slope = 1.0
    if inputs.soft_cap is not None:
        share = jnp.tanh(scores / inputs.soft_cap)
        scores, slope = inputs.soft_cap * share, 1.0 - share**2
    queries, keys = _positions(pair, sizes)
    offsets, zero = keys - queries, sizes.tq - 1
    if inputs.places is not None:
        offsets = _placed_offsets(pair, inputs.places, sizes)
        if inputs.diagonals is not None:
            zero = inputs.diagonals.shape[1] // 2
            offsets = jnp.clip(offsets, -zero, zero)
    if inputs.slopes is not None:
        scores = scores - inputs.slopes[pair.head][:, None, None] * jnp.abs(offsets).astype(jnp.float32)
    if inputs.diagonals is not None:
        scores = scores + inputs.diagonals[pair.head[:, None, None], offsets + zero]
    return _Scores(jnp.where(_visible(pair, keys, inputs, sizes), scores, _HIDDEN), slope)


def _positions(pair: _Step, sizes: _Sizes) -> tuple[jax.Array, jax.Array]:
    """Positions of the queries [P, bq, 1] and of the keys [P, 1, bk]."""
    queries = pair.query[:, None] * sizes.bq + jnp.arange(sizes.bq)
    keys = pair.key[:, None] * sizes.bk + jnp.arange(sizes.bk)
    return queries[:, :, None], keys[:, None, :]


def _placed_offsets(pair: _Step, places: tuple[jax.Array, jax.Array], sizes: _Sizes) -> jax.Array:
    """[P, bq, bk]: the keys' positions minus the queries', of those given."""

    def of(places: jax.Array, block: jax.Array, count: int, size: int) -> jax.Array:
        padded = jnp.pad(places, ((0, 0), (0, count * size - places.shape[1])))
        return padded.reshape(-1, count, size)[pair.batch, block]

    queries = of(places[0], pair.query, sizes.nq, sizes.bq)
    return of(places[1], pair.key, sizes.nk, sizes.bk)[:, None, :] - queries[:, :, None]


def _visible(pair: _Step, keys: jax.Array, inputs: Inputs, sizes: _Sizes) -> jax.Array:
    """bool [P, bq, bk]."""
    rows = inputs.rows.pad(sizes.nq * sizes.bq)
    examples, intervals, _ = rows.lo.shape

    def bounds(x):  # [P, R, bq, 1]
        x = x.reshape(examples, intervals, sizes.nq, sizes.bq)
        return x[jnp.minimum(pair.batch, examples - 1), :, pair.query][..., None]

    inside = (keys[:, None] >= bounds(rows.lo)) & (keys[:, None] < bounds(rows.hi))
    return inside.any(axis=1) & pair.valid[:, None, None]


def _drop(weights: jax.Array, pair: _Step, inputs: Inputs, sizes: _Sizes) -> jax.Array:
    """Attention dropout, of weights or of their gradient [P, bq, bk]."""
    if inputs.seed is None:
        return weights
    queries, keys = _positions(pair, sizes)
    batch, head = (x[:, None, None] for x in (pair.batch, pair.head))
    origin = inputs.origin
    kept = dropout.keep(
        inputs.seed,
        batch + origin.batch,
        head + origin.head,
        queries + origin.query,
        keys + origin.key,
        inputs.dropout_rate,
    )
    return jnp.where(kept, weights / (1.0 - inputs.dropout_rate), 0.0)


def _add_diagonals(total: jax.Array, d_scores: jax.Array, pair: _Step, sizes: _Sizes) -> jax.Array:
    """`total` [H, nq bq + nk bk - 1] with the sums of each pair's diagonals, at key - query + nq bq - 1."""
    sums = diagonal_sums(d_scores)
    first = pair.key * sizes.bk - pair.query * sizes.bq + (sizes.nq - 1) * sizes.bq
    return total.at[pair.head[:, None], first[:, None] + jnp.arange(sums.shape[-1])].add(sums)
