"""Workers and trials without training: what is chosen, what fails, what is tried again."""

import contextlib
import csv
import dataclasses
import gzip
import json
import os
import pathlib
import re
import sys
import time

import pytest

from jaxlm import study as command
from jaxlm.architecture import Architecture
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.exit_status import ExitStatus
from jaxlm.studies.config import Finding, Grid, Leg, Match, StudyConfig, Together, Tune
from jaxlm.studies.jobs import expand
from jaxlm.studies.report import status_rows, write_report
from jaxlm.studies.results import account, failed_jobs, finished_runs, status
from jaxlm.studies.store import Failure, Store
from jaxlm.studies.worker import check_questions, flops_to_come, unfinished, work
from jaxlm.training.loop import Outcome, TrainingDiverged
from jaxlm.training.progress import duration, human
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
    """Stands for training: leaves the folder of a finished run, unless `fails` of the configuration is an error, or
    another outcome."""

    def __init__(self, fails=lambda run: None):
        self.fails, self.trained = fails, []

    def __call__(self, run, *, programs):
        self.trained.append((run.model.width, run.batch_size, run.seed))
        folder = pathlib.Path(run.model_dir)
        folder.mkdir(parents=True, exist_ok=True)
        line = {"step": 2, "validation/cross_entropy": LOSSES.get(run.batch_size, 5.0)}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if isinstance(failed := self.fails(run), Outcome):
            return failed
        if failed is not None:
            raise failed
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
    assert [(leg.name, list(store.failures(job))) for _, leg, job in failed_jobs(plan, store)] == [("pretrain", [1])]
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


def test_a_single_value_is_bound_without_trials(tmp_path):
    """And is the run that trials would have led to."""
    one = Leg("pretrain", tune=Tune("BATCH_SIZE", (8,)))
    study, store = make_study(tmp_path / "study", (one, AFTER), widths=("64",))
    plan = expand(study, store)
    job = plan.of_cells[0][2]
    assert (job.tuned, job.run.batch_size) == (8, 8) and not plan.trials and not plan.waiting
    assert job.address in expand(make_study(tmp_path / "tuned", (TUNED,), widths=("64",))[0], store).jobs
    train = Trainer()
    work(study, store, train, report=lambda line: None)
    assert [size for _, size, _ in train.trained] == [8, 8, 2, 2]
    report = write_report(study, plan, store).read_text()
    assert "BATCH_SIZE" not in report and "edge" not in report
    rows = list(csv.DictReader((store.path / "cells.csv").open()))
    assert [row["BATCH_SIZE"] for row in rows if row["leg"] == "pretrain"] == ["8", "8"]


def test_a_value_that_makes_one_cell_illegal_loses_that_cell_alone(tmp_path, capsys):
    """Legal with the first value, which diverges; with the other one, 8 rows cannot be cut into 16."""
    tune = Tune("BATCH_SIZE", (16, 8), settings=("StepConfig.microbatches = 1",))
    after = dataclasses.replace(AFTER, factors=())
    study, store = make_study(tmp_path / "study", (Leg("pretrain", tune=tune), after))
    study = dataclasses.replace(study, together=(Together({"width": "96"}, ("StepConfig.microbatches = 16",)),))
    assert work(study, store, diverges_at(16), report=lambda line: None) is Outcome.FINISHED
    plan = expand(study, store)
    ((cell, leg, why),) = plan.refused
    assert (cell, leg.name) == ({"width": "96"}, "pretrain") and "8 rows cannot be cut into 16" in why
    assert {job.label for _, _, job in plan.of_cells if job and store.is_finished(job)} == {"width 64"}
    states = [row[2] for row in status_rows(study, plan, store)]
    assert states == ["finished", "finished", "failed", "failed"]
    assert command.finish(study, store) == ExitStatus.FAILED
    assert "width 96, leg pretrain, failed: " in capsys.readouterr().out
    assert "| 96 | pretrain |  | " in (store.path / "report.md").read_text()
    assert command.work_here(study, store, "width 96") == ExitStatus.FAILED


def test_a_metric_that_no_trial_has_is_said(tmp_path):
    tune = dataclasses.replace(TUNED.tune, metric="validation/no_such")
    study, store = make_study(tmp_path / "study", (Leg("pretrain", tune=tune), AFTER), widths=("64",))
    work(study, store, Trainer(), report=lambda line: None)
    plan = expand(study, store)
    assert [why.partition(";")[0] for _, _, why in plan.refused] == [
        "no trial ended with a finite 'validation/no_such'"
    ]
    assert [row[2] for row in status_rows(study, plan, store)] == ["failed", "failed"]


