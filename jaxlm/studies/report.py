"""A study's report: `report.md`, pictures in `figures/`, and `cells.csv` with a row for every run."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.studies.config import Leg, StudyConfig
from jaxlm.studies.findings import decide, findings_section
from jaxlm.studies.jobs import Job, Plan, best_trial
from jaxlm.studies.ladder_section import ladder_section
from jaxlm.studies.learned_section import learned_section
from jaxlm.studies.page import table
from jaxlm.studies.pictures import Panel, heat_maps, learning_curves, no_map, tuning_curves
from jaxlm.studies.questions_section import grid_section, questions_section
from jaxlm.studies.results import (
    Account,
    Interval,
    Matched,
    Run,
    account,
    cell_name,
    failed_jobs,
    failed_tasks,
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
    sections = [_head(study, plan, store, runs)]  # then the answers, and what they rest on
    claims = [finding for finding in study.findings if study.has_runs_of(finding.less, finding.more)]
    sections.append(findings_section([decide(finding, runs) for finding in claims], len(study.seeds)))
    if matches := [match for match in study.matches if study.has_runs_of(match.adapted, match.scratch)]:
        sections.append(_matches([(match.name, matched(match, runs)) for match in matches]))
    for metric in study.measures:
        sections += _measure(study, metric, plan, runs, figures)
    for name in dict.fromkeys(name for leg in study.legs for name in leg.evaluations):
        sections.append(grid_section(study, name, runs, figures))
    for leg in study.legs:
        for name in leg.evaluations:
            sections.append(questions_section(study, leg, name, runs, figures))
            sections.append(learned_section(leg.name, name, runs, figures))
    if plan.trials:
        sections += _tuning(plan, store, figures)
    if study.ladder is not None:
        sections.append(ladder_section(study.ladder, runs, figures))
    sections.append(_failures(plan, store))
    sections.append(_time(account(plan, store)))
    path = store.path / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path


def _head(study: StudyConfig, plan: Plan, store: Store, runs: Sequence[Run]) -> str:
    count = sum(len(job.seeds) if job is not None else len(study.seeds) for _, _, job in plan.of_cells)
    legs = [leg for leg in study.legs if any(map(leg.takes, study.cells))]
    lines = [
        "# Study",
        "",
        f"{len(study.cells)} cells of {' × '.join(study.factors)}, {len(study.seeds)} seeds, legs "
        f"{', '.join(leg.name for leg in legs)}: {len(runs)} of {count} runs are finished. A mean over seeds has "
        f"its 95% interval by Student's t; where two intervals overlap, their order means nothing.",
        "",
        *table(
            ("leg", "cells", "runs that differ", "parameters", "tokens a run", "FLOPs a run"),
            [_leg_row(leg, plan) for leg in legs],
        ),
        *(["", study.left_out] if study.left_out else []),
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


def _measure(study: StudyConfig, metric: str, plan: Plan, runs: Sequence[Run], figures: pathlib.Path) -> list[str]:
    """A table and pictures of one metric for every leg."""
    sections = []
    found = measured(runs, metric)
    for leg in study.legs:
        values = {cell: value for (name, cell), value in found.items() if name == leg.name}
        if not values:
            continue
        name = re.sub(r"\W+", "_", f"{leg.name}_{metric}")
        lines = [f"## {metric} after {leg.name}", ""]
        groups = _comparable(study, leg, plan)
        if len(set(groups.values())) > 1:
            agree = " and in ".join(("the objective that is measured", *study.incomparable))
            lines += [f"Cells compare where they agree in {agree}.", ""]
        lines += table(("cell", "mean", "95% interval", "seeds"), _by_group(values, groups))
        if len(values) > 1:
            lines += ["", _map(study, leg, metric, values, groups, figures / f"{name}_grid.png")]
        learning_curves(figures / f"{name}_curves.png", [run for run in runs if run.leg == leg.name], groups, metric)
        lines += ["", f"![{metric} while training](figures/{name}_curves.png)"]
        sections.append("\n".join(lines))
    return sections


def _map(
    study: StudyConfig,
    leg: Leg,
    metric: str,
    values: Mapping[str, Interval],
    groups: Mapping[str, str],
    picture: pathlib.Path,
) -> str:
    """A map of the grid, whose colours compare cells of a group; or why there is none."""
    if (why := no_map(study)) is not None:
        return why
    shades = {}
    for cell, value in values.items():
        beside = [values[other].mean for other in values if groups[other] == groups[cell]]
        low, high = min(beside), max(beside)
        shades[cell] = (value.mean - low) / (high - low) if high > low else 0.5
    panel = Panel(f"{metric} after {leg.name}", values, frozenset(map(cell_name, filter(leg.takes, study.cells))))
    heat_maps(picture, study, [panel], "lowest to highest of cells that compare", shades=shades)
    return f"![{metric} over the grid](figures/{picture.name})"


def _comparable(study: StudyConfig, leg: Leg, plan: Plan) -> dict[str, str]:
    """{cell's name: its group}: the measures of a leg's runs mean the same within a group.

    A loss is of the tokens that an objective predicts: that of the evaluation, or else that of the last steps.
    """
    own = [factor for factor in study.incomparable if leg.factors is None or factor in leg.factors]
    groups = {}
    for cell, of, job in plan.of_cells:
        if of.name == leg.name and job is not None:
            asked = job.run.evaluation and job.run.evaluation.objective
            objective = asked or job.run.phases[-1].stage.objective
            groups[cell_name(cell)] = " · ".join((*(cell[factor] for factor in own), objective.name))
    return groups


def _by_group(values: Mapping[str, Interval], groups: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Rows of a table: group by group in the order of the study, in each the lowest first."""
    places = {group: i for i, group in enumerate(dict.fromkeys(groups.values()))}
    order = sorted(values, key=lambda cell: (places[groups[cell]], values[cell].mean))
    return [
        (
            cell,
            f"{values[cell].mean:.4f}",
            _bounds(values[cell]),
            " ".join(f"{value:.4f}" for value in values[cell].values),
        )
        for cell in order
    ]


def _bounds(value: Interval) -> str:
    return "one seed" if math.isnan(value.low) else f"{value.low:.4f} to {value.high:.4f}"


def _tuning(plan: Plan, store: Store, figures: pathlib.Path) -> list[str]:
    """What the trials found, for each tuned leg."""
    sections = []
    for leg in {leg.name: leg for _, leg, _ in plan.trials}.values():
        tune, curves, rows = leg.tune, {}, []
        for cell, of, jobs in plan.trials:
            if of.name != leg.name:
                continue
            diverged = {job.trial[1] for job in jobs if store.diverged(job)}
            losses = {job.trial[1]: store.value(job, job.seeds[0], tune.metric) for job in jobs}
            known = {value: loss for value, loss in losses.items() if loss is not None and value not in diverged}
            complete = all(store.is_finished(job) or store.diverged(job) for job in jobs)
            best = best_trial(jobs, tune, store) if complete else None
            edge = " (at the edge: try further)" if best in (min(tune.values), max(tune.values)) else ""
            shown = [
                f"{known[value]:.4f}" if value in known else "diverged" if value in diverged else ""
                for value in tune.values
            ]
            rows.append((cell_name(cell), *shown, "" if best is None else f"{best:g}{edge}"))
            curves[cell_name(cell)] = known
        lines = [f"## {tune.binding} for {leg.name}", "", f"{tune.metric} of a trial with one seed.", ""]
        lines += table(("cell", *(f"{value:g}" for value in tune.values), "chosen"), rows)
        picture = f"{leg.name}_tuning.png"
        tuning_curves(figures / picture, curves, tune.binding, tune.metric)
        sections.append("\n".join([*lines, "", f"![trials](figures/{picture})"]))
    return sections


def _matches(found: Sequence[tuple[str, Matched | None]]) -> str:
    rows = []
    for name, result in found:
        losses = () if result is None else result.loss
        rows.append((name, str(result or "runs are missing"), " ".join(f"{loss:.4f}" for loss in losses)))
    lines = [
        "## Tokens to the same loss",
        "",
        "Tokens of the run from scratch over the adapted one's, at the former's last loss; above 1 the adaptation is "
        "cheaper. A seed that was there at its first evaluation may have been there before (≥); one that never was "
        "would have needed more (<).",
        "",
    ]
    return "\n".join([*lines, *table(("comparison", "ratio (95% interval)", "loss"), rows)])


def _failures(plan: Plan, store: Store) -> str:
    failed = failed_jobs(plan, store)
    found = [(cell, leg, job, failure) for cell, leg, job in failed for failure in store.failures(job).values()]
    rows = [(cell_name(cell), leg.name, str(failure.seed), failure.error) for cell, leg, _, failure in found]
    rows += [(cell_name(cell), leg.name, "", why) for cell, leg, why in plan.refused]
    tasks = [(cell_name(c), leg.name, str(seed), task, why) for c, leg, _, seed, task, why in failed_tasks(plan, store)]
    if not rows and not tasks:
        return ""
    lines = ["## Failed"]
    if rows:
        lines += ["", *table(("cell", "leg", "seed", "why"), list(dict.fromkeys(rows)))]
    if tasks:
        lines += [
            "",
            "These tasks could not be asked; the others were, and training went on. The next start tries these again.",
        ]
        lines += ["", *table(("cell", "leg", "seed", "task", "why"), list(dict.fromkeys(tasks)))]
    diverged = [store.failed_json(job, failure.seed) for _, _, job, failure in found if failure.diverged]
    if diverged:
        notes = ", ".join(dict.fromkeys(str(path.relative_to(store.path)) for path in diverged))
        lines += ["", f"What diverged would again; to have it tried all the same, delete {notes}."]
    return "\n".join(lines)


def _time(spent: Account) -> str:
    if not spent.workers:
        return ""
    rows = [
        (activity.value.replace("_", " "), duration(seconds)) for activity, seconds in spent.runs.items() if seconds
    ]
    lines = table(("of all runs", "time"), rows)
    waited = f": {spent.share_waited:.1%} waited for the last runs of other workers" if spent.waiting else ""
    return "\n".join(
        [
            "## Time",
            "",
            f"Workers ran for {duration(spent.workers)}; {spent.overhead:.1%} of it was neither training, nor "
            f"evaluation, nor compilation{waited}.",
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
