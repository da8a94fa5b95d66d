"""Every run of every shipped study resolves, and costs what its head says."""

import dataclasses
import pathlib

import pytest

from jaxlm.architecture import Architecture
from jaxlm.configuration import resolve, resolved_text
from jaxlm.layers.parameters import Scaling
from jaxlm.studies.config import StudyConfig
from jaxlm.studies.jobs import ENDLESS, expand, label_of, resolved, size_of, steps_for

STUDIES = sorted((pathlib.Path(__file__).resolve().parents[2] / "gin_configs" / "studies").glob("*.gin"))
# A ladder's tokens are one of its factors, and clm_then_mlm's legs share a number of steps.
WITH_BUDGETS = [path for path in STUDIES if path.stem not in ("ladder", "clm_then_mlm")]


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


def test_the_architecture_study_at_its_own_size():
    (file,) = (path for path in STUDIES if path.stem == "architecture_objective")
    full = "gin_configs/models/architecture_study/full.gin"
    flags = [f"--gin.SIZE='{full}'", "--gin.ROWS='BATCH_SIZE = 2048'", "--gin.HALF_ROWS='BATCH_SIZE = 1024'"]
    study = resolve(StudyConfig, [f"--gin_file={file}", *flags, "--gin.TOKENS=168.04e9"])
    sizes = {}
    for cell in study.cells:
        leg = study.legs[0]
        run = resolved((*study.settings_of(cell, leg), "RunConfig.train_steps = 1", "LEARNING_RATE = 1.0"))
        one = size_of(run)
        assert one.tokens == 2048 * 626 and round(168.04e9 / one.tokens) == 131_072
        sizes[cell["architecture"]] = one.parameters
    # Without norms and position tables 4,762,107,904 and 11,003,232,256.
    norms, tables = (24 * 2 + 1) * 4096, 24 * 32 * 64
    assert sizes["CD"] == sizes["ND"] == 4_762_107_904 + norms + tables
    assert sizes["ED"] == 11_003_232_256 + norms + (24 * 3 + 1) * 4096 + 2 * 32 * 64


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
