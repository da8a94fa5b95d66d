"""A tiny study through the command line: killed on the way, with a cell that fails, then completed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.tiny_runs import ENVIRONMENT, Workshop
from jaxlm.configuration import resolve
from jaxlm.studies.config import Grid, Leg, StudyConfig
from jaxlm.studies.jobs import expand, resolved, size_of
from jaxlm.studies.store import Store
from jaxlm.studies.worker import work
from jaxlm.study import print_commands
from jaxlm.train import train
from jaxlm.training.compiles import CompileCounter
from jaxlm.training.loop import Outcome

ROWS = "TASK_FEATURE_LENGTHS = {'targets': 32}"
STUDY = """
from __gin__ import dynamic_registration
from jaxlm.studies import config

LOST = {lost!r}

config.StudyConfig:
    study_dir = '{folder}'
    settings = ('{base}',)
    factors = {{
        'objective': {{
            'language': ('gin_configs/objectives/full_lm.gin', "{rows}"),
            'spans': ('gin_configs/objectives/span_corruption.gin',),
            'lost': ('gin_configs/objectives/full_lm.gin', %LOST),
        }},
    }}
    design = @config.Grid()
    legs = (@pretrain/config.Leg(), @adapt/config.Leg(), @longer/config.Leg())
    seeds = (0, 1)
    matches = (@config.Match(),)
    findings = (@config.Finding(),)
pretrain/config.Leg:
    name = 'pretrain'
    budget = @config.Budget()
    tune = @config.Tune()
    evaluations = {{'zero-shot': ('{tasks}/words.gin',)}}
adapt/config.Leg:
    name = 'adapt'
    after = 'pretrain'
    factors = ()
    only = {{'objective': ('spans',)}}
    settings = ('gin_configs/objectives/full_lm.gin', "{rows}", 'TRAIN_STEPS = 10')
longer/config.Leg:
    name = 'longer'
    after = 'pretrain'
    start = 'state'
    step = 10
    only = {{'objective': ('language',)}}
    settings = ('TRAIN_STEPS = 15', 'LEARNING_RATE = 1e-3')
config.Budget.tokens = 5120
config.Tune.binding = 'LEARNING_RATE'
config.Tune.values = (1e-3, 1e-2)
config.Match.name = 'adaptation'
config.Match.adapted = {{'leg': 'adapt'}}
config.Match.scratch = {{'leg': 'pretrain', 'objective': 'language'}}
config.Finding.name = 'spans make xs likelier'
config.Finding.less = {{'leg': 'pretrain', 'objective': 'spans'}}
config.Finding.more = {{'leg': 'pretrain', 'objective': 'language'}}
config.Finding.metric = 'zero-shot/words/gold_nll'
"""
WORDS = """
from __gin__ import dynamic_registration
from jaxlm.evaluation import measures
from jaxlm.data import prompts
from jaxlm.evaluation import tasks

include 'gin_configs/evaluation/suite.gin'

EVALUATION_DATA = '{folder}'
TASKS = [@tasks.EvaluationTask()]
tasks.EvaluationTask.name = 'words'
tasks.EvaluationTask.source = @tasks.rows_in()
tasks.EvaluationTask.prompts = [@prompts.Prompt()]
tasks.EvaluationTask.measure = @measures.RankClassification()
tasks.rows_in.folder = %EVALUATION_DATA
tasks.rows_in.validation = 'words.jsonl'
prompts.Prompt.context = '{{{{ text }}}}'
prompts.Prompt.choices = '["x", "qq"]'
prompts.Prompt.gold = 'gold'
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="module")
def write(workshop):
    """A function that writes the study's gin file, with the settings of its level "lost"."""
    base = workshop.folder / "base.gin"
    base.write_text(
        "from __gin__ import dynamic_registration\n"
        "from jaxlm import run\nfrom jaxlm.checkpoints import manager\nfrom jaxlm.data import config\n"
        "include 'gin_configs/models/tiny/prefix_decoder.gin'\n"
        "include 'gin_configs/data/files.gin'\ninclude 'gin_configs/runs/pretrain.gin'\n"
        f"FILES = '{workshop.corpus}'\nconfig.DataConfig.cache_directory = '{workshop.folder / 'cache'}'\n"
        "TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 8}\nrun.RunConfig.samples = None\n"
        "WIDTH = 32\nHIDDEN = 64\nBATCH_SIZE = 8\nEVAL_PERIOD = 5\nEVAL_STEPS = 2\nCHECKPOINT_PERIOD = 5\n"
        "manager.CheckpointConfig.keep_last = 5\n"
    )

    rows = [json.dumps({"text": f"{word} ", "gold": i % 2}) for i, word in enumerate(["ab", "cd", "ef", "gh"])]
    (workshop.folder / "words.jsonl").write_text("\n".join(rows) + "\n")
    (workshop.folder / "words.gin").write_text(WORDS.format(folder=workshop.folder))

    def write(lost):
        gin = workshop.folder / "study.gin"
        folders = {"folder": workshop.folder / "study", "tasks": workshop.folder}
        gin.write_text(STUDY.format(lost=lost, base=base, rows=ROWS, **folders))
        return gin

    return write


