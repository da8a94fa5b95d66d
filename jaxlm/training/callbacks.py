"""Small hooks into the training loop; what they remember is part of the checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, override

from jaxlm.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm was an outlier, or not finite.

    Attributes:
      step: counted from 1.
      loss, grad_norm: of it.
      data: the loader's state before its batch; of this host alone (`jaxlm.data.loader.gather_state`).
    """

    step: int
    loss: float
    grad_norm: float
    data: Any


class Callback:
    """Does nothing; override what is needed. Every process of a job calls its callbacks alike."""

    @property
    def name(self) -> str:
        """Key of its state in the checkpoint; two callbacks of a run must not share one."""
        return type(self).__name__

    @property
    def wants_to_stop(self) -> bool:
        """Whether training should end after this step, with a checkpoint."""
        return False

    def on_step(self, step: int, state: TrainState) -> None:
        """After each step was dispatched. The next step takes the state's buffers: use it here or copy it."""

    def is_due(self, step: int) -> bool:
        """Whether `on_pause` is wanted at this step."""
        return False

    def on_pause(self, step: int, state: TrainState) -> None:
        """At steps that are due, with the devices at rest; its time does not count as training (samples, plots)."""

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        """When an interval's metrics were read."""

    def on_spike(self, spike: Spike) -> None:
        """A spike was found; called at the next log or pause, before the run goes on or ends because of it."""

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """After an evaluation."""

    def on_end(self, step: int) -> None:
        """When the loop is left, also by an error."""

    def state_dict(self) -> dict[str, Any]:
        """What to keep in a checkpoint: JSON-able, small."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


class Periodically(Callback):
    """Calls a function of (step, state) every `period` steps: samples, exports, pictures."""

    def __init__(self, name: str, period: int, function: Callable[[int, TrainState], None]):
        self._name, self._period, self._function = name, period, function

    @property
    @override
    def name(self) -> str:
        return self._name

    @override
    def is_due(self, step: int) -> bool:
        return step % self._period == 0

    @override
    def on_pause(self, step: int, state: TrainState) -> None:
        self._function(step, state)


class EarlyStopping(Callback):
    """Stops when a validation metric has not improved for `patience` evaluations.

    Args:
      metric: name of a metric of the evaluation that should fall.
      patience: evaluations without improvement before stopping.
      min_delta: a smaller improvement does not count.
    """

    def __init__(self, metric: str = "validation/cross_entropy", patience: int = 5, min_delta: float = 0.0):
        self._metric, self._patience, self._min_delta = metric, patience, min_delta
        self._best: float | None = None
        self._without = 0

    @property
    @override
    def wants_to_stop(self) -> bool:
        return self._without >= self._patience

    @override
    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        if self._metric not in values:
            raise ValueError(f"EarlyStopping watches {self._metric!r}, but the evaluation has {sorted(values)}.")
        value = values[self._metric]
        if self._best is None or value < self._best - self._min_delta:
            self._best, self._without = value, 0
        else:
            self._without += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "without": self._without}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._without = state["best"], state["without"]
