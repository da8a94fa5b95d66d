"""What a study found: a row for every run, means over seeds with intervals, and tokens to match a loss."""

import csv
import dataclasses
import enum
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.evaluation.intervals import student
from jaxlm.studies.config import Cell, Leg, Match, StudyConfig
from jaxlm.studies.jobs import Job, Plan
from jaxlm.studies.store import EVALUATION, WAITING, Store
from jaxlm.training.goodput import Activity, read_ledger
from jaxlm.training.report import Curve


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95% interval by Student's t; NaN bounds where there is one seed.

    Attributes:
      mean: of `values`.
      low, high: bounds.
      values: one a seed.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        """The mean, and half the interval's width if there is one."""
        return f"{self.mean:.4f}" if math.isnan(self.low) else f"{self.mean:.4f} ± {(self.high - self.low) / 2:.4f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean over seeds, see `jaxlm.evaluation.intervals.student`."""
    found = student(values)
    bounds = (math.nan, math.nan) if found.low is None else (found.low, found.high)
    return Interval(found.value, *bounds, tuple(values))


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a cell.

    Attributes:
      cell, leg: what it is of.
      job, seed: which run it is; cells may share it.
      curves: metrics over its steps.
      scores: {evaluation: {task: what was answered}}, see `Store.scores`.
      failures: {evaluation: {task: why it was not asked}}.
      examples: {evaluation: file of what was answered to each question}.
    """

    cell: Cell
    leg: str
    job: Job
    seed: int
    curves: Mapping[str, Curve]
    scores: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    failures: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    examples: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)

    def last(self, metric: str) -> float | None:
        """The last value of a metric."""
        return self.curves[metric].last if metric in self.curves else None

    def score(self, evaluation: str, metric: str | None = None, task: str | None = None) -> float | None:
        """A metric of a task; of no task named: the mean over those of an evaluation that have it, as reports show.
        None: it was not asked, or for the mean a task failed.

        Args:
          evaluation: its name in the leg.
          metric: None is each task's primary one.
          task: None is the mean.
        """
        if task is None and self.failures.get(evaluation):
            return None
        tasks = self.scores.get(evaluation, {})
        having = [of for of in self.tasks_with(evaluation, metric) if task in (None, of)]
        found = [tasks[of]["metrics"][metric or tasks[of]["primary"]]["value"] for of in having]
        return float(np.mean(found)) if found else None

    def tasks_with(self, evaluation: str, metric: str | None = None) -> tuple[str, ...]:
        """The tasks of an evaluation that have a metric; None is each task's primary one."""
        tasks = self.scores.get(evaluation, {})
        return tuple(name for name, of in tasks.items() if (metric or of["primary"]) in of["metrics"])

    def tokens(self, steps: np.ndarray) -> np.ndarray:
        """Tokens that the run itself has seen after these steps."""
        first = self.job.run.train_steps - self.job.size.steps
        return (steps - first) * (self.job.size.tokens / self.job.size.steps)


def finished_runs(plan: Plan, store: Store) -> list[Run]:
    """Every finished run of every cell and leg; trials are not among them."""
    return [
        Run(
            cell,
            leg.name,
            job,
            seed,
            store.curves(job, seed),
            store.scores(job, seed),
            store.failed_tasks(job, seed),
            store.examples(job, seed),
        )
        for cell, leg, job in plan.of_cells
        if job is not None
        for seed in job.seeds
        if store.run_is_finished(job, seed)
    ]


def measured(runs: Sequence[Run], metric: str) -> dict[tuple[str, str], Interval]:
    """{(leg, cell's label): interval} of a metric's last values, where runs have it."""
    values: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if (value := run.last(metric)) is not None:
            values.setdefault((run.leg, cell_name(run.cell)), []).append(value)
    return {key: interval(found) for key, found in values.items()}


def answered(
    runs: Sequence[Run], leg: str, evaluation: str, metric: str | None = None
) -> dict[str, dict[str, Interval]]:
    """{task: {cell: interval over seeds}} of a metric (None: each task's primary one), of the runs of a leg.

    The last entry is the "mean" over the tasks that have the metric, each counted once, where there are several; of
    runs in which no task failed.
    """
    values: dict[str, dict[str, list[float]]] = {}
    asked = [run for run in runs if run.leg == leg and evaluation in run.scores]
    for task in dict.fromkeys(task for run in asked for task in run.scores[evaluation]):
        for run in asked:
            if (value := run.score(evaluation, metric, task)) is not None:
                values.setdefault(task, {}).setdefault(cell_name(run.cell), []).append(value)
    having = list(values)
    for run in asked if len(having) > 1 else ():
        scores = [run.score(evaluation, metric, task) for task in having]
        if None not in scores and not run.failures.get(evaluation):
            values.setdefault("mean", {}).setdefault(cell_name(run.cell), []).append(float(np.mean(scores)))
    return {task: {cell: interval(found) for cell, found in cells.items()} for task, cells in values.items()}


