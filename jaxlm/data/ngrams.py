"""The words of a text, and their N-grams as keys of 64 bits: what decontamination, deduplication and filters go by."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re

import numpy as np

_WORD = re.compile(r"[^\W_]+")
# An odd factor of a polynomial hash; what follows it is carried out modulo 2^64.
FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """The words of a text, in lower case and without punctuation.

    Attributes:
      keys: uint64 [W]; different words agree with probability 2^-64.
      spans: int64 [W, 2], the characters [start, end) of each.
    """

    keys: np.ndarray
    spans: np.ndarray

    @classmethod
    def of(cls, text: str) -> Words:
        """The words of a text."""
        matches = list(_WORD.finditer(text))
        spans = np.array([match.span() for match in matches], np.int64).reshape(-1, 2)
        return cls(np.array([_word_key(match.group().lower()) for match in matches], np.uint64), spans)

    def __len__(self) -> int:
        return len(self.keys)

    def grams(self, n: int) -> np.ndarray:
        """Keys of their N-grams, uint64 [W - n + 1], as good as those of words; none where there are fewer words."""
        count = max(len(self.keys) - n + 1, 0)
        keys = np.zeros(count, np.uint64)
        for i in range(n if count else 0):
            keys = keys * FACTOR + self.keys[i : count + i]
        return keys


@functools.lru_cache(maxsize=1 << 20)
def _word_key(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
