"""What both ways of reading share: batches one after the other, and a position that can be saved and restored."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.converters import Batch
from jaxlm.data.datasets import DataSets
from jaxlm.data.mixing import Clock, Drawn, Mixer

_REFUSAL = (
    "The saved data position is of a run with {}; go on with that run's settings, or start the data from its beginning."
)


@dataclasses.dataclass(frozen=True)
class Seen:
    """How much of a data set a run has been given so far.

    Attributes:
      drawn: rows (with FIRST_FIT, examples) drawn from it, on all hosts.
      epochs: that over the number there are.
      tokens: raw tokens, by the mean row or example of the data set: exact whenever an epoch ends.
    """

    drawn: int
    epochs: float
    tokens: int


class ExampleId(NamedTuple):
    """Which example of a run something was: enough to find its text again.

    Attributes:
      dataset: name of the task.
      index: of the example in the task's split: a window of text (CONCAT_AND_SPLIT), a piece of a document, or a pair.
      epoch: how often the data set had been gone through.
    """

    dataset: str
    index: int
    epoch: int


class Loader(Iterator[Batch]):
    """Batches for one host. Made by `jaxlm.data.loader.build_loader`.

    A loader of one pass ends with StopIteration and is then at its beginning again.

    Attributes:
      vocabulary: of all tasks.
      dataset_names: names of the tasks; `dataset_ids` index them.
      batch_size: rows of a batch, of all hosts together.
      features: {name: (shape, type)} of a host's batch.
      num_batches: batches of one pass, or None if endless.
      objective: as given, fitted to the row.
      density: share of all columns that hold a token, for data sets with a pack plan, by name.
    """

    def __init__(self, data: DataSets, batch_size: int, own_rows: np.ndarray, start_step: int):
        self._data, self._batch_size = data, batch_size
        self._own_rows = own_rows
        self.batch_size = batch_size
        self._start_step = self._step = start_step
        self._clock = Clock(start_step, 0, self._draws_per_step)
        self._drawn: Drawn | None = None
        self._iterator: Iterator | None = None
        self.objective = data.objective
        self.vocabulary = data.vocabulary
        self.dataset_names = tuple(task.name for task in data.tasks)
        self.features = {
            name: ((len(own_rows), *shape), dtype) for name, (shape, dtype) in data.converter.features.items()
        }
        self.num_batches: int | None = None
        self.density = {
            name: rows.density for name, rows in zip(self.dataset_names, data.rows) if hasattr(rows, "density")
        }

    @property
    @abc.abstractmethod
    def _draws_per_step(self) -> float:
        """Rows or examples that a batch takes."""

    @abc.abstractmethod
    def _open(self) -> Iterator:
        """Batches from the current position on, made ahead by Grain."""

    @abc.abstractmethod
    def examples_at(self, state: Mapping[str, Any]) -> list[list[ExampleId]]:
        """The examples of the batch that follows a position, row by row, of all hosts together.

        Args:
          state: from `state`, with several hosts gathered (`jaxlm.data.loader.gather_state`); of this loader's data.
        """

    @abc.abstractmethod
    def seen(self) -> dict[str, Seen]:
        """How much of each data set has been given so far, by name; of all hosts together."""

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._open()
        try:
            batch = next(self._iterator)
        except StopIteration:
            self.close()
            self._step = self._start_step
            raise
        self._step += 1
        return batch

    def close(self) -> None:
        """Stops the threads that read ahead; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def state(self) -> dict[str, Any]:
        """The position after the last batch taken, JSON-able; what was read ahead does not count."""
        clocks = [list(dataclasses.astuple(self._clock))]  # earlier versions had several
        state = {"data": self._data.identity, "rates": self._data.rates, "step": self._step, "clocks": clocks}
        if self._drawn is not None:
            state["drawn"] = [self._drawn.draws, *self._drawn.counts]
        return state

    def restore(self, state: Mapping[str, Any], *, step: int | None = None, after: Loader | None = None) -> None:
        """Goes to a position; the number of hosts may differ from that of the run that saved it.

        With another batch size, other rates or another objective, reading goes on where that run stopped: no example
        comes twice in an epoch. A packed stream that would pack the windows in use in another way passes over what is
        left of them.

        Args:
          state: from `state`.
          step: the training step that the next batch is for, where it is not the position's own: a run that went back
            to an earlier step goes on with later data.
          after: the loader whose position it is, which a loader with other mixing rates has to know.

        Raises:
          ValueError: the position belongs to other data, or another way of reading it.
        """
        before = self._data if after is None else after._data
        self._check(state, before)
        self.close()
        self._step = int(state["step"]) if step is None else step
        self._clock, self._drawn = mixing_at(state)
        self._go_on(state, before)

    @abc.abstractmethod
    def _go_on(self, state: Mapping[str, Any], before: DataSets) -> None:
        """Takes up a position whose step, clock and draws are set already; `before` are the data sets that it is of."""

    def _check(self, state: Mapping[str, Any], before: DataSets) -> None:
        ours, theirs = self._data.identity, state.get("data", {})
        for name in ours:
            if ours[name] != theirs.get(name):
                differs = f"{name} {theirs.get(name)!r} instead of {ours[name]!r}"
                if name == "digest":
                    differs = "other files, row lengths or reading options, or another version of jaxlm"
                raise ValueError(_REFUSAL.format(differs))
        if state.get("rates", before.rates) != before.rates:
            raise ValueError(_REFUSAL.format("other mixing rates"))
        if len(state["clocks"]) > 1:
            raise ValueError(_REFUSAL.format("an earlier version of jaxlm, at rates that change with the step"))

    def _begin(self, draws: int, before: DataSets) -> None:
        """Reads from `draws` on by the present rates and batch size, `before` having dealt the draws until there."""
        # What was dealt matters only where it would be dealt in another way now.
        if before.rates != self._data.rates or self._data.scheduled:
            counts = before.mixer(self._clock, self._drawn).counts(draws)
            self._drawn = Drawn(draws, tuple(counts.tolist()))
        self._clock = Clock(self._step, draws, self._draws_per_step)

    def _mixer(self) -> Mixer:
        return self._data.mixer(self._clock, self._drawn)

    def _seen(self, drawn: np.ndarray, counts: np.ndarray) -> dict[str, Seen]:
        """`seen` from the draws from each data set and its members, int64 [data sets] both."""
        return {
            name: Seen(int(n), float(n / count), int(n * (tokens / count)))
            for name, n, count, tokens in zip(self.dataset_names, drawn, counts, self._data.num_tokens)
        }


def mixing_at(state: Mapping[str, Any]) -> tuple[Clock, Drawn | None]:
    """The clock of a position, and what was drawn before it began."""
    [(step, draws, rate)] = state["clocks"]
    drawn = state.get("drawn")
    return Clock(int(step), int(draws), float(rate)), drawn and Drawn(drawn[0], tuple(drawn[1:]))
