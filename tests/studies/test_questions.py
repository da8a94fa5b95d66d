"""What a report says of evaluations: intervals over rows and seeds, maps of the grid, prompts, tasks that failed."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.evaluation.intervals import estimate
from jaxlm.evaluation.measures import Continuation, RankClassification
from jaxlm.studies import pictures
from jaxlm.studies.config import Finding, Grid, Leg, StudyConfig
from jaxlm.studies.pictures import Panel, heat_maps, no_map
from jaxlm.studies.questions_section import grid_section, questions_section
from jaxlm.studies.results import Run, cell_name, interval
from jaxlm.studies.row_scores import bootstrapped

RANKED = RankClassification()
ASKED = ("gin_configs/evaluation/zero_shot.gin", "EVALUATION_DATA = 'nowhere'")
SAMPLES = 300


def config(*tasks, samples=SAMPLES):
    """Of an evaluation, as far as intervals ask for it."""
    named = tuple(SimpleNamespace(name=name, measure=measure) for name, measure in tasks)
    return SimpleNamespace(tasks=named, samples=samples, seed=0)


def answers(folder, seed, by_task):
    """(scores, file of examples) of {task: accuracies [prompts, rows]}; every metric is the same number."""
    scores, lines = {}, []
    for task, values in by_task.items():
        values = np.asarray(values, float)
        prompts = {f"prompt {k}": {"accuracy": row.mean()} for k, row in enumerate(values)}
        scores[task] = {
            "primary": "accuracy",
            "metrics": {"accuracy": {"value": float(np.median(values.mean(1)))}},
            "prompts": prompts,
            "chance": 0.5,
            "rows": values.shape[1],
        }
        for k, row in enumerate(values):
            lines += [
                {"task": task, "prompt": f"prompt {k}", "row": i, "metrics": {"accuracy": [value, 1.0]}}
                for i, value in enumerate(row)
            ]
    path = folder / f"examples{seed}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return scores, path


def run(folder, seed, by_task, cell="a", leg="train"):
    scores, path = answers(folder, f"{leg}{cell}{seed}", by_task)
    return Run({"kind": cell}, leg, None, seed, {}, {"own": scores}, {}, {"own": path})


RIGHT = np.random.default_rng(0).random((3, 2, 40)) < [[[0.3], [0.5]], [[0.5], [0.4]], [[0.7], [0.9]]]


def test_bars_have_the_interval_of_seeds_and_rows_drawn_with_replacement(tmp_path):
    """Against the two factors drawn one sample at a time."""
    runs = [run(tmp_path, seed, {"t": right}) for seed, right in enumerate(RIGHT)]
    bounds, apart = bootstrapped(runs, "own", config(("t", RANKED)))
    rows = np.random.default_rng((0, 0)).multinomial(40, np.full(40, 1 / 40), size=SAMPLES)
    seeds = np.random.default_rng((0, 2**32)).integers(3, size=(SAMPLES, 3))
    drawn = []
    for counts, chosen in zip(rows, seeds):
        by_seed = [np.median([(right * counts).sum() / counts.sum() for right in RIGHT[seed]]) for seed in chosen]
        drawn.append(np.mean(by_seed))
    assert bounds["t"]["a"] == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), rel=1e-12)
    assert not apart and "mean" not in bounds


def test_with_one_seed_the_rows_alone_are_drawn(tmp_path):
    (of_one,) = bootstrapped([run(tmp_path, 0, {"t": RIGHT[0]})], "own", config(("t", RANKED)))[0]["t"].values()
    statistics = np.stack([RIGHT[0], np.ones((2, 40))]).astype(float)
    said = estimate(statistics, samples=SAMPLES, seed=(0, 0))
    assert of_one == (said.low, said.high)


def test_seeds_that_err_on_the_same_rows_make_nothing_surer(tmp_path):
    """Rows are drawn for all seeds together: three times the same answers have the interval of one."""
    one = bootstrapped([run(tmp_path, 0, {"t": RIGHT[0]})], "own", config(("t", RANKED)))[0]
    runs = [run(tmp_path, seed, {"t": RIGHT[0]}) for seed in range(3)]
    assert bootstrapped(runs, "own", config(("t", RANKED)))[0]["t"]["a"] == pytest.approx(one["t"]["a"])


def test_seeds_that_were_asked_other_rows_are_drawn_without_rows(tmp_path):
    """A file that grew between two seeds keeps no report from being written."""
    runs = [run(tmp_path, seed, {"t": RIGHT[seed][:, : 30 + seed]}) for seed in range(2)]
    bounds, apart = bootstrapped(runs, "own", config(("t", RANKED)))
    means = sorted(of.scores["own"]["t"]["metrics"]["accuracy"]["value"] for of in runs)
    assert apart == ("t",) and bounds["t"]["a"] == pytest.approx(tuple(means))


def test_the_mean_over_tasks_draws_each_tasks_rows_apart_and_the_seeds_together(tmp_path):
    """Where rows agree, seeds alone are left: the tasks then go up and down as one."""
    even = [np.full((1, 10), value) for value in (0.2, 0.4, 0.9)]
    runs = [run(tmp_path, seed, {"t": right, "u": right}) for seed, right in enumerate(even)]
    bounds, _ = bootstrapped(runs, "own", config(("t", RANKED), ("u", RANKED)))
    assert bounds["mean"]["a"] == pytest.approx(bounds["t"]["a"]) == bounds["u"]["a"]
    runs = [run(tmp_path, seed, {"t": right, "u": right}) for seed, right in enumerate(RIGHT)]
    bounds, _ = bootstrapped(runs, "own", config(("t", RANKED), ("u", RANKED)))
    width = {task: of["a"][1] - of["a"][0] for task, of in bounds.items()}
    assert width["mean"] < width["t"] and bounds["t"] != bounds["u"]
    assert bootstrapped(runs, "own", config(("t", RANKED), samples=0))[0] == {}


def test_a_metric_that_is_no_ratio_is_resampled_as_itself(tmp_path):
    nats = np.random.default_rng(1).random((1, 40)) * 3
    scores, path = answers(tmp_path, 0, {"t": nats})
    scores["t"]["primary"] = "perplexity"
    path.write_text(path.read_text().replace('"accuracy"', '"perplexity"'))
    (bounds,) = bootstrapped(
        [Run({"kind": "a"}, "train", None, 0, {}, {"own": scores}, {}, {"own": path})],
        "own",
        config(("t", Continuation())),
    )[0]["t"].values()
    statistics = np.stack([nats, np.ones((1, 40))])
    said = estimate(statistics, samples=SAMPLES, seed=(0, 0), value=lambda totals: np.exp(totals[0] / totals[1]))
    assert bounds == (said.low, said.high)


def test_tasks_that_keep_no_rows_draw_seeds_or_have_their_own_interval(tmp_path):
    def learnt(seed, value):
        found = {"value": value, "low": value - 0.1, "high": value + 0.2}
        scores = {"primary": "accuracy", "metrics": {"accuracy": found}, "trials": [], "chance": None}
        path = tmp_path / f"{seed}.jsonl"
        path.write_text(json.dumps({"task": "l", "setting": 1.0, "test": {}}) + "\n")
        return Run({"kind": "a"}, "train", None, seed, {}, {"own": {"l": scores}}, {}, {"own": path})

    one, apart = bootstrapped([learnt(0, 0.5)], "own", config(("l", None)))
    assert one["l"]["a"] == pytest.approx((0.4, 0.7)) and apart == ("l",)
    two, _ = bootstrapped([learnt(0, 0.5), learnt(1, 0.7)], "own", config(("l", None)))
    assert two["l"]["a"] == pytest.approx((0.5, 0.7))


# Maps ---------------------------------------------------------------------------------------------------------------


def study(levels, *legs, exclude=(), findings=()):
    factors = {factor: {level: () for level in of} for factor, of in levels.items()}
    return StudyConfig("there", (), factors, legs or (Leg("train"),), Grid(exclude=exclude), findings=findings)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are made."""
    made = []

    def figure_of(*size):
        figure, axes = make(*size)
        made.append(figure)
        return figure, axes

    make = pictures.figure_of
    monkeypatch.setattr(pictures, "figure_of", figure_of)
    return made


