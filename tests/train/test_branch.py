"""A run that branches off from another's whole state is that run, until their configurations part."""

import pytest

from jaxlm import train

FEWER = (
    "run.RunConfig.samples = None\nEVAL_PERIOD = 0\nCHECKPOINT_PERIOD = 2\nTRAIN_STEPS = 6\n"
    "manager.CheckpointConfig.keep_last = 9\n"
)
FROM = "run.RunConfig.branch = @branch.Branch()\nbranch.Branch.path = '{}'\nbranch.Branch.step = 4\n"
IMPORTS = ("run", "checkpoints.manager", "checkpoints.branch", "training.schedules", "training.optimizers")
CONSTANT = (
    "optimizers.OptimizerConfig.learning_rate = @schedules.Constant()\nschedules.Constant.value = 1e-2\nDROPOUT = 0.1\n"
)


@pytest.fixture(scope="module")
def trunk(workshop):
    """Six steps at a constant rate, with dropout."""
    return workshop.train("trunk", workshop.gin("trunk", FEWER + CONSTANT, imports=IMPORTS))


def test_a_branch_goes_on_as_the_trunk_did(workshop, trunk, losses, metrics):
    gin = workshop.gin("branch", FEWER + CONSTANT + FROM.format(trunk), imports=IMPORTS)
    same = losses(workshop.train("same", gin))
    assert list(same) == [5, 6]
    assert same == {step: loss for step, loss in losses(trunk).items() if step > 4}, "bit for bit"
    # The same start, another rate: the first loss is of the same parameters and batch.
    slower = workshop.train("slower", gin, "schedules.Constant.value=1e-3", "TRAIN_STEPS=8")
    found = losses(slower)
    assert list(found) == [5, 6, 7, 8] and found[5] == same[5] and found[6] != same[6]
    assert metrics(slower)[5]["train/learning_rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "bindings, message",
    [
        (["Branch.step=3"], "has no checkpoint of step 3 (it has: 2, 4, 6)"),
        (["Branch.path='/nowhere'"], "/nowhere/checkpoints has no checkpoint of step 4"),
        (["Branch.path='/nowhere'", "Branch.step=None"], "/nowhere has no checkpoint to branch off from"),
        (["TRAIN_STEPS=3"], "is of step 4, beyond train_steps = 3"),
    ],
)
def test_what_cannot_be_branched_from_is_one_sentence(workshop, trunk, bindings, message, capsys):
    gin = workshop.gin("bad", FEWER + CONSTANT + FROM.format(trunk), imports=IMPORTS)
    assert train.main(workshop.arguments("bad", gin, *bindings)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
