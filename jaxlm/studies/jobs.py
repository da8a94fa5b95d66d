"""From a study to the runs it needs: each is known by its resolved configuration, so that equal runs are one.

What is to run may depend on what has run: a leg that is tuned has its trials first. `expand` is therefore called again
and again, with what is known by then; what it computes is kept by settings. What waits for trials is made all the same,
with the first of the values, so that what is wrong with it, and what it costs, is known before anything runs.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from jaxlm.checkpoints.branch import Branch
from jaxlm.checkpoints.warm_start import WarmStart
from jaxlm.configuration import digest, resolved_text
from jaxlm.models import ModelConfig
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
      size: what one of its runs costs.
      parent: whose runs they start from, seed by seed; None: afresh.
      beside: {binding: job} of runs whose folders its configuration names, seed by seed.
      trial: (binding, value) of a tuning run, else None.
      tuned: the value that trials chose, or the only one; else None.
      waits: a value that trials have yet to choose, here or in what it needs, is the first of those to be tried: the
        job is there to be checked and counted, not to be run.
    """

    address: str
    leg: Leg
    label: str
    run: RunConfig
    settings: Settings
    seeds: tuple[int, ...]
    size: "Size"
    parent: "Job | None" = None
    beside: Mapping[str, "Job"] = dataclasses.field(default_factory=dict)
    trial: tuple[str, float] | None = None
    tuned: float | None = None
    waits: bool = False

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
      of_cells: (cell, leg, job) of every cell and leg; the job is None while it waits for trials, and where all trials
        diverged or it was refused, or what it starts from.
      trials: (cell, leg, jobs) of every tuned leg that is known.
      waiting: (cell, leg, jobs) of what waits for trials, a leg's own trials before its run; see `Job.waits`. None of
        these is among `jobs`.
      refused: (cell, leg, why) where what trials chose cannot be a run, or they chose nothing.
    """

    jobs: dict[str, Job] = dataclasses.field(default_factory=dict)
    of_cells: list[tuple[Cell, Leg, Job | None]] = dataclasses.field(default_factory=list)
    trials: list[tuple[Cell, Leg, tuple[Job, ...]]] = dataclasses.field(default_factory=list)
    waiting: list[tuple[Cell, Leg, tuple[Job, ...]]] = dataclasses.field(default_factory=list)
    refused: list[tuple[Cell, Leg, str]] = dataclasses.field(default_factory=list)


class _Unrun:
    """Results of a study that has yet to begin."""

    def is_finished(self, job: Job) -> bool:
        """Never."""
        return False

    def diverged(self, job: Job) -> bool:
        """Never."""
        return False

    def value(self, job: Job, seed: int, metric: str) -> float | None:
        """None."""
        return None


def expand(study: StudyConfig, results: Results) -> Plan:
    """The study's jobs.

    Raises:
      ValueError: settings of a cell or an evaluation do not resolve, or a cell is illegal, say by its objective and
        architecture; the message begins with the cell and leg. This does not depend on the results: what they make
        illegal is in `Plan.refused`, and does not stop the other cells.
    """
    for leg in study.legs:
        for name, settings in leg.evaluations.items():
            try:
                resolved_evaluation(settings)
            except ValueError as error:
                raise ValueError(f"leg {leg.name}, evaluation {name!r}: {error}") from None
    for cell, leg, error in _expanded(study, _Unrun()).refused:
        raise ValueError(f"{label_of(cell)}, leg {leg.name}: {error}")
    return _expanded(study, results)


def _expanded(study: StudyConfig, results: Results) -> Plan:
    plan = Plan()
    for cell in study.cells:
        jobs: dict[str, Job | None] = {}
        for leg in study.legs_of(cell):
            parent = jobs.get(leg.after) if leg.after is not None else None
            job = None
            beside = {binding: jobs[other] for binding, other in leg.beside.items() if other in jobs}
            if (leg.after is None or parent is not None) and None not in beside.values():
                try:
                    job = _job_of(study, cell, leg, parent, beside, results, plan)
                except ValueError as error:
                    plan.refused.append((cell, leg, str(error)))
            jobs[leg.name] = job
            if job is not None and job.waits:
                plan.waiting.append((cell, leg, (job,)))
            plan.of_cells.append((cell, leg, None if job is None or job.waits else job))
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
    settings, tune = study.settings_of(cell, leg), leg.tune
    needs_wait = any(job.waits for job in (parent, *beside.values()) if job is not None)

    def made(settings: Settings, budget: Budget | None, *, waits: bool = needs_wait, **options) -> Job:
        job = _make(study, leg, settings, budget, parent, beside, label=label_of(cell), waits=waits, **options)
        known = plan.jobs.get(job.address)
        # The chosen value's trial is the first seed's run, but is asked nothing.
        if not waits and (known is None or (known.trial is not None and job.trial is None)):
            plan.jobs[job.address] = job
        return job

    def with_value(value: float, **options) -> Job:
        return made((*settings, f"{tune.binding} = {value!r}"), leg.budget, tuned=value, **options)

    if tune is None:
        return made(settings, leg.budget)
    if len(set(tune.values)) == 1:
        return with_value(tune.values[0])
    trials = tuple(_trials(tune, leg, settings, study.seeds[0], made))
    (plan.waiting if needs_wait else plan.trials).append((cell, leg, trials))
    if needs_wait or not all(results.is_finished(trial) or results.diverged(trial) for trial in trials):
        return with_value(tune.values[0], waits=True)
    chosen = best_trial(trials, tune, results)
    if chosen is None and not all(map(results.diverged, trials)):
        raise ValueError(f"no trial ended with a finite {tune.metric!r}; give Tune.metric one that they have.")
    return None if chosen is None else with_value(chosen)


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
    waits: bool,
    trial: tuple[str, float] | None = None,
    tuned: float | None = None,
) -> Job:
    before = 0
    if parent is not None and leg.start is Start.STATE:
        before = leg.step or parent.run.train_steps
    if budget is not None:
        settings = (*settings, f"RunConfig.train_steps = {before + _steps(settings, budget)}")
    # An address has the addresses of the runs beside it, wherever the study's folder lies.
    whole = (*settings, *(f"{binding} = {job.address!r}" for binding, job in beside.items()))
    run = resolved(whole)
    if run.train_steps <= before:
        raise ValueError(
            f"it goes on from step {before} but ends at {run.train_steps}; give it a budget, or more TRAIN_STEPS."
        )
    seeds = study.seeds if seeds is None else seeds
    origin = "" if parent is None else f"{parent.address} {leg.start.value} {leg.step}"
    return Job(
        address=f"{leg.name}-{_digest(whole, origin)}",
        leg=leg,
        label=label,
        run=run,
        settings=settings,
        seeds=seeds,
        size=_size(whole, before),
        parent=parent,
        beside=beside,
        trial=trial,
        tuned=tuned,
        waits=waits,
    )


@functools.cache
def _digest(settings: Settings, origin: str) -> str:
    return digest(resolved(settings), origin)


@functools.cache
def _size(settings: Settings, from_step: int) -> "Size":
    return size_of(resolved(settings), from_step)


@functools.cache
def _steps(settings: Settings, budget: Budget) -> int:
    return steps_for(resolved((*settings, ENDLESS)), budget)


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
        flops += rows * sum(lengths) * _of_model(flops_per_token, run.model_of(phase), *lengths)
    return Size(_of_model(count_parameters, run.model), run.train_steps - from_step, tokens, flops)


_counted: dict[tuple, float] = {}


def _of_model[T: (int, float)](count: Callable[..., T], model: ModelConfig, *lengths: int) -> T:
    """`count` of a model, which traces it: once for all runs of the process with this model."""
    key = (count, resolved_text(model), lengths)
    if key not in _counted:
        _counted[key] = count(model, *lengths)
    return _counted[key]
