"""A study's report: `report.md`, pictures in `figures/`, and `cells.csv` with a row for every run."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.studies.config import Leg, StudyConfig
from jaxlm.studies.jobs import Job, Plan, best_trial
from jaxlm.studies.ladder_section import ladder_section
from jaxlm.studies.learned_section import learned_section
from jaxlm.studies.page import figure_of, table
from jaxlm.studies.results import (
    Account,
    Interval,
    Matched,
    Run,
    account,
    answered,
    cell_name,
    finished_runs,
    matched,
    measured,
    status,
    write_csv,
)
from jaxlm.studies.store import Store
from jaxlm.training import machine
from jaxlm.training.progress import duration, human


def write_report(study: StudyConfig, plan: Plan, store: Store) -> pathlib.Path:
    """Writes everything from what is finished by now; returns the report's path."""
    figures = store.path / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    write_csv(store.path / "cells.csv", study, plan, store)
    runs = finished_runs(plan, store)
    sections = [_head(study, plan, store, runs)]
    for metric in study.measures:
        sections += _measure(study, metric, runs, figures)
    for leg in study.legs:
        sections.append(_evaluation(leg, runs, figures))
        sections.append(learned_section(leg.name, runs, figures))
    if plan.trials:
        sections += _tuning(plan, store, figures)
    if study.matches:
        sections.append(_matches([(match.name, matched(match, runs)) for match in study.matches]))
    if study.ladder is not None:
        sections.append(ladder_section(study.ladder, runs, figures))
    sections.append(_failures(plan, store))
    sections.append(_time(account(plan, store)))
    path = store.path / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path


def _head(study: StudyConfig, plan: Plan, store: Store, runs: Sequence[Run]) -> str:
    count = sum(len(job.seeds) if job is not None else len(study.seeds) for _, _, job in plan.of_cells)
    lines = [
        "# Study",
        "",
        f"{len(study.cells)} cells of {' × '.join(study.factors)}, {len(study.seeds)} seeds, legs "
        f"{', '.join(leg.name for leg in study.legs)}: {len(runs)} of {count} runs are finished. A mean over seeds has "
        f"its 95% interval by Student's t; where two intervals overlap, their order means nothing.",
        "",
        *table(
            ("leg", "cells", "runs that differ", "parameters", "tokens a run", "FLOPs a run"),
            [_leg_row(leg, plan) for leg in study.legs],
        ),
        "",
        *(f"- {name}: {text}" for name, text in machine.facts().items()),
    ]
    return "\n".join(lines)


def _leg_row(leg: Leg, plan: Plan) -> tuple[str, ...]:
    jobs = [job for _, of, job in plan.of_cells if of.name == leg.name]
    known = {job.address: job for job in jobs if job is not None}
    sizes = [job.size for job in known.values()]
    return (
        leg.name,
        str(len(jobs)),
        str(sum(len(job.seeds) for job in known.values())),
        _span([size.parameters for size in sizes]),
        _span([size.tokens for size in sizes]),
        _span([size.flops for size in sizes]),
    )


def _span(numbers: Sequence[float]) -> str:
    if not numbers:
        return "not known yet"
    low, high = human(min(numbers)).strip(), human(max(numbers)).strip()
    return low if low == high else f"{low} to {high}"


def _measure(study: StudyConfig, metric: str, runs: Sequence[Run], figures: pathlib.Path) -> list[str]:
    """A table and pictures of one metric for every leg."""
    sections = []
    found = measured(runs, metric)
    for leg in study.legs:
        values = {cell: value for (name, cell), value in found.items() if name == leg.name}
        if not values:
            continue
        name = re.sub(r"\W+", "_", f"{leg.name}_{metric}")
        order = sorted(values, key=lambda cell: values[cell].mean)
        lines = [f"## {metric} after {leg.name}", ""]
        lines += table(
            ("cell", "mean", "95% interval", "seeds"),
            [
                (
                    cell,
                    f"{values[cell].mean:.4f}",
                    _bounds(values[cell]),
                    " ".join(f"{value:.4f}" for value in values[cell].values),
                )
                for cell in order
            ],
        )
        if len(study.factors) == 2 and len(values) > 1:
            _heat_map(figures / f"{name}_grid.png", study, values, f"{metric} after {leg.name}")
            lines += ["", f"![{metric} over the grid](figures/{name}_grid.png)"]
        _learning_curves(figures / f"{name}_curves.png", [run for run in runs if run.leg == leg.name], metric)
        lines += ["", f"![{metric} while training](figures/{name}_curves.png)"]
        sections.append("\n".join(lines))
    return sections


