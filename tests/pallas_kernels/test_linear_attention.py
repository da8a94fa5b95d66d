"""Chunked linear attention is the recurrence, forward and backward: any decays, chunks, segments and backend."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import ahead_of_time
from pallas_kernels.linear_attention import (
    LINEAR_ATTENTION,
    UnsupportedLinearAttention,
    linear_attention,
    linear_attention_step,
    prefix_state,
)

B, T, H, DK, DV = 2, 50, 2, 24, 40  # neither T nor the head sizes divide anything
SCALE = 0.3
KINDS = ("none", "scalar", "channel")
NAMES = ("q", "k", "v", "log_decay", "initial_state")


def arguments(kind, seed=0, length=T, dtype="float32"):
    """q, k, v, log_decay, initial_state; decays from 0 over 1e-30 to exactly 1."""
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(B, length, H, DK)).astype(dtype) for _ in range(2))
    v = rng.normal(size=(B, length, H, DV)).astype(dtype)
    shape = {"none": None, "scalar": (B, length, H), "channel": (B, length, H, DK)}[kind]
    log_decay = None
    if shape:
        decay = rng.choice([0.0, 1e-30, 0.3, 0.9, 0.99, 1.0], size=shape, p=[0.05, 0.05, 0.2, 0.3, 0.2, 0.2])
        with np.errstate(divide="ignore"):
            log_decay = np.log(decay).astype(np.float32)
    return q, k, v, log_decay, rng.normal(size=(B, H, DK, DV)).astype(np.float32)


def recurrence(q, k, v, log_decay, state):
    """(o, final state, states before each step and after the last) in float64, step by step."""
    q, k, v, state = (np.asarray(x, np.float64) for x in (q, k, v, state))
    states, o = [state], np.zeros(v.shape)
    for t in range(q.shape[1]):
        state = decay_at(log_decay, t) * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        o[:, t] = SCALE * np.einsum("bhk,bhkv->bhv", q[:, t], state)
        states.append(state)
    return o, state, states


def decay_at(log_decay, t):
    return 1.0 if log_decay is None else np.exp(np.asarray(log_decay[:, t], np.float64)).reshape(B, H, -1, 1)


def gradients(q, k, v, log_decay, state, do, d_final):
    """Gradients of sum(o * do) + sum(final * d_final), from the last step to the first, in float64."""
    *_, states = recurrence(q, k, v, log_decay, state)
    q, k, v, do, g = (np.asarray(x, np.float64) for x in (q, k, v, do, d_final))
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    d_decay = None if log_decay is None else np.zeros(log_decay.shape)
    for t in reversed(range(q.shape[1])):
        g = g + SCALE * q[:, t, :, :, None] * do[:, t, :, None, :]
        dq[:, t] = SCALE * np.einsum("bhkv,bhv->bhk", states[t + 1], do[:, t])
        dk[:, t] = np.einsum("bhkv,bhv->bhk", g, v[:, t])
        dv[:, t] = np.einsum("bhkv,bhk->bhv", g, k[:, t])
        g_before = decay_at(log_decay, t) * g
        if log_decay is not None:
            by_channel = np.sum(g_before * states[t], axis=-1)
            d_decay[:, t] = by_channel if log_decay.ndim == 4 else by_channel.sum(-1)
        g = g_before
    return dq, dk, dv, d_decay, g


def call(*args, **options):
    *arrays, state = args
    return linear_attention(*arrays, initial_state=state, scale=SCALE, **options)


@functools.partial(jax.jit, static_argnames=("backend", "chunk"))
def with_gradients(args, cotangents, segment_ids=None, *, backend="xla", chunk=32):
    results, vjp = jax.vjp(lambda *a: call(*a, segment_ids=segment_ids, backend=backend, chunk=chunk), *args)
    return results, vjp(cotangents)


def cotangents(length=T, dtype="float32"):
    rng = np.random.default_rng(9)
    return rng.normal(size=(B, length, H, DV)).astype(dtype), rng.normal(size=(B, H, DK, DV)).astype(np.float32)


def error(x, reference):
    return np.linalg.norm(np.asarray(x, np.float64) - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_gradients_are_slopes(kind):
    """The float64 gradients that all others are held against agree with a difference along a random direction."""
    args = arguments(kind)
    do, d_final = cotangents()
    rng = np.random.default_rng(3)
    along = [None if x is None else np.where(np.isfinite(x), rng.normal(size=x.shape), 0.0) for x in args]

    def loss(step):
        moved = [None if x is None else np.asarray(x, np.float64) + step * d for x, d in zip(args, along)]
        o, final, _ = recurrence(*moved)
        return np.sum(o * do) + np.sum(final * d_final)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    found = sum(np.sum(g * d) for g, d in zip(gradients(*args, do, d_final), along) if g is not None)
    assert abs(found - slope) < 1e-7 * abs(slope)


@pytest.mark.parametrize("backend", LINEAR_ATTENTION.backends)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_recurrence(kind, backend):
    args = arguments(kind)
    (o, final), found = with_gradients(args, cotangents(), backend=backend)
    expected_o, expected_final, _ = recurrence(*args)
    assert error(o, expected_o) < 1e-5 and error(final, expected_final) < 1e-5
    for name, g, expected in zip(NAMES, found, gradients(*args, *cotangents())):
        if expected is not None:
            assert error(g, expected) < 1e-5, name
    if kind != "none":
        assert np.all(np.asarray(found[3])[np.isneginf(args[3])] == 0.0)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_mild_decays_after_violent_ones_keep_their_digits(kind):
    """One sum of log decays would have lost them: -69 a step leaves 1e-4 of a digit for a step of -0.1."""
    q, k, v, log_decay, state = arguments(kind)
    rng = np.random.default_rng(1)
    log_decay = np.where(rng.random(log_decay.shape) < 0.5, np.log(1e-30), np.log(0.9)).astype(np.float32)
    args = (q, k, v, log_decay, state)
    (o, _), found = with_gradients(args, cotangents())
    assert error(o, recurrence(*args)[0]) < 1e-6
    for g, expected in zip(found, gradients(*args, *cotangents())):
        assert error(g, expected) < 1e-5


@pytest.mark.parametrize("strength", [0.0, 1e-30])
@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_nothing_overflows(kind, strength):
    """Decays of 0 or nearly 0 at every step: each step sees itself alone, and all gradients are finite."""
    q, k, v, log_decay, state = arguments(kind)
    with np.errstate(divide="ignore"):
        args = (q, k, v, np.full_like(log_decay, np.log(strength)), state)
    (o, final), found = with_gradients(args, cotangents())
    assert error(o, SCALE * np.sum(q * k, axis=-1, keepdims=True, dtype=np.float64) * v) < 1e-5
    assert error(final, recurrence(*args)[1]) < 1e-5
    for g, expected in zip(found[:3], gradients(*args, *cotangents())):
        assert error(g, expected) < 1e-5
    assert np.all(np.isfinite(found[3])) and np.max(np.abs(found[3])) < 1e-4


@pytest.mark.parametrize("length, chunk", [(1, 16), (16, 16), (50, 64), (50, None), (97, 48)])
def test_any_length_and_chunk(length, chunk):
    args = arguments("scalar", length=length)
    (o, final), found = with_gradients(args, cotangents(length), chunk=chunk)
    expected_o, expected_final, _ = recurrence(*args)
    assert error(o, expected_o) < 1e-5 and error(final, expected_final) < 1e-5
    for g, expected in zip(found[:3], gradients(*args, *cotangents(length))):
        assert error(g, expected) < 1e-5


def test_two_halves_make_a_whole():
    args = arguments("channel", length=64)
    whole, final = jax.jit(call)(*args)
    half = jax.jit(functools.partial(call, chunk=32))
    first, between = half(*(x[:, :32] for x in args[:4]), args[4])
    second, end = half(*(x[:, 32:] for x in args[:4]), between)
    assert error(np.concatenate([first, second], axis=1), np.asarray(whole, np.float64)) < 1e-6
    assert error(end, np.asarray(final, np.float64)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_chunked_form(kind):
    *steps, state = arguments(kind)
    o, final = jax.jit(call)(*steps, state)
    step = jax.jit(functools.partial(linear_attention_step, scale=SCALE))
    for t in range(T):
        state, o_t = step(state, *(None if x is None else x[:, t] for x in steps))
        np.testing.assert_allclose(o_t, o[:, t], rtol=1e-4, atol=1e-4)
    assert error(state, np.asarray(final, np.float64)) < 1e-5


def test_segments_without_decay_are_a_decay_of_zero_at_their_starts():
    q, k, v, _, state = arguments("none")
    ids = jnp.asarray([[5] * 20 + [2] * 30] * B)
    log_decay = np.zeros((B, T, H), np.float32)
    log_decay[:, 20] = -np.inf
    o, _ = jax.jit(functools.partial(call, segment_ids=ids))(q, k, v, None, state)
    assert error(o, recurrence(q, k, v, log_decay, state)[0]) < 1e-5


SEGMENTS = np.array([[1] * 20 + [2] * 13 + [3] * 10 + [0] * 7, [0] * 3 + [1] * 30 + [2] * 1 + [3] * 16])


def pieces():
    """(row, slice) of each segment, and whether it is its row's first."""
    for row in range(B):
        for segment in (1, 2, 3):
            at = np.flatnonzero(SEGMENTS[row] == segment)
            yield row, slice(at[0], at[-1] + 1), segment == 1


