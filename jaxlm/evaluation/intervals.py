"""Metrics of sums over rows and their bootstrap intervals; means over seeds and Student's."""

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


def ratio(totals: np.ndarray) -> np.ndarray:
    """Of the two sums in `totals` [2, ...]; nan where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[0] / totals[1]


Value = Callable[[np.ndarray], np.ndarray]
"""A metric of rows by what they add up to, [K, ...] -> [...]."""


def estimate(statistics: np.ndarray, *, samples: int, seed: int | Sequence[int], value: Value = ratio) -> Estimate:
    """The median over prompts of a metric of all rows, with an interval from resampled rows.

    Args:
      statistics: float [K, prompts, rows], what a row adds to the K sums that the metric is made of; all 0 where a
        prompt has nothing for a row.
      samples: resamplings; 0 gives no interval.
      seed: of the resampling.
      value: the metric of the sums.
    """
    found = float(np.median(value(statistics.sum(-1)), axis=-1))
    if not samples or math.isinf(found):
        return Estimate(found)
    low, high = central(resampled(statistics, samples=samples, seed=seed, value=value))
    return Estimate(found, low, high)


def resampled(statistics: np.ndarray, *, samples: int, seed: int | Sequence[int], value: Value = ratio) -> np.ndarray:
    """The median over prompts with rows drawn with replacement, of [K, ..., prompts, rows]: [samples, ...].

    Rows are drawn together for all prompts, since prompts on the same row err together, and for whatever the other axes
    are: models that were asked the same.
    """
    (_, *shape, rows), chance = statistics.shape, np.random.default_rng(seed)
    flat = statistics.reshape(len(statistics), -1, rows)
    drawn, step = [], max(_AT_ONCE // rows, 1)
    for start in range(0, samples, step):
        counts = chance.multinomial(rows, np.full(rows, 1.0 / rows), size=min(step, samples - start))
        totals = np.stack([counts @ of.T for of in flat])
        drawn.append(np.median(value(totals.reshape(*totals.shape[:2], *shape)), axis=-1))
    return np.concatenate(drawn)


def over_seeds(drawn: np.ndarray, *, seed: int | Sequence[int]) -> np.ndarray:
    """Means over seeds drawn with replacement, [samples], of `drawn` [samples, seeds], values of resampled rows."""
    samples, seeds = drawn.shape
    chosen = np.random.default_rng(seed).integers(seeds, size=(samples, seeds))
    return np.take_along_axis(drawn, chosen, axis=1).mean(1)


def central(drawn: np.ndarray) -> tuple[float, float]:
    """The 95% in the middle of resampled values [samples]; what has no value is left out."""
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return float(low), float(high)
