"""Metrics of labels: accuracy, macro F1, correlations; each of (gold, predicted, weights), for resampling."""

from collections.abc import Sequence

import numpy as np


def accuracy(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> float:
    """The share that is right. Classes and predictions int [n], weights [n]."""
    return float((weights * (gold == predicted)).sum() / weights.sum())


def macro_f1(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> float:
    """The mean of the classes' F1 over the classes that occur among gold or predictions (as scikit-learn's "macro")."""
    classes = int(max(gold.max(), predicted.max())) + 1
    right = np.bincount(gold, weights * (gold == predicted), classes)
    support, given = np.bincount(gold, weights, classes), np.bincount(predicted, weights, classes)
    there = support + given > 0
    return float((2 * right[there] / (support + given)[there]).mean())


def pearson(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    g, p = (x - np.average(x, weights=weights) for x in (gold.astype(np.float64), predicted.astype(np.float64)))
    spread = np.sqrt((weights * g * g).sum() * (weights * p * p).sum())
    return float((weights * g * p).sum() / spread) if spread > 0 else 0.0


def spearman(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> float:
    """Spearman's: Pearson's of mean ranks, of rows repeated as often as their weight says."""
    from scipy import stats  # takes a second to import

    rows = np.repeat(np.arange(len(gold)), weights.astype(np.int64))
    ranks = [stats.rankdata(x[rows]) for x in (gold, predicted)]
    return pearson(*ranks, np.ones(len(rows)))


METRICS = {"accuracy": accuracy, "macro_f1": macro_f1, "pearson": pearson, "spearman": spearman}
"""By name; the higher the better."""


def resampled(
    name: str, gold: np.ndarray, predicted: np.ndarray, units: np.ndarray, *, samples: int, seed: int
) -> tuple[float, float]:
    """The central 95% of a metric over texts drawn with replacement (Efron 1979).

    Args:
      name: of `METRICS`.
      gold, predicted: [n].
      units: int [n], the text that each belongs to, from 0: tokens of a text err together.
      samples: resamplings.
      seed: of these.
    """
    chance, count = np.random.default_rng(seed), int(units.max()) + 1
    drawn: Sequence[float] = []
    for _ in range(samples):
        weights = np.bincount(chance.integers(0, count, count), minlength=count)[units]
        if weights.any():
            drawn.append(METRICS[name](gold, predicted, weights))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