def command(gin, *flags):
    return [sys.executable, "-m", "jaxlm.study", f"--gin_file={gin}", *flags]


def finished(folder):
    """{run: its starts} of the finished runs of a study."""
    records = {path.parent: json.loads(path.read_text()) for path in (folder / "runs").glob("*/seed*/run.json")}
    return {run: len(record["starts"]) for run, record in records.items() if record["finished_at_step"]}


@pytest.fixture(scope="module")
def study(workshop, write):
    """(the study's folder, runs that were finished when it was killed, how its second start ended)."""
    gin, folder = write("FILES = '/nowhere'"), workshop.folder / "study"
    process = subprocess.Popen(
        command(gin), env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(finished(folder)) < 3 and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(folder)
    done = subprocess.run(command(gin, "--workers=2"), env=ENVIRONMENT, capture_output=True, text=True)
    return folder, before, done


def test_a_killed_study_runs_what_is_missing_and_no_worker_repeats_another(study):
    folder, before, _ = study
    after = finished(folder)
    assert len(before) >= 3 and before.items() <= after.items()  # none of them was started again
    restarted = [run for run, starts in after.items() if starts > 1]
    assert len(restarted) <= 1  # that of the kill
    # Of each objective: two trials, of which the better one is the first seed's run, and the other seed; then the legs.
    assert len(after) == 2 * 3 + 2 * 2


def test_a_cell_that_fails_is_named_and_the_others_are_there(study):
    folder, _, done = study
    assert done.returncode == 1 and done.stdout.count(" failed: ") == 2, done.stderr
    assert "objective lost" in done.stdout and "/nowhere" in done.stdout
    report = (folder / "report.md").read_text()
    assert re.search(r"## Failed\n(.*\n)+\| lost \| pretrain \| 0 \| .*/nowhere", report)
    rows = list(csv.DictReader((folder / "cells.csv").open()))
    states = {(row["objective"], row["leg"]): row["status"] for row in rows}
    assert states == {
        ("language", "pretrain"): "finished",
        ("language", "longer"): "finished",
        ("spans", "pretrain"): "finished",
        ("spans", "adapt"): "finished",
        ("lost", "pretrain"): "failed",
    }


def test_the_report_has_intervals_curves_trials_and_matches(study):
    folder, _, _ = study
    report = (folder / "report.md").read_text()
    for part in (
        "after pretrain",
        "LEARNING_RATE for pretrain",
        "Tokens to the same loss",
        "| adaptation |",
        "## zero-shot after pretrain",
        "## zero-shot over the grid",
        "bootstrap over rows and seeds",
        "| words, accuracy | 0.5000 |",
        "| spans make xs likelier |",
        "## Time",
    ):
        assert part in report
    for picture in re.findall(r"\]\((figures/.*?)\)", report):
        assert (folder / picture).stat().st_size > 5000
    rows = [row for row in csv.DictReader((folder / "cells.csv").open()) if row["leg"] == "pretrain"]
    for objective in ("language", "spans"):
        losses = [float(row["validation/cross_entropy"]) for row in rows if row["objective"] == objective]
        assert len(losses) == 2 and losses[0] != losses[1], "seeds differ"
        assert all(0 <= float(row["zero-shot/words/accuracy"]) <= 1 for row in rows if row["objective"] == objective)
        assert f"{sum(losses) / 2:.4f}" in report


def test_a_leg_that_goes_on_counts_the_steps_of_the_one_before(study, workshop, write):
    folder, _, _ = study
    (run,) = (path for path in finished(folder) if path.parent.name.startswith("longer") and path.name == "seed0")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) > 10 and max(steps) == 15
    (start,) = re.findall(r"path = '(.*)'", (run / "config.gin").read_text().split("Branch:")[1])[:1]
    assert "/pretrain-" in start


