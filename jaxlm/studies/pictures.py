"""The pictures of a study's report, for any study: the grid, learning curves, tasks, and what trials found."""

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.studies.config import StudyConfig
from jaxlm.studies.page import figure_of
from jaxlm.studies.results import Interval, Run, cell_name


def heat_map(
    path: pathlib.Path, study: StudyConfig, values: Mapping[str, Interval], groups: Mapping[str, str], title: str
) -> None:
    """Means over a grid of two factors; colours compare cells of a group, bright is low."""
    (first, second), cells = study.factors, study.cells
    rows, columns = (list(dict.fromkeys(cell[factor] for cell in cells)) for factor in (first, second))
    grid, shade = np.full((2, len(rows), len(columns)), np.nan)
    for cell in cells:
        name = cell_name(cell)
        if name in values:
            beside = [values[other].mean for other in values if groups[other] == groups[name]]
            low, high = min(beside), max(beside)
            place = rows.index(cell[first]), columns.index(cell[second])
            grid[place] = values[name].mean
            shade[place] = (values[name].mean - low) / (high - low) if high > low else 0.5
    figure, axes = figure_of(1.6 + 1.5 * len(columns), 1.4 + 0.6 * len(rows))
    image = axes.imshow(np.ma.masked_invalid(shade), cmap="viridis_r", aspect="auto", vmin=0, vmax=1)
    for i, j in np.argwhere(np.isfinite(grid)):
        colour = "white" if shade[i, j] > 0.5 else "black"
        axes.text(j, i, f"{grid[i, j]:.3f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=second, ylabel=first, title=title)
    figure.colorbar(image, label="lowest to highest of cells that compare", ticks=[])
    figure.savefig(path, dpi=120)


def learning_curves(path: pathlib.Path, runs: Sequence[Run], groups: Mapping[str, str], metric: str) -> None:
    """A metric over the tokens seen, a line a run, a colour a cell, a panel for each group of cells that compare."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    by_cell: dict[str, list[Run]] = {}
    for run in runs:
        if metric in run.curves:
            by_cell.setdefault(cell_name(run.cell), []).append(run)
    shown = [group for group in dict.fromkeys(groups.values()) if any(groups[cell] == group for cell in by_cell)] or [
        ""
    ]
    figure, panels = figure_of(4.4 * len(shown) + 2.0, 4.4, len(shown))
    panels = dict(zip(shown, np.atleast_1d(panels)))
    for i, (cell, of_cell) in enumerate(by_cell.items()):
        axes = panels[groups[cell]]
        for k, run in enumerate(of_cell):
            curve = run.curves[metric]
            label = cell if k == 0 else None
            axes.plot(run.tokens(curve.steps), curve.values, color=f"C{i % 10}", alpha=0.8, linewidth=1.2, label=label)
    for axes in panels.values():
        axes.set(xlabel="tokens seen", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def bars(
    path: pathlib.Path,
    found: Mapping[str, Mapping[str, Interval]],
    chances: Mapping[str, float | None],
    cells: Sequence[str],
) -> None:
    """A bar a cell and task with its interval, and chance as a line."""
    figure, axes = figure_of(2.0 + 0.25 * len(found) * (len(cells) + 1), 4.4)
    width = 1.0 / (len(cells) + 1)
    for i, cell in enumerate(cells):
        places = [k for k, values in enumerate(found.values()) if cell in values]
        values = [found[task][cell] for task in found if cell in found[task]]
        spread = [0.0 if math.isnan(value.low) else (value.high - value.low) / 2 for value in values]
        axes.bar([k + i * width for k in places], [v.mean for v in values], width, yerr=spread, label=cell, capsize=2)
    for k, task in enumerate(found):
        if chances.get(task) is not None:
            axes.hlines(chances[task], k - width / 2, k + (len(cells) - 0.5) * width, color="black", linestyle=":")
    axes.set_xticks([k + (len(cells) - 1) * width / 2 for k in range(len(found))], list(found), rotation=30, ha="right")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def tuning_curves(path: pathlib.Path, curves: Mapping[str, Mapping[float, float]], binding: str, metric: str) -> None:
    """What trials found for each value, a line a cell."""
    figure, axes = figure_of(6.4, 4.4)
    for cell, losses in curves.items():
        axes.plot(list(losses), list(losses.values()), marker="o", markersize=4, label=cell)
    axes.set(xlabel=binding, ylabel=metric, xscale="log")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
