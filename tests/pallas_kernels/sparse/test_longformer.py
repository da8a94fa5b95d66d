"""Longformer's pattern (arXiv 2004.05150, 3.1) as budget encoders use it: a window and a few global tokens."""

import jax
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.attention import UnsupportedAttention, attention
from pallas_kernels.attention_backends import ATTENTION

LENGTH, SIDE, GLOBAL = 200, 15, 5


def longformer(side=SIDE):
    return masks.Window(side, side) | masks.GlobalTokens(GLOBAL)


def arrays():
    return np.random.default_rng(0).normal(size=(3, 1, LENGTH, 2, 64)).astype(np.float32)


# On this machine, in float32; the others must refuse (pallas_gpu takes half precision alone).
TAKES = ("pallas_tpu", "xla_blocks", "xla_chunked")


@pytest.mark.parametrize("backend", TAKES)
@pytest.mark.parametrize("side", [SIDE, LENGTH])
def test_every_backend_equals_dense(backend, side):
    """With a window wider than the text it is full attention."""
    q, k, v = arrays()
    place = np.arange(LENGTH)
    near, everywhere = np.abs(place[:, None] - place) <= side, place < GLOBAL
    shown = near | everywhere | everywhere[:, None]
    assert np.all(shown) == (side == LENGTH)
    out = jax.jit(lambda *qkv: attention(*qkv, mask=longformer(side), backend=backend))(q, k, v)
    dense = jax.jit(lambda *qkv: attention(*qkv, mask=masks.Dense(shown[None, None]), backend="xla"))(q, k, v)
    assert np.linalg.norm(out - dense) <= 1e-5 * np.linalg.norm(dense)


@pytest.mark.parametrize("backend", sorted(set(ATTENTION.backends) - {*TAKES, "xla"}))
def test_the_others_refuse(backend):
    with pytest.raises(UnsupportedAttention, match=f"{backend} cannot: "):
        attention(*arrays(), mask=longformer(), backend=backend)


def test_cost_is_linear_in_length():
    """Blocks visited, which is what kernels compute: a constant for each block of queries, and the global row."""
    lengths = np.array([1024, 2048, 4096, 8192])
    plan = jax.jit(lambda n: longformer(128).plan(n, n, 64, 64), static_argnums=0)
    visited = [int((np.asarray(plan(int(n)).state) > 0).sum()) for n in lengths]
    assert len(set(np.diff(visited) / np.diff(lengths))) == 1, visited
    blocks = lengths // 64  # of which each sees 5 of the window and the first; the first sees all, and all see it
    assert visited[-1] <= 7 * blocks[-1]
