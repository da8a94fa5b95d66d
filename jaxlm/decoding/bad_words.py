"""Sequences of tokens that are never written."""

import dataclasses
from collections.abc import Sequence
from typing import override

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.processor_config import Function, ProcessorConfig, check_ids
from jaxlm.decoding.processors import Texts
from jaxlm.decoding.sampling import NEVER
from jaxlm.decoding.text_stream import spell

_ANY = -2  # matches every token, and what `Texts.last` puts before the first


@dataclasses.dataclass(frozen=True)
class BadWords(ProcessorConfig):
    """The last token of a bad word is not drawn after its others.

    What is forbidden is a sequence of ids: a vocabulary may spell the same letters with other pieces, which stay
    allowed. `VocabularyFilter` and constraints speak of letters.

    Attributes:
      words: texts; each is forbidden as it is written here, anywhere in a text, and with a space before it.
      sequences: further sequences of ids.
    """

    words: tuple[str, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if not all(self.words) or not all(self.sequences) or not (self.words or self.sequences):
            raise ValueError(
                f"BadWords needs words or sequences, none of them empty, not words={self.words} and "
                f"sequences={self.sequences}."
            )

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        spelt = [(space + word, spell(vocabulary, space + word)) for word in self.words for space in ("", " ")]
        pieces = vocabulary.token_bytes()
        for text, ids in spelt:
            if b"".join(pieces[i] or b"" for i in ids) != text.encode():
                raise ValueError(f"BadWords has {text!r}, which the vocabulary cannot write anyway; remove it.")
        sequences = list(
            dict.fromkeys(tuple(int(i) for i in ids) for ids in [*self.sequences, *(ids for _, ids in spelt)])
        )
        for ids in sequences:
            check_ids("BadWords", ids, vocab_size)
        ends = [ids for ids in sequences if len(ids) == 1 and ids[0] in end_ids]
        if ends:
            raise ValueError(
                f"BadWords forbids the id {ends[0][0]}, which ends a text; use MinNewTokens to delay the end."
            )
        return Function(forbid_words, word_arrays(sequences))


def word_arrays(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [W, M] all but the last token of each sequence, filled up on the left; int32 [W] the last)."""
    longest = max(len(ids) for ids in sequences) - 1
    before = np.full((len(sequences), longest), _ANY, np.int32)
    for row, ids in zip(before, sequences, strict=True):
        row[longest - len(ids) + 1 :] = ids[:-1]
    return before, np.array([ids[-1] for ids in sequences], np.int32)


def forbid_words(before: jax.Array, last: jax.Array, logits: jax.Array, texts: Texts) -> jax.Array:
    """Logits [B, V] with NEVER where a token would complete a word; for the words, of each
    slot, see `word_arrays`."""
    written = texts.last(before.shape[2])  # [B, M]
    completes = jnp.all((before == _ANY) | (written[:, None] == before), axis=2)  # [B, W]
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, jnp.where(completes, last, logits.shape[1])].set(NEVER, mode="drop")
