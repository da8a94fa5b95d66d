"""Jobs before anything runs: budgets, what waits for trials, and what is refused."""

import dataclasses

import pytest

from jaxlm import study as command
from jaxlm.exit_status import ExitStatus
from jaxlm.studies.config import Budget, Grid, Leg, Start, StudyConfig, Tune
from jaxlm.studies.jobs import expand
from jaxlm.studies.store import Store
from jaxlm.studies.worker import unfinished

SETTINGS = ("gin_configs/runs/quickstart.gin", "TRAIN_STEPS = 4", "BATCH_SIZE = 2")
TUNED = Leg("pretrain", tune=Tune("BATCH_SIZE", (4, 8, 16)))


def make_study(folder, *legs, factors=None, seeds=(0, 1)):
    return StudyConfig(str(folder), SETTINGS, factors or {}, legs, Grid(), seeds=seeds)


def test_a_budget_is_reached_to_half_a_step(tmp_path):
    def sized(budget, settings=()):
        longer = Leg("longer", settings, after="pretrain", start=Start.STATE, budget=budget)
        study = make_study(tmp_path, Leg("pretrain", settings, budget=budget), longer)
        study = dataclasses.replace(study, settings=(SETTINGS[0], "BATCH_SIZE = 2"))
        return [job for _, _, job in expand(study, Store(tmp_path)).of_cells]

    one, _ = sized(Budget(steps=1))
    first, longer = sized(Budget(steps=7))
    assert (first.run.train_steps, longer.run.train_steps) == (7, 14)
    assert longer.size == first.size and first.size.flops == 7 * one.size.flops
    for spends in ("flops", "tokens"):
        a_step = getattr(one.size, spends)
        assert [sized(Budget(**{spends: x * a_step}))[0].run.train_steps for x in (0.1, 6.6, 7.4)] == [1, 7, 7]
    spent = 40 * one.size.flops
    wide, _ = sized(Budget(flops=spent), ("WIDTH = 192",))
    assert wide.size.steps < 40 and abs(wide.size.flops - spent) <= wide.size.flops / wide.size.steps / 2


def test_what_waits_for_trials_is_counted_and_never_a_job(tmp_path):
    tuned_too = Leg("adapt", after="pretrain", tune=Tune("LEARNING_RATE", (1e-3, 1e-2)))
    study, store = make_study(tmp_path, TUNED, tuned_too, Leg("last", after="adapt")), Store(tmp_path)
    plan = expand(study, store)
    assert [job for _, _, job in plan.of_cells] == [None, None, None] and not plan.refused
    (trials,) = (jobs for _, _, jobs in plan.trials)
    assert list(plan.jobs.values()) == list(trials) == unfinished(plan, store)
    waiting = [(leg.name, [job.trial and job.trial[1] for job in jobs]) for _, leg, jobs in plan.waiting]
    assert waiting == [("pretrain", [None]), ("adapt", [1e-3, 1e-2]), ("adapt", [None]), ("last", [None])]
    (run,) = plan.waiting[0][2]  # the first seed's is the first trial
    assert run.address == trials[0].address and run.seeds == (0, 1) and run.size == trials[0].size


def test_what_was_expanded_once_is_not_computed_again(tmp_path, monkeypatch):
    """Workers and the live table expand again and again."""
    study = make_study(tmp_path, dataclasses.replace(TUNED, budget=Budget(tokens=1e4)))
    study = dataclasses.replace(study, settings=SETTINGS[:1])
    first = expand(study, Store(tmp_path))
    for name in ("size_of", "digest", "flops_per_token"):
        monkeypatch.setattr(f"jaxlm.studies.jobs.{name}", lambda *_, name=name: pytest.fail(f"{name} was called"))
    assert expand(study, Store(tmp_path)).jobs.keys() == first.jobs.keys()


def test_a_mistake_in_what_waits_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_start_worker", lambda *_: pytest.fail("a worker was started"))
    for leg, message in (
        (Leg("after", ("NO_SUCH = 1",), after="pretrain"), "the only cell, leg after: .*NO_SUCH"),
        (Leg("after", after="pretrain", tune=Tune("NO_SUCH", (1, 2))), "the only cell, leg after: .*NO_SUCH"),
        (Leg("after", after="pretrain", start=Start.STATE), "leg after: it goes on from step 4 but ends at 4"),
    ):
        study, store = make_study(tmp_path, TUNED, leg), Store(tmp_path)
        store.open("")
        with pytest.raises(ValueError, match=message):
            command.supervise(study, store, [], workers=1)


def test_an_illegal_pair_is_refused_with_its_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_start_worker", lambda *_: pytest.fail("a worker was started"))
    gin = tmp_path / "study.gin"
    gin.write_text(
        "from __gin__ import dynamic_registration\nfrom jaxlm.studies import config\n"
        "config.StudyConfig:\n"
        f"    study_dir = '{tmp_path / 'study'}'\n"
        f"    settings = {SETTINGS}\n"
        "    factors = {'architecture': {\n"
        "        'causal': (), 'encoder-decoder': ('gin_configs/models/tiny/encoder_decoder.gin',)\n"
        "    }}\n"
        "    design = @config.Grid()\n    legs = (@config.Leg(),)\n"
        "config.Leg.name = 'pretrain'\n"
    )
    assert command.main([f"--gin_file={gin}"]) == ExitStatus.FAILED
    said = capsys.readouterr().err
    assert said.startswith("jaxlm.study: architecture encoder-decoder, leg pretrain: ") and said.count("\n") == 1
    assert "full_lm leaves the encoder of an encoder_decoder without inputs" in said
    assert not (tmp_path / "study" / "runs").exists()
