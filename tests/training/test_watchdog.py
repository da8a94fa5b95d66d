"""A process that hangs says where, and ends with a status of its own."""

import time

import pytest

from jaxlm.exit_status import ExitStatus
from jaxlm.training.watchdog import Watchdog, WatchdogConfig

PROGRAM = """
import pathlib, sys, threading, time
from jaxlm.training.watchdog import Watchdog, WatchdogConfig

def waits_for_a_host_that_is_gone():
    threading.Event().wait()

with Watchdog(WatchdogConfig(seconds=0.5), pathlib.Path(sys.argv[1])) as watchdog:
    for step in range(10):  # longer than the limit in all, but never between two steps
        time.sleep(0.1)
        watchdog.on_step(step, None)
    print("ten steps", flush=True)
    waits_for_a_host_that_is_gone()
"""


def test_a_hang_leaves_the_stacks_and_its_own_status(run_python, tmp_path):
    result = run_python(["-c", PROGRAM, str(tmp_path / "hangs")], check=False)
    assert result.stdout == "ten steps\n"
    assert result.returncode == ExitStatus.HUNG == 76
    (file,) = (tmp_path / "hangs").iterdir()
    assert file.name.endswith("_process0.txt")
    for stacks in (file.read_text(), result.stderr):
        assert "waits_for_a_host_that_is_gone" in stacks and "watchdog.py" in stacks
    assert f"no progress for 0.5 s, so this process ends with status 76; the stacks of its threads are in {file}" in (
        result.stderr
    )


def test_it_lets_go(tmp_path):
    with Watchdog(WatchdogConfig(seconds=0.2), tmp_path / "hangs"):
        pass
    with Watchdog(None, tmp_path / "hangs") as never:
        never.alive()
    time.sleep(0.5)
    assert not (tmp_path / "hangs").exists()


def test_its_configuration():
    with pytest.raises(ValueError, match="must be above 0"):
        WatchdogConfig(seconds=0)
