"""Runs a study: a grid of configurations, several seeds, legs that follow one another, and a report at the end.

python -m jaxlm.study --gin_file=gin_configs/studies/quickstart.gin
python -m jaxlm.study --gin_file=... --plan          # every cell's parameters, FLOPs and expected time; runs nothing
python -m jaxlm.study --gin_file=... --report        # the report of what is finished by now
python -m jaxlm.study --gin_file=... --commands      # a command a cell; --commands='./launch/slurm.sh ...': a job
python -m jaxlm.study --ladder                       # sizes x tokens under muP: gin_configs/studies/ladder.gin

--workers=N               processes on this machine (1); more may be started anywhere that sees the folder
--cell="NAME, ..."        works on this cell alone, in this process (what --commands prints)
--worker                  works on any cell in this process; what fails is in the report, not in the exit status
--xla_preset=NAME         compiler flags of a chip, as of jaxlm.train
--gin_file, --gin.NAME    as of jaxlm.train; they describe a jaxlm.studies.StudyConfig

Started again, a study or a cell runs what is missing; what failed is tried again, unless it diverged, and of an
evaluation the tasks that failed. Exits with 1 if cells or tasks failed, 75 after SIGTERM.
"""

import hashlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from jaxlm.configuration import resolve_or_exit, resolved_text, take_flags
from jaxlm.exit_status import ExitStatus, ended
from jaxlm.parallel import xla_flags
from jaxlm.studies.config import StudyConfig
from jaxlm.studies.jobs import Job, Plan, expand, label_of
from jaxlm.studies.report import status_rows, write_report
from jaxlm.studies.results import cell_name, failed_jobs, failed_tasks
from jaxlm.studies.store import Store
from jaxlm.studies.worker import check_questions, jobs_of, work
from jaxlm.train import train
from jaxlm.training import machine
from jaxlm.training.loop import Outcome
from jaxlm.training.progress import duration, human, make_console

