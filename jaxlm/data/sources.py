"""Where records come from: the standard library, files, TFDS data sets, cached tasks, or memory.

A source lists `Shard`s of a split and reads one shard as a stream of records ({name: text or array}). Shards are small
and picklable, so that a pool of processes can share the work; their digests name the cache of tokens that is made from
them. Documents stream: no file is held in memory whole, and the order is always the same.
"""

from __future__ import annotations

import abc
import ast
import codecs
import dataclasses
import enum
import functools
import glob
import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, override

from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.records import decode_record

log = logging.getLogger("jaxlm.data")

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a source that one worker reads.

    Attributes:
      name: what messages call it.
      size: bytes, roughly; for progress and for dividing the work.
      digest: changes whenever the records may have changed: with the files, and with every setting of the source that
        `read` goes by.
      split: the split it belongs to.
      parts: what the source needs to find it.
    """

    name: str
    size: int
    digest: str
    split: str
    parts: tuple


class Source(abc.ABC):
    """Records of text, by split."""

    @abc.abstractmethod
    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split, always in the same order.

        Raises:
          ValueError: there is no such split, or nothing in it; the message says what there is.
        """

    @abc.abstractmethod
    def read(self, shard: Shard) -> Iterator[Record]:
        """The records of a shard, always in the same order."""


def share_of(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: what decides on which side of a split something falls."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") / 2**64


def _in_split(key: str, split: str, held_out: float) -> bool:
    return (share_of(key) < held_out) == (split == "validation")


def _check_split(source: object, split: str, names: Sequence[str]) -> None:
    if split not in names:
        raise ValueError(f"{type(source).__name__} has no split {split!r}; it has {', '.join(names)}.")


# The standard library -------------------------------------------------------------------------------------------


class LibraryText(enum.Enum):
    """Which half of the standard library: its docstrings (English), its sources (code), or both."""

    ENGLISH = "english"
    CODE = "code"
    BOTH = "both"


@dataclasses.dataclass(frozen=True)
class StandardLibrary(Source):
    """The running Python's own standard library: real text that is on every machine.

    A module gives one document of its docstrings ("english") and one of its source ("code"). Tests, vendored packages
    and the tables of `encodings` are left out. `pydoc_data.topics`, the language reference, counts as English.

    Attributes:
      text: which documents.
      held_out: share of the modules, chosen by the hash of their names, that make the validation split.
    """

    text: LibraryText = LibraryText.BOTH
    held_out: float = 0.05

    _SKIPPED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__", "_vendor")
    _TOPICS = "pydoc_data.topics"

    @override
    def shards(self, split: str) -> tuple[Shard, ...]:
        _check_split(self, split, ("train", "validation"))
        root = sysconfig.get_path("stdlib")
        modules = []
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in self._SKIPPED)
            for file in sorted(files):
                path = os.path.join(folder, file)
                name = os.path.relpath(path, root).removesuffix(".py").replace(os.sep, ".")
                if file.endswith(".py") and _in_split(name, split, self.held_out):
                    modules.append((path, name, os.path.getsize(path)))
        if not modules:
            raise ValueError(
                f"The standard library in {root} has no sources for the {split} split (a stripped Python?); "
                f"name a folder of text instead, with TextFiles.pattern."
            )
        # The version stands for the contents; sizes catch a distribution's patches.
        return tuple(
            Shard(
                name=f"standard library {i}",
                size=sum(size for *_, size in group),
                digest=fingerprint(self.text, sys.version, [(name, size) for _, name, size in group]),
                split=split,
                parts=tuple((path, name) for path, name, _ in group),
            )
            for i, group in enumerate(itertools.batched(modules, 200))
        )

    @override
    def read(self, shard: Shard) -> Iterator[Record]:
        for path, name in shard.parts:
            with open(path, "rb") as file:
                data = file.read()
            try:
                source = data.decode()
                tree = ast.parse(source) if self.text is not LibraryText.CODE else None
            except (SyntaxError, ValueError):  # lib2to3's and other deliberate oddities, or a legacy encoding
                continue
            if self.text is not LibraryText.CODE:
                yield {"text": self._english(tree, name), "name": name}
            if self.text is not LibraryText.ENGLISH and name != self._TOPICS:
                yield {"text": source, "name": name}

    def _english(self, tree: ast.Module, name: str) -> str:
        if name == self._TOPICS:
            constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
            return "\n\n".join(text for text in constants if isinstance(text, str) and "\n" in text)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        return "\n\n".join(doc for doc in docs if doc)


