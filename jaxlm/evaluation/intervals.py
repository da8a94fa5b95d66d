"""Ratios of sums over rows and their bootstrap intervals; means over seeds and Student's."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

_AT_ONCE = 2**22  # counts of resampled rows that are held at once


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
      value: the estimate.
      low, high: a 95% interval: the bootstrap's central part (Efron 1979), or Student's of a mean over seeds; None
        where no samples were drawn or there is one seed.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.value:.4f}{interval}"


def student(values: Sequence[float]) -> Estimate:
    """The mean over seeds and its 95% interval by Student's t.

    With so few runs the percentile bootstrap is too narrow (of three values it cannot leave their range); Student's t
    takes the values to be normally distributed.
    """
    from scipy import stats  # takes a second to import

    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


def estimate(
    sums: np.ndarray,
    weights: np.ndarray,
    *,
    samples: int,
    seed: int,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Estimate:
    """The median over prompts of the ratio of sums, with an interval from resampled rows.

    Rows are resampled together for all prompts, since prompts on the same row err together.

    Args:
      sums, weights: float [prompts, rows]; both 0 where a prompt has nothing for a row.
      samples: resamplings; 0 gives no interval.
      seed: of the resampling.
      transform: applied to each prompt's ratio; one that overflows is infinite.
    """

    def medians(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:  # [..., prompts] -> [...]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratios = sums / weights
            if transform is not None:
                ratios = transform(ratios)
        return np.median(ratios, axis=-1)

    value = float(medians(sums.sum(1), weights.sum(1)))
    if not samples or math.isinf(value):
        return Estimate(value)
    rows, chance = sums.shape[1], np.random.default_rng(seed)
    drawn, step = [], max(_AT_ONCE // rows, 1)
    for start in range(0, samples, step):
        counts = chance.multinomial(rows, np.full(rows, 1.0 / rows), size=min(step, samples - start))
        drawn.append(medians(counts @ sums.T, counts @ weights.T))
    low, high = np.nanquantile(np.concatenate(drawn), (0.025, 0.975))
    return Estimate(value, float(low), float(high))
