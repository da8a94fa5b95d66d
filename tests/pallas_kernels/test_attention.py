"""The reference attention against float64 arithmetic written out, and the laws every backend must keep."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dropout, masks
from pallas_kernels.attention import Origin, attention, attention_gradients
from pallas_kernels.biases import AlibiBias, DenseBias, PlacedBias, RelativeBias

B, TQ, TK, D, DV = 2, 6, 8, 4, 3


def arrays(heads=4, kv_heads=2, tq=TQ, tk=TK, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, tq, heads, D), (B, tk, kv_heads, D), (B, tk, kv_heads, DV)
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def by_hand(q, k, v, mask, bias=0.0, scale=None, soft_cap=None, sinks=None):
    """float64, one row of scores at a time; also the weights [B, H, Tq, Tk]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    batch, tq, heads, size = q.shape
    tk, group = k.shape[1], heads // k.shape[2]
    visible = np.broadcast_to(np.asarray(mask.dense(tq, tk)), (batch, 1, tq, tk))
    bias = np.broadcast_to(np.asarray(bias, np.float64), (batch, heads, tq, tk))
    out, weights = np.zeros((batch, tq, heads, v.shape[-1])), np.zeros((batch, heads, tq, tk))
    for b, h, t in itertools.product(range(batch), range(heads), range(tq)):
        s = k[b, :, h // group] @ q[b, t, h] * (size**-0.5 if scale is None else scale)
        s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
        e = np.exp(s + bias[b, h, t]) * visible[b, 0, t]
        total = e.sum() + (0.0 if sinks is None else np.exp(sinks[h]))
        weights[b, h, t] = e / total if e.any() else 0.0
        out[b, t, h] = weights[b, h, t] @ v[b, :, h // group]
    return out, weights


def test_log_sum_exp_and_its_gradient():
    """Halves of the keys, combined by their log-sum-exp, are the whole, forward and backward."""
    q, k, v = map(jnp.asarray, arrays(kv_heads=4))
    sinks, cut = jnp.array([0.5, -1.0, 2.0, 0.0]), 3
    weigh = np.random.default_rng(1).normal(size=(B, TQ, 4, DV))

    def whole(q, k, v, sinks):
        out, lse = attention(q, k, v, mask=masks.Causal(), sinks=sinks, return_lse=True)
        return jnp.sum(out * weigh) + jnp.sum(jnp.sin(lse))

    def parts(q, k, v, sinks):
        first = attention(q, k[:, :cut], v[:, :cut], mask=masks.Causal(), sinks=sinks, return_lse=True)
        second = attention(q, k[:, cut:], v[:, cut:], mask=masks.Causal(-cut), return_lse=True)
        lse = jnp.logaddexp(first[1], second[1])
        shares = [jnp.exp(part[1] - lse).swapaxes(1, 2)[..., None] for part in (first, second)]
        return jnp.sum((shares[0] * first[0] + shares[1] * second[0]) * weigh) + jnp.sum(jnp.sin(lse))

    values = [jax.value_and_grad(f, (0, 1, 2, 3))(q, k, v, sinks) for f in (whole, parts)]
    for a, b in zip(*map(jax.tree.leaves, values)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


SEGMENTS = masks.Segments(
    np.array([[1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1]]), np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1] * 7 + [0]])
)
BIAS = np.random.default_rng(9).normal(size=(1, 4, TQ, TK)).astype(np.float32)
CASES = {
    "full": dict(mask=masks.Full()),
    "causal, scaled": dict(mask=masks.Causal(), scale=1.0),
    "packed, bias": dict(mask=SEGMENTS, bias=BIAS),
    "window, cap": dict(mask=masks.Causal(1) & masks.Window(2, 0), soft_cap=2.0),
    "sinks": dict(mask=masks.Causal(), sinks=np.array([0.5, -1.0, 2.0, 0.0], np.float32)),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, kv_heads):
    options = dict(CASES[name])
    inputs = arrays(kv_heads=kv_heads)
    np.testing.assert_allclose(attention(*inputs, **options), by_hand(*inputs, **options)[0], rtol=2e-5, atol=2e-6)

    # Gradients: along one direction against a central difference of the float64 arithmetic.
    rng = np.random.default_rng(1)
    directions = [rng.normal(size=x.shape) for x in inputs]
    weigh = rng.normal(size=(B, TQ, 4, DV))
    grads = jax.grad(lambda args: jnp.sum(attention(*args, **options) * weigh))(tuple(map(jnp.asarray, inputs)))
    analytic = sum(np.vdot(g, d) for g, d in zip(grads, directions))
    step = 1e-5
    ends = [
        by_hand(*(x.astype(np.float64) + sign * step * d for x, d in zip(inputs, directions)), **options)[0]
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(analytic, np.sum((ends[0] - ends[1]) * weigh) / (2 * step), rtol=1e-4)


def test_gradients_of_bias_and_sinks():
    inputs, sinks = arrays(), np.array([0.5, -1.0, 2.0, 0.0])
    weigh = np.random.default_rng(1).normal(size=(B, TQ, 4, DV))

    def loss(bias, sinks):
        return jnp.sum(attention(*inputs, mask=SEGMENTS, bias=DenseBias(bias, True), sinks=sinks) * weigh)

    grads = jax.grad(loss, (0, 1))(jnp.asarray(BIAS), jnp.asarray(sinks, jnp.float32))
    step = 1e-5
    direction = np.random.default_rng(2).normal(size=BIAS.shape)
    ends = [by_hand(*inputs, SEGMENTS, BIAS + s * step * direction, sinks=sinks)[0] for s in (1, -1)]
    np.testing.assert_allclose(
        np.vdot(grads[0], direction), np.sum((ends[0] - ends[1]) * weigh) / (2 * step), rtol=1e-4
    )
    ends = [by_hand(*inputs, SEGMENTS, BIAS, sinks=sinks + s * step)[0] for s in (1, -1)]
    np.testing.assert_allclose(np.sum(grads[1]), np.sum((ends[0] - ends[1]) * weigh) / (2 * step), rtol=1e-4)


@pytest.mark.parametrize("sinks", [None, np.zeros(4, np.float32)], ids=["plain", "sinks"])
def test_a_query_that_sees_nothing_gives_zero_and_passes_no_gradient(sinks):
    inputs = tuple(map(jnp.asarray, arrays()))
    hidden = np.asarray(SEGMENTS.q_ids) == 0
    run = lambda *args: attention(*args, mask=SEGMENTS, bias=BIAS, sinks=sinks)  # noqa: E731
    assert hidden.any() and np.all(np.asarray(run(*inputs))[hidden] == 0.0)
    dq, dk, dv = jax.grad(lambda *args: jnp.sum(run(*args) ** 2 + run(*args)), (0, 1, 2))(*inputs)
    assert np.all(np.asarray(dq)[hidden] == 0.0)
    # Keys of padding are seen by nobody.
    unseen = np.asarray(SEGMENTS.kv_ids) == 0
    assert np.all(np.asarray(dk)[unseen] == 0.0) and np.all(np.asarray(dv)[unseen] == 0.0)
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))


