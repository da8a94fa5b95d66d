"""What models were asked, in a study's report: tables and bars by task, the spread over prompts, maps of the grid."""

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxlm.evaluation.measures import LESS_IS_BETTER
from jaxlm.studies.config import Leg, StudyConfig
from jaxlm.studies.page import table
from jaxlm.studies.pictures import Panel, bars, heat_maps, no_map
from jaxlm.studies.results import Interval, Run, answered, cell_name
from jaxlm.studies.row_scores import bootstrapped
from jaxlm.studies.settings import resolved_evaluation

_ALWAYS = "gold_bits_per_byte"
"""Shown beside the primary metrics where tasks have it: small models' accuracies are near chance."""


def grid_section(study: StudyConfig, name: str, runs: Sequence[Run], figures: pathlib.Path) -> str:
    """Maps of an evaluation's means, beside each other after each leg that most cells go through; "" without runs.

    Args:
      study: whose.
      name: of the evaluation.
      runs: of the study.
      figures: folder of the pictures.
    """
    asking = [leg for leg in study.legs if name in leg.evaluations]
    legs = [leg for leg in asking if 2 * sum(map(leg.takes, study.cells)) > len(study.cells)]
    legs = [leg for leg in legs if leg.evaluations[name] == legs[0].evaluations[name]]  # other questions have no scale
    runs = [run for run in runs if not run.failures.get(name)]
    parts = []
    for metric in (None, *_metrics(study, name, runs)):
        panels, of = [], 0
        for leg in legs:
            found = answered(runs, leg.name, name, metric)
            means = found.get("mean", next(iter(found.values())) if len(found) == 1 else {})
            of = max(of, len(found) - ("mean" in found))
            if means:
                cells = frozenset(cell_name(cell) for cell in study.cells if leg.takes(cell))
                panels.append(Panel(f"after {leg.name}", means, cells))
        if sum(len(panel.values) for panel in panels) < 2:
            continue
        if (why := no_map(study)) is not None:
            return f"## {name} over the grid\n\n{why}"
        primaries = {scores["primary"] for run in runs for scores in run.scores.get(name, {}).values()}
        shown = {metric} if metric else primaries
        label = next(iter(shown)) if len(shown) == 1 else "each task's own metric"
        picture = re.sub(r"\W+", "_", f"{name}_{metric or 'primary'}_grid") + ".png"
        heat_maps(figures / picture, study, panels, label, bright_is_high=not shown <= LESS_IS_BETTER)
        parts += ["", f"{label}, {_count(of, name, runs)}:", "", f"![{label}](figures/{picture})"]
    if not parts:
        return ""
    return "\n".join(
        [
            f"## {name} over the grid",
            "",
            "Means over tasks and over the seeds in which no task failed, ± half of the 95% interval by Student's t "
            "over seeds, after each leg that most cells go through. One scale of colours in a picture; bright is "
            "better. Hatched cells are not finished, or a task failed.",
            *parts,
        ]
    )


def _count(of: int, name: str, runs: Sequence[Run]) -> str:
    tasks = {task for run in runs for task in run.scores.get(name, {})}
    if of == 1:
        return "of its one task" if len(tasks) == 1 else "of the one task that has it"
    return (
        f"the mean over {of} tasks"
        if of == len(tasks)
        else f"the mean over the {of} of {len(tasks)} tasks that have it"
    )


def _metrics(study: StudyConfig, name: str, runs: Sequence[Run]) -> Iterator[str]:
    """Those that are shown beside the primary ones: what findings are of, and `_ALWAYS`."""
    of_findings = [finding.metric.split("/") for finding in study.findings]
    wanted = dict.fromkeys([last for evaluation, *_, last in of_findings if evaluation == name] + [_ALWAYS])
    scores = [of for run in runs for of in run.scores.get(name, {}).values()]
    there = {metric for of in scores for metric in of["metrics"]}
    return (metric for metric in wanted if metric in there and {of["primary"] for of in scores} != {metric})


