"""Prompted multitask data: pairs by template, rows that fail, T0's rates."""

import dataclasses
import logging

import numpy as np
import pytest

from jaxlm.data.decontamination import Decontaminate, Windows
from jaxlm.data.prompted import Prompted, PromptedSet, TemplateRate, prompted_mixture
from jaxlm.data.prompts import Prompt, Prompts, PromptsourceTemplates
from jaxlm.data.sources import InMemory, TextFiles
from jaxlm.data.vocabularies import ByteVocabulary

ROWS = [{"text": f"row {i}", "label": i % 2 if i % 5 else -1} for i in range(10)]
SENTIMENT = Prompt(name="plain", context="{{ text }}?", choices='["no", "yes"]', gold="label")


class Two(Prompts):
    """Two ways to ask."""

    def templates(self):
        other = Prompt(name="shouted", context="{{ text | upper }}", choices='["NO", "YES"]', gold="label")
        return SENTIMENT, other


def test_rows_become_questions_and_their_right_answers():
    found = list(Prompted(SENTIMENT, "plain").stream(ROWS))
    assert found[0] == {"inputs": "row 1?", "targets": "yes"} and found[1] == {"inputs": "row 2?", "targets": "no"}
    assert len(found) == 8, "rows without a known answer are left out"


def test_a_few_rows_that_fail_are_said_and_left_out_and_many_are_an_error(caplog):
    many = [{"text": "a", "label": 1}] * 300
    broken = [*many, {"label": 1}]
    with caplog.at_level(logging.WARNING, "jaxlm.data"):
        assert len(list(Prompted(SENTIMENT, "plain").stream(broken))) == 300
    assert "row 300" in caplog.text and "1 of 301 rows" in caplog.text
    with pytest.raises(ValueError, match=r"fails on 10 of 20 rows of a shard \(row 10: .*text"):
        list(Prompted(SENTIMENT, "plain").stream([*many[:10], *[{"label": 1}] * 10]))
    with pytest.raises(ValueError, match=r"no template 'other'; there are \['plain'\]"):
        list(Prompted(SENTIMENT, "other").stream(ROWS))


def test_rows_of_which_none_has_an_answer_are_an_error(caplog):
    hidden = [{"text": "a", "label": -1}] * 20
    with pytest.raises(
        ValueError, match="'plain' gives no right answer for any of 20 rows of a shard; train on a split"
    ):
        list(Prompted(SENTIMENT, "plain").stream(hidden))
    with caplog.at_level(logging.WARNING, "jaxlm.data"):
        assert len(list(Prompted(SENTIMENT, "plain").stream([*hidden, {"text": "b", "label": 0}]))) == 1
    assert "left out 20 of 21 rows without a right answer" in caplog.text


def test_rows_that_fail_are_called_by_their_own_ids(caplog):
    rows = [{"text": "a", "label": 1, "id": f"x{i}"} for i in range(200)]
    del rows[120]["text"]
    with caplog.at_level(logging.WARNING, "jaxlm.data"):
        assert len(list(Prompted(SENTIMENT, "plain").stream(rows))) == 199
    assert "row 120 (id 'x120')" in caplog.text


def test_a_failing_template_stops_training_before_it_starts(tmp_path, monkeypatch):
    """What a user sees: the sentence of the template, and no cache that lacks half of the rows."""
    from jaxlm.architecture import Architecture
    from jaxlm.data.config import DataConfig, Packing
    from jaxlm.data.loader import build_loader
    from jaxlm.objectives.supervised import Supervised

    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path))

    def load(rows):
        sets = (PromptedSet("small", InMemory(tuple(rows)), SENTIMENT),)
        data = DataConfig(prompted_mixture("m", sets, ByteVocabulary()), {"inputs": 24, "targets": 8}, Packing.PLAN)
        return build_loader(data, objective=Supervised(), architecture=Architecture.PREFIX_DECODER, batch_size=2)

    good = [{"text": f"row {i}", "label": i % 2} for i in range(150)]
    with pytest.raises(ValueError, match=r"The template 'plain' fails on 2 of 150 rows of a shard \(row 3: .*text"):
        load([{"label": 1} if i in (3, 4) else row for i, row in enumerate(good)])
    loader = load([{"label": 1} if i == 3 else row for i, row in enumerate(good)])
    batch = next(loader)
    loader.close()
    targets = batch["decoder_target_tokens"][batch["decoder_loss_weights"] > 0].tolist()
    text = loader.vocabulary.decode(targets)
    assert not text.replace("yes", "").replace("no", "")
    assert targets.count(1) == batch["decoder_segment_ids"].max(axis=1).sum()  # an end for each answer


def test_decontamination_is_a_step_behind_the_templates():
    """An answer and its question are judged as they are trained on."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    evaluation = InMemory((f"something else, {words}?",))
    sets = (PromptedSet("s", InMemory(({"text": words, "label": 1}, {"text": "other", "label": 0})), SENTIMENT),)
    step = Decontaminate({"evaluation": evaluation}, split="train")
    (task,) = prompted_mixture("m", sets, ByteVocabulary(), decontaminate=step).tasks()
    assert list(task.texts(sets[0].source.train)) == [{"inputs": "other?", "targets": "no"}]
    windows = dataclasses.replace(step, windows=Windows())
    with pytest.raises(ValueError, match="a pair that is hit goes as a whole"):
        prompted_mixture("m", sets, ByteVocabulary(), decontaminate=windows)


def test_a_mixture_has_a_task_for_each_template_at_t0s_rates():
    vocabulary = ByteVocabulary()
    sets = (
        PromptedSet("small", InMemory(tuple(ROWS)), Two()),
        PromptedSet("large", InMemory(tuple(ROWS)), SENTIMENT),
    )
    mixture = prompted_mixture("multitask", sets, vocabulary, cap=100)
    names = [task.name for task in mixture.tasks()]
    assert names == ["small/plain", "small/shouted", "large/plain"]
    # Below the cap a template has all its data set's examples; above it, the cap divided by the templates.
    shares = mixture.shares(0, {"small/plain": 30, "small/shouted": 130, "large/plain": 300})
    assert shares == pytest.approx({name: x / 180 for name, x in zip(names, (30, 50, 100))})
    assert TemplateRate(13)(600_000) == 500_000 // 13
    task = mixture.tasks()[1]
    (example, *_) = task.encode(list(task.texts(ROWS)))
    assert vocabulary.decode(example["inputs"]) == "ROW 1" and vocabulary.decode(example["targets"]) == "YES"
    assert all(example[name].dtype == np.int32 for name in example)


def test_promptsource_templates_on_real_rows(shared_data, tmp_path):
    import tarfile

    with tarfile.open(shared_data / "finetune" / "promptsource_templates" / "templates.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = next(path.parent.parent for path in tmp_path.rglob("rotten_tomatoes/templates.yaml"))
    source = TextFiles(str(shared_data / "finetune" / "rotten_tomatoes" / "train.jsonl.gz"), held_out=0.0)
    sets = PromptedSet("rotten_tomatoes", source, PromptsourceTemplates(str(folder), "rotten_tomatoes"))
    tasks = sets.tasks(ByteVocabulary())
    assert len(tasks) >= 8
    shard = source.shards("train")[0]
    for task in tasks[:2]:
        pairs = list(task.texts(source.read(shard)))
        assert len(pairs) > 1000 and len({pair["targets"] for pair in pairs}) == 2
