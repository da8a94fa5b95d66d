"""Law 4: killed anywhere and started again, or moved to another number of devices, a run is what it would have been."""

import signal
import subprocess
import sys

import pytest

from benchmarks import observed
from jaxlm.checkpoints import stored
from jaxlm.exit_status import ExitStatus

STEPS = 16
OFTEN = f"TRAIN_STEPS = {STEPS}\nCHECKPOINT_PERIOD = 2\nEVAL_PERIOD = 8\nrun.RunConfig.samples = None\n"


def packed_stream(workshop):
    """An encoder-decoder on span corruption, packed while it reads, with dropout."""
    return workshop.gin(
        "packed_stream",
        OFTEN + "DROPOUT = 0.1\nTASK_FEATURE_LENGTHS = {'inputs': 32, 'targets': 16}\nWIDTH = 16\n"
        "config.DataConfig.packing = 'first_fit'\nconfig.DataConfig.virtual_shards = 8\n"
        "config.DataConfig.look_ahead = 8\nEVAL_PERIOD = 0\n",
        model="encoder_decoder",
        objective="span_corruption",
        imports=("run",),
    )


def scheduled_mixture(workshop):
    """A prefix decoder on a data mixture and an objective mixture that both change over training.

    With dropout, an average of the parameters, and two microbatches.
    """
    corpus = workshop.corpus
    return workshop.gin(
        "scheduled_mixture",
        OFTEN + "DROPOUT = 0.1\nTASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 8}\nWIDTH = 16\n"
        f"code/tasks.text_task.source = @code/sources.TextFiles()\n"
        f"english/tasks.text_task.source = @english/sources.TextFiles()\n"
        f"code/sources.TextFiles.pattern = '{corpus / '0.txt'}'\n"
        f"english/sources.TextFiles.pattern = '{corpus / '[12].txt'}'\n"
        "piecewise.Piecewise.steps = (0, 10)\n"
        "falling/piecewise.Piecewise.steps = (0, 12)\nrising/piecewise.Piecewise.steps = (0, 12)\n"
        "optimizers.OptimizerConfig.ema_decay = 0.9\nstep.StepConfig.microbatches = 2\n",
        model="prefix_decoder",
        objective="mixture",
        data="mixture",
        imports=("run", "data.tasks", "data.sources", "piecewise", "training.optimizers", "training.step"),
    )


MAKE_GIN = {"packed_stream": packed_stream, "scheduled_mixture": scheduled_mixture}


@pytest.fixture(scope="module")
def uninterrupted(workshop):
    """A function of a name in MAKE_GIN: (gin file, run folder, {step: digest of the batch}) of a whole run."""
    made = {}

    def make(name):
        if name not in made:
            gin = MAKE_GIN[name](workshop)
            with observed.Observer() as seen:
                made[name] = gin, workshop.train(name, gin), seen.batches
        return made[name]

    return make


def train_until_signal(arguments, repository, number, line=f"step 1/{STEPS} | ETA"):
    """Starts a run, sends it a signal when it has printed a line, and returns its exit status."""
    command = [sys.executable, "-m", "jaxlm.train", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=repository, **pipes) as process:
        output = []
        for printed in process.stdout:
            output.append(printed)
            if line in printed:
                break
        else:
            pytest.fail(f"the run ended without the line {line!r}:\n{''.join(output)}")
        process.send_signal(number)
        process.stdout.read()
    return process.returncode


def test_a_killed_mixture_goes_on(workshop, uninterrupted, metrics, repository):
    """SIGKILL in a run whose data and objectives change on the way, with an average of the parameters."""
    gin, whole, _ = uninterrupted("scheduled_mixture")
    expected = metrics(whole)
    assert list(expected) == list(range(1, STEPS + 1))
    folder = workshop.folder / "killed"
    arguments = workshop.arguments(folder, gin)
    status = train_until_signal(arguments, repository, signal.SIGKILL, f"step {STEPS // 2}: validation")
    assert status == -signal.SIGKILL
    workshop.train(folder, gin)
    assert metrics(folder) == expected


def test_asked_to_end(workshop, uninterrupted, metrics, repository):
    """SIGTERM: the step ends, a checkpoint of it is saved, the status says so; the same command continues."""
    gin, whole, _ = uninterrupted("scheduled_mixture")
    folder = workshop.folder / "terminated"
    arguments = workshop.arguments(folder, gin, "CHECKPOINT_PERIOD=1000")
    assert train_until_signal(arguments, repository, signal.SIGTERM) == ExitStatus.PREEMPTED == 75
    done = max(metrics(folder))
    assert done < STEPS and stored.open_latest(folder / "checkpoints").step == done
    workshop.train(folder, gin)
    assert metrics(folder) == metrics(whole)


def test_other_numbers_of_devices(workshop, uninterrupted, losses):
    """1 -> 4 -> 1 devices, sharded four ways in between: the same batches, losses equal to f32 rounding."""
    gin, whole, batches = uninterrupted("packed_stream")
    on_four = workshop.rewound(whole, 12, "on_four")
    seen = workshop.observe(on_four, gin, "mesh.MeshConfig.fsdp=4", devices=4)
    assert "4 x" in seen["output"]
    back = workshop.rewound(on_four, 14, "back_on_one")
    with observed.Observer() as seen_again:
        workshop.train(back, gin)
    assert len(batches) == STEPS and len(set(batches.values())) == STEPS
    assert seen["batches"] == {step: batches[step] for step in map(str, range(13, STEPS + 1))}
    assert seen_again.batches == {step: batches[step] for step in map(str, range(15, STEPS + 1))}
    expected = losses(whole)
    for folder in (on_four, back):
        assert losses(folder) == pytest.approx(expected, rel=1e-5)
    ends = [stored.open_latest(folder / "checkpoints").data for folder in (whole, on_four, back)]
    assert ends[0] == ends[1] == ends[2]
