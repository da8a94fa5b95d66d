"""The selective scan is its recurrence, forward and backward, whatever the steps, segments and backend."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import ahead_of_time
from pallas_kernels.selective_scan import SELECTIVE_SCAN, UnsupportedSelectiveScan, selective_scan, selective_scan_step
from pallas_kernels.tpu import selective_scan as tpu_kernel

B, T, C, N = 2, 150, 24, 8  # T is no whole number of chunks, and more than one of each backend's
NAMES = ("x", "dt", "a", "b", "c", "d", "initial_state")
BY_STEP = ("x", "dt", "b", "c")


def arguments(dtype="float32"):
    """Step sizes from 0 (the state stays) to 200 (it is forgotten: exp(-200) is 0 in float32)."""
    rng = np.random.default_rng(0)
    dt = rng.choice([0.0, 0.01, 0.1, 0.5, 200.0], size=(B, T, C), p=[0.1, 0.3, 0.3, 0.25, 0.05])
    x, b, c = (rng.normal(size=(B, T, size)).astype(dtype) for size in (C, N, N))
    x = np.where(dt > 1, np.float32(0.01) * x, x).astype(dtype)  # what is written is dt * x
    d, state = rng.normal(size=C).astype(np.float32), rng.normal(size=(B, C, N)).astype(np.float32)
    return x, dt.astype(dtype), -np.exp(rng.normal(size=(C, N))).astype(np.float32), b, c, d, state


def recurrence(x, dt, a, b, c, d, state):
    """(y, final state, states before each step and after the last) in float64, step by step."""
    x, dt, a, b, c, d, state = (np.asarray(z, np.float64) for z in (x, dt, a, b, c, d, state))
    states, y = [state], np.zeros(x.shape)
    for t in range(x.shape[1]):
        state = np.exp(dt[:, t, :, None] * a) * state + (dt * x)[:, t, :, None] * b[:, t, None, :]
        y[:, t] = np.einsum("bcn,bn->bc", state, c[:, t]) + d * x[:, t]
        states.append(state)
    return y, state, states


def gradients(x, dt, a, b, c, d, state, dy, d_final):
    """Gradients of sum(y * dy) + sum(final * d_final), from the last step to the first, in float64."""
    *_, states = recurrence(x, dt, a, b, c, d, state)
    x, dt, a, b, c, d, dy, g = (np.asarray(z, np.float64) for z in (x, dt, a, b, c, d, dy, d_final))
    dx, d_dt, da, db, dc = (np.zeros(z.shape) for z in (x, dt, a, b, c))
    for t in reversed(range(x.shape[1])):
        g = g + dy[:, t, :, None] * c[:, t, None, :]
        dc[:, t] = np.einsum("bcn,bc->bn", states[t + 1], dy[:, t])
        db[:, t] = np.einsum("bcn,bc->bn", g, (dt * x)[:, t])
        written = np.einsum("bcn,bn->bc", g, b[:, t])
        g = g * np.exp(dt[:, t, :, None] * a)
        dx[:, t] = d * dy[:, t] + dt[:, t] * written
        d_dt[:, t] = x[:, t] * written + np.sum(g * states[t] * a, axis=-1)
        da += np.sum(g * states[t] * dt[:, t, :, None], axis=0)
    return dx, d_dt, da, db, dc, np.sum(dy * x, axis=(0, 1)), g


def cotangents(dtype="float32"):
    rng = np.random.default_rng(9)
    return rng.normal(size=(B, T, C)).astype(dtype), rng.normal(size=(B, C, N)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="backend")
def with_gradients(args, cotangents, segment_ids=None, *, backend="xla"):
    def call(*steps, state):
        return selective_scan(*steps, initial_state=state, segment_ids=segment_ids, backend=backend)

    with mock.patch.object(tpu_kernel, "_GROUP", 2):  # the same loops with an eighth of their body to compile
        results, vjp = jax.vjp(lambda *a: call(*a[:-1], state=a[-1]), *args)
        return results, vjp(cotangents)


def error(z, reference):
    return np.linalg.norm(np.asarray(z, np.float64) - reference) / np.linalg.norm(reference)


def test_the_reference_gradients_are_slopes():
    """The float64 gradients that all others are held against agree with a difference along a random direction."""
    args, (dy, d_final) = arguments(), cotangents()
    rng = np.random.default_rng(3)
    along = [rng.normal(size=z.shape) for z in args]

    def loss(step):
        y, final, _ = recurrence(*(np.asarray(z, np.float64) + step * d for z, d in zip(args, along)))
        return np.sum(y * dy) + np.sum(final * d_final)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    found = sum(np.sum(g * d) for g, d in zip(gradients(*args, dy, d_final), along))
    assert abs(found - slope) < 1e-6 * abs(slope)


@pytest.mark.parametrize("backend", SELECTIVE_SCAN.backends)
def test_equals_the_recurrence(backend):
    """Step sizes that keep everything or forget everything among them."""
    args = arguments()
    (y, final), found = with_gradients(args, cotangents(), None, backend=backend)
    expected_y, expected_final, _ = recurrence(*args)
    assert error(y, expected_y) < 1e-5 and error(final, expected_final) < 1e-5
    for name, g, expected in zip(NAMES, found, gradients(*args, *cotangents())):
        assert error(g, expected) < 1e-5, name


@pytest.mark.parametrize("backend", SELECTIVE_SCAN.backends)
def test_bfloat16_loses_only_what_its_results_are_rounded_to(backend):
    """States and sums are float32: a result is off by half a last place of bfloat16, 2^-9, at most; so is its norm."""
    args, (dy, d_final) = arguments(jnp.bfloat16), cotangents(jnp.bfloat16)
    (y, final), found = with_gradients(args, (dy, d_final), None, backend=backend)
    assert y.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    assert error(y, recurrence(*args)[0]) < 2**-9
    for name, g, expected in zip(NAMES, found, gradients(*args, dy, d_final)):
        assert error(g, expected) < (2**-9 if g.dtype == jnp.bfloat16 else 1e-5), name


def test_two_halves_make_a_whole_and_steps_make_the_same():
    *steps, state = arguments()
    x, dt, a, b, c, d = steps
    (y, final), _ = with_gradients((*steps, state), cotangents(), None)
    half = jax.jit(selective_scan, static_argnames="backend")
    first, between = half(x[:, :75], dt[:, :75], a, b[:, :75], c[:, :75], d, initial_state=state)
    second, end = half(x[:, 75:], dt[:, 75:], a, b[:, 75:], c[:, 75:], d, initial_state=between)
    assert error(np.concatenate([first, second], axis=1), np.asarray(y, np.float64)) < 1e-6
    assert error(end, np.asarray(final, np.float64)) < 1e-6
    step = jax.jit(selective_scan_step)
    for t in range(T):
        state, y_t = step(state, x[:, t], dt[:, t], a, b[:, t], c[:, t], d)
        np.testing.assert_allclose(y_t, y[:, t], rtol=1e-4, atol=1e-4)
    assert error(state, np.asarray(final, np.float64)) < 1e-6


SEGMENTS = np.array([[1] * 70 + [2] * 13 + [3] * 60 + [0] * 7, [0] * 3 + [1] * 130 + [2] * 1 + [3] * 16])


@pytest.mark.parametrize("backend", SELECTIVE_SCAN.backends)
def test_a_packed_row_equals_its_segments(backend):
    """Law 1, forward and backward: segments start anew, the row's first from the initial state; padding gives 0."""
    args, (dy, _) = arguments(), cotangents()
    named = dict(zip(NAMES, args))
    (y, final), found = with_gradients(args, (dy, np.zeros_like(args[-1])), jnp.asarray(SEGMENTS), backend=backend)
    found = dict(zip(NAMES, found))
    shared = {"a": 0.0, "d": 0.0}
    for row in range(B):
        for segment in (1, 2, 3):
            at = np.flatnonzero(SEGMENTS[row] == segment)
            at = slice(at[0], at[-1] + 1)
            alone = {n: z[row : row + 1, at] if n in BY_STEP else z for n, z in named.items()}
            alone["initial_state"] = named["initial_state"][row : row + 1] * (segment == 1)
            expected, end, _ = recurrence(*alone.values())
            assert error(y[row, at], expected[0]) < 1e-5
            slopes = gradients(*alone.values(), dy[row : row + 1, at], np.zeros_like(end))
            for name, g in zip(NAMES, slopes):
                if name in BY_STEP:
                    assert error(found[name][row, at], g[0]) < 1e-5, name
                elif name in shared:
                    shared[name] += g
        assert error(final[row], end[0]) < 1e-5
    for name, g in shared.items():
        assert error(found[name], g) < 1e-5, name
    padding = SEGMENTS == 0
    assert not np.any(np.asarray(y)[padding])
    assert all(not np.any(np.asarray(found[name])[padding]) for name in BY_STEP)


