"""Biases that know positions only: against a table looked up one offset at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.biases import AlibiBias, DenseBias, PlacedBias, RelativeBias, relative_buckets


def bucket(offset, buckets, max_distance, bidirectional):
    """T5's rule for one offset (key minus query), from the words of Raffel et al. 2020 and the released code."""
    distance, start = -offset, 0
    if bidirectional:
        buckets //= 2
        if distance < 0:
            start, distance = buckets, -distance
    else:
        distance = max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    ratio = math.log(distance / exact) / math.log(max_distance / exact)
    return start + min(exact + int(ratio * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20)])
def test_buckets(buckets, max_distance, bidirectional):
    offsets = np.arange(-200, 201)
    # Where the logarithm hits a border exactly, float32 rounding decides; those few offsets are left out.
    exact = buckets // (4 if bidirectional else 2)
    steps = buckets // (2 if bidirectional else 1) - exact
    position = np.log(np.maximum(np.abs(offsets), 1) / exact) / np.log(max_distance / exact) * steps
    safe = np.abs(position - np.round(position)) > 1e-4
    expected = np.array([bucket(o, buckets, max_distance, bidirectional) for o in offsets])
    got = relative_buckets(offsets, buckets, max_distance, bidirectional)
    np.testing.assert_array_equal(got[safe], expected[safe])
    assert safe.mean() > 0.9 and got.min() == 0 and got.max() == buckets - 1


@pytest.mark.parametrize("tq, tk", [(5, 5), (3, 9), (9, 3), (1, 4)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_is_a_look_up(tq, tk, bidirectional):
    table = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    bias = RelativeBias(jnp.asarray(table), 6, bidirectional)
    index = np.array([[bucket(k - q, 8, 6, bidirectional) for k in range(tk)] for q in range(tq)])
    np.testing.assert_array_equal(bias.dense(tq, tk), table[index].transpose(2, 0, 1)[None])
    last = jax.jit(lambda start: bias.dense(1, tk, start))(tq - 1)
    np.testing.assert_array_equal(last, table[index[-1:]].transpose(2, 0, 1)[None])

    weigh = np.random.default_rng(1).normal(size=(1, 2, tq, tk)).astype(np.float32)
    grad = jax.grad(lambda t: jnp.sum(RelativeBias(t, 6, bidirectional).dense(tq, tk) * weigh))(jnp.asarray(table))
    expected = np.zeros_like(table)
    np.add.at(expected, index, weigh[0].transpose(1, 2, 0))
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)


def test_alibi_is_minus_slope_times_distance():
    bias = np.asarray(AlibiBias(np.array([0.5, 0.25])).dense(3, 4))
    np.testing.assert_array_equal(bias[0, 1, 2], -0.25 * np.array([2, 1, 0, 1]))
    np.testing.assert_array_equal(bias[0, 0], bias[0, 1] * 2)
    np.testing.assert_array_equal(AlibiBias(np.array([0.5, 0.25])).dense(2, 4, jnp.int32(1)), bias[:, :, 1:])


@pytest.mark.parametrize("kind", ["relative", "alibi", "placed", "dense"])
def test_a_part_is_the_bias_of_these_queries_and_keys(kind):
    """Starts are traced, as on a device that knows only then which part it has; slices of the part are right too."""
    rng, tq, tk = np.random.default_rng(0), 9, 11
    bias = {
        "relative": RelativeBias(jnp.asarray(rng.normal(size=(8, 2)), jnp.float32), 6, True),
        "alibi": AlibiBias(np.array([0.5, 0.25], np.float32)),
        "placed": PlacedBias(
            AlibiBias(np.array([0.5, 0.25], np.float32)), rng.integers(0, 20, (1, tq)), rng.integers(0, 20, (1, tk))
        ),
        "dense": DenseBias(jnp.asarray(rng.normal(size=(2, tq, tk)), jnp.float32)),
    }[kind]
    whole = np.broadcast_to(np.asarray(bias.dense(tq, tk)), (1, 2, tq, tk))

    @jax.jit
    def cut(query, key):
        part = bias.part(query, 4, key, 3)
        part.check(1, 2, 4, 3)
        return part.dense(4, 3), part.dense(2, 3, 1)

    for query, key in [(0, 0), (5, 1), (2, 8)]:
        among = whole[:, :, query : query + 4, key : key + 3]
        for found, expected in zip(cut(query, key), (among, among[:, :, 1:3])):
            np.testing.assert_allclose(np.broadcast_to(found, expected.shape), expected, rtol=1e-6)


def test_a_placed_bias_goes_by_positions():
    """Tokens of two texts behind one beginning: each has the bias that it has in its text alone."""
    bias = RelativeBias(jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)), jnp.float32), 6, True)
    texts = np.arange(7), np.array([0, 1, 2, 7, 8, 9])  # columns of a beginning of 3 with each of its ends
    positions = np.array([0, 1, 2, 3, 4, 5, 6, 3, 4, 5])[None]
    placed = np.asarray(PlacedBias(bias, positions, positions).dense(10, 10))
    for columns in texts:
        expected = bias.dense(len(columns), len(columns))
        np.testing.assert_array_equal(placed[:, :, columns][:, :, :, columns], expected)
    assert not np.array_equal(placed, bias.dense(10, 10))
    with pytest.raises(ValueError, match=r"PlacedBias.keys must be positions \[B, T\] = \[1, 9\], got \[1, 10\]"):
        PlacedBias(bias, positions, positions).check(1, 2, 10, 9)
