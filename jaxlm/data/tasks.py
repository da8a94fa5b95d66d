"""Tasks and mixtures in seqio's terms, declared once, without TensorFlow.

A task says where records come from, how they become named texts, and how these become ids. What is hidden and
predicted is the objective's business, so one task serves language modelling, denoising and the rest:

    books = text_task("books", TextFiles("~/books"), SentencePieceVocabulary("books.model"))
    both = Mixture("both", ((books, 3.0), ("python_stdlib", Piecewise((0, 10_000), (1.0, 0.1)))))

`register` gives a task or mixture to everyone by name (`get`), as seqio's TaskRegistry and MixtureRegistry do;
`jaxlm.data.seqio_bridge` hands the same objects to seqio, and seqio's to `get`'s users.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np

from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.sources import Record, Source
from jaxlm.data.vocabularies import Vocabulary
from jaxlm.piecewise import Piecewise, at_step


class StreamPreprocessor(Protocol):
    """A preprocessor that sees all records of a shard, one after the other."""

    def stream(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records as they go on."""


class ByExamples(Protocol):
    """A mixing rate that depends on the number of examples."""

    def __call__(self, examples: int) -> float:
        """The rate of a task or mixture of so many examples."""


# Makes of a record another one, several, or none (None). It must be picklable and deterministic.
Preprocessor = Callable[[Record], Record | Iterable[Record] | None] | StreamPreprocessor


@dataclasses.dataclass(frozen=True)
class Feature:
    """How a named text becomes ids (seqio.Feature).

    Attributes:
      vocabulary: turns text into ids. Arrays of integers, as cached tasks have, are taken for ids as they are.
      add_eos: end each text with EOS. For pretraining text it separates documents. Objectives that write targets of
        their own (span corruption, supervised pairs) end those themselves.
      required: a record without this field is an error; otherwise it gives no ids.
    """

    vocabulary: Vocabulary
    add_eos: bool = True
    required: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
    """A named data set: source, preprocessors, features (seqio.Task).

    Attributes:
      name: unique; also keys the randomness of its examples, so that a task draws the same noise in any mixture.
      source: where records come from.
      output_features: {"targets": Feature} for text, {"inputs": Feature, "targets": Feature} for pairs.
      preprocessors: text to text, in order; see `rekey` below.
      metric_fns: functions (targets, predictions) -> {name: value}, for evaluation.
    """

    name: str
    source: Source
    output_features: Mapping[str, Feature]
    preprocessors: tuple[Preprocessor, ...] = ()
    metric_fns: tuple[Callable[..., Mapping[str, float]], ...] = ()

    def __post_init__(self):
        if set(self.output_features) not in ({"targets"}, {"inputs", "targets"}):
            raise ValueError(
                f"Task {self.name!r} has the features {sorted(self.output_features)}; a task has 'targets' (text), or "
                f"'inputs' and 'targets' (pairs)."
            )

    def texts(self, records: Iterable[Record]) -> Iterator[Record]:
        """Records as the preprocessors leave them."""
        for preprocess in self.preprocessors:
            records = _apply(preprocess, records)
        yield from records

    def encode(self, records: list[Record]) -> list[dict[str, np.ndarray]]:
        """Ids of preprocessed records, {feature: int32 [N]} each; records without any text are left out.

        Raises:
          ValueError: a required field is missing or of a wrong type.
        """
        columns = {}
        for name, feature in self.output_features.items():
            values = [self._value(record, name, feature) for record in records]
            texts = [i for i, value in enumerate(values) if isinstance(value, str)]
            for i, ids in zip(texts, feature.vocabulary.encode_batch([values[i] for i in texts])):
                values[i] = np.append(ids, np.int32(feature.vocabulary.info().eos_id)) if feature.add_eos else ids
            columns[name] = values

        def has_text(i: int, name: str, feature: Feature) -> bool:
            # An EOS that was added here is no text.
            return len(columns[name][i]) > (isinstance(records[i].get(name), str | bytes) and feature.add_eos)

        full = [i for i in range(len(records)) if any(has_text(i, *f) for f in self.output_features.items())]
        return [{name: column[i] for name, column in columns.items()} for i in full]

    def _value(self, record: Record, name: str, feature: Feature) -> str | np.ndarray:
        value = record.get(name)
        if value is None and not feature.required:
            return np.zeros(0, np.int32)
        if isinstance(value, bytes):
            value = value.decode()
        if isinstance(value, str):
            return value
        ids = np.asarray(value) if isinstance(value, (np.ndarray, list)) else None
        if ids is not None and ids.ndim == 1 and (ids.dtype.kind in "iu" or not ids.size):
            if ids.size and not 0 <= ids.min() <= ids.max() < feature.vocabulary.size:
                raise ValueError(
                    f"Task {self.name!r} has ids up to {ids.max()} in {name!r}, but its vocabulary has "
                    f"{feature.vocabulary.size}; was it cached with another vocabulary?"
                )
            return ids.astype(np.int32)
        found = f"it has {', '.join(sorted(record))}" if value is None else f"it is {type(value).__name__}, not text"
        raise ValueError(
            f"A record of task {self.name!r} gives no {name!r} ({found}); name the right field with "
            f"preprocessors=(Rekey({{'{name}': '<field>'}}),)."
        )