_LADDER = "--gin_file=gin_configs/studies/ladder.gin"
_REFRESH = 2.0  # seconds between looks at the workers


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. JAXLM_TRACEBACK=1 shows where an error came from."""
    began = machine.process_began() if arguments is None else time.time()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    options = {"switches": ("plan", "report", "worker", "ladder"), "optional": ("commands",)}
    flags, rest = take_flags(arguments, ("workers", "cell", "xla_preset"), **options)
    if "ladder" in flags:
        rest = [_LADDER, *rest]
    study = resolve_or_exit(StudyConfig, rest)
    store = Store(pathlib.Path(study.study_dir).expanduser().resolve())
    try:
        xla_flags.use(flags.get("xla_preset"))  # the workers' too: it sets the environment
        if "plan" in flags:
            return show_plan(study, store)
        store.open(resolved_text(study))
        if "report" in flags:
            return finish(study, store)
        if "commands" in flags:
            expand(study, store)  # what is wrong with a cell is said before it is submitted
            return print_commands(study, rest, flags["commands"])
        if "worker" in flags or "cell" in flags:
            return work_here(study, store, flags.get("cell"), began)
        return supervise(study, store, rest, workers_of(flags))
    except (ValueError, OSError) as error:
        if os.environ.get("JAXLM_TRACEBACK"):
            raise
        print(f"jaxlm.study: {error}", file=sys.stderr)
        return ExitStatus.FAILED


def workers_of(flags: dict[str, str]) -> int:
    """--workers.

    Raises:
      ValueError: it is no number of processes.
    """
    given = flags.get("workers", "1")
    if not given.isdecimal() or given == "0":
        raise ValueError(f"--workers={given} is not a number of processes; write --workers=2.")
    return int(given)


def show_plan(study: StudyConfig, store: Store) -> int:
    """Prints what the study comes to, by cell and leg; starts nothing."""
    plan = expand(study, store)
    speed = machine.matmul_flops_per_second() * machine.EFFICIENCY
    table = Table("cell", "leg", "parameters", "steps", "tokens", "FLOPs", "time", box=None)

    def row(cell: str, leg: str, jobs: Sequence[Job]) -> None:
        size, runs = jobs[0].size, sum(len(job.seeds) for job in jobs)
        numbers = [human(x).strip() for x in (size.parameters, size.steps, size.tokens, size.flops)]
        table.add_row(cell, leg, *numbers, f"{runs} x {duration(size.flops / speed)}")

    for cell, leg, jobs in plan.trials:
        row(cell_name(cell), f"{leg.name}, trials", jobs)
    for cell, leg, job in plan.of_cells:
        if job is not None:
            row(cell_name(cell), leg.name, [job])
    for cell, leg, jobs in plan.waiting:
        row(cell_name(cell), f"{leg.name}{', trials' if jobs[0].trial else ''} (after trials)", jobs)
    for cell, leg, job in plan.of_cells:
        if job is None and not any((cell, leg) == entry[:2] for entry in plan.waiting):
            table.add_row(cell_name(cell), leg.name, "none: it or what it starts from failed", *[""] * 4)
    console = make_console()
    console.print(table)
    console.print(_total(plan, store, speed))
    _say_left_out(study, console)
    return ExitStatus.FINISHED


def _total(plan: Plan, store: Store, speed: float) -> str:
    """What a study has left to do, in a sentence.

    Args:
      plan: the study's.
      store: what of it is done.
      speed: FLOP/s.
    """
    runs = {(job.address, seed): job for job in plan.jobs.values() for seed in job.seeds}
    later = {(job.address, seed): job for *_, jobs in plan.waiting for job in jobs for seed in job.seeds}
    left = [
        (job, seed)
        for (_, seed), job in runs.items()
        if not store.run_is_finished(job, seed)
        and not ((failure := store.failures(job).get(seed)) and failure.diverged)  # which is not tried again
    ]
    now = sum(job.size.flops for job, seed in left if not store.run_is_trained(job, seed))
    waiting = [job for run, job in later.items() if run not in runs]
    flops = now + sum(job.size.flops for job in waiting)
    share = f" ({1 - now / flops:.0%} of them after trials)" if waiting else ""
    asked = any(leg.evaluations for _, leg, _ in plan.of_cells)
    return (
        f"{len(runs) + len(waiting)} runs that differ, {len(left) + len(waiting)} of them to do: "
        f"{human(flops).strip()} FLOPs{share}, about {duration(flops / speed)} at half of this machine's "
        f"{human(speed / machine.EFFICIENCY).strip()}FLOP/s"
        f"{'; the time of evaluations is not known and not included' if asked else ''}."
    )


def print_commands(study: StudyConfig, arguments: list[str], launcher: str = "") -> int:
    """Prints a command for each cell; what cells share is run by the first that needs it.

    Args:
      arguments: that describe the study.
      launcher: of launch/, with its options; "" is this machine's Python.
    """
    given = " ".join(map(shlex.quote, arguments))
    for cell in study.cells:
        label = label_of(cell)
        words = re.sub(r"[^a-z0-9]+", "-", label.lower())[:34].strip("-")
        name = f"{words}-{hashlib.sha256(label.encode()).hexdigest()[:5]}"  # words alone may be another cell's too
        start = f"{launcher} --name={name}" if launcher else "python -m jaxlm.study"
        print(f"{start} {given} --cell={shlex.quote(label)}")
    return ExitStatus.FINISHED


def work_here(study: StudyConfig, store: Store, only: str | None, began: float | None = None) -> int:
    """A worker's life; `began` is when its process did, see `work`."""
    labels = [label_of(cell) for cell in study.cells]
    if only is not None and only not in labels:
        raise ValueError(f"The study has no cell {only!r}; it has {'; '.join(labels)}.")
    plan = expand(study, store)
    check_questions(study, plan, store, only)
    if only is not None:
        store.forget_failures(jobs_of(plan, only))
    outcome = work(study, store, train, only=only, began=began, report=lambda line: print(line, flush=True))
    if outcome is Outcome.PREEMPTED:
        return ended(ExitStatus.PREEMPTED)
    plan = expand(study, store)
    _say_refused(plan)
    lost = (*failed_jobs(plan, store), *failed_tasks(plan, store), *plan.refused)
    failed = [cell for cell, *_ in lost if label_of(cell) == only]
    return ExitStatus.FAILED if failed else ExitStatus.FINISHED