# Files ----------------------------------------------------------------------------------------------------------

_PLAIN = (".txt", ".md", ".py")
_SUFFIXES = (*_PLAIN, ".jsonl", ".json", ".parquet")
_RANGE = 64 << 20  # bytes of plain files in one shard: what a worker does before it reports
_LINE_LIMIT = 256 << 20
# What half a character may look like in a line of JSON: an escape, or bytes that no UTF-8 has.
_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


@dataclasses.dataclass(frozen=True)
class TextFiles(Source):
    """Files on disk: `.txt`, `.md`, `.py` (a file is a document), `.jsonl` (a line), `.parquet` (a row).

    All but parquet may be gzipped (`.gz`). A record is {"text": ...} for plain files and the object's or row's own
    fields otherwise. Half a character in JSON (a lone surrogate, where a text was cut inside an emoji) is read as
    U+FFFD, and a warning counts the lines.

    Without `validation` the validation split is taken from the same files: of lines, rows and many files, those whose
    hash falls below `held_out`; of fewer than 20 plain files, the end of each.

    Attributes:
      pattern: a folder (read recursively), a file, a glob (** is folders at any depth), or a tuple of these.
      validation: the same for the validation split, or None to hold out a share of `pattern`.
      held_out: that share.
      document_bytes: a longer plain file is read as several documents, cut at line ends where there are any.
    """

    pattern: str | tuple[str, ...]
    validation: str | tuple[str, ...] | None = None
    held_out: float = 0.02
    document_bytes: int = 4 << 20

    @override
    def shards(self, split: str) -> tuple[Shard, ...]:
        _check_split(self, split, ("train", "validation"))
        files = _files(self.validation if split == "validation" and self.validation else self.pattern)
        sizes = {path: os.path.getsize(path) for path in files}
        held_out = self._held_out
        by_tail = sum(_suffix(path) in _PLAIN for path in files) < 20
        longest = max(files, key=sizes.__getitem__)
        if _suffix(longest) in _PLAIN and sizes[longest] > self.document_bytes:
            _warn_once(
                f"{longest} ({sizes[longest] >> 20} MB) is longer than a document may be ({self.document_bytes >> 20} "
                f"MB): it and others like it are read in pieces."
            )
        ranges: list[tuple[str, int, int]] = []
        for path in files:
            start, stop = 0, sizes[path]
            if path.endswith(".gz") or _suffix(path) == ".parquet":
                stop = -1  # to the end
            if _suffix(path) in _PLAIN and held_out and by_tail:
                cut = _tail(path, held_out)
                start, stop = (0, cut) if split == "train" else (cut, -1 if stop < 0 else stop)
            elif _suffix(path) in _PLAIN and held_out and not _in_split(os.path.basename(path), split, held_out):
                continue
            if stop < 0:
                ranges.append((path, start, stop))
            else:
                # A line of JSON belongs to the range it begins in; plain text is cut where a line ends.
                inner = range(start + _RANGE, stop, _RANGE)
                edges = [start, *(_cut(path, at) if _suffix(path) in _PLAIN else at for at in inner), stop]
                ranges += [(path, a, b) for a, b in itertools.pairwise(edges)]
        if not ranges:
            raise ValueError(
                f"The {split} split of {self.pattern!r} is empty: no file falls into a held-out share of {held_out}; "
                f"name its files with TextFiles.validation."
            )
        return tuple(self._shard(group, split, sizes) for group in _grouped(ranges, sizes))

    def _shard(self, ranges: list[tuple[str, int, int]], split: str, sizes: Mapping[str, int]) -> Shard:
        def times(path: str) -> int:
            return os.stat(path).st_mtime_ns

        files = [(os.path.abspath(path), a, b, sizes[path], times(path)) for path, a, b in ranges]
        return Shard(
            name=ranges[0][0] if len(ranges) == 1 else f"{ranges[0][0]} and {len(ranges) - 1} more",
            size=sum(_range_size(r, sizes) for r in ranges),
            digest=fingerprint(files, self._held_out, self.document_bytes),
            split=split,
            parts=tuple(ranges),
        )

    @property
    def _held_out(self) -> float:
        """The share of `pattern` that is left to the validation split."""
        return 0.0 if self.validation else self.held_out

    @override
    def read(self, shard: Shard) -> Iterator[Record]:
        held_out = self._held_out
        for path, start, stop in shard.parts:
            with _clear_errors(path):
                if _suffix(path) in _PLAIN:
                    for text in _pieces(path, start, stop, self.document_bytes):
                        yield {"text": text}
                    continue
                rows = _rows(path) if _suffix(path) == ".parquet" else _lines(path, start, stop)
                for position, record in rows:
                    if not held_out or _in_split(f"{os.path.basename(path)}:{position}", shard.split, held_out):
                        yield record


