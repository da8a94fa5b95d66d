"""Indexed reading: batch k from (seed, k, data) alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, override

import numpy as np

from jaxlm.data.converters import Batch
from jaxlm.data.datasets import DataSets
from jaxlm.data.loader_base import ExampleId, Loader, Seen, mixing_at
from jaxlm.data.mixing import Mixer
from jaxlm.data.randomness import ExampleGenerator


class IndexedLoader(Loader):
    """Rows that are known beforehand, by number: the number tells the data set, the epoch and the row in it.

    One pass goes through the data sets one after the other, each row once, without mixing or shuffling.
    """

    def __init__(self, data: DataSets, batch_size: int, own_rows: np.ndarray, start_step: int):
        super().__init__(data, batch_size, own_rows, start_step)
        self._counts = np.array([len(rows) for rows in data.rows], np.int64)
        self._ends = np.cumsum(self._counts)
        if data.one_pass:
            self.num_batches = -(-int(self._ends[-1]) // batch_size)

    @property
    @override
    def _draws_per_step(self) -> float:
        return self._batch_size

    @override
    def _open(self) -> Iterator[Batch]:
        import grain  # brings jax

        config = self._data.config
        options = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=config.prefetch_batches)
        batches = grain.MapDataset.source(_Batches(self, self._mixer(), self._step))
        return iter(batches.to_iter_dataset(options))

    def left(self, step: int) -> int:
        """Batches from `step` to the end."""
        if not self._data.one_pass:
            return 1 << 40
        return max(-(-(int(self._ends[-1]) - self._clock.draws_at(step)) // self._batch_size), 0)

    def batch(self, step: int, mixer: Mixer) -> Batch:
        """This host's rows of the batch of a training step."""
        data = self._data
        numbers = self._clock.draws_at(step) + self._own_rows
        generator = ExampleGenerator(data.config.seed)
        rows = [
            [data.example(generator, d, i, e, step, raw) for i, raw in data.rows[d].row(r)]
            for d, r, e in self._rows(numbers, mixer)
        ]
        return data.converter.batch(rows + [[]] * (len(self._own_rows) - len(rows)))

    def _rows(self, numbers: np.ndarray, mixer: Mixer) -> list[tuple[int, int, int]]:
        """(data set, row in it, epoch) of rows of the run by number; without those beyond the end of a pass."""
        if self._data.one_pass:
            numbers = numbers[numbers < self._ends[-1]]
            dataset = np.searchsorted(self._ends, numbers, "right")
            drawn = numbers - (self._ends - self._counts)[dataset]
        else:
            dataset, drawn = mixer.assign(numbers)
        index, epoch = self._data.ordered(dataset, drawn, self._counts)
        return list(zip(dataset.tolist(), index.tolist(), epoch.tolist()))

    @override
    def _go_on(self, state: Mapping[str, Any], before: DataSets) -> None:
        step, same_rate = int(state["step"]), self._clock.draws_per_step == self._draws_per_step
        if before.rates != self._data.rates or self._step != step or not same_rate:
            self._begin(self._clock.draws_at(step), before)

    @override
    def examples_at(self, state: Mapping[str, Any]) -> list[list[ExampleId]]:
        clock, drawn = mixing_at(state)
        mixer = self._data.mixer(clock, drawn)
        numbers = clock.draws_at(state["step"]) + np.arange(self._batch_size)
        return [
            [ExampleId(self.dataset_names[d], i, e) for i, _ in self._data.rows[d].row(r)]
            for d, r, e in self._rows(numbers, mixer)
        ]

    @override
    def seen(self) -> dict[str, Seen]:
        rows = self._clock.draws_at(self._step)
        if self._data.one_pass:
            return self._seen(np.clip(rows - (self._ends - self._counts), 0, self._counts), self._counts)
        return self._seen(self._mixer().counts(rows), self._counts)


class _Batches:
    """What Grain reads: random access to the batches from a step on."""

    def __init__(self, loader: IndexedLoader, mixer: Mixer, first: int):
        self._loader, self._mixer, self._first = loader, mixer, first

    def __len__(self) -> int:
        return self._loader.left(self._first)

    def __getitem__(self, index: int) -> Batch:
        return self._loader.batch(self._first + index, self._mixer)
