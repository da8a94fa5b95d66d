"""What a run does about spikes on the host: writes down their batches, and goes back over them (`guard.RollBack`)."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, override

import jax

from jaxlm.data.loader import Loader, gather_state
from jaxlm.training.callbacks import Callback, Spike
from jaxlm.training.guard import RollBack, SpikeGuard
from jaxlm.training.loop import TrainingDiverged
from jaxlm.training.stages import Phase


class SpikeRecord(Callback):
    """Writes a line for each spike, with the examples of its batch:

        {"step": 57, "loss": 9.1, "grad_norm": 830.0, "rows": [[["web", 120712, 0]], [["web", 3, 0], ["books", 9, 1]]]}

    Rows are those of the whole batch in order, examples as [data set, index, epoch] (`jaxlm.data.loader.ExampleId`).

    Args:
      path: `spikes.jsonl`.
      report: is told, in one sentence each.
    """

    def __init__(self, path: pathlib.Path, report: Callable[[str], None]):
        self._path, self._report = path, report
        self._loader: Loader | None = None

    def enter(self, loader: Loader) -> None:
        """A phase of the run begins."""
        self._loader = loader

    @override
    def on_spike(self, spike: Spike) -> None:
        rows = self._loader.examples_at(gather_state(spike.data))
        if jax.process_index() > 0:
            return
        # JSON lacks NaN and infinity.
        numbers = {"loss": spike.loss, "grad_norm": spike.grad_norm}
        numbers = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": spike.step, **numbers, "rows": rows}) + "\n")
        self._report(
            f"Spike at step {spike.step:,}: loss {spike.loss:.4g}, gradient norm {spike.grad_norm:.4g}; the examples "
            f"of its batch are in {self._path}."
        )


class RollBacks:
    """Which data a run passes over, having gone back.

    Nothing of it needs saving: what lies between a checkpoint and a spike is trained again after a kill, as it was.

    Args:
      guard: the run's; None, or with another policy, never goes back.
    """

    def __init__(self, guard: SpikeGuard | None):
        policy = None if guard is None else guard.policy
        self._policy = policy if isinstance(policy, RollBack) else None
        self._spikes: dict[int, tuple[int, Any]] = {}  # the newest of each phase, by its first step: step, data
        self._from: dict[int, int] = {}  # how often the run went back to a step

    def add(self, spike: TrainingDiverged, phase: Phase, newest_saved: int) -> None:
        """The run met a spike and will go back to its newest checkpoint.

        The error forgets where it came from: the diverged state is among what was at work there.

        Raises:
          TrainingDiverged: the same, where the policy is another or its patience is over.
        """
        count = self._from[newest_saved] = self._from.get(newest_saved, 0) + 1
        if self._policy is None or count > self._policy.patience:
            raise spike
        self._spikes[phase.start] = spike.step, spike.data
        spike.__traceback__ = None

    def pass_over(self, loader: Loader, phase: Phase, step: int) -> None:
        """Takes the loader beyond the spike that was met in this phase after `step`, if one was.

        Args:
          loader: of the phase, at the position that belongs to `step`.
          step: steps done.
        """
        spike, data = self._spikes.get(phase.start, (0, None))
        if spike <= step:
            return
        loader.restore(data)
        for _ in range(self._policy.skip):
            next(loader)
        loader.restore(loader.state(), step=step)