@pytest.mark.parametrize("name", [*BY_STEP, "dy"])
@pytest.mark.parametrize("backend", SELECTIVE_SCAN.backends)
def test_a_nan_stays_in_its_segment(name, backend):
    """To the last bit, planted in the first and the last step of a segment. (The sums da and dd hold all segments.)"""
    args, (dy, d_final) = arguments(), cotangents()
    ids = jnp.asarray(SEGMENTS)
    (y, final), found = with_gradients(args, (dy, d_final), ids, backend=backend)
    broken = dict(zip((*NAMES, "dy"), (*map(np.array, args), np.array(dy))))
    broken[name][0, [70, 82]] = np.nan
    *broken, dy = broken.values()
    (y2, final2), found2 = with_gradients(tuple(broken), (dy, d_final), ids, backend=backend)
    segment = np.zeros((B, T), bool)
    segment[0, 70:83] = True
    np.testing.assert_array_equal(np.asarray(y)[~segment], np.asarray(y2)[~segment])
    np.testing.assert_array_equal(final, final2)
    for argument, g, g2 in zip(NAMES, found, found2):
        if argument in BY_STEP:
            np.testing.assert_array_equal(np.asarray(g)[~segment], np.asarray(g2)[~segment])
    assert any(np.any(np.isnan(g2)) for argument, g2 in zip(NAMES, found2) if argument in BY_STEP)
    np.testing.assert_array_equal(found[-1], found2[-1])
    if name != "dy":
        assert np.any(np.isnan(np.asarray(y2)[segment]))