def _bounds(value: Interval) -> str:
    return "one seed" if math.isnan(value.low) else f"{value.low:.4f} to {value.high:.4f}"


def _evaluation(leg: Leg, runs: Sequence[Run], figures: pathlib.Path) -> str:
    """A table and a picture of the tasks that the models of a leg were asked."""
    found = answered(runs, leg.name)
    if not found:
        return ""
    scores = {task: of for run in runs if run.leg == leg.name for task, of in run.scores.items()}
    cells = list(dict.fromkeys(cell for values in found.values() for cell in values))
    rows = []
    for task, values in found.items():
        chance = scores[task]["chance"]
        shown = [str(values[cell]) if cell in values else "" for cell in cells]
        rows.append((f"{task}, {scores[task]['primary']}", "" if chance is None else f"{chance:.4f}", *shown))
    picture = f"{leg.name}_tasks.png"
    _bars(figures / picture, found, {task: of["chance"] for task, of in scores.items()}, cells)
    head = f"## Tasks after {leg.name}\n\nMeans over seeds, ± half of the 95% interval.\n\n"
    return head + "\n".join([*table(("task", "chance", *cells), rows), "", f"![tasks](figures/{picture})"])


def _tuning(plan: Plan, store: Store, figures: pathlib.Path) -> list[str]:
    """What the trials found, for each tuned leg."""
    sections = []
    for leg in {leg.name: leg for _, leg, _ in plan.trials}.values():
        tune, curves, rows = leg.tune, {}, []
        for cell, of, jobs in plan.trials:
            if of.name != leg.name:
                continue
            losses = {job.trial[1]: store.value(job, job.seeds[0], tune.metric) for job in jobs}
            known = {value: loss for value, loss in losses.items() if loss is not None}
            complete = all(store.is_finished(job) for job in jobs)
            best = best_trial(jobs, tune, store) if complete else None
            edge = " (at the edge: try further)" if best in (min(tune.values), max(tune.values)) else ""
            shown = [f"{losses[value]:.4f}" if value in known else "" for value in tune.values]
            rows.append((cell_name(cell), *shown, "" if best is None else f"{best:g}{edge}"))
            curves[cell_name(cell)] = known
        lines = [f"## {tune.binding} for {leg.name}", "", f"{tune.metric} of a trial with one seed.", ""]
        lines += table(("cell", *(f"{value:g}" for value in tune.values), "chosen"), rows)
        picture = f"{leg.name}_tuning.png"
        _tuning_curves(figures / picture, curves, tune.binding, tune.metric)
        sections.append("\n".join([*lines, "", f"![trials](figures/{picture})"]))
    return sections


def _matches(found: Sequence[tuple[str, Matched | None]]) -> str:
    rows = []
    for name, result in found:
        if result is None:
            rows.append((name, "runs are missing", ""))
        elif result.ratio is None:
            rows.append((name, f"not reached: below {result.bound:.2f}", _losses(result)))
        else:
            ratio = result.ratio
            bounds = "" if math.isnan(ratio.low) else f" ({ratio.low:.2f} to {ratio.high:.2f})"
            rows.append((name, f"{ratio.mean:.2f}{bounds}", _losses(result)))
    head = "## Tokens to the same loss\n\nTokens of the run from scratch over the adapted one's, at the former's last "
    return (
        head
        + "loss; above 1 the adaptation is cheaper.\n\n"
        + "\n".join(table(("comparison", "ratio (95% interval)", "loss"), rows))
    )


def _losses(result: Matched) -> str:
    return " ".join(f"{loss:.4f}" for loss in result.loss)


def _failures(plan: Plan, store: Store) -> str:
    of_cells = [(cell, leg, job) for cell, leg, job in plan.of_cells if job is not None]
    of_cells += [(cell, leg, trial) for cell, leg, trials in plan.trials for trial in trials]
    rows = [
        (cell_name(cell), leg.name, str(failure.seed), failure.error)
        for cell, leg, job in of_cells
        if (failure := store.failure(job)) is not None
    ]
    if not rows:
        return ""
    return "## Failed\n\n" + "\n".join(table(("cell", "leg", "seed", "why"), list(dict.fromkeys(rows))))


