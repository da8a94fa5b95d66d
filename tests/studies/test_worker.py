"""Workers and trials without training: what is chosen, what fails, what is tried again."""

import gzip
import json
import pathlib

import pytest

from jaxlm import study as command
from jaxlm.architecture import Architecture
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.exit_status import ExitStatus
from jaxlm.studies.config import Grid, Leg, StudyConfig, Tune
from jaxlm.studies.jobs import expand
from jaxlm.studies.report import write_report
from jaxlm.studies.results import failed_jobs, status
from jaxlm.studies.store import Store
from jaxlm.studies.worker import unfinished, work
from jaxlm.training.loop import Outcome, TrainingDiverged
from tests.evaluation.models import as_pretrained, make_model

LOSSES = {4: 3.0, 8: 2.0, 16: 1.0}  # by batch size, which stands for a rate
TUNED = Leg("pretrain", tune=Tune("BATCH_SIZE", tuple(LOSSES)))
PLAIN = Leg("pretrain")
AFTER = Leg("after", after="pretrain")


def make_study(folder, legs, *, seeds=(0, 1), widths=("64", "96")):
    """A study and its folder."""
    factors = {"width": {width: (f"WIDTH = {width}",) for width in widths}}
    settings = ("gin_configs/runs/quickstart.gin", "TRAIN_STEPS = 4", "BATCH_SIZE = 2")
    store = Store(folder)
    store.open("")
    return StudyConfig(str(folder), settings, factors, legs, Grid(), seeds=seeds), store


ASKED = ("gin_configs/evaluation/zero_shot.gin", "EVALUATION_DATA = 'nowhere'")


class Trainer:
    """Stands for training: leaves the folder of a finished run, unless `fails` of the configuration is an error."""

    def __init__(self, fails=lambda run: None):
        self.fails, self.trained = fails, []

    def __call__(self, run, *, programs):
        self.trained.append((run.model.width, run.batch_size, run.seed))
        folder = pathlib.Path(run.model_dir)
        folder.mkdir(parents=True, exist_ok=True)
        line = {"step": 2, "validation/cross_entropy": LOSSES.get(run.batch_size, 5.0)}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if (error := self.fails(run)) is not None:
            raise error
        (folder / "run.json").write_text(json.dumps({"finished_at_step": run.train_steps}))
        return Outcome.FINISHED


def diverges_at(*batch_sizes):
    return Trainer(lambda run: TrainingDiverged(3, None) if run.batch_size in batch_sizes else None)


def test_a_rate_that_diverges_is_out_of_the_choice(tmp_path):
    """Even where its last loss was the lowest; the cell goes on with the best of the others."""
    study, store = make_study(tmp_path / "study", (TUNED, AFTER), widths=("64",))
    train = diverges_at(16)
    assert work(study, store, train, report=lambda line: None) is Outcome.FINISHED
    plan = expand(study, store)
    assert [(leg.name, job.tuned) for _, leg, job in plan.of_cells] == [("pretrain", 8), ("after", None)]
    assert all(store.is_finished(job) for _, _, job in plan.of_cells) and not failed_jobs(plan, store)
    report = write_report(study, plan, store).read_text()
    assert "| 64 | 3.0000 | 2.0000 | diverged | 8 |" in report and "## Failed" not in report
    # It would diverge again.
    store.forget_failures(plan.jobs.values())
    assert not unfinished(plan, store)


def test_a_later_seed_that_diverges_does_not_change_the_choice(tmp_path):
    """A trial is the first seed's run; the others' failures are the chosen cell's, and are said."""
    study, store = make_study(tmp_path / "study", (TUNED, AFTER), widths=("64",))
    train = Trainer(lambda run: TrainingDiverged(3, None) if (run.batch_size, run.seed) == (16, 1) else None)
    work(study, store, train, report=lambda line: None)
    plan = expand(study, store)
    assert plan.of_cells[0][2].tuned == 16 and not any(seed == 1 and size == 8 for _, size, seed in train.trained)
    assert [(leg.name, store.failure(job).seed) for _, leg, job in failed_jobs(plan, store)] == [("pretrain", 1)]
    report = write_report(study, plan, store).read_text()
    assert "| 64 | 3.0000 | 2.0000 | 1.0000 | 16" in report and "| 64 | pretrain | 1 | Training diverged" in report


def test_a_cell_whose_rates_all_diverge_has_failed(tmp_path):
    study, store = make_study(tmp_path / "study", (TUNED, AFTER), widths=("64",))
    work(study, store, diverges_at(*LOSSES), report=lambda line: None)
    plan = expand(study, store)
    (cell,) = study.cells
    assert [job for _, _, job in plan.of_cells] == [None, None] and len(failed_jobs(plan, store)) == 3
    assert {status(plan, cell, leg, None, 0, store) for leg in study.legs} == {"failed"}
    report = write_report(study, plan, store).read_text()
    assert "| 64 | pretrain | 0 | Training diverged at step 3" in report and "delete runs/pretrain-" in report