def test_nothing_leaks_across_segments():
    """Law 1: whatever stands in other segments, results and gradients stay the same to the last bit.

    A NaN is planted in foreign queries and keys. In foreign values it would spread, as in every product of matrices
    (0 * NaN is NaN), so those get the largest finite numbers instead.
    """
    q, k, v = arrays(tq=TK)
    ids = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2]])
    mask = masks.Causal() & masks.Segments(ids)
    foreign = ids != 1
    q2, k2, v2 = (np.array(x) for x in (q, k, v))
    q2[foreign], k2[foreign], v2[foreign] = np.nan, np.nan, 1e38
    first = attention(q, k, v, mask=mask)
    second = attention(q2, k2, v2, mask=mask)
    np.testing.assert_array_equal(np.asarray(first)[~foreign], np.asarray(second)[~foreign])

    def loss(args):
        return jnp.sum(jnp.where(foreign[:, :, None, None], 0.0, attention(*args, mask=mask)) ** 2)

    for g in jax.grad(loss)(tuple(map(jnp.asarray, (q, k, v)))):
        assert np.all(np.asarray(g)[foreign] == 0.0) and np.any(np.asarray(g)[~foreign] != 0.0)


def test_causal_is_prefix_of_length_zero_bit_for_bit():
    inputs = arrays(tq=TK)
    ends = np.zeros((B, TK), np.int32)
    np.testing.assert_array_equal(
        attention(*inputs, mask=masks.Causal()), attention(*inputs, mask=masks.PrefixLM(ends))
    )


