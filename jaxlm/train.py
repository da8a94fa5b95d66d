"""Trains a language model, from an empty folder to a report; started again, it goes on where it stopped.

python -m jaxlm.train --gin_file=gin_configs/runs/quickstart.gin --gin.MODEL_DIR=runs/mine --gin.TRAIN_STEPS=2000
"""

import os
import sys
import time

from jaxlm.checkpoints.manager import CheckpointManager
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.warm_start import warm_start
from jaxlm.configuration import diff_from_defaults, resolve_or_exit, resolved_text
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.reporting import Samples, make_plan, report
from jaxlm.run import Parts, RunConfig, assemble, check_phases, make_model
from jaxlm.training import machine
from jaxlm.training.loop import Loop, Outcome, TrainingDiverged
from jaxlm.training.progress import ProgressLine
from jaxlm.training.run_folder import RunFolder, Status
from jaxlm.training.stages import Phase, carry_over, phase_at
from jaxlm.training.state import TrainState, abstract_state, init_state, start_from
from jaxlm.training.writers import make_writers


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. JAXLM_TRACEBACK=1 shows where an error came from."""
    run = resolve_or_exit(RunConfig, arguments)
    try:
        outcome = train(run)
    except (ValueError, CheckpointError, TrainingDiverged, OSError) as error:
        if os.environ.get("JAXLM_TRACEBACK"):
            raise
        print(f"jaxlm.train: {error}", file=sys.stderr)
        return 1
    return 0 if outcome is Outcome.FINISHED else 3


def train(run: RunConfig) -> Outcome:
    """Trains from where the run's folder stands to its last step, and writes the report.

    Returns:
      how it ended; FINISHED also if there was nothing left to do.

    Raises:
      ValueError: parts of the configuration do not fit together, or the folder is another run's.
      CheckpointError: no checkpoint of the folder can be used, or saving failed.
      TrainingDiverged: the loss is not finite any more.
    """
    started = time.monotonic()
    parallel = run.parallel.on()
    check_phases(run, parallel)
    parts = assemble(run, run.phases[0], parallel)
    folder = RunFolder(run.model_dir)
    status = folder.open(
        run.identity | {"vocabulary": parts.loader.vocabulary.fingerprint()},
        total_steps=run.train_steps,
        config=resolved_text(run),
        config_diff=diff_from_defaults(run),
        facts=machine.facts(),
    )
    with ProgressLine(run.train_steps) as line:
        if status is Status.FINISHED:
            line.print(f"{folder.path} is finished: its {run.train_steps:,} steps are done; see {folder.report}.")
            return Outcome.FINISHED
        layouts = parts.definition.layouts
        with CheckpointManager(folder.checkpoints, run.checkpoints, layouts, line.print) as checkpoints:
            parts, state = begin(run, parts, parallel, checkpoints, line)
            step = int(state.step)
            folder.rewind(step)
            writers = make_writers(folder, start_step=step + 1, wandb=run.wandb)
            samples = Samples(run, folder, line, writers) if run.samples is not None else None
            line.print(make_plan(run, parts, parallel, step).table())
            outcome = Outcome.FINISHED
            for phase in run.phases:
                if phase.end <= step:
                    continue
                if phase != parts.phase:
                    parts, state = advance(run, parts, state, phase, parallel)
                if samples is not None:
                    samples.enter(parts, parallel)
                loop = Loop(
                    step=parts.step,
                    parallel=parallel,
                    config=run.loop,
                    names=parts.names,
                    writer=writers,
                    evaluate=parts.evaluate,
                    checkpoints=checkpoints,
                    callbacks=[line] if samples is None else [line, samples],
                    resolved_config=resolved_text(run),
                    flops_per_token=parts.flops_per_token,
                )
                state, outcome, data = loop.run(state, parts.loader, until=phase.end)
                parts.loader.restore(data)  # it had read ahead
                if outcome is not Outcome.FINISHED:
                    break
        if outcome is Outcome.FINISHED:
            report(run, parts, folder, seconds=time.monotonic() - started)
            folder.finish(run.train_steps)
            line.print(f"Finished; the report is {folder.report}.")
        else:
            line.print(f"Ended early ({outcome.value}); the same command continues.")
        writers.close()
    return outcome


def begin(
    run: RunConfig,
    parts: Parts,
    parallel: Parallelism,
    checkpoints: CheckpointManager,
    line: ProgressLine,
) -> tuple[Parts, TrainState]:
    """What a run starts from: its newest intact checkpoint, another run's parameters, or fresh ones.

    Args:
      parts: of the run's first phase.

    Returns:
      the parts of the phase the state was made in, with the loader at its position, and the state.
    """
    saved = checkpoints.open()
    if saved is None:
        state = init_state(make_model(parts.model, parallel), parts.optimizer, parallel, seed=run.seed)
        if run.warm_start is not None:
            params, _ = warm_start(state.params, run.warm_start, parts.definition.layouts, report=line.print)
            state = start_from(params, parts.optimizer, parallel)
        return parts, state
    if saved.step > run.train_steps:
        raise ValueError(
            f"The newest checkpoint in {checkpoints.folder} is of step {saved.step}, beyond train_steps = "
            f"{run.train_steps}; raise TRAIN_STEPS, or give this run another folder."
        )
    phase = phase_at(run.phases, saved.step - 1)
    if phase != parts.phase:
        parts = assemble(run, phase, parallel)
    target = abstract_state(parts.abstract, parts.optimizer, parallel)
    state = saved.restore(target, parts.definition.layouts)
    parts.loader.restore(saved.data)
    line.print(f"Continues from the checkpoint of step {saved.step:,}.")
    return parts, state


def advance(
    run: RunConfig, parts: Parts, state: TrainState, phase: Phase, parallel: Parallelism
) -> tuple[Parts, TrainState]:
    """The next phase's parts and the state it starts from.

    The data goes on where the last phase stopped if the next one reads the same data in the same way.

    Args:
      parts, state: of the phase that ended, the loader at its last batch.
      phase: the one that begins.
    """
    following = assemble(run, phase, parallel)
    data = parts.loader.state()
    if data["data"] == following.loader.state()["data"]:
        following.loader.restore(data)
    parts.loader.close()
    if phase.stage_index != parts.phase.stage_index:
        state = carry_over(state, parts.optimizer, following.optimizer, phase.stage.carry, parallel=parallel)
    return following, state


if __name__ == "__main__":
    sys.exit(main())
