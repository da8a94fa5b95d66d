"""A worker: takes one job after another that nobody else works on, and runs its seeds in this process."""

import collections
import functools
import time
import traceback
from collections.abc import Callable

from jaxlm.checkpoints import pretrained
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.evaluation.suite import evaluate
from jaxlm.evaluation.tasks import TaskError
from jaxlm.run import Programs
from jaxlm.studies.config import StudyConfig
from jaxlm.studies.jobs import Job, Plan, expand, label_of
from jaxlm.studies.settings import evaluation_digest, resolved_evaluation
from jaxlm.studies.store import EVALUATION, WAITING, Failure, Store
from jaxlm.training.loop import Outcome, TrainingDiverged

_PATIENCE = 2.0
"""Seconds between looks, where all that is left waits for other workers."""


Train = Callable[..., Outcome]
"""`jaxlm.train.train`."""


def work(
    study: StudyConfig,
    store: Store,
    train: Train,
    *,
    report: Callable[[str], None] = print,
    only: str | None = None,
    began: float | None = None,
) -> Outcome:
    """Works until nothing is left that can be done.

    Args:
      study: what is to run.
      store: its folder.
      train: trains one run, (RunConfig, programs=Programs) -> Outcome.
      report: is told what begins and what failed.
      only: the label of one cell (`label_of`), whose jobs and those they start from are done; None does all.
      began: when the worker's process began, seconds since 1970, for the account of its time; None is now.

    Returns:
      FINISHED where all jobs are done or have failed; PREEMPTED after a SIGTERM.
    """
    programs = Programs()
    with store.alive(began):
        while True:
            # Anew each time: trials that ended say what comes next.
            plan = expand(study, store)
            left, to_come = unfinished(plan, store, only), flops_to_come(plan)
            if not left:
                return Outcome.FINISHED
            ready = [job for job in left if all(map(store.is_finished, job.needs))]
            ready.sort(key=lambda job: -to_come[job.address])
            if not ready and not any(store.is_claimed(job) for job in left):
                return Outcome.FINISHED  # what is left starts from what has failed
            for job in ready:
                with store.claim(job) as mine:
                    if not mine:
                        continue
                    if store.seeds_left(job):
                        report(f"{job.address}: {job.label}{_trial(job)}")
                        if _run(job, store, train, programs, report) is Outcome.PREEMPTED:
                            return Outcome.PREEMPTED
                    break
            else:
                time.sleep(_PATIENCE)
                store.note(WAITING, _PATIENCE)


def check_questions(study: StudyConfig, plan: Plan, store: Store, only: str | None = None) -> None:
    """Looks, before anything is trained, whether the files are there of evaluations that nobody was asked yet.

    What was there when a run was asked, and is gone, fails its tasks and does not keep the study from going on.

    Args:
      study: whose.
      plan: its jobs as far as they are known; legs that wait for trials will ask too.
      store: its folder.
      only: the label of one cell; None is all.

    Raises:
      ValueError: a task's are not, with leg, evaluation, task and path; or several runs would write the same file.
    """
    by_leg: dict[tuple[str, str], dict[tuple[str, int], bool]] = {}  # of each run, whether it was asked
    for cell, leg, job in plan.of_cells:
        for name in leg.evaluations if only in (None, label_of(cell)) else ():
            known = by_leg.setdefault((leg.name, name), {})
            address, seeds = (label_of(cell), study.seeds) if job is None else (job.address, job.seeds)
            known |= {(address, seed): job is not None and store.was_asked(job, seed, name) for seed in seeds}
    legs = {leg.name: leg for leg in study.legs}
    begun = {evaluation_digest(legs[leg].evaluations[name]) for (leg, name), of in by_leg.items() if any(of.values())}
    settings = {(leg, name): legs[leg].evaluations[name] for leg, name in by_leg}
    written: set[str] = set()  # by the tasks before
    missing: dict[tuple[str, str], str] = {}  # by evaluation and task
    for (leg, name), of in settings.items():
        for task in resolved_evaluation(of).tasks:
            if task.writes and (runs := len(by_leg[leg, name])) > 1:
                raise ValueError(
                    f"Study {study.study_dir}, leg {leg}, evaluation {name!r}, task {task.name}: its {runs} runs would "
                    f"write {task.writes[0]}, each over the others'; leave the annotation out here, and ask one model "
                    f"with python -m jaxlm.evaluate."
                )
            try:
                if evaluation_digest(of) not in begun:
                    task.check(written)
            except TaskError as error:
                missing.setdefault((name, task.name), f"leg {leg}, evaluation {name!r}: {error}")
            written.update(task.writes)
    if missing:
        first, *others = missing
        also = f" {len(others)} more cannot be asked: {', '.join(map('/'.join, others))}." if others else ""
        raise ValueError(f"Study {study.study_dir}, {missing[first]}{also}")


