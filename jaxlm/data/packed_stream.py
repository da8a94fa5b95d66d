"""The packed stream: rows packed while reading, by V virtual shards that any number of hosts shares out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, override

import numpy as np

from jaxlm.data import packing
from jaxlm.data.converters import Batch
from jaxlm.data.datasets import DataSets
from jaxlm.data.loader_base import ExampleId, Loader, Seen, mixing_at
from jaxlm.data.mixing import Clock, Mixer
from jaxlm.data.randomness import ExampleGenerator
from jaxlm.objectives.base import Example

# Where a virtual shard is: its window, and how many of the window's rows are used.
Position = tuple[int, int]
# A row before it is laid out: its examples, and which they are.
Row = list[tuple[ExampleId, Example]]


class StreamLoader(Loader):
    """Rows packed while reading.

    Example j of virtual shard v is example j * V + v of the run, V fixed. A shard packs its examples window by window
    (the look-ahead); going to its position means packing that window again.

    The batch's rows and the shards are both divided into G = gcd(batch size, V) groups, and the rows of a group come
    from its shards in turn. Each host reads whole groups.

    How many examples a batch takes depends on how they pack, so training steps are assigned to examples by a clock: at
    the mean of the run's first window. It decides the rates and the corruption that change over training.
    """

    def __init__(self, data: DataSets, batch_size: int, own_rows: np.ndarray, start_step: int):
        shards = data.config.virtual_shards
        groups = math.gcd(batch_size, shards)
        group_rows, group_shards = batch_size // groups, shards // groups
        self._own_groups, rows = np.unique(own_rows // group_rows, return_counts=True)
        if (rows < group_rows).any():
            raise ValueError(
                f"A packed stream fills a batch of {batch_size} rows from {shards} virtual shards in groups of "
                f"{group_rows}, and the devices of one host hold a part of a group; choose a batch size and a "
                f"DataConfig.virtual_shards (fixed for a run) that both are multiples of the hosts."
            )
        self._data, self._batch_size = data, batch_size
        self._counts = np.array([len(examples) for examples in data.examples], np.int64)
        # The first window as if all of it fell into the first step.
        first = data.mixer(Clock(start_step, 0, 2.0**38), None)
        self._examples_per_row = data.config.look_ahead / len(self._pack(0, 0, first))
        super().__init__(data, batch_size, own_rows, start_step)
        self._own = [group * group_shards + i for group in self._own_groups.tolist() for i in range(group_shards)]
        self._positions: dict[int, Position] = dict.fromkeys(self._own, (0, 0))
        self._phase = 0

    @property
    @override
    def _draws_per_step(self) -> float:
        return self._batch_size * self._examples_per_row

    def _pack(self, shard: int, window: int, mixer: Mixer) -> list[Row]:
        """The rows of a window of a virtual shard."""
        data, config = self._data, self._data.config
        numbers = (window * config.look_ahead + np.arange(config.look_ahead)) * config.virtual_shards + shard
        dataset, drawn = mixer.assign(numbers)
        index, epoch = data.ordered(dataset, drawn, self._counts)
        clock = mixer.clock
        steps = (clock.step + (numbers - clock.draws) / clock.draws_per_step).astype(np.int64)
        generator = ExampleGenerator(config.seed)
        examples = [
            data.example(generator, d, i, e, step, data.examples[d][i])
            for d, i, e, step in zip(dataset.tolist(), index.tolist(), epoch.tolist(), steps.tolist())
        ]
        ids = [ExampleId(data.tasks[d].name, i, e) for d, i, e in zip(dataset.tolist(), index.tolist(), epoch.tolist())]
        sizes = np.array([data.converter.size(example) for example in examples], np.int64)
        return [[(ids[i], examples[i]) for i in row] for row in packing.pack_window(sizes, data.converter.capacity)]

    def _batches(self) -> Iterator[tuple[Batch, dict[int, Position], int]]:
        """Batches from the current position on, each with the position after it."""
        own_groups = self._own_groups.tolist()
        for rows, positions, phase in self._rows(own_groups, dict(self._positions), self._phase, self._mixer()):
            examples = [[example for _, example in row] for row in rows]
            yield self._data.converter.batch(examples), dict(positions), phase

    def _rows(
        self, own_groups: Sequence[int], positions: dict[int, Position], phase: int, mixer: Mixer
    ) -> Iterator[tuple[list[Row], dict[int, Position], int]]:
        """These groups' rows of batch after batch, with the position after each; `positions` is changed in place."""
        shards = self._data.config.virtual_shards
        groups = math.gcd(self._batch_size, shards)
        group_rows, group_shards = self._batch_size // groups, shards // groups
        packed: dict[int, list[Row]] = {}  # rows of the window that each shard is in

        def take(shard: int) -> Row:
            window, row = positions[shard]
            if shard not in packed:
                packed[shard] = self._pack(shard, window, mixer)
            taken = packed[shard][row]
            positions[shard] = (window, row + 1)
            if row + 1 == len(packed[shard]):
                positions[shard] = (window + 1, 0)
                del packed[shard]
            return taken

        while True:
            rows = [
                take(group * group_shards + (phase + i) % group_shards)
                for group in own_groups
                for i in range(group_rows)
            ]
            phase = (phase + group_rows) % group_shards
            yield rows, positions, phase

    @override
    def examples_at(self, state: Mapping[str, Any]) -> list[list[ExampleId]]:
        mixer = self._data.mixer(*mixing_at(state))
        positions = {shard: tuple(position) for shard, position in enumerate(state["positions"])}
        groups = range(math.gcd(self._batch_size, self._data.config.virtual_shards))
        rows, _, _ = next(self._rows(groups, positions, state["phase"], mixer))
        return [[identity for identity, _ in row] for row in rows]

    @override
    def _open(self) -> Iterator:
        import grain  # brings jax

        config = self._data.config
        stream = _grain_stream(self._batches)
        if config.read_threads:
            # One thread whatever their number: a stream has an order.
            stream = grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=config.prefetch_batches)
        return iter(stream)

    @override
    def __next__(self) -> Batch:
        batch, self._positions, self._phase = super().__next__()
        return batch

    @override
    def state(self) -> dict[str, Any]:
        """As `Loader.state`, with this host's shards alone: several hosts `gather_state` before they save."""
        positions = [self._positions.get(shard) for shard in range(self._data.config.virtual_shards)]
        stream = {"batch_size": self._batch_size, "phase": self._phase, "positions": positions}
        return super().state() | {"packed": self._data.packed} | stream

    @override
    def _go_on(self, state: Mapping[str, Any], before: DataSets) -> None:
        # An earlier step (`restore`) keeps its clock: with another the windows in use would pack in another way.
        other_rates = before.rates != self._data.rates
        other_clock = self._clock.draws_per_step != self._draws_per_step
        other_examples = state.get("packed", self._data.packed) != self._data.packed
        by_step = self._data.scheduled or self._data.objective.scheduled
        positions = dict(enumerate(state["positions"]))
        repacks = other_rates or other_examples or (other_clock and by_step)
        # Windows that no shard has begun are nobody's yet, so that whatever decides about them may change.
        wanted = positions if repacks else self._own
        if missing := [shard for shard in wanted if positions[shard] is None]:
            raise ValueError(
                f"The saved data position lacks virtual shard {missing[0]}, because one host of several saved its own; "
                f"save what jaxlm.data.loader.gather_state gives."
            )
        if repacks:
            window = max(window + (row > 0) for window, row in positions.values())
            self._begin(window * self._data.config.look_ahead * self._data.config.virtual_shards, before)
            positions = dict.fromkeys(positions, (window, 0))
        elif other_clock:
            self._begin(self._clock.draws_at(int(state["step"])), before)
        self._positions = {shard: tuple(positions[shard]) for shard in self._own}
        # Another batch size deals rows to shards in another way, from its own beginning.
        self._phase = state["phase"] if state["batch_size"] == self._batch_size else 0

    @override
    def seen(self) -> dict[str, Seen]:
        """As `Loader.seen`, taking other hosts' shards to be where this one's are, and windows half used for unused."""
        windows = sum(window for window, _ in self._positions.values()) / len(self._positions)
        config = self._data.config
        examples = int(windows * config.look_ahead * config.virtual_shards)
        return self._seen(self._mixer().counts(examples), self._counts)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of all hosts.

    Indexed positions are the same on all hosts. Of a packed stream each host knows its own virtual shards.
    """
    merged = dict(states[0])
    if "positions" in merged:
        columns = zip(*(state["positions"] for state in states))
        merged["positions"] = [next((p for p in column if p is not None), None) for column in columns]
    return merged


def gather_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """`merge_states` over jax's processes, for a checkpoint: a collective, so all call it at the same step."""
    import jax

    if "positions" not in state or jax.process_count() == 1:
        return dict(state)
    from jax.experimental import multihost_utils

    unknown = (-1, -1)
    mine = np.array([unknown if p is None else p for p in state["positions"]], np.int32)  # [shards, 2]
    positions = np.asarray(multihost_utils.process_allgather(mine)).max(0)  # known ones are not negative
    return dict(state) | {"positions": positions.tolist()}


def _grain_stream(batches: Callable[[], Iterator]):
    """A Grain dataset over a generator; positions travel with the batches, so Grain's own state is not used."""
    import grain

    class Stream(grain.IterDataset):
        def __iter__(self):
            return StreamIterator()

    class StreamIterator(grain.DatasetIterator):
        def __init__(self):
            super().__init__()
            self._batches = batches()

        def __next__(self):
            return next(self._batches)

        def get_state(self):
            return {}

        def set_state(self, state):
            raise NotImplementedError("Positions are restored by the loader.")

    return Stream()
