"""The table in docs/interchange.md is that of the committed results, which are within the tolerances."""

import json

import pytest

from tests.checkpoints.huggingface.family_cases import CASES


def results():
    from benchmarks.interchange_families import RESULTS

    return json.loads(RESULTS.read_text())["cases"]


def test_the_guide_shows_the_committed_results():
    from benchmarks.interchange_families import GUIDE, guide_with_results

    text = GUIDE.read_text()
    assert "<!-- families -->" in text
    assert guide_with_results(text) == text, "docs/interchange.md is out of date; run benchmarks.interchange families"


def test_every_family_was_measured():
    assert set(results()) == {case.name for case in CASES} | {"openelm"}


@pytest.mark.parametrize("name", [case.name for case in CASES] + ["openelm"])
def test_results_are_within_the_tolerances(name):
    row = results()[name]
    assert row["bit_identical"] and max(row.get(key, 0.0) for key in ("logits", "hidden", "beginnings")) <= 1e-5
    assert row.get("gradient", 0.0) <= 1e-4 and min(row.get("features", {}).values(), default=1.0) >= 1e-3
    assert row.get("greedy", {"same": 0, "clear": 0})["same"] == row.get("greedy", {"clear": 0})["clear"]
