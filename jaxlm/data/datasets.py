"""The data sets of a loader, opened: everything that makes an example or a row of them, without any position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.data import cache as caches
from jaxlm.data.config import DataConfig, Packing
from jaxlm.data.converters import feature_converter
from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.mixing import Clock, Drawn, Mixer
from jaxlm.data.randomness import ExampleGenerator, key_of, permute
from jaxlm.data.rows import Examples, Plan, Raw, RowSet, Singles, Windows, plan_rows
from jaxlm.data.tasks import Mixture, Task, resolve
from jaxlm.data.vocabularies import Vocabulary
from jaxlm.objectives.base import Example, Objective

_TRIES = 8  # of an objective on a text: what it does may be left to chance


class DataSets:
    """The tasks of a mixture with their caches, the objective and the converter.

    Attributes:
      config, split, one_pass: as asked for.
      mixture, tasks: what is read; `tasks` in the order that `dataset_ids` index.
      objective: fitted to the row.
      converter: lays examples out.
      vocabulary, info: of all tasks.
      examples: raw examples of each task, where rows are packed of them.
      rows: rows of each task, where they are known beforehand.
      num_examples: documents or pairs of each task, by name.
      num_tokens: ids of each task, all features.
      identity: what a position belongs to: data and their order.
      rates: digest of the mixing rates.
      packed: digest of what makes examples of the data, and so decides how they pack.

    Raises:
      ValueError: data, objective, architecture and lengths do not go together; the message says which and what to do.
    """

    def __init__(
        self,
        config: DataConfig,
        objective: Objective,
        architecture: Architecture,
        split: str,
        one_pass: bool,
        start_step: int,
    ):
        if refusal := objective.refuses(architecture):
            raise ValueError(refusal)
        self.config, self.split, self.one_pass, self._start_step = config, split, one_pass, start_step
        self.mixture = resolve(config.mixture)
        self.tasks = self.mixture.tasks() if isinstance(self.mixture, Mixture) else (self.mixture,)
        self.vocabulary = _one_vocabulary(self.mixture.name, self.tasks)
        self.info = self.vocabulary.info()
        lengths = dict(config.feature_lengths)
        self.converter = feature_converter(architecture, lengths, self.info.pad_id)
        self._columns = None if architecture.has_encoder_features else np.int64(sum(lengths.values()))
        self.objective = objective.fit(lengths, architecture)
        self._raw_length = self.objective.raw_length(lengths, architecture)
        self._limits = self._probe(lengths, architecture)
        self._plan_key = fingerprint(
            self.objective, architecture, lengths, (config.seed, start_step) if one_pass else None
        )
        # A task's name keys its randomness, so that it draws the same noise in every mixture.
        self._streams = [key_of("task", task.name, split) for task in self.tasks]
        self._orders = np.array([key_of("order", config.seed, stream) for stream in self._streams], np.uint64)
        self.examples: list[Examples | None] = []
        self.rows: list[RowSet | None] = []
        self.num_examples: dict[str, int] = {}
        self.num_tokens: list[int] = []
        for dataset in range(len(self.tasks)):
            self._add(dataset)
        self._rows_per_example: dict[str, float] | None = None
        if config.packing is Packing.PLAN:
            fills = (len(rows) / len(examples) for rows, examples in zip(self.rows, self.examples))
            self._rows_per_example = dict(zip(self.num_examples, fills))
        self.identity = self._identify()
        self.rates = fingerprint(self._rates(self.mixture))[:16]
        self.packed = fingerprint(self.objective, architecture, lengths)[:16]

    def _add(self, dataset: int) -> None:
        config, name = self.config, self.tasks[dataset].name
        if config.packing is Packing.CONCAT_AND_SPLIT and "inputs" in self.tasks[dataset].output_features:
            raise ValueError(
                f"Task {name!r} has pairs of inputs and targets, which cannot be concatenated and split; set "
                f"DataConfig.packing to PLAN, FIRST_FIT or NONE."
            )
        if config.document_mask and not self.objective.takes_segments:
            raise ValueError(
                f"The objective {self.objective.name} cannot keep the documents of a row apart; turn "
                f"DataConfig.document_mask off, or pack whole documents with PLAN or FIRST_FIT."
            )
        cache = caches.open_cache(self.tasks[dataset], self.split, config.cache_directory)
        self.num_examples[name] = cache.num_examples
        self.num_tokens.append(sum(cache.num_tokens.values()))
        examples = rows = None
        if config.packing is Packing.CONCAT_AND_SPLIT:
            rows = Windows(cache, self._raw_length, config.document_mask)
        else:
            examples = Examples(cache, self._raw_length, self._limits)
        if config.packing is Packing.NONE:
            rows = Singles(examples)
        elif config.packing is Packing.PLAN or (config.packing is Packing.FIRST_FIT and self.one_pass):
            generator = ExampleGenerator(config.seed)

            def size(index: int, epoch: int, step: int) -> tuple[int, ...]:
                return self.converter.size(self.example(generator, dataset, index, epoch, step, examples[index]))

            look_ahead = config.plan_look_ahead if config.packing is Packing.PLAN else config.look_ahead
            capacity = self.converter.capacity
            endless = not self.one_pass
            options = {"shuffle": config.shuffle and endless, "lasting": endless}
            rows = plan_rows(cache, self._plan_key, examples, size, capacity, look_ahead, **options)
        self.examples.append(examples)
        self.rows.append(rows)

    def _probe(self, lengths: Mapping[str, int], architecture: Architecture) -> dict[str, int]:
        """Tries every objective that may be drawn on each kind of task, so that what cannot work fails now, by name.

        Returns how many tokens of a pair's fields fit in a row, beside the most that any of them adds (EOS): `corrupt`
        alone knows that, and whether it looks at inputs at all.
        """
        rng = np.random.default_rng(0)
        kinds = {tuple(sorted(task.output_features)): task.name for task in self.tasks}
        found: list[dict[str, int]] = []
        for objective in self.objective.drawn:
            if ("targets",) in kinds:
                text = np.resize(self.info.ordinary_ids, objective.raw_length(lengths, architecture))
                for _ in range(_TRIES):
                    objective.corrupt({"targets": text}, self.info, rng)
            if ("inputs", "targets") in kinds:
                found.append(self._room(objective, lengths, kinds[("inputs", "targets")], rng))
        return {name: min(limits[name] for limits in found) for name in found[0]} if found else {}

    def _room(
        self, objective: Objective, lengths: Mapping[str, int], task: str, rng: np.random.Generator
    ) -> dict[str, int]:
        """How many tokens of a pair's fields fit in a row beside what one objective adds."""
        shown, target = self.info.ordinary_ids[:1], self.info.ordinary_ids[1:2]
        example = objective.corrupt({"inputs": shown, "targets": target}, self.info, rng)
        if shown[0] not in example.inputs and shown[0] not in example.targets:
            raise ValueError(
                f"The objective {objective.name} reads text alone and would drop the inputs of task {task!r}; use the "
                f"supervised objective."
            )
        room = {"inputs": lengths.get("inputs", 0), "targets": lengths["targets"]}
        limits = {
            "inputs": room["inputs"] - len(example.inputs) + 1,
            "targets": room["targets"] - len(example.targets) + 1,
        }
        if min(limits.values()) < 1:
            raise ValueError(
                f"Rows of {lengths} have no room for the inputs and targets of task {task!r}; give both a length in "
                f"DataConfig.feature_lengths, e.g. {{'inputs': 512, 'targets': 128}}."
            )
        return limits

    def example(
        self, generator: ExampleGenerator, dataset: int, index: int, epoch: int, step: int, raw: Raw
    ) -> Example:
        """Example `index` of a data set as the objective makes it in that epoch, at that step.

        All of one pass is as at its first step, so that its batches are alike and a plan of their lengths holds.
        """
        step = self._start_step if self.one_pass else step
        rng = generator.at(self._streams[dataset], index, epoch)
        if self._columns is not None and "segments" in raw:
            raw = {**raw, "columns": self._columns}
        example = self.objective.corrupt(raw, self.info, rng, step=step)
        example.dataset = dataset
        return example

    @property
    def scheduled(self) -> bool:
        """Whether the mixing rates change over training."""
        return isinstance(self.mixture, Mixture) and bool(self.mixture.schedules())

    def mixer(self, clock: Clock, drawn: Drawn | None) -> Mixer:
        """Which data set each draw is from: each row, or with FIRST_FIT each example."""
        return Mixer(self.mixture, self.num_examples, self.config.seed, clock, drawn, self._rows_per_example)

    def ordered(self, dataset: np.ndarray, drawn: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index, epoch) of draw `drawn` from each data set, which has `counts[dataset]` members; int64 [n] all."""
        count = counts[dataset]
        epoch, index = np.divmod(drawn, count)
        if self.config.shuffle and not self.one_pass:
            index = permute(index, count, self._orders[dataset] + epoch.astype(np.uint64))
        return index, epoch

    def _rates(self, member: Task | Mixture) -> Any:
        if isinstance(member, Task):
            return member.name
        return [(self._rates(inside), rate) for inside, rate in member.rates(self.num_examples)]

    def _identify(self) -> dict[str, Any]:
        """What a position belongs to: enough to refuse another's, and to say why."""
        config = self.config
        counts = [
            # Plans of as many rows may be different ones.
            (len(rows), len(rows.examples), rows.density, config.plan_look_ahead)
            if isinstance(rows, Plan)
            else len(examples if rows is None else rows)
            for rows, examples in zip(self.rows, self.examples)
        ]
        options = (config.document_mask, config.shuffle, config.virtual_shards, config.look_ahead)
        return {
            "mixture": self.mixture.name,
            "split": self.split,
            "seed": config.seed,
            "packing": config.packing.name,
            "digest": fingerprint(counts, self.num_tokens, options)[:16],
        }


def _one_vocabulary(mixture: str, tasks: Sequence[Task]) -> Vocabulary:
    found: dict[str, tuple[str, Vocabulary]] = {}
    for task in tasks:
        for feature in task.output_features.values():
            found.setdefault(feature.vocabulary.fingerprint(), (task.name, feature.vocabulary))
    if len(found) > 1:
        names = " and ".join(f"{name!r} ({vocabulary})" for name, vocabulary in list(found.values())[:2])
        raise ValueError(
            f"The tasks of {mixture!r} have different vocabularies: {names}; a model has one, so give all the same."
        )
    return next(iter(found.values()))[1]
