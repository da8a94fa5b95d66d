"""Claims on scores written by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.studies.config import Finding
from jaxlm.studies.findings import Verdict, decide, findings_section
from jaxlm.studies.results import Run, answered
from jaxlm.training.report import Curve

LOSS = "validation/cross_entropy"
CLAIM = Finding("a below b", {"leg": "train", "kind": "a"}, {"leg": "train", "kind": "b"})


def run(kind, loss, seed=0, scores=None, leg="train"):
    curve = Curve(np.array([1]), np.array([loss]))
    asked = {task: {"primary": "accuracy", "metrics": metrics} for task, metrics in (scores or {}).items()}
    return Run({"kind": kind}, leg, SimpleNamespace(), seed, {LOSS: curve}, {"zero": asked} if asked else {})


def runs(a, b):
    return [run("a", x, seed) for seed, x in enumerate(a)] + [run("b", x, seed) for seed, x in enumerate(b)]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.4, 3.6], Verdict.HOLDS),  # seeds differ more than the two kinds, but pair by pair
        ([1.5, 2.4, 3.6], [1.0, 2.0, 3.0], Verdict.OPPOSITE),
        ([1.0, 2.0, 3.0], [1.5, 1.4, 3.6], Verdict.UNDECIDED),
        ([1.0], [2.0], Verdict.ONE_SEED),
        ([1.0, 2.0, math.nan], [1.5, 2.5, 3.5], Verdict.NOT_FINITE),
        ([1.0], [], Verdict.MISSING),
    ],
)
def test_a_claim_is_decided_by_its_interval(a, b, verdict):
    found = decide(CLAIM, runs(a, b))
    assert found.verdict is verdict
    assert f"| a below b | {verdict.value} |" in findings_section([found], 3)


def test_the_difference_is_taken_seed_by_seed():
    found = decide(CLAIM, [*runs([1.0, 2.0], [1.5, 2.7]), run("a", 9.0, seed=7), run("b", 0.0, leg="other")])
    assert found.difference.values == pytest.approx((0.5, 0.7))
    half = 12.7062 * 0.1 / 1  # t(0.975, 1); both values are 0.1 off their mean
    assert found.difference.high - found.difference.mean == pytest.approx(half, rel=1e-4)
    assert "| 2 of 3 |" in findings_section([found], 3)  # seed 7 has one side alone


def test_seeds_in_which_a_task_failed_are_left_out():
    def asked(seed, kind, **tasks):
        found = run(kind, 0, seed, {task: {"nll": {"value": value}} for task, value in tasks.items()})
        if "y" not in tasks:
            found.failures["zero"] = {"y": "no rows"}
        return found

    found = [
        asked(0, "a", x=1.0),
        asked(0, "b", x=2.0, y=1.0),
        asked(1, "a", x=1.0, y=1.0),
        asked(1, "b", x=4.0, y=1.0),
    ]
    of_all, of_one, of_other = (Finding("c", CLAIM.less, CLAIM.more, f"zero{task}/nll") for task in ("", "/x", "/y"))
    assert decide(of_all, found).difference.values == (1.5,) and decide(of_all, found).failed == (0,)
    assert decide(of_one, found).difference.values == (1.0, 3.0)
    assert (
        decide(of_other, found[:2]).verdict is Verdict.FAILED and decide(of_other, found[:1]).verdict is Verdict.MISSING
    )


def test_a_score_is_the_mean_over_tasks_or_one_tasks():
    def metrics(nll, accuracy=0.5):
        return {"gold_nll": {"value": nll}, "accuracy": {"value": accuracy}}

    asked = [
        run("a", 0, 0, {"x": metrics(1.0), "y": metrics(3.0)}),
        run("b", 0, 0, {"x": metrics(2.0), "y": metrics(5.0)}),
    ]
    claim = Finding("nll", CLAIM.less, CLAIM.more, "zero/gold_nll")
    assert decide(claim, asked).difference.mean == pytest.approx(3.5 - 2.0)
    of_one = Finding("nll", CLAIM.less, CLAIM.more, "zero/x/gold_nll")
    assert decide(of_one, asked).difference.mean == pytest.approx(1.0)
    assert decide(Finding("nll", CLAIM.less, CLAIM.more, "zero/z/gold_nll"), asked).verdict is Verdict.NO_METRIC
    in_one = [*asked[:1], run("b", 0, 0, {"x": metrics(2.0), "y": {"accuracy": {"value": 0.5}}})]
    assert decide(claim, in_one).verdict is Verdict.NO_METRIC
    without = {"accuracy": {"value": 0.5}}  # such as a task that is not about texts' likelihoods
    more = [
        run("a", 0, 0, {"x": metrics(1.0), "y": metrics(3.0), "w": without}),
        run("b", 0, 0, {"x": metrics(2.0), "y": metrics(5.0), "w": without}),
    ]
    assert decide(claim, more).difference.mean == pytest.approx(3.5 - 2.0)
    unknown = Finding("nll", CLAIM.less, CLAIM.more, "seconds")  # of training, without a prefix
    assert decide(unknown, asked).verdict is Verdict.NO_METRIC
    table = answered(asked, "train", "zero", "gold_nll")
    assert list(table) == ["x", "y", "mean"] and table["mean"]["b"].mean == 3.5
    assert math.isnan(table["mean"]["b"].low)
