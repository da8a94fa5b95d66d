"""From a study to the runs it needs: each is known by its resolved configuration, so that equal runs are one.

What is to run may depend on what has run: a leg that is tuned has its trials first. `expand` is therefore called again
and again, with what is known by then.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Protocol

from jaxlm.checkpoints.branch import Branch
from jaxlm.checkpoints.warm_start import WarmStart
from jaxlm.configuration import ConfigError, resolve, resolved_text
from jaxlm.evaluation.suite import EvaluationConfig
from jaxlm.models.accounting import count_parameters, flops_per_token
from jaxlm.run import RunConfig, expected_layout
from jaxlm.studies.config import Budget, Cell, Leg, Settings, Start, StudyConfig, Tune


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """The runs of one configuration, one for each seed: what a worker takes at a time.

    Attributes:
      address: the leg's name and a digest of the configuration and of all that the runs start from.
      leg: what it is for.
      label: the cell's levels that made it; other cells may share it.
      run: its configuration, but for folder, seed and start.
      seeds: of its runs.
      parent: whose runs they start from, seed by seed; None: afresh.
      trial: (binding, value) of a tuning run, else None.
      tuned: the value that trials chose, else None.
    """

    address: str
    leg: Leg
    label: str
    run: RunConfig
    seeds: tuple[int, ...]
    parent: "Job | None" = None
    trial: tuple[str, float] | None = None
    tuned: float | None = None

    @functools.cached_property
    def size(self) -> "Size":
        """What one of its runs costs."""
        return size_of(self.run, self.leg.step or self.parent.run.train_steps if self._goes_on else 0)

    @property
    def evaluation(self) -> EvaluationConfig | None:
        """What its models are asked."""
        return None if self.trial is not None else self.leg.evaluation

    @property
    def _goes_on(self) -> bool:
        return self.parent is not None and self.leg.start is Start.STATE

    def configuration(self, seed: int, folder: pathlib.Path, parent_folder: pathlib.Path | None) -> RunConfig:
        """The whole configuration of a run."""
        run = dataclasses.replace(
            self.run, model_dir=str(folder), seed=seed, data=dataclasses.replace(self.run.data, seed=seed)
        )
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
      ConfigError: a cell's settings do not resolve; the message begins with the cell and leg.
      ValueError: a cell is illegal, say by its objective and architecture; likewise.
    """
    plan = Plan({}, [], [])
    for cell in study.cells:
        jobs: dict[str, Job | None] = {}
        for leg in study.legs_of(cell):
            parent = jobs.get(leg.after) if leg.after is not None else None
            job = None
            if leg.after is None or parent is not None:
                try:
                    job = _job_of(study, cell, leg, parent, results, plan)
                except (ConfigError, ValueError) as error:
                    raise type(error)(f"{label_of(cell)}, leg {leg.name}: {error}") from None
            jobs[leg.name] = job
            plan.of_cells.append((cell, leg, job))
    return plan


def label_of(cell: Cell) -> str:
    """A cell in words."""
    return ", ".join(f"{factor} {level}" for factor, level in cell.items()) or "the only cell"


def _job_of(study: StudyConfig, cell: Cell, leg: Leg, parent: Job | None, results: Results, plan: Plan) -> Job | None:
    settings = study.settings_of(cell, leg)

    def made(settings: Settings, budget: Budget | None, **options) -> Job:
        job = _make(study, leg, settings, budget, parent, label=label_of(cell), **options)
        known = plan.jobs.get(job.address)
        if known is None or set(known.seeds) < set(job.seeds):  # the chosen value's trial is the first seed's run
            plan.jobs[job.address] = job
        return job

    if leg.tune is None:
        return made(settings, leg.budget)
    trials = tuple(_trials(leg.tune, leg, settings, study.seeds[0], made))
    plan.trials.append((cell, leg, trials))
    if not all(results.is_finished(trial) for trial in trials):
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
    """The value whose trial has the lowest metric; None where no trial has a finite one."""
    found = {job.trial[1]: results.value(job, job.seeds[0], tune.metric) for job in trials}
    finite = {value: loss for value, loss in found.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=finite.get) if finite else None


def _make(
    study: StudyConfig,
    leg: Leg,
    settings: Settings,
    budget: Budget | None,
    parent: Job | None,
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
        bindings = (*settings, "RunConfig.train_steps = 1")
        steps = before + steps_for(resolved(bindings), budget)
        settings = (*settings, f"RunConfig.train_steps = {steps}")
    run = resolved(settings)
    if run.train_steps <= before:
        raise ValueError(
            f"it goes on from step {before} but ends at {run.train_steps}; give it a budget, or more TRAIN_STEPS."
        )
    seeds = study.seeds if seeds is None else seeds
    origin = "" if parent is None else f"{parent.address} {leg.start.value} {leg.step}"
    digest = hashlib.sha256(f"{resolved_text(run)}\n{origin}".encode()).hexdigest()[:12]
    return Job(f"{leg.name}-{digest}", leg, label, run, seeds, parent, trial, tuned)


@functools.lru_cache(maxsize=4096)
def resolved(settings: Settings) -> RunConfig:
    """The run that settings describe, without a folder.

    Raises:
      ConfigError: they do not resolve.
    """
    files = [setting for setting in settings if setting.endswith(".gin")]
    bindings = [setting for setting in settings if not setting.endswith(".gin")]
    arguments = []
    for binding in (*bindings, "RunConfig.model_dir = 'unset'"):
        name, equals, value = binding.partition("=")
        if not equals:
            raise ConfigError(f"the setting {binding!r} is neither a .gin file nor NAME = value.")
        arguments.append(f"--gin.{name.strip()}={value.strip()}")
    # Included in one file: what a later one replaces may then remain unused.
    with tempfile.TemporaryDirectory() as scratch:
        together = pathlib.Path(scratch) / "settings.gin"
        together.write_text("".join(f"include '{file}'\n" for file in files))
        return resolve(RunConfig, [f"--gin_file={together}", *arguments], warn=False)


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
