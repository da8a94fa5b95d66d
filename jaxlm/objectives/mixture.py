"""Weighted mixtures of objectives: each example draws which one corrupts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, override

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import Example, Layout, Objective, VocabularyInfo
from jaxlm.piecewise import Piecewise, at_step


@dataclasses.dataclass(frozen=True)
class Mixture(Objective):
    """Each example is corrupted by one member, drawn by weight from the example's own generator.

    Members need texts of different lengths to fill the same row. A mixture as written asks for the shortest of
    these, so that nothing is dropped and nothing overflows, and other members leave padding. `fit`, which the
    loader calls, makes a copy that asks for the longest and gives each member a random stretch of the length it
    can take: rows are full, and each epoch skips a little text (for UL2 in rows of 512 + 512 about 7%, where
    padding would cost a prefix decoder 19% of its positions).

    Attributes:
      members: objectives with the same layout that score by cross-entropy alone.
      weights: one a member, not necessarily summing to 1; each may change over training. A member whose weight is
        always 0 counts for nothing: a mixture in which one weight is not 0 gives exactly that member's examples.
      names: how the members appear in metrics; None takes their own names, numbered where they repeat.
      texts: the text each member takes, 0 for one that is never drawn; set by `fit`.

    Example:
      >>> from jaxlm.objectives.base import VocabularyInfo
      >>> from jaxlm.objectives.full_lm import FullLM
      >>> from jaxlm.objectives.prefix_lm import PrefixLM
      >>> mixture = Mixture(members=(FullLM(), PrefixLM(suffix_share=0.5)), weights=(0.0, 1.0))
      >>> text = np.array([5, 6, 7, 8], np.int32)
      >>> example = mixture.corrupt({"targets": text}, VocabularyInfo(size=10), np.random.default_rng(0))
      >>> example.inputs.tolist(), example.targets.tolist(), mixture.parts[example.objective]
      ([5, 6], [7, 8], 'prefix_lm')
    """

    name: ClassVar[str] = "mixture"

    members: tuple[Objective, ...]
    weights: tuple[float | Piecewise, ...]
    names: tuple[str, ...] | None = None
    texts: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.members or len(self.weights) != len(self.members):
            raise ValueError(
                f"Mixture needs one weight a member, got {len(self.members)} members and {len(self.weights)} weights."
            )
        if self.names is not None and len(self.names) != len(self.members):
            raise ValueError(f"Mixture.names must name each of the {len(self.members)} members, got {self.names}.")
        steps = {step for weight in self.weights if isinstance(weight, Piecewise) for step in weight.steps} | {0}
        for step in sorted(steps):
            weights = self._weights(step)
            if weights.min() < 0 or weights.sum() <= 0:
                raise ValueError(
                    f"Mixture.weights must not be negative nor all 0, got {weights.tolist()} at step {step}."
                )
        first = self.members[0]
        for member in self.members:
            if member.layout is not first.layout:
                raise ValueError(
                    f"A mixture's members must lay their targets out alike, but {first.name} is "
                    f"{first.layout.value} and {member.name} is {member.layout.value}; train them in stages instead."
                )
            if len(member.parts) > 1:
                raise ValueError(f"Mixtures don't nest: list the members of {member.name} in the outer mixture.")
            if type(member).loss_sums is not Objective.loss_sums:
                raise ValueError(
                    f"A mixture's members must score by cross-entropy alone, but {member.name} has the loss terms "
                    f"{sorted(member.coefficients)}; train it in a stage of its own."
                )

    def _weights(self, step: int) -> np.ndarray:
        return np.array([at_step(weight, step) for weight in self.weights])

    @property
    @override
    def layout(self) -> Layout:
        return self.members[0].layout

    @property
    @override
    def takes_segments(self) -> bool:
        return all(member.takes_segments for member in self.drawn)

    @property
    @override
    def ends_inputs(self) -> bool:
        return all(member.ends_inputs for member in self.drawn)

    @property
    @override
    def parts(self) -> tuple[str, ...]:
        if self.names is not None:
            return self.names
        names = [member.name for member in self.members]
        return tuple(f"{name}_{k}" if names.count(name) > 1 else name for k, name in enumerate(names))

    @property
    @override
    def drawn(self) -> tuple[Objective, ...]:
        return tuple(member for member, weight in zip(self.members, self.weights) if _ever(weight))

    @override
    def refuses(self, architecture: Architecture) -> str | None:
        return next(filter(None, (member.refuses(architecture) for member in self.drawn)), None)

    @override
    def raw_length(self, lengths: Mapping[str, int], architecture: Architecture) -> int:
        choose = min if self.texts is None else max
        return choose(member.raw_length(lengths, architecture) for member in self.drawn)

    @override
    def fit(self, lengths: Mapping[str, int], architecture: Architecture) -> Mixture:
        texts = (
            member.raw_length(lengths, architecture) if _ever(weight) else 0
            for member, weight in zip(self.members, self.weights)
        )
        return dataclasses.replace(self, texts=tuple(texts))

    @override
    def corrupt(
        self, example: Mapping[str, np.ndarray], vocabulary: VocabularyInfo, rng: np.random.Generator, *, step: int = 0
    ) -> Example:
        shares = np.cumsum(self._weights(step))
        shares /= shares[-1]
        # A lone member is not drawn, so that it sees the generator as it would outside of a mixture.
        drawn = rng.random() if np.count_nonzero(self._weights(step)) > 1 else 0.5
        part = int(np.searchsorted(shares, drawn, side="right"))
        length = len(example["targets"])
        if self.texts is not None and length > self.texts[part]:
            start = int(rng.integers(length - self.texts[part] + 1))
            stretch = slice(start, start + self.texts[part])
            example = {**example, **{key: example[key][stretch] for key in ("targets", "segments") if key in example}}
        result = self.members[part].corrupt(example, vocabulary, rng, step=step)
        result.objective = part
        return result

    @override
    def restore(self, example: Example, vocabulary: VocabularyInfo) -> np.ndarray:
        return self.members[example.objective].restore(example, vocabulary)


def _ever(weight: float | Piecewise) -> bool:
    """Whether a weight is above 0 at some step."""
    return max(weight.values if isinstance(weight, Piecewise) else (weight,)) > 0