def _time(spent: Account) -> str:
    if not spent.workers:
        return ""
    rows = [
        (activity.value.replace("_", " "), duration(seconds)) for activity, seconds in spent.runs.items() if seconds
    ]
    lines = table(("of all runs", "time"), rows)
    return "\n".join(
        [
            "## Time",
            "",
            f"Workers ran for {duration(spent.workers)}; {spent.overhead:.1%} of it was neither training, nor "
            f"evaluation, nor compilation.",
            "",
            *lines,
        ]
    )


def status_rows(study: StudyConfig, plan: Plan, store: Store) -> list[tuple[str, str, str, str]]:
    """(cell, leg, state, last measure) of every cell and leg, for the live table."""
    rows = []
    for cell, leg, job in plan.of_cells:
        if job is None:
            waiting = next((jobs for c, of, jobs in plan.trials if c == cell and of.name == leg.name), ())
            done = sum(store.is_finished(trial) for trial in waiting)
            state = status(plan, cell, leg, None, study.seeds[0], store)
            if state == "waiting" and waiting:
                state = f"trials {done}/{len(waiting)}"
            rows.append((cell_name(cell), leg.name, state, ""))
            continue
        states = [status(plan, cell, leg, job, seed, store) for seed in job.seeds]
        state = _state(job, states, store)
        values = [store.value(job, seed, study.measures[0]) for seed in job.seeds]
        shown = [value for value in values if value is not None]
        rows.append((cell_name(cell), leg.name, state, f"{np.mean(shown):.4f}" if shown else ""))
    return rows


def _state(job: Job, states: Sequence[str], store: Store) -> str:
    done = states.count("finished")
    if done == len(states):
        return "finished"
    if "failed" in states:
        return "failed"
    if "running" in states:
        seed = next(seed for seed, state in zip(job.seeds, states) if state == "running")
        return f"seed {done + 1}/{len(states)}, step {store.steps_done(job, seed):,}/{job.run.train_steps:,}"
    return "to do" if not done else f"{done}/{len(states)}"


def _heat_map(path: pathlib.Path, study: StudyConfig, values: Mapping[str, Interval], title: str) -> None:
    (first, second), cells = study.factors, study.cells
    rows, columns = (list(dict.fromkeys(cell[factor] for cell in cells)) for factor in (first, second))
    grid = np.full((len(rows), len(columns)), np.nan)
    for cell in cells:
        if cell_name(cell) in values:
            grid[rows.index(cell[first]), columns.index(cell[second])] = values[cell_name(cell)].mean
    figure, axes = figure_of(1.6 + 1.5 * len(columns), 1.4 + 0.6 * len(rows))
    image = axes.imshow(np.ma.masked_invalid(grid), cmap="viridis_r", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for i, j in np.argwhere(np.isfinite(grid)):
        colour = "white" if grid[i, j] > middle else "black"
        axes.text(j, i, f"{grid[i, j]:.3f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=second, ylabel=first, title=title)
    figure.colorbar(image)
    figure.savefig(path, dpi=120)


def _learning_curves(path: pathlib.Path, runs: Sequence[Run], metric: str) -> None:
    figure, axes = figure_of(6.4, 4.4)
    by_cell: dict[str, list[Run]] = {}
    for run in runs:
        if metric in run.curves:
            by_cell.setdefault(cell_name(run.cell), []).append(run)
    for i, (cell, of_cell) in enumerate(by_cell.items()):
        for k, run in enumerate(of_cell):
            curve = run.curves[metric]
            label = cell if k == 0 else None
            axes.plot(run.tokens(curve.steps), curve.values, color=f"C{i % 10}", alpha=0.8, linewidth=1.2, label=label)
    axes.set(xlabel="tokens seen", ylabel=metric)
    axes.grid(alpha=0.3)
    if by_cell:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _bars(
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
        if chances[task] is not None:
            axes.hlines(chances[task], k - width / 2, k + (len(cells) - 0.5) * width, color="black", linestyle=":")
    axes.set_xticks([k + (len(cells) - 1) * width / 2 for k in range(len(found))], list(found), rotation=30, ha="right")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _tuning_curves(path: pathlib.Path, curves: Mapping[str, Mapping[float, float]], binding: str, metric: str) -> None:
    figure, axes = figure_of(6.4, 4.4)
    for cell, losses in curves.items():
        axes.plot(list(losses), list(losses.values()), marker="o", markersize=4, label=cell)
    axes.set(xlabel=binding, ylabel=metric, xscale="log")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
