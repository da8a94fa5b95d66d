"""A task cached into a folder of ArrayRecord files that stands on its own: ids, vocabulary and a card.

Raw files need none of this: they are cached as flat arrays at first use (`jaxlm.data.cache`). A task is cached here to
be moved, shared, or read where what it is made from is not installed (a seqio task, without TensorFlow).
`tools/cache_tasks.py` is the command line.

    folder/task.json                          features, vocabularies, number and counts of each split's files
    folder/train-00000-of-00004.array_record  records as jaxlm.data.records has them
    folder/<fingerprint>.model                the vocabulary's file, where it has one
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from typing import Any

from jaxlm.data import vocabularies
from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.records import encode_record
from jaxlm.data.sources import CARD, ArrayRecordSource, Shard, shard_file
from jaxlm.data.tasks import Feature, Task
from jaxlm.data.vocabularies import Vocabulary

# A shard's examples, as (task, shard, folder, index, count); what a pool or a Beam runner maps over.
Job = tuple[Task, Shard, str, int, int]


def write_shard(job: Job) -> dict[str, Any]:
    """Writes one file of records and returns its entry for the card; a file that is whole already is kept."""
    from array_record.python import array_record_module

    task, shard, folder, index, count = job
    path = os.path.join(folder, shard_file(shard.split, index, count))
    entry_path = f"{path}.json"
    if os.path.exists(entry_path):
        with open(entry_path, encoding="utf-8") as file:
            entry = json.load(file)
        if entry["shard"] == shard.digest and os.path.exists(path):
            return entry
        os.unlink(entry_path)  # it must not stand beside the file that is written now
    digest, examples, tokens = hashlib.sha256(), 0, dict.fromkeys(task.output_features, 0)
    # group_size 1: any record can be read without its neighbours.
    writer = array_record_module.ArrayRecordWriter(f"{path}.partial", "group_size:1")
    for records in itertools.batched(task.texts(task.source.read(shard)), 64):
        for example in task.encode(list(records)):
            record = encode_record(example)
            writer.write(record)
            digest.update(len(record).to_bytes(8, "little") + record)
            examples += 1
            for name, ids in example.items():
                tokens[name] += len(ids)
    writer.close()
    os.replace(f"{path}.partial", path)
    entry = {"shard": shard.digest, "examples": examples, "tokens": tokens, "sha256": digest.hexdigest()}
    with open(f"{entry_path}.partial", "w", encoding="utf-8") as file:
        json.dump(entry, file)
    os.replace(f"{entry_path}.partial", entry_path)
    return entry


def run_in_pool(jobs: list[Job], workers: int) -> list[dict[str, Any]]:
    """`write_shard` of each job in `workers` processes (in this one if there is but one)."""
    if workers <= 1:
        return [write_shard(job) for job in jobs]
    # Spawned: TensorFlow and jax hold threads and locks that a forked child would inherit.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        return list(pool.map(write_shard, jobs))


def run_in_beam(jobs: list[Job], arguments: list[str]) -> list[dict[str, Any]]:
    """`write_shard` of each job in a Beam pipeline with those options ("--runner=FlinkRunner", ...).

    The folder must be one that every worker sees.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    with beam.Pipeline(options=PipelineOptions(arguments, save_main_session=False)) as pipeline:
        _ = pipeline | beam.Create(jobs) | beam.Reshuffle() | beam.Map(write_shard)
    # A pipeline has no result; finished shards have left their entries.
    return [write_shard(job) for job in jobs]