@functools.cache
def _warn_once(sentence: str) -> None:
    log.warning("%s", sentence)


def _suffix(path: str) -> str:
    return os.path.splitext(path.removesuffix(".gz"))[1].lower()


def _files(pattern: str | tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for one in (pattern,) if isinstance(pattern, str) else pattern:
        one = os.path.expanduser(one)
        paths = glob.glob(os.path.join(glob.escape(one), "**") if os.path.isdir(one) else one, recursive=True)
        there_are = [p for p in paths if os.path.isfile(p)]
        matching = [p for p in there_are if _suffix(p) in _SUFFIXES]
        if not matching:
            there = f"none of the {len(there_are)} files there is of a known kind" if there_are else "nothing is there"
            raise ValueError(
                f"No text at {one!r}: {there}; give a folder, file or glob of {' '.join(_SUFFIXES)} (all but parquet "
                f"also .gz)."
            )
        found += matching
    return sorted(set(found))


def _open(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _range_size(part: tuple[str, int, int], sizes: Mapping[str, int]) -> int:
    path, start, stop = part
    return sizes[path] if stop < 0 else stop - start


def _grouped(ranges: Iterable[tuple[str, int, int]], sizes: Mapping[str, int]) -> Iterator[list]:
    """Neighbouring ranges together, up to `_RANGE` bytes: a hundred thousand small files are few shards."""
    group, total = [], 0
    for part in ranges:
        size = _range_size(part, sizes)
        if group and total + size > _RANGE:
            yield group
            group, total = [], 0
        group.append(part)
        total += size
    yield group


class _clear_errors:
    """Turns what goes wrong while reading `path` into one sentence that names it and the remedy."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, UnicodeDecodeError):
            raise ValueError(
                f"{self.path} is not UTF-8 ({error.reason} near {error.object[error.start : error.start + 8]!r}); "
                f"convert it (iconv -f latin1 -t utf-8) or leave it out of the pattern."
            ) from error
        if isinstance(error, (OSError, EOFError, gzip.zlib.error)):
            raise ValueError(
                f"{self.path} cannot be read ({error}); repair it or leave it out of the pattern."
            ) from error


def _boundary(data: bytes, at: int) -> int:
    """The first place from `at` on where UTF-8 text may be cut: after a line end, else between characters."""
    line = data.find(b"\n", at)
    if line >= 0:
        return line + 1
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at


@functools.lru_cache(maxsize=64)
def _tail(path: str, held_out: float) -> int:
    """Where the held-out end of a plain file begins, in (uncompressed) bytes, at a line's start if possible."""
    size = os.path.getsize(path)
    if path.endswith(".gz"):
        with _clear_errors(path), _open(path) as file:
            size = sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))
    return _cut(path, int(size * (1 - held_out)))


def _cut(path: str, at: int) -> int:
    """The first place from byte `at` on where a plain file may be cut."""
    if not at:
        return 0
    with _clear_errors(path), _open(path) as file:
        file.seek(at)
        return at + _boundary(file.read(1 << 16), 0)