def test_a_trial_that_is_the_only_seeds_run_is_asked_what_the_leg_asks(tmp_path):
    asked = Leg("pretrain", tune=TUNED.tune, evaluations={"own": ASKED})
    study, store = make_study(tmp_path / "study", (asked, AFTER), seeds=(0,), widths=("64",))
    for trial in expand(study, store).trials[0][2]:
        Trainer()(trial.configuration(0, {trial.address: store.run_folder(trial, 0).path}), programs=None)
    plan = expand(study, store)
    chosen = plan.of_cells[0][2]
    assert chosen.tuned == 16 and plan.jobs[chosen.address].evaluations == asked.evaluations
    assert [job.address for job in unfinished(plan, store)] == [chosen.address, plan.of_cells[1][2].address]


def test_an_error_of_any_kind_loses_one_cell_alone(tmp_path):
    study, store = make_study(tmp_path / "study", (PLAIN, AFTER))
    lines = []
    train = Trainer(lambda run: RuntimeError("RESOURCE_EXHAUSTED: out of memory") if run.model.width == 96 else None)
    assert work(study, store, train, report=lines.append) is Outcome.FINISHED
    plan = expand(study, store)
    assert {job.label for _, _, job in plan.of_cells if store.is_finished(job)} == {"width 64"}
    ((cell, leg, job),) = failed_jobs(plan, store)
    assert (cell, leg.name) == ({"width": "96"}, "pretrain") and not store.diverged(job)
    assert store.failure(job).error == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert any("Traceback" in line for line in lines)


def test_one_cells_command_says_that_it_failed_and_tries_again(tmp_path, monkeypatch):
    study, store = make_study(tmp_path / "study", (PLAIN, AFTER))
    broken = [True]
    train = Trainer(lambda run: OSError("no space left") if broken[0] and run.model.width == 96 else None)
    monkeypatch.setattr(command, "train", train)
    assert command.work_here(study, store, "width 96") == ExitStatus.FAILED
    broken[0] = False
    assert command.work_here(study, store, "width 96") == ExitStatus.FINISHED
    assert train.trained.count((96, 2, 0)) == 3 and (64, 2, 0) not in train.trained  # failed, again, `after`
    assert command.work_here(study, store, None) == ExitStatus.FINISHED and (64, 2, 0) in train.trained


def test_failures_of_what_another_worker_tries_again_are_left(tmp_path):
    study, store = make_study(tmp_path / "study", (PLAIN,), widths=("64",))
    work(study, store, Trainer(lambda run: OSError("no space left")), report=lambda line: None)
    plan = expand(study, store)
    (job,) = plan.jobs.values()
    with store.claim(job) as mine:
        assert mine
        store.forget_failures([job])
        assert store.failure(job) is not None
    store.forget_failures([job])
    assert store.failure(job) is None


def test_models_are_opened_on_the_mesh_of_each_evaluation(tmp_path, monkeypatch):
    """Anew where it changes."""
    opened, asked = [], []
    monkeypatch.setattr("jaxlm.studies.worker.pretrained.load", lambda path, parallel: opened.append(parallel) or path)

    class Answer:
        failures = {}

    def evaluate(config, model, *, folder, **options):
        asked.append(config.parallel)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text('{"tasks": {}}')
        return Answer()

    monkeypatch.setattr("jaxlm.studies.worker.evaluate", evaluate)
    file = tmp_path / "meshed.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\nfrom jaxlm.evaluation import suite\n"
        "from jaxlm.parallel import mesh\nfrom jaxlm.parallel import parallelism\n"
        "include 'gin_configs/evaluation/zero_shot.gin'\n"
        "suite.EvaluationConfig.parallel = @parallelism.ParallelConfig()\n"
        "parallelism.ParallelConfig.mesh = @mesh.MeshConfig()\n"
    )
    asks = {"a": ASKED, "b": (*ASKED, "LIMIT = 4"), "c": (str(file), *ASKED[1:])}
    leg = Leg("pretrain", evaluations=asks)
    study, store = make_study(tmp_path / "study", (leg,), seeds=(0,), widths=("64",))
    work(study, store, Trainer(), report=print)
    assert [config is None for config in asked] == [True, True, False]
    assert [parallel is None for parallel in opened] == [True, False]


QUESTIONS = """
from __gin__ import dynamic_registration
from jaxlm.evaluation import suite
from jaxlm.evaluation import tasks
include 'gin_configs/evaluation/zero_shot.gin'
TASKS = [@copa/tasks.EvaluationTask(), @blimp/tasks.EvaluationTask()]
suite.EvaluationConfig.samples = 20
"""
COPA = [{"query": "It rained, so", "choices": ["it was wet.", "it was dry."], "gold": i % 2} for i in range(3)]
PAIR = {"sentence_good": "Who should he hug?", "sentence_bad": "Who should hug he?", "UID": "island"}


