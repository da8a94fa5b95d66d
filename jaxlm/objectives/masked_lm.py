"""Masked language modelling: hide some tokens of a text, predict each of them in its place."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import ClassVar, override

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import Example, Layout, Objective, VocabularyInfo
from jaxlm.piecewise import Piecewise, at_step


class Unit(enum.Enum):
    """What is masked as one: single tokens, or all pieces of a word (needs `VocabularyInfo.word_start`)."""

    TOKEN = "token"
    WORD = "word"


class Count(enum.Enum):
    """How many tokens are masked.

    EXACT: round(mask_rate * tokens), as BERT; the same in every text of one length. With words, the most whole
      words that a random order fits into that number (BERT skips a word that would exceed it).
    BERNOULLI: each unit on its own with probability mask_rate.
    """

    EXACT = "exact"
    BERNOULLI = "bernoulli"


class Alike(enum.Enum):
    """Which masked tokens are shown alike: all as the mask id, all as random ids (each its own) or all as they are.

    SPAN: those of a span (SpanBERT). What is masked one by one is a span of one unit, so that whole words are alike.
    """

    SPAN = "span"


@dataclasses.dataclass(frozen=True)
class MaskedLM(Objective):
    """BERT's masked LM (Devlin et al. 2018, arXiv 1810.04805, section 3.1), with its later forms.

    Of the masked tokens a share `mask_share` becomes the mask id, `random_share` a random id of text, the rest stays.
    The loss is on all of them. Special ids are never masked nor drawn. Settings of papers:
      - BERT: the defaults; whole-word BERT: unit WORD;
      - SpanBERT (arXiv 1907.10529, 3.1): unit WORD, span_lengths geometric_lengths(0.2, 10), alike SPAN;
      - ALBERT's n-grams (arXiv 1909.11942, 3.1): unit WORD, span_lengths (6/11, 3/11, 2/11);
      - 40% masking (arXiv 2202.08005): mask_rate 0.4, mask_share 1, random_share 0.

    Attributes:
      mask_rate: share of the text's tokens to predict; may change over training.
      mask_share: share of those shown as the mask id.
      random_share: share of those shown as a random id.
      unit: tokens or words.
      span_lengths: probabilities of masking 1, 2, ... units in a row at a time.
      count: exact or Bernoulli number of masked tokens.
      alike: which masked tokens are shown alike, so that the shares are of these groups; None: each token is shown on
        its own, as BERT's are.

    Example (mask id 4):
      >>> from jaxlm.objectives.base import VocabularyInfo
      >>> vocabulary = VocabularyInfo(size=20, mask_id=4)
      >>> text = np.arange(10, 16, dtype=np.int32)
      >>> objective = MaskedLM(mask_rate=0.34, mask_share=1.0, random_share=0.0)
      >>> example = objective.corrupt({"targets": text}, vocabulary, np.random.default_rng(0))
      >>> example.inputs.tolist()
      [10, 11, 4, 4, 14, 15]
      >>> example.targets.tolist(), example.weights.tolist()
      ([10, 11, 12, 13, 14, 15], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    """

    name: ClassVar[str] = "masked_lm"
    layout: ClassVar[Layout] = Layout.ALIGNED
    takes_segments: ClassVar[bool] = True

    mask_rate: float | Piecewise = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    unit: Unit = Unit.TOKEN
    span_lengths: tuple[float, ...] = (1.0,)
    count: Count = Count.EXACT
    alike: Alike | None = None

    def __post_init__(self):
        rates = self.mask_rate.values if isinstance(self.mask_rate, Piecewise) else (self.mask_rate,)
        if not all(0 < rate <= 1 for rate in rates):
            raise ValueError(f"MaskedLM.mask_rate must lie above 0 and not above 1, got {self.mask_rate}.")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"MaskedLM.mask_share and random_share must be shares of one whole, got {self.mask_share} and "
                f"{self.random_share}."
            )
        if min(self.span_lengths, default=-1) < 0 or abs(sum(self.span_lengths) - 1) > 1e-6:
            raise ValueError(f"MaskedLM.span_lengths must be probabilities that sum to 1, got {self.span_lengths}.")
        if self.count is Count.BERNOULLI and len(self.span_lengths) > 1:
            raise ValueError("MaskedLM.count BERNOULLI masks units one by one; use EXACT with longer span_lengths.")

    @override
    def raw_length(self, lengths: Mapping[str, int], architecture: Architecture) -> int:
        return lengths["targets"]

    @override
    def corrupt(
        self, example: Mapping[str, np.ndarray], vocabulary: VocabularyInfo, rng: np.random.Generator, *, step: int = 0
    ) -> Example:
        text = example["targets"]
        spans = self.draw_spans(text, vocabulary, rng, step)
        masked = np.flatnonzero(spans)
        weights = np.zeros(len(text), np.float32)
        weights[masked] = 1.0
        inputs = text.copy()
        if self.alike is Alike.SPAN:
            role = rng.random(spans.max(initial=0))[spans[masked] - 1]
        else:
            role = rng.random(len(masked))
        if self.mask_share > 0:
            if vocabulary.mask_id is None:
                raise ValueError(
                    f"{self.name} needs a mask id, which this vocabulary lacks; add one, or set mask_share to 0."
                )
            inputs[masked[role < self.mask_share]] = vocabulary.mask_id
        if self.random_share > 0:
            substituted = masked[(role >= self.mask_share) & (role < self.mask_share + self.random_share)]
            drawn = rng.integers(0, len(vocabulary.ordinary_ids), len(substituted))
            inputs[substituted] = vocabulary.ordinary_ids[drawn]
        return Example(inputs, text, weights, segments=example.get("segments"))

    @override
    def restore(self, example: Example, vocabulary: VocabularyInfo) -> np.ndarray:
        return np.where(example.weights > 0, example.targets, example.inputs)

    def draw_mask(
        self, text: np.ndarray, vocabulary: VocabularyInfo, rng: np.random.Generator, step: int
    ) -> np.ndarray:
        """[N] bool: the tokens to predict. None where the text has only special ids, else at least one if EXACT."""
        return self.draw_spans(text, vocabulary, rng, step) > 0

    def draw_spans(
        self, text: np.ndarray, vocabulary: VocabularyInfo, rng: np.random.Generator, step: int
    ) -> np.ndarray:
        """int [N]: the number of the span, from 1, that each token to predict was chosen in; 0 elsewhere."""
        rate = at_step(self.mask_rate, step)
        maskable = ~vocabulary.is_special[text]
        spans = np.zeros(len(text), np.int64)
        positions = np.flatnonzero(maskable)
        if len(positions) == 0:
            return spans
        # Unit u is the maskable tokens positions[bounds[u] : bounds[u + 1]].
        if self.unit is Unit.TOKEN:
            bounds = np.arange(len(positions) + 1)
        else:
            bounds = self._word_bounds(text, positions, vocabulary)
        sizes = np.diff(bounds)
        if self.count is Count.BERNOULLI:
            chosen = rng.random(len(sizes)) < rate
        else:
            budget = max(round(rate * len(positions)), 1)
            if len(self.span_lengths) > 1:
                spans[positions] = np.repeat(self._choose_spans(sizes, positions[bounds[:-1]], budget, rng), sizes)
                return spans
            if self.unit is Unit.TOKEN:
                spans[positions[rng.permutation(len(positions))[:budget]]] = np.arange(1, budget + 1)
                return spans
            chosen = _choose_units(sizes, budget, rng)
        spans[positions] = np.repeat(np.where(chosen, np.cumsum(chosen), 0), sizes)
        return spans

    def _word_bounds(self, text: np.ndarray, positions: np.ndarray, vocabulary: VocabularyInfo) -> np.ndarray:
        if vocabulary.word_start is None:
            raise ValueError(
                f"{self.name} with unit WORD needs to know where words start, which this vocabulary cannot tell; "
                "use Unit.TOKEN, or a vocabulary with word_start."
            )
        starts = vocabulary.word_start[text[positions]]
        starts[0] = True
        starts[1:] |= np.diff(positions) > 1  # a special token ends a word
        return np.append(np.flatnonzero(starts), len(positions))

    def _choose_spans(self, sizes: np.ndarray, where: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
        """int [units]: spans of units from random starts, until `budget` tokens are chosen or no unit fits any more.

        The number of its span at each unit, from 1, and 0 at those that are not chosen.

        A span ends early at a unit already chosen, at a special id (`where` gives each unit's position in the text)
        and where the budget ends.
        """
        units = len(sizes)
        token_bounds = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        run_ends = np.append(np.flatnonzero(np.diff(where) > sizes[:-1]) + 1, units)
        run_end = run_ends[np.searchsorted(run_ends, np.arange(units), side="right")].tolist()
        cumulative = np.cumsum(self.span_lengths)
        chosen, found = bytearray(units), []
        left = budget
        # Draws come in blocks: one call for many spans. Spans are few; a loop over them costs a microsecond each.
        while left > 0:
            starts = rng.permutation(units).tolist()
            lengths = (np.searchsorted(cumulative, rng.random(units) * cumulative[-1], side="right") + 1).tolist()
            before = left
            for start, length in zip(starts, lengths):
                end = min(start + length, run_end[start])
                meets = chosen.find(1, start, end)
                end = end if meets < 0 else meets
                while end > start and token_bounds[end] - token_bounds[start] > left:
                    end -= 1
                if end > start:
                    chosen[start:end] = b"\1" * (end - start)
                    found.append((start, end))
                    left -= token_bounds[end] - token_bounds[start]
                    if left == 0:
                        break
            if left == before:  # every unit left is larger than what is left of the budget
                break
        if left == budget:  # even the smallest word exceeds the budget: predict one word rather than none
            word = int(rng.integers(units))
            found.append((word, word + 1))
        spans = np.zeros(units, np.int64)
        for number, (start, end) in enumerate(found, 1):
            spans[start:end] = number
        return spans


def geometric_lengths(p: float = 0.2, longest: int = 10) -> tuple[float, ...]:
    """SpanBERT's span lengths: geometric with parameter p, cut at `longest` and normalised (arXiv 1907.10529, 3.1).

    Example:
      >>> round(sum(length * q for length, q in enumerate(geometric_lengths(), start=1)), 1)  # as the paper says
      3.8
    """
    shares = [p * (1 - p) ** k for k in range(longest)]
    return tuple(share / sum(shares) for share in shares)


def _choose_units(sizes: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """[units] bool: units in a random order, each taken if it still fits into `budget` tokens; at least one."""
    order = rng.permutation(len(sizes))
    chosen = np.zeros(len(sizes), np.bool_)
    taken = np.searchsorted(np.cumsum(sizes[order]), budget, side="right")
    chosen[order[:taken]] = True
    left, rest = budget - sizes[order[:taken]].sum(), order[taken:]
    while left > 0 and len(rest := rest[sizes[rest] <= left]) > 0:  # a few rounds: what is left is below one word
        chosen[rest[0]] = True
        left -= sizes[rest[0]]
        rest = rest[1:]
    if not chosen.any():
        chosen[order[0]] = True
    return chosen
