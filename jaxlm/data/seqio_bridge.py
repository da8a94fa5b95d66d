"""The bridge to seqio: its tasks for us, our tasks and objectives for it. The only module that imports TensorFlow.

Theirs, here. `wrap("my_task", modules=("my_project.tasks",))` makes any registered seqio task or mixture a jaxlm one:
its source and the preprocessors before its CacheDatasetPlaceholder run once in TensorFlow, and the ids are cached like
those of any task (at first use, or with tools/cache_tasks.py). What stands after the placeholder (denoising,
packing, EOS) is the objective's and the loader's business here. `stream_loader` reads without a cache, as a fallback.

Ours, there. `register_with_seqio()` puts every registered jaxlm task and mixture into seqio's registries, for T5X and
whatever else reads those; `objective_preprocessors` are our objectives as seqio preprocessors. `register_questions`
is for tasks to evaluate (`jaxlm.evaluation.seqio_tasks`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, override

import numpy as np
import seqio
import tensorflow as tf

from jaxlm.architecture import Architecture
from jaxlm.data import packing, tasks
from jaxlm.data.cache import cache_directory, open_cache
from jaxlm.data.converters import Batch, feature_converter
from jaxlm.data.fingerprint import fingerprint, source_of
from jaxlm.data.randomness import ExampleGenerator, key_of
from jaxlm.data.sources import Record, Shard, Source
from jaxlm.data.vocabularies import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from jaxlm.objectives.base import Example, Objective, VocabularyInfo
from jaxlm.objectives.supervised import Eos

log = logging.getLogger("jaxlm.data")

# Theirs, here ---------------------------------------------------------------------------------------------------


def seqio_names(modules: tuple[str, ...] = ()) -> set[str]:
    """Names in seqio's registries, after importing the modules that fill them."""
    for module in modules:
        importlib.import_module(module)
    return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def _provider(name: str, modules: tuple[str, ...]) -> seqio.Task | seqio.Mixture:
    names = seqio_names(modules)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)[:10]
        raise ValueError(
            f"seqio has no task or mixture named {name!r}; nearest are {', '.join(near) or '(it has none)'}. Name the "
            f"module that registers it with `modules`."
        )
    return seqio.get_mixture_or_task(name)


def wrap(name: str, modules: tuple[str, ...] = (), vocabulary: Vocabulary | None = None) -> tasks.Task | tasks.Mixture:
    """A seqio task or mixture as a jaxlm one, under the same name.

    Args:
      name: in seqio's registries.
      modules: imported first; they register the task. Worker processes import them too.
      vocabulary: ours, where seqio's has no counterpart (PassThroughVocabulary).

    Raises:
      ValueError: there is no such task, or it does not yield ids of "targets" (and "inputs").
    """
    provider = _provider(name, modules)
    if isinstance(provider, seqio.Task):
        return _wrap_task(provider, modules, vocabulary)
    members = sorted(provider.tasks, key=lambda task: task.name)
    return tasks.Mixture(
        name, tuple((_wrap_task(task, modules, vocabulary), float(provider.get_rate(task))) for task in members)
    )


def _wrap_task(task: seqio.Task, modules: tuple[str, ...], vocabulary: Vocabulary | None) -> tasks.Task:
    if "targets" not in task.output_features:
        raise ValueError(
            f"The seqio task {task.name!r} has the features {', '.join(task.output_features)}; jaxlm's objectives read "
            f"'targets' (text) or 'inputs' and 'targets' (pairs), so add a preprocessor that names them so."
        )
    feature = task.output_features["targets"]
    vocabulary = vocabulary or vocabulary_from_seqio(feature.vocabulary)
    pairs = "inputs" in task.output_features and _has_inputs(task)
    source = SeqioSource(task.name, modules, pairs, feature.add_eos and not pairs, vocabulary)
    # The source yields ids, ended as they should be.
    ours = tasks.Feature(vocabulary, add_eos=False)
    return tasks.Task(task.name, source, {"inputs": ours, "targets": ours} if pairs else {"targets": ours})


def _has_inputs(task: seqio.Task) -> bool:
    """Whether the inputs hold anything: T5's pretraining tasks declare inputs and leave them empty."""
    for split in task.splits:
        for record in itertools.islice(_records(task, split, None), 8):
            if len(record.get("inputs", ())):
                return True
    return False


