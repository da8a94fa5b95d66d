"""A whole run through the command line: what it promises to leave, that it ends and goes on, laws 7 and 9's records."""

import json
import re

import numpy as np
import pytest

from jaxlm import train
from jaxlm.checkpoints import stored
from jaxlm.configuration import resolve, resolved_text
from jaxlm.run import RunConfig
from jaxlm.training.goodput import Activity, read_ledger
from tools import convert_checkpoint

STEPS = 60


@pytest.fixture(scope="module")
def run(workshop, repository):
    """60 steps on the project's own documents, from the command line in a process of its own."""
    gin = workshop.gin(
        "docs",
        "LEARNING_RATE = 1e-2\nsampling.SamplingConfig.max_new_tokens = 8\nEVAL_PERIOD = 30\nCHECKPOINT_PERIOD = 30\n"
        f"FILES = '{repository / 'docs'}'\nTRAIN_STEPS = {STEPS}\nrun.RunConfig.baselines = True\n"
        "run.RunConfig.profile = @profile.ProfileConfig()\n"
        "profile.ProfileConfig.first = 20\nprofile.ProfileConfig.last = 21",
        imports=("run", "decoding.sampling", "training.profile"),
    )
    return gin, workshop.folder / "docs", workshop.observe("docs", gin)


def test_it_leaves_what_it_promises(run, metrics):
    gin, folder, seen = run
    assert seen["status"] == 0
    assert list(metrics(folder)) == list(range(1, STEPS + 1))
    report = (folder / "report.md").read_text()
    for words in ("bits per byte", "bigram", "xz", "causal_decoder", "full_lm", "files", f"step_{STEPS:08d}.txt"):
        assert words in report
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = (folder / "samples" / f"step_{STEPS:08d}.txt").read_text()
    assert samples.count("given: ") == samples.count("model: ") == samples.count("truth: ") == 2
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    checkpoint = stored.open_latest(folder / "checkpoints")
    assert checkpoint.step == checkpoint.data["step"] == STEPS
    assert checkpoint.config == (folder / "config.gin").read_text()
    record = json.loads((folder / "run.json").read_text())
    assert record["finished_at_step"] == STEPS and len(record["starts"]) == 1
    assert "model.width = 32" in (folder / "config_diff.txt").read_text()
    assert "Steps 20 to 21 on 1 device" in (folder / "profile" / "steps_20-21" / "summary.txt").read_text()


def test_its_time_is_accounted_for(run):
    """Every activity that the run had, in the ledger, at the end of the output, and in the report."""
    _, folder, seen = run
    found = read_ledger(folder.joinpath("goodput.jsonl"))
    activities = {
        Activity.START_UP,
        Activity.COMPILE,
        Activity.STEP,
        Activity.EVALUATION,
        Activity.SAVE,
        Activity.OTHER,
    }
    assert activities <= set(found.seconds) and (found.starts, found.step, found.lost_steps) == (1, STEPS, 0)
    assert found.text() in seen["output"]
    report = (folder / "report.md").read_text()
    assert "## Time" in report and "| training steps | " in report


def test_it_shows_plan_progress_and_samples(run):
    _, folder, seen = run
    for words in ("parameters, total", "compute a step", "expected time", f"step {STEPS}/{STEPS} | ETA 0s | loss "):
        assert words in seen["output"]
    assert "bits/byte" in seen["output"] and "tok/s" in seen["output"] and f"step {STEPS} samples:" in seen["output"]
    assert f"Finished; the report is {folder / 'report.md'}" in seen["output"]
    assert not seen["errors"]


def test_the_saved_configuration_is_the_configuration(run):
    """`config.gin` resolves to itself: a run can be repeated from its folder."""
    _, folder, _ = run
    text = (folder / "config.gin").read_text()
    assert resolved_text(resolve(RunConfig, [f"--gin_file={folder / 'config.gin'}"])) == text


def test_the_step_compiles_once(run):
    """Law 7: one compilation of the training step and one of the evaluation step, both named `step`."""
    compiled = run[2]["compiled"]
    assert len([name for name in compiled if re.fullmatch(r"jit[_(]step\)?", name)]) == 2, compiled


def test_no_tensorflow(run):
    """Law 7: neither TensorFlow nor seqio is imported by a run."""
    modules = {name.partition(".")[0] for name in run[2]["modules"]}
    assert "jaxlm" in modules and "grain" in modules
    assert not modules & {"tensorflow", "seqio", "tensorflow_datasets", "torch"}


def test_the_loss_falls(run, losses):
    """From a uniform guess among 370 ids, 5.9 nats, by 2 nats: what is in texts and how often, and a little more."""
    found = losses(run[1])
    assert 5.7 < found[1] < 6.1
    assert sum(found[step] for step in range(STEPS - 9, STEPS + 1)) / 10 < found[1] - 2.0


