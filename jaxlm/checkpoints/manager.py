"""Saves checkpoints during training: when, what, which are kept; and finds the one to continue from.

Orbax's CheckpointManager copies the arrays to the host, writes them in the background and commits a step by renaming
its folder. jaxlm adds what it needs for exact resumption: layers stored unstacked (`naming`), everything else of the
run beside the arrays, a manifest inside the commit (`manifest`), and a damaged step is never taken for the latest.
"""

import contextlib
import dataclasses
import enum
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxlm.checkpoints import naming, stored
from jaxlm.checkpoints.manifest import CheckpointError, Verify, write_manifest
from jaxlm.layers.stacking import StackLayout
from jaxlm.parallel import multihost

_AGREE_STEPS = 16  # how often several processes ask each other whether it is time to save


class Writing(enum.Enum):
    """Whether training waits for the disk.

    ASYNCHRONOUS: `save` returns once the arrays are copied to the host.
    SYNCHRONOUS: `save` returns once the step is committed.
    """

    ASYNCHRONOUS = "asynchronous"
    SYNCHRONOUS = "synchronous"


class Better(enum.Enum):
    """Which values of a metric are better."""

    LOWER = "lower"
    HIGHER = "higher"


@dataclasses.dataclass(frozen=True)
class BestConfig:
    """Keeps the best steps by a metric, beside the last ones.

    Attributes:
      metric: name among the `metrics` given to `save`; a step saved without it, or with NaN, is never the best.
      keep: how many of the best steps.
      better: which values are better.
    """

    metric: str
    keep: int = 1
    better: Better = Better.LOWER


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
      period: training steps between checkpoints; None where time alone decides.
      seconds: also save when so many have passed since the last checkpoint, or since the start; None does not.
      keep_last: how many of the newest steps are kept; at least 2, so that a damaged newest one is no loss.
      keep_every: steps divisible by this are kept for ever; None keeps none.
      best: also keep the best by a metric; None keeps none.
      writing: in the background, or while training waits.
      verify: how much is checked before a checkpoint is used.
      timeout_seconds: a save that takes longer is an error.
    """

    period: int | None = 1000
    seconds: float | None = None
    keep_last: int = 3
    keep_every: int | None = None
    best: BestConfig | None = None
    writing: Writing = Writing.ASYNCHRONOUS
    verify: Verify = Verify.DIGESTS
    timeout_seconds: int = 3600

    def __post_init__(self):
        if self.period is not None and self.period < 1:
            raise ValueError(f"CheckpointConfig.period is a number of steps, at least 1, not {self.period}.")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"CheckpointConfig.seconds is {self.seconds}; it must be above 0, or None.")
        if self.period is None and self.seconds is None:
            raise ValueError("CheckpointConfig has neither period nor seconds, so that nothing is saved; give one.")
        if self.keep_last < 2:
            raise ValueError(
                f"CheckpointConfig.keep_last must be at least 2, not {self.keep_last}: the step before the newest is "
                f"what a run continues from when the newest was damaged."
            )
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"CheckpointConfig.keep_every is a number of steps or None, not {self.keep_every}.")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint brought back: the state on its devices, and the stored checkpoint's other contents."""

    state: Any
    checkpoint: stored.StoredCheckpoint


