"""The order in which a TPU kernel visits blocks of scores, and what each step must know.

A kernel walks rows of blocks: all blocks of keys that one block of queries sees, then the next block of queries.
`Listed` names the visible blocks one after the other in scalar memory and has exactly as many steps; `Whole` is for
masks with nothing to skip, and counts through all blocks without looking anything up.

Two kernels walk. The forward one needs nothing of order between rows. The backward one gathers the gradients of all
keys of a key head on the chip, and so visits all rows of all query heads that share it (a *scope*) before the next.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.plans import FULL, HIDDEN, Plan

# Two int32 numbers describe an entry.
#   place: query block << 16 | key block
#   notes: example << 19 | head << 7 | bits
# Of the bits 0 means a visible, masked block in the middle of its row: what an entry is if nothing is known of it.
_FULL, _NOTHING, _OPENS_ROW, _CLOSES_ROW, _OPENS_HEAD, _OPENS_SCOPE, _CLOSES_SCOPE = (1 << n for n in range(7))
_HEAD, _EXAMPLE, _QUERY_BLOCK = 7, 19, 16
_MOST_HEADS, MOST_EXAMPLES, _MOST_QUERY_BLOCKS, _MOST_KEY_BLOCKS = 1 << 12, 1 << 12, 1 << 15, 1 << 16

MOST_ENTRIES = 110_000
"""Scalar memory has 1 MiB; an entry takes 8 bytes, and other scalars need room too."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of the grid is about; scalars of a kernel or of an index map.

    Attributes:
      example, head: of the queries.
      query_block, key_block: the block of scores.
      opens_row, closes_row: first and last step of its block of queries.
      opens_head: first step of its query head.
      opens_scope, closes_scope: first and last step of its key head.
      full: every pair of the block is visible.
      partial: some are, and the mask must be applied. Neither holds where a row sees nothing at all.
    """

    example: jax.Array
    head: jax.Array
    query_block: jax.Array
    key_block: jax.Array
    opens_row: jax.Array
    closes_row: jax.Array
    opens_head: jax.Array
    opens_scope: jax.Array
    closes_scope: jax.Array
    full: jax.Array | bool
    partial: jax.Array | bool


class Walk(Protocol):
    """A grid, the scalars that go before it, and how a step is read from both.

    Attributes:
      most_steps: how many steps the grid can have, known while tracing.
    """

    grid: tuple[int | jax.Array, ...]
    most_steps: int
    prefetch: tuple[jax.Array, ...]
    has_partial: bool

    def step(self, *where) -> Step:
        """The step at the grid's indices followed by references to the prefetched scalars."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """All blocks of all heads of all examples.

    Attributes:
      sizes: examples, scopes, query heads of a scope, query blocks, key blocks.
      masked: whether the mask must be applied.
    """

    sizes: tuple[int, int, int, int, int]
    masked: bool

    prefetch = ()

    @property
    def grid(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def most_steps(self) -> int:
        return math.prod(self.sizes)

    @property
    def has_partial(self) -> bool:
        return self.masked

    def step(self, example, scope, head, query_block, key_block, *_) -> Step:
        *_, heads, query_blocks, key_blocks = self.sizes
        opens_head = (query_block == 0) & (key_block == 0)
        closes_head = (query_block == query_blocks - 1) & (key_block == key_blocks - 1)
        return Step(
            example=example,
            head=scope * heads + head,
            query_block=query_block,
            key_block=key_block,
            opens_row=key_block == 0,
            closes_row=key_block == key_blocks - 1,
            opens_head=opens_head,
            opens_scope=opens_head & (head == 0),
            closes_scope=closes_head & (head == heads - 1),
            full=not self.masked,
            partial=self.masked,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Listed:
    """The visible blocks, from lists in scalar memory.

    Attributes:
      repeats: how often the lists are walked: for how many groups of examples, and of heads.
      heads: how many heads the lists name.
      place, notes: int32 [n], see above.
      count: how many entries count, at most n. Traced, or an int.
    """

    repeats: tuple[int, int]
    heads: int
    place: jax.Array
    notes: jax.Array
    count: jax.Array | int

    has_partial = True

    @property
    def grid(self) -> tuple[int | jax.Array, ...]:
        return (*self.repeats, self.count)

    @property
    def most_steps(self) -> int:
        return math.prod(self.repeats) * len(self.place)

    @property
    def prefetch(self) -> tuple[jax.Array, ...]:
        return self.place, self.notes

    def step(self, examples, heads, entry, places, notes, *_) -> Step:
        place, note = places[entry], notes[entry]
        return Step(
            example=examples + (note >> _EXAMPLE),
            head=heads * self.heads + ((note >> _HEAD) & (_MOST_HEADS - 1)),
            query_block=place >> _QUERY_BLOCK,
            key_block=place & (_MOST_KEY_BLOCKS - 1),
            opens_row=note & _OPENS_ROW != 0,
            closes_row=note & _CLOSES_ROW != 0,
            opens_head=note & _OPENS_HEAD != 0,
            opens_scope=note & _OPENS_SCOPE != 0,
            closes_scope=note & _CLOSES_SCOPE != 0,
            full=note & _FULL != 0,
            partial=note & (_FULL | _NOTHING) == 0,
        )


def listed(plan: Plan, batch: int, heads: int, group: int, most: int | None = None) -> Listed:
    """The walk over what `plan` shows.

    A row that sees nothing has one entry, so that its result is written.

    Args:
      plan: of [B|1, H|1] examples and heads.
      batch, heads: B and H there are.
      group: heads of a scope: 1 where order does not matter.
      most: entries there can be, if fewer than blocks (a block-sparse mask knows).
    """
    state = plan.state
    examples, plan_heads, query_blocks, key_blocks = state.shape
    if plan_heads == 1:
        state = jnp.broadcast_to(state, (examples, group, query_blocks, key_blocks))
    named = state.shape[1]
    visible = state != HIDDEN
    visited = visible.at[..., 0].set(visible[..., 0] | ~visible.any(axis=-1))
    example, head, query, key = jnp.indices(state.shape, dtype=jnp.int32, sparse=True)
    of_row = jnp.arange(key_blocks, dtype=jnp.int32)
    first = jnp.where(visited, of_row, key_blocks).min(axis=-1, keepdims=True)
    last = jnp.where(visited, of_row, -1).max(axis=-1, keepdims=True)
    opens_row, closes_row = key == first, key == last
    opens_head = opens_row & (query == 0)
    closes_head = closes_row & (query == query_blocks - 1)
    notes = (example << _EXAMPLE) | (head << _HEAD)
    for bit, holds in (
        (_FULL, state == FULL),
        (_NOTHING, ~visible),
        (_OPENS_ROW, opens_row),
        (_CLOSES_ROW, closes_row),
        (_OPENS_HEAD, opens_head),
        (_OPENS_SCOPE, opens_head & (head % group == 0)),
        (_CLOSES_SCOPE, closes_head & (head % group == group - 1)),
    ):
        notes = notes | jnp.where(holds, bit, 0)
    place = jnp.broadcast_to((query << _QUERY_BLOCK) | key, state.shape)
    order = jnp.where(visited, jnp.arange(state.size, dtype=jnp.int32).reshape(state.shape), state.size)
    _, place, notes = jax.lax.sort([x.reshape(-1) for x in (order, place, notes)], num_keys=1, is_stable=False)
    size = min(state.size, most or state.size)
    return Listed(
        repeats=(batch // examples, heads // named),
        heads=named,
        place=place[:size],
        notes=notes[:size],
        count=visited.sum(dtype=jnp.int32),
    )


def why_not_listed(examples: int, heads: int, query_blocks: int, key_blocks: int, entries: int) -> str | None:
    """Why lists cannot name so many examples, heads and blocks, or have no room in scalar memory; None if they can."""
    if entries > MOST_ENTRIES:
        return f"a list of {entries} blocks is longer than the {MOST_ENTRIES} that scalar memory holds"
    for name, number, most in (
        ("examples", examples, MOST_EXAMPLES),
        ("heads", heads, _MOST_HEADS),
        ("blocks of queries", query_blocks, _MOST_QUERY_BLOCKS),
        ("blocks of keys", key_blocks, _MOST_KEY_BLOCKS),
    ):
        if number > most:
            return f"a list cannot tell {number} {name} apart, only {most}"
    return None


def current_step(walk: Walk, prefetch: tuple) -> Step:
    """The step that a running kernel is at."""
    return walk.step(*(pl.program_id(axis) for axis in range(len(walk.grid))), *prefetch)
