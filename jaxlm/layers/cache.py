"""Caches: what layers remember of each slot's text, so that a new token costs one token's work.

A slot holds one text. Every leaf of a cache has the slots as its first axis, so that texts are taken, reordered and
replaced by indexing it. How many tokens a slot holds is said once, in `Caches.lengths`, and not by each layer.

| call | who makes what of it |
|---|---|
| `prefill` | prompts in packed rows through the ordinary forward pass; each block gives a fresh cache of N slots |
| `Caches.insert` | fresh slots take the place of others in a larger cache |
| `extend` | t new tokens a slot: each block appends them, and reads what the slot holds |
| `Caches.take`, `Caches.rewind` | slots in another order (beams); the last tokens forgotten (rejected drafts) |
"""

import abc
import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, Self, override

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.biases import Bias


class CacheType(enum.Enum):
    """How keys and values are kept: as they are COMPUTEd, or as INT8 with a float32 scale a head and token."""

    COMPUTE = "compute"
    INT8 = "int8"


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What is kept of a text that is continued.

    Attributes:
      type: see `CacheType`.
      extension: most tokens that one `extend` appends to a slot: 1 to draw one by one, k + 1 to verify k drafts. Layers
        with a window keep this many entries more than the window, so that rejected drafts overwrite nothing in it.
    """

    type: CacheType = CacheType.COMPUTE
    extension: int = 1

    def __post_init__(self):
        object.__setattr__(self, "type", CacheType(self.type))
        if self.extension < 1:
            raise ValueError(f"CacheConfig.extension must be at least 1 token, not {self.extension}.")


def _pytree(cls: type) -> type:
    """Makes `cls` a frozen dataclass and a pytree; fields marked static belong to its structure."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    static = [f.name for f in fields if f.metadata.get("static")]
    jax.tree_util.register_dataclass(cls, [f.name for f in fields if f.name not in static], static)
    return cls


def _static(**options: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **options)


@_pytree
class PackedTexts:
    """Where N texts lie in packed rows.

    Attributes:
      rows: int32 [N], the row of each.
      starts: int32 [N], its first column.
      lengths: int32 [N], its tokens; 0 where there is no text.
    """

    rows: jax.Array
    starts: jax.Array
    lengths: jax.Array

    def gather(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [R, T, ...] of the rows -> [N, P, ...] of each text's `positions` [N, P], which are clipped to the row."""
        columns = jnp.clip(self.starts[:, None] + positions, 0, x.shape[1] - 1)
        return x[self.rows[:, None], columns]

    def last(self, x: jax.Array) -> jax.Array:
        """x [R, T, ...] of the rows -> [N, ...] at each text's last token."""
        return self.gather(x, jnp.maximum(self.lengths - 1, 0)[:, None])[:, 0]

    def before_end(self, x: jax.Array, count: int) -> jax.Array:
        """x [R, T, ...] of the rows -> [N, count, ...], the last tokens of each text; zeros before its first."""
        positions = self.lengths[:, None] - count + jnp.arange(count)
        found = self.gather(x, positions)
        return jnp.where((positions >= 0).reshape(positions.shape + (1,) * (x.ndim - 2)), found, 0)

    def unpacked(self, x: jax.Array) -> jax.Array:
        """x [R, T, ...] of the rows -> [N, T, ...], each text from its first token on; what follows it is anything."""
        return self.gather(x, jnp.arange(x.shape[1])[None])

    def present(self, length: int) -> jax.Array:
        """int32 [N, length]: 1 on the tokens of each text, 0 after them."""
        return (jnp.arange(length) < self.lengths[:, None]).astype(jnp.int32)

    def packed(self, x: jax.Array, rows: int) -> jax.Array:
        """The reverse of `unpacked`: x [N, T, ...] -> [rows, T, ...], zeros on padding."""
        length = x.shape[1]
        columns = jnp.where(self.present(length) > 0, self.starts[:, None] + jnp.arange(length), length)
        return jnp.zeros((rows, *x.shape[1:]), x.dtype).at[self.rows[:, None], columns].set(x, mode="drop")


class Cache(abc.ABC):
    """One layer's memory of B slots: a pytree whose leaves are [B, ...]. Frozen; what changes it returns another.

    Attributes:
      rewindable: whether the last tokens can be forgotten by lowering `Caches.lengths` alone. A recurrent state cannot.
    """

    rewindable: bool = True

    def insert(self, fresh: Self, slots: jax.Array) -> Self:
        """With the N slots of `fresh` in the places `slots`, int32 [N]; places beyond the last slot are passed over."""
        return jax.tree.map(lambda x, new: x.at[slots].set(new, mode="drop"), self, fresh)

    def grown(self, capacity: int) -> Self:
        """With room for texts of `capacity` tokens; what is of one size whatever the text stays as it is."""
        del capacity
        return self

    @abc.abstractmethod
    def laid_out(self, constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array]) -> Self:
        """With each leaf where its logical axes belong; `constrain` is `Ops.constrain`."""


