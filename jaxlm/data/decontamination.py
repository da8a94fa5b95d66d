"""Leaves out of training data what shares a 13-gram with evaluation data, and says what it was.

Words are lower-cased and stripped of punctuation, as in Brown et al. 2020 (arXiv 2005.14165, appendix C), with N = 13.
A record that shares one N-gram is left out as a whole.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxlm.data.sources import Record, Source

log = logging.getLogger("jaxlm.data")

_WORD = re.compile(r"[^\W_]+")
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """A preprocessor that leaves out records which share an N-gram of words with evaluation rows.

    It logs, for each shard, how many it left out and for the sake of which evaluation data, with examples.

    Attributes:
      against: {name: source of rows}; all texts of a row count, also those in lists.
      split: of these sources.
      n: words.
    """

    against: Mapping[str, Source]
    split: str = "validation"
    n: int = 13

    def __post_init__(self):
        if self.n < 1 or not self.against:
            raise ValueError(f"Decontaminate needs n >= 1 and sources to compare with; got n = {self.n}.")

    def stream(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records that share no N-gram."""
        known, kept, overlaps = self._known, 0, collections.Counter()
        for record in records:
            grams = (gram for text in texts_of(record) for gram in ngrams(text, self.n))
            found = next((gram for gram in grams if _key(gram) in known), None)
            if found is None:
                kept += 1
                yield record
                continue
            name = known[_key(found)]
            overlaps[name] += 1
            if sum(overlaps.values()) <= _SHOWN:
                log.warning("Left out a record that shares %r with %s.", " ".join(found), name)
        if overlaps:
            account = ", ".join(f"{count} by {name}" for name, count in overlaps.most_common())
            total = overlaps.total()
            log.warning("Decontamination left out %d of %d records: %s.", total, kept + total, account)

    @functools.cached_property
    def _known(self) -> dict[bytes, str]:
        """{N-gram's key: whose it is}."""
        known: dict[bytes, str] = {}
        for name, source in self.against.items():
            for shard in source.shards(self.split):
                for row in source.read(shard):
                    for text in texts_of(row):
                        for gram in ngrams(text, self.n):
                            known.setdefault(_key(gram), name)
        return known


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """The N-grams of a text's words; none where there are fewer words."""
    words = _WORD.findall(text.lower())
    for i in range(len(words) - n + 1):
        yield tuple(words[i : i + n])


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


def _key(gram: tuple[str, ...]) -> bytes:
    """Eight bytes that stand for an N-gram: of a million, two agree with probability 3e-8."""
    return hashlib.blake2b(" ".join(gram).encode(), digest_size=8).digest()
