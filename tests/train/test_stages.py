"""Runs in stages: objective, architecture, data, batch and rate change on the way; law 4 across the seams."""

import pytest

from jaxlm.checkpoints import stored

STAGES = (
    "run.RunConfig.samples = None\nEVAL_PERIOD = 0\nCHECKPOINT_PERIOD = 2\nmanager.CheckpointConfig.keep_last = 20\n"
    "TRAIN_STEPS = 10\n"
)


@pytest.fixture(scope="module")
def staged(workshop):
    """Span corruption on a prefix decoder, then language modelling on a causal one, on other data, at another rate.

    The first stage has a batch-size ramp from 4 to 8 after three steps; the second begins after six.
    """
    corpus = workshop.corpus
    gin = workshop.gin(
        "staged",
        STAGES + "TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 8}\nWIDTH = 16\nBATCH_SIZE = 4\n"
        "run.RunConfig.stages = (@denoising/stages.Stage(), @language_modelling/stages.Stage())\n"
        "denoising/stages.Stage:\n    steps = 6\n    batch_size = @piecewise.Piecewise()\n"
        "piecewise.Piecewise:\n    steps = (0, 3)\n    values = (4, 8)\n    linear = False\n"
        "language_modelling/stages.Stage:\n    steps = 4\n    objective = @full_lm.FullLM()\n"
        "    architecture = 'causal_decoder'\n    data = @other/config.DataConfig()\n"
        "    learning_rate = @fixed/schedules.Constant()\n"
        "fixed/schedules.Constant.value = 2e-4\n"
        f"other/config.DataConfig.feature_lengths = {{'inputs': 24, 'targets': 8}}\n"
        "other/tasks.text_task.name = 'other'\n"
        f"other/sources.TextFiles.pattern = '{corpus / '2.txt'}'\n",
        model="prefix_decoder",
        objective="span_corruption",
        imports=(
            *("run", "piecewise", "checkpoints.manager", "data.sources", "data.tasks"),
            *("objectives.full_lm", "training.schedules", "training.stages"),
        ),
    )
    return gin, workshop.train("staged", gin)


def test_each_stage_has_what_it_says(staged, metrics):
    _, folder = staged
    found = metrics(folder)
    assert list(found) == list(range(1, 11))
    # Rows of 32 tokens, 4 of them, then 8. Span corruption leaves a column of a row empty now and then.
    tokens = {step: values["train/tokens"] for step, values in found.items()}
    assert all(4 * 28 <= tokens[step] <= 4 * 32 for step in (1, 2, 3))
    assert all(8 * 28 <= tokens[step] <= 8 * 32 for step in (4, 5, 6))
    assert all(tokens[step] == 8 * 32 for step in (7, 8, 9, 10)), "a stage inherits the batch size reached before it"
    rates = [values["train/learning_rate"] for values in found.values()]
    assert rates[0] > rates[5] > 2e-4 and rates[6:] == pytest.approx([2e-4] * 4)
    data = {step: stored.open_checkpoint(folder / "checkpoints", step).data for step in (6, 8)}
    assert data[6]["data"]["mixture"] == "files" and data[8]["data"]["mixture"] == "other"
    stages = "0 to 3: prefix_decoder, span_corruption, 4 rows; 3 to 6: prefix_decoder, span_corruption, 8 rows; "
    assert f"| stages | {stages}6 to 10: causal_decoder, full_lm, 8 rows |" in (folder / "report.md").read_text()


@pytest.mark.parametrize("step", [2, 3, 6, 8], ids=["before the ramp", "at the ramp", "at the stage", "in the stage"])
def test_killed_around_a_seam(step, staged, workshop, metrics):
    """Law 4: continued from a checkpoint just before, at or after a seam, each step is as it was."""
    gin, whole = staged
    folder = workshop.rewound(whole, step, f"from_{step}")
    workshop.train(folder, gin)
    assert metrics(folder) == metrics(whole)


def test_other_objectives_rates_and_batches_read_on(workshop, metrics, capfd):
    """A packed stream whose rates follow the step, then its batch size, objective and rates: law 4, and read on."""
    gin = workshop.gin(
        "read_on",
        STAGES + "TASK_FEATURE_LENGTHS = {'inputs': 40, 'targets': 24}\nWIDTH = 16\nBATCH_SIZE = 4\n"
        "config.DataConfig.packing = 'first_fit'\nconfig.DataConfig.virtual_shards = 4\n"
        "config.DataConfig.look_ahead = 8\n"
        "run.RunConfig.stages = (@denoising/stages.Stage(), @language_modelling/stages.Stage())\n"
        "denoising/stages.Stage:\n    steps = 6\n    objective = @span_corruption.SpanCorruption()\n"
        "    batch_size = @ramp/piecewise.Piecewise()\n"
        "ramp/piecewise.Piecewise:\n    steps = (0, 3)\n    values = (4, 8)\n    linear = False\n"
        "language_modelling/stages.Stage:\n    steps = 4\n    data = @later/config.DataConfig()\n"
        "later/tasks.Mixture.tasks_and_rates = ((@english/tasks.text_task(), 0.1), (@code/tasks.text_task(), 0.9))\n",
        data="mixture",
        imports=(
            *("run", "piecewise", "checkpoints.manager", "data.tasks", "objectives.span_corruption"),
            *("training.stages",),
        ),
    )
    whole = workshop.train("read_on", gin)
    assert "data go on" in " ".join(capfd.readouterr().out.split())
    at = {step: stored.open_checkpoint(whole / "checkpoints", step).data for step in (2, 4, 8)}
    assert "drawn" not in at[2]
    assert at[4]["drawn"][0] == sum(at[4]["drawn"][1:]) < at[8]["drawn"][0] == sum(at[8]["drawn"][1:])
    assert at[4]["rates"] == at[2]["rates"] != at[8]["rates"]
    for step in (2, 6):
        folder = workshop.rewound(whole, step, f"read_on_from_{step}")
        workshop.train(folder, gin)
        assert metrics(folder) == metrics(whole)


def test_causal_then_masked_on_the_same_weights(workshop, metrics, same_arrays):
    """Biphasic pretraining: a causal decoder becomes an encoder by one word; no parameter comes, goes or changes."""
    gin = workshop.gin(
        "biphasic",
        STAGES.replace("TRAIN_STEPS = 10", "TRAIN_STEPS = 6") + "WIDTH = 16\n"
        "run.RunConfig.stages = (@causal/stages.Stage(), @masked/stages.Stage())\n"
        "causal/stages.Stage.steps = 4\n"
        "masked/stages.Stage:\n    steps = 2\n    objective = @masked_lm.MaskedLM()\n    architecture = 'encoder'\n"
        "    learning_rate = @still/schedules.Constant()\n"
        "still/schedules.Constant.value = 0.0\n",
        imports=("run", "checkpoints.manager", "objectives.masked_lm", "training.schedules", "training.stages"),
    )
    folder = workshop.train("biphasic", gin)
    causal, masked = (stored.open_checkpoint(folder / "checkpoints", step) for step in (4, 6))
    assert causal.leaves == masked.leaves
    parameters = [path for path in causal.leaves if path[0] == "params"]
    assert same_arrays(causal, masked, parameters), "a learning rate of 0 keeps them, and so must the seam"
    found = metrics(folder)
    assert found[4]["train/tokens"] == found[5]["train/tokens"] == 8 * 32
    assert "| objective | masked_lm |" in (folder / "report.md").read_text()
    assert not same_arrays(causal, stored.open_checkpoint(folder / "checkpoints", 2), parameters)
