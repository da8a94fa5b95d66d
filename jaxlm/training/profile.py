"""Records a few steps with jax's profiler, and says on one page where their time went.

The trace is for XProf, TensorBoard or Perfetto; the page (`summary.txt`) needs none of them. It is read from the trace
itself: on a TPU from each device's line of operations, on a GPU from its streams, on a CPU from the threads that ran.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, override

import jax
from jax.profiler import ProfileData

from jaxlm.training.callbacks import Callback
from jaxlm.training.state import TrainState

_TOP = 15
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
)
_NCCL = {
    "AllReduce": "all-reduce",
    "AllGather": "all-gather",
    "ReduceScatter": "reduce-scatter",
    "AllToAll": "all-to-all",
    "SendRecv": "collective-permute",
    "Broadcast": "collective-broadcast",
}
# What only contains other operations, which have events of their own.
_CONTAINER = re.compile(r"(while|conditional|call|async-start|async-done|async-update)(\.|$)")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Which steps are recorded: `first` to `last`, both with them. The command line's --profile=N-M.

    Attributes:
      first: at least 2: the first step of a process compiles. A run that goes on between the two records the rest.
      last: at least `first`. A few are enough; traces are large.
    """

    first: int
    last: int

    def __post_init__(self):
        if not 2 <= self.first <= self.last:
            raise ValueError(
                f"A profile of steps {self.first} to {self.last} cannot be made; the first must be at least 2 (step 1 "
                f"compiles) and at most the last."
            )

    @classmethod
    def parse(cls, text: str) -> "ProfileConfig":
        """From "N-M", or "N" for one step."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if found is None:
            raise ValueError(f"--profile={text} is not a range of steps; write --profile=N-M, e.g. --profile=20-24.")
        return cls(int(found[1]), int(found[2] or found[1]))


class Profile(Callback):
    """Records the steps of a `ProfileConfig`, and writes the summary beside the trace.

    Args:
      config: which steps.
      folder: the trace goes to `<folder>/steps_<first>-<last>`.
      report: is told where the summary is.
    """

    def __init__(self, config: ProfileConfig, folder: pathlib.Path, report: Callable[[str], None] = print):
        self._config, self._report = config, report
        self._folder = folder / f"steps_{config.first}-{config.last}"
        self._begun: int | None = None  # the step before the first that is recorded
        self._recording = False

    @override
    def is_due(self, step: int) -> bool:
        if self._recording:
            return step == self._config.last
        return self._begun is None and self._config.first - 1 <= step < self._config.last

    @override
    def on_pause(self, step: int, state: TrainState) -> None:
        if self._recording:
            self._end(step)
        else:
            self._begun, self._recording = step, True
            jax.profiler.start_trace(str(self._folder))

    @override
    def on_end(self, step: int) -> None:
        self._end(step)

    def _end(self, step: int) -> None:
        if not self._recording:
            return
        self._recording = False
        jax.profiler.stop_trace()
        steps = (self._begun + 1, step)
        if jax.process_index() == 0 and steps[0] <= steps[1]:
            summary = self._folder / "summary.txt"
            text = summarize(read_operations(newest_trace(self._folder)), steps)
            summary.write_text(text + "\n")
            self._report(f"Profiled steps {steps[0]} to {steps[1]}: {summary}\n{text}")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One run of one operation.

    Attributes:
      name: of the HLO instruction, e.g. "fusion.12" or "all-gather-start.3"; of a kernel that has none, the kernel's.
      device: which one.
      begin, end: nanoseconds.
    """

    name: str
    device: str
    begin: float
    end: float

    @property
    def collective(self) -> str | None:
        """Its kind, e.g. "all-gather", or None."""
        if (found := _COLLECTIVE.match(self.name)) is not None:
            return found[1]
        if self.name.startswith("nccl"):
            return next((kind for word, kind in _NCCL.items() if word in self.name), "other collective")
        return None


def newest_trace(folder: pathlib.Path) -> pathlib.Path:
    """The newest `xplane.pb` below a folder."""
    return max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)


def read_operations(path: pathlib.Path) -> list[Operation]:
    """What the devices of this host did, without operations that only contain others."""
    return list(operations_of(ProfileData.from_file(str(path))))


