"""Fills the gaps of texts, with models trained on CodeGen2's mixture (`jaxlm.objectives.codegen2`).

The prompt is what training shows before a span (arXiv 2305.02309): the text with a sentinel in each gap, the
end-of-document id, <sep>, and the sentinel whose span is wanted; the model writes the span and <eom>. Gaps are filled
one after the other, each with the spans before it in view, as they stand in a training row.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxlm.decoding.generation import Generator
from jaxlm.decoding.requests import Finish

if TYPE_CHECKING:
    from jaxlm.data.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text whose gaps are filled.

    Attributes:
      text: with the spans in their places.
      spans: what was written in each gap.
      finish: STOP where every span ended with <eom>, else why the first that did not was cut.
    """

    text: str
    spans: tuple[str, ...]
    finish: Finish


def span_end(vocabulary: "Vocabulary") -> int:
    """The id of <eom>, which ends a span.

    Raises:
      ValueError: the vocabulary has none.
    """
    return vocabulary.info().named("<eom>", "Infilling")


def fill(generator: Generator, texts: Sequence[str], *, seed: int = 0) -> list[Filled]:
    """Fills the gaps of some texts.

    Args:
      generator: of a decoder, with `span_end` as its only end id.
      texts: with the vocabulary's sentinels in their gaps, in order: "a <extra_id_0> c <extra_id_1>".
      seed: of the draws.

    Raises:
      ValueError: a text has no gap, or its sentinels are not the first ones in order.
    """
    vocabulary = generator.vocabulary
    info, end = vocabulary.info(), span_end(vocabulary)
    sep = info.named("<sep>", "Infilling")
    visible = [vocabulary.encode_with_specials(text) for text in texts]
    gaps = [_gaps(ids, info.sentinels, text, vocabulary) for ids, text in zip(visible, texts, strict=True)]
    prompts = [[*ids.tolist(), info.eos_id, sep] for ids in visible]
    spans: list[list[np.ndarray]] = [[] for _ in texts]
    finishes = [Finish.STOP] * len(texts)
    for k in range(max(map(len, gaps))):
        wanting = [n for n, places in enumerate(gaps) if k < len(places)]
        for n in wanting:
            prompts[n].append(info.sentinel_ids[k])
        answers = generator.generate([prompts[n] for n in wanting], seed=seed)
        for n, (answer,) in zip(wanting, answers, strict=True):
            spans[n].append(answer.tokens)
            prompts[n] += [*answer.tokens.tolist(), end]
            if finishes[n] is Finish.STOP:
                finishes[n] = answer.finish
    return [
        Filled(
            text=vocabulary.decode(_joined(ids, places, found)),
            spans=tuple(vocabulary.decode(span) for span in found),
            finish=finish,
        )
        for ids, places, found, finish in zip(visible, gaps, spans, finishes, strict=True)
    ]


def _gaps(ids: np.ndarray, sentinels: np.ndarray, text: str, vocabulary: "Vocabulary") -> np.ndarray:
    """Where the sentinels stand."""
    places = np.flatnonzero(np.isin(ids, sentinels))
    if not len(places) or not np.array_equal(ids[places], sentinels[: len(places)]):
        first = vocabulary.decode(sentinels[:1])
        raise ValueError(
            f"The gaps of {text[:40]!r} must be marked by sentinels in their order, beginning with {first}, each once."
        )
    return places


def _joined(ids: np.ndarray, places: np.ndarray, spans: Sequence[np.ndarray]) -> np.ndarray:
    around = np.split(ids, places)
    pieces = [around[0]]
    for span, after in zip(spans, around[1:], strict=True):
        pieces += [span, after[1:]]
    return np.concatenate(pieces)