def cell_name(cell: Cell) -> str:
    """A cell by its levels alone."""
    return " · ".join(cell.values()) or "all"


class Reached(enum.Enum):
    """When a run was at a loss."""

    BETWEEN = "between two evaluations"
    EARLIER = "at its first evaluation or before"
    NEVER = "never"


@dataclasses.dataclass(frozen=True)
class Matched:
    """The outcome of a `Match`, of the seeds that both kinds of runs have.

    Attributes:
      match: what was compared.
      ratios: T_scratch / T_adapted by seed; of one that was there at its first evaluation already it is at least this,
        of one that never was, below this.
      reached: when the adapted runs were there, by seed.
      loss: the scratch runs' last losses, by seed.
    """

    match: Match
    ratios: tuple[float, ...]
    reached: tuple[Reached, ...]
    loss: tuple[float, ...]

    @property
    def ratio(self) -> Interval | None:
        """The mean over seeds; None where that of one is a bound."""
        return interval(self.ratios) if set(self.reached) == {Reached.BETWEEN} else None

    @property
    def at_least(self) -> float | None:
        """What the mean is at the least, where seeds were there at their first evaluation."""
        return float(np.mean(self.ratios)) if self._bounded_by(Reached.EARLIER) else None

    @property
    def below(self) -> float | None:
        """What the mean is below, where seeds were never there."""
        return float(np.mean(self.ratios)) if self._bounded_by(Reached.NEVER) else None

    def _bounded_by(self, reached: Reached) -> bool:
        return reached in self.reached and set(self.reached) <= {reached, Reached.BETWEEN}

    def __str__(self) -> str:
        """The ratio with its interval and whether that decides, or what is known of it."""
        if (ratio := self.ratio) is not None:
            if math.isnan(ratio.low):
                return f"{ratio.mean:.2f}"
            verdict = "cheaper" if ratio.low > 1 else "dearer" if ratio.high < 1 else "not decided"
            return f"{ratio.mean:.2f} ({ratio.low:.2f} to {ratio.high:.2f}), {verdict}"
        bound = {Reached.EARLIER: "≥ ", Reached.BETWEEN: "", Reached.NEVER: "< "}
        seeds = ", ".join(f"{bound[when]}{ratio:.2f}" for when, ratio in zip(self.reached, self.ratios, strict=True))
        if self.at_least is not None:
            return f"at least {self.at_least:.2f} (by seed {seeds})"
        return f"not known (by seed {seeds})" if self.below is None else f"below {self.below:.2f} (by seed {seeds})"


def matched(match: Match, runs: Sequence[Run]) -> Matched | None:
    """Compares; None where runs are missing."""
    sides = [runs_of(side, runs) for side in (match.adapted, match.scratch)]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds or any(match.metric not in side[seed].curves for side in sides for seed in seeds):
        return None
    ratios, reached, losses = [], [], []
    for seed in seeds:
        adapted, scratch = sides[0][seed], sides[1][seed]
        losses.append(scratch.last(match.metric))
        when, spent = tokens_to(adapted, match.metric, losses[-1])
        reached.append(when)
        ratios.append(scratch.job.size.tokens / spent)
    return Matched(match, tuple(ratios), tuple(reached), tuple(losses))


def runs_of(side: Mapping[str, str], runs: Sequence[Run]) -> dict[int, Run]:
    """{seed: run} of the runs that {"leg": name, factor: level, ...} describes."""
    levels = {factor: level for factor, level in side.items() if factor != "leg"}
    return {run.seed: run for run in runs if run.leg == side["leg"] and levels.items() <= run.cell.items()}


def tokens_to(run: Run, metric: str, loss: float) -> tuple[Reached, float]:
    """When a run's metric is at `loss` for the first time, and after how many tokens of the run.

    Between two evaluations by a straight line; if it was there at the first, that one's tokens; if never, all tokens.
    """
    curve = run.curves[metric]
    tokens = run.tokens(curve.steps)
    below = np.flatnonzero(curve.values <= loss)
    if not len(below):
        return Reached.NEVER, float(run.job.size.tokens)
    i = below[0]
    if i == 0:
        return Reached.EARLIER, float(tokens[0])
    share = (curve.values[i - 1] - loss) / (curve.values[i - 1] - curve.values[i])
    return Reached.BETWEEN, float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def write_csv(path: pathlib.Path, study: StudyConfig, plan: Plan, store: Store) -> None:
    """A row for every run of every cell, finished or not, with the last values of its validation metrics."""
    rows: list[dict[str, Any]] = []
    for cell, leg, job in plan.of_cells:
        for seed in job.seeds if job is not None else study.seeds:
            state = status(plan, cell, leg, job, seed, store)
            row: dict[str, Any] = {**cell, "leg": leg.name, "seed": seed, "status": state}
            if job is not None:
                size = job.size
                row |= {"address": job.address, "parameters": size.parameters, "steps": size.steps}
                row |= {"tokens": size.tokens, "flops": size.flops}
                row |= {leg.tune.binding: job.tuned} if leg.tune else {}
                curves = store.curves(job, seed)
                row |= {name: curve.last for name, curve in curves.items() if name.startswith("validation/")}
                for name, tasks in store.scores(job, seed).items():
                    for task, found in tasks.items():
                        row |= {f"{name}/{task}/{metric}": of["value"] for metric, of in found["metrics"].items()}
                if failed := store.failed_tasks(job, seed):
                    row["failed tasks"] = " ".join(f"{name}/{task}" for name, tasks in failed.items() for task in tasks)
            rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)


