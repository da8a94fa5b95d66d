"""Which tokens of a cached data set make its row i: windows of text, planned packs, or one example a row.

A row set is random access: `row(i)` gives the raw examples of row i, before corruption, as (index of the
example, fields).
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import override

import numpy as np

from jaxlm.data import packing
from jaxlm.data.cache import TokenCache, progress_bar
from jaxlm.data.randomness import key_of, permute

log = logging.getLogger("jaxlm.data")

Raw = dict[str, np.ndarray]


class Examples:
    """The examples of a cached data set: pairs, or documents cut into pieces of at most `length` tokens.

    A document of n tokens makes ceil(n / length) pieces of nearly equal length, so that none is a crumb.

    Args:
      cache: the data set.
      length: raw tokens of text that fill a row.
      limits: of the fields of pairs, {"inputs": N, "targets": M}; longer ones are cut at the end, as seqio does.
    """

    def __init__(self, cache: TokenCache, length: int, limits: Mapping[str, int]):
        self._cache, self._length, self._limits = cache, length, limits
        self._pairs = "inputs" in cache.features
        self._pieces = None
        if not self._pairs:
            self._pieces = cache.stored(f"pieces-{length}", self._count_pieces)

    def _count_pieces(self) -> np.ndarray:
        pieces = -(-self._cache.lengths("targets") // self._length)
        return np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64)

    def __len__(self) -> int:
        return self._cache.num_examples if self._pairs else int(self._pieces[-1])

    def __getitem__(self, index: int) -> Raw:
        if self._pairs:
            return {name: self._slice(name, index, self._limits[name]) for name in self._cache.features}
        document = int(self._pieces.searchsorted(index, "right")) - 1
        first, last = self._pieces[document : document + 2]
        start, stop = self._cache.offsets("targets")[document : document + 2]
        cuts = [start + (stop - start) * i // (last - first) for i in (index - first, index - first + 1)]
        return {"targets": self._cache.ids("targets")[cuts[0] : cuts[1]].astype(np.int32)}

    def _slice(self, name: str, index: int, limit: int) -> np.ndarray:
        start, stop = self._cache.offsets(name)[index : index + 2]
        return self._cache.ids(name)[start : min(stop, start + limit)].astype(np.int32)


class RowSet(abc.ABC):
    """Rows of one data set, by index."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def row(self, index: int) -> list[tuple[int, Raw]]:
        """Raw examples of a row, each with its index in the data set (which keys its randomness)."""


class Windows(RowSet):
    """Concat-and-split: documents one after the other, cut into windows of `length` tokens whatever their ends.

    The last window is what is left; a single token, from which nothing can be predicted, is left out.

    Args:
      cache: a data set of text.
      length: raw tokens a row.
      document_mask: number the documents of a window ("segments"), so that they do not see each other.
    """

    def __init__(self, cache: TokenCache, length: int, document_mask: bool):
        self._cache, self._length, self._document_mask = cache, length, document_mask
        self._ids, self._offsets = cache.ids("targets"), cache.offsets("targets")
        self._count, rest = divmod(len(self._ids), length)
        self._count += rest > 1 or not self._count

    def __len__(self) -> int:
        return self._count

    @override
    def row(self, index: int) -> list[tuple[int, Raw]]:
        start = index * self._length
        raw = {"targets": self._ids[start : start + self._length].astype(np.int32)}
        if self._document_mask:
            first, last = self._offsets.searchsorted([start + 1, start + len(raw["targets"])])
            segments = np.zeros(len(raw["targets"]), np.int32)
            segments[self._offsets[first:last] - start] = 1
            raw["segments"] = np.cumsum(segments, dtype=np.int32) + 1
        return [(index, raw)]


class Singles(RowSet):
    """One example a row."""

    def __init__(self, examples: Examples):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @override
    def row(self, index: int) -> list[tuple[int, Raw]]:
        return [(index, self._examples[index])]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan(RowSet):
    """Packed rows, decided beforehand. Made by `plan_rows`.

    Attributes:
      examples: what is packed.
      members, offsets: row r holds the examples members[offsets[r] : offsets[r + 1]].
      density: share of the rows' columns that hold a token.
    """

    examples: Examples
    members: np.ndarray
    offsets: np.ndarray
    density: float

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @override
    def row(self, index: int) -> list[tuple[int, Raw]]:
        members = self.members[self.offsets[index] : self.offsets[index + 1]].tolist()
        return [(i, self.examples[i]) for i in members]


def plan_rows(
    cache: TokenCache,
    key: str,
    examples: Examples,
    size: Callable[[int, int, int], tuple[int, ...]],
    capacity: tuple[int, ...],
    look_ahead: int,
    *,
    shuffle: bool,
    lasting: bool,
) -> Plan:
    """The pack plan of a data set: made once (an example's corruption each), kept in its cache.

    Args:
      cache: the data set.
      key: digest of what decides sizes: objective, architecture, lengths.
      examples: its examples.
      size: (index, epoch, step) -> columns of that example after corruption.
      capacity: columns of a row.
      look_ahead: examples in a window of packing.
      shuffle: cut the windows from a shuffled order, so that neighbours in a file do not share every row.
      lasting: the plan is for every epoch and step, not for one pass alone.

    Raises:
      ValueError: the plan is to last, but sizes differ from epoch to epoch or with the step.
    """

    def make() -> np.ndarray:
        order = np.arange(len(examples))
        if shuffle:
            order = permute(order, len(order), key_of("plan"))
        visits = ((0, 0), (1, 0), (2, 1 << 30), (3, 1 << 30))  # epochs and steps, the first and the very last
        for i in range(min(64, len(examples)) if lasting else 0):
            if len({size(i, *visit) for visit in visits}) > 1:
                raise ValueError(
                    f"Packing.PLAN needs examples whose length is the same in every epoch, but the objective makes "
                    f"them of random lengths (task {cache.task!r}); use Packing.FIRST_FIT."
                )
        sizes = np.empty((len(examples), len(capacity)), np.int64)
        with progress_bar(f"planning rows of {cache.task}", len(examples)) as advance:
            for i in range(len(examples)):
                sizes[i] = size(i, 0, 0)
                if i % 1024 == 1023:
                    advance(1024)
        members, offsets = packing.pack_windows(sizes[order], capacity, look_ahead)
        density = packing.density(sizes, len(offsets) - 1, capacity)
        log.info(
            "Planned %d rows of %s: density %.3f, look-ahead %d.", len(offsets) - 1, cache.task, density, look_ahead
        )
        # One array, so that one rename makes the whole appear: columns filled, rows, offsets, members.
        return np.concatenate([[sizes.sum(), len(offsets) - 1], offsets, order[members]]).astype(np.int64)

    stored = cache.stored(f"plan-{key[:16]}-{look_ahead}-{'shuffled' if shuffle else 'ordered'}", make)
    tokens, rows = int(stored[0]), int(stored[1])
    offsets, members = stored[2 : rows + 3], stored[rows + 3 :]
    return Plan(examples, members, offsets, tokens / max(rows * sum(capacity), 1))
