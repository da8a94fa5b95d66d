"""Prompted multitask data: pairs by template, rows that fail, T0's rates."""

import logging

import numpy as np
import pytest

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
