"""The token cache: built once, found again, resumed after an interruption, rebuilt when anything changes."""

import concurrent.futures
import dataclasses
import json
import os
import threading
import time

import numpy as np
import pytest

from jaxlm.data import cache as caches
from jaxlm.data.cache import cache_directory, open_cache
from jaxlm.data.sources import InMemory, LibraryText, StandardLibrary, TextFiles
from jaxlm.data.tasks import text_task
from jaxlm.data.vocabularies import ByteVocabulary


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"document number {i}")
    return folder


def documents(cache):
    ids, offsets = cache.ids("targets"), cache.offsets("targets")
    return [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])]


def test_a_cache_holds_the_ids_of_all_documents(files, tmp_path):
    task = text_task("corpus", TextFiles(str(files), held_out=0.0), ByteVocabulary())
    cache = open_cache(task, "train", str(tmp_path / "cache"))
    expected = [[*(b + 3 for b in f"document number {i}".encode()), 1] for i in range(6)]
    assert documents(cache) == expected
    assert cache.num_examples == 6 and cache.num_tokens == {"targets": sum(map(len, expected))}
    assert cache.ids("targets").dtype == np.uint16
    assert cache.lengths("targets").tolist() == [len(document) for document in expected]
    assert not [name for name in os.listdir(cache.folder) if name.startswith("part-")]


def test_a_cache_is_found_again_and_made_anew_when_anything_changes(files, tmp_path, monkeypatch):
    source = TextFiles(str(files), held_out=0.0)
    task = text_task("corpus", source, ByteVocabulary())
    first = open_cache(task, "train", str(tmp_path / "cache"))
    monkeypatch.setattr(caches, "_build", None)  # must not be called
    assert open_cache(task, "train", str(tmp_path / "cache")).folder == first.folder
    monkeypatch.undo()
    (files / "3.txt").write_text("another document")
    keys = {first.key}
    for other in (
        task,
        text_task("corpus", source, ByteVocabulary(extra_ids=5)),
        dataclasses.replace(task, preprocessors=(*task.preprocessors, dict)),
        text_task("other", source, ByteVocabulary()),
    ):
        keys.add(open_cache(other, "train", str(tmp_path / "cache")).key)
    assert len(keys) == 5


def longer(length):
    """A preprocessor that keeps longer records."""

    def keep(record):
        return record if len(record["text"]) > length else None

    return keep


def test_every_setting_that_decides_what_is_read_makes_another_cache(tmp_path, monkeypatch):
    """Also those that no file's name, range or size shows: rows are held out and documents cut while they are read."""
    (tmp_path / "a.txt").write_text("a line\n" * 40)
    lines = [json.dumps({"text": f"line {i} " + "x" * (i % 7)}) for i in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "validation"}))
    plain, rows = TextFiles(str(tmp_path / "a.txt"), held_out=0.0), TextFiles(str(tmp_path / "b.jsonl"), held_out=0.1)

    def opened(source, *preprocessors):
        task = text_task("corpus", source, ByteVocabulary(), preprocessors=preprocessors)
        return open_cache(task, "train", str(tmp_path / "cache"))

    def assert_other_caches(*caches):
        assert len({cache.key for cache in caches}) == len(caches)

    assert_other_caches(opened(plain), opened(dataclasses.replace(plain, document_bytes=70)))
    assert_other_caches(
        *(opened(rows, *steps) for steps in ((), (longer(9),), (longer(12),))),
        opened(dataclasses.replace(rows, held_out=0.3)),
        opened(dataclasses.replace(rows, validation=str(tmp_path / "c.jsonl"))),
    )
    assert opened(rows, longer(9)).num_examples > opened(rows, longer(12)).num_examples > 0
    shards = StandardLibrary.shards
    monkeypatch.setattr(  # two modules are enough
        StandardLibrary,
        "shards",
        lambda self, split: tuple(
            dataclasses.replace(shard, parts=shard.parts[:2]) for shard in shards(self, split)[:1]
        ),
    )
    assert_other_caches(*(opened(StandardLibrary(text)) for text in LibraryText))


