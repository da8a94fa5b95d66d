"""The visible blocks alone, in plain jax: the same results as the definition, and no work for hidden blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import conformance, masks
from pallas_kernels.attention import UnsupportedAttention, attention
from pallas_kernels.diagonals import diagonal_sums

ORDINARY = ["packed prefix", "longformer, packed", "block sparse", "relative", "dropout", "cross"]
NARROW = ["packed prefix"]


def _cases(ordinary):
    names = [name for name in conformance.CASES if name != "dense bias"]
    return [name if name in ordinary else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", _cases(ORDINARY))
def test_float32(name):
    conformance.check("xla_blocks", name, jnp.float32)


@pytest.mark.parametrize("name", _cases(NARROW))
def test_bfloat16(name):
    conformance.check("xla_blocks", name, jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.full)])
def test_nothing_leaks(dtype):
    conformance.check_nothing_leaks("xla_blocks", dtype)


def test_refuses_what_has_no_plan():
    q = jnp.zeros((1, 8, 1, 4))
    with pytest.raises(UnsupportedAttention, match="not made of key intervals"):
        attention(q, q, q, mask=masks.Dense(np.ones((1, 1, 8, 8), bool)), backend="xla_blocks")
    with pytest.raises(UnsupportedAttention, match="a dense bias"):
        attention(q, q, q, mask=masks.Full(), bias=jnp.zeros((1, 1, 8, 8)), backend="xla_blocks")
    q = jax.ShapeDtypeStruct((1, 2**20, 32, 4), jnp.float32)
    with pytest.raises(UnsupportedAttention, match="more pairs of blocks"):
        jax.eval_shape(lambda q: attention(q, q, q, mask=masks.Full(), backend="xla_blocks"), q)


def test_blocks_outside_the_lists_are_not_computed():
    """NaN in keys and values of a block would spread (0 * NaN) from any product it took part in."""
    blocks, size = 6, 8
    q, k, v = (jnp.asarray(np.random.default_rng(0).normal(size=(1, blocks * size, 2, 4)), jnp.float32) for _ in "qkv")
    hidden = np.zeros(blocks, bool)
    hidden[[1, 4]] = True
    visible = (np.random.default_rng(1).random((1, 2, blocks, blocks)) < 0.5) & ~hidden
    mask = masks.BlockSparse.of_map(visible, (size, size))
    planted = np.repeat(hidden, size)[None, :, None, None]

    @jax.jit
    def gradients(q, k, v, mask):
        return jax.grad(lambda *qkv: jnp.sum(attention(*qkv, mask=mask, backend="xla_blocks") ** 2), (0, 1, 2))(q, k, v)

    clean = gradients(q, k, v, mask)
    dirty = gradients(q, *(jnp.where(planted, jnp.nan, x) for x in (k, v)), mask)
    for a, b in zip(clean, dirty):
        np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(clean[1])[:, planted[0, :, 0, 0]])


def test_memory_is_linear_in_length():
    """At 32k tokens, forward and backward: a score matrix would be 4 GB."""
    length, size = 2**15, 64
    array = jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32)

    def gradients(q, k, v):
        return jax.grad(lambda *x: jnp.sum(attention(*x, mask=masks.Causal(), backend="xla_blocks")), (0, 1, 2))(
            q, k, v
        )

    memory = jax.jit(gradients).lower(array, array, array).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 15 * (4 * length * size), memory


def test_diagonal_sums():
    scores = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    expected = np.stack([[np.trace(m, offset) for offset in range(-2, 5)] for m in scores])
    np.testing.assert_allclose(diagonal_sums(jnp.asarray(scores)), expected, rtol=1e-5, atol=1e-6)
