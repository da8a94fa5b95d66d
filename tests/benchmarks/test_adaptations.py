"""The studies' benchmark: what it makes of the rows of `cells.csv`."""

import json

import pytest

from benchmarks.adaptations import claim
from jaxlm.studies.config import Finding

LOSS = "validation/cross_entropy"
CLAIM = Finding("a below b", {"leg": "train", "kind": "a"}, {"leg": "train", "kind": "b"}, LOSS)


def row(kind, seed, loss, leg="train"):
    return {"kind": kind, "leg": leg, "seed": str(seed), LOSS: str(loss)}


def test_a_claim_of_rows():
    """Differences seed by seed, of the seeds that both sides have; nothing of other legs."""
    rows = [row("a", 0, 1.0), row("a", 1, 2.0), row("a", 7, 9.0)]
    rows += [row("b", 0, 1.5), row("b", 1, 2.6), row("b", 1, 0.0, leg="other")]
    found = json.loads(json.dumps(claim(CLAIM, rows)))
    assert (found["claim"], found["metric"], found["seeds"]) == ("a below b", LOSS, [0, 1])
    assert found["difference"]["values"] == pytest.approx([0.5, 0.6])
    assert found["difference"]["mean"] == pytest.approx(0.55)
    assert found["verdict"] == "not decided"  # t(0.975, 1) = 12.7 times 0.05
    rows += [row(kind, seed, loss) for seed in (2, 3) for kind, loss in (("a", 1.0), ("b", 1.55))]
    assert claim(CLAIM, rows)["verdict"] == "holds"


def test_a_claim_whose_runs_are_missing_says_so():
    missing = claim(CLAIM, [row("a", 0, 1.0)])
    assert missing["verdict"] == "runs are missing" and missing["difference"] is None
    unmeasured = claim(CLAIM, [row("a", 0, 1.0), row("b", 0, "")])  # a column that other runs have
    assert unmeasured["verdict"] == "no such metric" and unmeasured["difference"] is None
