"""UL2: a mixture of regular, sequential and extreme denoisers, each announced by its mode token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, override

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import Example, Objective, VocabularyInfo
from jaxlm.objectives.mixture import Mixture
from jaxlm.objectives.prefix_lm import PrefixLM
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.piecewise import Piecewise


@dataclasses.dataclass(frozen=True)
class UL2(Objective):
    """Mixture of denoisers (Tay et al. 2022, arXiv 2205.05131, section 3.1 and table 1).

    R-denoisers are span corruption with few, short spans; X-denoisers have long spans or many; the S-denoiser is
    prefix LM with the last quarter to predict. The paper's seven denoisers, mixed uniformly, are the defaults.
    Each example begins with its mode token "[R]", "[S]" or "[X]" (a vocabulary's named tokens).

    Attributes:
      regular: (mean span length mu, noise density r) of each R-denoiser.
      suffix_share: the S-denoiser's r.
      extreme: (mu, r) of each X-denoiser.
      weights: of the R-denoisers, the S-denoiser and the X-denoisers, in this order; None mixes uniformly.
      regular_token, sequential_token, extreme_token: names of the mode tokens; None puts none.

    Example (the S-denoiser alone; [S] is 3):
      >>> from jaxlm.objectives.base import VocabularyInfo
      >>> vocabulary = VocabularyInfo(size=20, named_ids={"[R]": 2, "[S]": 3, "[X]": 4})
      >>> text = np.arange(10, 18, dtype=np.int32)
      >>> ul2 = UL2(weights=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0))
      >>> example = ul2.corrupt({"targets": text}, vocabulary, np.random.default_rng(0))
      >>> example.inputs.tolist(), example.targets.tolist(), ul2.parts[example.objective]
      ([3, 10, 11, 12, 13, 14, 15], [16, 17], 's_0.25')
    """

    name: ClassVar[str] = "ul2"

    regular: tuple[tuple[float, float], ...] = ((3.0, 0.15), (8.0, 0.15))
    suffix_share: float = 0.25
    extreme: tuple[tuple[float, float], ...] = ((3.0, 0.5), (8.0, 0.5), (64.0, 0.15), (64.0, 0.5))
    weights: tuple[float | Piecewise, ...] | None = None
    regular_token: str | None = "[R]"
    sequential_token: str | None = "[S]"
    extreme_token: str | None = "[X]"

    def __post_init__(self):
        _ = self.mixture  # reports bad settings now

    @functools.cached_property
    def mixture(self) -> Mixture:
        """The denoisers as a mixture."""

        def corruptions(settings, token):
            return tuple(SpanCorruption(noise_density=r, mean_span_length=mu, mode_token=token) for mu, r in settings)

        members = (
            *corruptions(self.regular, self.regular_token),
            PrefixLM(suffix_share=self.suffix_share, mode_token=self.sequential_token),
            *corruptions(self.extreme, self.extreme_token),
        )
        names = (
            *(f"r_{mu:g}_{r:g}" for mu, r in self.regular),
            f"s_{self.suffix_share:g}",
            *(f"x_{mu:g}_{r:g}" for mu, r in self.extreme),
        )
        return Mixture(members, self.weights or (1.0,) * len(members), names)

    @property
    @override
    def parts(self) -> tuple[str, ...]:
        return self.mixture.parts

    @property
    @override
    def drawn(self) -> tuple[Objective, ...]:
        return self.mixture.drawn

    @override
    def refuses(self, architecture: Architecture) -> str | None:
        reason = self.mixture.refuses(architecture)
        return reason and f"{self.name} mixes objectives that refuse {architecture.value}: {reason}"

    @override
    def raw_length(self, lengths: Mapping[str, int], architecture: Architecture) -> int:
        return self.mixture.raw_length(lengths, architecture)

    @override
    def fit(self, lengths: Mapping[str, int], architecture: Architecture) -> Mixture:
        return self.mixture.fit(lengths, architecture)

    @override
    def corrupt(
        self, example: Mapping[str, np.ndarray], vocabulary: VocabularyInfo, rng: np.random.Generator, *, step: int = 0
    ) -> Example:
        return self.mixture.corrupt(example, vocabulary, rng, step=step)

    @override
    def restore(self, example: Example, vocabulary: VocabularyInfo) -> np.ndarray:
        return self.mixture.restore(example, vocabulary)
