"""The ledger: every second goes to one activity, over kills and restarts, and lost work is what was done again."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxlm import goodput as command
from jaxlm.training import goodput
from jaxlm.training.goodput import Activity, Ledger, read_ledger


class Clock:
    """Stands in for `time`: it goes on only when told to."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now

    perf_counter = time

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def train(ledger, clock, steps, seconds=4.0):
    """Steps of so many seconds, as the loop accounts for them."""
    with ledger.spending(Activity.STEP):
        for step in steps:
            clock.advance(seconds)
            ledger.done(step)


def test_every_second_is_accounted_for_once(clock, tmp_path):
    path = tmp_path / "goodput.jsonl"
    ledger = Ledger(path, began=990.0)  # the process was 10 s old
    with ledger.spending(Activity.RESTORE):
        clock.advance(3.0)
    ledger.resumed(0)
    with ledger.spending(Activity.STEP):
        clock.advance(8.0)
        ledger.move(2.0, Activity.DATA_WAIT)
        ledger.done(1)
        with ledger.spending(Activity.EVALUATION):
            clock.advance(5.0)
            with ledger.spending(Activity.SAVE):
                clock.advance(1.0)
        clock.advance(4.0)
        ledger.done(2)
    ledger.close()
    ledger.close()
    found = read_ledger(path)
    assert found.seconds == pytest.approx(
        {
            Activity.START_UP: 10.0,
            Activity.RESTORE: 3.0,
            Activity.STEP: 10.0,
            Activity.DATA_WAIT: 2.0,
            Activity.EVALUATION: 5.0,
            Activity.SAVE: 1.0,
        }
    )
    assert found.total == pytest.approx(clock.now - 990.0) and found.goodput == pytest.approx(10 / 31)
    assert (found.starts, found.step, found.lost_steps, found.down_seconds) == (1, 2, 0, 0.0)
    assert "Goodput 32.3%" in found.text() and "data wait" in found.text()


def test_steps_done_again_are_lost_work_and_time_between_starts_is_no_ones(clock, tmp_path):
    path = tmp_path / "goodput.jsonl"
    ledger = Ledger(path)
    ledger.resumed(0)
    train(ledger, clock, range(1, 8))
    with path.open("a") as file:
        file.write('{"event": "spent", "st')  # killed
    clock.advance(100.0)
    ledger = Ledger(path)
    clock.advance(5.0)
    ledger.resumed(4)  # steps 5 to 7 are done again
    train(ledger, clock, range(5, 9))
    ledger.close()
    found = read_ledger(path)
    assert (found.starts, found.step, found.lost_steps) == (2, 8, 3)
    assert found.lost_seconds == pytest.approx(12.0) and found.down_seconds == pytest.approx(100.0)
    assert found.seconds[Activity.STEP] == pytest.approx(8 * 4.0)
    assert found.total == pytest.approx(8 * 4.0 + 12.0 + 5.0)
    assert "lost work (3 steps)" in found.text() and "Between starts 100.0 s" in found.text()


def test_a_line_across_the_step_is_lost_in_part(clock, tmp_path):
    """Steps of half a second share lines; going back twice to one step counts each time."""
    path = tmp_path / "goodput.jsonl"
    ledger = Ledger(path)
    ledger.resumed(0)
    train(ledger, clock, range(1, 9), seconds=0.5)
    ledger.resumed(6)
    train(ledger, clock, range(7, 9), seconds=0.5)
    ledger.resumed(6)
    train(ledger, clock, range(7, 11), seconds=0.5)
    ledger.close()
    found = read_ledger(path)
    assert found.lost_steps == 4 and found.lost_seconds == pytest.approx(2.0)
    assert found.seconds[Activity.STEP] == pytest.approx(10 * 0.5) and found.starts == 1


def test_compiling_is_told_apart_even_where_traces_contain_traces(tmp_path):
    """Nothing is counted twice: all activities together are the time that passed, on the real clock."""
    path = tmp_path / "goodput.jsonl"
    ledger = Ledger(path)
    inner = jax.jit(lambda x: jnp.sin(x) * 2)

    @jax.jit
    def outer(x):
        for _ in range(20):
            x = inner(x + 1) @ x
        return x

    with ledger.spending(Activity.STEP):
        outer(jnp.ones((7, 7))).block_until_ready()
    ledger.close()
    found = read_ledger(path)
    assert 0 < found.seconds[Activity.COMPILE] < found.total
    assert all(seconds >= 0 for seconds in found.seconds.values())
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert found.total <= records[-1]["time"] - records[0]["time"] + 0.01
    before = path.read_text()
    jax.jit(lambda x: x - 3)(jnp.ones(5))  # a closed ledger hears nothing
    assert path.read_text() == before


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger()
    ledger.resumed(3)
    ledger.close()
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "goodput.jsonl").write_text(
        '{"event": "start", "time": 0}\n{"event": "spent", "step": 4, "time": 9, "seconds": {"step": 6, "save": 2}}\n'
    )
    assert command.main([str(tmp_path)]) == 0
    assert "Goodput 75.0%: of 8.0 s in 1 start, up to step 4" in capsys.readouterr().out
    assert command.main([str(tmp_path / "nowhere")]) == 1
    assert "has no goodput.jsonl; give a run's folder" in capsys.readouterr().err
    assert command.main([]) == 2
