"""The studies' benchmark: what it writes of finished runs."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.study import found_by, laws
from jaxlm.studies.config import Finding, Grid, Ladder, Leg, Match, StudyConfig
from jaxlm.studies.jobs import Job, Size
from jaxlm.studies.ladder import LossSurface
from jaxlm.studies.results import Run
from jaxlm.training.report import Curve

LOSS = "validation/cross_entropy"
STUDY = StudyConfig(
    "study",
    (),
    {"kind": {"a": (), "b": ()}},
    (Leg("train"),),
    Grid(),
    seeds=(0, 1),
    findings=(Finding("a below b", {"leg": "train", "kind": "a"}, {"leg": "train", "kind": "b"}, LOSS),),
    matches=(Match("a to b", {"leg": "train", "kind": "a"}, {"leg": "train", "kind": "b"}),),
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is read of a run's configuration."""

    train_steps: int = 10


def run(kind, seed, *losses):
    size = Size(parameters=1, steps=10, tokens=1000, flops=1.0)
    job = Job(f"train-{kind}", STUDY.legs[0], kind, Trained(), (), (0, 1), size)
    steps = np.linspace(10 / len(losses), 10, len(losses))
    return Run({"kind": kind}, "train", job, seed, {LOSS: Curve(steps, np.array(losses))})


def test_what_is_written_of_finished_runs():
    """Measures by cell, the claim seed by seed, and the ratio of tokens; all of it JSON."""
    runs = [run("a", 0, 2.0, 1.0), run("a", 1, 3.0, 2.0), run("b", 0, 3.0, 1.5), run("b", 1, 4.0, 2.6)]
    found = json.loads(json.dumps(found_by(STUDY, runs), allow_nan=False))
    assert found["runs"] == 4
    assert [(entry["kind"], entry["mean"]) for entry in found["measures"]] == [("a", 1.5), ("b", pytest.approx(2.05))]
    (claim,) = found["claims"]
    assert (claim["claim"], claim["metric"], claim["seeds"]) == ("a below b", LOSS, [0, 1])
    assert claim["difference"]["values"] == pytest.approx([0.5, 0.6])
    assert claim["verdict"] == "not decided"  # t(0.975, 1) = 12.7 times 0.05
    (match,) = found["tokens_to_the_same_loss"]
    assert match["ratio"]["values"] == pytest.approx([1000 / 750, 1000 / 700]) == match["ratios"]
    assert match["reached"] == ["between two evaluations"] * 2 and match["in_words"].startswith("1.38 (")


def test_the_law_of_a_ladder():
    """Its numbers, of losses that it made."""
    law = LossSurface(E=1.5, A=20.0, alpha=0.4, B=30.0, beta=0.3)
    runs = []
    for parameters in (1e4, 1e5, 1e6):
        for tokens in (1e5, 1e6, 1e7):
            made = run(f"{parameters:g}/{tokens:g}", 0, law(parameters, tokens))
            size = Size(int(parameters), 10, int(tokens), 6 * parameters * tokens)
            runs.append(dataclasses.replace(made, job=dataclasses.replace(made.job, size=size)))
    (found,) = json.loads(json.dumps(laws(Ladder("train", resamples=2), runs), allow_nan=False))
    assert found["runs"] == 9 and found["error"] < 1e-3
    assert found["alpha"]["value"] == pytest.approx(0.4, rel=0.02)
    assert found["parameters_exponent"]["value"] == pytest.approx(0.3 / 0.7, rel=0.02)


def test_one_seed_and_missing_runs():
    """Nothing that JSON lacks is written, and what is missing is said."""
    found = json.loads(json.dumps(found_by(STUDY, [run("a", 0, 1.0)]), allow_nan=False))
    assert found["measures"][0]["low"] is None
    assert found["claims"][0]["verdict"] == "runs are missing" and found["claims"][0]["difference"] is None
    assert found["tokens_to_the_same_loss"] == []
