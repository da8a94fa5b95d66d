"""Linear probes: what a linear map reads off a model's frozen features (Alain and Bengio 2016, arXiv 1610.01644).

Features are computed once; the probe is convex, so that it has one solution and no seed. Its strength of regularisation
is chosen on the validation split.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, override

import numpy as np

from jaxlm.evaluation.intervals import Estimate
from jaxlm.evaluation.label_metrics import resampled
from jaxlm.evaluation.learned import LearnedResult, LearnedTask, Trial, best_setting, features_program
from jaxlm.evaluation.subject import Subject

_TOLERANCE = 1e-6  # of the largest entry of the gradient


@dataclasses.dataclass(frozen=True)
class LinearProbe(LearnedTask):
    """A linear probe of the last layer: logistic regression on pooled states or on words, ridge regression on scores.

    Features of a pair of texts are |u - v| and u * v of their vectors (SentEval, arXiv 1803.05449, 2).

    Attributes:
      strengths: L2 penalties that are tried, on features of variance 1 and the mean loss.
    """

    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def __post_init__(self):
        super().__post_init__()
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(f"LinearProbe {self.name!r} needs strengths above 0; got {self.strengths}.")

    @override
    def evaluate(
        self, subject: Subject, *, samples: int = 1000, seed: int = 0, report: Callable[[str], None] = print
    ) -> tuple[LearnedResult, Iterator[dict[str, Any]]]:
        opened = self.opened(subject.pretrained, subject.parallel)
        read = features_program(dataclasses.replace(opened.form, head_size=None))
        params = {"body": opened.body}
        features = {
            split: opened.everything(split, lambda batch: read(params, batch)).astype(np.float64)
            for split in opened.examples
        }
        mean, scale = features["train"].mean(0), features["train"].std(0)
        features = {split: (x - mean) / np.where(scale > 1e-8, scale, 1.0) for split, x in features.items()}
        gold, _ = opened.gold("train")
        trials, outputs = [], {}
        for strength in self.strengths:
            weights, bias = fit(features["train"], gold, len(opened.classes), strength)
            found = {split: features[split] @ weights + bias for split in ("validation", "test")}
            trials.append(Trial(strength, None, **{split: opened.judged(split, x) for split, x in found.items()}))
            outputs[strength] = found["test"]
        chosen = best_setting(trials, self.labels.primary)
        (best,) = (trial for trial in trials if trial.setting == chosen)
        gold, texts = opened.gold("test")
        predicted = self.labels.predictions(outputs[chosen])
        metrics = {}
        for name, value in best.test.items():
            bounds = resampled(name, gold, predicted, texts, samples=samples, seed=seed) if samples else ()
            metrics[name] = Estimate(value, *bounds)
        result = opened.result(trials, metrics, spread=None, how="probe", setting="L2", chosen=chosen)
        return result, ({"task": self.name, **dataclasses.asdict(trial)} for trial in trials)


def fit(features: np.ndarray, gold: np.ndarray, classes: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The probe: (weights [D, C], bias [C]) of multinomial logistic regression, or ([D], scalar) of ridge regression.

    Minimises the mean loss (nats, or half the squared error) + strength / 2 * |weights|^2; the bias is free.

    Args:
      features: float64 [n, D].
      gold: classes int [n]; or scores [n] where there are no classes.
      classes: their number; 0 for scores.
      strength: of the penalty.
    """
    count, width = features.shape
    if not classes:
        centred, shift = features - features.mean(0), gold.mean()
        gram = centred.T @ centred / count + strength * np.eye(width)
        weights = np.linalg.solve(gram, centred.T @ (gold - shift) / count)
        return weights, np.asarray(shift - features.mean(0) @ weights)
    from scipy import optimize, special  # takes a second to import

    wanted = np.eye(classes)[gold]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[: width * classes].reshape(width, classes), flat[width * classes :]
        logits = features @ weights + bias
        log_z = special.logsumexp(logits, axis=1)
        nats = (log_z - (wanted * logits).sum(1)).mean()
        error = (np.exp(logits - log_z[:, None]) - wanted) / count
        gradient = np.concatenate([(features.T @ error + strength * weights).ravel(), error.sum(0)])
        return nats + 0.5 * strength * (weights**2).sum(), gradient

    found = optimize.minimize(
        loss,
        np.zeros((width + 1) * classes),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "gtol": _TOLERANCE, "ftol": 0.0, "maxcor": 20},
    )
    return found.x[: width * classes].reshape(width, classes), found.x[width * classes :]
