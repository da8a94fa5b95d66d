"""Trains a language model, from an empty folder to a report; started again, it goes on where it stopped.

python -m jaxlm.train --gin_file=gin_configs/runs/quickstart.gin --gin.MODEL_DIR=runs/mine --gin.TRAIN_STEPS=2000

--profile=N-M             records these steps with jax's profiler
--xla_preset=NAME         compiler flags of a chip, see jaxlm/parallel/xla_flags.py
--distributed=auto|on|off, --coordinator_address, --process_count, --process_index, --start_timeout
                          one job of several processes, see jaxlm/parallel/multihost.py

Exit statuses: jaxlm/exit_status.py.
"""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable

from jaxlm.checkpoints.manager import CheckpointManager
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.stored import committed_steps
from jaxlm.checkpoints.warm_start import warm_start
from jaxlm.configuration import diff_from_defaults, resolve_or_exit, resolved_text, take_flags
from jaxlm.data.loader import gather_state
from jaxlm.exit_status import ExitStatus, ended
from jaxlm.parallel import multihost, xla_flags
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.reporting import Samples, make_plan, report
from jaxlm.run import Parts, Programs, RunConfig, assemble, check_phases, make_model
from jaxlm.training import machine
from jaxlm.training.digest import digest
from jaxlm.training.goodput import Activity, Ledger, read_ledger
from jaxlm.training.loop import Loop, Outcome, TrainingDiverged
from jaxlm.training.profile import Profile, ProfileConfig
from jaxlm.training.progress import ProgressLine
from jaxlm.training.run_folder import RunFolder, Status
from jaxlm.training.spikes import RollBacks, SpikeRecord
from jaxlm.training.stages import Phase, carry_over, phase_at
from jaxlm.training.state import TrainState, initializer, params_initializer, restore_state, starter
from jaxlm.training.watchdog import Watchdog
from jaxlm.training.writers import Writers, make_writers


def main(arguments: list[str] | None = None) -> ExitStatus:
    """The command line; returns the exit status. JAXLM_TRACEBACK=1 shows where an error came from."""
    began = machine.process_began() if arguments is None else time.time()
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    flags, arguments = take_flags(arguments, ("profile", "xla_preset", *multihost.FLAGS))
    run = resolve_or_exit(RunConfig, arguments)
    try:
        if profile := flags.pop("profile", None):
            run = dataclasses.replace(run, profile=ProfileConfig.parse(profile))
        xla_flags.use(flags.pop("xla_preset", None))
        multihost.start(multihost.JobConfig.of(flags))
        outcome = train(run, began=began)
    except (ValueError, CheckpointError, TrainingDiverged, OSError) as error:
        if os.environ.get("JAXLM_TRACEBACK"):
            raise
        print(f"jaxlm.train: {error}", file=sys.stderr)
        status = ExitStatus.DIVERGED if isinstance(error, TrainingDiverged) else ExitStatus.FAILED
        multihost.leave(status)
        return status
    except Exception:
        if not multihost.in_job():
            raise
        traceback.print_exc()  # of this process, or because another one is gone
        multihost.leave(ExitStatus.FAILED)
        return ExitStatus.FAILED
    return ended(_STATUS_OF[outcome])


_STATUS_OF = {
    Outcome.FINISHED: ExitStatus.FINISHED,
    Outcome.OUT_OF_DATA: ExitStatus.ENDED_EARLY,
    Outcome.STOPPED: ExitStatus.ENDED_EARLY,
    Outcome.PREEMPTED: ExitStatus.PREEMPTED,
}