def questions_section(study: StudyConfig, leg: Leg, name: str, runs: Sequence[Run], figures: pathlib.Path) -> str:
    """Tables and a picture of what the models of a leg were asked: the primary metrics, and those of findings.

    Args:
      study: whose.
      leg: one of its legs.
      name: of one of the leg's evaluations.
      runs: of the study.
      figures: folder of the pictures.
    """
    asked = [run for run in runs if run.leg == leg.name and name in run.scores]
    failed = _failed(asked, name)
    cells = list(dict.fromkeys(cell_name(run.cell) for run in asked))
    if not cells:
        return ""
    found = answered(runs, leg.name, name)
    scores = {task: of for run in asked for task, of in run.scores[name].items()}
    chances = {task: of["chance"] for task, of in scores.items()}
    if "mean" in found:
        chances["mean"] = None if None in chances.values() else float(np.mean(list(chances.values())))
    primary = {task: f"{task}, {of['primary']}" for task, of in scores.items()}
    lines = [
        f"## {name} after {leg.name}",
        "",
        "Means over seeds, ± half of the 95% interval by Student's t over seeds.",
        "",
        *_task_table(found, cells, primary, chances, failed),
    ]
    if found:
        picture = re.sub(r"\W+", "_", f"{leg.name}_{name}_tasks") + ".png"
        bounds, apart = bootstrapped(asked, name, resolved_evaluation(leg.evaluations[name]))
        bars(figures / picture, found, bounds, chances, cells)
        lines += ["", f"![tasks](figures/{picture})", "", _caption(asked, apart)]
    others = list(_metrics(study, name, asked))
    for metric in others:
        values = answered(runs, leg.name, name, metric)
        count = len(values) - ("mean" in values)
        names = {} if count == len(scores) else {"mean": f"mean of {count}"}
        lines += ["", f"{metric}:", "", *_task_table(values, cells, names, {}, failed)]
    return "\n".join([*lines, *_prompts(asked, name, [None, *others], cells)])


def _caption(asked: Sequence[Run], apart: Sequence[str]) -> str:
    seeds = max(sum(cell_name(run.cell) == cell_name(one.cell) for run in asked) for one in asked)
    drawn = "rows and seeds" if seeds > 1 else "rows, there being one seed"
    caption = (
        f"Bars are the same means; their lines are 95% intervals by bootstrap over {drawn}: they say what other "
        f"questions of the same kind would have changed too, which the table's, by Student's t, do not. Cells were "
        f"asked the same, so that two may differ for certain where their lines overlap. Dotted: blind guesses."
    )
    if apart:
        own = "over seeds alone" if seeds > 1 else "the task's own"
        caption += f" Of {', '.join(apart)} the interval is {own}: rows are not kept, or not the same for all seeds."
    return caption


def _failed(asked: Sequence[Run], name: str) -> dict[str, dict[str, int]]:
    """{task, or "mean": {cell: seeds}} of what could not be asked."""
    found: dict[str, dict[str, int]] = {}
    for run in asked:
        tasks = run.failures.get(name, {})
        for task in (*tasks, "mean") if tasks else ():
            cells = found.setdefault(task, {})
            cells[cell_name(run.cell)] = cells.get(cell_name(run.cell), 0) + 1
    return found


def _task_table(
    found: Mapping[str, Mapping[str, Interval]],
    cells: Sequence[str],
    names: Mapping[str, str],
    chances: Mapping[str, float | None],
    failed: Mapping[str, Mapping[str, int]],
) -> list[str]:
    """A row a task; the column of chances only where some are known. What failed is marked."""
    known = any(chance is not None for chance in chances.values())
    rows = []
    tasks = [task for task in (*found, *failed) if task != "mean"]
    means = ["mean"] if "mean" in found or ("mean" in failed and len(set(tasks)) > 1) else []
    for task in (*dict.fromkeys(tasks), *means):
        shown = []
        for cell in cells:
            value = found.get(task, {}).get(cell)
            lost = failed.get(task, {}).get(cell)
            mark = "" if not lost else "failed" if value is None else f" ({lost} failed)"
            shown.append(("" if value is None else str(value)) + mark)
        chance = chances.get(task)
        rows.append((names.get(task, task), *([("" if chance is None else f"{chance:.4f}")] if known else []), *shown))
    return table(("task", *(["chance"] if known else []), *cells), rows)


def _prompts(asked: Sequence[Run], name: str, metrics: Sequence[str | None], cells: Sequence[str]) -> list[str]:
    """A table of the spread over prompts, of the tasks that have several; [] where none has."""
    rows = []
    for metric in metrics:
        for task in dict.fromkeys(task for run in asked for task in run.scores[name]):
            by_cell: dict[str, list[list[float]]] = {}
            count = 0
            for run in asked:
                of = run.scores[name].get(task, {})
                values = [found.get(metric or of["primary"]) for found in of.get("prompts", {}).values()]
                if len(values) > 1 and None not in values:
                    count, label = len(values), metric or of["primary"]
                    summary = [float(np.median(values)), min(values), max(values)]
                    by_cell.setdefault(cell_name(run.cell), []).append(summary)
            if not by_cell:
                continue
            means = {cell: np.mean(found, axis=0) for cell, found in by_cell.items()}
            shown = ["{:.4f} ({:.4f} to {:.4f})".format(*means[cell]) if cell in means else "" for cell in cells]
            rows.append((f"{task}, {label}", str(count), *shown))
    if not rows:
        return []
    head = "By prompt: the median over a task's prompts (the lowest to the highest), each a mean over seeds."
    return ["", head, "", *table(("task", "prompts", *cells), rows)]