def test_rows_that_are_held_out_again_are_not_trained_on(tmp_path):
    """`validation` is removed: the cache of the time when all rows were trained on is not taken for the new one."""
    lines = [json.dumps({"text": f"line {i}"}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "validation"}))
    own = TextFiles(str(tmp_path / "a.jsonl"), validation=str(tmp_path / "b.jsonl"), held_out=0.2)
    found = []
    for source in (own, dataclasses.replace(own, validation=None)):
        task = text_task("corpus", source, ByteVocabulary())
        found.append([documents(open_cache(task, split, str(tmp_path / "cache"))) for split in ("train", "validation")])
    assert len(found[0][0]) == 200
    train, validation = (set(map(tuple, split)) for split in found[1])
    assert not train & validation and len(train | validation) == 200 and len(validation) > 20


def test_a_pool_of_processes_gives_the_same_cache(files, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.data.sources._RANGE", 40)  # several shards
    task = text_task("corpus", TextFiles(str(files), held_out=0.0), ByteVocabulary())
    assert len(task.source.shards("train")) >= 3
    alone = open_cache(task, "train", str(tmp_path / "alone"), workers=1)
    pooled = open_cache(task, "train", str(tmp_path / "pooled"), workers=2)
    assert documents(alone) == documents(pooled)


def test_an_interrupted_build_goes_on_where_it_was(files, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.data.sources._RANGE", 40)
    task = text_task("corpus", TextFiles(str(files), held_out=0.0), ByteVocabulary())
    expected = documents(open_cache(task, "train", str(tmp_path / "whole")))
    done = []
    tokenise = caches._tokenise

    def stop_at_third(task, shard, folder, index):
        if len(done) == 2:
            raise KeyboardInterrupt
        tokenise(task, shard, folder, index)
        done.append(index)

    monkeypatch.setattr(caches, "_tokenise", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        open_cache(task, "train", str(tmp_path / "cache"))
    assert done == [0, 1]
    monkeypatch.setattr(caches, "_tokenise", lambda *job: (done.append(job[3]), tokenise(*job)))
    assert documents(open_cache(task, "train", str(tmp_path / "cache"))) == expected
    assert done == list(range(len(task.source.shards("train"))))


def test_hosts_that_want_a_plan_at_once_make_it_once(files, tmp_path, monkeypatch):
    """Two containers on two hosts may have the same process id, as two threads have."""
    task = text_task("corpus", TextFiles(str(files), held_out=0.0), ByteVocabulary())
    cache = open_cache(task, "train", str(tmp_path / "cache"))
    barrier, made = threading.Barrier(2), []

    def make():
        made.append(1)
        time.sleep(0.2)
        return np.arange(10)

    def stored(_):
        barrier.wait(10)
        return cache.stored("plan", make)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for array in pool.map(stored, range(2)):
            np.testing.assert_array_equal(array, np.arange(10))
    assert made == [1]
    assert not [name for name in os.listdir(cache.folder) if "partial" in name or "tmp" in name]
    monkeypatch.setattr(caches, "_lock", None)  # what is there needs no lock, nor a folder that can be written
    assert len(cache.stored("plan", make)) == 10


def test_the_directory_is_the_argument_else_the_environment_else_the_users(monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", "/from/environment")
    assert cache_directory("/given") == "/given"
    assert cache_directory() == "/from/environment"
    monkeypatch.delenv("JAXLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == "/xdg/jaxlm/data"


def test_a_corpus_without_text_is_refused(tmp_path):
    task = text_task("blank", InMemory(("", "")), ByteVocabulary())
    with pytest.raises(ValueError, match="The train split of task 'blank' has no text in it"):
        open_cache(task, "train", str(tmp_path))
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".lock")]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    task = text_task("t", InMemory(("a",)), ByteVocabulary())
    with pytest.raises(ValueError, match="cannot be written.*JAXLM_CACHE"):
        open_cache(task, "train", str(tmp_path / "file" / "cache"))


def test_a_preprocessor_that_nothing_describes_is_refused_by_name(tmp_path):
    class Stateful:
        def __call__(self, record):
            return record

    task = text_task("odd", InMemory(("a",)), ByteVocabulary(), preprocessors=(Stateful(),))
    with pytest.raises(ValueError, match="Task 'odd' cannot be cached: .*give it a fingerprint"):
        open_cache(task, "train", str(tmp_path))
