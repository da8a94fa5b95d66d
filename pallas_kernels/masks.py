"""The mask algebra: which query sees which key, as small objects that combine with `&` and `|`.

Every mask is a frozen dataclass and a pytree, so that jit, vmap and shard_map carry its arrays. `dense` is a
mask's definition; the other two forms are tested against it: `rows`, one or two key intervals a query, which is what
kernels evaluate, and `plan`, the blocks they visit. Positions are rows and columns of the [Tq, Tk] score matrix,
counted from 0; in a packed batch they are positions in the packed row, and `Segments` keeps the examples apart.

| want | write |
|---|---|
| packed causal | `Causal() & Segments(ids)` |
| packed prefix-LM | `PrefixLM(prefix_end) & Segments(ids)` with prefix_end [B, T] |
| sliding window of w keys | `Causal() & Window(w - 1, 0)` |
| Longformer | `Window(w, w) | GlobalTokens(n)` |
| padded encoder | `KVLength(lengths)` |
"""

import abc
import dataclasses
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.plans import HIDDEN, Plan, Rows, plan_of_rows

Array = Any  # jax.Array, numpy array, or a Python int where said so


def _mask(cls: type) -> type:
    """Makes `cls` a frozen dataclass and a pytree; fields marked static belong to its structure."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    static = [f.name for f in fields if f.metadata.get("static")]
    jax.tree_util.register_dataclass(cls, [f.name for f in fields if f.name not in static], static)
    return cls


def _static(**options: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **options)


def _positions(count: int, start: Array = 0) -> jax.Array:
    """int32 [1, count]: start, start + 1, ..."""
    return start + jnp.arange(count, dtype=jnp.int32)[None]


def _per_query(value: Array, tq: int, start: Array = 0) -> jax.Array:
    """A scalar, [B] or [B, T] value as int32 [B|1, tq|1]: of the queries start ... start + tq."""
    value = jnp.asarray(value, jnp.int32)
    if value.ndim < 2:
        return value.reshape(-1, 1)
    return jax.lax.dynamic_slice_in_dim(value, start, tq, axis=1)


def _check_shape(name: str, value: Array, *allowed: tuple[int, ...]) -> None:
    if np.shape(value) not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(
            f"{name} must have the shape {shapes} for these queries and keys, got {list(np.shape(value))}."
        )


def _mesh_axes(shape: tuple[int, ...]) -> tuple[str | None, ...]:
    names = ("batch", "heads", None, None) if len(shape) > 2 else ("batch", None)
    return tuple(name if size > 1 else None for name, size in zip(names, shape))


class Mask(abc.ABC):
    """Which query sees which key. Combine masks with `&` and `|`."""

    def __str__(self) -> str:
        return type(self).__name__

    @abc.abstractmethod
    def dense(self, tq: int, tk: int, start: Array = 0) -> jax.Array:
        """bool, broadcastable to [B, H, Tq, Tk]: True where query start + q sees key k."""

    @property
    def intervals(self) -> int | None:
        """How many intervals of keys a query sees at most, 1 or 2; None if the mask is not of that form."""
        return None

    def rows(self, tq: int, tk: int) -> Rows | None:
        """The mask as intervals of keys for each query, in O(Tq) memory; None if it is not of that form.

        A `BlockSparse` part is not in them; see `block_sparse`.
        """
        return None

    @property
    def block_sparse(self) -> "BlockSparse | None":
        """The mask's lists of blocks, if it has any."""
        return None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """(left, right): known beforehand, that query q sees only keys q - left ... q + right; None is no limit."""
        return None, None

    def plan(self, tq: int, tk: int, bq: int, bk: int) -> Plan:
        """Which blocks of bq queries and bk keys have anything to see, for each example (and head, if those differ).

        Raises:
          TypeError: the mask is not of interval form.
          ValueError: bq and bk do not divide the blocks of a `BlockSparse` part.
        """
        rows = self.rows(tq, tk)
        if rows is None:
            raise TypeError(
                f"{self} has no block plan: it is not made of key intervals. Use the backend xla or xla_chunked."
            )
        plan = plan_of_rows(rows, tk, (bq, bk))
        if self.block_sparse is None:
            return plan
        return dataclasses.replace(plan, state=jnp.where(self.block_sparse.map(tq, tk, bq, bk), plan.state, HIDDEN))

    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        """Raises a ValueError that names the array which does not fit these sizes."""
        del batch, heads, tq, tk

    @property
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """What the axes of each of the mask's arrays run over: "batch", "heads", or None for what no mesh may split.

        In the order of `jax.tree.leaves(mask)`. The rank says it: arrays are [], [B], [B, T] or [B|1, H|1, ...], and an
        axis of size 1 serves every example or head.
        """
        return tuple(_mesh_axes(np.shape(leaf)) for leaf in jax.tree.leaves(self))

    def __and__(self, other: "Mask") -> "Mask":
        """What both masks show."""
        if not isinstance(other, Mask):
            return NotImplemented
        parts = [m for side in (self, other) for m in (side.masks if isinstance(side, And) else (side,))]
        parts = tuple(m for m in parts if not isinstance(m, Full))
        if sum(m.intervals == 2 for m in parts) > 1:
            raise TypeError(
                f"{self} & {other} can need more than two key intervals a query, which no kernel takes; combine their "
                f"dense forms as one Dense(...)."
            )
        if sum(m.block_sparse is not None for m in parts) > 1:
            raise TypeError("BlockSparse & BlockSparse: combine their maps and make one BlockSparse of them.")
        return And(parts) if len(parts) > 1 else parts[0] if parts else Full()

    def __or__(self, other: "Mask") -> "Mask":
        """What either mask shows; both must be of one interval a query."""
        if not isinstance(other, Mask):
            return NotImplemented
        if isinstance(self, Full) or isinstance(other, Full):
            return Full()
        if (self.intervals, other.intervals) != (1, 1) or self.block_sparse or other.block_sparse:
            raise TypeError(
                f"{self} | {other} has no form of one or two key intervals a query: only masks of one interval each "
                f"can be joined. Combine their dense forms as one Dense(...), or apply & after |."
            )
        return Or((self, other))