def test_the_live_table(tmp_path):
    study, store = make_study(tmp_path / "study", (TUNED, AFTER, Leg("last", after="after")), widths=("64",))

    def table():
        plan = expand(study, store)
        return plan, [row[2:] for row in status_rows(study, plan, store)]

    def trained(job, seed, fails=lambda run: None):
        folder = store.run_folder(job, seed).path
        run = dataclasses.replace(job.run, model_dir=str(folder), seed=seed)
        Trainer(fails)(run, programs=None)

    plan, rows = table()
    assert rows == [("trials 0/3", ""), ("waiting", ""), ("waiting", "")]
    trials = plan.trials[0][2]
    for trial in trials[:2]:
        trained(trial, 0)
    assert table()[1][0] == ("trials 2/3", "")
    trained(trials[2], 0)
    plan, rows = table()
    assert rows[0] == ("1/2", "1.0000")  # the best trial is the first seed's run
    job = plan.of_cells[0][2]
    with store.claim(job):
        assert table()[1][0] == ("seed 2/2, step 0/4", "1.0000")
    store.fail(job, Failure("no space left", 1))
    assert table()[1][0] == ("failed", "1.0000")
    store.forget_failures([job])
    trained(job, 1)
    plan, rows = table()
    assert rows == [("finished", "1.0000"), ("to do", ""), ("to do", "")]


def test_the_plan_counts_what_comes_after_trials(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.machine, "matmul_flops_per_second", lambda: 2e9)
    adapt = Leg("adapt", after="pretrain", tune=Tune("LEARNING_RATE", (1e-3, 1e-2)))
    last = Leg("last", after="adapt", evaluations={"own": ASKED})
    study, store = make_study(tmp_path / "study", (TUNED, adapt, last), widths=("64",))
    plan = expand(study, store)

    def shown():
        assert command.show_plan(study, store) == ExitStatus.FINISHED
        _, *lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
        rows = [line for line in lines if line[0] == "64"]
        return rows, " ".join(line[0] for line in lines[len(rows) :])

    rows, total = shown()
    assert [row[1] for row in rows] == [
        "pretrain, trials",
        "pretrain (after trials)",
        "adapt, trials (after trials)",
        "adapt (after trials)",
        "last (after trials)",
    ]
    now = sum(trial.size.flops for trial in plan.trials[0][2])
    of = {leg.name: jobs[0].size for _, leg, jobs in plan.waiting}
    # One seed of a tuned leg is one of its trials.
    later = of["pretrain"].flops + (2 + 1) * of["adapt"].flops + 2 * of["last"].flops
    assert [row[-1].partition(" x ")[0] for row in rows] == ["3", "2", "2", "2", "2"]
    assert rows[-1][2:6] == [human(x).strip() for x in dataclasses.astuple(of["last"])]
    assert total.startswith(
        f"9 runs that differ, 9 of them to do: {human(now + later).strip()} FLOPs ({later / (now + later):.0%} of them "
        f"after trials), about {duration((now + later) / 1e9)} at "
    )
    assert total.endswith("; the time of evaluations is not known and not included.")
    work(study, store, Trainer(), report=lambda line: None)
    rows, total = shown()
    assert not any("after trials" in cell for row in rows for cell in row)
    assert "9 runs that differ, 2 of them to do: 0 FLOPs," in total  # they are trained, but not evaluated


def test_what_has_the_most_to_come_is_first(tmp_path):
    study, store = make_study(tmp_path / "study", (PLAIN, dataclasses.replace(AFTER, only={"width": ("64",)})))
    plan = expand(study, store)
    of = {(cell["width"], leg.name): job for cell, leg, job in plan.of_cells}
    small, after, large = of["64", "pretrain"], of["64", "after"], of["96", "pretrain"]
    assert small.size.flops < large.size.flops < 2 * small.size.flops
    to_come = flops_to_come(plan)
    assert to_come[after.address] == pytest.approx(2 * small.size.flops)
    assert to_come[small.address] == pytest.approx(4 * small.size.flops)
    train = Trainer()
    work(study, store, train, report=lambda line: None)
    assert [width for width, _, seed in train.trained if seed == 0] == [64, 96, 64]


def test_what_comes_after_trials_is_to_come(tmp_path):
    tuned = Leg("adapt", after="pretrain", tune=Tune("BATCH_SIZE", (2, 4)))
    study, store = make_study(tmp_path / "study", (TUNED, tuned, Leg("last", after="adapt")), widths=("64",))
    plan = expand(study, store)
    # Its own batch, the cheapest's two seeds, the dearer trial, the cheaper one's two seeds, the last leg's.
    batches = {trial.trial[1]: trial for trial in plan.trials[0][2]}
    one = batches[4].size.flops / 4
    assert flops_to_come(plan)[batches[16].address] == pytest.approx((16 + 2 * 4 + 4 + 2 * 2 + 2 * 2) * one)