@pytest.mark.parametrize("kind, backend", [("scalar", "xla"), ("channel", "xla"), ("scalar", "pallas_tpu")])
def test_a_packed_row_equals_its_segments(kind, backend):
    """Law 1, forward and backward: segments start anew, the row's first from the initial state; padding gives 0."""
    args = arguments(kind)
    do, _ = cotangents()
    (o, final), found = with_gradients(args, (do, np.zeros_like(args[4])), jnp.asarray(SEGMENTS), backend=backend)
    *steps, state = args
    for row, at, is_first in pieces():
        alone = [None if x is None else np.repeat(x[row : row + 1, at], B, axis=0) for x in steps]
        start = np.repeat(state[row : row + 1] * is_first, B, axis=0)
        expected, end, _ = recurrence(*alone, start)
        assert error(o[row, at], expected[0]) < 1e-5
        expected = gradients(*alone, start, np.repeat(do[row : row + 1, at], B, axis=0), np.zeros_like(start))
        for g, e in zip(found[:4], expected):
            if e is not None and np.linalg.norm(e):
                assert error(g[row, at], e[0]) < 1e-5
    padding = SEGMENTS == 0
    assert not np.any(np.asarray(o)[padding])
    assert all(not np.any(np.asarray(g)[padding]) for g in found[:4] if g is not None)
    assert error(final[1], end[0]) < 1e-5  # of the last segment seen above; padding before and after changes nothing


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "do"])
@pytest.mark.parametrize("backend", LINEAR_ATTENTION.backends)
def test_a_nan_stays_in_its_segment(name, backend):
    """To the last bit, whatever chunk they share; and within its segment it is seen, not hidden."""
    args, (do, d_final) = arguments("scalar"), cotangents()
    ids = jnp.asarray(SEGMENTS)
    (o, final), found = with_gradients(args, (do, d_final), ids, backend=backend)
    broken = dict(zip((*NAMES, "do"), (*map(np.array, args), np.array(do))))
    broken[name][0, 25] = np.nan
    *broken, do = broken.values()
    (o2, final2), found2 = with_gradients(tuple(broken), (do, d_final), ids, backend=backend)
    segment = np.zeros((B, T), bool)
    segment[0, 20:33] = True
    np.testing.assert_array_equal(np.asarray(o)[~segment], np.asarray(o2)[~segment])
    np.testing.assert_array_equal(final, final2)
    for g, g2 in zip(found[:4], found2):
        np.testing.assert_array_equal(np.asarray(g)[~segment], np.asarray(g2)[~segment])
        assert np.all(np.isnan(np.asarray(g2)[segment]))
    np.testing.assert_array_equal(found[4], found2[4])
    if name != "do":
        assert np.all(np.isnan(o2[0, 25:33])) and np.all(np.isfinite(o2[0, :25]))