def _pieces(path: str, start: int, stop: int, limit: int) -> Iterator[str]:
    """Bytes [start, stop) of a plain file as texts of about `limit` bytes at most, cut at line ends if possible."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as file:
        file.seek(start)
        pending = ""
        while block := file.read(limit if stop < 0 else min(limit, stop - start)):
            start += len(block)
            if pending:
                cut = pending.rfind("\n") + 1 or len(pending)
                yield pending[:cut]
                pending = pending[cut:]
            pending += decoder.decode(block)
        yield pending + decoder.decode(b"", final=True)


def _lines(path: str, start: int, stop: int) -> Iterator[tuple[int, Record]]:
    """(position in bytes, object) of the lines of a JSON-lines file that begin in [start, stop)."""
    mended: list[int] = []
    with _open(path) as file:
        at = start
        if start:
            file.seek(start - 1)
            at = start - 1 + len(file.readline(_LINE_LIMIT))
        while (stop < 0 or at < stop) and (line := file.readline(_LINE_LIMIT)):
            if len(line) == _LINE_LIMIT:
                raise ValueError(
                    f"{path} has a line longer than {_LINE_LIMIT >> 20} MB at byte {at}; is it JSON lines? Split the "
                    f"document over several lines."
                )
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path} has a line at byte {at} that is not JSON ({error}); it needs one object a line."
                    ) from error
                if not isinstance(record, dict):
                    raise ValueError(
                        f"{path} has a line at byte {at} that is not an object but {type(record).__name__}."
                    )
                if _HALF.search(line) and (whole := _whole(record)) != record:
                    mended.append(at)
                    record = whole
                yield at, record
            at += len(line)
    if mended:
        log.warning(
            "%s has halves of characters (lone surrogates) in %d lines, the first at byte %d; each is read as U+FFFD.",
            *(path, len(mended), mended[0]),
        )


def _whole(value: Any) -> Any:
    """A value of JSON with U+FFFD in place of each half of a character."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {_whole(name): _whole(item) for name, item in value.items()} if isinstance(value, dict) else value


def _rows(path: str) -> Iterator[tuple[int, Record]]:
    import pyarrow
    import pyarrow.parquet

    try:
        position = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    yield position, record
                    position += 1
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}); write it again or leave it out.") from error


