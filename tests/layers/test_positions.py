"""Positions: RoPE turns by relative distance, its scalings keep what they say they keep; ALiBi, sinusoids."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.positions import (
    Alibi,
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    Rope,
    SinusoidalPositions,
    YarnScaling,
    rotate,
    rotation,
)

D = 16
RNG = np.random.default_rng(0)


def turned(config, x, positions):
    return np.asarray(rotate(jnp.asarray(x, jnp.float32), rotation(config, jnp.asarray(positions), x.shape[-1])))


@pytest.mark.parametrize(("fraction", "base"), [(1.0, 1e4), (0.5, 1e4), (1.0, 5e6)])
def test_scores_depend_on_distance_alone(fraction, base):
    """For any base (yi: contexts are extended by raising it)."""
    config = Rope(fraction=fraction, base=base)
    q, k = RNG.normal(size=(1, 1, 2, D)), RNG.normal(size=(1, 1, 2, D))

    def score(at_q, at_k):
        return (turned(config, q, [[at_q]]) * turned(config, k, [[at_k]])).sum(-1)

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert np.abs(score(7, 3) - score(7, 4)).min() > 1e-3
    np.testing.assert_array_equal(turned(config, q, [[0]]), q.astype(np.float32))


def test_rotation_is_multiplication_of_complex_numbers():
    x, position = RNG.normal(size=(1, 1, 1, D)), 5
    got = turned(Rope(base=100.0), x, [[position]])[0, 0, 0]
    frequencies = 100.0 ** (-np.arange(0, D, 2) / D)
    expected = (x[0, 0, 0, : D // 2] + 1j * x[0, 0, 0, D // 2 :]) * np.exp(1j * position * frequencies)
    np.testing.assert_allclose(got, np.concatenate([expected.real, expected.imag]), rtol=1e-5, atol=1e-6)


def test_partial_rotation_leaves_the_rest():
    x = RNG.normal(size=(1, 3, 2, D)).astype(np.float32)
    out = turned(Rope(fraction=0.25), x, [[1, 2, 3]])
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    np.testing.assert_allclose(out[..., :4], turned(Rope(), x[..., :4], [[1, 2, 3]]), rtol=1e-6)


def test_linear_scaling_divides_positions():
    x = RNG.normal(size=(1, 2, 1, D))
    np.testing.assert_allclose(
        turned(Rope(scaling=LinearScaling(4.0)), x, [[8, 20]]), turned(Rope(), x, [[2, 5]]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "scaling, length",
    [
        (NtkScaling(4.0), 10),
        (NtkScaling(4.0, original_length=64), 64 * 7),  # dynamic: 4 * 7 - 3 = 25 at seven times the length
        (Llama3Scaling(8.0), 10),
        (YarnScaling(4.0, original_length=64, beta_fast=8.0), 10),
    ],
    ids=["ntk", "dynamic ntk", "llama3", "yarn"],
)
def test_scalings_keep_the_highest_and_divide_the_lowest_frequency(scaling, length):
    plain, _ = Rope(500000.0).frequencies(128, length)
    scaled, _ = Rope(500000.0, scaling=scaling).frequencies(128, length)
    by = 25.0 if isinstance(scaling, NtkScaling) and scaling.original_length else scaling.factor
    assert scaled[0] == plain[0]
    np.testing.assert_allclose(scaled[-1], plain[-1] / by)
    ratio = plain / scaled
    assert np.all(np.diff(ratio) >= -1e-9) and ratio.max() <= by * (1 + 1e-9)


def test_dynamic_ntk_leaves_texts_as_long_as_those_trained_on():
    scaled, _ = Rope(scaling=NtkScaling(4.0, original_length=64)).frequencies(D, 64)
    np.testing.assert_array_equal(scaled, Rope().frequencies(D, 64)[0])


def test_llama3_passage_between_low_and_high():
    """A wavelength of half of the original context is 2 turns: a third of the way from 1 to 4."""
    base, dims = 500000.0, 128
    plain, _ = Rope(base).frequencies(dims, 1)
    turns = 8192 * plain / (2 * math.pi)
    scaled, _ = Rope(base, scaling=Llama3Scaling()).frequencies(dims, 1)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
    share = np.interp(2.0, [1, 4], [0, 1])
    at_two_turns = np.interp(2.0, turns[::-1], (scaled / plain)[::-1])
    np.testing.assert_allclose(at_two_turns, share + (1 - share) / 8, atol=0.02)


def test_yarn_grows_queries_and_keys():
    config = Rope(scaling=YarnScaling(4.0, original_length=64))
    assert config.frequencies(D, 1)[1] == pytest.approx(0.1 * math.log(4.0) + 1.0)
    x = RNG.normal(size=(1, 1, 1, D))
    np.testing.assert_allclose(np.linalg.norm(turned(config, x, [[3]])), np.linalg.norm(x) * (0.1 * math.log(4) + 1))


def test_alibi_slopes():
    np.testing.assert_array_equal(Alibi().bias(8).slopes, 2.0 ** -np.arange(1, 9))
    # 12 heads: those of 8, then every other one of 16 (the paper's code).
    expected = [*2.0 ** -np.arange(1, 9), *2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])]
    np.testing.assert_allclose(Alibi().bias(12).slopes, expected, rtol=1e-6)


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids(width):
    table = np.asarray(SinusoidalPositions()(jnp.arange(50)[None], width))[0]
    assert table.shape == (50, width)
    half = width // 2
    np.testing.assert_allclose(table[:, 0], np.sin(np.arange(50)), atol=1e-5)
    np.testing.assert_allclose(table[:, 2 * half - 1], np.cos(np.arange(50) / 10000), atol=1e-5)
