"""The report's account of finetuning sweeps and probes: means over what they should be, the choice by validation."""

import pytest

from jaxlm.studies.learned_section import learned_section
from jaxlm.studies.results import Run


def result(validation, test, chosen, *, how="finetuning", diverged=False):
    """A sweep of two rates and two seeds whose metrics are these by rate, 0.1 apart between seeds."""
    trials = [
        {"setting": rate, "seed": seed, "validation": {"accuracy": v + 0.1 * seed}, "test": {}, "diverged": diverged}
        for rate, v in validation.items()
        for seed in (0, 1)
    ]
    return {
        "primary": "accuracy",
        "metrics": {"accuracy": {"value": test}},
        "chance": 0.5,
        "how": how,
        "setting": "learning rate",
        "chosen": chosen,
        "spread": 0.07,
        "trials": trials,
    }


def run(cell, seed, scores, leg="pretrain"):
    return Run({"causal": cell}, leg, None, seed, {}, {"labels": scores})


def test_the_table_has_every_rate_the_choice_and_both_spreads(tmp_path):
    runs = [
        run("0%", 0, {"sentiment": result({1e-3: 0.5, 1e-2: 0.7}, 0.6, 1e-2)}),
        run("0%", 1, {"sentiment": result({1e-3: 0.7, 1e-2: 0.9}, 0.8, 1e-2)}),
        run("100%", 0, {"sentiment": result({1e-3: 0.8, 1e-2: 0.2}, 0.9, 1e-3, diverged=True)}),
        run("100%", 0, {"sentiment": result({1e-3: 0.1, 1e-2: 0.2}, 0.1, 1e-2)}, leg="continued"),
        run("100%", 1, {"hellaswag": {"primary": "accuracy", "metrics": {"accuracy": {"value": 0.3}}, "chance": 0.25}}),
    ]
    text = learned_section("pretrain", "labels", runs, tmp_path)
    assert "**sentiment** (finetuning): accuracy, by learning rate." in text and "hellaswag" not in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "%" in line[:8]]
    # Mean over seeds of a model is 0.05 above its first; then over models.
    assert rows[0][:4] == ["0%", "0.6500", "0.8500", "0.01 (at the edge)"]
    half = 12.7062 * 0.1414214 / 2**0.5  # Student's t for one degree of freedom
    assert rows[0][4] == f"0.7000 ± {half:.4f}" and rows[0][5:] == ["0.0700", ""]
    assert rows[1] == ["100%", "0.8500", "0.2500", "0.001 (at the edge)", "0.9000", "0.0700", "4"]
    assert (tmp_path / "pretrain_labels_sentiment_settings.png").stat().st_size > 5000


def test_legs_without_learnt_tasks_have_no_section(tmp_path):
    assert learned_section("pretrain", "labels", [run("0%", 0, {})], tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_a_probe_of_one_model_has_no_interval(tmp_path):
    probe = result({0.1: 0.4, 1.0: 0.6}, 0.5, 1.0, how="probe") | {"spread": None}
    text = learned_section("pretrain", "labels", [run("0%", 0, {"words": probe})], tmp_path)
    (row,) = (line for line in text.splitlines() if line.startswith("| 0%"))
    assert row.split("|")[5].strip() == "0.5000" and row.split("|")[6].strip() == ""
    assert pytest.approx(0.65) == float(row.split("|")[3])