def _apply(preprocess: Preprocessor, records: Iterable[Record]) -> Iterator[Record]:
    if hasattr(preprocess, "stream"):
        yield from preprocess.stream(records)
        return
    for record in records:
        result = preprocess(record)
        if isinstance(result, Mapping):
            yield result
        elif result is not None:
            yield from result


@dataclasses.dataclass(frozen=True)
class Rekey:
    """Renames fields (seqio.preprocessors.rekey): `key_map` is {new name: old name}; other fields go."""

    key_map: Mapping[str, str]

    def __call__(self, record: Record) -> Record:
        """The record with the fields of `key_map` alone."""
        missing = [old for old in self.key_map.values() if old not in record]
        if missing:
            raise ValueError(
                f"Rekey finds no field {missing[0]!r} in a record with the fields {', '.join(sorted(record))}; name "
                f"one of those."
            )
        return {new: record[old] for new, old in self.key_map.items()}


def text_task(
    name: str,
    source: Source,
    vocabulary: Vocabulary,
    text_field: str = "text",
    preprocessors: tuple[Preprocessor, ...] = (),
) -> Task:
    """A task of plain text: documents end with EOS.

    Args:
      name: of the task.
      source: its records.
      vocabulary: ids.
      text_field: the field of a record that holds the text (files of plain text: "text").
      preprocessors: of records as the source gives them, such as `decontamination.Decontaminate`.
    """
    return Task(name, source, {"targets": Feature(vocabulary)}, (*preprocessors, Rekey({"targets": text_field})))


def pairs_task(
    name: str,
    source: Source,
    vocabulary: Vocabulary,
    inputs_field: str = "inputs",
    targets_field: str = "targets",
    preprocessors: tuple[Preprocessor, ...] = (),
) -> Task:
    """A task of inputs and targets; the `supervised` objective ends targets with EOS when it lays them out.

    Args:
      name: of the task.
      source: its records.
      vocabulary: ids.
      inputs_field, targets_field: the fields of a record that hold the two texts.
      preprocessors: of records as the source gives them, such as `decontamination.Decontaminate`.
    """
    feature = Feature(vocabulary, add_eos=False)
    key_map = {"inputs": inputs_field, "targets": targets_field}
    return Task(name, source, {"inputs": feature, "targets": feature}, (*preprocessors, Rekey(key_map)))


@dataclasses.dataclass(frozen=True)
class ExamplesRate:
    """A rate from the number of examples: min(examples * scale, maximum) ** (1 / temperature).

    seqio.mixing_rate_num_examples; with a maximum it is examples-proportional mixing with a cap, and with a
    temperature it is temperature-scaled mixing (Raffel et al. 2020, arXiv 1910.10683, section 3.5.2).
    """

    maximum: int | None = None
    scale: float = 1.0
    temperature: float = 1.0

    def __call__(self, examples: int) -> float:
        """The rate of a task or mixture of so many examples."""
        rate = examples * self.scale
        return (rate if self.maximum is None else min(rate, self.maximum)) ** (1 / self.temperature)


