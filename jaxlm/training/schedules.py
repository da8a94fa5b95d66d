"""Learning-rate schedules: typed, composable, evaluated inside the jitted step.

A schedule is called as `schedule(step, length)`: its value at `step`, when it is stretched over `length` steps. The
run's schedule spans the run; a piece of a `Join` spans its piece. Lengths inside a schedule are steps where they are
`int` and fractions of the span where they are `float`, so that `0.1` keeps its meaning when the run gets longer.

Steps count from 0: update number n + 1 uses `schedule(n, length)`.
"""

import abc
import dataclasses
import enum
from typing import override

import jax
import jax.numpy as jnp

Length = int | float
"""Steps (int, at least 0) or a fraction of the span (float in [0, 1])."""


class Shape(enum.Enum):
    """How a value goes from start to end, with t the elapsed share of the way.

    LINEAR: 1 - t.
    COSINE: half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983).
    SQRT: 1 - sqrt(t) (Haegele et al. 2024, arXiv 2405.18392, the best decay for WSD there).
    SQUARE: 1 - t^2.
    EXPONENTIAL: geometric from start to end, both of which must be positive.
    """

    LINEAR = "linear"
    COSINE = "cosine"
    SQRT = "sqrt"
    SQUARE = "square"
    EXPONENTIAL = "exponential"


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """A learning rate that changes over training."""

    @abc.abstractmethod
    def __call__(self, step: jax.Array | int, length: jax.Array | int) -> jax.Array:
        """The value at `step` (int or traced), float32 scalar, of this schedule stretched over `length` steps."""


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

    Attributes:
      value: the learning rate.
    """

    value: float

    @override
    def __call__(self, step, length):
        return jnp.float32(self.value)


@dataclasses.dataclass(frozen=True)
class Decay(Schedule):
    """From `start` to `end` over the whole span, and `end` from there on.

    Attributes:
      start: value at step 0.
      end: value at the last step of the span and after.
      shape: how it goes from one to the other. With `start` below `end` this is a warm-up.
    """

    start: float
    end: float
    shape: Shape = Shape.LINEAR

    def __post_init__(self):
        if self.shape is Shape.EXPONENTIAL and min(self.start, self.end) <= 0:
            raise ValueError(f"An exponential decay needs positive start and end, got {self.start} and {self.end}.")

    @override
    def __call__(self, step, length):
        return _interpolate(self.start, self.end, _share(step, length), self.shape)


@dataclasses.dataclass(frozen=True)
class Linear(Decay):
    """A straight line from `start` to `end` (see `Decay`)."""


@dataclasses.dataclass(frozen=True)
class Cosine(Decay):
    """Half a cosine from `start` to `end` (see `Decay`)."""

    shape: Shape = Shape.COSINE


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """value / sqrt(max(step, k)), T5's schedule for Adafactor (Raffel et al. 2020, arXiv 1910.10683, section 3.1.2).

    Attributes:
      value: numerator; 1.0 in T5, which gives 0.01 during the first 10^4 steps.
      timescale: k, in steps: the schedule is constant until then.
    """

    value: float = 1.0
    timescale: int = 10_000

    @override
    def __call__(self, step, length):
        return self.value * jax.lax.rsqrt(jnp.maximum(jnp.float32(step), float(self.timescale)))


@dataclasses.dataclass(frozen=True)
class Join(Schedule):
    """Schedules one after the other, each on its own clock.

    Attributes:
      schedules: the pieces in order.
      lengths: length of each piece but the last, which takes what remains of the span.

    Example:
      >>> warm_up_then_cosine = Join((Linear(0.0, 1e-3), Cosine(1e-3, 1e-4)), lengths=(1000,))
    """

    schedules: tuple[Schedule, ...]
    lengths: tuple[Length, ...]

    def __post_init__(self):
        if len(self.schedules) != len(self.lengths) + 1:
            raise ValueError(
                f"Join needs one length for each schedule but the last, got {len(self.schedules)} schedules and "
                f"{len(self.lengths)} lengths."
            )
        for length in self.lengths:
            _check_length(length, "Join.lengths")

    @override
    def __call__(self, step, length):
        start = jnp.int32(0)
        value = None
        for schedule, piece in zip(self.schedules, (*self.lengths, None)):
            span = length - start if piece is None else _steps(piece, length)
            here = schedule(jnp.maximum(step - start, 0), jnp.maximum(span, 1))
            value = here if value is None else jnp.where(step >= start, here, value)
            start = start + span
        return value


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up, a plateau, and a final decay (WSD; Hu et al. 2024, arXiv 2404.06395; arXiv 2405.18392).

    Attributes:
      peak: the plateau's value.
      warmup: length of the warm-up from 0.
      decay: length of the final decay, which ends with the span; 0 stays on the plateau: a trunk to branch off from.
      end: the last value.
      shape: shape of the decay.
    """

    peak: float
    warmup: Length
    decay: Length
    end: float = 0.0
    shape: Shape = Shape.SQRT

    def __post_init__(self):
        _check_length(self.warmup, "WarmupStableDecay.warmup")
        _check_length(self.decay, "WarmupStableDecay.decay")
        Decay(self.peak, self.end, self.shape)

    @override
    def __call__(self, step, length):
        warmup, decay = _steps(self.warmup, length), _steps(self.decay, length)
        rising = _interpolate(0.0, self.peak, _share(step, warmup), Shape.LINEAR)
        falling = _interpolate(self.peak, self.end, _share(step - (length - decay), decay), self.shape)
        # The plateau is the peak itself, so that a trunk without a decay has the bits of what branches off from it.
        return jnp.where(step < warmup, rising, jnp.where(step < length - decay, self.peak, falling))