def train(run: RunConfig, *, began: float | None = None, programs: Programs | None = None) -> Outcome:
    """Trains from where the run's folder stands to its last step, and writes the report.

    Args:
      began: when the process began, seconds since 1970, for the ledger of time; None is now.
      programs: of runs before this one in the process, whose compiled steps it may use; None: it is the only one.

    Returns:
      how it ended; FINISHED also if there was nothing left to do.

    Raises:
      ValueError: parts of the configuration do not fit together, or the folder is another run's.
      CheckpointError: no checkpoint of the folder can be used, or saving failed.
      TrainingDiverged: the loss is not finite any more, or the spike guard gave up.
    """
    began = time.time() if began is None else began
    programs = Programs() if programs is None else programs
    with multihost.together():
        parallel = run.parallel.on()
        check_phases(run, parallel, programs)
        parts = assemble(run, run.phases[0], parallel, programs)
        folder = RunFolder(run.model_dir)
        identity = run.identity | {"vocabulary": parts.loader.vocabulary.fingerprint()}
    status = claim(run, folder, identity)
    with ProgressLine(run.train_steps) as line:
        if status is Status.FINISHED:
            line.print(f"{folder.path} is finished: its {run.train_steps:,} steps are done; see {folder.report}.")
            return Outcome.FINISHED
        with (
            contextlib.closing(Ledger(folder.goodput if multihost.is_first() else None, began=began)) as ledger,
            Watchdog(run.watchdog, folder.hangs) as watchdog,
            CheckpointManager(folder.checkpoints, run.checkpoints, parts.definition.layouts, line.print) as checkpoints,
        ):
            services = Services(folder, checkpoints, ledger, watchdog, RollBacks(run.optimizer.guard), line, programs)
            parts, state = begin(run, parts, parallel, services)
            if multihost.is_first():
                folder.forget_spikes(int(state.step))
            line.print(make_plan(run, parts, parallel, int(state.step)).table())
            while True:
                try:
                    parts, outcome = train_phases(run, parts, state, parallel, services)
                    break
                except TrainingDiverged as spike:
                    parts, state = go_back(run, parts, parallel, services, spike)
            if outcome is Outcome.FINISHED and multihost.is_first():
                ledger.write()  # the report is about it
                with ledger.spending(Activity.OTHER):
                    report(run, parts, folder, seconds=time.time() - began)
                folder.finish(run.train_steps)
        if outcome is Outcome.FINISHED:
            line.print(f"Finished; the report is {folder.report}.")
        else:
            line.print(f"Ended early ({outcome.value}); the same command continues.")
        if multihost.is_first():
            line.print(read_ledger(folder.goodput).text())
    return outcome


def claim(run: RunConfig, folder: RunFolder, identity: dict[str, str]) -> Status:
    """The first process claims the run's folder for all; see `RunFolder.open`.

    Raises:
      RunFolderError: as `RunFolder.open`, or another process has another folder of that name.
    """

    def open_folder() -> tuple[str, str]:
        status = folder.open(
            identity,
            total_steps=run.train_steps,
            config=resolved_text(run),
            config_diff=diff_from_defaults(run),
            facts=machine.facts(),
        )
        return status.value, folder.id

    status, run_id = multihost.from_first(open_folder)
    with multihost.together():
        folder.await_claim(run_id)
    return Status(status)


def start_writing(run: RunConfig, folder: RunFolder, step: int) -> Writers:
    """Where metrics after `step` go: nowhere in processes other than the first."""
    if not multihost.is_first():
        return Writers()
    folder.rewind(step)
    return make_writers(folder, start_step=step + 1, wandb=run.wandb)


@dataclasses.dataclass(frozen=True)
class Services:
    """What accompanies a run from its first step to its last."""

    folder: RunFolder
    checkpoints: CheckpointManager
    ledger: Ledger
    watchdog: Watchdog
    rollbacks: RollBacks
    line: ProgressLine
    programs: Programs


def train_phases(
    run: RunConfig, parts: Parts, state: TrainState, parallel: Parallelism, services: Services
) -> tuple[Parts, Outcome]:
    """Trains one phase after the other, from `state` on.

    Args:
      parts: of the phase that `state` was made in, the loader at its position.
      state: its buffers are taken.

    Returns:
      the parts of the last phase, and how it ended.

    Raises:
      TrainingDiverged: as `Loop.run`.
    """
    step, folder, line = int(state.step), services.folder, services.line
    services.ledger.resumed(step)
    outcome = Outcome.FINISHED
    with contextlib.closing(start_writing(run, folder, step)) as writers:
        spikes = SpikeRecord(folder.spikes, line.print)
        samples = Samples(run, folder, line, writers) if run.samples is not None else None
        profile = Profile(run.profile, folder.profile, line.print) if run.profile is not None else None
        for phase in run.phases:
            if phase.end <= step:
                continue
            if phase != parts.phase:
                parts, state = advance(run, parts, state, phase, parallel, services.programs, line.print)
            services.rollbacks.pass_over(parts.loader, phase, int(state.step))
            spikes.enter(parts.loader)
            if samples is not None:
                samples.enter(parts, parallel)
            loop = Loop(
                step=parts.step,
                parallel=parallel,
                config=run.loop,
                names=parts.names,
                writer=writers,
                evaluate=parts.evaluate,
                checkpoints=services.checkpoints,
                callbacks=[c for c in (line, services.watchdog, spikes, samples, profile) if c is not None],
                ledger=services.ledger,
                resolved_config=resolved_text(run),
                flops_per_token=parts.flops_per_token,
            )
            try:
                state, outcome, data = loop.run(state, parts.loader, until=phase.end)
            except TrainingDiverged:
                parts.loader.close()
                raise
            parts.loader.restore(data)  # it had read ahead
            if outcome is not Outcome.FINISHED:
                break
    return parts, outcome


