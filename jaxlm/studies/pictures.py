"""The pictures of a study's report, for any study: the grid, learning curves, tasks, and what trials found."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.studies.config import StudyConfig
from jaxlm.studies.page import figure_of
from jaxlm.studies.results import Interval, Run, cell_name

_MOST_LEVELS, _MOST_MAPS = 24, 12


@dataclasses.dataclass(frozen=True)
class Panel:
    """A map, or one for each combination of the factors beyond two.

    Attributes:
      title: above it.
      values: by a cell's name.
      cells: the names of those that should have a value; the others stay blank.
    """

    title: str
    values: Mapping[str, Interval]
    cells: frozenset[str]


def no_map(study: StudyConfig) -> str | None:
    """Why a study's cells cannot be shown as maps, in a sentence; None where they can."""
    if not study.factors:
        return "No map: there are no factors."
    first, others = list(study.factors)[:2], list(study.factors)[2:]
    for factor in first:
        if (count := len({cell[factor] for cell in study.cells})) > _MOST_LEVELS:
            return f"No map: {factor} has {count} levels, more than the {_MOST_LEVELS} that can be read on one."
    if (count := len({tuple(cell[factor] for factor in others) for cell in study.cells})) > _MOST_MAPS:
        return f"No map: there would be {count}, one for each combination of {', '.join(others)}; the table has all."
    return None


def heat_maps(
    path: pathlib.Path,
    study: StudyConfig,
    panels: Sequence[Panel],
    label: str,
    *,
    shades: Mapping[str, float] | None = None,
    bright_is_high: bool = False,
) -> None:
    """Means over a grid of the first two factors, panels beside each other, with one scale of colours.

    One factor makes a row; of three or more, each combination of the others has a row of maps. What should have a value
    and has none is hatched.

    Args:
      path: of the picture.
      study: has the factors.
      panels: one at least.
      label: of the colours.
      shades: {cell's name: 0 to 1}, colours in place of the values, for cells that do not compare throughout.
      bright_is_high: which end of the scale is bright.
    """
    from matplotlib.patches import Rectangle

    *first, across = list(study.factors)[:2]
    others, cells = list(study.factors)[2:], study.cells
    columns = list(dict.fromkeys(cell[across] for cell in cells))
    rows = list(dict.fromkeys(cell[first[0]] for cell in cells)) if first else [""]
    combinations = list(dict.fromkeys(tuple(cell[factor] for factor in others) for cell in cells))
    means = [value.mean for panel in panels for value in panel.values.values() if math.isfinite(value.mean)]
    low, high = (0.0, 1.0) if shades is not None else (min(means, default=0.0), max(means, default=0.0))
    if low == high:
        low, high = low - 0.5, high + 0.5
    width = 1.6 + (0.6 + 1.5 * len(columns)) * len(panels)
    size = width, (0.8 + 0.6 * len(rows)) * len(combinations) + 0.6
    figure, grid = figure_of(*size, len(panels), len(combinations))
    grid = np.reshape(grid, (len(combinations), len(panels)))
    for k, combination in enumerate(combinations):
        for panel, axes in zip(panels, grid[k]):
            shade = np.full((len(rows), len(columns)), np.nan)
            for cell in cells:
                name = cell_name(cell)
                if tuple(cell[factor] for factor in others) != combination or name not in panel.cells:
                    continue
                i, j = rows.index(cell[first[0]]) if first else 0, columns.index(cell[across])
                if name not in panel.values:
                    axes.add_patch(
                        Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor="0.7", linewidth=0)
                    )
                    continue
                value = panel.values[name]
                shade[i, j] = value.mean if shades is None else shades[name]
                dark = ((shade[i, j] - low) / (high - low) > 0.5) != bright_is_high
                text = str(value).replace(" ± ", "\n± ")
                axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
            colours = "viridis" if bright_is_high else "viridis_r"
            image = axes.imshow(np.ma.masked_invalid(shade), cmap=colours, aspect="auto", vmin=low, vmax=high)
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), rows)
            title = " · ".join((*([panel.title] if panel.title else []), *combination))
            axes.set(xlabel=across, ylabel=first[0] if first else "", title=title)
    figure.colorbar(image, ax=list(grid.flat), label=label, ticks=[] if shades is not None else None)
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
    bounds: Mapping[str, Mapping[str, tuple[float, float]]],
    chances: Mapping[str, float | None],
    cells: Sequence[str],
) -> None:
    """A bar a cell and task, a line for its interval where `bounds` has one, and chance dotted."""
    figure, axes = figure_of(3.0 + 0.25 * len(found) * (len(cells) + 1), 4.4)
    width = 1.0 / (len(cells) + 1)
    for i, cell in enumerate(cells):
        places = {task: k + i * width for k, task in enumerate(found) if cell in found[task]}
        axes.bar(list(places.values()), [found[task][cell].mean for task in places], width, label=cell)
        ends = {task: bounds[task][cell] for task in places if cell in bounds.get(task, {})}
        if ends:
            low, high = np.array(list(ends.values())).T
            at = [places[task] for task in ends]
            axes.errorbar(at, (low + high) / 2, (high - low) / 2, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for k, task in enumerate(found):
        if chances.get(task) is not None:
            axes.hlines(chances[task], k - width / 2, k + (len(cells) - 0.5) * width, color="black", linestyle=":")
    axes.set_xticks([k + (len(cells) - 1) * width / 2 for k in range(len(found))], list(found), rotation=30, ha="right")
    figure.legend(loc="outside right upper", fontsize=8)
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
