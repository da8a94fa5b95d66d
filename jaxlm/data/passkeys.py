"""Rows that hide a passkey in filler, at a given depth of a given length: does a model find what it read long ago?

After Mohtashami and Jaggi 2023 (arXiv 2305.16300, 4.2), whose sentences these are; a grid of lengths and depths is that
of the needle in a haystack (Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack). A row has the fields
`context`, which ends with the question, `answer`, `length` and `depth`.
"""

from __future__ import annotations

import bisect
import dataclasses
import random
from collections.abc import Iterator
from typing import override

from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.sources import Record, Shard, Source
from jaxlm.data.vocabularies import Vocabulary

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
HIDDEN = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclasses.dataclass(frozen=True)
class Passkeys(Source):
    """Generated rows, the same for the same settings; keys of the splits "train" and "validation" are drawn apart.

    Attributes:
      lengths: of context and answer together: as much filler as there is room for in so many words, or tokens.
      depths: where the key is, from 0, before all filler, to 1, after it.
      count: rows of each length and depth; the first of each come before the second.
      seed: of the keys.
      digits: of a key.
      filler: sentences, in turn.
      vocabulary: by which lengths are tokens, without special ones; None counts words.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    count: int = 20
    seed: int = 0
    digits: int = 5
    filler: tuple[str, ...] = FILLER
    vocabulary: Vocabulary | None = None

    def __post_init__(self):
        if not self.lengths or not self.depths or min(self.count, self.digits, len(self.filler)) < 1:
            raise ValueError("Passkeys needs lengths, depths and filler, and count and digits of at least 1.")
        if not all(0.0 <= depth <= 1.0 for depth in self.depths):
            raise ValueError(f"Passkeys.depths are shares of the filler, from 0 to 1; got {self.depths}.")
        if any(set(sentence) & set("0123456789") for sentence in self.filler):
            raise ValueError("Passkeys.filler must have no digits, which could be taken for the key.")

    @override
    def shards(self, split: str) -> tuple[Shard, ...]:
        if split not in ("train", "validation"):
            raise ValueError(f"Passkeys has no split {split!r}; it has train, validation.")
        rows = self.count * len(self.lengths) * len(self.depths)
        return (Shard(f"passkeys ({split})", rows, fingerprint(self, split), split, ()),)

    @override
    def read(self, shard: Shard) -> Iterator[Record]:
        sentences = dict.fromkeys(self.lengths)  # of filler, in the row before
        for number in range(self.count):
            for length in self.lengths:
                for depth in self.depths:
                    chance = random.Random(f"{self.seed}/{shard.split}/{number}/{length}/{depth}")
                    key = str(chance.randrange(10 ** (self.digits - 1), 10**self.digits))
                    count = sentences[length] = self._most(length, depth, key, sentences[length])
                    context = self._context(count, depth, key)
                    yield {"context": context, "answer": key, "length": length, "depth": depth}

    def _most(self, length: int, depth: float, key: str, near: int | None) -> int:
        """Sentences of filler that there is room for.

        Raises:
          ValueError: not even without filler is the row short enough.
        """

        def size(count: int) -> int:
            text = f"{self._context(count, depth, key)} {key}"
            return len(text.split()) if self.vocabulary is None else len(self.vocabulary.encode(text))

        if near is None:  # a sentence has a word or token at least
            near = bisect.bisect_right(range(length + 1), length, key=size) - 1
        while near >= 0 and size(near) > length:
            near -= 1
        if near < 0:
            unit = "words" if self.vocabulary is None else "tokens"
            raise ValueError(
                f"Passkeys.lengths has {length}, but a row without filler has {size(0)} {unit}; make it longer."
            )
        while size(near + 1) <= length:
            near += 1
        return near

    def _context(self, count: int, depth: float, key: str) -> str:
        before = round(depth * count)
        sentences = [self.filler[i % len(self.filler)] for i in range(count)]
        parts = (
            TASK,
            " ".join(sentences[:before]),
            HIDDEN.format(key=key),
            " ".join(sentences[before:]),
            QUESTION,
        )
        return "\n".join(part for part in parts if part)
