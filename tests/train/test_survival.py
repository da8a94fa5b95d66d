"""Law 4 by the benchmark's own means: three kills, one of them inside a save. `benchmarks/survival.py` has the rest."""

import time

from benchmarks.survival import kill_runs, make_gin
from benchmarks.tiny_runs import metrics


def test_killed_runs_are_the_untouched_one(workshop, full):
    """SIGKILL; every metric of every step is the same, and each start continues from the newest commit."""
    gin = make_gin(workshop, "killed")
    start = time.monotonic()
    untouched = workshop.observe("untouched", gin)
    expected = metrics(workshop.folder / "untouched")
    assert untouched["status"] == 0 and len(expected) == 24
    counts = kill_runs(
        workshop,
        gin,
        expected,
        at_random=40 if full else 2,
        saving=20 if full else 1,
        seconds=time.monotonic() - start,
    )
    assert counts["kills"] >= (60 if full else 3) and counts["inside a save"] >= (20 if full else 1)
    assert counts["runs compared"] >= 1 and counts["runs that differ"] == counts["commits lost"] == 0
