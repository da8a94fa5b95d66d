"""Intervals over seeds, and tokens to a loss, on curves written by hand."""

import math
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.studies.config import Match
from jaxlm.studies.report import _matches
from jaxlm.studies.results import Reached, Run, interval, matched, tokens_to
from jaxlm.studies.store import Store
from jaxlm.training.report import Curve

METRIC = "validation/cross_entropy"


def run(leg, losses, *, seed=0, cell=None, tokens_per_step=100, first=0):
    """A run evaluated every 10 steps after step `first`."""
    steps = first + 10 * np.arange(1, len(losses) + 1)
    size = SimpleNamespace(steps=10 * len(losses), tokens=10 * len(losses) * tokens_per_step)
    job = SimpleNamespace(size=size, run=SimpleNamespace(train_steps=first + size.steps))
    return Run(cell or {"kind": leg}, leg, job, seed, {METRIC: Curve(steps, np.array(losses))})


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0  # t(0.975, 2) = 4.3027, standard error 1 / sqrt(3)
    assert found.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6) and found.low == 4.0 - found.high
    assert math.isnan(interval([1.0]).low)


def test_tokens_to_a_loss_are_read_between_evaluations():
    curve = run("a", [4.0, 3.0, 2.0, 2.5])
    assert tokens_to(curve, METRIC, 2.5) == (Reached.BETWEEN, 2500)  # half way from 3.0 to 2.0, the first time
    assert tokens_to(curve, METRIC, 5.0) == (Reached.EARLIER, 1000)
    assert tokens_to(curve, METRIC, 1.9) == (Reached.NEVER, 4000)
    # A run that goes on from step 50 counts its own tokens.
    assert tokens_to(run("a", [4.0, 2.0], first=50), METRIC, 3.0) == (Reached.BETWEEN, 1500)


def test_a_match_is_the_ratio_of_tokens_at_the_scratch_runs_last_loss():
    match = Match("m", {"leg": "adapt", "kind": "x"}, {"leg": "scratch"})
    scratch = [run("scratch", [4.0, 3.0, 2.0], seed=seed) for seed in (0, 1)]
    adapted = [run("adapt", [3.0, 1.0], seed=seed, cell={"kind": "x"}) for seed in (0, 1)]  # at 2.0 half way
    other = [run("adapt", [0.0, 0.0], seed=0, cell={"kind": "y"})]
    found = matched(match, scratch + other + adapted)
    assert found.ratio.values == pytest.approx((2.0, 2.0)) and found.loss == (2.0, 2.0)
    never = matched(match, [*scratch, run("adapt", [3.0, 2.5], cell={"kind": "x"})])
    assert never.ratio is None and never.below == pytest.approx(1.5) and never.reached == (Reached.NEVER,)
    assert str(never) == "below 1.50 (by seed < 1.50)"
    # Two seeds of three get there: what is known of the mean is what each says.
    scratch.append(run("scratch", [4.0, 3.0, 2.0], seed=2))
    some = matched(match, [*scratch, *adapted, run("adapt", [3.0, 2.5], seed=2, cell={"kind": "x"})])
    assert some.ratio is None and some.at_least is None and some.below == pytest.approx((2.0 + 2.0 + 1.5) / 3)
    assert "| m | below 1.83 (by seed 2.00, 2.00, < 1.50) |" in _matches([("m", some)])
    assert matched(match, scratch) is None


def test_a_ratio_that_the_first_evaluation_bounds_is_no_ratio():
    """Seeds that were there at their first look may have been long before; an interval of these would be of looks."""
    match = Match("m", {"leg": "adapt"}, {"leg": "scratch"})
    scratch = [run("scratch", [4.0, 3.0, 2.0], seed=seed) for seed in (0, 1, 2)]
    early, between, never = [1.9, 1.5], [3.0, 1.0], [3.0, 2.5]

    def of(*curves):
        return matched(match, [*scratch, *(run("adapt", losses, seed=seed) for seed, losses in enumerate(curves))])

    found = of(early, between, early)
    assert found.ratio is None and found.below is None
    assert found.ratios == (3.0, 2.0, 3.0) and found.at_least == pytest.approx(8 / 3)
    assert str(found) == "at least 2.67 (by seed ≥ 3.00, 2.00, ≥ 3.00)"
    found = of(early, between, never)
    assert found.ratio is found.at_least is found.below is None
    assert str(found) == "not known (by seed ≥ 3.00, 2.00, < 1.50)"
    assert str(of(between, between, between)) == "2.00 (2.00 to 2.00), cheaper" and str(of(between)) == "2.00"


def test_workers_are_counted_while_they_live_and_when_they_were_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.studies.store._HEARTBEAT", 0.01)
    folder = Store(tmp_path)
    with folder.alive():
        (note,) = tmp_path.glob("workers/*.alive")
        os.utime(note, (0, 0))
        while not note.stat().st_mtime:  # a sign of life
            time.sleep(0.01)
    assert 0 < folder.worker_seconds < 60
    killed = tmp_path / "workers" / f"{1000.5:.3f}-7.alive"
    killed.touch()
    os.utime(killed, (1100.5, 1100.5))
    os.utime(note, (1.0, 1.0))
    assert folder.worker_seconds == pytest.approx(100.0)
