"""jax's TPU kernel behind our call: interpreted it gives the reference's numbers, and it compiles for TPUs."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import ahead_of_time, conformance, masks
from pallas_kernels.attention import attention
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.backends.splash import SplashBackend

WHY_NOT = ahead_of_time.why_not("v6e:2x2")


@pytest.mark.parametrize("name", conformance.STATIC_CASES)
def test_float32(name, monkeypatch):
    monkeypatch.setitem(ATTENTION.backends, "splash", conformance.WithReferenceLse(SplashBackend()))
    errors = conformance.errors("splash", conformance.STATIC_CASES[name], jnp.float32)
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
@pytest.mark.parametrize("size, v_size", [(64, 128), pytest.param(256, 256, marks=pytest.mark.full)])
def test_compiles_for_a_tpu(size, v_size):
    shapes = [
        jax.ShapeDtypeStruct((1, 512, heads, d), jnp.bfloat16) for heads, d in [(4, size), (2, size), (2, v_size)]
    ]
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def loss(q, k, v, ids):
        mask = masks.Causal() & masks.Segments(ids)
        return attention(q, k, v, mask=mask, backend="splash").astype(jnp.float32).sum()

    compiled = ahead_of_time.compile_for("v6e:2x2", jax.grad(loss, (0, 1, 2)), *shapes, ids)
    assert ahead_of_time.memory(compiled).temporaries < 4 * 4 * 512**2  # less than the float32 scores
