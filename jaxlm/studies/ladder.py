"""Scaling laws from a ladder of runs: L(N, D), a power law in one variable, bootstrap intervals, what to train next.

    L(N, D) = E + A / N^alpha + B / D^beta

for N parameters and D tokens (Hoffmann et al. 2022, arXiv 2203.15556, equation 2), fitted as in its approach 3: the
Huber loss, delta 1e-3, of the logarithms' differences, minimised by L-BFGS from a grid of starts, where log L is the
log-sum-exp of the terms' logarithms. N and D are divided by their geometric means while fitting, so that terms and
exponents hardly correlate; without that, and with default tolerances, such fits stop early (Besiroglu et al. 2024,
arXiv 2404.10102).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

_DELTA = 1e-3  # of the Huber loss: differences above 0.1% count linearly
_LARGEST_EXPONENT = 5.0
_SMALLEST_SHARE = 1e-6  # of a term in the loss: E, A or B may vanish, their logarithms may not
_FEWEST_LEVELS = 3  # two give a slope; a third, how the slope ends in E
_MOST_DRAWS = 20  # resamples tried for each one kept


@dataclasses.dataclass(frozen=True)
class Points:
    """What the runs of a ladder came to, one entry a run: float [n] each.

    Attributes:
      parameters: N.
      tokens: D, all that the run has seen.
      flops: C, forward and backward.
      loss: L, nats per target.
    """

    parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray

    def __post_init__(self):
        for field in dataclasses.fields(self):
            values = np.asarray(getattr(self, field.name), np.float64)
            if not np.all(np.isfinite(values) & (values > 0)):
                raise ValueError(f"A ladder's {field.name} must be finite and above 0; got {values.tolist()}.")
            object.__setattr__(self, field.name, values)

    def __len__(self) -> int:
        return len(self.loss)

    def __getitem__(self, chosen: np.ndarray) -> "Points":
        """Those at an index array or mask."""
        return Points(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    @property
    def flops_per_parameter_and_token(self) -> float:
        """C / (N D) at the largest size, about 6: the one nearest to what is to be extrapolated to."""
        largest = self.parameters == self.parameters.max()
        return float(np.mean(self.flops[largest] / (self.parameters[largest] * self.tokens[largest])))

    @property
    def efficient(self) -> "Points":
        """Those that no run of fewer FLOPs undercuts, by FLOPs; of several seeds the mean."""
        keys = list(zip(self.flops.tolist(), self.parameters.tolist(), self.tokens.tolist()))
        kept, best = [], math.inf
        for key in sorted(set(keys)):
            loss = float(np.mean([of for of, own in zip(self.loss, keys) if own == key]))
            if loss < best:
                kept.append((key[1], key[2], key[0], loss))
                best = loss
        return Points(*np.array(kept).T)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best use of a budget: `flops` = C go to `parameters` = N and `tokens` = D, for a loss of `loss`."""

    flops: float
    parameters: float
    tokens: float
    loss: float