def test_equal_cells_share_their_runs(study, write):
    """The level that failed becomes another name of one that is there: nothing new is to run, and all is finished."""
    folder, _, _ = study
    gin = write(ROWS)
    config = resolve(StudyConfig, [f"--gin_file={gin}"])
    plan = expand(config, Store(folder))
    assert all(Store(folder).is_finished(job) for job in plan.jobs.values())
    addresses = {(cell["objective"], leg.name): job.address for cell, leg, job in plan.of_cells}
    assert addresses["lost", "pretrain"] == addresses["language", "pretrain"] != addresses["spans", "pretrain"]


def test_budgets_and_commands(study, write):
    gin = write(ROWS)
    config = resolve(StudyConfig, [f"--gin_file={gin}"])
    settings = config.settings_of({"objective": "spans"}, config.legs[0])
    one = size_of(resolved((*settings, "RunConfig.train_steps = 1")))
    assert one.tokens == 8 * 32 and one.flops == pytest.approx(6 * one.tokens * one.parameters, rel=0.2)
    done = subprocess.run(command(gin, "--commands"), env=ENVIRONMENT, capture_output=True, text=True)
    assert [line.split(" --cell=")[1] for line in done.stdout.splitlines()] == [
        f"'objective {level}'" for level in ("language", "spans", "lost")
    ]
    launcher = "./launch/slurm.sh --nodes=1 --gpu=h100"
    done = subprocess.run(command(gin, f"--commands={launcher}"), env=ENVIRONMENT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    names = [line.split("--name=")[1].split()[0] for line in lines]
    assert [name.rsplit("-", 1)[0] for name in names] == ["objective-language", "objective-spans", "objective-lost"]
    assert lines[0] == f"{launcher} --name={names[0]} --gin_file={gin} --cell='objective language'"
    bad = subprocess.run(command(gin, "--cell=objective x"), env=ENVIRONMENT, capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.startswith("jaxlm.study: The study has no cell 'objective x'")


def test_jobs_of_cells_whose_labels_look_alike_have_names_of_their_own(capsys):
    shifts = {level: (f"TOKENS = {2 + i}",) for i, level in enumerate(("+1", "-1", "x" * 60, "x" * 61))}
    study = StudyConfig(
        study_dir="there", settings=(), factors={"shift": shifts}, legs=(Leg(name="train"),), design=Grid()
    )
    print_commands(study, [], "./launch/gke.sh")
    names = re.findall(r"--name=(\S+)", capsys.readouterr().out)
    assert len(set(names)) == 4 and all(re.fullmatch(r"[a-z][-a-z0-9]{,39}", name) for name in names)


def test_seeds_of_a_cell_share_one_compile(workshop, tmp_path):
    gin = workshop.gin("seeds", "run.RunConfig.samples = None\n", imports=("run",))
    legs = (Leg("pretrain"), Leg("adapt", after="pretrain"))
    settings = (str(gin), "TRAIN_STEPS = 2", "EVAL_PERIOD = 2")
    config = StudyConfig(str(tmp_path / "study"), settings, {}, legs, Grid(), seeds=(0, 1))
    store, compiled = Store(tmp_path / "study"), {}
    store.open("")

    def counted(run, *, programs):
        with CompileCounter() as compiles:
            outcome = train(run, programs=programs)
        compiled[run.warm_start is not None, run.seed] = compiles.names
        return outcome

    assert work(config, store, counted, report=lambda line: None) is Outcome.FINISHED
    steps = [name for name in compiled[False, 0] if "step" in name]  # of training and of evaluation
    assert len(steps) == 2 and compiled[True, 0]
    assert not compiled[False, 1] and not compiled[True, 1]


def test_an_illegal_cell_is_named_before_anything_runs(workshop, write, tmp_path):
    gin = tmp_path / "illegal.gin"
    text = write("ARCHITECTURE_ = 1").read_text().replace(str(workshop.folder / "study"), str(tmp_path / "study"))
    gin.write_text(text)
    done = subprocess.run(command(gin, "--plan"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "objective lost, leg pretrain: " in done.stderr and "ARCHITECTURE_" in done.stderr
    assert not (tmp_path / "study").exists()
    gin.write_text(write(ROWS).read_text().replace("words.gin'", "words.gin', 'LIMITS = 3'"))
    done = subprocess.run(command(gin, "--plan"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "leg pretrain, evaluation 'zero-shot': " in done.stderr and "LIMITS" in done.stderr
