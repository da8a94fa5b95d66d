"""Leaves out of training data what shares an N-gram of words with evaluation data, and says what it was.

Words are lower-cased and stripped of punctuation, as in Brown et al. 2020 (arXiv 2005.14165, appendix C), with N = 13.
A record that shares one is left out as a whole, or, with `Windows`, loses the text around it: a book is not lost for a
sentence. `python -m tools.decontaminate` does the same to files.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.ngrams import Words
from jaxlm.data.sources import Record, Source

log = logging.getLogger("jaxlm.data")

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Windows:
    """Takes the text around each shared N-gram out and goes on with the pieces between (Brown et al. 2020, appendix C).

    Attributes:
      field: of a record that holds the text; others are kept with each piece.
      around: characters that go on either side of a shared N-gram.
      shortest: characters; a shorter piece goes too.
      most_pieces: a record that would fall into more goes as a whole.
    """

    field: str = "text"
    around: int = 200
    shortest: int = 200
    most_pieces: int = 10

    def __post_init__(self):
        if self.around < 0 or self.shortest < 0 or self.most_pieces < 1:
            raise ValueError(
                f"Windows needs around and shortest >= 0 and most_pieces >= 1; got {self.around}, {self.shortest} and "
                f"{self.most_pieces}."
            )

    def pieces(self, text: str, hits: Iterable[tuple[int, int]]) -> list[str]:
        """What is left of a text whose characters [start, end) are hits, in order of their starts."""
        pieces, at = [], 0
        for start, end in hits:
            pieces.append(text[at : max(start - self.around, at)])
            at = max(at, end + self.around)
        pieces = [piece for piece in (*pieces, text[at:]) if piece.strip() and len(piece) >= self.shortest]
        return pieces if len(pieces) <= self.most_pieces else []


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What a record shares with evaluation data.

    Attributes:
      record: its number.
      shared: {evaluation data: number of N-grams}.
      ngrams: these, each once, in their order.
      characters: of the record's texts.
      kept: characters that remain.
      pieces: into which they fall.
    """

    record: int
    shared: dict[str, int]
    ngrams: tuple[str, ...]
    characters: int
    kept: int
    pieces: int


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """A preprocessor that leaves out what shares an N-gram of words with evaluation rows.

    It logs, for each shard, how many records were hit, for the sake of which evaluation data, with examples.

    Attributes:
      against: {name: source of rows}; all texts of a row count, also those in lists.
      split: of these sources.
      n: words.
      windows: what goes of a record that is hit; None: all of it.
    """

    against: Mapping[str, Source]
    split: str = "validation"
    n: int = 13
    windows: Windows | None = None

    def __post_init__(self):
        if self.n < 1 or not self.against:
            raise ValueError(f"Decontaminate needs n >= 1 and sources to compare with; got n = {self.n}.")

    def fingerprint(self) -> str:
        """A digest that changes with the evaluation data, for the caches of what this lets through."""
        digests = {name: [s.digest for s in source.shards(self.split)] for name, source in self.against.items()}
        return fingerprint(digests, self.split, self.n, self.windows)

    def stream(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records, or pieces of records, that share no N-gram."""
        found: list[Overlap] = []
        count = 0
        for _, kept, overlap in self.examine(records):
            count += 1
            yield from kept
            if overlap is not None:
                found.append(overlap)
                if len(found) <= _SHOWN:
                    names = ", ".join(overlap.shared)
                    log.warning("Record %d shares %r with %s.", overlap.record, overlap.ngrams[0], names)
        if found:
            log.warning("Decontamination: %s", summary(found, count))

    def examine(self, records: Iterable[Record]) -> Iterator[tuple[Record, list[Record], Overlap | None]]:
        """Each record, what remains of it, and what it shares.

        Raises:
          ValueError: a record lacks the field of `windows`.
        """
        for number, record in enumerate(records):
            texts = list(texts_of(record))
            owners, shared = collections.Counter(), {}
            for text in texts:
                grams = Grams.of(text, self.n)
                for i in self._shared(grams.keys):
                    shared[int(grams.keys[i])] = grams.words(i)
                    owners.update(self._owners(grams.keys[i]))
            if not shared:
                yield record, [record], None
                continue
            kept = self._remains(record)
            field = self.windows.field if self.windows else None
            left = sum(len(piece[field]) for piece in kept)
            yield (
                record,
                kept,
                Overlap(number, dict(owners), tuple(shared.values()), sum(map(len, texts)), left, len(kept)),
            )

    def _remains(self, record: Record) -> list[Record]:
        if self.windows is None:
            return []
        text = record.get(self.windows.field)
        if not isinstance(text, str):
            raise ValueError(
                f"Windows.field is {self.windows.field!r}, but a record has the texts "
                f"{sorted(name for name, value in record.items() if isinstance(value, str))}; name one, or leave "
                f"Decontaminate.windows out to drop whole records."
            )
        grams = Grams.of(text, self.n)
        hits = [grams.place(i) for i in self._shared(grams.keys)]
        # Where only another field is hit, there is nothing to cut around.
        return [record | {self.windows.field: piece} for piece in self.windows.pieces(text, hits)] if hits else []

    def _shared(self, keys: np.ndarray) -> list[int]:
        """Which of these are evaluation data's."""
        known = self._known.keys
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.flatnonzero(known[at] == keys).tolist() if len(known) else []

    def _owners(self, key: np.uint64) -> tuple[str, ...]:
        return self._known.owners[self._known.owner[np.searchsorted(self._known.keys, key)]]

    def rows_of(self, overlaps: Iterable[Overlap]) -> dict[str, int]:
        """{evaluation data: number of its rows that share something with these records}."""
        ngrams = {ngram for overlap in overlaps for ngram in overlap.ngrams}
        keys = np.array([Grams.of(ngram, self.n).keys[0] for ngram in ngrams], np.uint64)
        rows = collections.Counter()
        for name, row_keys in self._rows():
            rows[name] += bool(np.isin(row_keys, keys).any())
        return {name: count for name, count in rows.items() if count}

    def _rows(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, source in self.against.items():
            for shard in source.shards(self.split):
                for row in source.read(shard):
                    keys = [Grams.of(text, self.n).keys for text in texts_of(row)]
                    yield name, np.concatenate(keys) if keys else np.zeros(0, np.uint64)

    @functools.cached_property
    def _known(self) -> _Known:
        by_name: dict[str, list[np.ndarray]] = {name: [] for name in self.against}
        for name, keys in self._rows():
            by_name[name].append(keys)
        nothing = np.zeros(0, np.uint64)
        by_name = {name: np.unique(np.concatenate([*keys, nothing])) for name, keys in by_name.items()}
        keys = np.unique(np.concatenate(list(by_name.values())))
        # Several data sets may have the same N-gram: each set of owners is stored once.
        sets: dict[tuple[str, ...], int] = {}
        has = np.stack([np.isin(keys, own, assume_unique=True) for own in by_name.values()], axis=1)
        patterns, owner = np.unique(has, axis=0, return_inverse=True)
        for pattern in patterns:
            sets[tuple(name for name, owns in zip(by_name, pattern) if owns)] = len(sets)
        return _Known(keys, owner.reshape(-1), list(sets))


@dataclasses.dataclass(frozen=True, eq=False)
class _Known:
    """Evaluation data's N-grams: sorted keys [K], and which of `owners` has each [K]."""

    keys: np.ndarray
    owner: np.ndarray
    owners: list[tuple[str, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Grams:
    """The N-grams of a text's words; none where there are fewer words.

    Attributes:
      keys: uint64 [G], one for each N-gram; different ones agree with probability 2^-64.
    """

    keys: np.ndarray
    _text: str
    _spans: np.ndarray
    _n: int

    @classmethod
    def of(cls, text: str, n: int) -> Grams:
        """The N-grams of a text."""
        words = Words.of(text)
        return cls(words.grams(n), text, words.spans, n)

    def words(self, i: int) -> str:
        """The i-th N-gram."""
        return " ".join(self._text[a:b].lower() for a, b in self._spans[i : i + self._n].tolist())

    def place(self, i: int) -> tuple[int, int]:
        """Its characters, [start, end)."""
        return int(self._spans[i, 0]), int(self._spans[i + self._n - 1, 1])


def summary(overlaps: list[Overlap], records: int) -> str:
    """One sentence on what was hit."""
    names = collections.Counter(name for overlap in overlaps for name in overlap.shared)
    whole = sum(not overlap.pieces for overlap in overlaps)
    gone, size = sum(o.characters - o.kept for o in overlaps), sum(o.characters for o in overlaps)
    account = ", ".join(f"{count} by {name}" for name, count in names.most_common())
    return (
        f"{len(overlaps)} of {records} records share an N-gram with evaluation data ({account}); {whole} left out "
        f"whole, {len(overlaps) - whole} cut, {gone:,} of their {size:,} characters gone."
    )


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a record, also in lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from texts_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_of(part)
