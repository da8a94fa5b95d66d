"""The reference in blocks of queries: the same numbers, and memory that grows with the length, not with its square."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import conformance, masks
from pallas_kernels.attention import attention
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.backends.xla_chunked import XlaChunkedBackend


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 64 queries in the conformance cases: some whole ones and a shorter last one."""
    monkeypatch.setitem(ATTENTION.backends, "xla_chunked", XlaChunkedBackend(budget=1))


@pytest.mark.parametrize("name", conformance.CASES)
def test_float32(name):
    conformance.check("xla_chunked", name, jnp.float32)


@pytest.mark.parametrize("name", ["packed prefix", "relative", "dropout"])
def test_bfloat16(name):
    conformance.check("xla_chunked", name, jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_leaks(dtype):
    conformance.check_nothing_leaks("xla_chunked", dtype)


def temporaries(backend, length):
    """Bytes a gradient of attention over a packed row needs beside its arguments and results."""
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, ids):
        return attention(q, k, v, mask=masks.Causal() & masks.Segments(ids), backend=backend).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, ids).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length():
    lengths = 1024, 4096
    short, long = (temporaries("xla_chunked", length) for length in lengths)
    assert long < 4.5 * short
    assert temporaries("xla", 1024) > 2 * 4 * 1024**2 > short  # the reference holds [1, 2, 1024, 1024] scores
