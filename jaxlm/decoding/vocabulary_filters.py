"""Filters of the vocabulary: which pieces may be drawn at all, by what they spell.

As in Constrained Text Generation Studio (Roush et al. 2022, arXiv 2306.15926): a token may be drawn if every filter
says yes to its text. The mask is computed once, when the processor is built, so that a step costs the same whatever the
filters.

A filter sees the text of one piece, with the space before it. Those that speak of characters hold for whatever text is
written; those that speak of a piece's length or form hold piece by piece. A piece that is only part of a UTF-8
character has no text, and no filter allows it; special tokens neither.
"""

import abc
import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import override

import jax
import numpy as np

from jaxlm.decoding.processor_config import Function, ProcessorConfig
from jaxlm.decoding.processors import Texts, keep_allowed


class PieceFilter(abc.ABC):
    """Says of a piece's text whether it may be written. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def allows(self, text: str) -> bool:
        """Whether a piece with this text may be drawn."""


@dataclasses.dataclass(frozen=True)
class WithoutCharacters(PieceFilter):
    """None of these characters is written (a lipogram)."""

    characters: str

    @override
    def allows(self, text):
        return not set(text) & set(self.characters)


@dataclasses.dataclass(frozen=True)
class OnlyCharacters(PieceFilter):
    """Nothing but these characters is written."""

    characters: str

    @override
    def allows(self, text):
        return set(text) <= set(self.characters)


@dataclasses.dataclass(frozen=True)
class WithCharacters(PieceFilter):
    """Every piece has all of these characters."""

    characters: str

    @override
    def allows(self, text):
        return set(self.characters) <= set(text)


@dataclasses.dataclass(frozen=True)
class Matching(PieceFilter):
    """Every piece as a whole matches a regular expression (Python's `re`)."""

    pattern: str

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"Matching.pattern {self.pattern!r} is no regular expression: {error}.") from error

    @override
    def allows(self, text):
        return re.fullmatch(self.pattern, text) is not None


@dataclasses.dataclass(frozen=True)
class OfLength(PieceFilter):
    """Every piece has so many characters, the space before it not counted."""

    minimum: int = 0
    maximum: int | None = None

    @override
    def allows(self, text):
        length = len(text.strip())
        return self.minimum <= length and (self.maximum is None or length <= self.maximum)


@dataclasses.dataclass(frozen=True)
class StartingWith(PieceFilter):
    """Every piece begins with this text, after the space before it (an alliteration)."""

    text: str

    @override
    def allows(self, text):
        return text.strip().startswith(self.text)


@dataclasses.dataclass(frozen=True)
class EndingWith(PieceFilter):
    """Every piece ends with this text (a rhyme for the eye)."""

    text: str

    @override
    def allows(self, text):
        return text.strip().endswith(self.text)


@dataclasses.dataclass(frozen=True)
class PartOfAnagram(PieceFilter):
    """Every piece can be laid with the letters of a text, each used at most as often as it is there."""

    letters: str

    @override
    def allows(self, text):
        return Counter(text.strip()) <= Counter(self.letters)


class Transform(abc.ABC):
    """Changes a piece's text before filters see it. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def __call__(self, text: str) -> str:
        """The text that filters see."""


@dataclasses.dataclass(frozen=True)
class Lowercase(Transform):
    """Filters see no capitals."""

    @override
    def __call__(self, text):
        return text.lower()


@dataclasses.dataclass(frozen=True)
class WithoutAccents(Transform):
    """Filters see letters without their accents: é is e."""

    @override
    def __call__(self, text):
        return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


@dataclasses.dataclass(frozen=True)
class VocabularyFilter(ProcessorConfig):
    """Only pieces that pass every filter are drawn; ends of text stay allowed.

    Attributes:
      filters: a piece must pass all of them.
      transforms: what is done to a piece's text first, in order.
    """

    filters: tuple[PieceFilter, ...]
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self):
        if not self.filters:
            raise ValueError("VocabularyFilter.filters is empty; name at least one filter.")

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        allowed = np.zeros(vocab_size, bool)
        allowed[: vocabulary.size] = self.allowed(vocabulary.token_bytes())
        allowed[list(end_ids)] = True
        bits = np.packbits(np.pad(allowed, (0, -vocab_size % 32)), bitorder="little").view(np.uint32)
        return Function(keep_pieces, (bits,))

    def allowed(self, token_bytes: Sequence[bytes | None]) -> np.ndarray:
        """bool [V]: which pieces pass.

        Raises:
          ValueError: none does.
        """
        found = np.array([data is not None and self._passes(data) for data in token_bytes], bool)
        if not found.any():
            raise ValueError(
                f"No piece of the vocabulary passes {' and '.join(map(repr, self.filters))}; loosen one of them."
            )
        return found

    def _passes(self, data: bytes) -> bool:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return False
        for transform in self.transforms:
            text = transform(text)
        return all(one.allows(text) for one in self.filters)


def keep_pieces(allowed: jax.Array, logits: jax.Array, texts: Texts) -> jax.Array:
    """Logits [B, V] with NEVER where a token's bit in `allowed`, uint32 [B, ceil(V / 32)], is 0."""
    return keep_allowed(logits, allowed)
