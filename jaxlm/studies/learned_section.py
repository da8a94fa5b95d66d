"""What finetuning sweeps and linear probes found, in a study's report: every setting, the chosen one, seeds apart."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.studies.page import figure_of, table
from jaxlm.studies.results import Interval, Run, cell_name, interval

Trials = Sequence[Mapping[str, Any]]


def learned_section(leg: str, evaluation: str, runs: Sequence[Run], figures: pathlib.Path) -> str:
    """Tables and pictures of the tasks that a leg's models learnt; "" where there are none.

    Args:
      leg: its name.
      evaluation: one of the leg's.
      runs: of the study.
      figures: folder of the pictures.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}  # {task: {cell: a result for each pretrained seed}}
    for run in runs:
        for task, result in run.scores.get(evaluation, {}).items() if run.leg == leg else ():
            if "trials" in result:
                found.setdefault(task, {}).setdefault(cell_name(run.cell), []).append(result)
    if not found:
        return ""
    parts = [
        f"## {evaluation}, learnt after {leg}",
        "",
        "By setting: the mean on the validation split, over pretrained models and finetuning seeds. A model's setting "
        "is chosen there; the test split judges the choice: the mean over pretrained models with its 95% interval, and "
        "apart from it the standard deviation over finetuning seeds on one model.",
    ]
    for task, cells in found.items():
        picture = re.sub(r"\W+", "_", f"{leg}_{evaluation}_{task}_settings") + ".png"
        parts += ["", *_table(task, cells), "", f"![{task} by setting](figures/{picture})"]
        _curves(figures / picture, task, cells)
    return "\n".join(parts)


def _table(task: str, cells: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    first = next(iter(cells.values()))[0]
    settings = sorted({trial["setting"] for trial in first["trials"]})
    rows = []
    for cell, results in cells.items():
        by_setting = {setting: _validation(results, setting) for setting in settings}
        chosen = [result["chosen"] for result in results]
        edge = settings[0] < settings[-1] and {settings[0], settings[-1]} & set(chosen)
        test = interval([result["metrics"][result["primary"]]["value"] for result in results])
        spreads = [result["spread"] for result in results if result["spread"] is not None]
        diverged = sum(trial["diverged"] for result in results for trial in result["trials"])
        rows.append(
            (
                cell,
                *(f"{value.mean:.4f}" for value in by_setting.values()),
                " ".join(f"{value:g}" for value in dict.fromkeys(chosen)) + (" (at the edge)" if edge else ""),
                str(test),
                "" if not spreads else f"{np.mean(spreads):.4f}",
                str(diverged or ""),
            )
        )
    head = f"**{task}** ({first['how']}): {first['primary']}, by {first['setting']}."
    columns = ("cell", *(f"{setting:g}" for setting in settings), "chosen", "test", "over seeds", "diverged")
    return [head, "", *table(columns, rows)]


def _validation(results: Sequence[Mapping[str, Any]], setting: float) -> Interval:
    """Over pretrained models, each with its mean over finetuning seeds."""
    return interval(
        [
            float(np.mean([t["validation"][result["primary"]] for t in result["trials"] if t["setting"] == setting]))
            for result in results
        ]
    )


def _curves(path: pathlib.Path, task: str, cells: Mapping[str, list[dict[str, Any]]]) -> None:
    """Validation against the setting, every trial a point."""
    figure, axes = figure_of(6.4, 4.4)
    first = next(iter(cells.values()))[0]
    for i, (cell, results) in enumerate(cells.items()):
        trials = [trial for result in results for trial in result["trials"]]
        settings = sorted({trial["setting"] for trial in trials})
        axes.plot(settings, [_validation(results, s).mean for s in settings], color=f"C{i % 10}", label=cell)
        points = [(trial["setting"], trial["validation"][first["primary"]]) for trial in trials]
        axes.scatter(*zip(*points), color=f"C{i % 10}", s=10, alpha=0.5)
    axes.set(xlabel=first["setting"], ylabel=f"validation {first['primary']}", xscale="log", title=task)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