def plain(q, k, v, log_decay):
    """The quadratic form as one would write it, weights in v's type."""
    scores = jnp.einsum("bihk,bjhk->bhij", q, k, preferred_element_type=jnp.float32)
    if log_decay is not None:
        sums = jnp.cumsum(log_decay.reshape(B, T, H, -1), axis=1)
        between = jnp.exp(jnp.minimum(sums[:, :, None] - sums[:, None], 0.0))  # [B, i, j, H, 1 or Dk]
        if log_decay.ndim == 4:
            scores = jnp.einsum("bihk,bjhk,bijhk->bhij", q.astype(jnp.float32), k.astype(jnp.float32), between)
        else:
            scores = scores * between[..., 0].transpose(0, 3, 1, 2)
    weights = jnp.where(np.tri(T, dtype=bool), SCALE * scores, 0.0).astype(v.dtype)
    return jnp.einsum("bhij,bjhv->bihv", weights, v)


@pytest.mark.parametrize("backend", LINEAR_ATTENTION.backends)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_good_as_the_plain_form(kind, backend):
    """Errors at most twice those of the quadratic form in bfloat16, gradients included."""
    q, k, v, log_decay, state = arguments(kind, dtype=jnp.bfloat16)
    if log_decay is not None:
        log_decay = np.maximum(log_decay, np.log(0.3))  # the plain form has no answer for sudden decays
    state, (do, d_final) = np.zeros_like(state), cotangents(dtype=jnp.bfloat16)
    args, d_final = (q, k, v, log_decay, state), np.zeros_like(d_final)
    (o, final), found = with_gradients(args, (do, d_final), backend=backend)
    plain_o, vjp = jax.vjp(plain, *args[:4])
    assert o.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    assert error(o, recurrence(*args)[0]) <= 2 * error(plain_o, recurrence(*args)[0])
    for name, g, p, expected in zip(NAMES, found, vjp(jnp.asarray(do)), gradients(*args, do, d_final)):
        if expected is not None:
            assert g.dtype == p.dtype and error(g, expected) <= 2 * error(p, expected), name


