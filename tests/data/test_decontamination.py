"""Decontamination: exactly the records that share an N-gram go, and the account says why."""

import logging
import pickle

import pytest

from jaxlm.data.decontamination import Decontaminate, ngrams
from jaxlm.data.sources import InMemory
from jaxlm.data.tasks import Feature, Task
from jaxlm.data.vocabularies import ByteVocabulary

WORDS = "the quick brown fox jumps over the lazy dog and runs far away home".split()
EVALUATION = InMemory(({"query": "unrelated", "choices": ["x y", " ".join(WORDS)]},))


def test_words_are_compared_without_case_and_punctuation():
    assert list(ngrams("A b, C!", 2)) == [("a", "b"), ("b", "c")]
    assert list(ngrams("a b", 3)) == []


def test_records_that_share_thirteen_words_are_left_out(caplog):
    step = Decontaminate({"questions": EVALUATION}, split="train")
    shared, too_short = ", ".join(WORDS[:13]).upper(), " ".join(WORDS[:12])
    records = [{"text": f"Before. {shared} After."}, {"text": too_short}, {"inputs": "fine", "targets": "too"}]
    with caplog.at_level(logging.WARNING, "jaxlm.data"):
        assert list(step.stream(records)) == records[1:]
    assert "the quick brown" in caplog.text and "left out 1 of 3 records: 1 by questions" in caplog.text
    assert list(Decontaminate({"q": EVALUATION}, split="train", n=12).stream(records)) == records[2:]


def test_it_is_a_preprocessor_of_a_task():
    vocabulary = ByteVocabulary()
    steps = (pickle.loads(pickle.dumps(Decontaminate({"questions": EVALUATION}, split="train"))),)
    task = Task("t", EVALUATION, {"targets": Feature(vocabulary)}, steps)
    assert list(task.texts([{"targets": " ".join(WORDS)}, {"targets": "kept"}])) == [{"targets": "kept"}]


def test_nothing_to_compare_with_is_an_error():
    with pytest.raises(ValueError, match="sources to compare with"):
        Decontaminate({})