# Data sets ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """A TensorFlow Datasets data set by name, read without TensorFlow: prepared as TFRecord or as array_record.

    Attributes:
      name: as in `tfds.load`, with config and version if wanted: "c4/en:3.1.0"; or the folder of a prepared version.
      data_dir: where it is, or None for TFDS's own default.
      splits: our split -> TFDS's, for sets that lack one: (("validation", "train[99%:]"), ("train", "train[:99%]")).
    """

    name: str
    data_dir: str | None = None
    splits: tuple[tuple[str, str], ...] = ()

    def _builder(self):
        import tensorflow_datasets as tfds

        try:
            if os.path.isdir(self.name):
                builder = tfds.builder_from_directory(self.name)
            else:
                builder = tfds.builder(self.name, data_dir=self.data_dir)
        except (tfds.core.registered.DatasetNotFoundError, AssertionError, ValueError) as error:
            raise ValueError(
                f"TFDS knows no data set {self.name!r} (TfdsSource.data_dir: {self.data_dir}): "
                f"{str(error).splitlines()[0]}"
            ) from error
        if not builder.info.splits:
            raise ValueError(
                f"The TFDS data set {self.name!r} is not prepared in {builder.data_dir}; prepare it once with "
                f"`tfds build {self.name}`."
            )
        return builder

    @override
    def shards(self, split: str) -> tuple[Shard, ...]:
        info = self._builder().info
        theirs = dict(self.splits).get(split, split)
        try:
            files = info.splits[theirs].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"The TFDS data set {self.name!r} has no split {theirs!r}; it has {', '.join(sorted(info.splits))}. "
                f"Map it with TfdsSource.splits."
            ) from error
        shards = []
        for file in files:
            path, skip, take = os.fspath(file.filename), int(file.skip), int(file.take)
            stat = os.stat(path)
            digest = fingerprint(info.full_name, path, stat.st_size, stat.st_mtime_ns, skip, take)
            shards.append(Shard(path, stat.st_size, digest, split, (path, skip, take)))
        return tuple(shards)

    @override
    def read(self, shard: Shard) -> Iterator[Record]:
        path, skip, take = shard.parts
        info = self._builder().info
        readers = {"array_record": _array_records, "tfrecord": _tf_records}
        if info.file_format.value not in readers:
            raise ValueError(
                f"The TFDS data set {self.name!r} is stored as {info.file_format.value}; convert it to one of "
                f"{', '.join(readers)} with `tfds convert_format`."
            )
        records = readers[info.file_format.value](path, skip)
        with _clear_errors(path):
            for record in itertools.islice(records, take if take >= 0 else None):
                example = info.features.deserialize_example_np(record)
                yield {name: _text(value) for name, value in example.items()}


def _array_records(path: str, skip: int = 0) -> Iterator[bytes]:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(path)
        for start in range(skip, reader.num_records(), 1024):
            yield from reader.read(start, min(start + 1024, reader.num_records()))
        reader.close()
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{path} is not a readable ArrayRecord file ({error}); make it again.") from error


def _tf_records(path: str, skip: int = 0) -> Iterator[bytes]:
    """The records of a TFRecord file: length (uint64), checksum, bytes, checksum. Checksums are not verified."""
    with open(path, "rb") as file:
        while head := file.read(12):
            size = int.from_bytes(head[:8], "little")
            # A length that is not one is found out before it is allocated.
            if size > _LINE_LIMIT or len(record := file.read(size)) < size or len(file.read(4)) < 4:
                raise ValueError(f"{path} ends inside a record; it is not a whole TFRecord file: prepare it again.")
            if skip:
                skip -= 1
            else:
                yield record


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


CARD = "task.json"  # of a folder of cached files: which there are


def shard_file(split: str, index: int, count: int) -> str:
    """Name of one of the `count` files of a cached split."""
    return f"{split}-{index:05d}-of-{count:05d}.array_record"


@dataclasses.dataclass(frozen=True)
class ArrayRecordSource(Source):
    """Files of records in the format of `jaxlm.data.records`: what tools/cache_tasks.py writes.

    Attributes:
      folder: holds `<split>-*.array_record` files; where it has a card (`CARD`), those that it names are read.
    """

    folder: str

    def _files(self, split: str) -> list[str]:
        folder = os.path.expanduser(self.folder)
        files = sorted(glob.glob(os.path.join(glob.escape(folder), f"{split}-*.array_record")))
        if os.path.exists(card := os.path.join(folder, CARD)):
            with open(card, encoding="utf-8") as file:
                count = json.load(file)["splits"].get(split, {}).get("shards", 0)
            files = [os.path.join(folder, shard_file(split, i, count)) for i in range(count)]
        if missing := [path for path in files if not os.path.exists(path)]:
            raise ValueError(
                f"The cached task in {self.folder!r} lacks the file {os.path.basename(missing[0])}; cache it again "
                f"with tools/cache_tasks.py."
            )
        if not files:
            raise ValueError(
                f"The cached task in {self.folder!r} has no split {split!r} (whole {split}-*.array_record files); "
                f"cache it with tools/cache_tasks.py."
            )
        return files

    @override
    def shards(self, split: str) -> tuple[Shard, ...]:
        shards = []
        for path in self._files(split):
            stat = os.stat(path)
            digest = fingerprint(path, stat.st_size, stat.st_mtime_ns)
            shards.append(Shard(path, stat.st_size, digest, split, (path,)))
        return tuple(shards)

    @override
    def read(self, shard: Shard) -> Iterator[Record]:
        with _clear_errors(shard.name):
            for record in _array_records(shard.parts[0]):
                yield decode_record(record)


@dataclasses.dataclass(frozen=True)
class InMemory(Source):
    """Records given as they are, for notebooks and tests.

    Attributes:
      train, validation: texts, or records of named fields.
    """

    train: tuple[str | Mapping[str, Any], ...]
    validation: tuple[str | Mapping[str, Any], ...] = ()

    @override
    def shards(self, split: str) -> tuple[Shard, ...]:
        _check_split(self, split, ("train", "validation"))
        records = self.train if split == "train" else self.validation
        if not records:
            raise ValueError(f"InMemory has nothing in its {split} split; give InMemory.{split}.")
        return (Shard(f"memory ({split})", len(records), fingerprint(records), split, ()),)

    @override
    def read(self, shard: Shard) -> Iterator[Record]:
        for record in self.train if shard.split == "train" else self.validation:
            yield {"text": record} if isinstance(record, str) else dict(record)
