"""Decontamination: exactly the records that share an N-gram go, or the text around it, and the account says why."""

import json
import logging
import pickle
import re

import pytest

from jaxlm.data.decontamination import Decontaminate, Grams, Windows
from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.sources import InMemory, TextFiles
from jaxlm.data.tasks import Feature, Task, text_task
from jaxlm.data.vocabularies import ByteVocabulary

WORDS = "the quick brown fox jumps over the lazy dog and runs far away home".split()
EVALUATION = InMemory(({"query": "unrelated", "choices": ["x y", " ".join(WORDS)]},))
SHARED = ", ".join(WORDS[:13]).upper()


def words(text, n):
    grams = Grams.of(text, n)
    return [grams.words(i) for i in range(len(grams.keys))]


def test_words_are_compared_without_case_and_punctuation():
    assert words("A b, C!", 2) == ["a b", "b c"]
    assert Grams.of("A b, C!", 2).place(1) == (2, 6)
    assert words("a b", 3) == []
    assert Grams.of("It's ÉTÉ", 3).keys == Grams.of("it s été", 3).keys


def test_keys_are_those_of_the_words_in_their_order():
    """Law: two N-grams have the same key where, and only where, they have the same words."""
    texts = [" ".join("abcd"[i // 4**k % 4] for k in range(4)) for i in range(256)]
    assert len({int(Grams.of(text, 4).keys[0]) for text in texts}) == 256
    long = " ".join(texts)
    grams = Grams.of(long, 4)
    assert [int(key) for key in grams.keys] == [int(Grams.of(w, 4).keys[0]) for w in words(long, 4)]


def test_records_that_share_thirteen_words_are_left_out(caplog):
    step = Decontaminate({"questions": EVALUATION}, split="train")
    records = [
        {"text": f"Before. {SHARED} After."},
        {"text": " ".join(WORDS[:12])},
        {"inputs": "fine", "targets": "too"},
    ]
    with caplog.at_level(logging.WARNING, "jaxlm.data"):
        assert list(step.stream(records)) == records[1:]
    assert "Record 0 shares 'the quick brown" in caplog.text
    assert "1 of 3 records share an N-gram with evaluation data (1 by questions); 1 left out whole" in caplog.text
    assert list(Decontaminate({"q": EVALUATION}, split="train", n=12).stream(records)) == records[2:]


def test_all_evaluation_data_that_have_it_are_named():
    other = InMemory((" ".join(WORDS), "one two three " * 5))
    step = Decontaminate({"questions": EVALUATION, "other": other, "none": InMemory(("x",))}, split="train")
    ((_, kept, overlap),) = step.examine([{"a": SHARED, "b": ["one two three " * 5]}])
    assert kept == [] and overlap.shared == {"questions": 1, "other": 4}
    assert len(overlap.ngrams) == 1 + 3, "the fifteen words repeat themselves after three"
    assert step.rows_of([overlap]) == {"questions": 1, "other": 2}
    ((_, _, overlap),) = step.examine([{"a": SHARED}])
    assert step.rows_of([overlap]) == {"questions": 1, "other": 1}


def test_windows_take_the_text_around_a_hit_out():
    """As GPT-3 did: so many characters either side, what is left in pieces, short ones gone."""
    step = Decontaminate({"q": EVALUATION}, split="train", windows=Windows(around=20, shortest=30))
    before, middle, after = "b" * 99 + ".", ", " + "m" * 96 + ", ", ", " + "a" * 98
    record = {"title": "T", "text": f"{before}{SHARED}{middle}{SHARED}{after}"}
    ((_, kept, overlap),) = step.examine([record])
    assert [piece["text"] for piece in kept] == [before[:-20], middle[20:-20], after[20:]]
    assert {piece["title"] for piece in kept} == {"T"} and overlap.pieces == 3
    assert overlap.kept == 80 + 60 + 80 and overlap.characters == len(record["text"]) + len("T")
    short = Decontaminate({"q": EVALUATION}, split="train", windows=Windows(around=20, shortest=70))
    ((_, kept, _),) = short.examine([record])
    assert [piece["text"] for piece in kept] == [before[:-20], after[20:]]
    # The fourteen words are two hits beside each other, and one hole.
    ((_, kept, _),) = step.examine([{"text": f"{before}{' '.join(WORDS)}{after}"}])
    assert [len(piece["text"]) for piece in kept] == [80, 80]
    few = Decontaminate({"q": EVALUATION}, split="train", windows=Windows(around=20, shortest=30, most_pieces=2))
    assert [kept for _, kept, _ in few.examine([record])] == [[]]


def test_nothing_that_is_left_shares_anything():
    """Also where holes end in the middle of words, and where hits lie at either end."""
    step = Decontaminate({"q": EVALUATION}, split="train", windows=Windows(around=7, shortest=0, most_pieces=99))
    text = " ".join([SHARED, "filler words here", " ".join(WORDS), "x" * 50, SHARED])
    kept = list(step.stream([{"text": text}]))
    assert kept and list(step.stream(kept)) == kept


def test_windows_want_a_text():
    step = Decontaminate({"q": EVALUATION}, split="train", windows=Windows())
    with pytest.raises(ValueError, match=re.escape("Windows.field is 'text', but a record has the texts ['targets']")):
        list(step.stream([{"targets": SHARED}]))
    with pytest.raises(ValueError, match="Windows needs around"):
        Windows(around=-1)


def test_it_is_a_preprocessor_of_a_task():
    vocabulary = ByteVocabulary()
    step = pickle.loads(pickle.dumps(Decontaminate({"questions": EVALUATION}, split="train")))
    task = Task("t", EVALUATION, {"targets": Feature(vocabulary)}, (step,))
    assert list(task.texts([{"targets": " ".join(WORDS)}, {"targets": "kept"}])) == [{"targets": "kept"}]
    task = text_task("t", EVALUATION, vocabulary, preprocessors=(step,))
    assert list(task.texts([{"text": " ".join(WORDS)}, {"text": "kept"}])) == [{"targets": "kept"}]


def test_other_evaluation_data_make_other_caches(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "one"}) + "\n")
    step = Decontaminate({"rows": TextFiles(str(path), validation=str(path))})
    before = fingerprint(step)
    assert fingerprint(step) == before != fingerprint(Decontaminate(step.against, n=8))
    path.write_text(json.dumps({"q": "another"}) + "\n")
    assert fingerprint(step) != before


def test_nothing_to_compare_with_is_an_error():
    with pytest.raises(ValueError, match="sources to compare with"):
        Decontaminate({})
