"""A study's folder: where each run lies, what is finished, failed or being worked on.

study.gin           the study's resolved configuration
runs/<address>/     the runs of a job: seed<seed>/ (run folders, with evaluations/), seed<seed>-failed.json, lock
workers/            <i>.log: what a worker printed; <began>-<pid>.alive: touched while it lives; time.jsonl: see `note`
cells.csv report.md figures/    see `jaxlm.studies.report`

A job is being worked on while its lock is held, which the kernel lets go of even after SIGKILL.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jaxlm.checkpoints.stored import committed_steps
from jaxlm.evaluation.suite import AGAIN, EXAMPLES, RESULTS, failures_in, results_in, try_again
from jaxlm.studies.jobs import Job
from jaxlm.studies.settings import evaluation_digest
from jaxlm.training.report import Curve, read_curves
from jaxlm.training.run_folder import RunFolder

_HEARTBEAT = 5.0
"""Seconds between a worker's signs of life."""
EVALUATION, WAITING = "evaluation", "waiting"
"""What `Store.note` has of workers' time: of trained models; for other workers."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a run failed.

    Attributes:
      error: a sentence.
      seed: of the run.
      diverged: its numbers did; they would again, so that it is not tried again.
    """

    error: str
    seed: int
    diverged: bool = False


@dataclasses.dataclass(frozen=True)
class Store:
    """Reads and claims what lies in a study's folder."""

    path: pathlib.Path

    def open(self, configuration: str) -> None:
        """Makes the folder, or checks that it is a study's, and keeps the study's configuration in it.

        A study may grow: what another configuration ran stays, and is taken where the new one asks for the same.

        Raises:
          ValueError: the folder has files but is no study's.
        """
        record = self.path / "study.gin"
        if self.path.exists() and not record.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} has files but no study.gin, so it is no study's folder; choose a new one.")
        self.path.mkdir(parents=True, exist_ok=True)
        record.write_text(configuration)

    @contextlib.contextmanager
    def alive(self, began: float | None = None) -> Iterator[None]:
        """Notes that a worker lives, every few seconds until the block ends, so that a killed one's time counts too.

        Args:
          began: when its time begins, seconds since 1970; None is now.
        """
        folder, began = self.path / "workers", time.time() if began is None else began
        folder.mkdir(exist_ok=True)
        note = folder / f"{began:.3f}-{os.getpid()}.alive"
        note.touch()
        over = threading.Event()

        def touch() -> None:
            while not over.wait(_HEARTBEAT):
                note.touch()

        heart = threading.Thread(target=touch, daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()
            note.touch()

    @property
    def worker_seconds(self) -> float:
        """How long all workers lived, together."""
        notes = self.path.glob("workers/*.alive")
        return sum(max(note.stat().st_mtime - float(note.name.partition("-")[0]), 0.0) for note in notes)

    def note(self, activity: str, seconds: float) -> None:
        """Adds to the time that workers spent, outside of runs, on an activity: `EVALUATION` or `WAITING`."""
        with (self.path / "workers" / "time.jsonl").open("a") as lines:
            lines.write(json.dumps({activity: seconds}) + "\n")

    def noted(self, activity: str) -> float:
        """Seconds that were noted of an activity."""
        path = self.path / "workers" / "time.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return sum(json.loads(line).get(activity, 0.0) for line in lines)

    def job_folder(self, job: Job) -> pathlib.Path:
        """Where the runs of a job lie."""
        return self.path / "runs" / job.address

    def run_folder(self, job: Job, seed: int) -> RunFolder:
        """The folder of one run."""
        return RunFolder(self.job_folder(job) / f"seed{seed}")

    def run_is_trained(self, job: Job, seed: int) -> bool:
        """Whether a run's training ended as planned."""
        folder = self.run_folder(job, seed)
        return folder.run_json.exists() and (folder.read()["finished_at_step"] or 0) >= job.run.train_steps

    def run_is_finished(self, job: Job, seed: int) -> bool:
        """Whether a run is trained, and was asked what its leg wants, be it that tasks failed."""
        return self.run_is_trained(job, seed) and all(self.was_asked(job, seed, name) for name in job.evaluations)

    def was_asked(self, job: Job, seed: int, name: str) -> bool:
        """Whether a run's model has been asked an evaluation, be it that tasks of it failed."""
        return (self.evaluation_folder(job, seed, name) / RESULTS).exists()

    def evaluations_left(self, job: Job, seed: int) -> list[str]:
        """The names of the evaluations that a run's model has yet to answer, or to be asked again."""
        again = {name: (self.evaluation_folder(job, seed, name) / AGAIN).exists() for name in job.evaluations}
        return [name for name in job.evaluations if again[name] or not self.was_asked(job, seed, name)]

    def seeds_left(self, job: Job) -> list[int]:
        """The seeds whose runs have something left to do, and have not failed."""
        failed = self.failures(job)
        return [
            seed
            for seed in job.seeds
            if seed not in failed and (not self.run_is_trained(job, seed) or self.evaluations_left(job, seed))
        ]

    def evaluation_folder(self, job: Job, seed: int, name: str) -> pathlib.Path:
        """Where the answers of a run's model lie; another folder for other questions."""
        return self.run_folder(job, seed).path / "evaluations" / evaluation_digest(job.evaluations[name])

    def scores(self, job: Job, seed: int) -> dict[str, dict[str, Any]]:
        """{evaluation: {task: {"primary", "metrics", "chance", ...}}} of a run, as `jaxlm.evaluate` writes them."""
        found = {name: results_in(folder) for name, folder in self._asked(job, seed)}
        return {name: results["tasks"] for name, results in found.items() if results is not None}

    def failed_tasks(self, job: Job, seed: int) -> dict[str, dict[str, str]]:
        """{evaluation: {task: why}} of the tasks that a run's model could not be asked."""
        return {name: failed for name, folder in self._asked(job, seed) if (failed := failures_in(folder))}

    def examples(self, job: Job, seed: int) -> dict[str, pathlib.Path]:
        """{evaluation: file} of what a run's model answered to each question."""
        files = {name: folder / EXAMPLES for name, folder in self._asked(job, seed)}
        return {name: file for name, file in files.items() if file.exists()}

    def _asked(self, job: Job, seed: int) -> list[tuple[str, pathlib.Path]]:
        """(name, folder) of the evaluations that a run's model has answered."""
        asked = [name for name in job.evaluations if self.was_asked(job, seed, name)]
        return [(name, self.evaluation_folder(job, seed, name)) for name in asked]

    def is_finished(self, job: Job) -> bool:
        """Whether all runs of a job ended as planned."""
        return all(self.run_is_finished(job, seed) for seed in job.seeds)

    def failures(self, job: Job) -> dict[int, Failure]:
        """{seed: why} of the runs of a job that failed."""
        found = {}
        for seed in job.seeds:
            with contextlib.suppress(FileNotFoundError):
                found[seed] = Failure(**json.loads(self.failed_json(job, seed).read_text()))
        return found

    def failed_json(self, job: Job, seed: int) -> pathlib.Path:
        """Where it is noted that a run failed."""
        return self.job_folder(job) / f"seed{seed}-failed.json"

    def diverged(self, job: Job) -> bool:
        """Whether one of its runs did."""
        return any(failure.diverged for failure in self.failures(job).values())

    def fail(self, job: Job, failure: Failure) -> None:
        """Notes that a run failed."""
        path = self.failed_json(job, failure.seed)
        partial = path.with_suffix(".partial")  # others may be reading it
        partial.write_text(json.dumps(dataclasses.asdict(failure), indent=1) + "\n")
        partial.replace(path)

    def forget_failures(self, jobs: Iterable[Job]) -> None:
        """So that runs that failed, but did not diverge, are tried again, and tasks that failed after training; not
        those of a job that is worked on."""
        for job in jobs:
            asked = [self.evaluation_folder(job, seed, name) for seed in job.seeds for name in job.evaluations]
            failed = [seed for seed, failure in self.failures(job).items() if not failure.diverged]
            if not failed and not any(map(failures_in, asked)):
                continue
            with self.claim(job) as free:
                if free:
                    for seed in failed:
                        self.failed_json(job, seed).unlink(missing_ok=True)
                    for folder in filter(failures_in, asked):
                        try_again(folder)

    def steps_done(self, job: Job, seed: int) -> int:
        """The newest committed step of a run."""
        steps = committed_steps(self.run_folder(job, seed).checkpoints)
        return steps[-1] if steps else 0

    def curves(self, job: Job, seed: int) -> dict[str, Curve]:
        """The metrics of a run over its steps."""
        path = self.run_folder(job, seed).metrics
        if not path.exists():
            return {}
        if not self.run_is_trained(job, seed):
            return read_curves(path)
        return _finished_curves(path)

    def value(self, job: Job, seed: int, metric: str) -> float | None:
        """The last value of a metric, or None."""
        curve = self.curves(job, seed).get(metric)
        return None if curve is None else curve.last

    @contextlib.contextmanager
    def claim(self, job: Job) -> Iterator[bool]:
        """Whether this process may work on a job; no other one may until the block ends."""
        folder = self.job_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)

    def is_claimed(self, job: Job) -> bool:
        """Whether some process works on a job."""
        if not (self.job_folder(job) / "lock").exists():
            return False
        with self.claim(job) as free:
            return not free


@functools.lru_cache(maxsize=256)
def _finished_curves(path: pathlib.Path) -> dict[str, Curve]:
    return read_curves(path)