def squares(axes):
    """({(row, column): text}, {(row, column)} of the hatched ones)."""
    texts = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    return texts, {(int(p.get_y() + 0.5), int(p.get_x() + 0.5)) for p in axes.patches if p.get_hatch()}


def test_a_map_has_means_with_intervals_and_hatches_what_is_missing(figures, tmp_path):
    of = study({"x": "ab", "y": "cd"}, exclude=({"x": "b", "y": "c"},))
    values = {"a · c": interval([1.0, 2.0, 3.0]), "a · d": interval([4.0])}
    cells = frozenset(cell_name(cell) for cell in of.cells)
    panels = [Panel("one", values, cells), Panel("two", {"a · c": interval([9.0])}, frozenset({"a · c"}))]
    heat_maps(tmp_path / "map.png", of, panels, "loss")
    (figure,) = figures
    first, second, bar = figure.axes
    assert squares(first) == ({(0, 0): "2.0000\n± 2.4841", (0, 1): "4.0000"}, {(1, 1)})
    assert squares(second) == ({(0, 0): "9.0000"}, set())
    assert [axes.get_title() for axes in (first, second)] == ["one", "two"] and bar.get_ylabel() == "loss"
    assert {axes.images[0].get_clim() for axes in (first, second)} == {(2.0, 9.0)}, "one scale of colours"
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_one_factor_makes_a_row_and_each_combination_beyond_two_a_map(figures, tmp_path):
    for levels, shapes in (({"x": "abc"}, [(1, 3)]), ({"x": "ab", "y": "cde", "z": "fg"}, [(2, 3)] * 2)):
        of = study(levels)
        values = {cell_name(cell): interval([float(i)]) for i, cell in enumerate(of.cells)}
        heat_maps(tmp_path / "map.png", of, [Panel("", values, frozenset(values))], "loss")
        maps = figures[-1].axes[:-1]
        assert [axes.images[0].get_array().shape for axes in maps] == shapes
        assert [axes.get_title() for axes in maps] == ([""] if len(maps) == 1 else ["f", "g"])
        texts = [text for axes in maps for text in squares(axes)[0].values()]
        assert sorted(texts) == sorted(str(value) for value in values.values())


