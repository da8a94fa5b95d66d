"""Block plans: which blocks of keys each block of queries must visit, and which of those need no mask.

A plan is made on the device from a mask's normal form (`pallas_kernels.masks.Mask.plan`), so it may differ for every
example and step. Results never depend on it: a kernel applies the rows' intervals in every block that is PARTIAL.
"""

import dataclasses

import jax
import jax.numpy as jnp

HIDDEN, PARTIAL, FULL = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The normal form of a mask: query q sees the keys of one interval [lo, hi), or of two that are disjoint.

    Attributes:
      lo: int32 [B|1, R, Tq], the first visible key; R is 1 or 2.
      hi: int32 [B|1, R, Tq], one past the last; lo >= hi means that the interval is empty.
    """

    lo: jax.Array
    hi: jax.Array

    def __and__(self, other: "Rows") -> "Rows":
        """What both show; one side must have one interval."""
        return Rows(jnp.maximum(self.lo, other.lo), jnp.minimum(self.hi, other.hi))

    def __or__(self, other: "Rows") -> "Rows":
        """What either shows, of two masks of one interval; intervals that overlap or touch become one."""
        lo = jnp.stack(jnp.broadcast_arrays(self.lo[:, 0], other.lo[:, 0]), axis=1)
        hi = jnp.stack(jnp.broadcast_arrays(self.hi[:, 0], other.hi[:, 0]), axis=1)
        empty = lo >= hi
        either_empty = empty.any(axis=1, keepdims=True)
        joined = ~either_empty & (lo.max(axis=1, keepdims=True) <= hi.min(axis=1, keepdims=True))
        first = jnp.arange(2)[None, :, None] == 0
        lo = jnp.where(joined, jnp.where(first, lo.min(axis=1, keepdims=True), 0), lo)
        hi = jnp.where(joined, jnp.where(first, hi.max(axis=1, keepdims=True), 0), hi)
        return Rows(lo, hi)

    def dense(self, tk: int) -> jax.Array:
        """The mask itself: bool [B|1, 1, Tq, Tk]."""
        keys = jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, tk), 3)
        return ((keys >= self.lo[..., None]) & (keys < self.hi[..., None])).any(axis=1, keepdims=True)

    def part(self, query: jax.Array | int, tq: int, key: jax.Array | int, tk: int) -> "Rows":
        """The same for the queries query ... query + tq and the keys key ... key + tk, counted from 0 again.

        An interval cut to a run of keys is an interval, so every mask of this form can be taken apart.
        """

        def cut(bound):
            bound = jax.lax.dynamic_slice_in_dim(bound, query, tq, axis=-1)
            return jnp.clip(bound - key, 0, tk)

        return Rows(cut(self.lo), cut(self.hi))

    @property
    def any(self) -> jax.Array:
        """bool scalar: whether any query sees any key."""
        return jnp.any(self.lo < self.hi)

    def pad(self, tq: int) -> "Rows":
        """The same for `tq` queries: the added ones see nothing."""
        width = [(0, 0), (0, 0), (0, tq - self.lo.shape[-1])]
        return Rows(jnp.pad(self.lo, width), jnp.pad(self.hi, width))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The state of every pair of a block of queries and a block of keys.

    Attributes:
      state: int8 [B|1, H|1, nq, nk]: HIDDEN (no pair of it is visible), PARTIAL, or FULL (all are). Blocks that reach
        past the last query or key are never FULL.
      block: queries and keys a block has.
    """

    state: jax.Array
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def lists(self, *, by_keys: bool = False) -> tuple[jax.Array, jax.Array]:
        """The visited blocks as lists, in order, HIDDEN ones left out.

        Args:
          by_keys: for each block of keys the blocks of queries that see it (what dk and dv need), not the reverse.

        Returns:
          count int32 [B|1, H|1, n] and index int32 [B|1, H|1, n, m]; entries from `count` on repeat the last visited
          block (0 if there is none), so that a load they cause is one that has been made already.
        """
        state = self.state.swapaxes(-1, -2) if by_keys else self.state
        visited = state != HIDDEN
        count = visited.sum(axis=-1, dtype=jnp.int32)
        order = jnp.argsort(~visited, axis=-1, stable=True).astype(jnp.int32)
        last = jnp.take_along_axis(order, jnp.maximum(count - 1, 0)[..., None], axis=-1)
        last = jnp.where(count[..., None] > 0, last, 0)
        slot = jnp.arange(visited.shape[-1])
        return count, jnp.where(slot < count[..., None], order, last)


def plan_of_rows(rows: Rows, tk: int, block: tuple[int, int]) -> Plan:
    """The plan of a mask that is intervals alone. Work O(Tq * nk), memory O(Tq + nq * nk)."""
    bq, bk = block
    tq = rows.lo.shape[-1]
    rows = rows.pad(-(-tq // bq) * bq)
    start = jnp.arange(-(-tk // bk), dtype=jnp.int32) * bk
    lo, hi = rows.lo[..., None], rows.hi[..., None]  # [B|1, R, Tq, 1] against [nk]
    seen = (jnp.maximum(lo, start) < jnp.minimum(hi, start + bk)).any(axis=1)
    whole = ((lo <= start) & (hi >= start + bk)).any(axis=1)
    blocks = (seen.shape[0], 1, -1, bq, len(start))
    seen, whole = seen.reshape(blocks).any(axis=3), whole.reshape(blocks).all(axis=3)
    return Plan(jnp.where(whole, FULL, jnp.where(seen, PARTIAL, HIDDEN)).astype(jnp.int8), block)