def test_prefix_state_shows_the_prefix_to_every_step():
    """Prefix linear attention: the causal sum, and beside it the prefix's own keys and values, whole."""
    q, k, v, _, _ = arguments("none")
    _, k_prefix, v_prefix, _, _ = arguments("none", seed=1, length=30)
    ends = np.array([11, 30])
    state = prefix_state(k_prefix, v_prefix, ends)
    o, _ = jax.jit(call)(q, k, v, None, state)
    for row, end in enumerate(ends):
        q64, keys, values = (np.asarray(x[row], np.float64) for x in (q, k, v))
        scores = np.einsum("ihk,jhk->hij", q64, keys) * np.tri(T)
        expected = np.einsum("hij,jhv->ihv", scores, values)
        in_prefix = np.einsum("ihk,jhk->hij", q64, np.asarray(k_prefix[row, :end], np.float64))
        expected += np.einsum("hij,jhv->ihv", in_prefix, np.asarray(v_prefix[row, :end], np.float64))
        assert error(o[row], SCALE * expected) < 1e-5
    assert error(prefix_state(k_prefix[:1], v_prefix[:1], 11), np.asarray(state[:1], np.float64)) < 1e-6


def test_the_kernel_has_no_races_and_reads_nothing_unwritten():
    """Two grid steps a head, forward and backward, in the simulator that fills fresh memory with NaN."""
    args, chunk = arguments("scalar", length=64), 16
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        kernel = with_gradients.__wrapped__(args, cotangents(64), backend="pallas_tpu", chunk=chunk)
    expected = gradients(*args, *cotangents(64))
    for g, e in zip((*kernel[0], *kernel[1]), (*recurrence(*args)[:2], *expected)):
        assert error(g, e) < 1e-5