def test_why_there_is_no_map_is_said():
    assert no_map(study({"x": "ab", "y": "cd"})) is None and "no factors" in no_map(study({}))
    assert "x has 26 levels" in no_map(study({"x": "abcdefghijklmnopqrstuvwxyz"}))
    assert "there would be 16" in no_map(study({"x": "ab", "y": "cd", "z": "efgh", "w": "ijkl"}))


LEGS = (
    Leg("train", evaluations={"own": ASKED}),
    Leg("some", after="train", only={"kind": ("a",)}, evaluations={"own": ASKED}),
    Leg("tune", after="train", evaluations={"own": ASKED}),
)


def scored(cell, leg, seed=0, **metrics):
    """A run with {task: {metric: value}}."""
    scores = {
        task: {"primary": "accuracy", "metrics": {m: {"value": v} for m, v in of.items()}, "chance": None}
        for task, of in metrics.items()
    }
    return Run({"kind": cell}, leg, None, seed, {}, {"own": scores})


def test_the_grid_shows_the_legs_that_most_cells_go_through_side_by_side(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(
        "jaxlm.studies.questions_section.heat_maps",
        lambda path, study, panels, label, **options: drawn.__setitem__(path.name, (panels, label, options)),
    )
    runs = [
        scored(cell, leg, t={"accuracy": 0.4, "gold_bits_per_byte": bits}, u={"accuracy": 0.6, "perplexity": 3.0})
        for leg, cells in (("train", "ab"), ("some", "a"), ("tune", "a"))
        for bits, cell in enumerate(cells)
    ]
    finding = Finding("of accuracy", {"leg": "tune", "kind": "a"}, {"leg": "train", "kind": "a"}, "own/accuracy")
    of = study({"kind": "ab"}, *LEGS, findings=(finding,))
    text = grid_section(of, "own", runs, tmp_path)
    panels, label, options = drawn["own_primary_grid.png"]
    assert [panel.title for panel in panels] == ["after train", "after tune"] and label == "accuracy"
    assert [set(panel.values) for panel in panels] == [{"a", "b"}, {"a"}] and options == {"bright_is_high": True}
    assert panels[1].cells == {"a", "b"} and panels[0].values["a"].mean == pytest.approx(0.5)
    panels, label, options = drawn["own_gold_bits_per_byte_grid.png"]
    assert panels[0].values["b"].mean == 1.0 and options == {"bright_is_high": False}
    assert "gold_bits_per_byte, of the one task that has it:" in text and "accuracy, the mean over 2 tasks:" in text
    assert set(drawn) == {"own_primary_grid.png", "own_gold_bits_per_byte_grid.png"}, "nothing is shown twice"
    assert grid_section(of, "own", runs[:1], tmp_path) == ""


def test_a_mean_is_over_the_tasks_that_have_the_metric_and_of_runs_in_which_none_failed(tmp_path):
    found = {"accuracy": 0.5, "gold_bits_per_byte": 1.0}
    whole = scored("a", "train", t=found, u=found | {"gold_bits_per_byte": 3.0}, v={"accuracy": 0.8})
    part = scored("b", "train", t=found)
    part.failures["own"] = {"u": "no rows", "v": "no rows"}
    (tmp_path / "figures").mkdir()
    of = study({"kind": "ab"}, Leg("train", evaluations={"own": ASKED}))
    text = questions_section(of, of.legs[0], "own", [whole, part], tmp_path / "figures")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["u, accuracy", "0.5000", "failed"] in rows and ["mean", "0.6000", "failed"] in rows
    assert ["mean of 2", "2.0000", "failed"] in rows and ["t", "1.0000", "1.0000"] in rows


def test_a_task_that_failed_for_some_seeds_is_marked(tmp_path):
    runs = [scored("a", "train", seed, t={"accuracy": 0.5}) for seed in range(2)]
    runs.append(scored("a", "train", 2))
    runs[2].failures["own"] = {"t": "no rows"}
    of = study({"kind": "a"}, Leg("train", evaluations={"own": ASKED}))
    assert "| t, accuracy | 0.5000 ± 0.0000 (1 failed) |" in questions_section(of, of.legs[0], "own", runs, tmp_path)


def test_the_spread_over_prompts_is_a_mean_over_seeds(tmp_path):
    accuracies = [[0.1, 0.5, 0.3], [0.3, 0.7, 0.4]]  # by seed and prompt
    runs = [run(tmp_path, seed, {"t": np.array([of]).T, "u": [[0.5]]}) for seed, of in enumerate(accuracies)]
    of = study({"kind": "a"}, Leg("train", evaluations={"own": ASKED}))
    text = questions_section(of, of.legs[0], "own", runs, tmp_path)
    assert "| t, accuracy | 3 | 0.3500 (0.2000 to 0.6000) |" in text and "| u, accuracy | 1 |" not in text
    assert "bootstrap over rows and seeds" in text and "Student's t over seeds" in text
    (picture,) = re.findall(r"\]\(figures/(.*?)\)", text)
    assert (tmp_path / picture).stat().st_size > 5000
