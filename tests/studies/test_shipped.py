"""Every run of every shipped study resolves, and costs what its head says."""

import dataclasses
import json
import logging
import pathlib
import re
import tarfile

import pytest

from jaxlm.architecture import Architecture
from jaxlm.configuration import resolve, resolved_text
from jaxlm.layers.parameters import Scaling
from jaxlm.models.config import ComputeType
from jaxlm.objectives.supervised import Eos
from jaxlm.studies.config import StudyConfig
from jaxlm.studies.jobs import ENDLESS, expand, label_of, resolved, size_of, steps_for
from jaxlm.studies.settings import resolved_evaluation
from jaxlm.train import train
from jaxlm.training.loop import Outcome

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "gin_configs" / "studies"
STUDIES = sorted(FOLDER.glob("*.gin"))
# A ladder's tokens are one of its factors, clm_then_mlm's legs share a number of steps, and the architecture study at
# the paper's size has a test of its own.
WITH_BUDGETS = [path for path in STUDIES if path.stem not in ("ladder", "clm_then_mlm", "architecture_objective_full")]


@pytest.mark.parametrize("file", WITH_BUDGETS, ids=lambda path: path.stem)
def test_budgets_match_over_all_cells(file):
    study = resolve(StudyConfig, [f"--gin_file={file}"])
    rows = {}
    for cell in study.cells:
        for leg in study.legs_of(cell):
            settings = (*study.settings_of(cell, leg), ENDLESS)
            if leg.tune is not None:
                settings = (*settings, f"{leg.tune.binding} = {leg.tune.values[0]}")
            run = resolved(settings)
            one = size_of(dataclasses.replace(run, train_steps=1, stages=()))
            rows[label_of(cell), leg.name] = steps_for(run, leg.budget) * one.tokens, run, one
    by_leg = {}
    for (_, leg), (tokens, _, one) in rows.items():
        by_leg.setdefault(leg, []).append((tokens, one.tokens))
    for leg, found in by_leg.items():
        budget = next(x for x in study.legs if x.name == leg).budget.tokens
        assert all(abs(tokens - budget) <= each / 2 for tokens, each in found), leg
    assert {each for found in by_leg.values() for _, each in found}.__len__() == 1, "a batch has as many tokens in all"


def test_the_architecture_study_is_the_papers():
    (file,) = (path for path in STUDIES if path.stem == "architecture_objective")
    study = resolve(StudyConfig, [f"--gin_file={file}"])
    pairs = [tuple(cell.values()) for cell in study.cells]
    assert pairs == [("CD", x) for x in ("FLM", "PLM", "MLM")] + [(a, x) for a in ("ND", "ED") for x in ("PLM", "MLM")]
    by_cell = {tuple(cell.values()): cell for cell in study.cells}

    def run(pair, leg):
        leg = next(x for x in study.legs if x.name == leg)
        return resolved((*study.settings_of(by_cell[pair], leg), "RunConfig.train_steps = 1"))

    full = run(("CD", "FLM"), "pretrain")
    assert full.loss.z_loss == 1e-4 and full.optimizer.algorithm.name == "adafactor"
    assert full.data.feature_lengths == {"targets": 626} and not full.data.document_mask
    masked = run(("ED", "MLM"), "pretrain")
    assert masked.data.feature_lengths == {"inputs": 512, "targets": 114}
    assert masked.objective.raw_length(masked.data.feature_lengths, masked.model.architecture) == 568
    assert run(("ED", "PLM"), "pretrain").batch_size * 2 == full.batch_size
    assert run(("CD", "FLM"), "MLM_adaptation").model.architecture is Architecture.PREFIX_DECODER
    finetuned = run(("ND", "MLM"), "finetune")
    assert finetuned.model.architecture is Architecture.PREFIX_DECODER and finetuned.objective.name == "supervised"
    block = finetuned.model.decoder.blocks[0]
    assert (block.dropout, block.attention.dropout) == (0.1, 0.1)
    assert run(("ND", "MLM"), "finetune_without_dropout").model.decoder.blocks[0].dropout == 0.0
    assert full.model.decoder.blocks[0].dropout == 0.0