def _records(task: seqio.Task, split: str, shard_info: seqio.ShardInfo | None) -> Iterator[Record]:
    """What the task makes of its source up to its cache placeholder (to its end if it has none), unshuffled."""
    dataset = task.source.get_dataset(split=split, shuffle=False, shard_info=shard_info)
    try:
        if task.supports_caching:
            dataset = task.preprocess_precache(dataset, seed=0)
        else:
            dataset = task.preprocess_postcache(dataset, sequence_length=None, seed=0)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"The seqio task {task.name!r} cannot be read without sequence lengths ({error}); put a "
            f"seqio.CacheDatasetPlaceholder() before the preprocessors that need them."
        ) from error
    return dataset.as_numpy_iterator()


def vocabulary_from_seqio(vocabulary: seqio.Vocabulary) -> Vocabulary:
    """Our counterpart of a seqio vocabulary: the same ids.

    Raises:
      ValueError: there is none.
    """
    ours = None
    if isinstance(vocabulary, SeqioVocabulary):
        ours = vocabulary.vocabulary
    elif type(vocabulary) is seqio.ByteVocabulary:
        ours = ByteVocabulary(extra_ids=vocabulary.extra_ids)
    elif type(vocabulary) is seqio.SentencePieceVocabulary:
        path = _local(vocabulary.sentencepiece_model_file)
        ours = SentencePieceVocabulary(path, extra_ids=vocabulary.extra_ids)
        # seqio's sentinels stand for a space as well.
        sentinels = [vocabulary.tokenizer.PieceToId(f"▁<extra_id_{i}>") for i in range(vocabulary.extra_ids)]
        # reverse_extra_ids=False or an overridden normaliser make another vocabulary of the same file.
        text = "A naïve  test, 1½ <x>\n"
        same = list(ours.info().sentinel_ids) == sentinels and ours.encode(text).tolist() == vocabulary.encode(text)
        ours = ours if same else None
    if ours is None or ours.size != vocabulary.vocab_size:
        raise ValueError(f"There is no jaxlm vocabulary with the ids of {vocabulary}; pass `vocabulary` to wrap().")
    return ours


def _local(path: str) -> str:
    """A model file that may lie where only TensorFlow can read (gs://), copied to the cache folder."""
    if os.path.exists(path):
        return path
    data = tf.io.gfile.GFile(path, "rb").read()
    copy = os.path.join(cache_directory(), "vocabularies", f"{fingerprint(data)}.model")
    if not os.path.exists(copy):
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        with open(f"{copy}.partial", "wb") as file:
            file.write(data)
        os.replace(f"{copy}.partial", copy)
    return copy


@dataclasses.dataclass(frozen=True)
class SeqioSource(Source):
    """The ids that a seqio task yields, read through TensorFlow. Made by `wrap`.

    Attributes:
      task: name in seqio's registry.
      modules: imported first, also in worker processes.
      pairs: whether "inputs" are kept.
      append_eos: whether texts get EOS at their end (unless they have it). Pairs lose theirs: the supervised objective
        decides which texts end with it.
      vocabulary: encodes fields that the task leaves as text, and knows EOS.
    """

    task: str
    modules: tuple[str, ...]
    pairs: bool
    append_eos: bool
    vocabulary: Vocabulary

    def _task(self) -> seqio.Task:
        return _provider(self.task, self.modules)

    @override
    def shards(self, split: str) -> tuple[Shard, ...]:
        task = self._task()
        if split not in task.splits:
            raise ValueError(f"The seqio task {self.task!r} has no split {split!r}; it has {', '.join(task.splits)}.")
        names = list(task.source.list_shards(split)) or [split]
        definition = fingerprint(self.task, [_definition(p) for p in task.preprocessors], self.pairs, self.append_eos)
        shards = []
        for i, name in enumerate(names):
            stat = tf.io.gfile.stat(name) if tf.io.gfile.exists(name) else None
            size = stat.length if stat else 1
            digest = fingerprint(definition, name, size, stat.mtime_nsec if stat else 0)
            shards.append(Shard(name, size, digest, split, (i, len(names))))
        return tuple(shards)

    @override
    def read(self, shard: Shard) -> Iterator[Record]:
        info = seqio.ShardInfo(*shard.parts) if shard.parts[1] > 1 else None
        for record in _records(self._task(), shard.split, info):
            yield self.prepared(record)

    def prepared(self, record: Record) -> Record:
        """A record of seqio's as our tasks want it: int32 ids, ended as they should be."""
        eos = self.vocabulary.info().eos_id
        prepared = {}
        for name in ("inputs", "targets") if self.pairs else ("targets",):
            if name not in record:
                raise ValueError(
                    f"The seqio task {self.task!r} yields records of {', '.join(sorted(record))}, without {name!r}; "
                    f"name it with seqio.preprocessors.rekey."
                )
            ids = record[name]
            if isinstance(ids, bytes):
                ids = self.vocabulary.encode(ids.decode())
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise ValueError(
                    f"The seqio task {self.task!r} yields {name!r} of {ids.dtype} with {ids.ndim} dimensions; texts "
                    f"are ids of one dimension here."
                )
            ids = ids.astype(np.int32)
            ended = len(ids) > 0 and ids[-1] == eos
            if self.pairs and ended:
                ids = ids[:-1]
            elif self.append_eos and not ended and len(ids):
                ids = np.append(ids, np.int32(eos))
            prepared[name] = ids
        return prepared


