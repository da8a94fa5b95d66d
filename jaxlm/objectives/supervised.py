"""Supervised pairs: read the inputs, write the targets."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import ClassVar, override

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import Example, Objective, VocabularyInfo


class Eos(enum.Enum):
    """Which texts of a pair get an end-of-sequence id."""

    NONE = "none"
    TARGETS = "targets"
    BOTH = "both"


@dataclasses.dataclass(frozen=True)
class Supervised(Objective):
    """Pairs of {"inputs", "targets"}; the loss is on the targets (multitask finetuning as T0, arXiv 2110.08207).

    Attributes:
      eos: which texts end with the end-of-sequence id, added here. T0's mixtures: the targets. T5's: both.

    Example:
      >>> from jaxlm.objectives.base import VocabularyInfo
      >>> pair = {"inputs": np.array([5, 6], np.int32), "targets": np.array([7], np.int32)}
      >>> example = Supervised().corrupt(pair, VocabularyInfo(size=10), np.random.default_rng(0))
      >>> example.inputs.tolist(), example.targets.tolist()
      ([5, 6], [7, 1])
    """

    name: ClassVar[str] = "supervised"

    eos: Eos = Eos.TARGETS

    @property
    @override
    def ends_inputs(self) -> bool:
        return self.eos is Eos.BOTH

    def pair_lengths(self, lengths: Mapping[str, int]) -> dict[str, int]:
        """The most tokens each text may have before `corrupt`, {"inputs": n, "targets": m}; loaders trim to it."""
        result = {
            "inputs": lengths.get("inputs", 0) - (self.eos is Eos.BOTH),
            "targets": lengths["targets"] - (self.eos is not Eos.NONE),
        }
        if min(result.values()) < 1:
            raise ValueError(
                f"{self.name} cannot fill rows of {dict(lengths)}; the smallest have {1 + (self.eos is Eos.BOTH)} "
                f"inputs and {1 + (self.eos is not Eos.NONE)} targets."
            )
        return result

    @override
    def raw_length(self, lengths: Mapping[str, int], architecture: Architecture) -> int:
        return sum(self.pair_lengths(lengths).values())

    @override
    def corrupt(
        self, example: Mapping[str, np.ndarray], vocabulary: VocabularyInfo, rng: np.random.Generator, *, step: int = 0
    ) -> Example:
        if "inputs" not in example:
            raise ValueError(
                f"{self.name} needs examples with inputs and targets, this one has {sorted(example)}; choose a data "
                "set of pairs, or a language modelling objective."
            )
        eos = np.array([vocabulary.eos_id], np.int32)
        inputs, targets = example["inputs"], example["targets"]
        if self.eos is Eos.BOTH:
            inputs = np.concatenate([inputs, eos])
        if self.eos is not Eos.NONE:
            targets = np.concatenate([targets, eos])
        return Example(inputs, targets)