@dataclasses.dataclass(frozen=True)
class Rewarm(Schedule):
    """Continues a finished schedule: rises from where it stood and then follows another (arXiv 2403.08763).

    Attributes:
      before: the schedule until step `at`, stretched over `at` steps.
      at: where the new one begins.
      warmup: length of the straight line from the old value to the new schedule's first one.
      after: the schedule that follows, on its own clock, over what remains of the span.
    """

    before: Schedule
    at: Length
    warmup: Length
    after: Schedule

    def __post_init__(self):
        _check_length(self.at, "Rewarm.at")
        _check_length(self.warmup, "Rewarm.warmup")

    @override
    def __call__(self, step, length):
        at, warmup = _steps(self.at, length), _steps(self.warmup, length)
        rest = jnp.maximum(length - at - warmup, 1)
        old = self.before(jnp.minimum(step, at), at)
        rising = old + (self.after(0, rest) - old) * _share(step - at, warmup)
        following = self.after(jnp.maximum(step - at - warmup, 0), rest)
        return jnp.where(step < at, old, jnp.where(step < at + warmup, rising, following))


def _check_length(length: Length, name: str) -> None:
    if isinstance(length, float) and not 0.0 <= length <= 1.0:
        raise ValueError(f"{name} is {length}; a float is a fraction of the span in [0, 1], write steps as an integer.")
    if length < 0:
        raise ValueError(f"{name} is {length}; a number of steps cannot be negative.")


def _steps(length: Length, span: jax.Array | int) -> jax.Array:
    """A length in steps, int32."""
    if isinstance(length, float):
        return jnp.int32(jnp.round(length * jnp.float32(span)))
    return jnp.int32(length)


def _share(step: jax.Array | int, length: jax.Array | int) -> jax.Array:
    """Elapsed share of `length` steps in [0, 1]; a way of no length is over at once."""
    return jnp.where(length > 0, jnp.clip(jnp.float32(step) / jnp.maximum(length, 1), 0.0, 1.0), 1.0)


def _interpolate(start: float, end: float, t: jax.Array, shape: Shape) -> jax.Array:
    if shape is Shape.EXPONENTIAL:
        return jnp.float32(start) * (end / start) ** t
    remaining = {
        Shape.LINEAR: lambda: 1.0 - t,
        Shape.COSINE: lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
        Shape.SQRT: lambda: 1.0 - jnp.sqrt(t),
        Shape.SQUARE: lambda: 1.0 - t * t,
    }[shape]()
    return end + (start - end) * remaining