def begin(run: RunConfig, parts: Parts, parallel: Parallelism, services: Services) -> tuple[Parts, TrainState]:
    """What a run starts from: its newest intact checkpoint, another run's state or parameters, or fresh ones.

    Args:
      parts: of any phase of the run.

    Returns:
      the parts of the phase the state was made in, with the loader at its position, and the state.
    """
    checkpoints, line = services.checkpoints, services.line
    with services.ledger.spending(Activity.RESTORE):
        saved = checkpoints.open()
        if saved is None and run.branch is not None:
            saved = run.branch.open(run.checkpoints.verify, line.print)
    if saved is None:
        if parts.phase != run.phases[0] or parts.loader.state()["step"] > 0:  # it went back
            parts = assemble(run, run.phases[0], parallel, services.programs)
        if run.warm_start is not None:
            return parts, start_warm(run, parts, parallel, services)
        make = make_model(parts.model, parallel)
        init = services.programs.shared(run, "init", lambda: initializer(make, parts.optimizer, parallel))
        return parts, init(run.seed)
    if saved.step > run.train_steps:
        raise ValueError(
            f"The checkpoint to go on from, {saved.folder}, is of step {saved.step}, beyond train_steps = "
            f"{run.train_steps}; raise TRAIN_STEPS, or give this run another folder."
        )
    phase = phase_at(run.phases, saved.step - 1)
    if phase != parts.phase:
        parts = assemble(run, phase, parallel, services.programs)
    with services.ledger.spending(Activity.RESTORE):
        state = restore_state(saved, parts.abstract, parts.optimizer, parallel, parts.definition.layouts)
    parts.loader.restore(saved.data)
    whose = "" if saved.folder.parent == checkpoints.folder else f" of {saved.folder.parent.parent}"
    line.print(f"Continues from the checkpoint of step {saved.step:,}{whose}.")
    return parts, state


def start_warm(run: RunConfig, parts: Parts, parallel: Parallelism, services: Services) -> TrainState:
    """The state of a run that begins with parameters of others, which the line is told of."""
    layouts, report, shared = parts.definition.layouts, services.line.print, services.programs.shared
    make = make_model(parts.model, parallel)
    init = shared(run, "init params", lambda: params_initializer(make, parts.infos, parallel))
    start = shared(run, "start", lambda: starter(parts.abstract, parts.optimizer, parallel))
    fresh = init(run.seed)
    started = warm_start(fresh, run.warm_start, layouts, report=report)
    del fresh  # before there are moments
    state = start(started.params)
    return dataclasses.replace(state, opt_state=started.optimizer_state(state.opt_state, layouts, report))


def go_back(
    run: RunConfig, parts: Parts, parallel: Parallelism, services: Services, spike: TrainingDiverged
) -> tuple[Parts, TrainState]:
    """The state before a spike, whose data will be passed over; see `begin`.

    Raises:
      TrainingDiverged: the same, unless the guard's policy is to go back and it has patience.
    """
    services.checkpoints.wait()
    saved = committed_steps(services.checkpoints.folder)
    services.rollbacks.add(spike, phase_at(run.phases, spike.step - 1), saved[-1] if saved else 0)
    services.line.print(f"Goes back from the spike of step {spike.step:,}, and on after its data.")
    return begin(run, parts, parallel, services)


def advance(
    run: RunConfig,
    parts: Parts,
    state: TrainState,
    phase: Phase,
    parallel: Parallelism,
    programs: Programs,
    report: Callable[[str], None],
) -> tuple[Parts, TrainState]:
    """The next phase's parts and the state it starts from.

    The data go on where the last phase stopped if the next one reads the same rows or examples, whatever it makes of
    them and at whatever rates; else they start from their beginning.

    Args:
      parts, state: of the phase that ended, the loader at its last batch.
      phase: the one that begins.
      report: is told of a new stage: what is trained, and digests of what it starts from.
    """
    following = assemble(run, phase, parallel, programs)
    data = gather_state(parts.loader.state())
    goes_on = data["data"] == following.loader.state()["data"]
    if goes_on:
        following.loader.restore(data, after=parts.loader)
    parts.loader.close()
    if phase.stage_index != parts.phase.stage_index:
        before = digests(state)
        state = carry_over(state, parts.optimizer, following.optimizer, phase.stage.carry, parallel=parallel)
        stage, after = phase.stage, digests(state)
        kept = ", ".join(f"{name} {after[name]}{' as before' * (after[name] == before[name])}" for name in after)
        report(
            f"Stage {phase.stage_index + 1} begins after step {phase.start:,}: {stage.objective.name}, "
            f"{following.model.architecture.value}; {kept}; data {'go on' if goes_on else 'from their beginning'}."
        )
    return following, state


def digests(state: TrainState) -> dict[str, str]:
    """What of a state a stage may keep or not, in eight digits each."""
    parts = {"parameters": state.params, "optimizer": state.opt_state}
    return {name: f"{int(digest(part)):08x}" for name, part in parts.items()}


if __name__ == "__main__":
    sys.exit(main())