@pytest.fixture
def asking(tmp_path, monkeypatch):
    """(a study of two legs, of which the first is asked copa and blimp; its store; what was trained; writes rows)."""
    vocabulary = ByteVocabulary(extra_ids=0)
    model = as_pretrained(make_model(Architecture.CAUSAL_DECODER, vocab_size=vocabulary.size), vocabulary)
    monkeypatch.setattr("jaxlm.studies.worker.pretrained.load", lambda path, parallel: model)
    file = tmp_path / "questions.gin"
    file.write_text(QUESTIONS)
    leg = Leg("pretrain", evaluations={"zero": (str(file), f"EVALUATION_DATA = '{tmp_path}'")})
    study, store = make_study(tmp_path / "study", (leg, AFTER), widths=("64",))
    train = Trainer()
    monkeypatch.setattr(command, "train", train)

    def write(path, rows):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        with gzip.open(tmp_path / path, "wt") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)

    return study, store, train, write


def test_a_task_that_fails_loses_neither_the_others_nor_the_legs_to_come(asking, tmp_path, capsys):
    """It is named, and asked again at the next start; what was answered is not."""
    study, store, train, write = asking
    write("copa/validation.jsonl.gz", COPA)
    write("blimp/test.jsonl.gz", [{"sentence_good": "Who?"}])
    assert command.work_here(study, store, "width 64") == ExitStatus.FAILED
    plan = expand(study, store)
    assert all(store.is_finished(job) for _, _, job in plan.of_cells) and len(train.trained) == 4
    job = plan.of_cells[0][2]
    scores, failed = store.scores(job, 0)["zero"], store.failed_tasks(job, 0)["zero"]
    assert list(scores) == ["copa"] and list(failed) == ["blimp"] and "fails on 1 of 1 rows" in failed["blimp"]
    before = store.examples(job, 0)["zero"].read_text()

    report = write_report(study, plan, store).read_text()
    assert "| blimp |  | failed |" in report and "## Failed" in report
    assert "| 64 | pretrain | 1 | zero/blimp | Task blimp stopped: prompt 'default' fails on 1 of 1 rows" in report
    assert "zero/blimp" in (store.path / "cells.csv").read_text()
    assert command.finish(study, store) == ExitStatus.FAILED
    assert capsys.readouterr().out.count(", task zero/blimp failed: Task blimp stopped") == 2
    assert not unfinished(plan, store)  # another worker does not try again

    (tmp_path / "copa" / "validation.jsonl.gz").unlink()  # to be asked again it would have to be there
    write("blimp/test.jsonl.gz", [PAIR, PAIR])
    assert command.work_here(study, store, "width 64") == ExitStatus.FINISHED
    plan = expand(study, store)
    assert len(train.trained) == 4 and not store.failed_tasks(job, 0) and not store.failed_tasks(job, 1)
    after = store.scores(job, 0)["zero"]
    assert list(after) == ["copa", "blimp"] and after["copa"] == scores["copa"]
    lines = store.examples(job, 0)["zero"].read_text()
    assert lines.startswith(before) and lines.count('"task": "blimp"') == 2 and lines.count('"task": "copa"') == 3
    assert "## Failed" not in write_report(study, plan, store).read_text()
    assert not list(store.path.rglob("partial.json"))


def test_an_evaluation_that_was_taken_back_and_killed_keeps_what_it_had(asking):
    """Whatever the examples already hold of the tasks that are asked again."""
    study, store, _, write = asking
    write("copa/validation.jsonl.gz", COPA)
    write("blimp/test.jsonl.gz", [{"sentence_good": "Who?"}])
    work(study, store, command.train, report=lambda line: None)
    plan = expand(study, store)
    job = plan.of_cells[0][2]
    store.forget_failures(plan.jobs.values())
    assert store.evaluations_left(job, 0) == ["zero"] and store.was_asked(job, 0, "zero")
    with (store.evaluation_folder(job, 0, "zero") / "examples.jsonl").open("a") as lines:
        lines.write('{"task": "blimp", "row": 7}\n')  # killed before its results were written
    write("blimp/test.jsonl.gz", [PAIR])
    work(study, store, command.train, report=lambda line: None)
    found = [json.loads(line) for line in store.examples(job, 0)["zero"].read_text().splitlines()]
    assert [(line["task"], line["row"]) for line in found] == [("copa", 0), ("copa", 1), ("copa", 2), ("blimp", 0)]


def test_a_missing_file_is_said_before_anything_is_trained(asking, tmp_path):
    study, store, train, write = asking
    said = "^Study .*, leg pretrain, evaluation 'zero': Task copa: No text at '.*/copa/validation.jsonl.gz': nothing "
    with pytest.raises(ValueError, match=rf"{said}.* 1 more cannot be asked: zero/blimp\.$"):
        command.work_here(study, store, None)
    write("copa/validation.jsonl.gz", COPA)
    with pytest.raises(
        ValueError, match=r"Task blimp: No text at '.*/blimp/test.jsonl.gz': nothing is there; .* also .gz\)\.$"
    ):
        command.supervise(study, store, [], 1)
    assert not train.trained
    write("blimp/test.jsonl.gz", [PAIR])
    assert command.work_here(study, store, None) == ExitStatus.FINISHED and len(train.trained) == 4