@dataclasses.dataclass(frozen=True)
class LossSurface:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        """The loss of N parameters after D tokens."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    @property
    def parameters_exponent(self) -> float:
        """a of N_opt ~ C^a, which is beta / (alpha + beta); tokens grow with the rest, 1 - a."""
        return self.beta / (self.alpha + self.beta) if self.alpha + self.beta else math.nan

    def optimum(self, flops: float, flops_per_parameter_and_token: float = 6.0) -> Optimum:
        """The lowest loss for C = factor N D (equation 4); NaN where it falls with only one of both, or neither."""
        product = flops / flops_per_parameter_and_token
        if self.alpha <= 0 or self.beta <= 0:
            return Optimum(flops, math.nan, math.nan, math.nan)
        # Logarithms: A and B are powers of ten large where exponents are.
        log_g = (math.log(self.alpha * self.A) - math.log(self.beta * self.B)) / (self.alpha + self.beta)
        parameters = math.exp(log_g + self.parameters_exponent * math.log(product))
        tokens = product / parameters
        return Optimum(flops, parameters, tokens, float(self(parameters, tokens)))


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """L(x) = E + A / x^alpha: loss against parameters, tokens or FLOPs alone."""

    E: float
    A: float
    alpha: float

    def __call__(self, x: np.ndarray | float) -> np.ndarray | float:
        """The loss at x."""
        return self.E + self.A / x**self.alpha


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A fitted number and its percentile bootstrap interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Fitted[Law]:
    """A fit to all runs, and to each resample of them.

    Attributes:
      law: of all runs.
      resampled: of runs drawn with replacement.
      error: root mean square of log(fit / measured): 0.01 is 1%.
    """

    law: Law
    resampled: tuple[Law, ...]
    error: float

    def estimate(self, number: Callable[[Law], float], coverage: float = 0.95) -> Estimate:
        """A number of the law, with the bounds that hold `coverage` of the resamples' numbers."""
        drawn = np.array([number(law) for law in self.resampled])
        tail = 100 * (1 - coverage) / 2
        low, high = np.percentile(drawn, (tail, 100 - tail)) if np.all(np.isfinite(drawn)) else (math.nan, math.nan)
        return Estimate(number(self.law), float(low), float(high))


def fit_surface(points: Points, *, resamples: int = 200, seed: int = 0) -> Fitted[LossSurface]:
    """Fits L(N, D).

    Args:
      points: at least three sizes, three numbers of tokens, and six pairs of the two.
      resamples: of the bootstrap over runs.
      seed: of the draws.

    Raises:
      ValueError: the points cannot tell the law's numbers apart.
    """
    variables = np.stack([points.parameters, points.tokens])
    names = ("sizes", "numbers of tokens")
    fitted, draws, error = _fit(variables, points.loss, names, 6, resamples, seed)

    def law(numbers: np.ndarray) -> LossSurface:
        E, A, B, alpha, beta = numbers
        return LossSurface(float(E), float(A), float(alpha), float(B), float(beta))

    return Fitted(law(fitted), tuple(map(law, draws)), error)


def fit_power_law(
    x: Sequence[float], loss: Sequence[float], *, what: str = "values", resamples: int = 200, seed: int = 0
) -> Fitted[PowerLaw]:
    """Fits L(x) the same way.

    Args:
      x: parameters, tokens or FLOPs, [n].
      loss: [n].
      what: x in words, for the error.
      resamples: of the bootstrap.
      seed: of the draws.

    Raises:
      ValueError: fewer than four different x.
    """
    x = np.asarray(x, np.float64)
    fitted, draws, error = _fit(x[None], np.asarray(loss, np.float64), (what,), 4, resamples, seed)
    return Fitted(PowerLaw(*map(float, fitted)), tuple(PowerLaw(*map(float, of)) for of in draws), error)


def _fit(
    variables: np.ndarray, loss: np.ndarray, names: Sequence[str], fewest: int, resamples: int, seed: int
) -> tuple[np.ndarray, list[np.ndarray], float]:
    """E, the terms' factors and their exponents, [1 + 2 k] for variables [k, n]; those of the resamples; the error."""
    problem = _too_few(variables, names, fewest)
    if problem:
        raise ValueError(problem)
    centre = np.log(variables).mean(axis=1)
    logs, targets = np.log(variables) - centre[:, None], np.log(loss)
    best = _best(logs, targets, _starts(len(variables), targets))
    rng, draws = np.random.default_rng(seed), []
    for _ in range(_MOST_DRAWS * resamples):
        if len(draws) == resamples:
            break
        drawn = rng.integers(len(loss), size=len(loss))
        if _too_few(variables[:, drawn], names, fewest) is None:
            draws.append(_best(logs[:, drawn], targets[drawn], [best, *_starts(len(variables), targets, few=True)]))
    if len(draws) < resamples:
        raise ValueError(
            f"Of {len(loss)} runs drawn with replacement too few differ to fit them again; "
            f"run more sizes, tokens or seeds."
        )
    error = math.sqrt(np.mean((_logsumexp(_terms(best, logs)) - targets) ** 2))
    return _uncentred(best, centre), [_uncentred(draw, centre) for draw in draws], error