def test_waiting_for_another_worker_is_in_the_account(tmp_path, monkeypatch):
    study, store = make_study(tmp_path / "study", (PLAIN,), widths=("64",))
    plan = expand(study, store)
    (job,) = plan.jobs.values()
    with contextlib.ExitStack() as other:
        other.enter_context(store.claim(job))
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 3:
                other.close()

        monkeypatch.setattr("jaxlm.studies.worker.time.sleep", sleep)
        work(study, store, Trainer(), report=lambda line: None, began=time.time() - 60.0)
    spent = account(plan, store)
    assert spent.waiting == sum(slept) == 6.0
    assert 0.0 < spent.share_waited < 0.1 < spent.overhead
    assert f"{spent.share_waited:.1%} waited for" in write_report(study, plan, store).read_text()


def test_claims_of_levels_that_were_left_out_are_not_in_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.machine, "matmul_flops_per_second", lambda: 2e9)
    study, store = make_study(tmp_path / "study", (PLAIN, dataclasses.replace(AFTER, only={"width": ("96",)})))
    sides = {"leg": "after"}, {"leg": "pretrain", "width": "64"}
    study = dataclasses.replace(study, findings=(Finding("f", *sides),), matches=(Match("m", *sides),))
    assert not study.left_out
    study = dataclasses.replace(study, factors={"width": {"64": ("WIDTH = 64",)}})
    work(study, store, Trainer(), report=lambda line: None)
    report = write_report(study, expand(study, store), store).read_text()
    assert study.left_out in report and "legs pretrain:" in report and "| after |" not in report
    assert "## Findings" not in report and "Tokens to the same loss" not in report
    command.show_plan(study, store)
    assert study.left_out in " ".join(capsys.readouterr().out.split())


def test_a_workers_time_begins_with_its_process(tmp_path, monkeypatch):
    gin = tmp_path / "study.gin"
    gin.write_text(
        "from __gin__ import dynamic_registration\nfrom jaxlm.studies import config\n"
        f"config.StudyConfig:\n    study_dir = '{tmp_path / 'study'}'\n"
        "    settings = ('gin_configs/runs/quickstart.gin', 'TRAIN_STEPS = 4')\n"
        "    factors = {}\n    design = @config.Grid()\n    legs = (@config.Leg(),)\nconfig.Leg.name = 'pretrain'\n"
    )
    monkeypatch.setattr(command, "train", Trainer())
    monkeypatch.setattr(command.machine, "process_began", lambda: time.time() - 1000.0)
    monkeypatch.setattr(sys, "argv", ["jaxlm.study", f"--gin_file={gin}", "--worker"])
    assert command.main() == ExitStatus.FINISHED
    assert Store(tmp_path / "study").worker_seconds >= 1000.0


def test_an_error_of_any_kind_loses_one_cell_alone(tmp_path):
    study, store = make_study(tmp_path / "study", (PLAIN, AFTER))
    lines = []
    train = Trainer(lambda run: RuntimeError("RESOURCE_EXHAUSTED: out of memory") if run.model.width == 96 else None)
    assert work(study, store, train, report=lines.append) is Outcome.FINISHED
    plan = expand(study, store)
    assert {job.label for _, _, job in plan.of_cells if store.is_finished(job)} == {"width 64"}
    ((cell, leg, job),) = failed_jobs(plan, store)
    assert (cell, leg.name) == ({"width": "96"}, "pretrain") and not store.diverged(job)
    assert {why.error for why in store.failures(job).values()} == {"RuntimeError: RESOURCE_EXHAUSTED: out of memory"}
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
        assert list(store.failures(job)) == [0, 1]
    store.forget_failures([job])
    assert not store.failures(job)


def test_whoever_reads_a_failure_while_another_is_noted_sees_the_whole_of_it(tmp_path):
    study, store = make_study(tmp_path / "study", (PLAIN,), widths=("64",))
    work(study, store, Trainer(lambda run: OSError("no space left")), report=lambda line: None)
    (job,) = expand(study, store).jobs.values()
    with store.failed_json(job, 0).open() as reader:
        store.fail(job, Failure("again", 0))
        assert json.load(reader)["error"] == "no space left"
    assert store.failures(job)[0].error == "again"


def test_a_seed_after_one_that_diverged_is_trained_although_the_worker_was_stopped_between(tmp_path):
    """What failed is noted of each seed."""
    study, store = make_study(tmp_path / "study", (PLAIN, AFTER), widths=("64",))
    stopped = Trainer(lambda run: TrainingDiverged(3, None) if run.seed == 0 else Outcome.PREEMPTED)
    assert work(study, store, stopped, report=lambda line: None) is Outcome.PREEMPTED
    (job,) = (job for job in expand(study, store).jobs.values() if job.leg.name == "pretrain")
    assert list(store.failures(job)) == [0] and store.seeds_left(job) == [1]
    train = Trainer()
    assert work(study, store, train, report=lambda line: None) is Outcome.FINISHED
    assert train.trained == [(64, 2, 1)] and not store.seeds_left(job)  # nothing starts from half a job


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
    assert not list(store.path.rglob("again"))


