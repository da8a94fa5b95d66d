"""Scores of single rows, as evaluations keep them, and bootstrap intervals over rows and seeds.

Two things move a score that has no part in what is compared: the seed, and which rows a task has. The bootstrap draws
seeds with replacement, and rows; the same rows for all seeds and prompts, since whoever is asked the same errs together
(the pigeonhole bootstrap, Owen 2007).
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.evaluation.intervals import central, over_seeds, resampled
from jaxlm.evaluation.suite import EvaluationConfig
from jaxlm.studies.results import Run, cell_name

Bounds = dict[str, dict[str, tuple[float, float]]]
"""{task, or "mean": {cell: (low, high)}}."""

_SEEDS = 2**32  # marks the draws of seeds among those of tasks


def row_statistics(path: pathlib.Path, metrics: Mapping[str, str], rows: Mapping[str, int]) -> dict[str, np.ndarray]:
    """{task: [K, prompts, rows]}, what each row adds to the sums of a task's metric.

    Args:
      path: a file of examples. Tasks that are learnt have no rows in it.
      metrics: {task: which}.
      rows: {task: how many it has}.
    """
    found: dict[str, dict[str, list[tuple[int, list[float]]]]] = {}
    with path.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if "metrics" in record and (task := record["task"]) in metrics:
                sums = record["metrics"][metrics[task]]
                found.setdefault(task, {}).setdefault(record["prompt"], []).append((record["row"], sums))
    statistics = {}
    for task, prompts in found.items():
        (_, first), *_ = next(iter(prompts.values()))
        statistics[task] = np.zeros((len(first), len(prompts), rows[task]))
        for k, answers in enumerate(prompts.values()):
            places, sums = zip(*answers)
            statistics[task][:, k, list(places)] = np.transpose(sums)
    return statistics


def bootstrapped(runs: Sequence[Run], evaluation: str, config: EvaluationConfig) -> tuple[Bounds, tuple[str, ...]]:
    """95% intervals of the primary metrics' means over seeds, by drawing seeds and rows; with one seed rows alone.

    Where rows are not kept, as of tasks that are learnt, or are not the same for all seeds, since the files changed,
    seeds alone are drawn; with one seed the task's own interval is taken.

    Args:
      runs: of a leg.
      evaluation: its name in the leg.
      config: what was asked; has the number of samples, of which 0 gives no intervals.

    Returns:
      the intervals, and the tasks of which rows are not drawn.
    """
    bounds: Bounds = {}
    apart: dict[str, None] = {}
    cells: dict[str, list[Run]] = {}
    for run in runs:
        if evaluation in run.scores:
            cells.setdefault(cell_name(run.cell), []).append(run)
    for cell, of_cell in cells.items() if config.samples else ():
        drawn: list[np.ndarray] = []
        statistics = [_statistics(run, evaluation) for run in of_cell]
        for k, task in enumerate(config.tasks):
            asked = [i for i, run in enumerate(of_cell) if task.name in run.scores[evaluation]]
            if not asked:
                continue
            results = [of_cell[i].scores[evaluation][task.name] for i in asked]
            of_rows = [statistics[i].get(task.name) for i in asked]
            primary = results[0]["primary"]
            if any(rows is None for rows in of_rows) or len({rows.shape for rows in of_rows}) > 1:
                apart[task.name] = None
                own = results[0]["metrics"][primary]
                if len(asked) == 1:
                    if own["low"] is not None:
                        bounds.setdefault(task.name, {})[cell] = own["low"], own["high"]
                    continue
                values = np.tile([result["metrics"][primary]["value"] for result in results], (config.samples, 1))
            else:
                value = functools.partial(task.measure.value, primary)
                stacked = np.stack(of_rows, axis=1)  # [K, seeds, prompts, rows]
                values = resampled(stacked, samples=config.samples, seed=(config.seed, k), value=value)
            means = over_seeds(values, seed=(config.seed, _SEEDS))
            bounds.setdefault(task.name, {})[cell] = central(means)
            if len(asked) == len(of_cell):
                drawn.append(means)
        if len(drawn) == len(config.tasks) > 1:
            bounds.setdefault("mean", {})[cell] = central(np.mean(drawn, axis=0))
    return bounds, tuple(apart)


def _statistics(run: Run, evaluation: str) -> dict[str, np.ndarray]:
    results = {task: of for task, of in run.scores[evaluation].items() if "prompts" in of}
    if evaluation not in run.examples:
        return {}
    metrics = {task: of["primary"] for task, of in results.items()}
    return row_statistics(run.examples[evaluation], metrics, {task: of["rows"] for task, of in results.items()})
