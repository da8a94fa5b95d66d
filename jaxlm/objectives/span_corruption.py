"""Span corruption: replace spans of a text by sentinels, write the spans."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, override

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import Example, Objective, VocabularyInfo


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
    """T5's denoising (Raffel et al. 2020, arXiv 1910.10683, sections 3.1.4 and 3.3.4).

    A text of n tokens gets round(noise_density * n) noise tokens in round(noise / mean_span_length) spans; lengths
    of noise and of text spans are two uniformly random compositions. As in T5's released code the text begins
    with a text span and ends with a noise span (it is never rolled). Each noise span becomes one sentinel in the
    inputs; the targets are each sentinel followed by its span. Sentinels are used in the vocabulary's order
    (T5: downwards from the highest id). Inputs and targets end with the end-of-sequence id.

    A text of one token is left alone: its targets are one empty span.

    Of a row of documents that must not see each other each is corrupted by itself, with sentinels and ends of its own.
    These take more room than the one end of a whole text: what would not fit is left out, at the end of the row.

    Attributes:
      noise_density: share of the tokens that are noise; the paper's r, 0.15.
      mean_span_length: mean tokens of a noise span; the paper's mu, 3.
      mode_token: name of a special token put before the inputs (UL2's "[R]", "[X]"); None puts none.

    Example (sentinels 99, 98, ...; end of sequence 1):
      >>> from jaxlm.objectives.base import VocabularyInfo
      >>> vocabulary = VocabularyInfo(size=100, sentinel_ids=(99, 98, 97))
      >>> text = np.arange(10, 20, dtype=np.int32)
      >>> objective = SpanCorruption(noise_density=0.4, mean_span_length=2.0)
      >>> example = objective.corrupt({"targets": text}, vocabulary, np.random.default_rng(1))
      >>> example.inputs.tolist()
      [10, 11, 12, 13, 14, 99, 17, 98, 1]
      >>> example.targets.tolist()
      [99, 15, 16, 98, 18, 19, 1]
    """

    name: ClassVar[str] = "span_corruption"
    ends_inputs: ClassVar[bool] = True
    takes_segments: ClassVar[bool] = True

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    mode_token: str | None = None

    def __post_init__(self):
        if not 0 < self.noise_density < 1:
            raise ValueError(f"SpanCorruption.noise_density must lie between 0 and 1, got {self.noise_density}.")
        if self.mean_span_length < 1:
            raise ValueError(f"SpanCorruption.mean_span_length must be at least 1, got {self.mean_span_length}.")

    def sizes(self, length: int) -> tuple[int, int]:
        """Tokens of inputs and of targets made from a text of `length` tokens. Neither falls as length grows."""
        noise, spans = noise_counts(length, self.noise_density, self.mean_span_length)
        # The text of one token keeps an empty span in its targets.
        return length - noise + spans + 1 + (self.mode_token is not None), noise + max(spans, 1) + 1

    @override
    def raw_length(self, lengths: Mapping[str, int], architecture: Architecture) -> int:
        room = lengths.get("inputs", 0), lengths["targets"]

        def too_long(length: int) -> bool:
            inputs, targets = self.sizes(length)
            if architecture is Architecture.ENCODER_DECODER:
                return inputs > room[0] or targets > room[1]
            return inputs + targets > sum(room)

        length = bisect.bisect_left(range(sum(room) + 1), True, key=too_long) - 1
        if length < 2:
            inputs, targets = self.sizes(2)
            raise ValueError(
                f"{self.name} cannot fill rows of {dict(lengths)} for {architecture.value}; the smallest have "
                f"{inputs} inputs and {targets} targets."
            )
        return length

    @override
    def corrupt(
        self, example: Mapping[str, np.ndarray], vocabulary: VocabularyInfo, rng: np.random.Generator, *, step: int = 0
    ) -> Example:
        text, segments = example["targets"], example.get("segments")
        if segments is None:
            return Example(*self._corrupted(text, vocabulary, rng))
        documents, ids = self._fitting(text, segments, example.get("columns"))
        inputs, targets = zip(*(self._corrupted(document, vocabulary, rng) for document in documents))
        return Example(
            np.concatenate(inputs),
            np.concatenate(targets),
            segments=np.repeat(ids, [len(part) for part in targets]),
            input_segments=np.repeat(ids, [len(part) for part in inputs]),
        )

    def _corrupted(
        self, text: np.ndarray, vocabulary: VocabularyInfo, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one text."""
        noise, spans = noise_counts(len(text), self.noise_density, self.mean_span_length)
        if max(spans, 1) > len(vocabulary.sentinels):
            raise ValueError(
                f"{self.name} needs {max(spans, 1)} sentinels for a text of {len(text)} tokens, the vocabulary has "
                f"{len(vocabulary.sentinels)}; add sentinels, shorten the rows, or lengthen mean_span_length."
            )
        is_noise, text_ends, noise_starts = draw_spans(len(text), noise, spans, rng)
        sentinels = vocabulary.sentinels[:spans]
        inputs = insert(text[~is_noise], text_ends, sentinels, vocabulary.eos_id)
        if self.mode_token is not None:
            inputs = np.concatenate([[np.int32(vocabulary.named(self.mode_token, self.name))], inputs])
        if spans == 0:
            return inputs, np.array([vocabulary.sentinel_ids[0], vocabulary.eos_id], np.int32)
        return inputs, insert(text[is_noise], noise_starts, sentinels, vocabulary.eos_id)

    def _fitting(
        self, text: np.ndarray, segments: np.ndarray, columns: np.ndarray | None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The documents whose corruption there is room for, the last one cut, and their segments."""

        def takes(length: int) -> np.ndarray:
            sizes = np.array(self.sizes(length))
            return sizes if columns is None else sizes.sum(keepdims=True)

        room = takes(len(text)) if columns is None else np.array([columns])
        starts = np.flatnonzero(np.diff(segments, prepend=segments[0] - 1))
        documents = []
        for document in np.split(text, starts[1:]):
            lengths = range(len(document) + 1)
            length = max(bisect.bisect_left(lengths, True, key=lambda n: bool((takes(n) > room).any())) - 1, 0)
            if length:
                documents.append(document[:length])
            if length < len(document):
                break
            room = room - takes(length)
        return documents, segments[starts[: len(documents)]]

    @override
    def restore(self, example: Example, vocabulary: VocabularyInfo) -> np.ndarray:
        if example.segments is None:
            return self._restored(example.inputs, example.targets, vocabulary)
        return np.concatenate(
            [
                self._restored(
                    example.inputs[example.input_segments == segment],
                    example.targets[example.segments == segment],
                    vocabulary,
                )
                for segment in np.unique(example.segments)
            ]
        )

    def _restored(self, inputs: np.ndarray, targets: np.ndarray, vocabulary: VocabularyInfo) -> np.ndarray:
        inputs, targets = inputs[int(self.mode_token is not None) : -1], targets[:-1]
        texts = np.split(inputs, np.flatnonzero(np.isin(inputs, vocabulary.sentinels)))
        spans = np.split(targets, np.flatnonzero(np.isin(targets, vocabulary.sentinels)))[1:]
        # Every piece but the first text begins with its sentinel.
        pieces = [texts[0]]
        for k, text in enumerate(texts[1:]):
            pieces += [spans[k][1:], text[1:]]
        return np.concatenate(pieces)


def noise_counts(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Numbers of noise tokens and of noise spans in a text of `length` tokens; 0 of both below two tokens.

    At least one noise token and one text token; no more spans than either, since neither kind may be empty. Products
    are float32, as in T5's mask: 190 tokens at 0.15 have 29 noise tokens there, where float64 gives 28.
    """
    if length < 2:
        return 0, 0
    noise = min(max(round(float(np.float32(length) * np.float32(noise_density))), 1), length - 1)
    spans = round(float(np.float32(noise) / np.float32(mean_span_length)))
    return noise, min(max(spans, 1), noise, length - noise)


def draw_spans(
    length: int, noise: int, spans: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws which of `length` tokens are noise, alternating text and noise spans, text first.

    Returns:
      [length] bool, True on noise; [spans] where each text span ends, counted in text tokens; [spans] where each
      noise span starts, counted in noise tokens.
    """
    if spans == 0:
        return np.zeros(length, np.bool_), np.zeros(0, np.int64), np.zeros(0, np.int64)
    text_bounds, noise_bounds = composition(length - noise, spans, rng), composition(noise, spans, rng)
    starts = np.empty(2 * spans + 1, np.int64)  # of text 0, noise 0, text 1, ..., and the end
    starts[0::2] = text_bounds + noise_bounds
    starts[1::2] = text_bounds[1:] + noise_bounds[:-1]
    alternating = np.zeros(2 * spans, np.bool_)
    alternating[1::2] = True
    return np.repeat(alternating, np.diff(starts)), text_bounds[1:], noise_bounds[:-1]


def composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Boundaries, [parts + 1], of a uniformly random split of `total` into `parts` positive lengths."""
    bounds = np.empty(parts + 1, np.int64)
    bounds[0], bounds[-1] = 0, total
    bounds[1:-1] = rng.permutation(total - 1)[: parts - 1] + 1
    bounds[1:-1].sort()
    return bounds


def insert(tokens: np.ndarray, positions: np.ndarray, marks: np.ndarray, *end: int) -> np.ndarray:
    """`tokens` with marks[k] before tokens[positions[k]] (positions do not fall), then `end`; int32."""
    length = len(tokens) + len(marks)
    result = np.empty(length + len(end), np.int32)
    slots = positions + np.arange(len(marks))
    is_token = np.ones(len(result), np.bool_)
    is_token[slots] = is_token[length:] = False
    result[is_token], result[slots], result[length:] = tokens, marks, end
    return result
