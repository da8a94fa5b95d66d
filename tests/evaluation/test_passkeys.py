"""Passkeys: a row hides its key once, where and as deep as it says; who copies it scores 1, who does not 0."""

import dataclasses
import re

import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.configuration import resolve
from jaxlm.data.passkeys import FILLER, HIDDEN, Passkeys
from jaxlm.data.vocabularies import ByteVocabulary, PythonVocabulary
from jaxlm.evaluation.suite import EvaluationConfig, SuiteResult
from jaxlm.evaluation.tasks import TaskError, evaluate_task
from jaxlm.evaluation.text_model import TextModel
from tests.evaluation.models import as_pretrained, make_model

SOURCE = Passkeys((80, 200), (0.0, 0.5, 1.0), count=4)


def rows(source, split="validation"):
    return [row for shard in source.shards(split) for row in source.read(shard)]


@pytest.mark.parametrize("vocabulary", [None, ByteVocabulary(), PythonVocabulary()], ids=["words", "bytes", "pieces"])
def test_a_row_is_as_long_and_its_key_as_deep_as_it_says(vocabulary):
    """As long: one more sentence of filler would be too many."""
    lengths = (80, 200) if vocabulary is None else (600, 1500)
    source = dataclasses.replace(SOURCE, lengths=lengths, count=2, vocabulary=vocabulary)
    found = rows(source)
    assert [(row["length"], row["depth"]) for row in found] == [
        (length, depth) for length in lengths for depth in (0.0, 0.5, 1.0)
    ] * 2

    def size(text):
        return len(text.split()) if vocabulary is None else len(vocabulary.encode(text))

    for row in found:
        context, key = row["context"], row["answer"]
        hidden = HIDDEN.format(key=key)
        assert context.count(hidden) == 1 and context.count(key) == 2 and re.fullmatch("[1-9][0-9]{4}", key)
        before, after = (sum(part.count(sentence) for sentence in FILLER) for part in context.split(hidden))
        assert before == round(row["depth"] * (before + after)) and before + after > 5
        more = FILLER[(before + after) % len(FILLER)]
        assert size(f"{context} {key}") <= row["length"] < size(f"{context} {key} {more}")
        assert context.startswith("There is an important info") and context.endswith("The pass key is")


def test_rows_follow_from_the_settings_alone():
    found = rows(SOURCE)
    assert rows(dataclasses.replace(SOURCE)) == found and len({row["answer"] for row in found}) > 20
    assert rows(dataclasses.replace(SOURCE, count=2)) == found[:12]
    for other in (rows(dataclasses.replace(SOURCE, seed=1)), rows(SOURCE, "train")):
        assert [row["answer"] for row in other] != [row["answer"] for row in found]
    (one,), (other,) = (source.shards("validation") for source in (SOURCE, dataclasses.replace(SOURCE, seed=1)))
    assert one.digest != other.digest


@dataclasses.dataclass
class Score:
    """What a measure asks of a score."""

    is_greedy: bool
    total: float = -1.0
    dropped: int = 0
    log_probabilities: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))


class Reader:
    """A stand-in for a model that has the last so many words of a context before it, and copies the key from there."""

    def __init__(self, words):
        self.words = words

    def score(self, pairs):
        seen = [" ".join(context.split()[-self.words :]) for context, _ in pairs]
        found = [re.search("pass key is ([0-9]+)[.] Remember", text) for text in seen]
        return [Score(bool(key) and key[1] == answer) for key, (_, answer) in zip(found, pairs, strict=True)]


def suite(*bindings):
    flags = [f"--gin.{name}" for name in ("LENGTHS=(80, 200)", "DEPTHS=(0.0, 0.5, 1.0)", "COUNT=4", *bindings)]
    return resolve(EvaluationConfig, ["--gin_file=gin_configs/evaluation/passkey.gin", *flags])


def test_who_copies_scores_one_and_who_forgets_nothing():
    (task,) = suite().tasks

    def accuracies(words):
        result, records = evaluate_task(task, Reader(words), samples=20)
        assert result.rows == 24 and [record["group"] for record in records][:2] == [(80, 0.0), (80, 0.5)]
        return result

    assert task.source == SOURCE
    everything = accuracies(10**6)
    assert everything.metrics["accuracy"].value == 1.0
    assert accuracies(15).metrics["accuracy"].value == 0.0  # the question, and filler
    some = accuracies(90)  # all of the short texts, and the last part of the long ones
    assert some.grid == {"80": {"0.0": 1.0, "0.5": 1.0, "1.0": 1.0}, "200": {"0.0": 0.0, "0.5": 0.0, "1.0": 1.0}}
    assert some.groups["200, 1.0"]["accuracy"].value == 1.0 and some.metrics["accuracy"].value == pytest.approx(4 / 6)
    (table,) = SuiteResult("a model", (some,), {}).grids()
    assert table.title == "passkey: accuracy" and [str(column.header) for column in table.columns][1:] == [
        "0.0",
        "0.5",
        "1.0",
    ]


def test_a_text_without_room_is_an_error_and_a_longer_context_makes_room():
    """A model of 64 positions: what it would lose is the key, so that nothing is cut."""
    vocabulary = ByteVocabulary(extra_ids=0)
    model = as_pretrained(make_model(Architecture.CAUSAL_DECODER, vocab_size=vocabulary.size), vocabulary)
    shipped = suite("LENGTHS=(512,)", "COUNT=1", "COUNTED_BY=@vocabularies.ByteVocabulary()")
    (short,) = shipped.tasks
    scoring = dataclasses.replace(shipped.scoring, row_length=512, batch_tokens=512)
    with pytest.raises(TaskError, match="The context of request 0 has .* tokens, but there is room for"):
        evaluate_task(short, TextModel(model, scoring=scoring), samples=0)
    result, _ = evaluate_task(short, TextModel(model, scoring=scoring, context_length=512), samples=0)
    assert result.truncated == 0 and result.questions == 3


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="Passkeys.lengths has 20, but a row without filler has [0-9]+ words; make it"):
        rows(Passkeys((20,)))
    with pytest.raises(ValueError, match="Passkeys.depths are shares of the filler, from 0 to 1"):
        Passkeys((200,), (0, 50, 100))
    with pytest.raises(ValueError, match="Passkeys.filler must have no digits"):
        Passkeys((200,), filler=("There were 12345 of them.",))
    with pytest.raises(ValueError, match="Passkeys needs lengths, depths and filler"):
        Passkeys(())
    with pytest.raises(ValueError, match="Passkeys has no split 'test'"):
        Passkeys((200,)).shards("test")