def cache_task(task: Task, folder: str, splits: tuple[str, ...], run: Callable[[list[Job]], list[dict]]) -> str:
    """Caches splits of a task into `folder`; goes on where an interrupted run was, if it was of the same definition.

    A split that is there as it would be made is left alone. One that is made again has no place in the card meanwhile.

    Args:
      task: what to cache.
      folder: made if it is not there; other splits of the same task in it are kept.
      splits: of the task.
      run: `run_in_pool` or `run_in_beam` with its last argument bound.

    Returns:
      The fingerprint: a digest of all records and vocabularies, 32 hex digits.

    Raises:
      ValueError: the folder holds another task, or other splits by other preprocessors, or a split is empty.
    """
    os.makedirs(folder, exist_ok=True)
    features, preprocessors = _describe_features(task, folder), fingerprint(task.preprocessors)
    card = {"task": task.name, "features": features, "preprocessors": preprocessors, "splits": {}}
    path = os.path.join(folder, CARD)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            old = json.load(file)
        if {name: old[name] for name in ("task", "features")} != {name: card[name] for name in ("task", "features")}:
            raise ValueError(
                f"{folder!r} holds the task {old['task']!r} with other features or vocabularies; cache into a new "
                f"folder."
            )
        kept = [name for name in old["splits"] if name not in splits]
        if kept and old.get("preprocessors", preprocessors) != preprocessors:
            raise ValueError(
                f"{folder!r} holds the splits {', '.join(kept)} of {task.name!r}, made by other preprocessors; cache "
                f"them too, or into a new folder."
            )
        card["splits"] = old["splits"]
    sources = {split: _defined(task, split) for split in splits}
    definitions = {split: fingerprint([shard.digest for shard in shards]) for split, shards in sources.items()}

    def there(split: str) -> bool:
        files = [os.path.join(folder, shard_file(split, i, len(sources[split]))) for i in range(len(sources[split]))]
        known = card["splits"].get(split, {})
        return known.get("definition") == definitions[split] and all(map(os.path.exists, files))

    missing = [split for split in splits if not there(split)]
    # Nobody is to read some of each, nor a split under a card of other preprocessors.
    if [split for split in missing if card["splits"].pop(split, None)]:
        _write_card(card, path)
    for split in missing:
        shards = sources[split]
        entries = run([(task, shard, folder, i, len(shards)) for i, shard in enumerate(shards)])
        if not any(entry["examples"] for entry in entries):
            raise ValueError(f"The {split} split of task {task.name!r} has no examples; check its preprocessors.")
        card["splits"][split] = {
            "shards": len(shards),
            "examples": sum(entry["examples"] for entry in entries),
            "tokens": {name: sum(e["tokens"][name] for e in entries) for name in task.output_features},
            "sha256": [entry["sha256"] for entry in entries],
            "definition": definitions[split],
        }
    _write_card(card, path)
    _tidy(folder, splits, card)
    return card["fingerprint"]


def _defined(task: Task, split: str) -> list[Shard]:
    """The shards of a split, with digests of all that decides the records made of them."""
    definition = fingerprint(task.output_features, task.preprocessors)
    return [
        dataclasses.replace(shard, digest=fingerprint(shard.digest, definition)) for shard in task.source.shards(split)
    ]


def _write_card(card: dict[str, Any], path: str) -> None:
    """Writes the card with its fingerprint, which is of the records and does not ask where they come from."""
    made = {name: {k: v for k, v in split.items() if k != "definition"} for name, split in card["splits"].items()}
    described = json.dumps([card["features"], made], sort_keys=True)
    card["fingerprint"] = hashlib.sha256(described.encode()).hexdigest()[:32]
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(card, file, indent=1)
    os.replace(f"{path}.partial", path)


def _tidy(folder: str, splits: tuple[str, ...], card: dict[str, Any]) -> None:
    """Deletes what the card does not name: files of these splits in another number, and entries of all files."""
    named = {shard_file(split, i, n) for split in splits for n in [card["splits"][split]["shards"]] for i in range(n)}
    ours = "|".join(map(re.escape, splits))
    for name in os.listdir(folder):
        if name.endswith(".array_record.json") or (
            re.fullmatch(rf"({ours})-\d+-of-\d+\.array_record(\.partial)?", name) and name not in named
        ):
            os.unlink(os.path.join(folder, name))


def cached_task(folder: str, name: str | None = None) -> Task:
    """The task that was cached into `folder`, under its own name or another.

    Raises:
      ValueError: no task was cached there, or not to its end.
    """
    path = os.path.join(os.path.expanduser(folder), CARD)
    if not os.path.exists(path):
        raise ValueError(f"There is no cached task in {folder!r} (no {CARD}); cache one with tools/cache_tasks.py.")
    with open(path, encoding="utf-8") as file:
        card = json.load(file)
    features = {key: Feature(_vocabulary(said, folder), said["add_eos"]) for key, said in card["features"].items()}
    return Task(name or card["task"], ArrayRecordSource(folder), features)


def _describe_features(task: Task, folder: str) -> dict[str, Any]:
    """The features as JSON; the vocabularies' files are put into the folder."""
    described = {}
    for name, feature in task.output_features.items():
        vocabulary = feature.vocabulary.copied(folder)
        fields = dataclasses.asdict(vocabulary)
        if "path" in fields:
            fields["path"] = os.path.basename(vocabulary.path)
        # Through JSON and back, so that it compares with what is read (tuples become lists).
        fields = json.loads(json.dumps(fields))
        described[name] = {"vocabulary": type(vocabulary).__name__, "fields": fields, "add_eos": feature.add_eos}
    return described


def _vocabulary(said: dict[str, Any], folder: str) -> Vocabulary:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in said["fields"].items()}
    if "path" in fields:
        fields["path"] = os.path.join(os.path.expanduser(folder), fields["path"])
    return getattr(vocabularies, said["vocabulary"])(**fields)
