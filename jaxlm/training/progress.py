"""What training shows while it runs: the plan at the start, then one progress line.

On a terminal the line is rewritten in place; elsewhere (a file, a batch job's log) plain lines come at intervals.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, override

import jax
import rich.box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxlm.training.callbacks import Callback

_REDRAW_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is going to do; shown before the first step.

    Attributes:
      parameters: number of parameters by group, e.g. {"embedding": 4194304, "decoder": 3147776}.
      steps: training steps in all.
      tokens_per_step: tokens with a loss, per step.
      flops_per_step: floating-point operations of forward and backward, by the formula of `jaxlm.models`.
      seconds: expected duration of the rest of the run, or None where the machine's speed is not known yet.
      facts: further lines, e.g. {"data": "...", "devices": "...", "folder": "..."}.
    """

    parameters: Mapping[str, int]
    steps: int
    tokens_per_step: int
    flops_per_step: float
    seconds: float | None = None
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def table(self) -> Table:
        """The plan as a table for a console."""
        table = Table(title="Plan", box=rich.box.SIMPLE_HEAD, show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column(overflow="fold")
        for name, value in self.facts.items():
            table.add_row(name, "", value)
        for group, count in self.parameters.items():
            table.add_row(f"parameters, {group}", human(count), f"{count:,}")
        total = sum(self.parameters.values())
        table.add_row("parameters, total", human(total), f"{total:,}")
        table.add_row("steps", f"{self.steps:,}", f"of {self.tokens_per_step:,} tokens")
        tokens = self.steps * self.tokens_per_step
        per_parameter = f", {tokens / total:.3g} a parameter" if total else ""
        table.add_row("tokens", human(tokens), f"{tokens:,}{per_parameter}")
        flops = f"{human(self.flops_per_step * self.steps)}FLOP in all"
        table.add_row("compute a step", f"{human(self.flops_per_step)}FLOP", flops)
        expected = "known after the first steps" if self.seconds is None else duration(self.seconds)
        table.add_row("expected time", "", expected)
        return table


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the progress line shows of a step; None where it is not known.

    Attributes:
      loss: cross-entropy of training, nats per token.
      bits_per_byte: the same per byte of text.
      tokens_per_second: all devices together.
      mfu: share of the devices' peak arithmetic, 0 to 1 (`jaxlm.training.metrics` states formula and peaks).
      data_wait: share of the time that the step waited for data, 0 to 1.
    """

    loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    data_wait: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, float]) -> "Progress":
        """From an interval's metrics, by the loop's names."""
        names = {field.name: field.name for field in dataclasses.fields(cls)} | {"loss": "cross_entropy"}
        return cls(**{field: values.get(name) for field, name in names.items()})


class ProgressLine(Callback):
    """The progress line, as a callback of the loop; elsewhere use it as a context manager and call `update`.

    Args:
      total_steps: steps of the whole run.
      start_step: steps done when this process starts.
      console: where to; the standard output of the first process by default.
      plain_seconds: seconds between lines where the output is no terminal.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        console: Console | None = None,
        plain_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console = console or make_console()
        self._total = total_steps
        self._step = start_step
        self._shown = Progress()
        self._plain_seconds = plain_seconds
        self._clock = clock
        # (time, step) of recent steps: what the remaining time is judged by. It begins when the first step of the
        # process was dispatched, and so compiled.
        self._window: collections.deque[tuple[float, int]] = collections.deque(maxlen=1000)
        self._last_drawn = -math.inf
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.on_end(self._step)

    @override
    def on_step(self, step: int, state: Any) -> None:
        self._advance(step)
        # A terminal follows every step with the metrics of the last log; a log file gets them when they are new.
        if self._live is not None and self._clock() - self._last_drawn >= _REDRAW_SECONDS:
            self._draw()

    @override
    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self.update(step, Progress.of(values))

    @override
    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        shown = ", ".join(
            f"{name} {values[name]:.4f}"
            for name in sorted(values)
            if name.endswith(("/cross_entropy", "/bits_per_byte"))
        )
        self.print(f"step {step:,}: {shown or 'evaluated'}")

    @override
    def on_end(self, step: int) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, progress: Progress) -> None:
        """Shows that `step` steps are done, with these metrics."""
        self._shown = progress
        self._advance(step)
        if self._live is not None or self._clock() - self._last_drawn >= self._plain_seconds or step >= self._total:
            self._draw()

    def _advance(self, step: int) -> None:
        if step > self._step:
            self._window.append((self._clock(), step))
        self._step = max(self._step, step)

    def _draw(self) -> None:
        self._last_drawn = self._clock()
        line = self.text(self._shown)
        if self._live is None:
            self.print(line)
            return
        if not self._live.is_started:
            self._live.start()
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def print(self, message: object) -> None:
        """Prints something above the progress line: samples, a table, a sentence."""
        # Plain text as it is: no markup, no colours guessed, no line broken.
        message = Text(message) if isinstance(message, str) else message
        self.console.print(message, soft_wrap=isinstance(message, Text))

    def remaining_seconds(self) -> float | None:
        """Expected time to the last step, from recent steps; None before two were seen."""
        (first, first_step), (last, last_step) = (self._window[0], self._window[-1]) if self._window else ((0, 0),) * 2
        if last_step <= first_step:
            return None
        return (self._total - last_step) * (last - first) / (last_step - first_step)

    def text(self, progress: Progress) -> str:
        """The line itself."""
        share = self._step / self._total if self._total else 1.0
        remaining = self.remaining_seconds()
        parts = [
            f"{share:4.0%} step {self._step:,}/{self._total:,}",
            # What matters most comes first: a narrow terminal cuts the line.
            f"ETA {'?' if remaining is None else duration(remaining)}",
            progress.loss is not None and f"loss {progress.loss:.4f}",
            progress.bits_per_byte is not None and f"{progress.bits_per_byte:.3f} bits/byte",
            progress.tokens_per_second is not None and f"{human(progress.tokens_per_second)}tok/s",
            progress.mfu is not None and f"MFU {progress.mfu:.1%}",
            progress.data_wait is not None and f"data wait {progress.data_wait:.1%}",
        ]
        return " | ".join(part for part in parts if part)


def make_console() -> Console:
    """A console for the standard output of the first process, where the others are quiet.

    Wide where it is no terminal, so that the lines of a log are not folded. Brackets are text, not markup.
    """
    console = Console(highlight=False, markup=False, quiet=jax.process_index() > 0)
    if not console.is_terminal:
        console.width = 160
    return console


def human(number: float) -> str:
    """Three digits and a decimal prefix: 8_390_000 -> "8.39 M", 950 -> "950 "."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if abs(number) < 999.5 or prefix == "Z":
            break
        number /= 1000
    digits = 0 if prefix == "" and float(number).is_integer() else max(0, 2 - int(math.log10(max(abs(number), 1))))
    return f"{number:.{digits}f} {prefix}"


def duration(seconds: float) -> str:
    """5 -> "5s", 65 -> "1m 05s", 3700 -> "1h 01m", 90000 -> "1d 01h"."""
    seconds = round(seconds)
    for unit, (big, small) in {86400: ("d", 3600), 3600: ("h", 60), 60: ("m", 1)}.items():
        if seconds >= unit:
            names = {3600: "h", 60: "m", 1: "s"}
            return f"{seconds // unit}{big} {seconds % unit // small:02d}{names[small]}"
    return f"{seconds}s"
