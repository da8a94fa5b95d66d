"""Schedules have the values their papers give, also when they are traced, and lengths may be fractions."""

import math

import jax
import numpy as np
import pytest

from jaxlm.training.schedules import (
    Constant,
    Cosine,
    Decay,
    InverseSquareRoot,
    Join,
    Linear,
    Rewarm,
    Shape,
    WarmupStableDecay,
)


def values(schedule, steps, length):
    """All values in one traced call, as the training step evaluates it."""
    return np.asarray(jax.jit(jax.vmap(lambda step: schedule(step, length)))(np.asarray(steps)))


def test_constant_linear_cosine():
    np.testing.assert_allclose(values(Constant(0.3), [0, 7, 100], 10), 0.3)
    np.testing.assert_allclose(values(Linear(0.0, 1.0), [0, 5, 10, 50], 10), [0, 0.5, 1, 1], rtol=1e-6)
    cosine = [1.0, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)), 0.55, 0.1, 0.1]
    np.testing.assert_allclose(values(Cosine(1.0, 0.1), [0, 25, 50, 100, 200], 100), cosine, rtol=1e-6)


def test_inverse_square_root_is_t5s():
    # Raffel et al. 2020, section 3.1.2: 1 / sqrt(max(n, k)), k = 10^4, so 0.01 for the first 10^4 steps.
    steps = [0, 1, 9_999, 10_000, 40_000, 1_000_000]
    np.testing.assert_allclose(
        values(InverseSquareRoot(), steps, 2_000_000), [1 / math.sqrt(max(n, 10_000)) for n in steps], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("shape", "half"),
    [
        (Shape.LINEAR, 0.5),
        (Shape.COSINE, 0.5),
        (Shape.SQRT, 1 - math.sqrt(0.5)),
        (Shape.SQUARE, 0.75),
        (Shape.EXPONENTIAL, 0.1),
    ],
)
def test_warmup_stable_decay(shape, half):
    end = 0.01 if shape is Shape.EXPONENTIAL else 0.0
    schedule = WarmupStableDecay(peak=1.0, warmup=10, decay=0.2, end=end, shape=shape)
    # 1000 steps: warm-up to 10, plateau to 800, decay to 1000, half of it at 900.
    got = values(schedule, [0, 5, 10, 500, 800, 900, 1000, 2000], 1000)
    np.testing.assert_allclose(got, [0, 0.5, 1, 1, 1, half, end, end], rtol=1e-5, atol=1e-7)


def test_a_trunk_has_the_rates_of_its_branches():
    """Without a decay the plateau lasts to the end, and until a branch decays both have the same bits."""
    trunk, branch = (WarmupStableDecay(peak=3e-3, warmup=10, decay=decay) for decay in (0, 20))
    got = values(trunk, range(100), 100)
    assert got[10:].tolist() == [np.float32(3e-3)] * 90
    assert np.array_equal(values(branch, range(100), 120), got)


def test_join_runs_each_piece_on_its_own_clock():
    schedule = Join((Linear(0.0, 1.0), Constant(1.0), Cosine(1.0, 0.0)), lengths=(0.1, 40))
    # 100 steps: 10 of warm-up, 40 constant, cosine over the 50 that remain.
    np.testing.assert_allclose(values(schedule, [0, 5, 10, 49, 50, 75, 100], 100), [0, 0.5, 1, 1, 1, 0.5, 0], atol=1e-6)


def test_rewarm_starts_from_where_the_old_schedule_stood():
    schedule = Rewarm(before=Cosine(1.0, 0.2), at=100, warmup=10, after=Cosine(0.6, 0.0))
    got = values(schedule, [0, 99, 100, 105, 110, 110 + 45, 200], 200)
    np.testing.assert_allclose(got, [1, 0.2002, 0.2, 0.4, 0.6, 0.3, 0.0], atol=1e-4)


def test_a_fraction_keeps_its_meaning_when_the_run_gets_longer():
    schedule = WarmupStableDecay(peak=1.0, warmup=0.1, decay=0.5, shape=Shape.LINEAR)
    share = np.linspace(0, 1, 11)
    np.testing.assert_allclose(
        values(schedule, (share * 100).astype(int), 100), values(schedule, (share * 1000).astype(int), 1000), atol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Join((Constant(1.0),), lengths=(3,)), "one length for each schedule but the last"),
        (lambda: WarmupStableDecay(1.0, warmup=1000.0, decay=0.1), "write steps as an integer"),
        (lambda: WarmupStableDecay(1.0, warmup=-1, decay=0.1), "cannot be negative"),
        (lambda: Decay(1.0, 0.0, Shape.EXPONENTIAL), "needs positive start and end"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
