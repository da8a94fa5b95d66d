"""The folder of a run: where everything lies, whose it is, and whether it starts, continues or is finished.

run.json            whose folder this is (identity), its starts, whether it is finished
run.lock            held while a process trains here
config.gin          the resolved configuration; earlier ones of the same run as config.1.gin, ...
config_diff.txt     what differs from the defaults
metrics.jsonl       one line a step (`writers`)
tensorboard/        the same for TensorBoard
checkpoints/        see `jaxlm.checkpoints`
samples/            one text file for each time samples were drawn
goodput.jsonl       where the time went, over all starts (`goodput`)
spikes.jsonl        batches whose loss or gradient was an outlier (`spikes`)
hangs/              stacks of all threads, each time the watchdog ended a process (`watchdog`)
profile/            traces and their summaries (`profile`)
report.md loss.png results.json    written at the end (`report`)
"""

import dataclasses
import datetime
import enum
import fcntl
import json
import os
import pathlib
import platform
import time
import uuid
from collections.abc import Mapping
from typing import Any


class RunFolderError(ValueError):
    """A folder that this run cannot use; the message is for the user. Nothing in the folder was changed."""


class Status(enum.Enum):
    """What a run finds in its folder.

    NEW: nothing; it starts.
    CONTINUES: a part of itself; it goes on from the newest checkpoint.
    FINISHED: all of itself; there is nothing to do.
    """

    NEW = "new"
    CONTINUES = "continues"
    FINISHED = "finished"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and its `run.json`. Making one touches nothing; `open` does.

    Attributes:
      path: the folder; made by `open` if absent.
    """

    path: pathlib.Path

    def __post_init__(self):
        if "://" in str(self.path):
            raise RunFolderError(f"A run's folder must be on a file system of this machine, not {self.path}; mount it.")
        object.__setattr__(self, "path", pathlib.Path(self.path).expanduser().resolve())

    @property
    def config(self) -> pathlib.Path:
        """The resolved configuration."""
        return self.path / "config.gin"

    @property
    def config_diff(self) -> pathlib.Path:
        """What differs from the defaults."""
        return self.path / "config_diff.txt"

    @property
    def metrics(self) -> pathlib.Path:
        """JSON lines, one a step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        """TensorBoard's folder."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> pathlib.Path:
        """The checkpoint manager's folder."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> pathlib.Path:
        """Samples as text files."""
        return self.path / "samples"

    @property
    def goodput(self) -> pathlib.Path:
        """The ledger of time, JSON lines."""
        return self.path / "goodput.jsonl"

    @property
    def spikes(self) -> pathlib.Path:
        """Spikes and the examples of their batches, JSON lines."""
        return self.path / "spikes.jsonl"

    @property
    def hangs(self) -> pathlib.Path:
        """What the watchdog left."""
        return self.path / "hangs"

    @property
    def profile(self) -> pathlib.Path:
        """Traces of jax's profiler."""
        return self.path / "profile"

    @property
    def report(self) -> pathlib.Path:
        """The report of the whole run."""
        return self.path / "report.md"

    @property
    def results(self) -> pathlib.Path:
        """The report's numbers, for programs."""
        return self.path / "results.json"

    @property
    def loss_plot(self) -> pathlib.Path:
        """The report's picture."""
        return self.path / "loss.png"

    @property
    def run_json(self) -> pathlib.Path:
        """Identity, starts and status."""
        return self.path / "run.json"

    def open(
        self,
        identity: Mapping[str, str],
        *,
        total_steps: int,
        config: str = "",
        config_diff: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> Status:
        """Claims the folder for this run, called by the first process before anything is written there.

        Args:
          identity: what makes two runs the same run, e.g. {"model": its resolved configuration, "data": fingerprint,
            "objective": ...}. A text of several lines is compared by lines. What may change between two starts of a
            run (number of steps, logging) does not belong here.
          total_steps: the run is finished if it ended at this step or later.
          config: the resolved configuration's text, saved as `config.gin`.
          config_diff: its difference from the defaults.
          facts: of this start, for `run.json`: versions, devices, command line.

        Returns:
          what the run finds; for FINISHED nothing was changed.

        Raises:
          RunFolderError: the folder is another run's, is no run's but has files, or another process trains in it.
        """
        identity = dict(identity)
        known = self._read()
        if known is not None:
            self._refuse_stranger(known["identity"], identity)
            if known["finished_at_step"] is not None and known["finished_at_step"] >= total_steps:
                return Status.FINISHED
        elif self.path.exists():
            if not self.path.is_dir():
                raise RunFolderError(f"{self.path} is a file; a run needs a folder of its own.")
            if files := sorted(child.name for child in self.path.iterdir() if child.name != "run.lock"):
                raise RunFolderError(
                    f"{self.path} has files ({', '.join(files[:3])}, ...) but no run.json, so it is no run's folder; "
                    f"choose a new or an empty one."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        start = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            **(facts or {}),
        }
        record = known or {"id": uuid.uuid4().hex[:12], "identity": identity, "starts": []}
        self._write({**record, "finished_at_step": None, "starts": [*record["starts"], start]})
        self._save_config(config, len(record["starts"]))
        self.config_diff.write_text(config_diff)
        self.samples.mkdir(exist_ok=True)
        return Status.NEW if known is None else Status.CONTINUES

    def await_claim(self, run_id: str, seconds: float = 30.0) -> None:
        """Returns when this process sees the folder that the job's first process claimed.

        Args:
          run_id: `id` there.
          seconds: network storage may show a new file a little later.

        Raises:
          RunFolderError: it sees another one, or none.
        """
        until = time.monotonic() + seconds
        while (record := self._read()) is None or record["id"] != run_id:
            if time.monotonic() > until:
                raise RunFolderError(
                    f"{self.path} on {platform.node()} is not the folder that the job's first process claimed; "
                    f"MODEL_DIR must be on storage that all hosts share."
                )
            time.sleep(0.5)

    @property
    def id(self) -> str:
        """A short name of the run that no other has; for services that want one."""
        return self.read()["id"]

    def read(self) -> dict[str, Any]:
        """The contents of `run.json`."""
        record = self._read()
        if record is None:
            raise RunFolderError(f"{self.path} is no run's folder: it has no run.json.")
        return record

    def finish(self, step: int) -> None:
        """Notes that the run ended as planned, after `step` steps."""
        self._write({**self.read(), "finished_at_step": step})

    def rewind(self, step: int) -> int:
        """Drops metric lines of steps after `step`, and torn lines; returns how many were dropped.

        Called after restoring the checkpoint of `step`: the run will write those steps again.
        """
        return _drop_after(self.metrics, step)

    def forget_spikes(self, step: int) -> int:
        """The same for spikes, at the start of a process alone: one that goes back over a spike keeps its line."""
        return _drop_after(self.spikes, step)

    def write_samples(self, step: int, text: str) -> pathlib.Path:
        """Saves the samples drawn at `step`."""
        self.samples.mkdir(exist_ok=True)
        path = self.samples / f"step_{step:08d}.txt"
        path.write_text(text)
        return path

    def _refuse_stranger(self, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
        theirs, ours = _without_none(theirs), _without_none(ours)
        differing = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        if differing:
            raise RunFolderError(
                f"{self.path} belongs to another run: its {' and '.join(differing)} differ"
                f"{'s' if len(differing) == 1 else ''} ({_difference(theirs, ours, differing[0])}); give this run "
                f"another folder, or the configuration saved in {self.config.name} there."
            )

    def _lock(self) -> None:
        """Holds `run.lock` as long as this process lives; the kernel lets go of it even after SIGKILL."""
        if self.path in _locks:
            return
        handle = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise RunFolderError(
                f"Another process is training in {self.path}; stop it, or use another folder."
            ) from None
        _locks[self.path] = handle

    def release(self) -> None:
        """Lets another process train here; happens by itself when the process ends."""
        if (handle := _locks.pop(self.path, None)) is not None:
            os.close(handle)

    def _save_config(self, text: str, number: int) -> None:
        if self.config.exists() and self.config.read_text() != text:
            self.config.rename(self.path / f"config.{number}.gin")
        self.config.write_text(text)

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.run_json.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            raise RunFolderError(
                f"{self.run_json} is damaged; restore it from a copy, or choose a new folder."
            ) from None

    def _write(self, record: Mapping[str, Any]) -> None:
        _replace(self.run_json, json.dumps(record, indent=1) + "\n")


_locks: dict[pathlib.Path, int] = {}  # open files, one a run folder of this process


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a reader, or a kill, sees the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _drop_after(path: pathlib.Path, step: int) -> int:
    """Drops lines of steps after `step`, and torn ones, from a file of JSON lines; returns how many."""
    if not path.exists():
        return 0
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
    if len(kept) < len(lines):
        _replace(path, "".join(kept))
    return len(lines) - len(kept)


def _step_of(line: str) -> int | None:
    """The step of a line, or None if the line is torn."""
    if not line.endswith("\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _without_none(identity: Mapping[str, str]) -> dict[str, str]:
    """Without fields that are None, which an earlier version may not have had (see `configuration.digest`)."""
    return {
        name: "\n".join(line for line in text.splitlines() if not line.endswith(" = None"))
        for name, text in identity.items()
    }


def _difference(theirs: Mapping[str, str], ours: Mapping[str, str], name: str) -> str:
    """The first line in which two identities differ, as "theirs ... here ..."."""
    if name not in theirs or name not in ours:
        return "one of the two has none"
    old, new = theirs[name].splitlines(), ours[name].splitlines()
    length = max(len(old), len(new))
    pairs = zip(old + [""] * (length - len(old)), new + [""] * (length - len(new)), strict=True)
    before, now = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    return f"there {before.strip()!r}, here {now.strip()!r}"