@_pytree
class Plain:
    """Keys or values as they were computed.

    Attributes:
      values: [B, G, S, D]: heads before entries, the order in which a product reads them.
    """

    values: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> Self:
        """From [B, G, S, D]."""
        return cls(x)

    def read(self, dtype: jnp.dtype) -> jax.Array:
        """[B, G, S, D]."""
        return self.values.astype(dtype)


@_pytree
class Int8:
    """Keys or values in 8 bits, with a scale for each head and token.

    Rounding moves no number by more than half of its scale, 1/254 of the largest of its vector.

    Attributes:
      values: int8 [B, G, S, D].
      scales: float32 [B, G, S, 1].
    """

    values: jax.Array
    scales: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> Self:
        """From [B, G, S, D]."""
        x = x.astype(jnp.float32)
        scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127.0
        values = jnp.round(x / jnp.where(scales > 0, scales, 1.0)).astype(jnp.int8)
        return cls(values, scales)

    def read(self, dtype: jnp.dtype) -> jax.Array:
        """[B, G, S, D]."""
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)


_STORED = {CacheType.COMPUTE: Plain, CacheType.INT8: Int8}


@_pytree
class KeyValueCache(Cache):
    """Keys and values of one attention layer, as they are attended to: normalised and rotated.

    Position p of a text lies in entry p modulo S. A layer that sees everything has an entry for each position; one with
    a window has `limit` entries at most, a ring in which new tokens overwrite those that left the window.

    Attributes:
      keys, values: S entries each.
      limit: most entries ever needed; None: as many as a text has tokens.
    """

    keys: Plain | Int8
    values: Plain | Int8
    limit: int | None = _static(default=None)

    @classmethod
    def of(
        cls,
        keys: jax.Array,
        values: jax.Array,
        texts: PackedTexts,
        config: CacheConfig,
        *,
        window: int | None = None,
    ) -> Self:
        """A cache of the N texts in packed rows, with room for a row's length of tokens.

        Args:
          keys, values: [R, T, G, D] of the rows.
          texts: where they lie.
          config: see `CacheConfig`.
          window: how many tokens back a query sees, itself not counted; None sees all.
        """
        limit = None if window is None else window + config.extension
        entries = _entries(keys.shape[1], limit)
        # The last `entries` tokens of each text, each in its place; entries of no token hold whatever lies there.
        positions = held_positions(texts.lengths, entries)
        stored = _STORED[config.type]
        return cls(*(stored.of(texts.gather(x, positions).swapaxes(1, 2)) for x in (keys, values)), limit)

    @property
    def entries(self) -> int:
        """S, entries a slot."""
        return self.keys.values.shape[2]

    def append(self, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> Self:
        """With t more tokens a slot, after the `lengths` [B] that it holds; keys and values are [B, t, G, D].

        Entries after `lengths` are nobody's, so that tokens which turn out not to count do no harm there.
        """
        count = keys.shape[1]
        slots = jnp.arange(len(lengths))[:, None]
        places = (lengths[:, None] + jnp.arange(count)) % self.entries  # [B, t]

        def write(stored: Plain | Int8, new: jax.Array) -> Plain | Int8:
            new = type(stored).of(new.swapaxes(1, 2))  # leaves [B, G, t, ...]
            return jax.tree.map(
                lambda x, y: x.at[slots, :, places].set(
                    y.swapaxes(1, 2).astype(x.dtype), unique_indices=True, mode="promise_in_bounds"
                ),
                stored,
                new,
            )

        # Otherwise XLA may write once for what reads the cache and once more for what keeps it, and copies the whole
        # cache to do so: on a CPU, four times for each token of a single slot.
        keys, values = jax.lax.optimization_barrier((write(self.keys, keys), write(self.values, values)))
        return dataclasses.replace(self, keys=keys, values=values)

    @override
    def insert(self, fresh: Self, slots: jax.Array) -> Self:
        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            # Fresh caches have no more entries than these. With fewer, position and entry are still the same number.
            return x.at[slots, :, : new.shape[2]].set(new.astype(x.dtype), mode="drop")

        return jax.tree.map(put, self, fresh)

    @override
    def grown(self, capacity: int) -> Self:
        more = _entries(capacity, self.limit) - self.entries
        if more <= 0:
            return self
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))), self)

    @override
    def laid_out(self, constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array]) -> Self:
        return jax.tree.map(lambda x: constrain(x, ("batch", "kv_heads", None, None)), self)


