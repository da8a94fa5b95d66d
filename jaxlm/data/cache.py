"""Text as ids on disk: a content-addressed cache, built at first use, memory-mapped ever after.

A cache holds, for each feature of a task, one flat array of ids (uint16 where the vocabulary allows, else int32) and
the offsets of the examples in it (int64 [examples + 1]). Its folder is named by a digest of everything that decides its
contents: the source's files (path, size, time of change) and settings, the task's definition, the vocabularies. Opening
it takes milliseconds whatever the corpus's size.

A build goes shard by shard, in processes when there is much to do. Each finished shard is a file, so that a build that
was interrupted goes on where it was; the whole appears under its name by one rename, so that nobody sees half a cache.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.sources import Shard
from jaxlm.data.tasks import Task

log = logging.getLogger("jaxlm.data")

_FORMAT = 2
_BATCH_CHARACTERS = 1 << 20  # text tokenised at a time
_LOG_SECONDS = 30.0
_POOL_BYTES = 64 << 20  # smaller sources are tokenised in this process: a pool takes seconds to start


def cache_directory(directory: str | None = None) -> str:
    """Where caches are: the argument, else $JAXLM_CACHE, else `jaxlm` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(directory or os.environ.get("JAXLM_CACHE") or os.path.join(user, "jaxlm", "data"))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCache:
    """The ids of one split of one task, memory-mapped.

    Attributes:
      task: name of the task.
      key: digest of all that decides the contents.
      folder: where it is; plans of packing are stored beside the ids.
      num_examples: documents or pairs.
      num_tokens: ids of each feature, EOS included.
    """

    task: str
    key: str
    folder: str
    num_examples: int
    num_tokens: dict[str, int]
    _dtypes: dict[str, str]
    _arrays: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features: ("targets",) for text, ("inputs", "targets") for pairs."""
        return tuple(self.num_tokens)

    def ids(self, feature: str) -> np.ndarray:
        """All ids of a feature, uint16 or int32 [num_tokens], read-only."""
        if ("ids", feature) not in self._arrays:
            count, dtype = self.num_tokens[feature], np.dtype(self._dtypes[feature])
            path = _ids_path(self.folder, feature)
            # As plain arrays: slicing a np.memmap costs ten times as much.
            self._arrays["ids", feature] = np.asarray(
                np.memmap(path, dtype, "r", shape=(count,)) if count else [], dtype
            )
        return self._arrays["ids", feature]

    def offsets(self, feature: str) -> np.ndarray:
        """Where each example begins in `ids`, int64 [num_examples + 1]."""
        if ("offsets", feature) not in self._arrays:
            self._arrays["offsets", feature] = np.asarray(np.load(_offsets_path(self.folder, feature), mmap_mode="r"))
        return self._arrays["offsets", feature]

    def stored(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array derived from the ids, made at its first use and kept beside them, memory-mapped.

        Args:
          name: of the file.
          make: gives the array. It holds the cache's lock, so that it must ask for no stored array itself.
        """
        path = os.path.join(self.folder, f"{name}.npy")
        if not os.path.exists(path):
            with _lock(self.folder + ".lock"):
                if not os.path.exists(path):
                    part = os.path.join(self.folder, f"{name}.partial.npy")
                    np.save(part, make())
                    os.replace(part, path)
        return np.asarray(np.load(path, mmap_mode="r"))

    def lengths(self, feature: str) -> np.ndarray:
        """Number of ids of each example, int64 [num_examples]."""
        return np.diff(self.offsets(feature))


def _ids_path(folder: str, feature: str) -> str:
    return os.path.join(folder, f"{feature}.ids")


def _offsets_path(folder: str, feature: str) -> str:
    return os.path.join(folder, f"{feature}.offsets.npy")


