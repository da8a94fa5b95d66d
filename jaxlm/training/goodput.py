"""Where a run's time went, over all its starts: a ledger in its folder, and the goodput that follows from it.

Goodput is the share of the time spent on training steps that count. Steps that were done again after a kill, or that
the spike guard went back over, do not: their time is lost work. Everything is local; no service, no account.

The ledger (`goodput.jsonl`) is appended to, one JSON object a line:

    {"event": "start", "time": 1763722000.1}                   a process began, seconds since 1970
    {"event": "resume", "step": 40, "time": ...}               training goes on from step 40
    {"event": "spent", "step": 50, "time": ..., "seconds": {"step": 3.1, "data_wait": 0.2}}   since the line before

A kill loses what was not written yet: the time since the last line, at most a few seconds or one step.
"""

import contextlib
import dataclasses
import enum
import io
import json
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

_WRITE_SECONDS = 2.0


class Activity(enum.Enum):
    """What the time of a process goes to; at each moment one of them.

    START_UP: from the start of the process to the first step, but for the next two.
    RESTORE: checking and reading a checkpoint.
    COMPILE: tracing, lowering and compiling, or fetching the program from the cache.
    STEP: training steps.
    DATA_WAIT: the devices had nothing to do because the next batch was not there.
    EVALUATION: on held-out data.
    SAVE: training waited for a checkpoint to be copied or written.
    OTHER: samples, pictures, the report.
    """

    START_UP = "start_up"
    RESTORE = "restore"
    COMPILE = "compile"
    STEP = "step"
    DATA_WAIT = "data_wait"
    EVALUATION = "evaluation"
    SAVE = "save"
    OTHER = "other"