class CheckpointManager:
    """Saves and restores the checkpoints of one run. All processes of a job call its methods alike.

    Args:
      folder: the run's `checkpoints` folder; made if absent.
      config: when to save and what to keep.
      layouts: the model's scanned stacks (`LanguageModel.layouts`); () for an unrolled model.
      report: is told, in one sentence each, what the user should know (a damaged step that was skipped).
      handler: what writes the state; None writes arrays. `pending.handler()` writes `Pending` ones.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        config: CheckpointConfig,
        layouts: tuple[StackLayout, ...] = (),
        report: Callable[[str], None] = print,
        handler: ocp.PyTreeCheckpointHandler | None = None,
    ):
        self.folder = epath.Path(folder).resolve()
        self.config = config
        self.layouts = tuple(layouts)
        self._report = report
        self._saving: int | None = None
        self._last = time.monotonic()  # when the last save began
        best = config.best
        self._orbax = ocp.CheckpointManager(
            self.folder,
            item_handlers=None if handler is None else {"state": handler, "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_preservation(config),
                best_fn=None if best is None else _metric_of(best),  # makes Orbax store the metric
                best_mode="min" if best is None or best.better is Better.LOWER else "max",
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(
                    timeout_secs=config.timeout_seconds, post_finalization_callback=self._write_manifest
                ),
            ),
        )

    def should_save(self, step: int) -> bool:
        """Whether `step` is one to save at. Also raises the error of an earlier save in the background, if any."""
        with _clear_errors(self.folder):
            self._orbax.check_for_errors()
        if step <= 0:
            return False
        period = self.config.period
        return (period is not None and step % period == 0) or self._is_time(step)

    def _is_time(self, step: int) -> bool:
        """Whether `CheckpointConfig.seconds` have passed. The first process's clock decides for all."""
        if self.config.seconds is None:
            return False
        over = time.monotonic() - self._last >= self.config.seconds
        if jax.process_count() == 1:
            return over
        # Agreeing makes every process wait for the first one: not at every step.
        return step % _AGREE_STEPS == 0 and bool(multihost_utils.broadcast_one_to_all(np.array(over)))

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Mapping[str, Any] | None = None,
        callbacks: Mapping[str, Any] | None = None,
        config: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a step; returns when the arrays may be donated or changed, usually before the step is on disk.

        Saving step n makes steps from n on history that did not happen (they are damaged, or the run was rolled
        back): they are renamed to `<step>.set_aside` first, never overwritten.

        Args:
          step: number of training steps done.
          state: any pytree of arrays, sharded or not.
          data: the loader's state; must be JSON-able.
          callbacks: state of callbacks and guards by name; must be JSON-able.
          config: the resolved configuration's text.
          metrics: metrics at this step, for `CheckpointConfig.best`.

        Raises:
          CheckpointError: this save or an earlier one in the background failed.
        """
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        leaves = _unstacked(state, self.layouts)
        meta = {
            "format": stored.FORMAT,
            "step": step,
            "leaves": {
                naming.show(path): {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
                for path, leaf in leaves.items()
            },
            # Copied through JSON: written in the background, while the loader goes on changing its own.
            "data": json.loads(json.dumps(data)),
            "callbacks": json.loads(json.dumps(callbacks or {})),
            "config": config,
            "metrics": metrics,
        }
        with _clear_errors(self.folder, step):
            # Where the folder is gone, Orbax's threads would wait for minutes, beyond the end of the run.
            next(self.folder.iterdir(), None)
            self._orbax.wait_until_finished()
            self._set_aside(step)
            self._saving, self._last = step, time.monotonic()
            best = self.config.best
            ranked = best is not None and math.isfinite(metrics.get(best.metric, math.nan))
            self._orbax.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(naming.nest(leaves)), meta=ocp.args.JsonSave(meta)),
                metrics=metrics if ranked else None,
                force=True,
            )
            if self.config.writing is Writing.SYNCHRONOUS:
                self._orbax.wait_until_finished()

    def restore(self, target: Any, step: int | None = None) -> Restored | None:
        """The newest intact checkpoint, or that of `step`, laid out as `target`.

        Args:
          target: pytree of `jax.ShapeDtypeStruct` with shardings, as `StoredCheckpoint.restore` takes it.
          step: a step by number; None takes the newest that is intact.

        Returns:
          None where `step` is None and nothing was ever saved.

        Raises:
          CheckpointError: `step` is absent or damaged, all steps are, or they do not fit `target`.
        """
        self.wait()
        checkpoint = self.open(step)
        return checkpoint and Restored(checkpoint.restore(target, self.layouts), checkpoint)

    def open(self, step: int | None = None) -> stored.StoredCheckpoint | None:
        """Like `restore`, but reads no arrays: for what must be known before a target can be described."""
        if step is not None:
            return stored.open_checkpoint(self.folder, step, self.config.verify)
        return stored.open_latest(self.folder, self.config.verify, self._report)

    def wait(self) -> None:
        """Returns when every save is on disk, committed and with its manifest."""
        with _clear_errors(self.folder, self._saving):
            self._orbax.wait_until_finished()

    def close(self) -> None:
        """Waits for saves to finish, then releases threads."""
        self.wait()
        self._orbax.close()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_manifest(self) -> None:
        """Called by Orbax in its background thread of process 0, when all files are written, before the commit."""
        final = self.folder / str(self._saving)
        unfinished = [path for path in self.folder.iterdir() if path.name.startswith(f"{self._saving}.orbax")]
        # Where a rename is not atomic (object stores), Orbax writes in place and commits with a file of its own.
        write_manifest(unfinished[0] if unfinished else final)

    def _set_aside(self, step: int) -> None:
        """Renames steps from `step` on."""

        def rename() -> int:
            later = [old for old in stored.committed_steps(self.folder) if old >= step]
            for old in later:
                aside = self.folder / f"{old}.set_aside"
                aside.rmtree(missing_ok=True)
                (self.folder / str(old)).rename(aside)
                self._report(f"Renamed the checkpoint of step {old} to {aside}: step {step} is saved after going back.")
            return len(later)

        if multihost.from_first(rename):  # the others might look when it is done
            self._orbax.reload()


def _unstacked(state: Any, layouts: tuple[StackLayout, ...]) -> dict[naming.Path, jax.Array]:
    """{path on disk: array}, stacks split into their layers.

    The layers are put into the host's memory, where Orbax wants them anyway: on the device they would double the state.
    """
    leaves = naming.flatten(state)
    split: dict[naming.Path, tuple[jax.Array, ...]] = {}
    arrays = {}
    for path, source in naming.sources(state, layouts).items():
        if source.row is None:
            arrays[path] = leaves[source.path]
            continue
        if source.path not in split:
            stack = leaves[source.path]
            layer = stored.layer_sharding(stack.sharding, memory_kind="pinned_host")
            split[source.path] = _splitter(stack.shape[0], layer)(stack)
        arrays[path] = split[source.path][source.row]
    return arrays


@functools.cache
def _splitter(count: int, layer: jax.sharding.Sharding) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Splits a stack into `count` layers, each device its own shards."""
    return jax.jit(lambda stack: tuple(stack[i] for i in range(count)), out_shardings=(layer,) * count)


def _preservation(config: CheckpointConfig) -> checkpoint_managers.PreservationPolicy:
    """The steps to keep, in Orbax's terms."""
    policies = [checkpoint_managers.LatestN(config.keep_last)]
    if config.keep_every is not None:
        policies.append(checkpoint_managers.EveryNSteps(config.keep_every))
    if config.best is not None:
        policies.append(
            checkpoint_managers.BestN(
                get_metric_fn=_metric_of(config.best),
                reverse=config.best.better is Better.LOWER,
                n=config.best.keep,
                keep_checkpoints_without_metrics=False,
            )
        )
    return checkpoint_managers.AnyPreservationPolicy(policies)


def _metric_of(best: BestConfig) -> Callable[[Mapping[str, float]], float]:
    return lambda metrics: metrics[best.metric]


@contextlib.contextmanager
def _clear_errors(folder: epath.Path, step: int | None = None) -> Iterator[None]:
    """Turns what Orbax and the file system raise into one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        raise CheckpointError(
            f"Saving {what} in {folder} failed ({type(error).__name__}: {error}); earlier checkpoints are intact; "
            f"check free space and permissions there, then start again."
        ) from error