@_pytree
class RecurrentCache(Cache):
    """The state of one layer that runs along the text, of one size however long it is.

    Attributes:
      state: float32 [B, ...].
      windows: what the layer's convolutions see before the next token, [B, taps - 1, ...] each.
      axes: the logical axes of the state and of each window, after the first.
    """

    rewindable = False

    state: jax.Array
    windows: tuple[jax.Array, ...] = ()
    axes: tuple[tuple[str | None, ...], ...] = _static(default=())

    @override
    def laid_out(self, constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array]) -> Self:
        state, *windows = (
            constrain(x, ("batch", *names)) for x, names in zip((self.state, *self.windows), self.axes, strict=True)
        )
        return dataclasses.replace(self, state=state, windows=tuple(windows))


def run_steps(
    step: Callable[..., tuple[jax.Array, jax.Array]],
    state: jax.Array,
    inputs: tuple[jax.Array | None, ...],
    present: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """A recurrence for t new tokens a slot, one after the other: t is small.

    Args:
      step: (state [B, ...], an entry [B, ...] of each input) -> (state, output).
      state: [B, ...].
      inputs: [B, t, ...] each, or None.
      present: bool [B, t], False on tokens that leave the state as it is; None: none does.

    Returns:
      Outputs [B, t, ...], and the state after the tokens.
    """
    outputs = []
    count = next(x for x in inputs if x is not None).shape[1]
    for at in range(count):
        after, output = step(state, *(None if x is None else x[:, at] for x in inputs))
        if present is not None:
            after = jnp.where(present[:, at].reshape((-1,) + (1,) * (state.ndim - 1)), after, state)
        state = after
        outputs.append(output)
    return jnp.stack(outputs, axis=1), state


def _entries(capacity: int, limit: int | None) -> int:
    return capacity if limit is None else min(capacity, limit)


def held_positions(ends: jax.Array, entries: int) -> jax.Array:
    """int32 [B, S]: the position that each entry holds in texts of `ends` [B] tokens; negative: none yet.

    The youngest position below the end that is congruent to the entry modulo S.
    """
    newest = ends[:, None] - 1
    return newest - (newest - jnp.arange(entries, dtype=jnp.int32)) % entries


@dataclasses.dataclass(frozen=True, eq=False)
class Extension:
    """What the blocks of a stack share when slots are extended by t tokens.

    Attributes:
      lengths: int32 [B], how many tokens each slot holds before.
      positions: int32 [B, t], of the new tokens.
      rotations: for each Rope and head size among the blocks, cosines and sines at `positions`.
      bias: the stack's shared relative position bias, or None.
      source_lengths: int32 [B], tokens of the encoder's text of each slot; None: there is no encoder.
      present: bool [B, t], False on tokens that do not count; None: all do. They come last in a slot. Keys and values
        of others may be written where they would lie, a recurrent state must not change.
    """

    lengths: jax.Array
    positions: jax.Array
    rotations: Mapping[Any, tuple[jax.Array, jax.Array]]
    bias: Bias | None = None
    source_lengths: jax.Array | None = None
    present: jax.Array | None = None


@_pytree
class BlockCache:
    """What an attention block remembers.

    Attributes:
      attention: of its self-attention.
      cross: keys and values of the encoder's text, which never grow; None without an encoder.
    """

    attention: Cache
    cross: KeyValueCache | None = None


@_pytree
class Caches:
    """The memory of a whole stack for B slots.

    Attributes:
      lengths: int32 [B], tokens that each slot holds.
      blocks: what each block remembers, from the first to the last: a pytree of `Cache`s each.
      source_lengths: int32 [B], tokens of each slot's encoder text; None without an encoder.
    """

    lengths: jax.Array
    blocks: tuple[Any, ...]
    source_lengths: jax.Array | None = None

    @property
    def rewindable(self) -> bool:
        """Whether `rewind` is possible."""
        return all(cache.rewindable for cache in _caches(self.blocks))

    def insert(self, fresh: "Caches", slots: jax.Array) -> "Caches":
        """With the N slots of `fresh`, made by a prefill, in the places `slots` [N]; those beyond B are passed over."""

        def put(x: jax.Array | None, new: jax.Array | None) -> jax.Array | None:
            return None if x is None else x.at[slots].set(new, mode="drop")

        blocks = jax.tree.map(lambda c, f: c.insert(f, slots), self.blocks, fresh.blocks, is_leaf=_is_cache)
        return Caches(put(self.lengths, fresh.lengths), blocks, put(self.source_lengths, fresh.source_lengths))

    def grown(self, capacity: int, source_capacity: int | None = None) -> "Caches":
        """With room for texts of `capacity` tokens, and encoder texts of `source_capacity` (None: as they have)."""

        def grow(block: Any) -> Any:
            if isinstance(block, BlockCache):
                cross = block.cross
                if cross is not None and source_capacity is not None:
                    cross = cross.grown(source_capacity)
                return BlockCache(block.attention.grown(capacity), cross)
            return jax.tree.map(lambda c: c.grown(capacity), block, is_leaf=_is_cache)

        return dataclasses.replace(self, blocks=tuple(grow(block) for block in self.blocks))

    def take(self, indices: jax.Array) -> "Caches":
        """Slot i of the result is slot indices[i]: reordered, repeated, or fewer."""
        return jax.tree.map(lambda x: x[indices], self)

    def rewind(self, lengths: jax.Array) -> "Caches":
        """The first `lengths` [B] tokens of each slot; at most `CacheConfig.extension` are forgotten at a time.

        Raises:
          TypeError: a layer remembers a state that cannot go back.
        """
        for cache in _caches(self.blocks):
            if not cache.rewindable:
                raise TypeError(
                    f"{type(cache).__name__} cannot forget its last tokens; keep the caches of before and extend them "
                    f"again."
                )
        return dataclasses.replace(self, lengths=jnp.minimum(self.lengths, lengths))

    def laid_out(self, constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array]) -> "Caches":
        """With each leaf where its logical axes belong; `constrain` is `Ops.constrain`."""
        blocks = jax.tree.map(lambda c: c.laid_out(constrain), self.blocks, is_leaf=_is_cache)
        lengths, sources = (
            None if x is None else constrain(x, ("batch",)) for x in (self.lengths, self.source_lengths)
        )
        return Caches(lengths, blocks, sources)

    @property
    def capacity(self) -> int:
        """Tokens that the layer with the most entries has room for; 0 if no layer's memory depends on the length."""
        own = _caches([_own(block) for block in self.blocks])
        return max((cache.entries for cache in own if isinstance(cache, KeyValueCache)), default=0)

    @property
    def source_capacity(self) -> int | None:
        """Tokens of an encoder's text that there is room for; None without an encoder."""
        crossing = [block.cross.entries for block in self.blocks if isinstance(block, BlockCache) and block.cross]
        return crossing[0] if crossing else None

    @property
    def nbytes(self) -> int:
        """Memory of all leaves, in bytes."""
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(self))


def _own(block: Any) -> Any:
    """What a block remembers of its own text."""
    return block.attention if isinstance(block, BlockCache) else block


def _is_cache(node: Any) -> bool:
    return isinstance(node, Cache)


def _caches(tree: Any) -> list[Cache]:
    return jax.tree.leaves(tree, is_leaf=_is_cache)