def test_again_it_is_finished(run, workshop, capsys):
    gin, folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    workshop.train(folder, gin)
    out = capsys.readouterr().out
    assert f"is finished: its {STEPS} steps are done" in out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_with_more_steps_it_goes_on(run, workshop, losses, capsys):
    gin, folder, _ = run
    more = workshop.rewound(folder, STEPS, "more")
    workshop.train(more, gin, f"TRAIN_STEPS={STEPS + 4}")
    assert f"Continues from the checkpoint of step {STEPS}" in capsys.readouterr().out
    after = losses(more)
    assert list(after) == list(range(1, STEPS + 5))
    assert {step: after[step] for step in range(1, STEPS + 1)} == losses(folder)
    assert f"| steps | {STEPS + 4} |" in (more / "report.md").read_text()
    assert (more / "config.1.gin").read_text() == (folder / "config.gin").read_text(), "the first start's stays"


SHORT = "TRAIN_STEPS = 2\nLEARNING_RATE = 0.0\n"


def starting_from(folder):
    """Lines of a run that begins with another's parameters."""
    return f"{SHORT}run.RunConfig.warm_start = @warm_start.WarmStart()\nwarm_start.WarmStart.path = '{folder}'\n"


@pytest.fixture(scope="module")
def warm(run, workshop):
    """The folder of a run that began with this one's parameters and kept them."""
    gin = workshop.gin("warm", starting_from(run[1]), imports=("run", "checkpoints.warm_start"))
    return workshop.train("warm", gin)


def test_warm_start(run, warm, workshop, losses, same_arrays):
    """Another run begins with these parameters; its optimizer, data and step begin afresh."""
    _, folder, _ = run
    cold = workshop.train("cold", workshop.gin("cold", SHORT))
    # The words of the generated corpus are unknown to it, the letters are not.
    assert losses(warm)[1] < losses(cold)[1] - 1.0
    ours, theirs = stored.open_latest(warm / "checkpoints"), stored.open_latest(folder / "checkpoints")
    names = [path for path in theirs.leaves if path[0] == "params"]
    assert same_arrays(ours, theirs, names), "a learning rate of 0 keeps them"
    assert ours.step == 2 and ours.data["step"] == 2


def test_a_deeper_run_starts_from_it(run, warm, workshop, losses, capsys):
    """Layers that stand twice are closed at first, so its first loss is that of the model it came from."""
    text = starting_from(run[1]) + "NUM_LAYERS = 4\nwarm_start.WarmStart.rules = (@surgery.UpscaleDepth(),)\n"
    text += "surgery.UpscaleDepth.order = ((0, 2), (0, 2))\nsurgery.UpscaleDepth.copies = 'closed'\n"
    text += "warm_start.WarmStart.optimizer = 'keep'\n"
    imports = ("run", "checkpoints.warm_start", "checkpoints.surgery")
    deeper = workshop.train("deeper", workshop.gin("deeper", text, imports=imports))
    out = capsys.readouterr().out
    assert f"Warm start from {run[1] / 'checkpoints' / str(STEPS)}" in out
    assert "<- decoder/layers/0-1/attention/output/kernel, times 0 (2 layers)" in out
    assert "The optimizer keeps" in out
    np.testing.assert_allclose(losses(deeper)[1], losses(warm)[1], rtol=1e-6)


def test_its_model_goes_to_hugging_face_and_back(run, workshop, same_arrays, losses, tmp_path, capsys):
    """A warm start from what was exported is one from the run itself."""
    _, folder, _ = run
    out = str(tmp_path / "exported")
    assert convert_checkpoint.main([str(folder), out, "--dry-run"]) == 0
    line = "model.layers.1.mlp.up_proj.weight [64, 32] <-> decoder/layers/1/feed_forward/up/kernel"
    assert line in capsys.readouterr().out
    assert convert_checkpoint.main([str(folder), out]) == 0
    assert "as a LlamaForCausalLM" in capsys.readouterr().out
    text = f"TRAIN_STEPS = 1\nLEARNING_RATE = 0.0\nwarm_start.WarmStart.path = '{out}'\n"
    text += "run.RunConfig.warm_start = @warm_start.WarmStart()\n"
    gin = workshop.gin("from_exported", text, imports=("run", "checkpoints.warm_start"))
    again = workshop.train("from_exported", gin)
    ours, theirs = stored.open_latest(again / "checkpoints"), stored.open_latest(folder / "checkpoints")
    assert same_arrays(ours, theirs, [path for path in theirs.leaves if path[0] == "params"])
    assert convert_checkpoint.main([str(folder), out]) == 1
    assert "exists already; remove it" in capsys.readouterr().err


def test_main_returns_the_status_of_a_refusal(workshop, run, capsys):
    """Fewer steps than the newest checkpoint has: refused with a remedy, nothing is lost."""
    gin, folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    more = workshop.rewound(folder, STEPS, "fewer")
    assert train.main(workshop.arguments(more, gin, "TRAIN_STEPS=30")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "beyond train_steps = 30; raise TRAIN_STEPS" in error
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