def taken_back(asking):
    """(the study, its store, plan and first job, writes rows): blimp failed, and is to be asked again."""
    study, store, _, write = asking
    write("copa/validation.jsonl.gz", COPA)
    write("blimp/test.jsonl.gz", [{"sentence_good": "Who?"}])
    work(study, store, command.train, report=lambda line: None)
    plan = expand(study, store)
    job = plan.of_cells[0][2]
    store.forget_failures(plan.jobs.values())
    return study, store, plan, job, write


def test_what_is_to_be_asked_again_stays_in_the_report_meanwhile(asking):
    """And legs that start from it may go on, though the examples are gone and nobody has asked yet."""
    study, store, plan, job, write = taken_back(asking)
    assert store.is_finished(job) and store.seeds_left(job) == [0, 1] and unfinished(plan, store) == [job]
    scores = [list(run.scores["zero"]) for run in finished_runs(plan, store) if run.leg == "pretrain"]
    assert scores == [["copa"], ["copa"]] and store.failed_tasks(job, 0)
    store.examples(job, 0)["zero"].unlink()
    write("blimp/test.jsonl.gz", [PAIR])
    work(study, store, command.train, report=lambda line: None)
    assert list(store.scores(job, 0)["zero"]) == ["copa", "blimp"] and not store.failed_tasks(job, 0)


def test_tasks_are_asked_again_beside_a_seed_that_diverged(asking):
    study, store, train, write = asking
    write("copa/validation.jsonl.gz", COPA)
    write("blimp/test.jsonl.gz", [{"sentence_good": "Who?"}])
    plan = expand(study, store)
    job = plan.of_cells[0][2]

    def diverging(run, **options):
        if run.seed == 1:
            raise TrainingDiverged("nan", 1)
        return train(run, **options)

    work(study, store, diverging, report=lambda line: None)
    assert store.diverged(job) and store.failed_tasks(job, 0)
    store.forget_failures(plan.jobs.values())
    assert store.diverged(job) and store.seeds_left(job) == [0]
    write("blimp/test.jsonl.gz", [PAIR])
    trained = len(train.trained)
    work(study, store, diverging, report=lambda line: None)
    assert not store.failed_tasks(job, 0) and not store.seeds_left(job) and len(train.trained) == trained


def test_an_evaluation_that_was_taken_back_and_killed_keeps_what_it_had(asking):
    """Whatever the examples already hold of the tasks that are asked again."""
    study, store, _, job, write = taken_back(asking)
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


def test_runs_that_would_write_one_file_are_refused(tmp_path):
    """Each would overwrite the others' annotation, and what reads it learn from another's; one run may write."""
    settings = ("gin_configs/evaluation/distilled.gin", f"TAUGHT = '{tmp_path}/taught.jsonl'", "TRAIN = 'rows.jsonl'")
    leg = Leg("pretrain", evaluations={"teach": settings})
    study, store = make_study(tmp_path / "study", (leg,), widths=("64",))
    said = (
        "leg pretrain, evaluation 'teach', task teacher: its 2 runs would write .*/taught.jsonl, each over the others'"
    )
    with pytest.raises(ValueError, match=said):
        check_questions(study, expand(study, store), store)
    alone, store = make_study(tmp_path / "alone", (leg,), widths=("64",), seeds=(0,))
    with pytest.raises(ValueError, match="No text at 'rows.jsonl'"):  # it is only its files that it lacks
        check_questions(alone, expand(alone, store), store)


def test_workers_share_the_cores():
    shares = [command.share_of([0, 1, 2, 5, 7], number, 2) for number in range(2)]
    assert shares == [[0, 2, 7], [1, 5]]
    assert command.share_of([4, 6], 2, 3) == [4, 6]  # fewer cores than workers: all have all


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot bind processes to cores")
def test_a_worker_runs_on_its_cores_with_large_pages(tmp_path, monkeypatch):
    """Threads are made for the cores that a process has when it starts to compute."""
    script = tmp_path / "python"
    show = 'import os; print(*os.sched_getaffinity(0), os.environ["GLIBC_TUNABLES"])'
    script.write_text(f"#!/bin/sh\nsleep 0.5\nexec {sys.executable} -c '{show}'\n")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    cores = sorted(os.sched_getaffinity(0))
    for number in range(2):
        command._start_worker(Store(tmp_path), [], number, 2).wait()
    for number in range(2):
        *own, tunables = (tmp_path / "workers" / f"{number}.log").read_text().split()
        assert sorted(map(int, own)) == command.share_of(cores, number, 2)
        assert tunables == "glibc.malloc.hugetlb=1"
