"""Ends a process that has stopped making progress, after writing where each of its threads stands.

A collective that waits for a lost host, a file system that does not answer, a data worker that died: each leaves a job
that costs as much as a running one and does nothing. An exit status of its own lets a scheduler start it again.
"""

import dataclasses
import datetime
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, override

import jax

from jaxlm.exit_status import ExitStatus, ended
from jaxlm.training.callbacks import Callback
from jaxlm.training.state import TrainState

_GRACE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as hung.

    Attributes:
      seconds: no step, evaluation or save ended for so long. Must be above the longest of compiling the step, restoring
        or saving a checkpoint, evaluating and sampling.
    """

    seconds: float = 3600.0

    def __post_init__(self):
        if self.seconds <= 0:
            raise ValueError(
                f"WatchdogConfig.seconds is {self.seconds}; it must be above 0 (None, not 0, watches not)."
            )


class Watchdog(Callback):
    """Watches from entering to leaving; a callback, so that the loop's steps tell it of progress.

    When time is up it writes the stacks of all threads to `<folder>/<time>_process<index>.txt` and to standard error,
    and ends the process with `ExitStatus.HUNG`: no handler runs and nothing is saved. Where even Python stands still (a
    thread holds the interpreter's lock), faulthandler's own thread does the same a minute later, with status 1.

    Args:
      config: when; None never.
      folder: where stacks go; made when needed.
    """

    def __init__(self, config: WatchdogConfig | None, folder: pathlib.Path):
        self._config, self._folder = config, folder
        self._beat = time.monotonic()
        self._ended = threading.Event()
        self._backstop: Any = None

    def __enter__(self) -> "Watchdog":
        if self._config is not None:
            self.alive()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._backstop is not None:
            faulthandler.cancel_dump_traceback_later()
            self._backstop.close()
            self._backstop = None

    def alive(self) -> None:
        """Something was done: time begins anew."""
        self._beat = time.monotonic()

    @override
    def on_step(self, step: int, state: TrainState) -> None:
        self.alive()

    @override
    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self.alive()

    @override
    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self.alive()

    def _watch(self) -> None:
        limit = self._config.seconds
        while True:
            left = self._beat + limit - time.monotonic()
            if left <= 0:
                self._end()
            self._arm(left + _GRACE_SECONDS)
            if self._ended.wait(min(left, limit / 4)):
                return

    def _arm(self, seconds: float) -> None:
        """Sets the alarm that needs no interpreter; each time anew, as it cannot be moved."""
        if self._backstop is None:
            self._backstop = os.fdopen(os.dup(sys.__stderr__.fileno()), "w")
        if not self._ended.is_set():
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._backstop)

    def _end(self) -> None:
        now = datetime.datetime.now(datetime.UTC)
        path = self._folder / f"{now:%Y%m%dT%H%M%SZ}_process{jax.process_index()}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError as error:  # perhaps what hangs is this file system
            path = f"nowhere ({error})"
        faulthandler.dump_traceback(sys.__stderr__)
        sys.__stderr__.write(
            f"jaxlm: no progress for {self._config.seconds:g} s, so this process ends with status {ExitStatus.HUNG}; "
            f"the stacks of its threads are in {path}, and the same command continues from the newest checkpoint.\n"
        )
        sys.__stderr__.flush()
        os._exit(ended(ExitStatus.HUNG))