def _interval(lo: Array, hi: Array, tq: int, tk: int) -> Rows:
    """Rows of one interval from bounds broadcastable to [B|1, Tq], cut to the keys there are."""
    lo, hi = jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32)
    batch = max(x.shape[0] if x.ndim == 2 else 1 for x in (lo, hi))
    lo, hi = jnp.broadcast_to(lo, (batch, tq)), jnp.broadcast_to(hi, (batch, tq))
    return Rows(jnp.maximum(lo, 0)[:, None], jnp.minimum(hi, tk)[:, None])


class IntervalMask(Mask):
    """A mask that shows each query one interval of keys. Subclasses say which, and that defines them."""

    @abc.abstractmethod
    def bounds(self, queries: jax.Array, tk: int, start: Array) -> tuple[Array, Array]:
        """The interval [lo, hi) of each query, broadcastable to [B, tq].

        Args:
          queries: int32 [1, tq], start, start + 1, ...
          tk: number of keys.
          start: the first query; a traced scalar in a loop over blocks of queries.
        """

    @property
    @override
    def intervals(self) -> int:
        return 1

    @override
    def rows(self, tq: int, tk: int) -> Rows:
        return _interval(*self.bounds(_positions(tq), tk, 0), tq, tk)

    @override
    def dense(self, tq: int, tk: int, start: Array = 0) -> jax.Array:
        return _interval(*self.bounds(_positions(tq, start), tk, start), tq, tk).dense(tk)


@_mask
class Full(IntervalMask):
    """Every query sees every key."""

    @override
    def bounds(self, queries: jax.Array, tk: int, start: Array) -> tuple[Array, Array]:
        return 0, tk


@_mask
class Causal(IntervalMask):
    """Query q sees the keys k <= q + offset.

    Attributes:
      offset: int, or int32 [B]: how far the queries start behind the keys' start (as with cached keys).
    """

    offset: Array = 0

    @override
    def bounds(self, queries: jax.Array, tk: int, start: Array) -> tuple[Array, Array]:
        return 0, queries + 1 + _per_query(self.offset, 1)

    @property
    @override
    def reach(self) -> tuple[int | None, int | None]:
        return None, self.offset if isinstance(self.offset, int) else None

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        _check_shape("Causal.offset", self.offset, (), (batch,))