class Ledger:
    """Accounts for every second of this process since `began`, to one activity each.

    Args:
      path: the ledger's file, appended to; None writes nothing (processes other than the first, tests).
      began: when the process began, seconds since 1970; None is now.
    """

    def __init__(self, path: pathlib.Path | None = None, *, began: float | None = None):
        self._file = None if path is None else _open_at_a_line(path)
        now = time.time()
        began = now if began is None else began
        self._activity = Activity.START_UP
        self._spent: dict[Activity, float] = {}
        self._mark = time.perf_counter() - (now - began)
        self._written = time.perf_counter()
        self._step: int | None = None
        self._compiles = _Compiles(self)
        self._append({"event": "start", "time": round(began, 3)})

    @contextlib.contextmanager
    def spending(self, activity: Activity) -> Iterator[None]:
        """Time in here goes to `activity`, then again to what it went to before."""
        before = self._switch(activity)
        try:
            yield
        finally:
            self._switch(before)

    def move(self, seconds: float, activity: Activity) -> None:
        """Of the time just spent, so many seconds were another activity's."""
        self._spent[self._activity] = self._spent.get(self._activity, 0.0) - seconds
        self._spent[activity] = self._spent.get(activity, 0.0) + seconds

    def resumed(self, step: int) -> None:
        """Training goes on from `step`: steps beyond it that were done before are lost work."""
        self.write()
        self._step = step
        self._append({"event": "resume", "step": step, "time": round(time.time(), 3)})

    def done(self, step: int) -> None:
        """`step` was done; now and then what was spent is written."""
        self._step = step
        if time.perf_counter() - self._written >= _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Writes what was spent since the last time."""
        self._switch(self._activity)
        # Sums of floating-point differences: a nanosecond may be missing.
        seconds = {activity.value: round(max(s, 0.0), 4) for activity, s in self._spent.items() if s > 5e-5}
        self._spent.clear()
        self._written = time.perf_counter()
        if seconds:
            self._append({"event": "spent", "step": self._step, "time": round(time.time(), 3), "seconds": seconds})

    def close(self) -> None:
        """Writes what is not written yet; the ledger may be closed twice."""
        self.write()
        self._compiles.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _switch(self, activity: Activity) -> Activity:
        now = time.perf_counter()
        self._spent[self._activity] = self._spent.get(self._activity, 0.0) + now - self._mark
        self._mark, before, self._activity = now, self._activity, activity
        return before

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def _open_at_a_line(path: pathlib.Path) -> TextIO:
    """Opens a ledger to append to; what a kill left of a last line becomes a line of its own."""
    file = path.open("a+b")
    if file.seek(0, 2):
        file.seek(-1, 2)
        if file.read() != b"\n":
            file.write(b"\n")
    return io.TextIOWrapper(file)


class _Compiles:
    """Moves the time of jax's traces and compilations in the ledger's thread to COMPILE."""

    _EVENTS = frozenset(
        f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
    )

    def __init__(self, ledger: Ledger):
        import jax  # here, so that reading a ledger needs none

        self._ledger: Ledger | None = ledger
        self._thread = threading.get_ident()
        self._spans: list[tuple[float, float]] = []  # (begin, seconds) of events that a larger one may still contain
        # jax keeps listeners for the life of the process (removing one is private), so a closed one ignores events.
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def close(self) -> None:
        self._ledger = None

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        if self._ledger is None or event not in self._EVENTS or threading.get_ident() != self._thread:
            return
        begin = time.perf_counter() - duration
        inside = 0.0  # a trace contains those of the functions it calls, which came first
        while self._spans and self._spans[-1][0] >= begin:
            inside += self._spans.pop()[1]
        self._spans.append((begin, duration))
        del self._spans[:-64]
        self._ledger.move(duration - inside, Activity.COMPILE)


@dataclasses.dataclass(frozen=True)
class Goodput:
    """What a ledger says.

    Attributes:
      seconds: spent on each activity, by all starts; STEP without lost work.
      lost_seconds, lost_steps: steps that were done and had to be done again.
      down_seconds: between the last line of one start and the beginning of the next.
      starts: processes.
      step: the last step done.
    """

    seconds: dict[Activity, float]
    lost_seconds: float
    lost_steps: int
    down_seconds: float
    starts: int
    step: int

    @property
    def total(self) -> float:
        """Seconds that processes ran."""
        return sum(self.seconds.values()) + self.lost_seconds

    @property
    def goodput(self) -> float:
        """Share of the time that processes ran which went into steps that count, 0 to 1."""
        return self.seconds.get(Activity.STEP, 0.0) / self.total if self.total else 0.0

    def rows(self) -> list[tuple[str, float, float]]:
        """(what, seconds, share of `total`): goodput first, then the rest by size."""
        names = {activity: activity.value.replace("_", " ") for activity in Activity}
        rest = [(names[a], s) for a, s in self.seconds.items() if a is not Activity.STEP]
        if self.lost_steps:
            rest.append((f"lost work ({self.lost_steps:,} steps)", self.lost_seconds))
        rows = [("training steps", self.seconds.get(Activity.STEP, 0.0)), *sorted(rest, key=lambda row: -row[1])]
        return [(name, seconds, seconds / self.total if self.total else 0.0) for name, seconds in rows]

    def text(self) -> str:
        """A few lines for a person."""
        starts = f"{self.starts} start{'s' if self.starts > 1 else ''}"
        lines = [f"Goodput {self.goodput:.1%}: of {self.total:,.1f} s in {starts}, up to step {self.step:,}"]
        lines += [f"  {name:<26}{seconds:>12,.1f} s  {share:6.1%}" for name, seconds, share in self.rows()]
        if self.starts > 1:
            wall = self.total + self.down_seconds
            share = self.seconds.get(Activity.STEP, 0.0) / wall if wall else 0.0
            lines.append(f"Between starts {self.down_seconds:,.1f} s; with these, goodput {share:.1%}")
        return "\n".join(lines)


def read_ledger(path: pathlib.Path) -> Goodput:
    """Adds up a ledger. Torn lines (of a kill) are passed over.

    Raises:
      FileNotFoundError: there is none.
    """
    seconds: dict[Activity, float] = {}
    # What may still be lost: (first step, last step, seconds of steps), in order of steps.
    kept: list[tuple[int, int, float]] = []
    lost_seconds, lost_steps, down, starts, step, last_time = 0.0, 0, 0.0, 0, 0, None
    for record in _records(path):
        match record["event"]:
            case "start":
                starts += 1
                if last_time is not None:
                    down += max(record["time"] - last_time, 0.0)
            case "resume":
                while kept and kept[-1][1] > record["step"]:
                    first, last, spent = kept.pop()
                    # Of a line across the step, the part beyond it, taking its steps to be alike.
                    again = last - max(first, record["step"])
                    share = again / (last - first)
                    lost_seconds, lost_steps = lost_seconds + spent * share, lost_steps + again
                    if first < record["step"]:
                        kept.append((first, record["step"], spent * (1 - share)))
                step = record["step"]
            case "spent":
                for name, spent in record["seconds"].items():
                    seconds[Activity(name)] = seconds.get(Activity(name), 0.0) + spent
                if record["step"] is not None and record["step"] > step:
                    kept.append((step, record["step"], record["seconds"].get(Activity.STEP.value, 0.0)))
                    step = record["step"]
        last_time = record["time"]
    if Activity.STEP in seconds:
        seconds[Activity.STEP] -= lost_seconds
    return Goodput(seconds, lost_seconds, lost_steps, down, starts, step)


def _records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