def open_cache(task: Task, split: str, directory: str | None = None, workers: int | None = None) -> TokenCache:
    """The cache of a split of a task; built now if this is its first use.

    Args:
      task: what to read.
      split: "train", "validation", ...
      directory: see `cache_directory`.
      workers: processes that tokenise; by default one a core if there is much to do, else none.

    Raises:
      ValueError: the source is empty or unreadable, or a preprocessor cannot be described; the message names the file
        and the remedy.
    """
    shards = task.source.shards(split)
    definition = [task.name, task.output_features, task.preprocessors]
    try:
        key = fingerprint(_FORMAT, definition, split, [(shard.name, shard.digest) for shard in shards])
    except TypeError as error:
        raise ValueError(f"Task {task.name!r} cannot be cached: {error}") from None
    readable = re.sub(r"[^\w.-]+", "_", f"{task.name}-{split}")[:80]
    folder = os.path.join(cache_directory(directory), f"{readable}-{key[:16]}")
    if not os.path.exists(os.path.join(folder, "cache.json")):
        with _lock(folder + ".lock"):
            if not os.path.exists(os.path.join(folder, "cache.json")):
                _build(task, split, shards, folder, key, workers)
    with open(os.path.join(folder, "cache.json"), encoding="utf-8") as file:
        card = json.load(file)
    return TokenCache(task.name, card["key"], folder, card["num_examples"], card["num_tokens"], card["dtypes"])


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """One builder at a time; others wait and then find the cache built."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise ValueError(
            f"The cache folder {os.path.dirname(path)} cannot be written ({error}); name another with JAXLM_CACHE or "
            f"DataConfig.cache_directory."
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(task: Task, split: str, shards: tuple[Shard, ...], folder: str, key: str, workers: int | None) -> None:
    partial = folder + ".partial"
    os.makedirs(partial, exist_ok=True)
    todo = [(i, shard) for i, shard in enumerate(shards) if not os.path.exists(_part(partial, i, "json"))]
    sizes = sum(shard.size for _, shard in todo)
    if workers is None:
        workers = min(os.cpu_count() or 1, len(todo)) if sizes >= _POOL_BYTES else 1
    jobs = [(task, shard, partial, i) for i, shard in todo]
    with progress_bar(f"tokenising {task.name} ({split})", sizes) as advance:
        if workers > 1:
            # Spawned, not forked: jax and gRPC hold threads and locks that a forked child would inherit.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
                futures = {pool.submit(_tokenise, *job): job[1] for job in jobs}
                try:
                    for future in concurrent.futures.as_completed(futures):
                        future.result()
                        advance(futures[future].size)
                except concurrent.futures.process.BrokenProcessPool as error:
                    raise OSError(
                        f"A process that tokenised {task.name!r} died (out of memory, or a script that starts without "
                        f"`if __name__ == '__main__':`); start again, which goes on where it stopped."
                    ) from error
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        else:
            for job in jobs:
                _tokenise(*job)
                advance(job[1].size)
    card = _merge(task, partial, len(shards), key)
    if not card["num_examples"]:
        shutil.rmtree(partial)
        raise ValueError(
            f"The {split} split of task {task.name!r} has no text in it ({shards[0].name}); name files that have, or a "
            f"field that has (Rekey)."
        )
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    log.info(
        "Cached %s (%s): %d examples, %s ids in %s", task.name, split, card["num_examples"], card["num_tokens"], folder
    )


def _part(folder: str, index: int, kind: str) -> str:
    return os.path.join(folder, f"part-{index:06d}.{kind}")


def _dtype(task: Task, feature: str) -> np.dtype:
    return np.dtype(np.uint16 if task.output_features[feature].vocabulary.size <= 1 << 16 else np.int32)


def _tokenise(task: Task, shard: Shard, folder: str, index: int) -> None:
    """Writes part `index`: ids and lengths of each feature, and last its card, which says that it is whole."""
    features = tuple(task.output_features)
    lengths: dict[str, list[int]] = {name: [] for name in features}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(_part(folder, index, f"{name}.ids"), "wb")) for name in features}
        for records in _batches(task.texts(task.source.read(shard))):
            for example in task.encode(records):
                for name, ids in example.items():
                    files[name].write(ids.astype(_dtype(task, name)).tobytes())
                    lengths[name].append(len(ids))
    for name in features:
        np.save(_part(folder, index, f"{name}.npy"), np.array(lengths[name], np.int64))
    card = _part(folder, index, "json")
    with open(card + ".tmp", "w") as file:
        json.dump({"shard": shard.name, "examples": len(lengths["targets"])}, file)
    os.rename(card + ".tmp", card)


def _batches(records: Iterable[dict]) -> Iterator[list[dict]]:
    """Records in groups of about a megabyte of text: tokenisers like batches, memory does not."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += 64 + sum(len(value) for value in record.values() if isinstance(value, str))
        if size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _merge(task: Task, folder: str, parts: int, key: str) -> dict:
    """Joins the parts into one flat array a feature, and writes the card."""
    card = {"key": key, "task": task.name, "num_examples": 0, "num_tokens": {}, "dtypes": {}}
    for name in task.output_features:
        lengths = np.concatenate([np.load(_part(folder, i, f"{name}.npy")) for i in range(parts)])
        np.save(_offsets_path(folder, name), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        with open(_ids_path(folder, name), "wb") as out:
            for i in range(parts):
                with open(_part(folder, i, f"{name}.ids"), "rb") as part:
                    shutil.copyfileobj(part, out, 1 << 22)
        card["num_examples"] = len(lengths)
        card["num_tokens"][name] = int(lengths.sum())
        card["dtypes"][name] = _dtype(task, name).str
    for i in range(parts):
        for kind in ("json", *itertools.chain(*((f"{name}.ids", f"{name}.npy") for name in task.output_features))):
            os.unlink(_part(folder, i, kind))
    with open(os.path.join(folder, "cache.json"), "w") as file:
        json.dump(card, file, indent=1)
    return card


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that reports an amount done of `total`: as a bar in a terminal, else as a log line now and then.

    Args:
      title: what is done.
      total: bytes or examples.
    """
    if not sys.stderr.isatty():
        done, said = 0, time.monotonic()

        def advance(amount: int) -> None:
            nonlocal done, said
            done += amount
            if time.monotonic() > said + _LOG_SECONDS:
                said = time.monotonic()
                log.info("%s: %d%%", title, 100 * done // max(total, 1))

        yield advance
        return
    import rich.console
    import rich.progress

    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=max(total, 1))
        yield lambda amount: progress.advance(bar, amount)