def test_bfloat16_softmax_is_float32():
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in arrays()]
    out = attention(*inputs, mask=masks.Causal())
    assert out.dtype == jnp.bfloat16
    exact = by_hand(*(np.asarray(x, np.float32) for x in inputs), masks.Causal())[0]
    # 2^-8 is bfloat16's rounding of the weights and of the result.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=2 * 2**-8 * np.abs(exact).max())


def test_dropout_is_the_documented_hash():
    inputs, rate, key = arrays(heads=2, kv_heads=2), 0.4, jax.random.key(3)
    out = attention(*inputs, mask=masks.Causal(), dropout_rate=rate, dropout_key=key)
    kept = dropout.keep(dropout.seed_of(key), *jnp.indices((B, 2, TQ, TK), sparse=True), rate)
    weights = by_hand(*inputs, masks.Causal())[1] * np.asarray(kept) / (1 - rate)
    np.testing.assert_allclose(out, np.einsum("bhqk,bkhd->bqhd", weights, inputs[2]), rtol=2e-5, atol=2e-6)
    without = attention(*inputs, mask=masks.Causal())
    np.testing.assert_array_equal(without, attention(*inputs, mask=masks.Causal(), dropout_rate=rate))
    np.testing.assert_array_equal(without, attention(*inputs, mask=masks.Causal(), dropout_rate=0.0, dropout_key=key))


def test_dropout_is_even_and_independent():
    shape, rate = (3, 4, 64, 128), 0.1
    indices = jnp.indices(shape, sparse=True)
    kept = np.asarray(dropout.keep(jnp.uint32(7), *indices, rate), float) - (1 - rate)
    deviation = np.sqrt(rate * (1 - rate))
    n = kept.size
    assert abs(kept.mean()) < 4 * deviation / np.sqrt(n)
    for axis in range(4):  # neither along an axis nor between neighbours
        others = tuple(i for i in range(4) if i != axis)
        means = kept.mean(others)
        assert np.abs(means).max() < 5 * deviation / np.sqrt(n / shape[axis])
        neighbours = (kept * np.roll(kept, 1, axis)).mean() / deviation**2
        assert abs(neighbours) < 5 / np.sqrt(n)
    other = np.asarray(dropout.keep(jnp.uint32(8), *indices, rate), float) - (1 - rate)
    assert abs((kept * other).mean()) / deviation**2 < 5 / np.sqrt(n)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[..., 0], k, v), "4 axes"),
        (lambda q, k, v: (q, k[..., :2], v), "attention needs q"),
        (lambda q, k, v: (q[:, :, :3], k, v), "2 key heads must divide the 3 query heads"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*arrays()), mask=masks.Full())


PLACES = np.random.default_rng(3).integers(0, 40, (2, TQ)), np.random.default_rng(4).integers(0, 40, (2, TK))