def _too_few(variables: np.ndarray, names: Sequence[str], fewest: int) -> str | None:
    """Why points cannot be fitted, or None."""
    levels = [len(np.unique(values)) for values in variables]
    wanted = _FEWEST_LEVELS if len(variables) > 1 else fewest
    for name, count in zip(names, levels):
        if count < wanted:
            return f"A fit needs runs at {wanted} different {name} or more, not at {count}; add levels to the study."
    different = len(np.unique(variables, axis=1).T)
    if different < fewest:
        return (
            f"A fit needs {fewest} runs that differ in {' or '.join(names)}, not {different}; add cells to the study."
        )
    return None


def _starts(count: int, targets: np.ndarray, few: bool = False) -> list[np.ndarray]:
    """Shares of the terms in the middle loss times exponents, as logarithms: [1 + 2 count] each."""
    irreducible = (0.1, 0.6) if few else (0.02, 0.3, 0.6, 0.9)
    splits = {1: ((1.0,),), 2: ((0.5, 0.5),) if few else ((0.5, 0.5), (0.15, 0.85), (0.85, 0.15))}[count]
    exponents = (0.3,) if few else (0.1, 0.3, 0.8)
    middle = float(np.median(targets))
    return [
        np.array([math.log(share), *(math.log((1 - share) * part) for part in split), *powers])
        + np.array([middle] * (1 + count) + [0.0] * count)
        for share, split, powers in itertools.product(irreducible, splits, itertools.product(exponents, repeat=count))
    ]


def _best(logs: np.ndarray, targets: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
    from scipy.optimize import minimize  # takes a second to import

    count = len(logs)
    least = float(targets.min()) + math.log(_SMALLEST_SHARE)
    most = float(targets.max()) + math.log(100.0)
    bounds = [(least, float(targets.min())), *[(least, most)] * count, *[(0.0, _LARGEST_EXPONENT)] * count]
    options = {"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-10}
    lows, highs = zip(*bounds)
    found = [
        minimize(_huber, np.clip(start, lows, highs), (logs, targets), "L-BFGS-B", True, bounds=bounds, options=options)
        for start in starts
    ]
    return min(found, key=lambda result: result.fun).x


def _terms(numbers: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Logarithms of the loss's terms, [1 + k, n]."""
    count = len(logs)
    irreducible = np.full((1, logs.shape[1]), numbers[0])
    return np.concatenate([irreducible, numbers[1 : 1 + count, None] - numbers[1 + count :, None] * logs])


def _logsumexp(terms: np.ndarray) -> np.ndarray:
    top = terms.max(axis=0)
    return top + np.log(np.exp(terms - top).sum(axis=0))


def _huber(numbers: np.ndarray, logs: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """The objective over delta squared, and its gradient: at the scale of 1, where tolerances mean something."""
    terms = _terms(numbers, logs)
    total = _logsumexp(terms)
    difference = (total - targets) / _DELTA
    size = np.abs(difference)
    value = np.where(size <= 1, 0.5 * difference**2, size - 0.5).sum()
    by_total = np.clip(difference, -1, 1) / _DELTA
    by_terms = np.exp(terms - total) * by_total  # [1 + k, n]
    return float(value), np.concatenate([by_terms.sum(axis=1), -(by_terms[1:] * logs).sum(axis=1)])


def _uncentred(numbers: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """E, the factors and the exponents for variables that are not divided by their geometric means."""
    count = len(centre)
    exponents = numbers[1 + count :]
    return np.concatenate([np.exp(numbers[:1]), np.exp(numbers[1 : 1 + count] + exponents * centre), exponents])