def supervise(study: StudyConfig, store: Store, arguments: list[str], workers: int) -> int:
    """Starts workers, shows what they do, and writes the report when they are done."""

    plan = expand(study, store)  # what is wrong with a cell is said before anything starts
    check_questions(study, plan, store)
    store.forget_failures(plan.jobs.values())
    console = make_console()
    _say_left_out(study, console)
    processes = [_start_worker(store, arguments, i, workers) for i in range(workers)]
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])  # they keep what they have
    try:
        with Live(console=console, refresh_per_second=1, transient=not console.is_terminal) as live:
            while any(process.poll() is None for process in processes):
                if console.is_terminal:
                    live.update(_status_table(study, store))
                time.sleep(_REFRESH)
    finally:
        for process in processes:
            process.terminate()
        statuses = [process.wait() for process in processes]
    if ExitStatus.PREEMPTED in statuses:
        console.print("Stopped; the same command continues.")
        return ExitStatus.PREEMPTED
    if died := [i for i, status in enumerate(statuses) if status]:
        console.print(f"Workers {died} ended with status {[statuses[i] for i in died]}; see {store.path / 'workers'}.")
        finish(study, store)
        return ExitStatus.FAILED
    return finish(study, store)


def _say_left_out(study: StudyConfig, console: Console) -> None:
    if study.left_out:
        console.print(study.left_out)


def _start_worker(store: Store, arguments: list[str], number: int, workers: int) -> subprocess.Popen:
    logs = store.path / "workers"
    logs.mkdir(exist_ok=True)
    with (logs / f"{number}.log").open("a") as log:
        command = [sys.executable, "-m", "jaxlm.study", *arguments, "--worker"]
        # Large pages for large buffers, unless the user tunes malloc otherwise: without, on a CPU, the kernel maps
        # them anew each step.
        environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
        options = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "env": environment}
        process = subprocess.Popen(command, **options)
    if hasattr(os, "sched_setaffinity"):  # macOS has none
        os.sched_setaffinity(process.pid, share_of(sorted(os.sched_getaffinity(0)), number, workers))
    return process


def share_of(cores: Sequence[int], number: int, workers: int) -> list[int]:
    """The cores of one of several workers, whose threads would wait for the others'; all, if there are fewer cores."""
    return list(cores[number::workers] if workers <= len(cores) else cores)


def _status_table(study: StudyConfig, store: Store) -> Table:

    table = Table("cell", "leg", "state", study.measures[0], box=None)
    for row in status_rows(study, expand(study, store), store):
        table.add_row(*row)
    return table


def _say_refused(plan: Plan) -> None:
    for cell, leg, why in plan.refused:
        print(f"{label_of(cell)}, leg {leg.name}, failed: {why}")


def finish(study: StudyConfig, store: Store) -> int:
    """Writes the report and says where it is."""

    plan = expand(study, store)
    path = write_report(study, plan, store)
    failed = {job.address: job for _, _, job in failed_jobs(plan, store)}
    for job in failed.values():
        for seed, failure in store.failures(job).items():
            print(f"{job.address} ({job.label}), seed {seed}, failed: {failure.error}")
    lost = {(job.address, seed, task): why for _, _, job, seed, task, why in failed_tasks(plan, store)}
    for (address, seed, task), why in lost.items():
        print(f"{address}, seed {seed}, task {task} failed: {why}")
    _say_refused(plan)
    print(f"The report is {path}.")
    return ExitStatus.FAILED if failed or lost or plan.refused else ExitStatus.FINISHED


if __name__ == "__main__":
    sys.exit(main())