def operations_of(trace: ProfileData) -> Iterator[Operation]:
    """`read_operations` of a trace in memory."""
    for plane in trace.planes:
        accelerator = plane.name.startswith("/device:")
        if not accelerator and plane.name != "/host:CPU":
            continue
        for line in plane.lines:
            # A TPU's other lines (modules, steps) repeat what its operations do.
            if accelerator and not (line.name in ("XLA Ops", "Async XLA Ops") or line.name.startswith("Stream")):
                continue
            for event in line.events:
                stats: dict[str, Any] = {} if line.name.endswith("XLA Ops") else dict(event.stats)
                if not accelerator and "hlo_op" not in stats:
                    continue
                name = str(stats.get("hlo_op") or event.name).partition(" = ")[0].lstrip("%")
                if _CONTAINER.match(name) or event.duration_ns <= 0:
                    continue
                device = plane.name if accelerator else f"cpu:{stats.get('device_ordinal', 0)}"
                yield Operation(name, device, event.start_ns, event.start_ns + event.duration_ns)


def summarize(operations: Iterable[Operation], steps: tuple[int, int]) -> str:
    """The page: idle share, what took longest, and how much of each collective nothing else ran beside.

    A collective is exposed while no other operation runs on its device.

    Args:
      operations: of one host.
      steps: first and last step that were recorded.
    """
    by_device: dict[str, list[Operation]] = collections.defaultdict(list)
    for operation in operations:
        by_device[operation.device].append(operation)
    if not by_device:
        return f"Steps {steps[0]} to {steps[1]}: the trace has no operation of a device."
    everything = [operation for found in by_device.values() for operation in found]
    window = max(o.end for o in everything) - min(o.begin for o in everything)
    whole = window * len(by_device)  # device-nanoseconds
    busy, flying, exposed = 0.0, 0.0, 0.0
    by_kind: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])  # calls, in flight, exposed
    for found in by_device.values():
        spans = _union((o.begin, o.end) for o in found)
        compute = _union((o.begin, o.end) for o in found if o.collective is None)
        collectives = [o for o in found if o.collective is not None]
        busy += _length(spans)
        together = _union((o.begin, o.end) for o in collectives)
        flying += _length(together)
        exposed += _length(together) - _overlap(together, compute)
        for kind in {o.collective for o in collectives}:
            own = _union((o.begin, o.end) for o in collectives if o.collective == kind)
            entry = by_kind[kind]
            # A start and its end are one call.
            entry[0] += sum(o.collective == kind and "-done" not in o.name for o in collectives)
            entry[1] += _length(own)
            entry[2] += _length(own) - _overlap(own, compute)
    count = steps[1] - steps[0] + 1
    lines = [
        f"Steps {steps[0]} to {steps[1]} on {len(by_device)} device{'s' if len(by_device) > 1 else ''}: "
        f"{window / 1e6 / count:,.2f} ms a step",
        f"idle {1 - busy / whole:.1%}, collectives in flight {flying / whole:.1%}, of these exposed "
        f"{exposed / whole:.1%} (shares of the devices' time)",
        "",
        f"{'operation':<44}{'calls':>8}{'ms a step':>12}{'share':>8}",
    ]
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for operation in everything:
        entry = totals[operation.name]
        entry[0], entry[1] = entry[0] + 1, entry[1] + operation.end - operation.begin
    per_step = 1e6 * count * len(by_device)
    top = sorted(totals.items(), key=lambda item: -item[1][1])
    for name, (calls, spent) in top[:_TOP]:
        lines.append(f"{name[:43]:<44}{calls:>8,}{spent / per_step:>12,.3f}{spent / whole:>8.1%}")
    if len(top) > _TOP:
        spent = sum(entry[1] for _, entry in top[_TOP:])
        lines.append(f"{f'{len(top) - _TOP} others':<52}{spent / per_step:>12,.3f}{spent / whole:>8.1%}")
    if by_kind:
        lines += ["", f"{'collective':<44}{'calls':>8}{'ms a step':>12}{'exposed':>12}"]
    for kind, (calls, spent, alone) in sorted(by_kind.items(), key=lambda item: -item[1][2]):
        lines.append(f"{kind:<44}{calls:>8,}{spent / per_step:>12,.3f}{alone / per_step:>12,.3f}")
    return "\n".join(lines)


Span = tuple[float, float]


def _union(spans: Iterable[Span]) -> list[Span]:
    """The spans that together cover the same, in order and apart."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def _overlap(a: list[Span], b: list[Span]) -> float:
    """What two unions have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]), 0.0)
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