@_mask
class PrefixLM(IntervalMask):
    """Query q sees the keys k <= q, and all keys before `prefix_end`.

    Attributes:
      prefix_end: int, int32 [B], or int32 [B, Tq]: one past the last key of the prefix, in positions of the packed
        row; per query in packed rows, where each segment has its own prefix (combine with `Segments`).
    """

    prefix_end: Array

    @override
    def bounds(self, queries: jax.Array, tk: int, start: Array) -> tuple[Array, Array]:
        return 0, jnp.maximum(queries + 1, _per_query(self.prefix_end, queries.shape[1], start))

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        _check_shape("PrefixLM.prefix_end", self.prefix_end, (), (batch,), (batch, tq))


@_mask
class Window(IntervalMask):
    """Query q sees the keys q - left <= k <= q + right; None leaves a side open.

    A causal sliding window of w keys, the query's own among them, is `Causal() & Window(w - 1, 0)`.
    """

    left: int | None = _static(default=None)
    right: int | None = _static(default=None)

    @override
    def bounds(self, queries: jax.Array, tk: int, start: Array) -> tuple[Array, Array]:
        return (
            0 if self.left is None else queries - self.left,
            tk if self.right is None else queries + self.right + 1,
        )

    @property
    @override
    def reach(self) -> tuple[int | None, int | None]:
        return self.left, self.right


@_mask
class Chunked(IntervalMask):
    """Query q sees the keys of its own chunk of `size` consecutive positions."""

    size: int = _static()

    @override
    def bounds(self, queries: jax.Array, tk: int, start: Array) -> tuple[Array, Array]:
        first = queries // self.size * self.size
        return first, first + self.size

    @property
    @override
    def reach(self) -> tuple[int | None, int | None]:
        return self.size - 1, self.size - 1


@_mask
class Complete(IntervalMask):
    """Query q sees the keys that sum up tokens which are all at q or before it (NSA, arXiv 2502.11089, 3.3.1).

    Attributes:
      size: tokens that a key sums up.
      stride: key i begins at token i * stride.
    """

    size: int = _static()
    stride: int = _static()

    @override
    def bounds(self, queries: jax.Array, tk: int, start: Array) -> tuple[Array, Array]:
        return 0, (queries + 1 - self.size) // self.stride + 1


@_mask
class KVLength(IntervalMask):
    """Every query sees the first `length` keys.

    Attributes:
      length: int or int32 [B].
    """

    length: Array

    @override
    def bounds(self, queries: jax.Array, tk: int, start: Array) -> tuple[Array, Array]:
        return 0, _per_query(self.length, 1)

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        _check_shape("KVLength.length", self.length, (), (batch,))


@_mask
class GlobalTokens(IntervalMask):
    """The tokens of one run see every key and are seen by every query; nothing else is visible.

    Join it with what the other tokens see: `Window(w, w) | GlobalTokens(n)` is Longformer's mask (arXiv 2004.05150,
    3.1). Tokens that are global but not next to each other must first be moved together, best to the front.

    Attributes:
      count: int or int32 [B]: how many tokens are global.
      start: int or int32 [B]: the first of them.
    """

    count: Array
    start: Array = 0

    @override
    def bounds(self, queries: jax.Array, tk: int, start: Array) -> tuple[Array, Array]:
        first = _per_query(self.start, 1)
        end = first + _per_query(self.count, 1)
        everything = (queries >= first) & (queries < end)
        return jnp.where(everything, 0, first), jnp.where(everything, tk, end)

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        _check_shape("GlobalTokens.count", self.count, (), (batch,))
        _check_shape("GlobalTokens.start", self.start, (), (batch,))


