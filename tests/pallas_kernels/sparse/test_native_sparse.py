"""NSA against its equations written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.sparse import native_sparse as nsa

B, T, H, HKV, D = 2, 90, 4, 2, 8
CONFIG = nsa.NativeSparseConfig(size=8, stride=4, block=16, top=4, first=1, local=2)
WINDOW = 20


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    q, gates = rng.normal(size=(B, T, H, D)), rng.uniform(size=(B, T, H, 3))
    branches = [
        nsa.Branch(*(rng.normal(size=(B, n, HKV, D)).astype(np.float32) for _ in "kv")) for n in (CONFIG.count(T), T, T)
    ]
    return q.astype(np.float32), *branches, gates.astype(np.float32)


def softmax(scores, shown):
    if not np.any(shown):
        return np.zeros(len(scores))
    weights = np.exp(scores - scores[shown].max()) * shown
    return weights / weights.sum()


def chosen_blocks(weights, t):
    """Indices of the blocks of tokens that query t sees, from attention to compressed keys summed over a group."""
    own, importance = t // CONFIG.block, np.zeros(-(-T // CONFIG.block))
    for i, weight in enumerate(weights):
        for stride in range(i, i + CONFIG.size // CONFIG.stride):  # each that the compressed key covers
            importance[stride * CONFIG.stride // CONFIG.block] += weight
    importance[: CONFIG.first] = np.inf
    importance[max(own - CONFIG.local + 1, 0) : own + 1] = np.inf
    return np.argsort(-importance[: own + 1], kind="stable")[: CONFIG.top]


def by_hand(q, compressed, selected, near, gates):
    """float64: the output, and the mask of the selected branch [B, H, T, T]."""
    out, shown = np.zeros((B, T, H, D)), np.zeros((B, H, T, T), bool)
    position, group = np.arange(T), H // HKV
    complete = np.arange(CONFIG.count(T)) * CONFIG.stride + CONFIG.size - 1

    def attend(b, t, h, branch, visible):
        scores = branch.k[b, :, h // group].astype(np.float64) @ q[b, t, h] * D**-0.5
        weights = softmax(scores, visible)
        return weights, weights @ branch.v[b, :, h // group]

    for b, g, t in np.ndindex(B, HKV, T):
        heads = range(g * group, (g + 1) * group)
        first = {h: attend(b, t, h, compressed, complete <= t) for h in heads}
        blocks = chosen_blocks(sum(first[h][0] for h in heads), t)
        for h in heads:
            shown[b, h, t] = np.isin(position // CONFIG.block, blocks) & (position <= t)
            second = attend(b, t, h, selected, shown[b, h, t])[1]
            third = attend(b, t, h, near, (position <= t) & (position > t - WINDOW))[1]
            out[b, t, h] = gates[b, t, h] @ np.stack([first[h][1], second, third])
    return out, shown


per_query = jax.jit(functools.partial(nsa.nsa_per_query, config=CONFIG))
per_block = jax.jit(functools.partial(nsa.nsa_per_block, config=CONFIG))


@functools.partial(jax.jit, static_argnames="per_block")
def attend(*arrays, per_block=False):
    return nsa.native_sparse_attention(*arrays, config=CONFIG, window=WINDOW, per_block=per_block, backend="xla_blocks")


def test_three_branches_by_hand():
    inputs = arrays()
    out, shown = by_hand(*inputs)
    np.testing.assert_array_equal(per_query(inputs[0], inputs[1].k).dense(T, T), shown)
    assert np.linalg.norm(attend(*inputs) - out) <= 1e-5 * np.linalg.norm(out)


@pytest.mark.parametrize("per_block", [True, False])
@pytest.mark.parametrize("length", [1, CONFIG.size - 1])
def test_texts_shorter_than_a_compressed_key_have_two_branches(length, per_block):
    """No key sums up so few tokens: that branch gives nothing, and the others all that is causal."""
    q, compressed, selected, near, gates = jax.tree.map(lambda x: x[:, :length], arrays())
    compressed = jax.tree.map(lambda x: x[:, :0], compressed)
    assert CONFIG.count(length) == 0
    outs = [nsa.attention(q, *branch, mask=masks.Causal(), backend="xla") for branch in (selected, near)]
    expected = gates[..., 1:2] * outs[0] + gates[..., 2:] * outs[1]
    found = attend(q, compressed, selected, near, gates, per_block=per_block)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_first_query_chooses_for_its_block():
    q, compressed, *_ = arrays(1)
    alone, together = (f(q, compressed.k).block_sparse for f in (per_query, per_block))
    every = np.asarray(alone.map(T, T, 1, CONFIG.block))
    np.testing.assert_array_equal(together.map(T, T, CONFIG.block, CONFIG.block), every[:, :, :: CONFIG.block])
    np.testing.assert_array_equal(every[:, ::2], every[:, 1::2])  # heads that share a key head
    assert np.any(every[:, 0] != every[:, 2])


@pytest.mark.parametrize("per_block", [True, False])
def test_later_tokens_have_no_say(per_block):
    inputs, other = arrays(2), arrays(3)
    cut = 37
    summed = (cut + 1 - CONFIG.size) // CONFIG.stride + 1  # compressed keys made of the first tokens alone

    def join(x, y):
        kept = summed if x.shape[1] == CONFIG.count(T) else cut + 1
        return np.concatenate([x[:, :kept], y[:, kept:]], 1)

    a, b = (np.asarray(attend(*x, per_block=per_block)) for x in (inputs, jax.tree.map(join, inputs, other)))
    np.testing.assert_array_equal(a[:, : cut + 1], b[:, : cut + 1])
    assert np.all(np.any(a[:, cut + 1 :] != b[:, cut + 1 :], axis=(-1, -2)))


def test_gradient_is_that_of_fixed_masks():
    q, compressed, selected, near, gates = jax.tree.map(jnp.asarray, arrays(4))
    fixed = masks.Dense(np.asarray(per_block(q, compressed.k).dense(T, T)))
    weigh = np.random.default_rng(5).normal(size=q.shape)

    def dense(q, compressed, selected, near, gates):
        shown = (masks.Complete(CONFIG.size, CONFIG.stride), fixed, masks.Causal() & masks.Window(WINDOW - 1, 0))
        out = 0.0
        for i, (branch, mask) in enumerate(zip((compressed, selected, near), shown)):
            out += gates[..., i : i + 1] * nsa.attention(q, *branch, mask=mask, backend="xla")
        return out

    def gradients(f):
        loss = lambda *x: jnp.sum(f(*x) * weigh)  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(q, compressed, selected, near, gates)

    for a, b in zip(*(jax.tree.leaves(gradients(f)) for f in (functools.partial(attend, per_block=True), dense))):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_what_is_refused():
    q, compressed, *_ = arrays()
    with pytest.raises(ValueError, match="n = 21"):
        nsa.nsa_per_block(q, compressed.k[:, 1:], CONFIG)
    with pytest.raises(ValueError, match="stride of compressed keys must divide"):
        nsa.NativeSparseConfig(size=30)