class Everything:
    """Every run is finished, and no value was better than another: the first is chosen."""

    def is_finished(self, job):
        return True

    def diverged(self, job):
        return False

    def value(self, job, seed, metric):
        return 0.0


def jobs_of(name, *flags):
    """The study, and {(cell, leg, value tried or None): job} of all its runs."""
    study = resolve(StudyConfig, [f"--gin_file={FOLDER / name}.gin", *flags])
    plan = expand(study, Everything())
    jobs = {(label_of(cell), leg.name, None): job for cell, leg, job in plan.of_cells}
    tried = [(cell, leg, job) for cell, leg, trials in plan.trials for job in trials]
    return study, jobs | {(label_of(cell), leg.name, job.trial[1]): job for cell, leg, job in tried}


TWO_RATES = "--gin.RATES=(1.0, 3.0)"
PAPERS_RATE = "--gin.RATES=(1.0,)"
# macro: its value, the runs that it concerns, and the one line of their configurations that it changes.
SWITCHES = {
    "ND_POSITIONS": (
        "RELPOS_BIDIRECTIONAL = True",
        lambda run: run.model.architecture is Architecture.PREFIX_DECODER,
        ("bidirectional = False", "bidirectional = True"),
    ),
    "ED_PRECISION": (
        "ED_COMPUTE = bfloat16",
        lambda run: run.model.architecture is Architecture.ENCODER_DECODER,
        ("compute = 'float32'", "compute = 'bfloat16'"),
    ),
    "DOCUMENTS": (
        "DOCUMENT_MASK = True",
        lambda run: run.objective.name != "supervised",
        ("document_mask = False", "document_mask = True"),
    ),
}


@pytest.fixture(scope="module")
def small():
    """The architecture study's runs, each tuned leg with two rates."""
    return jobs_of("architecture_objective", TWO_RATES)[1]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_reaches_the_runs_that_it_concerns(small, name):
    """All of them, whatever the cell and the leg, and no others; and changes nothing else in them."""
    value, concerns, line = SWITCHES[name]
    _, switched = jobs_of("architecture_objective", TWO_RATES, f"--gin.{name}={value!r}")
    assert switched.keys() == small.keys()
    changed = {key for key, job in small.items() if switched[key].run != job.run}
    assert changed == {key for key, job in small.items() if concerns(job.run)} and len(changed) > 5
    for key in changed:
        pairs = zip(*(resolved_text(jobs[key].run).splitlines() for jobs in (small, switched)), strict=True)
        assert {(a.strip(), b.strip()) for a, b in pairs if a != b} == {line}, key


def test_nothing_is_tried_at_the_papers_rate(small):
    """A tuned leg with one value: the runs are those for which trials chose it."""
    _, untuned = jobs_of("architecture_objective", PAPERS_RATE)
    chosen = {key: job.address for key, job in small.items() if key[2] is None}
    assert {key: job.address for key, job in untuned.items()} == chosen


@pytest.mark.parametrize(("name", "eos"), [("architecture_objective", None), ("architecture_objective_full", Eos.NONE)])
def test_how_questions_end(name, eos):
    """As lm-evaluation-harness has them, and as the paper does; or there are none."""
    suites = resolve(StudyConfig, [f"--gin_file={FOLDER / name}.gin"]).legs[0].evaluations
    found = {suite: resolved_evaluation(settings).format.eos for suite, settings in suites.items()}
    assert found == {"T0-Eval": Eos.TARGETS, "EAI-Eval": eos}
    assert not resolve(StudyConfig, [f"--gin_file={FOLDER / name}.gin", "--gin.QUESTIONS={}"]).legs[0].evaluations


TEMPLATE = """
  {name}: !Template
    answer_choices: {choices}
    jinja: '{{{{ text }}}} {name}? ||| {{{{ label }}}}'
    metadata: !TemplateMetadata
      original_task: {original}
    name: {name}
"""


