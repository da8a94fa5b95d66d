"""Finds texts that stand in a corpus twice: exactly, or nearly, by MinHash and locality-sensitive hashing.

Two texts are as alike as the sets of their N-grams of words: |A and B| / |A or B|, their Jaccard similarity. If all
N-grams are put in a random order, it is the probability that both sets have the same first one (Broder 1997, "On the
resemblance and containment of documents"); a signature has the first under many orders. Texts are compared whose
signatures agree in a whole band, and are duplicates where enough of the rest agrees too. Of what hangs together so the
first text stays (Lee et al. 2021, arXiv 2107.06499, 4.2). `python -m tools.deduplicate` does this to files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterator

import numpy as np

from jaxlm.data.ngrams import FACTOR, Words

_BLOCK = 4096  # N-grams, or signatures, that are worked on at a time
_MIXERS = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_SHIFT = np.uint64(33)


def exact_key(text: str) -> bytes:
    """16 bytes that texts share which differ at most in case, white space and Unicode's ways to write a character."""
    normal = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Which texts share most of their N-grams.

    A pair of similarity s is compared with probability 1 - (1 - s^rows)^bands, and counts as duplicates where at least
    `similarity` of the K = bands * rows numbers agree, a share with standard deviation sqrt(s (1 - s) / K). So the
    defaults find 98% of the pairs of similarity 0.8, half of those of 0.75 and 4% of those of 0.7. N-grams have 5 words
    in Lee et al. 2021 and in FineWeb (arXiv 2406.17557), which looks for 0.75 too.

    Attributes:
      n: words of an N-gram; texts with fewer words are near no other.
      bands: parts of a signature, of which one must agree.
      rows: numbers in a band.
      similarity: share of the signature that must agree.
    """

    n: int = 5
    bands: int = 32
    rows: int = 8
    similarity: float = 0.75

    def __post_init__(self):
        if min(self.n, self.bands, self.rows) < 1 or not 0.0 < self.similarity <= 1.0:
            raise ValueError(
                f"NearDuplicates needs n, bands and rows of 1 or more, and a similarity above 0 and up to 1; got "
                f"{self.n}, {self.bands}, {self.rows} and {self.similarity}."
            )

    @property
    def size(self) -> int:
        """Numbers in a signature (K)."""
        return self.bands * self.rows

    def signature(self, words: Words) -> np.ndarray | None:
        """The least of the N-grams' hashes under each of K functions, uint32 [K]; None where there are no N-grams."""
        keys = np.unique(words.grams(self.n))
        if not len(keys):
            return None
        functions = _mixed(np.arange(1, self.size + 1, dtype=np.uint64) * FACTOR)[:, None]
        least = np.full(self.size, 2**32 - 1, np.uint64)
        for start in range(0, len(keys), _BLOCK):
            hashes = _mixed(keys[start : start + _BLOCK] ^ functions) >> np.uint64(32)
            least = np.minimum(least, hashes.min(axis=1))
        return least.astype(np.uint32)

    def firsts(self, signatures: np.ndarray) -> np.ndarray:
        """For each text the first of those that it hangs together with, itself where that is none.

        Those that are first are no duplicates of one another: among them nothing more is found.

        Args:
          signatures: uint32 [N, K], in memory or on disk.

        Returns:
          int64 [N].
        """
        parents = np.arange(len(signatures))
        for band in range(self.bands):
            for members in _same(self._band_keys(signatures, band)):
                self._join(signatures, members, parents)
        return np.array([_root(parents, i) for i in range(len(parents))], np.int64)

    def _band_keys(self, signatures: np.ndarray, band: int) -> np.ndarray:
        """One number for each text's band, uint64 [N]."""
        keys = np.zeros(len(signatures), np.uint64)
        for start in range(0, len(signatures), _BLOCK):
            part = signatures[start : start + _BLOCK, band * self.rows : (band + 1) * self.rows]
            for column in part.T:
                keys[start : start + _BLOCK] = keys[start : start + _BLOCK] * FACTOR + _mixed(column.astype(np.uint64))
        return keys

    def _join(self, signatures: np.ndarray, members: np.ndarray, parents: np.ndarray) -> None:
        """Joins the texts of a band that are alike, each to the first that it is like.

        One that is like none before it was compared with each that is itself like none before.
        """
        while len(members) > 1:
            first, members = members[0], members[1:]
            alike = self._alike(signatures, first, members)
            for i in members[alike]:
                low, high = sorted((_root(parents, first), _root(parents, i)))
                parents[high] = low
            members = members[~alike]

    def _alike(self, signatures: np.ndarray, one: int, others: np.ndarray) -> np.ndarray:
        blocks = (others[start : start + _BLOCK] for start in range(0, len(others), _BLOCK))
        return (
            np.concatenate([(signatures[block] == signatures[one]).mean(axis=1) for block in blocks]) >= self.similarity
        )


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Keys whose every bit depends on all of the given ones', uint64 (the end of MurmurHash3)."""
    keys = keys ^ (keys >> _SHIFT)
    for mixer in _MIXERS:
        keys *= mixer
        keys ^= keys >> _SHIFT
    return keys


def _same(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Places of each key that stands several times, increasing."""
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(keys)]])
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        yield order[start:end]


def _root(parents: np.ndarray, i: int) -> int:
    """Who stands first of those that `i` hangs together with."""
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return int(i)
