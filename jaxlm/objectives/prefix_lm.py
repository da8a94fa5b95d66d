"""Prefix language modelling: see the first part of a text, predict the rest."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import ClassVar, override

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import Example, Objective, VocabularyInfo
from jaxlm.objectives.full_lm import row_length


class Pairing(enum.Enum):
    """How splits fill the fixed rows of an encoder-decoder.

    SINGLE: one split text an example. Since either part may be long and not both, at most half of an
      encoder-decoder's positions are used.
    COMPLEMENTARY: an example is two texts of equal length L, split at i and at L - i, so that the inputs together
      and the targets together have L tokens each. This is the study's layout (arXiv 2204.05832, appendix C).
    """

    SINGLE = "single"
    COMPLEMENTARY = "complementary"


@dataclasses.dataclass(frozen=True)
class PrefixLM(Objective):
    """Splits a text in two; the loss is on the second part (Raffel et al. 2020, arXiv 1910.10683, 3.2.1).

    The split is uniform on 1..L-1, as in Wang et al. 2022 (arXiv 2204.05832, appendix C: U{1..625} for L = 626):
    half of the tokens carry loss on average. The text carries its own end-of-document ids; none is added.
    A causal decoder trained so is full LM with the loss masked on the prefix.

    A row of documents that must not see each other is split once as well: those before the split are inputs without
    targets, those after it targets without inputs.

    Attributes:
      suffix_share: share of the text to predict, always its end (UL2's S-denoiser: 0.25); None draws the split.
      mode_token: name of a special token put before the inputs (UL2's "[S]"); None puts none.
      pairing: how an encoder-decoder's rows are filled.

    Example:
      >>> from jaxlm.objectives.base import VocabularyInfo
      >>> text = np.array([5, 6, 7, 8], np.int32)
      >>> objective = PrefixLM(suffix_share=0.25)
      >>> example = objective.corrupt({"targets": text}, VocabularyInfo(size=10), np.random.default_rng(0))
      >>> example.inputs.tolist(), example.targets.tolist()
      ([5, 6, 7], [8])
    """

    name: ClassVar[str] = "prefix_lm"

    suffix_share: float | None = None
    mode_token: str | None = None
    pairing: Pairing = Pairing.SINGLE

    def __post_init__(self):
        if self.suffix_share is not None and not 0 < self.suffix_share < 1:
            raise ValueError(f"PrefixLM.suffix_share must lie between 0 and 1, got {self.suffix_share}.")
        if self.suffix_share is not None and self.pairing is Pairing.COMPLEMENTARY:
            raise ValueError("PrefixLM.pairing COMPLEMENTARY draws its splits; leave suffix_share None.")

    @property
    @override
    def takes_segments(self) -> bool:
        # One mode token would be seen by the first document alone.
        return self.mode_token is None

    @override
    def refuses(self, architecture: Architecture) -> str | None:
        if self.pairing is Pairing.COMPLEMENTARY and not architecture.has_encoder_features:
            return (
                f"{self.name} with pairing COMPLEMENTARY fills an encoder's and a decoder's row at once, which "
                f"{architecture.value} lacks; use Pairing.SINGLE, or encoder_decoder."
            )
        return super().refuses(architecture)

    @override
    def raw_length(self, lengths: Mapping[str, int], architecture: Architecture) -> int:
        mode = self.mode_token is not None
        texts = 2 if self.pairing is Pairing.COMPLEMENTARY else 1
        if architecture is not Architecture.ENCODER_DECODER:
            length = row_length(lengths) - mode
        elif self.pairing is Pairing.COMPLEMENTARY:
            length = 2 * min(lengths["inputs"] - 2 * mode, lengths["targets"])
        elif self.suffix_share is None:
            length = min(lengths["inputs"] - mode, lengths["targets"]) + 1
        else:
            room, targets = lengths["inputs"] - mode, lengths["targets"]
            length = max(
                (n for n in range(2, room + targets + 1) if self._suffix(n) <= targets and n - self._suffix(n) <= room),
                default=0,
            )
        if length < 2 * texts:
            raise ValueError(
                f"{self.name} cannot fill rows of {dict(lengths)} for {architecture.value}; the smallest have "
                f"{texts * (1 + mode)} inputs and {texts} targets."
            )
        return length

    def _suffix(self, length: int) -> int:
        """Targets of a text of `length` >= 2 tokens with a fixed share."""
        return min(max(round(length * self.suffix_share), 1), length - 1)

    @override
    def corrupt(
        self, example: Mapping[str, np.ndarray], vocabulary: VocabularyInfo, rng: np.random.Generator, *, step: int = 0
    ) -> Example:
        text, segments = example["targets"], example.get("segments")
        mode = text[:0]
        if self.mode_token is not None:
            mode = np.array([vocabulary.named(self.mode_token, self.name)], np.int32)
        if self.pairing is Pairing.COMPLEMENTARY and len(text) >= 4:
            half = len(text) // 2
            split = int(rng.integers(1, half))
            first, second, other = text[:half], text[half:], half - split
            ids = np.ones(len(text), np.int32) if segments is None else segments
            # What the middle cuts is two texts, whose numbers go on from one half to the other.
            first_ids, second_ids = ids[:half], ids[half:] + (ids[half - 1] + 1 - ids[half])
            input_ids = [np.repeat(first_ids[:1], len(mode)), first_ids[:split]]
            input_ids += [np.repeat(second_ids[:1], len(mode)), second_ids[:other]]
            return Example(
                inputs=np.concatenate([mode, first[:split], mode, second[:other]]),
                targets=np.concatenate([first[split:], second[other:]]),
                segments=np.concatenate([first_ids[split:], second_ids[other:]]),
                input_segments=np.concatenate(input_ids),
            )
        if len(text) < 2:
            split = 0
        elif self.suffix_share is None:
            split = int(rng.integers(1, len(text)))
        else:
            split = len(text) - self._suffix(len(text))
        inputs, targets = np.concatenate([mode, text[:split]]), text[split:]
        if segments is None:
            return Example(inputs, targets)
        return Example(inputs, targets, segments=segments[split:], input_segments=segments[:split])

    @override
    def restore(self, example: Example, vocabulary: VocabularyInfo) -> np.ndarray:
        mode = int(self.mode_token is not None)
        if example.segments is None:
            return np.concatenate([example.inputs[mode:], example.targets])
        pieces = []
        for segment in np.union1d(example.input_segments, example.segments):
            pieces += [example.inputs[example.input_segments == segment][mode:]]
            pieces += [example.targets[example.segments == segment]]
        return np.concatenate(pieces)