@_mask
class Intervals(Mask):
    """The keys of each query, given as the normal form of a mask, or of a part of one (`Rows.part`).

    Attributes:
      lo, hi: int32 [B|1, R, Tq], see `Rows`; R is 1 or 2.
    """

    lo: Array
    hi: Array

    @property
    @override
    def intervals(self) -> int:
        return np.shape(self.lo)[1]

    @override
    def rows(self, tq: int, tk: int) -> Rows:
        return Rows(jnp.maximum(self.lo, 0), jnp.minimum(self.hi, tk))

    @override
    def dense(self, tq: int, tk: int, start: Array = 0) -> jax.Array:
        return Rows(*(jax.lax.dynamic_slice_in_dim(x, start, tq, axis=2) for x in (self.lo, self.hi))).dense(tk)

    def near(self, left: int, right: int, positions: Array) -> "Intervals":
        """Of these keys those that stand at most `left` before their query in the text, or `right` after it.

        Args:
          left, right: as in `Window`.
          positions: int32 [B, T], of the tokens of both in their text; along an interval they grow by one.
        """
        lo, hi = jnp.asarray(self.lo, jnp.int32), jnp.asarray(self.hi, jnp.int32)
        own = jnp.asarray(positions, jnp.int32)[:, None]  # [B, 1, T]
        places = jnp.broadcast_to(jnp.clip(lo, 0, own.shape[-1] - 1), (own.shape[0], *lo.shape[1:]))
        ahead = own - jnp.take_along_axis(own, places, axis=-1)  # of the interval's first key to the query
        return Intervals(jnp.maximum(lo, lo + ahead - left), jnp.minimum(hi, lo + ahead + right + 1))

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        shapes = [(b, intervals, tq) for b in {batch, 1} for intervals in (1, 2)]
        _check_shape("Intervals.lo", self.lo, *shapes)
        _check_shape("Intervals.hi", self.hi, np.shape(self.lo))

    @property
    @override
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        return tuple(("batch" if np.shape(x)[0] > 1 else None, None, None) for x in (self.lo, self.hi))


@_mask
class Segments(Mask):
    """Query and key belong to the same example of a packed row; id 0 is padding, which sees and is seen by nothing.

    Attributes:
      q_ids: int32 [B, Tq].
      kv_ids: int32 [B, Tk]; None means the queries' own.
      contiguous: ids of keys never decrease and padding comes last, as in rows packed in order. Otherwise the mask is
        compared id by id, which the backends xla and xla_chunked can do.
    """

    q_ids: Array
    kv_ids: Array | None = None
    contiguous: bool = _static(default=True)

    @property
    @override
    def intervals(self) -> int | None:
        return 1 if self.contiguous else None

    @override
    def dense(self, tq: int, tk: int, start: Array = 0) -> jax.Array:
        queries = _per_query(self.q_ids, tq, start)[:, None, :, None]
        keys = jnp.asarray(self._kv_ids, jnp.int32)[:, None, None, :]
        return (queries == keys) & (queries > 0)

    @override
    def rows(self, tq: int, tk: int) -> Rows | None:
        if not self.contiguous:
            return None
        self._check_order()
        queries, keys = jnp.asarray(self.q_ids, jnp.int32), jnp.asarray(self._kv_ids, jnp.int32)
        if self.kv_ids is None:
            lo, hi = _runs(queries)
        else:
            keys = jnp.where(keys == 0, np.iinfo(np.int32).max, keys)
            lo = jax.vmap(lambda ks, qs: jnp.searchsorted(ks, qs, side="left"))(keys, queries)
            hi = jax.vmap(lambda ks, qs: jnp.searchsorted(ks, qs, side="right"))(keys, queries)
        return _interval(lo, jnp.where(queries == 0, 0, hi), tq, tk)

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        _check_shape("Segments.q_ids", self.q_ids, (batch, tq))
        name = (
            "Segments.q_ids, which are the keys' too because kv_ids is None,"
            if self.kv_ids is None
            else "Segments.kv_ids"
        )
        _check_shape(name, self._kv_ids, (batch, tk))

    def _check_order(self) -> None:
        """Refuses ids known now (not traced) whose intervals would be wrong."""
        if isinstance(self._kv_ids, jax.core.Tracer):
            return
        ids = np.asarray(self._kv_ids)
        ids = np.where(ids == 0, np.iinfo(np.int32).max, ids)
        wrong = np.flatnonzero((np.diff(ids) < 0).any(axis=-1))
        if wrong.size:
            raise ValueError(
                f"Segments: the keys' ids of row {wrong[0]} do not increase from example to example with padding (0) "
                f"last: {np.asarray(self._kv_ids)[wrong[0]]}. Pack rows in that order, or say contiguous=False."
            )

    @property
    def _kv_ids(self) -> Array:
        return self.q_ids if self.kv_ids is None else self.kv_ids


