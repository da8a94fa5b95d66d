"""The training loop: next batch, step, log, evaluate, checkpoint; and how it ends.

The host runs one step ahead of the devices: it dispatches step n + 1 and then waits for step n. So the devices never
wait for the host's bookkeeping, and the times logged are the steps' own, not those of their dispatch.
"""

import contextlib
import dataclasses
import enum
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils

from jaxlm.parallel.parallelism import Parallelism
from jaxlm.training import metrics
from jaxlm.training.callbacks import Callback, Spike
from jaxlm.training.goodput import Activity, Ledger
from jaxlm.training.prefetch import Prefetcher
from jaxlm.training.state import TrainState
from jaxlm.training.step import Batch, Metrics, spike_signs


class TrainingDiverged(RuntimeError):
    """A step that must not be built upon: not finite, or the guard's policy gives up. One sentence for the user.

    Attributes:
      step: the step, counted from 1.
      data: the loader's state after its batch.
    """

    def __init__(self, step: int, data: Any):
        super().__init__(
            f"Training diverged at step {step}: loss or gradient is not finite, or the spike guard gave up; continue "
            f"from the last checkpoint with a lower learning rate, clip_global_norm or a SpikeGuard."
        )
        self.step, self.data = step, data


class Outcome(enum.Enum):
    """How a run of the loop ended.

    FINISHED: all steps were made.
    OUT_OF_DATA: the loader came to its end first.
    STOPPED: a callback wanted to stop.
    PREEMPTED: the process was asked to end (SIGTERM); the same command continues.
    """

    FINISHED = "finished"
    OUT_OF_DATA = "out_of_data"
    STOPPED = "stopped"
    PREEMPTED = "preempted"


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Periods, in training steps.

    Attributes:
      log_period: metrics are read and written every so many steps, as means over the interval.
      evaluation_period: evaluate every so many steps, and at the end; 0 never.
      prefetch: batches held on the devices beyond the one in use.
    """

    log_period: int = 10
    evaluation_period: int = 0
    prefetch: int = 2

    def __post_init__(self):
        for name, least in (("log_period", 1), ("evaluation_period", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"LoopConfig.{name} is {getattr(self, name)}; it must be at least {least}.")


class Checkpoints(Protocol):
    """What the loop needs of `jaxlm.checkpoints.manager.CheckpointManager`."""

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint is due."""

    def save(self, step: int, state: Any, **contents: Any) -> None:
        """Saves; the state's buffers may be donated afterwards."""

    def wait(self) -> None:
        """Until all is on disk."""


