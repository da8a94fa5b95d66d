"""Mixing: exact counts without state, shares as the rates say, schedules, nested mixtures."""

import numpy as np
import pytest

from jaxlm.data.mixing import Clock, Drawn, Mixer
from jaxlm.data.tasks import ExamplesRate, Mixture
from jaxlm.piecewise import Piecewise

START = Clock(0, 0, 8.0)


@pytest.fixture(scope="module")
def tasks(make_text):
    return [make_text(name, documents=2) for name in "abc"]


def mixture(tasks, *rates):
    return Mixture("mixture", tuple(zip(tasks, rates)))


@pytest.mark.parametrize(
    "rates",
    [
        (0.5, 0.3, 0.2),
        (1.0, 1e-4, 0.0),
        (0.2, Piecewise((0, 100), (0.2, 2.0)), 1.0),
        (0.2, Piecewise((0, 37, 91), (0.2, 2.0, 0.0), linear=False), 1.0),
    ],
)
def test_the_nth_draw_of_a_data_set_is_its_nth(tasks, rates):
    """`assign` counts what came before without having seen it; here it is counted."""
    mixer = Mixer(mixture(tasks, *rates), {}, 3, START)
    dataset, before = mixer.assign(np.arange(1500))
    counts = np.zeros(3, int)
    for d, n in zip(dataset, before):
        assert counts[d] == n
        counts[d] += 1
    assert mixer.counts(1500).tolist() == counts.tolist()
    # Any order, any subset.
    again = mixer.assign(np.array([1499, 3, 700]))
    assert again[0].tolist() == dataset[[1499, 3, 700]].tolist()
    assert again[1].tolist() == before[[1499, 3, 700]].tolist()


def test_shares_are_kept_at_every_moment(tasks):
    mixer = Mixer(mixture(tasks, 5.0, 3.0, 2.0), {}, 0, START)
    for rows in (10, 100, 1000, 10_000, 1_000_003):
        # The discrepancy of a van der Corput sequence is at most log2(rows) + 1 points an interval.
        assert np.abs(mixer.counts(rows) - rows * np.array([0.5, 0.3, 0.2])).max() <= np.log2(rows) + 1


def test_a_schedule_moves_the_shares(tasks):
    mixer = Mixer(mixture(tasks, 1.0, Piecewise((0, 1000), (0.0, 3.0)), 0.0), {}, 0, START)
    rows = np.array([0, 4000, 8000, 16_000])  # steps 0, 500, 1000, 2000
    counts = np.array([mixer.counts(r) for r in rows])
    share = np.diff(counts[:, 1]) / np.diff(rows)
    steps = np.arange(2000)
    exact = 3 * np.minimum(steps, 1000) / 1000
    exact = exact / (1 + exact)
    expected = [exact[:500].mean(), exact[500:1000].mean(), exact[1000:].mean()]
    np.testing.assert_allclose(share, expected, atol=0.005)


def test_a_new_batch_size_moves_the_schedule_along(tasks):
    """Rates follow steps, so after the batch has doubled a stair holds twice as many rows; what was drawn stays."""
    rates = (1.0, Piecewise((0, 200), (1.0, 0.0), linear=False), 1.0)
    before = Mixer(mixture(tasks, *rates), {}, 0, START)
    drawn = Drawn(800, tuple(before.counts(800)))
    after = Mixer(mixture(tasks, *rates), {}, 0, Clock(100, 800, 16.0), drawn)
    assert before.counts(800).tolist() == after.counts(800).tolist()
    end = 800 + 100 * 16
    assert after.counts(end)[1] > 0.3 * end  # a third until step 200
    assert after.counts(end + 1000)[1] == after.counts(end)[1]
    assert before.counts(end)[1] == before.counts(200 * 8)[1]


@pytest.mark.parametrize("now", [(1.0, 1.0, 8.0), (0.0, Piecewise((0, 400), (1.0, 9.0)), 1.0)])
def test_other_rates_go_on_with_what_each_data_set_had(tasks, now):
    """From a draw on other rates hold: no draw of a data set comes twice or is left out."""
    before = Mixer(mixture(tasks, 6.0, Piecewise((0, 200), (1.0, 5.0)), 1.0), {}, 3, START)
    drawn = Drawn(777, tuple(before.counts(777)))
    after = Mixer(mixture(tasks, *now), {}, 3, Clock(97, 777, 16.0), drawn)
    assert after.counts(777).tolist() == before.counts(777).tolist()
    counts = before.counts(777)
    for dataset, n in zip(*after.assign(np.arange(777, 4000))):
        assert counts[dataset] == n
        counts[dataset] += 1
    assert after.counts(4000).tolist() == counts.tolist()
    shares = (counts - before.counts(777)) / (4000 - 777)
    assert shares == pytest.approx([0.1, 0.1, 0.8] if now[0] else [0, shares[1], 1 - shares[1]], abs=0.01)


def test_rates_by_examples_with_cap_and_temperature(tasks):
    rate = ExamplesRate(maximum=400, scale=2.0, temperature=2.0)
    shares = mixture(tasks, rate, rate, 0.0).shares(0, {"a": 50, "b": 1000, "c": 1})
    # min(2 * 50, 400)^(1/2) = 10 and min(2 * 1000, 400)^(1/2) = 20
    assert shares == pytest.approx({"a": 1 / 3, "b": 2 / 3, "c": 0.0})


def test_a_nested_mixture_has_its_share_as_a_whole(tasks):
    inner = Mixture("inner", ((tasks[0], 10.0), (tasks[1], 30.0)))
    outer = Mixture("outer", ((inner, 1.0), (tasks[2], 1.0), (tasks[0], 2.0)))
    assert [task.name for task in outer.tasks()] == ["a", "b", "c"]
    assert outer.shares(0, {}) == pytest.approx({"a": (0.25 + 2) / 4, "b": 0.75 / 4, "c": 1 / 4})


def test_seeds_deal_differently(tasks):
    rows = np.arange(64)
    deals = {tuple(Mixer(mixture(tasks, 1.0, 1.0, 1.0), {}, seed, START).assign(rows)[0]) for seed in range(4)}
    assert len(deals) == 4


def test_bad_rates_are_refused(tasks, make_text):
    with pytest.raises(ValueError, match="all 0 at step 0"):
        mixture(tasks, 0.0, 0.0, 0.0).shares(0, {})
    with pytest.raises(ValueError, match="gives 'a' the rate -1"):
        mixture(tasks, -1.0, 1.0, 1.0).shares(0, {})
    with pytest.raises(ValueError, match="two different tasks named 'a'"):
        mixture([tasks[0], make_text("a", documents=3)], 1.0, 1.0).tasks()
    with pytest.raises(ValueError, match="has no tasks"):
        Mixture("none", ()).tasks()
