"""From a study to the runs it needs: each is known by its resolved configuration, so that equal runs are one.

What is to run may depend on what has run: a leg that is tuned has its trials first. `expand` is therefore called again
and again, with what is known by then.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from jaxlm.checkpoints.branch import Branch
from jaxlm.checkpoints.warm_start import WarmStart
from jaxlm.configuration import ConfigError, digest
from jaxlm.models.accounting import count_parameters, flops_per_token
from jaxlm.run import RunConfig, expected_layout
from jaxlm.studies.config import Budget, Cell, Leg, Settings, Start, StudyConfig, Tune
from jaxlm.studies.settings import resolved, resolved_evaluation


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """The runs of one configuration, one for each seed: what a worker takes at a time.

    Attributes:
      address: the leg's name and a digest of the configuration and of all that the runs start from.
      leg: what it is for.
      label: the cell's levels that made it; other cells may share it.
      run: its configuration, but for folder, seed and start.
      settings: of which `run` was made.
      seeds: of its runs.
      parent: whose runs they start from, seed by seed; None: afresh.
      beside: {binding: job} of runs whose folders its configuration names, seed by seed.
      trial: (binding, value) of a tuning run, else None.
      tuned: the value that trials chose, else None.
    """

    address: str
    leg: Leg
    label: str
    run: RunConfig
    settings: Settings
    seeds: tuple[int, ...]
    parent: "Job | None" = None
    beside: Mapping[str, "Job"] = dataclasses.field(default_factory=dict)
    trial: tuple[str, float] | None = None
    tuned: float | None = None

    @functools.cached_property
    def size(self) -> "Size":
        """What one of its runs costs."""
        return size_of(self.run, self.leg.step or self.parent.run.train_steps if self._goes_on else 0)

    @property
    def evaluations(self) -> Mapping[str, Settings]:
        """What its models are asked, by name."""
        return {} if self.trial is not None else self.leg.evaluations

    @property
    def needs(self) -> tuple["Job", ...]:
        """The jobs that must be finished before it."""
        return (*([] if self.parent is None else [self.parent]), *self.beside.values())

    @property
    def _goes_on(self) -> bool:
        return self.parent is not None and self.leg.start is Start.STATE

    def configuration(self, seed: int, folders: Mapping[str, pathlib.Path]) -> RunConfig:
        """The whole configuration of a run, with the folders of this seed's runs by their jobs' addresses."""
        folder = folders[self.address]
        parent_folder = None if self.parent is None else folders[self.parent.address]
        named = [f"{binding} = {str(folders[job.address])!r}" for binding, job in self.beside.items()]
        run = resolved((*self.settings, *named)) if named else self.run
        run = dataclasses.replace(run, model_dir=str(folder), seed=seed, data=dataclasses.replace(run.data, seed=seed))
        if parent_folder is None:
            return run
        if self._goes_on:
            return dataclasses.replace(run, branch=Branch(str(parent_folder), self.leg.step))
        given = run.warm_start or WarmStart(path="")
        return dataclasses.replace(
            run, warm_start=dataclasses.replace(given, path=str(parent_folder), step=self.leg.step)
        )


@dataclasses.dataclass(frozen=True)
class Size:
    """What a run costs.

    Attributes:
      parameters: of the model.
      steps: training steps of its own.
      tokens: positions seen, of all stacks.
      flops: forward and backward.
    """

    parameters: int
    steps: int
    tokens: int
    flops: float


class Results(Protocol):
    """What `expand` asks of the runs that there are."""

    def is_finished(self, job: Job) -> bool:
        """Whether all its runs are."""

    def diverged(self, job: Job) -> bool:
        """Whether one of its runs did."""

    def value(self, job: Job, seed: int, metric: str) -> float | None:
        """The last value of a metric, or None."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study comes to, as far as it is known.

    Attributes:
      jobs: {address: job}, those a job starts from before it.
      of_cells: (cell, leg, job) of every cell and leg; the job is None while it waits for trials.
      trials: (cell, leg, jobs) of every tuned leg that is known.
    """

    jobs: dict[str, Job]
    of_cells: list[tuple[Cell, Leg, Job | None]]
    trials: list[tuple[Cell, Leg, tuple[Job, ...]]]


def expand(study: StudyConfig, results: Results) -> Plan:
    """The study's jobs.

    Raises:
      ConfigError: settings of a cell or an evaluation do not resolve; the message begins with the cell and leg.
      ValueError: a cell is illegal, say by its objective and architecture; likewise.
    """
    for leg in study.legs:
        for name, settings in leg.evaluations.items():
            try:
                resolved_evaluation(settings)
            except (ConfigError, ValueError) as error:
                raise type(error)(f"leg {leg.name}, evaluation {name!r}: {error}") from None
    plan = Plan({}, [], [])
    for cell in study.cells:
        jobs: dict[str, Job | None] = {}
        for leg in study.legs_of(cell):
            parent = jobs.get(leg.after) if leg.after is not None else None
            job = None
            beside = {binding: jobs[other] for binding, other in leg.beside.items() if other in jobs}
            if (leg.after is None or parent is not None) and None not in beside.values():
                try:
                    job = _job_of(study, cell, leg, parent, beside, results, plan)
                except (ConfigError, ValueError) as error:
                    raise type(error)(f"{label_of(cell)}, leg {leg.name}: {error}") from None
            jobs[leg.name] = job
            plan.of_cells.append((cell, leg, job))
    return plan


def label_of(cell: Cell) -> str:
    """A cell in words."""
    return ", ".join(f"{factor} {level}" for factor, level in cell.items()) or "the only cell"


def _job_of(
    study: StudyConfig,
    cell: Cell,
    leg: Leg,
    parent: Job | None,
    beside: Mapping[str, Job],
    results: Results,
    plan: Plan,
) -> Job | None:
    settings = study.settings_of(cell, leg)

    def made(settings: Settings, budget: Budget | None, **options) -> Job:
        job = _make(study, leg, settings, budget, parent, beside, label=label_of(cell), **options)
        known = plan.jobs.get(job.address)
        # The chosen value's trial is the first seed's run, but is asked nothing.
        if known is None or (known.trial is not None and job.trial is None):
            plan.jobs[job.address] = job
        return job

    if leg.tune is None:
        return made(settings, leg.budget)
    trials = tuple(_trials(leg.tune, leg, settings, study.seeds[0], made))
    plan.trials.append((cell, leg, trials))
    if not all(results.is_finished(trial) or results.diverged(trial) for trial in trials):
        return None
    chosen = best_trial(trials, leg.tune, results)
    if chosen is None:
        return None
    return made((*settings, f"{leg.tune.binding} = {chosen!r}"), leg.budget, tuned=chosen)


def _trials(tune: Tune, leg: Leg, settings: Settings, seed: int, made) -> Iterator[Job]:
    for value in tune.values:
        trial = (*settings, *tune.settings, f"{tune.binding} = {value!r}")
        yield made(trial, tune.budget or leg.budget, seeds=(seed,), trial=(tune.binding, value))


def best_trial(trials: tuple[Job, ...], tune: Tune, results: Results) -> float | None:
    """The value whose trial has the lowest metric; None where all diverged."""
    ended = [job for job in trials if not results.diverged(job)]
    found = {job.trial[1]: results.value(job, job.seeds[0], tune.metric) for job in ended}
    finite = {value: loss for value, loss in found.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=finite.get) if finite else None


def _make(
    study: StudyConfig,
    leg: Leg,
    settings: Settings,
    budget: Budget | None,
    parent: Job | None,
    beside: Mapping[str, Job],
    *,
    label: str,
    seeds: tuple[int, ...] | None = None,
    trial: tuple[str, float] | None = None,
    tuned: float | None = None,
) -> Job:
    before = 0
    if parent is not None and leg.start is Start.STATE:
        before = leg.step or parent.run.train_steps
    if budget is not None:
        steps = before + steps_for(resolved((*settings, ENDLESS)), budget)
        settings = (*settings, f"RunConfig.train_steps = {steps}")
    # An address has the addresses of the runs beside it, wherever the study's folder lies.
    run = resolved((*settings, *(f"{binding} = {job.address!r}" for binding, job in beside.items())))
    if run.train_steps <= before:
        raise ValueError(
            f"it goes on from step {before} but ends at {run.train_steps}; give it a budget, or more TRAIN_STEPS."
        )
    seeds = study.seeds if seeds is None else seeds
    origin = "" if parent is None else f"{parent.address} {leg.start.value} {leg.step}"
    return Job(f"{leg.name}-{digest(run, origin)}", leg, label, run, settings, seeds, parent, beside, trial, tuned)


ENDLESS = "RunConfig.train_steps = 1000000000"
"""Settings of a run whose length is not known yet: longer than any stage that has a number of steps."""


def steps_for(run: RunConfig, budget: Budget) -> int:
    """Training steps within a budget, at least one."""
    if budget.steps is not None:
        return budget.steps
    one = size_of(dataclasses.replace(run, train_steps=1, stages=()))
    share = budget.tokens / one.tokens if budget.tokens is not None else budget.flops / one.flops
    return max(1, round(share))


def size_of(run: RunConfig, from_step: int = 0) -> Size:
    """What a run costs from a step on; nothing of its data is opened."""
    tokens, flops = 0, 0.0
    for phase in run.phases:
        lengths = expected_layout(run, phase).row_lengths(run.model_of(phase).architecture)
        rows = max(phase.end - max(phase.start, from_step), 0) * phase.batch_size
        tokens += rows * sum(lengths)
        flops += rows * sum(lengths) * flops_per_token(run.model_of(phase), *lengths)
    return Size(count_parameters(run.model), run.train_steps - from_step, tokens, flops)