@pytest.fixture
def in_t0s_folder(tmp_path, monkeypatch):
    """A folder to work in where stand-ins of promptsource's templates lie, two for each data set of T0's."""
    sets = re.findall(r"^    '(.*)',$", (FOLDER / "parts" / "finetuning_t0.gin").read_text(), re.MULTILINE)
    for name in sets:
        path = tmp_path / "corpus" / "templates" / name / "templates.yaml"
        path.parent.mkdir(parents=True)
        first = TEMPLATE.format(name="right", choices="yes ||| no", original="true")
        path.write_text("templates:" + first + TEMPLATE.format(name="other", choices="null", original="false"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


# Of each leg at the paper's size: steps, and rows and their lengths where cells agree in them.
LM, SPANS, PAIRS = {"targets": 626}, {"inputs": 512, "targets": 114}, {"inputs": 1024, "targets": 256}
FULL_LEGS = {
    "pretrain": (131_072, None, None),
    "LM_adaptation": (98_280, 2048, LM),
    "MLM_adaptation": (39_780, 2048, SPANS),
    "pruned": (131_072, 2048, LM),
    "goes_on": (39_780, 2048, LM),
    "brief_LM_adaptation": (13_798, 2048, LM),
    "finetune": (10_000, 1024, PAIRS),
    "finetune_without_dropout": (10_000, 1024, PAIRS),
    "brief_LM_adapted_finetune": (10_000, 1024, PAIRS),
    "MLM_adapted_finetune": (10_000, 1024, PAIRS),
    "gone_on_finetune": (10_000, 1024, PAIRS),
    "gone_on_finetune_as_ND": (10_000, 1024, PAIRS),
}


def test_the_architecture_study_at_its_own_size(small, in_t0s_folder):
    """Every run's steps, rows, tokens and parameters. The file binds macros alone: all else is the small study's."""
    text = (FOLDER / "architecture_objective_full.gin").read_text()
    bound = re.findall(r"^([\w./]+) =", text, re.MULTILINE)
    assert "TOKENS" in bound and all(re.fullmatch("[A-Z_]+", name) for name in bound)
    study, jobs = jobs_of("architecture_objective_full", TWO_RATES)
    assert jobs.keys() == small.keys() and {leg for _, leg, _ in jobs} == set(FULL_LEGS)
    # Without norms and position tables 4,762,107,904 and 11,003,232,256.
    norms, tables = (24 * 2 + 1) * 4096, 24 * 32 * 64
    decoder = 4_762_107_904 + norms + tables
    both = 11_003_232_256 + norms + (24 * 3 + 1) * 4096 + 2 * 32 * 64
    for (cell, leg, tried), job in jobs.items():
        run, (steps, rows, lengths) = job.run, FULL_LEGS[leg]
        assert run.train_steps == (steps if tried is None else 1000)
        pair_of_rows = leg == "pretrain" and cell == "architecture ED, objective PLM"
        if leg == "pretrain":
            rows = 1024 if pair_of_rows else 2048
            lengths = SPANS if cell.endswith("MLM") else {"inputs": 626, "targets": 626} if pair_of_rows else LM
        assert (run.batch_size, dict(run.data.feature_lengths)) == (rows, lengths), (cell, leg)
        assert job.size.tokens == run.train_steps * (2048 * 626 if lengths is not PAIRS else 1024 * 1280)
        two_stacks = run.model.architecture is Architecture.ENCODER_DECODER
        one_table = decoder - 23 * 32 * 64 if leg == "pruned" else decoder
        assert job.size.parameters == (both if two_stacks else one_table)
        assert run.model.compute is ComputeType.BFLOAT16 and run.loop.evaluation_period == 1000
        if lengths is PAIRS:
            rates = [float(run.optimizer.learning_rate(step, steps)) for step in (0, 5000, 9999)]
            assert rates == pytest.approx([1e-3] * 3)
            assert run.model.decoder.blocks[0].dropout == (0.0 if "without" in leg else 0.1)
            assert len(run.data.mixture.tasks()) == 2 * 38 and not run.data.document_mask
    suites = {name: resolved_evaluation(settings) for name, settings in study.legs[0].evaluations.items()}
    assert len(suites["T0-Eval"].tasks) == 11 and suites["T0-Eval"].format.eos is Eos.TARGETS
    assert suites["EAI-Eval"].format.eos is Eos.NONE and suites["EAI-Eval"].limit is None


def test_t0s_mixture_reaches_finetuning_alone(small, in_t0s_folder):
    """Also by a file of one's own that takes fewer data sets."""
    include = "include 'gin_configs/studies/parts/finetuning_t0.gin'\n"
    (in_t0s_folder / "mine.gin").write_text(f"{include}T0_SETS = ('quarel',)\n")
    _, switched = jobs_of("architecture_objective", TWO_RATES, "--gin.FINETUNING='mine.gin'")
    changed = {key for key, job in small.items() if switched[key].run != job.run}
    assert changed == {key for key, job in small.items() if job.run.objective.name == "supervised"}
    for key in changed:
        run = switched[key].run
        assert [task.name for task in run.data.mixture.tasks()] == ["quarel/right", "quarel/other"]
        assert run.data.feature_lengths == small[key].run.data.feature_lengths == SPANS
        assert run.model == small[key].run.model and run.optimizer == small[key].run.optimizer


def test_t0s_mixture_trains(in_t0s_folder, caplog):
    """Two data sets stand for all: each template is a task, and pairs that evaluation data have are left out."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    rows = {
        "glue/mrpc": [{"text": f"row {i}", "label": "no"} for i in range(300)],
        "quarel": [{"text": words, "label": "yes"}, *({"text": f"line {i}", "label": "yes"} for i in range(200))],
    }
    for name, found in rows.items():
        path = in_t0s_folder / "corpus" / "t0" / name / "train.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    path = in_t0s_folder / "corpus" / "evaluation" / "copa" / "validation.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"premise": f"Well, {words}."}))
    run = resolved(
        (
            "gin_configs/studies/parts/architecture_objective.gin",
            "gin_configs/models/architecture_study/decoder.gin",
            "gin_configs/models/architecture_study/small.gin",
            "gin_configs/studies/parts/finetuning_t0.gin",
            "ARCHITECTURE = 'prefix_decoder'",
            "T0_SETS = ('glue/mrpc', 'quarel')",
            "VOCABULARY = @vocabularies.ByteVocabulary()",
            "VOCAB_SIZE = 512",
            "WIDTH = 16",
            "NUM_LAYERS = 1",
            "BATCH_SIZE = 4",
            "TASK_FEATURE_LENGTHS = {'inputs': 96, 'targets': 32}",
            "sets_in.held_out = 0.1",
            "DataConfig.virtual_shards = 1",
            "EVAL_PERIOD = 2",
            "EVAL_STEPS = 1",
            "RunConfig.train_steps = 2",
        )
    )
    with caplog.at_level(logging.WARNING, "jaxlm.data"):
        assert train(dataclasses.replace(run, model_dir=str(in_t0s_folder / "run"))) is Outcome.FINISHED
    assert caplog.text.count("Decontamination: 1 of ") == 2 and "(1 by evaluation)" in caplog.text
    names = [f"{name}/{template}" for name in rows for template in ("right", "other")]
    assert [task.name for task in run.data.mixture.tasks()] == names
    record = [json.loads(line) for line in (in_t0s_folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/cross_entropy" in line for line in record)


def test_t0s_prompts_are_the_papers(shared_data, tmp_path):
    """The templates that each suite and T0's mixture take of promptsource's are as many as the paper's."""
    with tarfile.open(shared_data / "finetune" / "promptsource_templates" / "templates.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    where = (f"TEMPLATES = '{tmp_path / 'templates'}'", "EVALUATION_DATA = 'nowhere'")
    numbers = {"copa": 12, "hellaswag": 4, "winogrande": 5, "wsc": 10}
    more = {"story_cloze": 5, "anli_r1": 15, "anli_r2": 15, "anli_r3": 15, "cb": 15, "rte": 10, "wic": 10}
    for file, expected in (("t0", numbers), ("t0_full", numbers | more)):
        tasks = resolved_evaluation((f"gin_configs/evaluation/{file}.gin", *where)).tasks
        assert {task.name: sum(len(p.templates()) for p in task.prompts) for task in tasks} == expected
    settings = (
        "gin_configs/studies/parts/architecture_objective.gin",
        "gin_configs/models/architecture_study/decoder.gin",
        "gin_configs/studies/parts/finetuning_t0.gin",
        "RunConfig.train_steps = 1",
    )
    assert len(resolved((*settings, where[0])).data.mixture.tasks()) == 313


def test_the_ladder_is_what_its_levels_say_and_under_mup():
    (file,) = (path for path in STUDIES if path.stem == "ladder")
    study = resolve(StudyConfig, [f"--gin_file={file}"])
    widths = []
    for cell in study.cells:
        run = resolved(study.settings_of(cell, study.legs[0]))
        size = size_of(run)
        assert f"{size.parameters / 1000:.0f}k" == cell["size"] and f"{size.tokens / 1000:.0f}k" == cell["tokens"]
        assert run.model.parametrization.kind is Scaling.MUP
        widths.append((run.model.width, run.model.parametrization.base_width))
    assert {base for _, base in widths} == {min(width for width, _ in widths)}
    assert len({width for width, _ in widths}) == 4 and len(study.cells) == 16


def test_a_factor_of_the_toy_study_is_narrowed_in_a_line():
    file = f"--gin_file={STUDIES[0].with_name('quickstart.gin')}"
    whole = resolve(StudyConfig, [file])
    levels = "{'full LM': ('gin_configs/objectives/full_lm.gin', %LM_ROWS)}"
    study = resolve(StudyConfig, [file, f"--gin.OBJECTIVES={levels}"])
    assert [tuple(cell.values()) for cell in study.cells] == [("causal", "full LM")] and whole.left_out == ""
    legs = [leg.name for _, leg, _ in expand(study, None).of_cells]
    assert legs == ["pretrain", "span_adaptation"]
    assert "leg 'LM_adaptation' (objective 'span corruption')" in study.left_out
    assert not any(study.has_runs_of(claim.less, claim.more) for claim in study.findings)
    causal = "'gin_configs/models/tiny/causal_decoder.gin'"
    levels = f"{{'causal': ({causal},), 'wide': ({causal}, 'WIDTH = 128')}}"
    study = resolve(StudyConfig, [file, f"--gin.ARCHITECTURES={levels}"])
    assert len(study.cells) == 6 and "match 'causal LM to prefix spans' (architecture 'prefix')" in study.left_out


class Nothing:
    """No run is finished."""

    def is_finished(self, job):
        return False

    def value(self, job, seed, metric):
        return None


def test_an_unbalanced_model_starts_from_two_legs():
    """Runs beside a leg's own parent: they come first, a run is known by theirs, and each seed has its own folder."""
    (file,) = (path for path in STUDIES if path.stem == "t5gemma")
    jobs = {}
    for rate in (1e-2, 2e-2):
        settings = f"('gin_configs/studies/parts/t5gemma.gin', 'LEARNING_RATE = {rate}')"
        study = resolve(StudyConfig, [f"--gin_file={file}", f"--gin.StudyConfig.settings={settings}"])
        plan = expand(study, Nothing())
        jobs[rate] = {cell["start"]: job for cell, leg, job in plan.of_cells if leg.name == "encoder_decoder"}
    unbalanced, copied = (jobs[1e-2][start] for start in ("unbalanced, random, alone first", "copied"))
    assert [job.leg.name for job in unbalanced.needs] == ["decoder", "larger_decoder"]
    assert [job.leg.name for job in copied.needs] == ["decoder"] and not jobs[1e-2]["scratch"].needs
    folders = {job.address: pathlib.Path("/there") / job.leg.name for job in (unbalanced, copied, *unbalanced.needs)}
    start = unbalanced.configuration(1, folders).warm_start
    assert (start.path, start.rules[0].encoder_path) == ("/there/decoder", "/there/larger_decoder")
    assert copied.configuration(1, folders).warm_start.rules[0].encoder_path is None
    assert unbalanced.address != jobs[2e-2]["unbalanced, random, alone first"].address
    stages = unbalanced.run.phases
    assert (stages[0].end, stages[-1].end) == (15, unbalanced.run.train_steps)
    assert unbalanced.run.model.width_of("encoder") > unbalanced.run.model.width


def test_clm_then_mlm_spends_the_same_on_every_cell():
    """Branches begin where their causal stage ends, and all rates agree until they do."""
    (file,) = (path for path in STUDIES if path.stem == "clm_then_mlm")
    study = resolve(StudyConfig, [f"--gin_file={file}"])
    (trunk,) = (leg for leg in study.legs if leg.name == "trunk")
    trunk_run = resolved(study.settings_of(study.cells[1], trunk))
    found, causal = {}, {}
    for cell in study.cells:
        legs = {leg.name: leg for leg in study.legs_of(cell)}
        run, step = resolved(study.settings_of(cell, legs["pretrain"])), legs["pretrain"].step
        found[cell["causal"]] = [
            (phase.end - phase.start, run.model_of(phase).architecture, phase.stage.objective.name)
            for phase in run.phases
        ]
        causal[cell["causal"]] = sum(n for n, _, objective in found[cell["causal"]] if objective == "full_lm")
        assert run.train_steps == 600 and size_of(run).tokens == 600 * 1024
        if step is None:
            assert legs["pretrain"].after is None and cell["causal"] == "0%"
            continue
        assert legs["pretrain"].after == "trunk" and step <= trunk_run.train_steps
        assert step % trunk_run.checkpoints.keep_every == 0 or step == trunk_run.train_steps
        assert step == min(causal[cell["causal"]], trunk_run.train_steps)
        rates = [
            [float(x.optimizer.learning_rate(i, x.train_steps)) for i in range(0, step, 30)] for x in (run, trunk_run)
        ]
        assert rates[0] == rates[1]
        assert resolved_text(run.model_of(run.phases[0])) == resolved_text(trunk_run.model)
        assert run.phases[0].stage.objective == trunk_run.objective and run.data == trunk_run.data
    encoder, decoder = Architecture.ENCODER, Architecture.CAUSAL_DECODER
    assert found["0%"] == [(600, encoder, "masked_lm")] and found["100%"] == [(600, decoder, "full_lm")]
    assert found["25%"] == [(150, decoder, "full_lm"), (450, encoder, "masked_lm")]
    assert causal == {"0%": 0, "25%": 150, "50%": 300, "75%": 450, "100%": 600}
    jobs = {(cell["causal"], leg.name): job for cell, leg, job in expand(study, None).of_cells}  # nothing is tuned
    assert len({job.address for (_, leg), job in jobs.items() if leg == "trunk"}) == 1
    own = {cell: job.size.steps for (cell, leg), job in jobs.items() if leg == "pretrain"}
    assert own == {"0%": 600, "25%": 450, "50%": 300, "75%": 150, "100%": 60}, "the trunk's steps are not counted again"
    masked = resolved(study.settings_of(study.cells[0], study.legs[1])).objective
    assert (masked.mask_rate, masked.mask_share) == (0.4, 1.0)


@pytest.mark.parametrize("size", ["210m", "610m"])
def test_clm_then_mlm_at_the_papers_sizes(size):
    (file,) = (path for path in STUDIES if path.stem == "clm_then_mlm")
    flags = [f"--gin.SIZE='gin_configs/models/eurobert/{size}.gin'", "--gin.VOCABULARY_SIZE='VOCAB_SIZE = 128256'"]
    study = resolve(StudyConfig, [f"--gin_file={file}", *flags])
    run = resolved(study.settings_of(study.cells[2], study.legs[1]))
    parameters = size_of(run).parameters - 128256 * run.model.width  # the output matrix is not counted in the name
    assert round(parameters / 1e6) == {"210m": 212, "610m": 608}[size]
    assert [run.model_of(phase).architecture.value for phase in run.phases] == ["causal_decoder", "encoder"]