def _runs(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each position the start and the end of the run of equal ids [B, T] it is in."""
    length = ids.shape[1]
    position = _positions(length)
    differs = ids[:, 1:] != ids[:, :-1]
    edge = jnp.ones_like(ids[:, :1], bool)
    start = jax.lax.cummax(jnp.where(jnp.concatenate([edge, differs], 1), position, 0), axis=1)
    end = jnp.where(jnp.concatenate([differs, edge], 1), position + 1, length)
    return start, jax.lax.cummin(end, axis=1, reverse=True)


@_mask
class BlockSparse(Mask):
    """The queries of block i see the keys of the blocks that its list names; lists may differ by head.

    `BlockSparse(...) & Causal()` hides the future inside the blocks on the diagonal.

    Attributes:
      index: int32 [B|1, H|1, nq, m], blocks of keys, each at most once among the first `count`.
      count: int32 [B|1, H|1, nq], how many entries of each list count.
      block: queries and keys a block has.
    """

    index: Array
    count: Array
    block: tuple[int, int] = _static()

    @classmethod
    def of_map(cls, visible: Array, block: tuple[int, int], width: int | None = None) -> "BlockSparse":
        """The mask whose lists are the True entries of a map.

        Args:
          visible: bool [B|1, H|1, nq, nk].
          block: queries and keys a block has.
          width: the longest list there can be; None is nk. Longer lists lose their last entries.
        """
        visible = jnp.asarray(visible, bool)
        width = visible.shape[-1] if width is None else width
        order = jnp.argsort(~visible, axis=-1, stable=True)[..., :width]
        return cls(order.astype(jnp.int32), jnp.minimum(visible.sum(-1, dtype=jnp.int32), width), block)

    @property
    @override
    def intervals(self) -> int:
        return 1

    @property
    @override
    def block_sparse(self) -> "BlockSparse":
        return self

    @override
    def rows(self, tq: int, tk: int) -> Rows:
        return Full().rows(tq, tk)

    @override
    def dense(self, tq: int, tk: int, start: Array = 0) -> jax.Array:
        bq, bk = self.block
        queries = jnp.minimum(_positions(tq, start)[0] // bq, np.shape(self.index)[2] - 1)
        return jnp.repeat(self._listed(-(-tk // bk))[:, :, queries], bk, axis=-1)[..., :tk]

    def map(self, tq: int, tk: int, bq: int, bk: int) -> jax.Array:
        """bool [B|1, H|1, nq, nk]: which blocks of bq queries and bk keys are listed."""
        if self.block[0] % bq or self.block[1] % bk:
            raise ValueError(f"BlockSparse.block={self.block} must be multiples of the kernel's blocks {(bq, bk)}.")
        nq, nk = -(-tq // bq), -(-tk // bk)
        listed = self._listed(-(-tk // self.block[1]))
        listed = jnp.repeat(jnp.repeat(listed, self.block[0] // bq, axis=2), self.block[1] // bk, axis=3)
        return listed[:, :, :nq, :nk]

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        nq, width = -(-tq // self.block[0]), np.shape(self.index)[-1]
        shapes = [(b, h, nq) for b in {batch, 1} for h in {heads, 1}]
        _check_shape("BlockSparse.count", self.count, *shapes)
        _check_shape("BlockSparse.index", self.index, *((*shape, width) for shape in shapes))

    def _listed(self, nk: int) -> jax.Array:
        index, count = jnp.asarray(self.index), jnp.asarray(self.count)
        counts = jnp.arange(index.shape[-1]) < count[..., None]
        b, h, q, _ = jnp.indices(index.shape, sparse=True)
        return jnp.zeros((*index.shape[:3], nk), bool).at[b, h, q, index].max(counts)


@_mask
class Dense(Mask):
    """Any mask, given as an array: bool, broadcastable to [B, H, Tq, Tk]. Costs O(Tq Tk) memory."""

    mask: Array

    @override
    def dense(self, tq: int, tk: int, start: Array = 0) -> jax.Array:
        mask = jnp.asarray(self.mask, bool)
        return mask if mask.shape[-2] == 1 else jax.lax.dynamic_slice_in_dim(mask, start, tq, axis=-2)

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        shape, full = np.shape(self.mask), (batch, heads, tq, tk)
        if len(shape) != 4 or any(a not in (1, b) for a, b in zip(shape, full)):
            raise ValueError(f"Dense.mask must be broadcastable to [B, H, Tq, Tk] = {list(full)}, got {list(shape)}.")


@_mask
class And(Mask):
    """What every one of `masks` shows. Made by `&`."""

    masks: tuple[Mask, ...]

    def __str__(self) -> str:
        return " & ".join(map(str, self.masks))

    @property
    @override
    def intervals(self) -> int | None:
        counts = [mask.intervals for mask in self.masks]
        return None if None in counts else max(counts)

    @property
    @override
    def block_sparse(self) -> BlockSparse | None:
        return next((mask.block_sparse for mask in self.masks if mask.block_sparse is not None), None)

    @property
    @override
    def reach(self) -> tuple[int | None, int | None]:
        sides = zip(*(mask.reach for mask in self.masks))
        return tuple(min((n for n in side if n is not None), default=None) for side in sides)

    @override
    def dense(self, tq: int, tk: int, start: Array = 0) -> jax.Array:
        shown = self.masks[0].dense(tq, tk, start)
        for mask in self.masks[1:]:
            shown = shown & mask.dense(tq, tk, start)
        return shown

    @override
    def rows(self, tq: int, tk: int) -> Rows | None:
        if self.intervals is None:
            return None
        rows = self.masks[0].rows(tq, tk)
        for mask in self.masks[1:]:
            rows = rows & mask.rows(tq, tk)
        return rows

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        for mask in self.masks:
            mask.check(batch, heads, tq, tk)

    @property
    @override
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        return tuple(axes for mask in self.masks for axes in mask.axes)


def running_segments(mask: Mask) -> Array | None:
    """The segment ids, int32 [B, T], with which a layer that carries a state along the row does what a mask says.

    Returns:
      None where the whole row is one text.

    Raises:
      TypeError: the mask is not `Causal()` or `Causal() & Segments(ids)`, which is all that a running state can do.
    """
    parts = mask.masks if isinstance(mask, And) else (mask,)
    ids = [part.q_ids for part in parts if isinstance(part, Segments) and part.kv_ids is None]
    if len(parts) != 1 + len(ids) or len(ids) > 1 or not any(_is_plain_causal(part) for part in parts):
        raise TypeError(
            f"A running state sees what came before it in its text; it cannot do what the mask {mask} says."
        )
    return ids[0] if ids else None


def _is_plain_causal(mask: Mask) -> bool:
    return isinstance(mask, Causal) and isinstance(mask.offset, int) and mask.offset == 0


@_mask
class Or(Mask):
    """What either of two `masks` of one interval shows. Made by `|`."""

    masks: tuple[Mask, Mask]

    def __str__(self) -> str:
        return f"({self.masks[0]} | {self.masks[1]})"

    @property
    @override
    def intervals(self) -> int:
        return 2

    @property
    @override
    def reach(self) -> tuple[int | None, int | None]:
        return tuple(None if None in side else max(side) for side in zip(*(mask.reach for mask in self.masks)))

    @override
    def dense(self, tq: int, tk: int, start: Array = 0) -> jax.Array:
        return self.masks[0].dense(tq, tk, start) | self.masks[1].dense(tq, tk, start)

    @override
    def rows(self, tq: int, tk: int) -> Rows:
        return self.masks[0].rows(tq, tk) | self.masks[1].rows(tq, tk)

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        for mask in self.masks:
            mask.check(batch, heads, tq, tk)

    @property
    @override
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        return tuple(axes for mask in self.masks for axes in mask.axes)