def test_the_kernel_has_no_races_and_reads_nothing_unwritten():
    """Two chunks, forward and backward, in the simulator that fills fresh memory with NaN."""
    args = arguments()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        results, found = with_gradients.__wrapped__(args, cotangents(), None, backend="pallas_tpu")
    for g, expected in zip((*results, *found), (*recurrence(*args)[:2], *gradients(*args, *cotangents()))):
        assert error(g, expected) < 1e-5


def compiled_for_tpu(topology):
    if reason := ahead_of_time.why_not(topology):
        pytest.skip(reason)
    shapes = [(1, 512, 384), (1, 512, 384), (384, 16), (1, 512, 16), (1, 512, 16), (384,)]
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16 if len(s) == 3 else jnp.float32) for s in shapes]

    def loss(*args):
        y, final = selective_scan(*args, backend="auto")
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(final)

    text = ahead_of_time.compile_for(topology, jax.value_and_grad(loss, argnums=(0, 1, 2)), *shapes).as_text()
    assert all(f"selective_scan_{name}" in text for name in ("forward", "backward"))


def test_compiles_for_v6e():
    """With "auto": the mesh's TPU gets the kernels."""
    compiled_for_tpu("v6e:2x2")


@pytest.mark.full
@pytest.mark.parametrize("topology", [t for t in ahead_of_time.TPUS if not t.startswith("v6e")])
def test_compiles_for_other_tpus(topology):
    compiled_for_tpu(topology)


def test_memory_holds_the_states_between_chunks_alone():
    """The states of all steps, [T, C, N] float32, are 128 MB here; the program's temporaries are a fraction."""
    length, channels, entries = 4096, 512, 16
    shapes = [(1, length, channels)] * 2 + [(channels, entries)] + [(1, length, entries)] * 2
    step = jax.grad(lambda *z: jnp.sum(selective_scan(*z, backend="xla")[0]), argnums=(0, 1, 2))
    compiled = jax.jit(step).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * channels * entries * 4 / 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dt": np.zeros((B, T, N))}, r"x and dt of one shape .* got \(2, 150, 24\) and \(2, 150, 8\)"),
        ({"a": np.zeros((N, C))}, r"a must be \[C, N\] with C = 24 of x, got \(8, 24\)"),
        ({"b": np.zeros((B, T, 3))}, r"b and c must be .* \(2, 150, 8\), got \(2, 150, 3\)"),
        ({"d": np.zeros(3)}, r"d must be \[C\] = \(24,\), got \(3,\)"),
        ({"initial_state": np.zeros((B, N, C))}, r"\[B, C, N\] = \(2, 24, 8\), got \(2, 8, 24\)"),
        ({"segment_ids": np.zeros((B, T))}, r"segment_ids must be integers .* got float64 \(2, 150\)"),
    ],
)
def test_bad_input_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(dict(zip(NAMES, arguments())) | changes))


def test_a_named_backend_that_cannot_says_why():
    shapes = [(1, 4, 8), (1, 4, 8), (8, 3), (1, 4, 3), (1, 4, 3)]
    with pytest.raises(UnsupportedSelectiveScan, match="multiple of 8 up to 64, got 3. Backends that can: xla"):
        selective_scan(*(np.zeros(s, np.float32) for s in shapes), backend="pallas_tpu")