def compiled_for_tpu(topology, kind):
    if reason := ahead_of_time.why_not(topology):
        pytest.skip(reason)
    heads = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
    decays = {"none": None, "scalar": (1, 1024, 2), "channel": (1, 1024, 2, 128)}[kind]
    decays = decays and jax.ShapeDtypeStruct(decays, jnp.float32)

    def loss(q, k, v, log_decay):
        o, final = linear_attention(q, k, v, log_decay, backend="auto")
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(final)

    step = jax.value_and_grad(loss, argnums=(0, 1, 2))
    text = ahead_of_time.compile_for(topology, step, heads, heads, heads, decays).as_text()
    assert all(f"linear_attention_{name}" in text for name in ("forward", "states", "backward"))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_for_v6e(kind):
    """With "auto": the mesh's TPU gets the kernels."""
    compiled_for_tpu("v6e:2x2", kind)


@pytest.mark.full
@pytest.mark.parametrize("topology", [t for t in ahead_of_time.TPUS if not t.startswith("v6e")])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_for_other_tpus(kind, topology):
    compiled_for_tpu(topology, kind)


def test_memory_grows_with_the_length_not_with_its_square():
    def temporaries(length):
        heads = jax.ShapeDtypeStruct((1, length, 1, 32), jnp.float32)
        step = jax.grad(lambda q: jnp.sum(linear_attention(q, q, q, chunk=64, backend="xla")[0]))
        return jax.jit(step).lower(heads).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.1 * temporaries(4096) < 4096 * 4096


def test_backends_are_chosen_aloud(caplog):
    q, k, v, log_decay, _ = arguments("none")
    gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
        with pytest.raises(UnsupportedLinearAttention, match=r"platform is gpu. Backends that can: xla\."):
            jax.eval_shape(functools.partial(linear_attention, backend="pallas_tpu"), q, k, v)
        LINEAR_ATTENTION._announced.clear()
        with caplog.at_level(logging.INFO, logger="pallas_kernels"):
            for _ in range(2):
                jax.eval_shape(linear_attention, q, k, v)
    assert [r.getMessage() for r in caplog.records] == ["linear_attention on h200 runs on xla"]
    with pytest.raises(UnsupportedLinearAttention, match="no linear_attention backend 'triton'"):
        linear_attention(q, k, v, backend="triton")
    wide = np.zeros((1, 16, 1, 512), np.float16)
    with pytest.raises(UnsupportedLinearAttention, match="not float16; head sizes end at 256, got Dk 512"):
        linear_attention(wide, wide, wide, backend="pallas_tpu")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": np.zeros((B, T, H + 1, DK), np.float32)}, r"q and k of one shape .* got \(2, 50, 3, 24\)"),
        ({"q": np.zeros((B, T, H, DK), np.float16)}, "one type, got float16, float32, float32; cast them"),
        ({"log_decay": np.zeros((B, T), np.float32)}, r"log_decay must be .* got \(2, 50\) beside q"),
        ({"initial_state": np.zeros((B, H, DV, DK))}, r"\[B, H, Dk, Dv\] = \(2, 2, 24, 40\), got \(2, 2, 40, 24\)"),
        ({"segment_ids": np.zeros((B, 3), np.int32)}, r"segment_ids .* \(2, 50\), got int32 \(2, 3\)"),
        ({"chunk": 20}, "multiple of 16, got 20"),
    ],
)
def test_bad_input_is_one_sentence(changes, message):
    q, k, v, _, _ = arguments("none")
    with pytest.raises(ValueError, match=message):
        linear_attention(**({"q": q, "k": k, "v": v} | changes))
