"""Jobs before anything runs: what waits for trials, and what is refused."""

import dataclasses

import pytest

from jaxlm import study as command
from jaxlm.studies.config import Budget, Grid, Leg, Start, StudyConfig, Tune
from jaxlm.studies.jobs import expand
from jaxlm.studies.store import Store
from jaxlm.studies.worker import unfinished

SETTINGS = ("gin_configs/runs/quickstart.gin", "TRAIN_STEPS = 4", "BATCH_SIZE = 2")
TUNED = Leg("pretrain", tune=Tune("BATCH_SIZE", (4, 8, 16)))


def make_study(folder, *legs, factors=None, seeds=(0, 1)):
    return StudyConfig(str(folder), SETTINGS, factors or {}, legs, Grid(), seeds=seeds)


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
