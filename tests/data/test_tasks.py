"""Tasks: records to ids, the registry, digests."""

import dataclasses
import functools

import numpy as np
import pytest

from jaxlm.data import tasks
from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.sources import InMemory
from jaxlm.data.tasks import Feature, Mixture, Rekey, Task, pairs_task, text_task
from jaxlm.data.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary()
SOURCE = InMemory(("a",))


def encode(task, *records):
    return [{k: v.tolist() for k, v in example.items()} for example in task.encode(list(task.texts(records)))]


def test_text_ends_with_eos_and_empty_text_is_left_out():
    task = text_task("t", SOURCE, VOCABULARY)
    assert encode(task, {"text": "ab"}, {"text": ""}, {"text": "\0"}) == [
        {"targets": [100, 101, 1]},
        {"targets": [3, 1]},
    ]


def test_pairs_are_left_to_the_objective_to_end():
    task = pairs_task("t", SOURCE, VOCABULARY, inputs_field="q", targets_field="a")
    assert encode(task, {"q": "a", "a": "b", "id": 7}, {"q": "", "a": "b"}, {"q": "", "a": ""}) == [
        {"inputs": [100], "targets": [101]},
        {"inputs": [], "targets": [101]},
    ]


def test_arrays_are_ids_as_they_are():
    task = Task("t", SOURCE, {"targets": Feature(VOCABULARY)})
    assert encode(task, {"targets": np.array([5, 0, 6])}, {"targets": [0]}, {"targets": []}) == [
        {"targets": [5, 0, 6]},
        {"targets": [0]},
    ]
    with pytest.raises(ValueError, match="ids up to 359 in 'targets', but its vocabulary has 359; was it cached"):
        encode(task, {"targets": [359]})


def test_preprocessors_rename_multiply_and_drop():
    def halves(record):
        middle = len(record["text"]) // 2
        return ({"text": part} for part in (record["text"][:middle], record["text"][middle:]))

    task = Task(
        "t",
        SOURCE,
        {"targets": Feature(VOCABULARY, add_eos=False)},
        (lambda record: record if "x" not in record["text"] else None, halves, Rekey({"targets": "text"})),
    )
    assert encode(task, {"text": "ab"}, {"text": "x"}) == [{"targets": [100]}, {"targets": [101]}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"body": "a"}, "gives no 'targets' \\(it has body\\); name the right field"),
        ({"targets": 3}, "it is int, not text"),
        ({"targets": [0.5]}, "it is list, not text"),
    ],
)
def test_a_missing_or_wrong_field_is_named(record, message):
    with pytest.raises(ValueError, match=f"A record of task 't' {message}" if "it has" in message else message):
        Task("t", SOURCE, {"targets": Feature(VOCABULARY)}).encode([record])


def test_a_field_that_is_not_required_may_be_missing():
    feature = Feature(VOCABULARY, add_eos=False)
    task = Task("t", SOURCE, {"inputs": dataclasses.replace(feature, required=False), "targets": feature})
    assert encode(task, {"targets": "a"}) == [{"inputs": [], "targets": [100]}]


def test_rekey_names_the_fields_there_are():
    with pytest.raises(ValueError, match="Rekey finds no field 'text' in a record with the fields body, id"):
        Rekey({"targets": "text"})({"body": "", "id": 1})


def test_features_are_targets_or_inputs_and_targets():
    with pytest.raises(ValueError, match="Task 't' has the features"):
        Task("t", SOURCE, {"text": Feature(VOCABULARY)})


def test_the_registry_finds_by_name_and_suggests_the_nearest(monkeypatch):
    monkeypatch.setattr(tasks, "_REGISTRY", dict(tasks.registered()))
    assert tasks.get("python_stdlib").name == "python_stdlib"
    task = tasks.register(text_task("my_corpus", SOURCE, VOCABULARY))
    assert tasks.resolve("my_corpus") is task is tasks.resolve(task)
    assert tasks.register(text_task("my_corpus", SOURCE, VOCABULARY)) == task
    with pytest.raises(ValueError, match="another task or mixture named 'my_corpus'"):
        tasks.register(text_task("my_corpus", InMemory(("b",)), VOCABULARY))
    with pytest.raises(ValueError, match="no task or mixture named 'my_corpse'; nearest are my_corpus"):
        tasks.get("my_corpse")
    mixture = Mixture("both", (("my_corpus", 1.0), ("python_stdlib", 1.0)))
    assert [t.name for t in mixture.tasks()] == ["my_corpus", "python_stdlib"]


def test_fingerprints_are_stable_and_tell_things_apart():
    task = text_task("t", SOURCE, VOCABULARY)
    others = [
        text_task("u", SOURCE, VOCABULARY),
        text_task("t", InMemory(("b",)), VOCABULARY),
        text_task("t", SOURCE, ByteVocabulary(extra_ids=1)),
        text_task("t", SOURCE, VOCABULARY, text_field="body"),
    ]
    assert fingerprint(task) == fingerprint(text_task("t", InMemory(("a",)), ByteVocabulary()))
    assert len({fingerprint(t) for t in [task, *others]}) == 5
    values = [1, 1.0, True, "1", b"1", None, (1,), ((1,),), {"a": 1}, {"a": 2}, np.ones(2), np.ones(2, np.int32)]
    values += [functools.partial(max, 1), functools.partial(max, 2), len, Mixture]
    assert len({fingerprint(v) for v in values}) == len(values)
    methods = [str.lower, str.upper, np.add, np.exp, VOCABULARY.encode, ByteVocabulary(extra_ids=1).encode]
    assert len({fingerprint(v) for v in methods}) == len(methods)
    assert fingerprint(ByteVocabulary().encode) == fingerprint(ByteVocabulary().encode)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="no stable description"):
        fingerprint(object())


def test_editing_a_preprocessor_changes_its_fingerprint():
    # The same name, other bodies.
    def make(number):
        namespace = {}
        exec(f"def preprocess(record):\n    return {number}", namespace)
        return namespace["preprocess"]

    assert fingerprint(make(1)) == fingerprint(make(1)) != fingerprint(make(2))


def test_functions_are_known_by_what_they_close_over_and_their_defaults():
    def keep(length, suffix="", *, words=frozenset({"a", "b"})):
        def inner(record, other=length, *, more=suffix):
            return length, words, other, more

        return inner

    prints = [fingerprint(keep(*given)) for given in ((1,), (4,), (1, "x"), (4, "x"))]
    assert len(set(prints)) == 4 and prints[0] == fingerprint(keep(1))
    assert fingerprint(keep(1, words={"b", "a"})) != fingerprint(keep(1, words={"b"}))
    assert fingerprint(functools.wraps(keep)(keep(1))) != fingerprint(functools.wraps(keep)(keep(4)))

    def module(name):
        return lambda record: name.join(record)

    assert fingerprint(module(np)) != fingerprint(module(dataclasses))
    with pytest.raises(TypeError, match="no stable description"):
        fingerprint(keep(object()))


def test_functions_that_call_themselves_have_a_fingerprint():
    def make(base):
        def count(n):
            return base if n == 0 else count(n - 1)

        return count

    assert fingerprint(make(1)) == fingerprint(make(1)) != fingerprint(make(2))
