"""Which data set a row comes from, and which of its rows it is: a function of the row's number alone.

Row g of a run gets the number u(g) of a van der Corput sequence, the bits of g in reverse, and takes the data set in
whose share of [0, 1) u(g) falls. Such a sequence fills the interval evenly at every scale, so that after any number of
rows each data set has had its share to within about log2(rows) rows, and the number it has had can be counted in as
many steps (`Mixer.assign`): no state, whatever the number of data sets.

Rates that change over training are followed in stairs: within a stair the shares are constant, those of its
middle step.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np

from jaxlm.data.randomness import key_of
from jaxlm.data.tasks import Mixture, Task

_BITS = 40  # rows a run may have: 2^40
_STAIRS = 128  # of each linear piece of a schedule


def _reverse(x: np.ndarray) -> np.ndarray:
    """The lowest `_BITS` bits in reverse, uint64."""
    x = x.astype(np.uint64)
    for shift, mask in (
        (1, 0x5555555555555555),
        (2, 0x3333333333333333),
        (4, 0x0F0F0F0F0F0F0F0F),
        (8, 0x00FF00FF00FF00FF),
        (16, 0x0000FFFF0000FFFF),
    ):
        shift, mask = np.uint64(shift), np.uint64(mask)
        x = ((x >> shift) & mask) | ((x & mask) << shift)
    x = (x >> np.uint64(32)) | (x << np.uint64(32))
    return x >> np.uint64(64 - _BITS)


def _count_below(rows: np.ndarray, threshold: np.ndarray, scramble: int) -> np.ndarray:
    """How many of the rows 0 .. rows - 1 have u below `threshold`; both int64, broadcast together.

    The rows before g are one aligned block of 2^m for each bit m of g. In such a block the first m bits of u take every
    value once and the others are the same for all, so that its points are 2^(BITS - m) apart and can be counted
    at once.
    """
    rows, threshold = np.broadcast_arrays(rows, threshold)
    total = np.zeros(rows.shape, np.int64)
    for m in range(int(rows.max(initial=0)).bit_length()):
        base = rows & ~((np.int64(2) << m) - 1)  # the block of bit m begins where the higher bits end
        spacing = np.int64(1) << (_BITS - m)
        first = (_reverse(base).astype(np.int64) ^ scramble) & (spacing - 1)
        below = np.clip(-((first - threshold) // spacing), 0, np.int64(1) << m)
        total += np.where(rows >> m & 1, below, 0)
    return total


@dataclasses.dataclass(frozen=True)
class Clock:
    """When rows (of a packed stream: examples) are drawn.

    Attributes:
      step: a training step.
      draws: draws before it.
      draws_per_step: draws a step from then on; not a whole number in a packed stream.
    """

    step: int
    draws: int
    draws_per_step: float

    def draws_at(self, step: int) -> int:
        """Draws before a step."""
        return self.draws + math.ceil((step - self.step) * self.draws_per_step)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn before the present rates, or the present clock, began to hold.

    Attributes:
      draws: draws of the run.
      counts: of each data set among them.
    """

    draws: int
    counts: tuple[int, ...]


class Mixer:
    """Assigns rows to data sets.

    Args:
      mixture: a task or mixture.
      examples: number of examples of each task, for rates that follow it.
      seed: of the run.
      clock: how rows and steps go together.
      drawn: where mixing goes on; None begins.
      rows_per_example: of each task, where a row has several examples: rates count examples. None: a row is one.

    Attributes:
      clock: as given.
    """

    def __init__(
        self,
        mixture: Task | Mixture,
        examples: Mapping[str, int],
        seed: int,
        clock: Clock,
        drawn: Drawn | None = None,
        rows_per_example: Mapping[str, float] | None = None,
    ):
        self.clock = clock
        schedules = mixture.schedules() if isinstance(mixture, Mixture) else ()
        self._scramble = key_of("mixture", seed) >> (64 - _BITS)
        self._single = not isinstance(mixture, Mixture) or len(mixture.tasks()) == 1
        if self._single:
            return
        ends = {clock.step}
        for schedule in schedules:
            for a, b in itertools.pairwise(schedule.steps):
                stairs = min(_STAIRS, b - a) if schedule.linear else 1
                ends.update(np.linspace(a, b, stairs + 1).astype(int).tolist())
        steps = sorted(end for end in ends if end >= clock.step)
        # Row at which each stair begins.
        self._stairs = np.array([min(clock.draws_at(step), 2**_BITS - 1) for step in steps], np.int64)
        self._stairs[0] = 0 if drawn is None else drawn.draws
        self._edges = []  # of the data sets' shares, in units of 2^-BITS, [stairs, data sets + 1]
        for a, b in itertools.zip_longest(steps, steps[1:]):
            shares = mixture.shares(a if b is None else (a + b - 1) // 2, examples)
            if rows_per_example is not None:
                rows = {name: share * rows_per_example[name] for name, share in shares.items()}
                shares = {name: share / sum(rows.values()) for name, share in rows.items()}
            edges = np.round(np.cumsum([0.0, *shares.values()]) * 2**_BITS).astype(np.int64)
            edges[-1] = 2**_BITS
            self._edges.append(edges)
        self._edges = np.array(self._edges)
        # Rows each data set has had when a stair begins.
        self._before = np.zeros((len(steps), self._edges.shape[1] - 1), np.int64)
        if drawn is not None:
            self._before[0] = drawn.counts
        stairs = self._between(self._stairs[:-1, None], self._stairs[1:, None], self._edges[:-1])
        self._before[1:] = self._before[0] + stairs.cumsum(0)

    def _between(self, start: np.ndarray, stop: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """Rows of each data set among rows start .. stop - 1 of a stair, [..., data sets]."""
        below = _count_below(stop, edges, self._scramble) - _count_below(start, edges, self._scramble)
        return np.diff(below, axis=-1)

    def assign(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Data set of each row, and how many rows that data set had before; int64 [n] both."""
        rows = np.asarray(rows, np.int64)
        if self._single:
            return np.zeros(len(rows), np.int64), rows
        stair = np.searchsorted(self._stairs, rows, "right") - 1
        u = _reverse(rows).astype(np.int64) ^ self._scramble
        dataset = np.empty(len(rows), np.int64)
        for s in np.unique(stair):
            here = stair == s
            dataset[here] = np.searchsorted(self._edges[s], u[here], "right") - 1
        edges = np.stack([self._edges[stair, dataset], self._edges[stair, dataset + 1]])
        begin = self._stairs[stair]
        below = _count_below(rows, edges, self._scramble) - _count_below(begin, edges, self._scramble)
        return dataset, self._before[stair, dataset] + below[1] - below[0]

    def counts(self, rows: int) -> np.ndarray:
        """Rows each data set has among the first `rows`, int64 [data sets]."""
        if self._single:
            return np.array([rows], np.int64)
        stair = int(np.searchsorted(self._stairs, rows, "right")) - 1
        stair = max(stair, 0)
        return self._before[stair] + self._between(self._stairs[stair], np.int64(rows), self._edges[stair])