@pytest.mark.parametrize("backend", ["xla", "xla_chunked", "xla_blocks", "pallas_tpu"])
@pytest.mark.parametrize("kind", ["relative", "alibi"])
def test_biases_by_given_positions(backend, kind):
    table = jnp.asarray(BIAS[0, :, :, 0].T)
    bias = PlacedBias(RelativeBias(table, 20) if kind == "relative" else AlibiBias(table[0]), *PLACES)
    expected = attention(*arrays(), mask=masks.Full(), bias=DenseBias(bias.dense(TQ, TK)), backend="xla")
    found = attention(*arrays(), mask=masks.Full(), bias=bias, backend=backend)
    np.testing.assert_allclose(found, expected, atol=1e-5)

    def loss(q, bias, backend):
        return jnp.sum(attention(q, *arrays()[1:], mask=masks.Full(), bias=bias, backend=backend) ** 2)

    gradient = jax.grad(loss)(arrays()[0], bias, backend)  # of all else there are gradients as ever
    np.testing.assert_allclose(gradient, jax.grad(loss)(arrays()[0], DenseBias(bias.dense(TQ, TK)), "xla"), atol=1e-4)
    assert np.abs(found - attention(*arrays(), mask=masks.Full(), backend=backend)).max() > 1e-3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: x[:, :, :1, :1], r"gradient was asked for of an array .* DenseBias\(array, differentiable=True\)"),
        (lambda x: AlibiBias(x[0, :, 0, 0]), "gradient was asked for of AlibiBias.slopes, which are constants"),
        (lambda x: PlacedBias(RelativeBias(x[0, :, :4, 0]), *PLACES), "gradient was asked for of a PlacedBias"),
    ],
)
def test_gradients_that_kernels_do_not_compute_are_errors(make, message):
    loss = lambda x: attention(*arrays(), mask=masks.Full(), bias=make(x)).sum()  # noqa: E731
    with pytest.raises(ValueError, match=message):
        jax.grad(loss)(jnp.asarray(BIAS))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bias=np.zeros((3, TQ, TK))), r"bias must be broadcastable to \[B, H, Tq, Tk\] = \[2, 4, 6, 8\], got"),
        (dict(bias=AlibiBias(np.ones(3))), r"AlibiBias.slopes must be \[H\] = \[4\], got \[3\]"),
        (
            dict(bias=RelativeBias(np.ones((8, 3)))),
            r"RelativeBias.table must be \[buckets, H\] with H = 4, got \[8, 3\]",
        ),
        (dict(sinks=np.ones(3)), r"sinks must be \[Hq\] = \[4\], got \[3\]"),
        (dict(mask=masks.KVLength(np.ones(3))), "KVLength.length must have the shape"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*arrays(), **{"mask": masks.Full(), **options})


@pytest.mark.parametrize("backend", ["xla", "xla_chunked", "xla_blocks", "pallas_tpu"])
def test_gradients_of_parts_add_up_to_those_of_the_whole(backend):
    """Keys cut in two; a part whose keys some queries do not see, dropout and a bias included."""
    q, k, v = map(jnp.asarray, arrays())
    table = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)
    gradient, lse_gradient = (
        jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32) for shape in ((B, TQ, 4, DV), (B, 4, TQ))
    )
    ids = np.array([[1, 1, 1, 2, 2, 0]] * B), np.array([[1] * 3 + [2] * 5] * B)
    mask, cut = masks.Causal() & masks.Segments(*ids), 3
    call = dict(dropout_rate=0.3, dropout_key=jax.random.key(0), soft_cap=3.0)

    @jax.jit
    def whole(q, k, v, table):
        def run(q, k, v, table):
            return attention(q, k, v, mask=mask, bias=RelativeBias(table, 6), return_lse=True, backend="xla", **call)

        (out, lse), pull = jax.vjp(run, q, k, v, table)
        return out, lse, pull((gradient, jnp.where(jnp.isneginf(lse), 0.0, lse_gradient)))

    @jax.jit
    def parts(q, k, v, table, out, lse):
        delta = jnp.einsum("bqhd,bqhd->bhq", gradient, out) - jnp.where(jnp.isneginf(lse), 0.0, lse_gradient)
        rows, found = mask.rows(TQ, TK), []
        for start, stop in ((0, cut), (cut, TK)):
            keys = (0, TQ, start, stop - start)
            part = rows.part(*keys)
            bias, pull = jax.vjp(lambda t, keys=keys: RelativeBias(t, 6).part(*keys), table)
            *grads, d_bias = attention_gradients(
                q,
                k[:, start:stop],
                v[:, start:stop],
                lse=lse,
                delta=delta,
                gradient=gradient,
                mask=masks.Intervals(part.lo, part.hi),
                bias=bias,
                origin=Origin(key=start),
                backend=backend,
                **call,
            )
            found.append((*grads, pull(d_bias)[0]))
        first, second = found
        keys = (jnp.concatenate([a, b], axis=1) for a, b in zip(first[1:3], second[1:3]))
        return first[0] + second[0], *keys, first[3] + second[3]

    out, lse, expected = whole(q, k, v, table)
    for a, b in zip(parts(q, k, v, table, out, lse), expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
