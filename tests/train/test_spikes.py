"""The guard's policies in whole runs: an example poisons its batch; what becomes of the run, and of its records."""

import json
import math

import numpy as np
import pytest

from benchmarks import observed
from jaxlm import train
from jaxlm.checkpoints import stored
from jaxlm.configuration import resolve
from jaxlm.data.datasets import DataSets
from jaxlm.exit_status import ExitStatus
from jaxlm.run import RunConfig, open_loader
from jaxlm.training.guard import RollBack, SpikeGuard

STEPS, POISONED = 16, 7
TEXT = (
    f"TRAIN_STEPS = {STEPS}\nCHECKPOINT_PERIOD = 4\nEVAL_PERIOD = 0\nrun.RunConfig.samples = None\nWIDTH = 16\n"
    "manager.CheckpointConfig.keep_last = 10\nloop.LoopConfig.log_period = 4\nGUARD = @guard.SpikeGuard()\n"
)
IMPORTS = ("run", "checkpoints.manager", "training.guard")


def make_gin(workshop, policy):
    return workshop.gin(policy, TEXT + f"guard.SpikeGuard.policy = @guard.{policy}()\n", imports=IMPORTS)


@pytest.fixture(scope="module")
def rows(workshop):
    """The examples of each row of the batch of step POISONED."""
    run = resolve(RunConfig, workshop.arguments("named", make_gin(workshop, "Skip")))
    loader = open_loader(run, run.phases[0])
    return loader.examples_at(loader.state() | {"step": POISONED - 1})


@pytest.fixture(scope="module")
def clean(workshop):
    """{step: digest of the batch} of a run without poison."""
    with observed.Observer() as seen:
        workshop.train("clean", make_gin(workshop, "Skip"))
    return seen.batches


@pytest.fixture
def poison(monkeypatch, rows):
    """One example of that batch makes any loss it is in infinite."""
    whole = DataSets.example
    victim = rows[3][0]

    def example(self, generator, dataset, index, epoch, step, raw):
        made = whole(self, generator, dataset, index, epoch, step, raw)
        if (self.split, index, epoch) == ("train", victim.index, victim.epoch):
            made.weights = np.full(len(made.targets), np.inf, np.float32)
        return made

    monkeypatch.setattr(DataSets, "example", example)


def spikes(folder):
    return [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]


def as_written(rows):
    return json.loads(json.dumps(rows))


def test_a_guard_on_the_command_line_of_any_run():
    """As docs/surviving_faults.md has it."""
    flags = ["--gin.GUARD=@guard.SpikeGuard()", "--gin.SpikeGuard.policy=@guard.RollBack()", "--gin.RollBack.skip=4"]
    run = resolve(RunConfig, ["--gin_file=gin_configs/runs/quickstart.gin", *flags])
    assert run.optimizer.guard == SpikeGuard(policy=RollBack(skip=4))


def test_a_guard_comes_and_goes_with_a_restart(workshop, clean, metrics):
    """As the message of a run that diverged without one says."""
    unguarded = TEXT.replace("GUARD = @guard.SpikeGuard()\n", "")
    folder = workshop.rewound("clean", 12, "unguarded")
    workshop.train(folder, workshop.gin("unguarded", unguarded, imports=IMPORTS[:2]))
    found = metrics(folder)
    assert [step for step, values in found.items() if "train/skipped" in values] == [4, 8, 12]
    assert found[16]["train/loss"] == metrics(workshop.folder / "clean")[16]["train/loss"]
    workshop.train(folder, make_gin(workshop, "Skip"), "TRAIN_STEPS=20")
    found = metrics(folder)
    assert list(found) == [4, 8, 12, 16, 20] and found[20]["train/skipped"] == 0
    guard = {path: leaf.shape for path, leaf in stored.open_latest(folder / "checkpoints").leaves.items()}
    assert guard["opt_state", "guard", "losses"] == (128,)
    workshop.train(folder, make_gin(workshop, "Skip"), "TRAIN_STEPS=24", "guard.SpikeGuard.window=8")
    assert list(metrics(folder)) == [4, 8, 12, 16, 20, 24]


def test_skip_leaves_the_step_out_and_writes_its_examples_down(workshop, rows, poison, metrics):
    folder = workshop.train("skip", make_gin(workshop, "Skip"))
    (spike,) = spikes(folder)
    assert spike["step"] == POISONED and spike["loss"] is None and spike["rows"] == as_written(rows)
    found = metrics(folder)
    assert [step for step, values in found.items() if values["train/skipped"] > 0] == [8]  # logged each fourth step
    assert all(math.isfinite(values["train/loss"]) for values in found.values())
    # Killed before the next checkpoint and started again: the same, and the spike is there once.
    again = workshop.rewound(folder, 4, "skip_again")
    workshop.train(again, make_gin(workshop, "Skip"))
    assert metrics(again) == found and spikes(again) == [spike]


def test_roll_back_goes_on_after_the_spikes_data(workshop, rows, poison, clean, metrics, capsys):
    """From the checkpoint of step 4 with batch 8; the same again where a kill hits in between."""
    gin = make_gin(workshop, "RollBack")
    with observed.Observer() as seen:
        folder = workshop.train("back", gin)
    said = capsys.readouterr().out
    assert f"Goes back from the spike of step {POISONED}, and on after its data." in said
    assert "lost work" in said, "the ledger counts steps done twice"
    (spike,) = spikes(folder)
    assert spike["step"] == POISONED and spike["rows"] == as_written(rows)
    found = metrics(folder)
    assert list(found) == [4, 8, 12, 16] and all(math.isfinite(v["train/loss"]) for v in found.values())
    # Steps 5, 6, ... were made with what a run without poison reads at 8, 9, ...
    steps = range(5, STEPS - 2)
    assert [seen.batches[str(step)] for step in steps] == [clean[str(step + 3)] for step in steps]
    for step in (4, 8):  # before the spike, and after going back
        again = workshop.rewound(folder, step, f"back_from_{step}")
        workshop.train(again, gin)
        assert metrics(again) == found and spikes(again) == [spike]


def test_roll_back_passes_over_more_and_loses_patience(workshop, poison, clean, capsys):
    gin = make_gin(workshop, "RollBack")
    with observed.Observer() as seen:
        workshop.train("further", gin, "guard.RollBack.skip=2", "CHECKPOINT_PERIOD=100")
    # Nothing was saved before the spike: from the beginning, with the third batch after it.
    assert [seen.batches[str(step)] for step in (1, 2)] == [clean[str(POISONED + 3)], clean[str(POISONED + 4)]]
    assert train.main(workshop.arguments("impatient", gin, "guard.RollBack.patience=0")) == ExitStatus.DIVERGED


def test_stop_ends_with_a_status_of_its_own(workshop, rows, poison, capsys):
    gin = make_gin(workshop, "Stop")
    assert train.main(workshop.arguments("stopped", gin)) == ExitStatus.DIVERGED == 4
    assert f"Training diverged at step {POISONED}: " in capsys.readouterr().err
    folder = workshop.folder / "stopped"
    assert stored.open_latest(folder / "checkpoints").step == 4
    assert [spike["rows"] for spike in spikes(folder)] == [as_written(rows)]
