"""MoBA: each query's best blocks, by the paper's rule written out; gradients go through what was chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.attention import attention
from pallas_kernels.sparse.selection import Chooser
from pallas_kernels.sparse.top_blocks import moba_per_block, moba_per_query

B, T, H, HKV, D, BLOCK, TOP = 2, 90, 4, 2, 8, 16, 3
N = -(-T // BLOCK)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(B, T, h, D)).astype(np.float32) for h in (H, HKV, HKV))


def by_hand(q, k):
    """bool [B, H, T, T]: MoBA's mask, one query at a time."""
    q, k = q.astype(np.float64), np.repeat(k, H // HKV, 2).astype(np.float64)
    shown = np.zeros((B, H, T, T), bool)
    for b, h, t in np.ndindex(B, H, T):
        own = t // BLOCK
        gates = [q[b, t, h] @ k[b, n * BLOCK : (n + 1) * BLOCK, h].mean(0) for n in range(own)] + [np.inf]
        for n in np.argsort(gates)[::-1][:TOP]:
            shown[b, h, t, n * BLOCK : (n + 1) * BLOCK] = True
    return shown & np.tril(np.ones((T, T), bool))


per_query = jax.jit(functools.partial(moba_per_query, block=BLOCK, top=TOP))
per_block = jax.jit(functools.partial(moba_per_block, block=BLOCK, top=TOP))


def test_every_query_chooses_as_in_the_paper():
    q, k, v = arrays()
    mask, shown = per_query(q, k), by_hand(q, k)
    np.testing.assert_array_equal(mask.dense(T, T), shown)
    out = jax.jit(lambda *qkv: attention(*qkv, mask=mask, backend="xla_blocks"))(q, k, v)
    expected = jax.jit(lambda *qkv: attention(*qkv, mask=masks.Dense(shown), backend="xla"))(q, k, v)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_the_first_query_chooses_for_its_block():
    q, k, _ = arrays(1)
    alone, together = per_query(q, k).block_sparse, per_block(q, k).block_sparse
    every = alone.map(T, T, 1, BLOCK)
    np.testing.assert_array_equal(together.map(T, T, BLOCK, BLOCK), every[:, :, ::BLOCK])
    assert np.any(np.asarray(every) != np.repeat(every[:, :, ::BLOCK], BLOCK, 2)[:, :, :T])  # others choose otherwise


@pytest.mark.parametrize("moba", [per_query, per_block])
def test_later_tokens_have_no_say(moba):
    """The law of causal models: what follows token `cut` changes nothing at or before it, the choice included."""
    q, k, v = arrays(2)
    cut = 2 * BLOCK + 5
    other = [np.concatenate([x[:, : cut + 1], y[:, cut + 1 :]], 1) for x, y in zip((q, k, v), arrays(3))]

    def run(q, k, v):
        return attention(q, k, v, mask=moba(q, k), backend="xla")

    a, b = (np.asarray(jax.jit(run)(*x)) for x in ((q, k, v), other))
    np.testing.assert_array_equal(a[:, : cut + 1], b[:, : cut + 1])
    assert np.all(np.any(a[:, cut + 1 :] != b[:, cut + 1 :], axis=(-1, -2)))


def test_the_mean_query_chooses_by_mean_gate():
    q, k, _ = arrays(4)
    mask = jax.jit(functools.partial(moba_per_block, block=BLOCK, top=TOP, chooser=Chooser.MEAN))(q, k)
    whole = T // BLOCK * BLOCK
    queries = q[:, :whole].reshape(B, -1, BLOCK, H, D).mean(2)
    keys = np.repeat(k[:, :whole].reshape(B, -1, BLOCK, HKV, D).mean(2), H // HKV, 2)
    gates = np.einsum("bihd,bjhd->bhij", queries, keys)
    chosen = np.asarray(mask.block_sparse.map(T, T, BLOCK, BLOCK))
    for b, h, i in np.ndindex(B, H, T // BLOCK):
        past = np.argsort(gates[b, h, i, :i])[::-1][: TOP - 1]
        np.testing.assert_array_equal(np.flatnonzero(chosen[b, h, i]), np.sort(np.append(past, i)))


def test_gradient_is_that_of_the_chosen_blocks():
    """Choosing inside the differentiated function adds nothing, and keys that no query of the loss chose get none."""
    q, k, v = map(jnp.asarray, arrays(5))
    fixed = np.asarray(per_block(q, k).dense(T, T))
    last = T // BLOCK * BLOCK  # the loss is about the last block of queries

    def loss(choose, backend, q, k, v):
        mask = per_block(q, k) if choose else masks.Dense(fixed)
        return jnp.sum(attention(q, k, v, mask=mask, backend=backend)[:, last:] ** 2)

    chosen = jax.jit(jax.grad(functools.partial(loss, True, "xla_blocks"), (0, 1, 2)))(q, k, v)
    dense = jax.jit(jax.grad(functools.partial(loss, False, "xla"), (0, 1, 2)))(q, k, v)
    for a, b in zip(chosen, dense):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    unseen = ~fixed[:, :, last:].reshape(B, HKV, -1, T).any(2)
    for gradient in chosen[1:]:
        gradient = np.asarray(gradient).swapaxes(1, 2)
        assert not np.any(gradient[unseen]) and np.all(gradient[~unseen])


def test_enough_blocks_are_dense_attention():
    q, k, _ = arrays()
    mask = jax.jit(functools.partial(moba_per_block, block=BLOCK, top=N + 3))(q, k)
    np.testing.assert_array_equal(mask.dense(T, T), np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, H, T, T)))


def test_packed_rows_choose_no_hidden_block():
    q, k, _ = arrays(6)
    ids = np.ones((B, T), np.int32)
    ids[0, 20:], ids[0, 75:], ids[1, 40:] = 2, 0, 2
    mask = masks.Causal() & masks.Segments(ids)
    q, k = (np.where((ids == 0)[:, :, None, None], np.nan, x) for x in (q, k))
    lists = per_block(q, k, mask=mask).block_sparse
    chosen, visible = np.asarray(lists.map(T, T, BLOCK, BLOCK)), np.asarray(mask.plan(T, T, BLOCK, BLOCK).state) > 0
    assert np.all(visible | ~chosen)
    np.testing.assert_array_equal(chosen.sum(-1), np.broadcast_to(np.minimum(visible.sum(-1), TOP), (B, H, N)))


def test_what_is_refused():
    q, k, _ = arrays()
    with pytest.raises(TypeError, match="MoBA narrows a mask"):
        moba_per_block(q, k, block=BLOCK, top=2, mask=masks.Segments(np.ones((B, T), np.int32), contiguous=False))
    with pytest.raises(ValueError, match="one length"):
        moba_per_query(q, k[:, 1:], block=BLOCK, top=2)
