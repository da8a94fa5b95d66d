"""A cached task is the task: same ids in the same order, whatever ran the job, wherever the folder goes."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxlm.data import task_cache, tasks, vocabularies
from jaxlm.data.cache import open_cache
from jaxlm.data.sources import InMemory, StandardLibrary, TextFiles
from jaxlm.data.tasks import pairs_task, text_task
from jaxlm.data.vocabularies import ByteVocabulary, PythonVocabulary, SentencePieceVocabulary, TokenizersVocabulary
from tools import cache_tasks

ROOT = pathlib.Path(__file__).parents[2]
ALONE = functools.partial(task_cache.run_in_pool, workers=1)
PAIRS = pairs_task(
    "pairs", InMemory(tuple({"inputs": f"q{i}", "targets": f"answer {i}"} for i in range(50))), ByteVocabulary(10)
)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(3):
        lines = [json.dumps({"text": f"document {i} {j} " + "x" * j}) for j in range(40)]
        (tmp_path / "text" / f"{i}.jsonl").write_text("\n".join(lines))
    vocabulary = ByteVocabulary(10, ("[R]",))
    return text_task("texts", TextFiles(str(tmp_path / "text"), held_out=0.2), vocabulary)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))


def all_ids(task, split):
    cache = open_cache(task, split)
    return {name: (np.array(cache.ids(name)), np.array(cache.offsets(name))) for name in cache.features}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip(a[name], b[name]):
            np.testing.assert_array_equal(x, y)


def test_text_and_pairs_come_back_as_they_were(texts, tmp_path):
    for task, splits in ((texts, ("train", "validation")), (PAIRS, ("train",))):
        folder = tmp_path / task.name
        fingerprint = task_cache.cache_task(task, str(folder), splits, ALONE)
        moved = shutil.move(folder, tmp_path / f"moved-{task.name}")
        back = task_cache.cached_task(str(moved))
        assert back.name == task.name
        assert {k: f.vocabulary for k, f in back.output_features.items()} == {
            k: f.vocabulary for k, f in task.output_features.items()
        }
        for split in splits:
            assert_same(all_ids(task, split), all_ids(back, split))
        assert json.loads((pathlib.Path(moved) / "task.json").read_text())["fingerprint"] == fingerprint


@pytest.fixture(scope="module")
def vocabulary(request, tmp_path_factory):
    """A vocabulary of a kind, with files that are gone when the task is read back."""
    import tokenizers

    folder = tmp_path_factory.mktemp("vocabulary")
    model = folder / "some.model"
    shutil.copyfile(os.path.join(vocabularies._ASSETS, "python_4k.model"), model)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<stop>", "<fill>"])
    tokenizer.train_from_iterator(
        ["document"],
        tokenizers.trainers.BpeTrainer(
            special_tokens=["<|endoftext|>", "<stop>", "<fill>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("[R]", "<sep>")
    made = {
        "bytes": lambda: ByteVocabulary(10, names),
        "sentencepiece": lambda: SentencePieceVocabulary(str(model), 5, names),
        "python": lambda: PythonVocabulary(extra_ids=7),
        "tokenizer": lambda: TokenizersVocabulary(str(folder / "tokenizer.json"), 3, names),
        "tokenizer_named_roles": lambda: TokenizersVocabulary(str(folder / "tokenizer.json"), eos_token="<stop>"),
        "tokenizer_config": lambda: TokenizersVocabulary(str(folder / "tokenizer.json")),
    }
    if request.param == "tokenizer_config":
        config = {"eos_token": "<stop>", "pad_token": {"content": "<fill>"}, "bos_token": None}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    yield made[request.param]()
    shutil.rmtree(folder)


KINDS = ("bytes", "sentencepiece", "python", "tokenizer", "tokenizer_named_roles", "tokenizer_config")


@pytest.mark.parametrize("vocabulary", KINDS, indirect=True)
def test_vocabularies_of_all_kinds_come_back(vocabulary, tmp_path):
    """Their files come with the folder, and what stood in a file beside them."""
    task = text_task("texts", InMemory(("a document", "another: 東京")), vocabulary)
    folder = tmp_path / "first"
    task_cache.cache_task(task, str(folder), ("train",), ALONE)
    back = task_cache.cached_task(shutil.move(folder, tmp_path / "moved"))
    read = back.output_features["targets"].vocabulary
    assert read.fingerprint() == vocabulary.fingerprint()
    for name in ("size", "pad_id", "eos_id", "unk_id", "bos_id", "sentinel_ids", "named_ids"):
        assert getattr(read.info(), name) == getattr(vocabulary.info(), name), name
    assert read.encode("more").tolist() == vocabulary.encode("more").tolist()
    assert_same(all_ids(task, "train"), all_ids(back, "train"))
    assert not [name for name in os.listdir(tmp_path / "moved") if name.endswith(".partial")]


def test_the_documented_example(tmp_path, monkeypatch):
    """`--tasks python_stdlib --out caches`, of a few modules."""
    shards = StandardLibrary.shards

    def few(self, split):
        return tuple(dataclasses.replace(shard, parts=shard.parts[:3]) for shard in shards(self, split)[:1])

    monkeypatch.setattr(StandardLibrary, "shards", few)
    cache_tasks.main(["--tasks", "python_stdlib", "--out", str(tmp_path / "caches"), "--workers", "1"])
    back = task_cache.cached_task(str(tmp_path / "caches" / "python_stdlib"))
    assert back.output_features["targets"].vocabulary.fingerprint() == PythonVocabulary().fingerprint()
    for split in ("train", "validation"):
        assert_same(all_ids(tasks.get("python_stdlib"), split), all_ids(back, split))


def test_the_runner_does_not_matter(texts, tmp_path):
    beam = functools.partial(task_cache.run_in_beam, arguments=["--runner=DirectRunner"])
    pool = functools.partial(task_cache.run_in_pool, workers=2)
    prints = {
        task_cache.cache_task(texts, str(tmp_path / name), ("train",), run)
        for name, run in (("alone", ALONE), ("pool", pool), ("beam", beam))
    }
    assert len(prints) == 1


def test_other_text_has_another_fingerprint_and_another_task_is_refused(texts, tmp_path):
    first = task_cache.cache_task(texts, str(tmp_path / "a"), ("train",), ALONE)
    with pytest.raises(ValueError, match="new folder"):
        task_cache.cache_task(PAIRS, str(tmp_path / "a"), ("train",), ALONE)
    (tmp_path / "text" / "0.jsonl").write_text(json.dumps({"text": "changed"}))
    assert task_cache.cache_task(texts, str(tmp_path / "b"), ("train",), ALONE) != first


def test_an_interrupted_job_goes_on(texts, tmp_path, monkeypatch):
    folder, written = str(tmp_path / "a"), []

    def fails_at_the_end(jobs):
        entries = [task_cache.write_shard(job) for job in jobs]
        raise KeyboardInterrupt(entries)

    with pytest.raises(KeyboardInterrupt):
        task_cache.cache_task(texts, folder, ("train",), fails_at_the_end)
    with pytest.raises(ValueError, match="no cached task"):
        task_cache.cached_task(folder)
    monkeypatch.setattr(task_cache, "encode_record", lambda example: written.append(example))
    resumed = task_cache.cache_task(texts, folder, ("train",), ALONE)
    assert not written  # every shard was whole
    monkeypatch.undo()
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    assert resumed == task_cache.cache_task(texts, str(tmp_path / "b"), ("train",), ALONE)


def numbered(count, texts=12):
    """A task whose source has so many shards."""

    @dataclasses.dataclass(frozen=True)
    class Numbered(InMemory):
        def shards(self, split):
            (shard,) = super().shards(split)
            return tuple(dataclasses.replace(shard, digest=f"{shard.digest} {i}", parts=(i,)) for i in range(count))

        def read(self, shard):
            yield from itertools.islice(super().read(shard), shard.parts[0], None, count)

    lines = tuple(f"text {i}" for i in range(texts))
    return text_task("numbered", Numbered(lines, lines[:5]), ByteVocabulary(10))


def files_of(folder, split=""):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).glob(f"{split}*.array_record*")}


@pytest.mark.parametrize("counts", [(2, 3), (3, 2)])
def test_another_number_of_shards_replaces_the_first(tmp_path, counts):
    folder, fresh = str(tmp_path / "a"), str(tmp_path / "b")
    for count in counts:
        found = task_cache.cache_task(numbered(count), folder, ("train", "validation"), ALONE)
    assert found == task_cache.cache_task(numbered(counts[1]), fresh, ("train", "validation"), ALONE)
    assert files_of(folder).keys() == files_of(fresh).keys() and len(files_of(folder)) == 2 * counts[1]
    assert_same(all_ids(task_cache.cached_task(folder), "train"), all_ids(task_cache.cached_task(fresh), "train"))
    # What a run that was killed before it tidied up had left is not read, and goes with the next.
    stray = pathlib.Path(folder) / f"train-00000-of-{counts[0]:05d}.array_record"
    shutil.copyfile(pathlib.Path(folder) / f"train-00000-of-{counts[1]:05d}.array_record", stray)
    assert len(task_cache.cached_task(folder).source.shards("train")) == counts[1]
    os.unlink(pathlib.Path(folder) / f"train-00001-of-{counts[1]:05d}.array_record")
    with pytest.raises(ValueError, match="lacks the file train-00001-of-.*cache it again"):
        task_cache.cached_task(folder).source.shards("train")
    assert task_cache.cache_task(numbered(counts[1]), folder, ("train",), ALONE) == found
    assert files_of(folder).keys() == files_of(fresh).keys()


def shouted(record):
    return record | {"text": record["text"].upper()}


@pytest.mark.parametrize("change", ["preprocessors", "vocabulary"])
def test_an_interrupted_job_goes_on_with_one_definition(tmp_path, change):
    """Half of the files are of an earlier definition; they are made again, as they are in a fresh folder."""
    first = numbered(4)
    if change == "preprocessors":
        second = dataclasses.replace(first, preprocessors=(shouted, *first.preprocessors))
    else:
        second = text_task("numbered", first.source, PythonVocabulary())
    folder, fresh = str(tmp_path / "a"), str(tmp_path / "b")

    def fails_half_way(jobs):
        for job in jobs[:2]:
            task_cache.write_shard(job)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        task_cache.cache_task(first, folder, ("train",), fails_half_way)
    found = task_cache.cache_task(second, folder, ("train",), ALONE)
    assert found == task_cache.cache_task(second, fresh, ("train",), ALONE)
    assert_same(all_ids(task_cache.cached_task(folder), "train"), all_ids(task_cache.cached_task(fresh), "train"))


def test_a_split_that_is_cached_again_is_not_read_half_way(tmp_path):
    task = numbered(3)
    other = dataclasses.replace(task, preprocessors=(shouted, *task.preprocessors))
    folder = str(tmp_path / "a")
    first = task_cache.cache_task(task, folder, ("train", "validation"), ALONE)
    # As it was, nothing is written again.
    assert task_cache.cache_task(task, folder, ("train",), lambda jobs: pytest.fail("nothing is to be done")) == first
    with pytest.raises(ValueError, match="the splits validation .* by other preprocessors; cache them too, or .* new"):
        task_cache.cache_task(other, folder, ("train",), ALONE)

    def fails_half_way(jobs):
        task_cache.write_shard(jobs[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        task_cache.cache_task(other, folder, ("train", "validation"), fails_half_way)
    for split in ("train", "validation"):  # the latter is still as `task` had it
        with pytest.raises(ValueError, match=f"no split '{split}'"):
            task_cache.cached_task(folder).source.shards(split)
    assert task_cache.cache_task(other, folder, ("train", "validation"), ALONE) != first


def test_the_command_line(tmp_path):
    (tmp_path / "some_tasks.py").write_text(
        "from jaxlm.data.tasks import register, text_task\n"
        "from jaxlm.data.sources import InMemory\n"
        "from jaxlm.data.vocabularies import ByteVocabulary\n"
        "register(text_task('little_1', InMemory(('one', 'two')), ByteVocabulary()))\n"
        "register(text_task('little_2', InMemory(('three',)), ByteVocabulary()))\n"
    )
    tool = str(ROOT / "tools" / "cache_tasks.py")
    command = [sys.executable, tool, "--out", str(tmp_path / "out"), "--splits", "train"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "env": environment}
    done = subprocess.run([*command, "--modules", "some_tasks", "--tasks", "little_.*", "--workers", "1"], **run)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0][-8:] for line in done.stdout.splitlines()] == ["little_1", "little_2"]
    assert len(all_ids(task_cache.cached_task(str(tmp_path / "out" / "little_1")), "train")["targets"][0]) == 8
    failed = subprocess.run([*command, "--tasks", "nothing"], **run)
    assert failed.returncode == 1 and failed.stderr.startswith("cache_tasks: No task or mixture is named 'nothing'")