Rate = float | Piecewise | ByExamples


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Tasks with rates (seqio.Mixture).

    Attributes:
      name: unique.
      tasks_and_rates: ((task or mixture or the name of one, rate), ...). Rates are relative and count examples: pairs,
        documents or pieces of documents, however many share a row; with `Packing.CONCAT_AND_SPLIT`, where rows are cut
        anywhere, they count rows. A `Piecewise` rate is a function of the training step. A mixture inside has this
        share as a whole, divided by its own rates. A task that occurs twice has the sum.
    """

    name: str
    tasks_and_rates: tuple[tuple[Task | Mixture | str, Rate], ...]

    def tasks(self) -> tuple[Task, ...]:
        """All tasks, each once, in the order they first appear."""
        found: dict[str, Task] = {}
        for member, _ in self.tasks_and_rates:
            member = resolve(member)
            for task in member.tasks() if isinstance(member, Mixture) else (member,):
                if not _same(found.setdefault(task.name, task), task):
                    raise ValueError(f"Mixture {self.name!r} has two different tasks named {task.name!r}; rename one.")
        if not found:
            raise ValueError(f"Mixture {self.name!r} has no tasks; give tasks_and_rates=((task, rate), ...).")
        return tuple(found.values())

    def rates(self, examples: Mapping[str, int]) -> tuple[tuple[Task | Mixture, float | Piecewise], ...]:
        """The members with their rates, those that follow the number of examples worked out.

        Args:
          examples: number of examples of each task.
        """
        found = []
        for member, rate in self.tasks_and_rates:
            member = resolve(member)
            if callable(rate) and not isinstance(rate, Piecewise):
                tasks = member.tasks() if isinstance(member, Mixture) else (member,)
                rate = rate(sum(examples[task.name] for task in tasks))
            found.append((member, rate))
        return tuple(found)

    def shares(self, step: int, examples: Mapping[str, int]) -> dict[str, float]:
        """Share of each task at a training step, summing to 1.

        Args:
          step: training step.
          examples: number of examples of each task, for `ExamplesRate`.
        """
        shares = dict.fromkeys((task.name for task in self.tasks()), 0.0)
        for member, rate in self.rates(examples):
            inside = member.shares(step, examples) if isinstance(member, Mixture) else {member.name: 1.0}
            rate = at_step(rate, step)
            if rate < 0:
                raise ValueError(
                    f"Mixture {self.name!r} gives {member.name!r} the rate {rate} at step {step}; use >= 0."
                )
            for name, share in inside.items():
                shares[name] += rate * share
        total = sum(shares.values())
        if not total > 0:
            raise ValueError(f"The rates of mixture {self.name!r} are all 0 at step {step}; one must be positive.")
        return {name: share / total for name, share in shares.items()}

    def schedules(self) -> tuple[Piecewise, ...]:
        """Every rate that changes over training, also of mixtures inside."""
        found = [rate for _, rate in self.tasks_and_rates if isinstance(rate, Piecewise)]
        for member, _ in self.tasks_and_rates:
            member = resolve(member)
            found += member.schedules() if isinstance(member, Mixture) else ()
        return tuple(found)


def _same(a: Task | Mixture, b: Task | Mixture) -> bool:
    return a is b or fingerprint(a) == fingerprint(b)


_REGISTRY: dict[str, Task | Mixture] = {}


def register(task: Task | Mixture) -> Task | Mixture:
    """Makes a task or mixture known by its name, and returns it.

    Raises:
      ValueError: another one has that name.
    """
    if not _same(_REGISTRY.setdefault(task.name, task), task):
        raise ValueError(f"There is another task or mixture named {task.name!r}; choose another name.")
    return task


def registered() -> Mapping[str, Task | Mixture]:
    """All tasks and mixtures by name."""
    import jaxlm.data.catalog  # noqa: F401  registers what jaxlm brings

    return dict(_REGISTRY)


def get(name: str) -> Task | Mixture:
    """The task or mixture of that name.

    Raises:
      ValueError: there is none; the message gives the nearest names.
    """
    known = registered()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)[:10]
        raise ValueError(
            f"There is no task or mixture named {name!r}; nearest are {', '.join(near)}. Import the module that "
            f"registers it; for a task of seqio's include gin_configs/data/seqio.gin (jaxlm.data.seqio_bridge.wrap)."
        )
    return known[name]


def resolve(task: Task | Mixture | str) -> Task | Mixture:
    """A task or mixture, looked up if given by name."""
    return get(task) if isinstance(task, str) else task
