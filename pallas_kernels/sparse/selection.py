"""What the ways of choosing blocks of keys share: pooled queries and keys, and the best or the sufficient blocks.

Every choice is a function of q and k that passes no gradient: attention's gradient goes through the chosen blocks.
"""

import enum

import jax
import jax.numpy as jnp

from pallas_kernels.masks import Mask
from pallas_kernels.plans import HIDDEN, Rows


class Chooser(enum.Enum):
    """Which query of a block chooses the keys for all of it.

    FIRST keeps a causal model causal: whatever it sees, the others see too. The choice of MEAN depends on later queries
    of the block, so that what follows leaks into training; it represents the block better where the whole text is
    known, as in prefill.
    """

    FIRST = enum.auto()
    MEAN = enum.auto()


def check_shapes(q: jax.Array, k: jax.Array, who: str) -> None:
    """Raises a ValueError unless q [B, T, H, D] and k [B, T, Hkv, D] are those of self-attention."""
    fits = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{who} takes q [B, T, H, D] and k [B, T, Hkv, D] of one length, with Hkv dividing H; got {q.shape} and "
            f"{k.shape}."
        )


def interval_rows(mask: Mask, length: int, who: str) -> Rows:
    """The intervals of a mask of self-attention.

    Raises:
      TypeError: it has none, or has lists of blocks already.
    """
    if mask.intervals is None or mask.block_sparse is not None:
        raise TypeError(f"{who} narrows a mask that is made of key intervals and has no lists of blocks, got {mask}.")
    return mask.rows(length, length)


def visible_blocks(mask: Mask, length: int, bq: int, bk: int) -> jax.Array:
    """bool [B|1, 1, nq, nk]: blocks of which a query sees a key."""
    return mask.plan(length, length, bq, bk).state != HIDDEN


def pool_queries(q: jax.Array, rows: Rows, size: int, chooser: Chooser) -> jax.Array:
    """float32 [B, H, nq, D]: of each block of `size` queries its first, or the mean of those that see anything."""
    if chooser is Chooser.FIRST:
        return q[:, ::size].swapaxes(1, 2).astype(jnp.float32)
    return _pool(q, (rows.lo < rows.hi).any(axis=1), size)


def pool_keys(k: jax.Array, rows: Rows, size: int) -> jax.Array:
    """float32 [B, Hkv, nk, D]: the mean of each block's keys, without those that no query sees."""
    return _pool(k, seen_keys(rows, k.shape[1]), size)


def seen_keys(rows: Rows, tk: int) -> jax.Array:
    """bool [B|1, Tk]: keys that some query sees."""
    lo, hi = (x.reshape(x.shape[0], -1) for x in (rows.lo, rows.hi))
    example, seeing = jnp.arange(lo.shape[0])[:, None], (lo < hi).astype(jnp.int32)
    # One more query sees key lo than key lo - 1, one less sees key hi.
    changes = jnp.zeros((lo.shape[0], tk + 1), jnp.int32).at[example, lo].add(seeing).at[example, hi].add(-seeing)
    return jnp.cumsum(changes, axis=1)[:, :tk] > 0


def _pool(x: jax.Array, counts: jax.Array, size: int) -> jax.Array:
    """Means over blocks of positions of x [B, T, H, D], of those where counts [B|1, T] is True; 0 without any."""
    x = jnp.where(counts[..., None, None], x.astype(jnp.float32), 0.0)
    weight = jnp.broadcast_to(counts, x.shape[:2]).astype(jnp.float32)
    total, number = sum_blocks(jnp.moveaxis(x, 1, -1), size), sum_blocks(weight, size)  # [B, H, D, n] and [B, n]
    return jnp.moveaxis(total / jnp.maximum(number, 1.0)[:, None, None], -1, 2)


def sum_blocks(x: jax.Array, size: int) -> jax.Array:
    """Sums over blocks of `size` entries of the last axis, the last block being what is left."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    return x.reshape(*x.shape[:-1], -1, size).sum(axis=-1)


def products(q: jax.Array, k: jax.Array) -> jax.Array:
    """float32 q . k of [B, H, n, D] and [B, Hkv, m, D]: [B, H, n, m], each key head serving a group of query heads."""
    batch, heads, n, size = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, n, size)
    scores = jnp.einsum("bhgnd,bhmd->bhgnm", grouped, k, preferred_element_type=jnp.float32)
    return scores.reshape(batch, heads, n, -1)


def softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax of the visible scores of the last axis; zeros where there are none."""
    scores = jnp.where(visible, scores, -jnp.inf)
    highest = scores.max(axis=-1, keepdims=True, initial=-jnp.inf)  # there may be none at all
    weights = jnp.where(visible, jnp.exp(scores - jnp.where(jnp.isfinite(highest), highest, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0.0, total, 1.0)


def best(scores: jax.Array, allowed: jax.Array, always: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """The `top` highest of the allowed scores of the last axis, those of `always` first: their indices and their count.

    Fewer than `top` count where fewer are allowed.
    """
    scores = jnp.where(always, jnp.inf, scores)
    values, index = jax.lax.top_k(jnp.where(allowed, scores, -jnp.inf), min(top, scores.shape[-1]))
    return index.astype(jnp.int32), (values > -jnp.inf).sum(axis=-1, dtype=jnp.int32)


def cover(mass: jax.Array, share: jax.Array | float, at_least: int = 0) -> jax.Array:
    """The fewest entries of the last axis that hold `share` of the mass, and no fewer than `at_least`: bool.

    A share of 1 is all of them: rounding in the sum could otherwise leave small ones out.

    Args:
      mass: float32 [..., n], not negative.
      share: in [0, 1]; an array broadcastable to [..., 1].
      at_least: how many entries are kept even if fewer hold enough.
    """
    order = jnp.argsort(-mass, axis=-1)
    ordered = jnp.take_along_axis(mass, order, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    kept = (before < share * mass.sum(axis=-1, keepdims=True)) | (jnp.asarray(share) >= 1.0)
    kept = kept | (jnp.arange(mass.shape[-1]) < at_least)
    return jnp.put_along_axis(jnp.zeros(mass.shape, bool), order, kept, axis=-1, inplace=False)