def status(plan: Plan, cell: Cell, leg: Leg, job: Job | None, seed: int, store: Store) -> str:
    """finished, failed, running, to do, or waiting: for trials, or for a leg before it."""
    if job is None:
        way = _way_to(plan, cell, leg)
        of_cell = [trials for known, of, trials in plan.trials if known == cell and of.name in way]
        refused = any(known == cell and of.name in way for known, of, _ in plan.refused)
        return "failed" if refused or any(failed_trials(trials, store) for trials in of_cell) else "waiting"
    if store.run_is_finished(job, seed):
        return "finished"
    if seed in store.failures(job):
        return "failed"
    return "running" if store.is_claimed(job) else "to do"


def _way_to(plan: Plan, cell: Cell, leg: Leg) -> set[str]:
    """The names of a leg and of all that a cell's run of it needs."""
    legs, found, left = {of.name: of for known, of, _ in plan.of_cells if known == cell}, set(), [leg.name]
    while left:
        found.add(name := left.pop())
        left += [before for before in (legs[name].after, *legs[name].beside.values()) if before in legs]
    return found


def failed_trials(trials: Sequence[Job], store: Store) -> list[Job]:
    """Those that keep a cell from a choice: not one that diverged, unless all did."""
    failed = [trial for trial in trials if store.failures(trial)]
    lost = [trial for trial in failed if not store.diverged(trial)]
    return lost or (failed if len(failed) == len(trials) else [])


def failed_jobs(plan: Plan, store: Store) -> list[tuple[Cell, Leg, Job]]:
    """The (cell, leg, job) of which a run failed, so that the study is not complete."""
    found = [entry for entry in plan.of_cells if entry[2] is not None and store.failures(entry[2])]
    return found + [(cell, leg, job) for cell, leg, trials in plan.trials for job in failed_trials(trials, store)]


def failed_tasks(plan: Plan, store: Store) -> list[tuple[Cell, Leg, Job, int, str, str]]:
    """(cell, leg, job, seed, "evaluation/task", why) of what trained models could not be asked."""
    return [
        (cell, leg, job, seed, f"{evaluation}/{task}", why)
        for cell, leg, job in plan.of_cells
        if job is not None
        for seed in job.seeds
        for evaluation, tasks in store.failed_tasks(job, seed).items()
        for task, why in tasks.items()
    ]


@dataclasses.dataclass(frozen=True)
class Account:
    """Where the workers' time went, in seconds.

    Attributes:
      workers: from each worker's start to its end.
      runs: by activity, of all runs.
      lost: steps that had to be done again.
      waiting: workers for what others were doing, with nothing else left to do.
    """

    workers: float
    runs: Mapping[Activity, float]
    lost: float
    waiting: float

    @property
    def overhead(self) -> float:
        """Share of the workers' time that is neither training, nor evaluation, nor compilation; with `waiting`."""
        work = sum(self.runs.get(activity, 0.0) for activity in _WORK)
        return 1.0 - work / self.workers if self.workers else math.nan

    @property
    def share_waited(self) -> float:
        """`waiting` as a share of the workers' time."""
        return self.waiting / self.workers if self.workers else math.nan


_WORK = (Activity.STEP, Activity.COMPILE, Activity.EVALUATION)


def account(plan: Plan, store: Store) -> Account:
    """Of all workers and all runs."""
    runs: dict[Activity, float] = {}
    lost = 0.0
    for job in plan.jobs.values():
        ledgers = [store.run_folder(job, seed).goodput for seed in job.seeds]
        for found in map(read_ledger, filter(pathlib.Path.exists, ledgers)):
            lost += found.lost_seconds
            for activity, spent in found.seconds.items():
                runs[activity] = runs.get(activity, 0.0) + spent
    runs[Activity.EVALUATION] = runs.get(Activity.EVALUATION, 0.0) + store.noted(EVALUATION)
    return Account(store.worker_seconds, runs, lost, store.noted(WAITING))