class MetricsWriter(Protocol):
    """What the loop needs of `jaxlm.training.writers.Writer`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes metrics of a step."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the loop works with. `run` may be called again, for the next stage with other parts.

    Attributes:
      step: from `make_train_step`.
      parallel: where batches go.
      config: periods.
      names: of data sets, objectives and layers in the metrics.
      writer: where metrics go, under "train/..." and "validation/...".
      evaluate: state -> values, e.g. an `Evaluator`; None does not evaluate.
      checkpoints: None saves nothing.
      callbacks: hooks.
      ledger: is told what time is spent on.
      resolved_config: text saved with each checkpoint.
      flops_per_token: of the model, forward and backward, for MFU; None leaves MFU out.
    """

    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    parallel: Parallelism
    config: LoopConfig
    names: metrics.Names
    writer: MetricsWriter | None = None
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    checkpoints: Checkpoints | None = None
    callbacks: Sequence[Callback] = ()
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    resolved_config: str = ""
    flops_per_token: float | None = None

    def run(self, state: TrainState, loader: Any, *, until: int) -> tuple[TrainState, Outcome, Any]:
        """Trains from `state` to step `until`.

        SIGTERM ends the run after the current step with a checkpoint. `state`'s buffers are taken.

        Args:
          state: fresh or restored.
          loader: iterator of this host's batches with `state()`, at the position that belongs to `state`.
          until: the step to stop after.

        Returns:
          the last state, how it ended, and the loader's state after the last batch trained on (the loader itself may
          be ahead).

        Raises:
          TrainingDiverged: the loss or gradient of a step is not finite, or the guard's policy gave up. Nothing was
            saved since.
        """
        step = int(state.step)
        progress = _Progress(self)
        outcome, last_saved = Outcome.FINISHED, step
        data_state = loader.state()
        values: dict[str, float] = {}  # of an evaluation at `step`
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.ledger.spending(Activity.STEP))
            stack.callback(lambda: [callback.on_end(step) for callback in self.callbacks])
            batches = stack.enter_context(Prefetcher(loader, self.parallel, depth=self.config.prefetch))
            terminated = stack.enter_context(_termination())
            while step < until and outcome is Outcome.FINISHED:
                with progress.waiting_for_data():
                    item = next(batches, None)
                if item is None:
                    outcome = Outcome.OUT_OF_DATA
                    break
                data_before, (batch, data_state) = data_state, item
                state, found = self.step(state, batch)
                step, values = step + 1, {}
                progress.dispatched(found, _Dispatched(step, spike_signs(found), data_before, data_state))
                for callback in self.callbacks:
                    callback.on_step(step, state)

                if terminated(step):
                    outcome = Outcome.PREEMPTED
                elif any(callback.wants_to_stop for callback in self.callbacks):
                    outcome = Outcome.STOPPED
                evaluate = self._evaluation_due(step, until)
                save = self.checkpoints is not None and self.checkpoints.should_save(step)
                due = [callback for callback in self.callbacks if callback.is_due(step)]
                if evaluate or save or due:
                    with progress.paused(log=step == until or outcome is not Outcome.FINISHED):
                        if evaluate:
                            values = self._evaluate(step, state)
                        with self.ledger.spending(Activity.OTHER):
                            for callback in due:
                                callback.on_pause(step, state)
                        if save:
                            self._save(step, state, data_state, values)
                            last_saved = step
            progress.settle(log=True)
            if self.checkpoints is not None:
                if step > last_saved:
                    self._save(step, state, data_state, values)
                with self.ledger.spending(Activity.SAVE):
                    self.checkpoints.wait()
        return state, outcome, data_state

    def _evaluation_due(self, step: int, until: int) -> bool:
        if self.evaluate is None or not self.config.evaluation_period:
            return False
        return step % self.config.evaluation_period == 0 or step == until

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        with self.ledger.spending(Activity.EVALUATION):
            values = self.evaluate(state)
        self._write(step, values)
        for callback in self.callbacks:
            callback.on_evaluation(step, values)
        return values

    def _save(self, step: int, state: TrainState, data_state: Any, values: Mapping[str, float]) -> None:
        if jax.process_count() > 1:
            # Here, because it needs Grain, which training itself does not.
            from jaxlm.data.loader import gather_state

            data_state = gather_state(data_state)  # a packed stream's state is spread over the hosts
        with self.ledger.spending(Activity.SAVE):
            self.checkpoints.save(
                step,
                state,
                data=data_state,
                callbacks={callback.name: callback.state_dict() for callback in self.callbacks},
                config=self.resolved_config,
                metrics=values,
            )

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(step, values)


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step on its way.

    Attributes:
      step: counted from 1.
      signs: on the devices: whether it is a spike, its loss and gradient norm.
      data_before, data_after: the loader's state on either side of its batch.
    """

    step: int
    signs: tuple[jax.Array, jax.Array, jax.Array]
    data_before: Any
    data_after: Any


class _Progress:
    """What was dispatched but not yet seen to be done, and the clock."""

    def __init__(self, loop: Loop):
        self._loop = loop
        self._totals: metrics.Totals | None = None  # of the current interval, up to the last dispatched step
        self._behind: tuple[int, metrics.Totals] | None = None  # last dispatched step, not waited for yet
        self._unchecked: list[_Dispatched] = []  # steps whose spikes were not looked for yet
        self._mark = time.perf_counter()  # when the last step was done, or a pause was over
        self._settled = 0  # the last step that `settle` waited for
        self._unlogged = 0  # steps done since the last log
        self._timed = 0  # of these, those in `_seconds`: all but a run's first, which compiles
        self._seconds = 0.0
        self._waited = 0.0
        self._first = True

    @contextlib.contextmanager
    def waiting_for_data(self):
        """Time in here is data wait."""
        start = time.perf_counter()
        yield
        waited = time.perf_counter() - start
        self._waited += waited
        # As long as the step before was running, nothing was lost.
        if self._behind is None or self._behind[1].first_bad_step.is_ready():
            self._loop.ledger.move(waited, Activity.DATA_WAIT)

    def dispatched(self, found: Metrics, dispatched: _Dispatched) -> None:
        """A step was dispatched: now wait for the one before it."""
        before, self._behind = self._behind, None
        step = dispatched.step
        self._unchecked.append(dispatched)
        if self._totals is None:
            self._totals = metrics.zero(found)
        self._totals = metrics.add(self._totals, found, step)
        now = (step, self._totals)
        if self._is_due(step):
            self._totals = None
        if before is not None:
            self._done(*before)
        self._behind = now

    def settle(self, *, log: bool = False) -> None:
        """Waits for everything dispatched; with `log`, also logs an interval that is not full.

        Raises:
          TrainingDiverged: a step cannot be built upon.
        """
        if self._behind is not None:
            (step, totals), self._behind = self._behind, None
            self._done(step, totals)
            self._check(step, totals)
            self._settled = step
        if log and self._unlogged:
            self._log(self._settled, self._totals)
            self._totals = None

    @contextlib.contextmanager
    def paused(self, *, log: bool):
        """Time in here does not count as training. Nothing is saved or evaluated after a loss that is not finite.

        Args:
          log: as `settle` takes it.
        """
        self.settle(log=log)
        yield
        self._loop.ledger.write()
        self._mark = time.perf_counter()

    def _is_due(self, step: int) -> bool:
        return step % self._loop.config.log_period == 0

    def _done(self, step: int, totals: metrics.Totals) -> None:
        jax.block_until_ready(totals)
        seconds = time.perf_counter() - self._mark
        self._mark += seconds
        self._loop.ledger.done(step)
        self._unlogged += 1
        if self._first:
            self._first, self._waited = False, 0.0
        else:
            self._timed += 1
            self._seconds += seconds
        if self._is_due(step):
            self._log(step, totals)

    def _log(self, step: int, totals: metrics.Totals) -> None:
        loop = self._loop
        self._check(step, totals)
        values = metrics.read(totals.metrics, loop.names)
        if self._timed:
            values["seconds_per_step"] = self._seconds / self._timed
            values["data_wait"] = min(self._waited / self._seconds, 1.0)
        if self._timed and "tokens" in values:  # none where every step was skipped
            values["tokens_per_second"] = values["tokens"] / values["seconds_per_step"]
            if loop.flops_per_token is not None:
                kind, count = loop.parallel.mesh.devices.flat[0].device_kind, loop.parallel.mesh.size
                mfu = metrics.model_flops_utilization(values["tokens_per_second"], loop.flops_per_token, kind, count)
                values |= {} if mfu is None else {"mfu": mfu}
        self._unlogged, self._timed, self._seconds, self._waited = 0, 0, 0.0, 0.0
        loop._write(step, {f"train/{name}": value for name, value in values.items()})
        for callback in loop.callbacks:
            callback.on_log(step, values)

    def _check(self, step: int, totals: metrics.Totals) -> None:
        """Tells the callbacks of spikes up to `step`, and raises if the run cannot go on."""
        done = [dispatched for dispatched in self._unchecked if dispatched.step <= step]
        self._unchecked = self._unchecked[len(done) :]
        bad = metrics.bad_step(totals)
        if bad is None and not metrics.any_skipped(totals):
            return
        for dispatched, (flag, loss, grad_norm) in zip(done, jax.device_get([d.signs for d in done]), strict=True):
            if flag:
                spike = Spike(dispatched.step, float(loss), float(grad_norm), dispatched.data_before)
                for callback in self._loop.callbacks:
                    callback.on_spike(spike)
        if bad is not None:
            raise TrainingDiverged(bad, next(d.data_after for d in done if d.step == bad))


@contextlib.contextmanager
def _termination():
    """Yields a function of the step: whether the processes of the job were asked to end (SIGTERM, or Ctrl-C once).

    With several processes jax's own preemption service finds a step that all have reached.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    previous = {}

    def note(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, previous[number])  # asked again, the process ends at once

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    try:
        yield lambda step: asked.is_set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