def unfinished(plan: Plan, store: Store, only: str | None = None) -> list[Job]:
    """The jobs of a study, or of the cell labelled `only`, that are not done and have not failed."""
    wanted = plan.jobs.values() if only is None else jobs_of(plan, only)
    return [job for job in wanted if store.seeds_left(job)]


def flops_to_come(plan: Plan) -> dict[str, float]:
    """By a job's address, the FLOPs of its runs and of the longest row of jobs that start from them.

    Workers take the longest first, so that none is left with a long row of jobs when the others have nothing to do.
    """
    waiting = [(label_of(cell), leg.name, job) for cell, leg, jobs in plan.waiting for job in jobs]
    trials = [(label_of(cell), leg.name, job) for cell, leg, jobs in plan.trials for job in jobs]
    after = collections.defaultdict(list)
    for job in (*plan.jobs.values(), *(job for *_, job in waiting)):
        for needed in job.needs:
            after[_which(needed)].append(job)
    chosen = {(cell, leg): job for cell, leg, job in waiting if job.trial is None}
    for cell, leg, job in (*trials, *waiting):
        if job.trial is not None and (cell, leg) in chosen:
            after[_which(job)].append(chosen[cell, leg])

    @functools.cache  # several trials come before the same run
    def longest(job: Job) -> float:
        return len(job.seeds) * job.size.flops + max(map(longest, after[_which(job)]), default=0.0)

    return {address: longest(job) for address, job in plan.jobs.items()}


def _which(job: Job) -> tuple:
    return job.address, job.waits, job.trial  # a run that waits for its trials may have the address of one of them


def jobs_of(plan: Plan, label: str) -> list[Job]:
    """A cell's jobs and those that they start from."""
    own = [job for cell, _, job in plan.of_cells if label_of(cell) == label and job is not None]
    own += [job for cell, _, jobs in plan.trials if label_of(cell) == label for job in jobs]
    found: dict[str, Job] = {}
    while own:
        job = own.pop()
        found[job.address] = job
        own += job.needs
    return [job for job in plan.jobs.values() if job.address in found]


def _run(job: Job, store: Store, train: Train, programs: Programs, report: Callable[[str], None]) -> Outcome:
    """All seeds of a job; one that fails does not keep the others from running."""
    for seed in store.seeds_left(job):
        folder, outcome = store.run_folder(job, seed), Outcome.FINISHED
        try:
            if not store.run_is_trained(job, seed):
                run = job.configuration(seed, {of.address: store.run_folder(of, seed).path for of in (job, *job.needs)})
                outcome = train(run, programs=programs)
            if outcome is Outcome.FINISHED:
                _evaluate(job, seed, store, report)
        except Exception as error:  # one that is out of memory, say, must not take the next cells' worker with it
            if not isinstance(error, ValueError | CheckpointError | TrainingDiverged | OSError):
                report(traceback.format_exc())
                error = RuntimeError(f"{type(error).__name__}: {error}")
            report(f"{job.address}, seed {seed}, failed: {error}")
            store.fail(job, Failure(str(error), seed, isinstance(error, TrainingDiverged)))
            continue
        finally:
            folder.release()
        if outcome is Outcome.PREEMPTED:
            return outcome
        if outcome is not Outcome.FINISHED:
            error = f"it ended early ({outcome.value}); give it more data or fewer steps."
            store.fail(job, Failure(error, seed))
    return Outcome.FINISHED


def _evaluate(job: Job, seed: int, store: Store, report: Callable[[str], None]) -> None:
    """Asks a trained model what its leg wants to know and it has not answered yet.

    A task that cannot be asked is noted in the results; neither the other tasks nor the legs to come wait for it.
    """
    left = store.evaluations_left(job, seed)
    if not left:
        return
    began = time.time()
    model, mesh = None, None
    for name in left:
        asked, folder = resolved_evaluation(job.evaluations[name]), store.evaluation_folder(job, seed, name)
        if model is None or asked.parallel != mesh:
            model, mesh = None, asked.parallel  # never two at a time
            model = pretrained.load(store.run_folder(job, seed).path, parallel=mesh.on() if mesh else None)
        evaluate(asked, model, folder=folder, report=report, tolerant=True)
    store.note(EVALUATION, time.time() - began)


def _trial(job: Job) -> str:
    return "" if job.trial is None else f", trying {job.trial[0]} = {job.trial[1]}"