def _definition(part: object) -> object:
    """Something about a preprocessor, or a setting of one, that changes when it does, as far as that can be told."""
    try:
        return fingerprint(part)
    except TypeError:
        if isinstance(part, functools.partial):
            return [_definition(inner) for inner in (part.func, *part.args, *itertools.chain(*part.keywords.items()))]
        return source_of(part) if inspect.isfunction(part) else type(part).__qualname__


# Without a cache ------------------------------------------------------------------------------------------------


def stream_loader(
    mixture: str,
    *,
    feature_lengths: Mapping[str, int],
    objective: Objective,
    architecture: Architecture,
    batch_size: int,
    modules: tuple[str, ...] = (),
    vocabulary: Vocabulary | None = None,
    split: str = "train",
    host_index: int = 0,
    host_count: int = 1,
    seed: int = 0,
    shuffle_buffer: int = 1000,
    look_ahead: int = 256,
) -> StreamLoader:
    """Batches straight from seqio, without a cache: a fallback for a first look at a large task.

    It resumes by reading again, and skipping, all that was read before, and only on the same number of hosts; a cached
    task does neither. Examples are packed first-fit.

    Args:
      mixture: name in seqio's registries.
      feature_lengths: tokens of a row, {"inputs": N, "targets": M}.
      objective, architecture: as for `jaxlm.data.loader.build_loader`.
      batch_size: rows in a batch, of all hosts together.
      modules, vocabulary: as for `wrap`.
      split: of the tasks; all are read endlessly.
      host_index, host_count: which part of the data is this host's.
      seed: of the order, the mixture and the corruption.
      shuffle_buffer: examples of a task among which the next is drawn.
      look_ahead: examples in a window of packing.
    """
    if refusal := objective.refuses(architecture):
        raise ValueError(refusal)
    if batch_size % host_count:
        raise ValueError(f"A batch of {batch_size} rows cannot be divided among {host_count} hosts.")
    log.warning(
        "%s is streamed from seqio without a cache: a run resumes by skipping what it had read, and only on %d "
        "host(s). Cache it with tools/cache_tasks.py for long runs.",
        mixture,
        host_count,
    )
    wrapped = wrap(mixture, modules, vocabulary)
    return StreamLoader(
        wrapped,
        feature_lengths,
        objective.fit(feature_lengths, architecture),
        architecture,
        split,
        (batch_size // host_count, host_index, host_count),
        (seed, shuffle_buffer, look_ahead),
    )


class StreamLoader(Iterator[Batch]):
    """What `stream_loader` returns; `jaxlm.data.loader.Loader`'s methods.

    Attributes:
      vocabulary, dataset_names, features, objective: as a `Loader`'s.
    """

    def __init__(self, wrapped, lengths, objective, architecture, split, hosts, options):
        self._mixture = wrapped
        self._tasks = wrapped.tasks() if isinstance(wrapped, tasks.Mixture) else (wrapped,)
        self._rows, self._host, self._hosts = hosts
        self._seed, self._buffer, self._look_ahead = options
        self._split, self.objective = split, objective
        self.vocabulary = self._tasks[0].output_features["targets"].vocabulary
        self._info = self.vocabulary.info()
        self._converter = feature_converter(architecture, lengths, self._info.pad_id)
        self._raw_length = objective.raw_length(lengths, architecture)
        self._limits = {"inputs": lengths.get("inputs", 0), "targets": lengths["targets"]}
        self.dataset_names = tuple(task.name for task in self._tasks)
        self.features = {n: ((self._rows, *shape), t) for n, (shape, t) in self._converter.features.items()}
        self._step = 0
        # Windows read, rows of the current one given, step at which it was packed.
        self._position = (0, 0, 0)
        self._iterator: Iterator | None = None

    def _documents(self) -> Iterator[tuple[int, Record]]:
        """(data set, record) of this host, endless."""
        datasets = []
        for i, task in enumerate(self._tasks):
            source: SeqioSource = task.source
            provider = source._task()
            many = len(provider.source.list_shards(self._split)) >= self._hosts > 1
            info = seqio.ShardInfo(self._host, self._hosts) if many else None
            dataset = provider.source.get_dataset(self._split, shuffle=False, shard_info=info)
            if self._hosts > 1 and not many:
                dataset = dataset.shard(self._hosts, self._host)
            process = (
                provider.preprocess_precache
                if provider.supports_caching
                else (functools.partial(provider.preprocess_postcache, sequence_length=None))
            )
            dataset = process(dataset, seed=0).repeat().shuffle(self._buffer, seed=self._seed)
            names = ("inputs", "targets") if source.pairs else ("targets",)

            def keep(record, names=names, i=i):
                return {"dataset": i} | {
                    name: record.get(name, tf.zeros(0, tf.int32)) for name in ("inputs", *names[-1:])
                }

            datasets.append(dataset.map(keep))
        shares = [1.0]
        if isinstance(self._mixture, tasks.Mixture):
            by_name = self._mixture.shares(0, {})
            shares = [by_name[name] for name in self.dataset_names]
        mixed = tf.data.Dataset.sample_from_datasets(datasets, shares, seed=self._seed)
        for record in mixed.as_numpy_iterator():
            i = int(record["dataset"])
            yield i, self._tasks[i].source.prepared(record)

    def _raw(self) -> Iterator[tuple[int, Record]]:
        """(data set, raw example): pairs cut to the row, texts in pieces that fill it."""
        for i, record in self._documents():
            if "inputs" in record:
                pair_lengths = getattr(self.objective, "pair_lengths", dict)(self._limits)
                yield i, {name: ids[: pair_lengths[name]] for name, ids in record.items()}
                continue
            pieces = -(-len(record["targets"]) // self._raw_length)
            for piece in np.array_split(record["targets"], pieces) if pieces else ():
                yield i, {"targets": piece}

    def _batches(self) -> Iterator[tuple[Batch, tuple[int, int, int]]]:
        generator, stream = ExampleGenerator(self._seed), key_of("seqio", self._host, self._hosts)
        (window, used, packed_at), step = self._position, self._step
        raw = itertools.islice(self._raw(), window * self._look_ahead, None)
        rows: list[list[Example]] = []
        while True:
            examples = []
            for j, (i, record) in enumerate(itertools.islice(raw, self._look_ahead)):
                rng = generator.at(stream, window * self._look_ahead + j, 0)
                example = self.objective.corrupt(record, self._info, rng, step=packed_at)
                example.dataset = i
                examples.append(example)
            sizes = np.array([self._converter.size(example) for example in examples], np.int64)
            packed = packing.pack_window(sizes, self._converter.capacity)
            for number, row in enumerate(packed[used:], start=used + 1):
                rows.append([examples[i] for i in row])
                if len(rows) == self._rows:
                    step += 1
                    yield self._converter.batch(rows), (window, number, packed_at)
                    rows = []
            window, used, packed_at = window + 1, 0, step

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._batches()
        batch, self._position = next(self._iterator)
        self._step += 1
        return batch

    def close(self) -> None:
        """Forgets what is read ahead."""
        self._iterator = None

    def state(self) -> dict[str, Any]:
        """The position after the last batch taken, JSON-able."""
        return {"seqio": self._identity(), "step": self._step, "position": list(self._position)}

    def _identity(self) -> dict[str, Any]:
        return {"mixture": self._mixture.name, "split": self._split, "seed": self._seed, "hosts": self._hosts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a position by skipping everything before it.

        Raises:
          ValueError: the position is another data set's, or another number of hosts'.
        """
        ours, theirs = self._identity(), state.get("seqio", {})
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"The saved data position is of {name} {theirs.get(name)!r}, here {value!r}; a stream from seqio "
                    f"resumes only as it was. Cache the task with tools/cache_tasks.py to be free of that."
                )
        self._iterator, self._step, self._position = None, state["step"], tuple(state["position"])


# Ours, there ----------------------------------------------------------------------------------------------------


class SeqioVocabulary(seqio.Vocabulary):
    """One of our vocabularies as seqio's: the same ids, also in a tf.data graph (through numpy)."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        super().__init__(extra_ids=0)  # our size counts the sentinels

    @property
    @override
    def bos_id(self) -> int | None:
        return self.vocabulary.info().bos_id

    @property
    @override
    def eos_id(self) -> int:
        return self.vocabulary.info().eos_id

    @property
    @override
    def unk_id(self) -> int | None:
        return self.vocabulary.info().unk_id

    @property
    @override
    def _base_vocab_size(self) -> int:
        return self.vocabulary.size

    @override
    def _encode(self, s: str) -> list[int]:
        return self.vocabulary.encode(s).tolist()

    @override
    def _decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(ids)

    @override
    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:
            # Bytes in a graph, an array of one object when eager.
            return self.vocabulary.encode(np.array(text, object).item().decode())

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    @override
    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        text = tf.numpy_function(
            lambda a: self.vocabulary.decode(a.tolist()).encode(), [ids], tf.string, stateful=False
        )
        text.set_shape([])
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeqioVocabulary) and other.vocabulary == self.vocabulary


class _TaskSource(seqio.DataSource):
    """The cached ids of one of our tasks, as a seqio source."""

    def __init__(self, task: tasks.Task, splits: tuple[str, ...]):
        self._task = task
        super().__init__(splits=splits, caching_permitted=False)

    @property
    @override
    def supports_arbitrary_sharding(self) -> bool:
        return False

    @override
    def list_shards(self, split: str) -> list[str]:
        return [split]

    @override
    def num_input_examples(self, split: str) -> int:
        return open_cache(self._task, split).num_examples

    @override
    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
        del unused
        if shard_info and shard_info.num_shards > 1:
            raise ValueError(f"{self._task.name!r} is one shard to seqio; it divides examples among hosts by itself.")
        cache = open_cache(self._task, split)
        names = cache.features

        def slice_of(i: np.ndarray) -> list[np.ndarray]:
            bounds = [cache.offsets(name)[i : i + 2] for name in names]
            return [cache.ids(name)[a:b].astype(np.int32) for name, (a, b) in zip(names, bounds)]

        def example(i: tf.Tensor) -> dict[str, tf.Tensor]:
            parts = tf.numpy_function(slice_of, [i], [tf.int32] * len(names), stateful=False)
            for part in parts:
                part.set_shape([None])
            return dict(zip(names, parts))

        indices = tf.data.Dataset.range(cache.num_examples)
        if shuffle:  # of everything, where seqio's own sources shuffle files
            indices = indices.shuffle(cache.num_examples, seed=seed)
        return indices.map(example)


def seqio_name(name: str) -> str:
    """A task's name as seqio allows it: what is neither letter nor digit nor one of "._:#" becomes "_", as T0's do."""
    return re.sub(r"[^\w.:#]+", "_", name)


def _seqio_names(names: Iterable[str]) -> dict[str, str]:
    """{name: seqio's}, all different."""
    found: dict[str, str] = {}
    for name in names:
        if (same := found.setdefault(seqio_name(name), name)) != name:
            raise ValueError(f"{same!r} and {name!r} have the same name in seqio, {seqio_name(name)!r}; rename one.")
    return {name: theirs for theirs, name in found.items()}


def register_with_seqio(
    names: Sequence[str] | None = None,
    *,
    objective: Objective | None = None,
    architecture: Architecture = Architecture.ENCODER_DECODER,
    splits: tuple[str, ...] = ("train", "validation"),
) -> list[str]:
    """Puts our registered tasks and mixtures into seqio's registries; known ones are left alone.

    They keep their names, but for characters that seqio does not allow in them (`seqio_name`): the task
    "copa/choose one" of a prompted mixture is "copa_choose_one" there.

    seqio reads the ids from our cache, which is built at first use.

    Args:
      names: which; None: all of them.
      objective: corrupts the text in seqio's pipeline, see `objective_preprocessors`; None leaves {"targets": text}, or
        {"inputs", "targets"} of pairs.
      architecture: what the objective corrupts for.
      splits: that the tasks have.

    Returns:
      The names that seqio knows now.

    Raises:
      ValueError: a mixture's rates change over training, which seqio cannot express, or two names become one.
    """
    found = tasks.registered() if names is None else {name: tasks.get(name) for name in names}
    mixtures = {name: found[name] for name in found if isinstance(found[name], tasks.Mixture)}
    for mixture in mixtures.values():
        if mixture.schedules():
            raise ValueError(
                f"The rates of mixture {mixture.name!r} change over training, which seqio's cannot; leave it out of "
                f"`names`."
            )
    members = {t.name: t for p in found.values() for t in (p.tasks() if isinstance(p, tasks.Mixture) else (p,))}
    theirs = _seqio_names([*members, *mixtures])
    for task in members.values():
        if theirs[task.name] in seqio.TaskRegistry.names():
            continue
        features = {
            key: seqio.Feature(SeqioVocabulary(feature.vocabulary), add_eos=feature.add_eos)
            for key, feature in task.output_features.items()
        }
        if objective is not None:
            features = {"inputs": features.get("inputs", features["targets"]), "targets": features["targets"]}
        seqio.TaskRegistry.add(
            theirs[task.name],
            source=_TaskSource(task, splits),
            preprocessors=list(objective_preprocessors(objective, architecture)) if objective else [],
            output_features=features,
            metric_fns=list(task.metric_fns),
        )
    for mixture in mixtures.values():
        if theirs[mixture.name] not in seqio.MixtureRegistry.names():
            shares = functools.cache(functools.partial(_shares, mixture))  # each of hundreds of tasks asks for its own
            rates = [(theirs[t.name], functools.partial(_rate, shares, t.name)) for t in mixture.tasks()]
            seqio.MixtureRegistry.add(theirs[mixture.name], rates)
    return sorted(theirs.values())


def _rate(shares: Callable[[], dict[str, float]], name: str, task: seqio.Task) -> float:
    del task  # seqio's, of another name perhaps
    return shares()[name]


def _shares(mixture: tasks.Mixture) -> dict[str, float]:
    return mixture.shares(0, {member.name: open_cache(member, "train").num_examples for member in mixture.tasks()})


def objective_preprocessors(
    objective: Objective, architecture: Architecture = Architecture.ENCODER_DECODER
) -> tuple[Callable[..., tf.data.Dataset], ...]:
    """An objective as seqio preprocessors, to stand after tokenisation: concatenate and split, then corrupt.

    Pairs ("inputs" with something in them) are not concatenated. The vocabulary is that of the task's "targets", which
    must be one that `vocabulary_from_seqio` knows. Corruption draws from seqio's seed and the text itself, so that
    hosts that read other text with the same seed draw other noise. EOS is the objective's business: leave seqio's
    append_eos out.

    Raises:
      ValueError: the objective weighs its targets or labels its inputs, which seqio's features cannot express.
    """
    if refusal := objective.refuses(architecture):
        raise ValueError(refusal)

    def info_of(output_features: Mapping[str, seqio.Feature]) -> VocabularyInfo:
        return vocabulary_from_seqio(output_features["targets"].vocabulary).info()

    def concat_and_split(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
        if "inputs" in dataset.element_spec:
            return dataset
        fitted = objective.fit(sequence_length, architecture)
        length = fitted.raw_length(sequence_length, architecture)

        def split(text: tf.Tensor) -> tf.data.Dataset:
            starts = tf.data.Dataset.range(0, tf.size(text, tf.int64), length)
            return starts.map(lambda start: {"targets": text[start : start + length]})

        # 128 documents become one text, as in T5's reduce_concat_tokens; what is left of it is a shorter example.
        texts = dataset.map(lambda record: record["targets"]).ragged_batch(128)
        return texts.flat_map(lambda ragged: split(ragged.flat_values))

    @seqio.map_over_dataset(num_seeds=1)
    def corrupt(record, sequence_length, output_features, seed):
        info, fitted = info_of(output_features), objective.fit(sequence_length, architecture)
        names = [name for name in ("inputs", "targets") if name in record]

        def in_numpy(seed: np.ndarray, *texts: np.ndarray) -> list[np.ndarray]:
            content = zlib.crc32(b"".join(text.tobytes() for text in texts))
            low, high = (int(part) & 0xFFFFFFFF for part in seed)
            rng = np.random.Generator(np.random.Philox(key=[low | high << 32, content]))
            example = fitted.corrupt({n: t.astype(np.int32) for n, t in zip(names, texts)}, info, rng)
            if example.weights is not None or example.segments is not None:
                raise ValueError(
                    f"{objective.name} weighs its targets, which seqio's features cannot express; train it with "
                    f"jaxlm's own loader."
                )
            return [example.inputs, example.targets]

        out = tf.numpy_function(in_numpy, [seed, *(record[name] for name in names)], [tf.int32, tf.int32])
        for part in out:
            part.set_shape([None])
        return {name: part for name, part in zip(("inputs", "targets"), out) if name in output_features}

    return concat_and_split, corrupt


# Tasks to evaluate ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SeqioQuestions:
    """A task to evaluate as seqio has it: rows of {"inputs", "targets"}, and functions that make metrics of answers.

    Attributes:
      name: of the task.
      split: the one that it has.
      rows: gives the rows, each {"inputs": text, "targets": text} and "idx", "is_correct" as T5's rank
        classification has them; called when the task is first read.
      metric_fns: functions (targets, scores) or (targets, predictions), see seqio. What they are given as targets is
        (idx, number of target tokens) of each row.
    """

    name: str
    split: str
    rows: Callable[[], Sequence[Mapping[str, Any]]]
    metric_fns: tuple[Callable[..., Mapping[str, float]], ...]


def register_questions(
    questions: Sequence[SeqioQuestions], vocabulary: Vocabulary, *, eos: Eos, mixture: str | None = None
) -> list[str]:
    """Puts tasks to evaluate into seqio's registries.

    Args:
      questions: the tasks.
      vocabulary: ids of inputs and targets, each tokenised for itself.
      eos: which of the two end with the end-of-text id.
      mixture: name of a mixture of all of them, for `seqio.Evaluator`; None makes none.

    Returns:
      the names that seqio gives the tasks.

    Raises:
      ValueError: seqio has a task or mixture of one of these names already.
    """
    theirs = _seqio_names([*(task.name for task in questions), *([mixture] if mixture is not None else [])])
    if known := sorted(seqio_names() & set(theirs.values())):
        raise ValueError(f"seqio has a task or mixture named {known[0]!r} already; give this one another name.")
    ours = SeqioVocabulary(vocabulary)
    features = {
        "inputs": seqio.Feature(ours, add_eos=eos is Eos.BOTH, required=False),
        "targets": seqio.Feature(ours, add_eos=eos is not Eos.NONE),
    }
    for task in questions:
        seqio.TaskRegistry.add(
            theirs[task.name],
            source=seqio.FunctionDataSource(functools.partial(_questions, task), splits=(task.split,)),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=features,
            postprocess_fn=_answer,
            metric_fns=list(task.metric_fns),
        )
    names = [theirs[task.name] for task in questions]
    if mixture is not None:
        seqio.MixtureRegistry.add(theirs[mixture], names, default_rate=1.0)
    return names


def _questions(task: SeqioQuestions, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del split, shuffle_files, seed
    rows = task.rows()
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [row["inputs"] for row in rows],
            "targets": [row["targets"] for row in rows],
            "idx": np.array([row["idx"] for row in rows], np.int32),
            "is_correct": [row["is_correct"] for row in rows],
        }
    )


def _answer(answer: Any, example: Mapping[str, Any], is_target: bool = False) -> Any:
    return (tuple(map(int, example["idx"])), len(example["targets"])) if is_target else answer
