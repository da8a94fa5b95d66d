"""FlexPrefill keeps what it promises to keep, and what it drops bounds the error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import masks
from pallas_kernels.attention import attention
from pallas_kernels.sparse.flex_prefill import flex_prefill

B, T, H, HKV, D, BLOCK = 2, 256, 4, 2, 16, 16
N = T // BLOCK
EVERY, NONE = 10.0, 0.0  # thresholds under which every head is query-aware, and none


@jax.jit
def select(q, k, mask, gamma, tau):
    """(lists, query_aware), compiled once for all values."""
    chosen = flex_prefill(q, k, mask=mask, gamma=gamma, tau=tau, block=BLOCK, min_budget=2 * BLOCK)
    return chosen.mask.block_sparse, chosen.query_aware


@jax.jit
def sparse_attention(q, k, v, mask):
    return attention(q, k, v, mask=mask, backend="xla_blocks")


def arrays(seed=0, sharpness=1.0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, h, D)).astype(np.float32) for h in (H, HKV, HKV))
    return sharpness * q, k, v


def weights(q, k, visible):
    """float64 attention [B, H, T, T]."""
    q, k = np.asarray(q, np.float64), np.repeat(np.asarray(k, np.float64), H // HKV, 2)
    scores = np.where(visible, np.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def causal(length=T):
    return np.tril(np.ones((length, length), bool))


@pytest.mark.parametrize("tau", [EVERY, NONE])
def test_all_of_the_mass_is_dense_attention(tau):
    q, k, v = arrays()
    lists, _ = select(q, k, masks.Causal(), 1.0, tau)
    np.testing.assert_array_equal(lists.count, np.broadcast_to(np.arange(1, N + 1), (B, H, N)))
    dense = np.einsum("bhqk,bkhd->bqhd", weights(q, k, causal()), np.repeat(v, H // HKV, 2))
    np.testing.assert_allclose(sparse_attention(q, k, v, lists & masks.Causal()), dense, rtol=1e-4, atol=1e-5)


def test_full_budget_is_dense_attention():
    q, k, _ = arrays()
    chosen = jax.jit(functools.partial(flex_prefill, gamma=0.1, block=BLOCK, min_budget=T))(q, k)
    np.testing.assert_array_equal(chosen.mask.block_sparse.count, np.broadcast_to(np.arange(1, N + 1), (B, H, N)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.1, 0.99), st.floats(0.0, 6.0))
def test_vertical_slash_heads_keep_gamma_of_the_last_queries(seed, gamma, sharpness):
    q, k, _ = arrays(seed, sharpness)
    lists, query_aware = select(q, k, masks.Causal(), gamma, NONE)
    assert not np.any(query_aware)
    kept = weights(q, k, causal()) * np.asarray(lists.dense(T, T))
    share = kept[:, :, -BLOCK:].sum((2, 3)) / BLOCK
    assert np.all(share >= gamma - 1e-6), share


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.1, 0.99), st.floats(0.0, 6.0))
def test_query_aware_heads_keep_gamma_of_the_pooled_attention(seed, gamma, sharpness):
    q, k, _ = arrays(seed, sharpness)
    lists, query_aware = select(q, k, masks.Causal(), gamma, EVERY)
    assert np.all(query_aware)
    pooled = [np.asarray(x, np.float64).reshape(B, N, BLOCK, -1, D).mean(2) for x in (q, k)]
    estimate = weights(*pooled, causal(N))
    kept = np.asarray(lists.dense(T, T))[:, :, ::BLOCK, ::BLOCK]
    share = (estimate * kept).sum((2, 3)) / N
    assert np.all(share >= gamma - 1e-6), share


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.05, 0.95), st.floats(0.0, 8.0), st.sampled_from([EVERY, NONE, 0.1]))
def test_error_is_bounded_by_what_was_dropped(seed, gamma, sharpness, tau):
    """Dropping weight eps of a row changes its output by at most 2 eps max ||v||."""
    q, k, v = arrays(seed, sharpness)
    lists, _ = select(q, k, masks.Causal(), gamma, tau)
    true = weights(q, k, causal())
    dropped = (true * ~np.asarray(lists.dense(T, T))).sum(-1)
    dense = np.einsum("bhqk,bkhd->bhqd", true, np.repeat(v, H // HKV, 2).astype(np.float64))
    sparse = np.asarray(sparse_attention(q, k, v, lists & masks.Causal())).swapaxes(1, 2)
    longest = np.linalg.norm(v, axis=-1).max(1).repeat(H // HKV, -1)[..., None]
    error = np.linalg.norm(sparse - dense, axis=-1)
    assert np.all(error <= 2 * dropped * longest + 1e-4)


def local_with_needle(needle, length, seed=0):
    """Queries and keys that attend to about 8 tokens nearby; the last 8 queries read one far token instead."""
    rng = np.random.default_rng(seed)
    # Places on half a circle: products fall with distance everywhere, like a Gaussian of 4 tokens nearby.
    strength, angle = (length / np.pi / 4) ** 2, np.pi * np.arange(length)[:, None] / length
    k = np.zeros((B, length, HKV, D))
    k[..., :2] = (D**0.25 * strength**0.5) * np.concatenate([np.cos(angle), np.sin(angle)], -1)[:, None]
    q, k = (x + 0.03 * rng.normal(size=x.shape) for x in (np.repeat(k, H // HKV, 2), k))
    q[..., -1], k[..., -1] = 0.0, 0.0
    q[:, -8:, :, -1], k[:, needle, :, -1] = 2 * (D**0.25 * strength**0.5), 2 * (D**0.25 * strength**0.5)
    return q.astype(np.float32), k.astype(np.float32)


@pytest.mark.parametrize("needle", [37, 250, 470])
def test_planted_needle(needle):
    """At gamma 0.95 and under 40% of the blocks every query keeps the token it attends to most, and its weight."""
    length = 2 * T
    q, k = local_with_needle(needle, length)
    lists, _ = select(q, k, masks.Causal(), 0.95, 0.1)
    true, shown = weights(q, k, causal(length)), np.asarray(lists.dense(length, length))
    blocks = length // BLOCK
    density = np.asarray(lists.count).sum(-1) / (blocks * (blocks + 1) / 2)
    assert np.all(density < 0.4), density
    kept = (true * shown).sum(-1)
    assert np.all(kept.mean(-1) >= 0.95), kept.mean(-1)
    favourite = true.argmax(-1)
    assert np.all(favourite[:, :, -8:] == needle)
    np.testing.assert_array_equal((true * shown).argmax(-1), favourite)


def test_a_fixed_distance_is_a_diagonal_for_all_queries():
    """Learned from the last queries, and seen by all: each attends to the token 37 before it, and to that alone."""
    distance = 37
    codes = np.random.default_rng(0).choice([-1.0, 1.0], (T + distance, D)).astype(np.float32)
    k = np.broadcast_to(codes[distance:, None], (B, T, HKV, D))
    q = np.broadcast_to(4 * codes[:T, None], (B, T, H, D))
    lists, _ = select(q, k, masks.Causal(), 0.9, NONE)
    true, shown = weights(q, k, causal()), np.asarray(lists.dense(T, T))
    at = np.arange(distance, T)
    assert np.all(shown[:, :, at, at - distance])
    assert np.all((true * shown)[:, :, distance:].sum(-1).mean(-1) > 0.8)


def test_pattern_of_a_head():
    """Query-aware where pooled keys tell the truth, that is, where the keys of a block are alike."""
    rng = np.random.default_rng(0)
    q, k, _ = arrays()
    alike = np.repeat(rng.normal(size=(B, N, HKV, D)), BLOCK, 1).astype(np.float32)
    uneven = np.concatenate([alike[:, :, :1], k[:, :, 1:]], 2)
    q = np.broadcast_to(q[:, -1:], q.shape)
    _, query_aware = select(2 * q, uneven, masks.Causal(), 0.9, 0.05)
    np.testing.assert_array_equal(query_aware, np.broadcast_to([True, True, False, False], (B, H)))


def test_padding_has_no_say():
    """A text of 160 tokens chooses the same blocks in a row of 256, whatever fills the rest."""
    length = 160
    q, k, _ = arrays(3, 2.0)
    alone_lists, alone_aware = select(q[:, :length], k[:, :length], masks.Causal(), 0.8, 0.1)
    padding = np.arange(T) >= length
    ids = np.broadcast_to(np.where(padding, 0, 1), (B, T)).astype(np.int32)
    q, k = (np.where(padding[:, None, None], np.nan, x) for x in (q, k))
    lists, query_aware = select(q, k, masks.Causal() & masks.Segments(ids), 0.8, 0.1)
    np.testing.assert_array_equal(query_aware, alone_aware)
    inside = np.asarray(lists.dense(T, T))[:, :, :length, :length]
    np.testing.assert_array_equal(inside, alone_lists.dense(length, length))
    assert np.all(np.asarray(lists.count)[..., length // BLOCK :] == 0)


def test_packed_rows_choose_no_hidden_block():
    q, k, v = arrays(4, 3.0)
    ids = np.ones((B, T), np.int32)
    ids[0, 70:], ids[0, 150:], ids[1, 40:], ids[1, 230:] = 2, 3, 2, 0
    mask = masks.Causal() & masks.Segments(ids)
    lists, _ = select(q, k, mask, 0.7, 0.1)
    chosen, visible = np.asarray(lists.map(T, T, BLOCK, BLOCK)), np.asarray(mask.plan(T, T, BLOCK, BLOCK).state) > 0
    assert np.all(visible | ~chosen) and np.any(visible & ~chosen)
    own = np.eye(N, dtype=bool) & visible
    assert np.all(chosen | ~own)
    dense = jax.jit(lambda *qkv: attention(*qkv, mask=lists & mask, backend="xla"))(q, k, v)
    np.testing.assert_allclose(sparse_attention(q, k, v, lists & mask), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["xla_chunked", "xla_blocks", "pallas_tpu", "pallas_gpu"])
def test_every_backend_takes_the_lists_of_each_head(backend):
    """In bfloat16, which all of them take, with an error no larger than twice that of plain XLA."""
    rng = np.random.default_rng(7)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1024, heads, 64)), jnp.bfloat16) for heads in (2, 1, 1))
    mask = jax.jit(functools.partial(flex_prefill, gamma=0.3, min_budget=1))(3 * q, k).mask
    visited = np.asarray(mask.block_sparse.map(1024, 1024, 128, 128))[0]
    assert np.all(visited.sum((1, 2)) < 30) and np.any(visited[0] != visited[1])  # of 36 that a causal mask shows

    def run(backend, dtype):
        return jax.jit(lambda *qkv: attention(*qkv, mask=mask, backend=backend))(*(x.astype(dtype) for x in (q, k, v)))

    exact = run("xla", jnp.float32)
    found, plain = (np.linalg.norm(run(name, jnp.bfloat16) - exact) for name in (backend, "xla"))
    assert found <= 2 * plain


def test_longest_list():
    q, k, _ = arrays()
    bounded = functools.partial(flex_prefill, gamma=0.99, block=BLOCK, min_budget=2 * BLOCK, max_blocks=5)
    lists = jax.jit(bounded)(q, k).mask.block_sparse
    assert lists.index.shape == (B, H, N, 5)
    np.testing.assert_array_equal(lists.count, np.broadcast_to(np.minimum(np.arange(1, N + 1), 5), (B, H, N)))
    chosen = np.asarray(lists.map(T, T, BLOCK, BLOCK))
    assert np.all(chosen[..., 0]) and np.all(chosen[..., np.arange(N), np.arange(N)])


def test_no_gradient_of_the_choice():
    q, k, v = map(jnp.asarray, arrays())

    def loss(select_again, q, k, v):
        lists = select(q, k, masks.Causal(), 0.7, 0.1)[0] if select_again else fixed
        return jnp.sum(attention(q, k, v, mask=lists & masks.Causal(), backend="xla") ** 2)

    fixed, _ = select(q, k, masks.Causal(), 0.7, 0.1)
    gradients = [jax.jit(jax.grad(functools.partial(loss, again), (0, 1, 2)))(q, k, v) for again in (True, False)]
    for a, b in zip(*gradients):
        np.testing.assert_array_equal(a, b)


def test_what_is_refused():
    q, k, _ = arrays()
    with pytest.raises(TypeError, match="key intervals"):
        flex_prefill(q, k, mask=masks.Dense(causal()[None, None]))
    with pytest.raises(TypeError, match="no lists of blocks"):
        flex_prefill(q, k, mask=masks.BlockSparse.of_map(np.ones((1, 1, 2, 2), bool), (128, 128)))
    with pytest.raises(ValueError, match="one length"):
        flex_prefill(q, k[:, 1:])
