"""Rules of thumb by which a page of the web is text worth reading: those of Gopher (Rae et al. 2021, arXiv 2112.11446).

Appendix A.1.1 and its table A1 have the thresholds. Tokens are what stands between white space; words, of which N-grams
are made, are without case and punctuation.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import string
from collections.abc import Sequence

import numpy as np

from jaxlm.data.ngrams import Words

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "‣", "◦", "●", "-", "*")
_ELLIPSES = ("...", "…")


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a text must be like. Attributes but the first are thresholds, each in the rule of its name.

    Attributes:
      rules: those of `RULES` that are asked, in this order; None asks all.
      length: least and most tokens.
      token_length: least and most characters of a token on average.
      symbols: most number signs, and most ellipses, per token.
      bullets: largest share of lines that begin with a bullet.
      ellipses: largest share of lines that end with an ellipsis.
      letters: least share of tokens with a letter in them.
      stop_words: least number of `STOP_WORDS` that are there; English.
      repeated_lines: largest share of lines, and of characters in lines, that stood there before.
      repeated_paragraphs: the same of paragraphs, between which lines are empty.
      frequent_ngrams: (N, largest share of the words' characters in the N-gram that is there most often), if it is
        there more than once.
      repeated_ngrams: (N, largest share of the words' characters in N-grams that were there before).
    """

    rules: tuple[str, ...] | None = None
    length: tuple[int, int] = (50, 100_000)
    token_length: tuple[float, float] = (3.0, 10.0)
    symbols: float = 0.1
    bullets: float = 0.9
    ellipses: float = 0.3
    letters: float = 0.8
    stop_words: int = 2
    repeated_lines: tuple[float, float] = (0.3, 0.2)
    repeated_paragraphs: tuple[float, float] = (0.3, 0.2)
    frequent_ngrams: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    repeated_ngrams: tuple[tuple[int, float], ...] = (
        *((5, 0.15), (6, 0.14), (7, 0.13)),
        *((8, 0.12), (9, 0.11), (10, 0.1)),
    )

    def __post_init__(self):
        if unknown := [rule for rule in self.rules or () if rule not in RULES]:
            raise ValueError(f"Quality.rules has {unknown[0]!r}; there are {', '.join(RULES)}.")

    def broken(self, text: str) -> str | None:
        """The first of the rules that a text breaks; None where it breaks none."""
        page = _Page(text)
        return next((rule for rule in self.asked if not RULES[rule](self, page)), None)

    @property
    def asked(self) -> tuple[str, ...]:
        """The rules that are asked, in their order."""
        return tuple(RULES) if self.rules is None else self.rules


class _Page:
    """A text's parts, each made when it is first asked for."""

    def __init__(self, text: str):
        self._text = text

    @functools.cached_property
    def tokens(self) -> list[str]:
        return self._text.split()

    @functools.cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self._text.splitlines() if line.strip()]

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in re.split(r"\n\s*\n", self._text) if part.strip()]

    @functools.cached_property
    def words(self) -> Words:
        return Words.of(self._text)

    def count(self, *symbols: str) -> int:
        return sum(map(self._text.count, symbols))

    def share_in(self, n: int, starts: np.ndarray) -> float:
        """Share of the words' characters in the N-grams that start at these words, each character counted once."""
        depth = np.zeros(len(self.words) + 1, np.int64)
        depth[starts] += 1
        depth[starts + n] -= 1
        lengths = self.words.spans @ (-1, 1)
        return float(lengths[np.cumsum(depth)[:-1] > 0].sum() / max(lengths.sum(), 1))


def _length(rule: Quality, page: _Page) -> bool:
    least, most = rule.length
    return least <= len(page.tokens) <= most


def _token_length(rule: Quality, page: _Page) -> bool:
    least, most = rule.token_length
    return least <= sum(map(len, page.tokens)) / max(len(page.tokens), 1) <= most


def _symbols(rule: Quality, page: _Page) -> bool:
    return max(page.count("#"), page.count(*_ELLIPSES)) <= rule.symbols * len(page.tokens)


def _bullets(rule: Quality, page: _Page) -> bool:
    return sum(line.startswith(_BULLETS) for line in page.lines) <= rule.bullets * len(page.lines)


def _ellipses(rule: Quality, page: _Page) -> bool:
    return sum(line.endswith(_ELLIPSES) for line in page.lines) <= rule.ellipses * len(page.lines)


def _letters(rule: Quality, page: _Page) -> bool:
    return sum(any(map(str.isalpha, token)) for token in page.tokens) >= rule.letters * len(page.tokens)


def _stop_words(rule: Quality, page: _Page) -> bool:
    return len(STOP_WORDS.intersection(t.strip(string.punctuation).lower() for t in page.tokens)) >= rule.stop_words


def _few_repeated(limits: tuple[float, float], parts: Sequence[str]) -> bool:
    known: set[str] = set()
    repeated = [part for part in parts if part in known or known.add(part)]
    share, of_characters = limits
    few = len(repeated) <= share * len(parts)
    return few and sum(map(len, repeated)) <= of_characters * sum(map(len, parts))


def _repeated_lines(rule: Quality, page: _Page) -> bool:
    return _few_repeated(rule.repeated_lines, page.lines)


def _repeated_paragraphs(rule: Quality, page: _Page) -> bool:
    return _few_repeated(rule.repeated_paragraphs, page.paragraphs)


def _frequent_ngrams(rule: Quality, page: _Page) -> bool:
    for n, share in rule.frequent_ngrams:
        keys = page.words.grams(n)
        _, firsts, counts = np.unique(keys, return_index=True, return_counts=True)
        if not len(counts) or counts.max() == 1:
            continue
        often = keys[firsts[counts == counts.max()].min()]  # of several, the first in the text
        if page.share_in(n, np.flatnonzero(keys == often)) > share:
            return False
    return True


def _repeated_ngrams(rule: Quality, page: _Page) -> bool:
    for n, share in rule.repeated_ngrams:
        keys = page.words.grams(n)
        again = np.ones(len(keys), bool)
        again[np.unique(keys, return_index=True)[1]] = False
        if page.share_in(n, np.flatnonzero(again)) > share:
            return False
    return True


RULES = {
    "length": _length,
    "token_length": _token_length,
    "symbols": _symbols,
    "bullets": _bullets,
    "ellipses": _ellipses,
    "letters": _letters,
    "stop_words": _stop_words,
    "repeated_lines": _repeated_lines,
    "repeated_paragraphs": _repeated_paragraphs,
    "frequent_ngrams": _frequent_ngrams,
    "repeated_ngrams": _repeated_ngrams,
}
"""The rules by name, whether a text keeps them."""
