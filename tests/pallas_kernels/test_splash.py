"""jax's TPU kernel behind our call: interpreted it gives the reference's numbers, and it compiles for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ahead_of_time, choice, masks
from pallas_kernels.attention import attention
from pallas_kernels.backends.splash import SplashBackend
from tests.pallas_kernels import conformance

IDS = np.zeros((2, 256), np.int32)
IDS[0, :100], IDS[0, 100:160], IDS[0, 160:210], IDS[1] = 1, 2, 3, 1
SIZES = dict(tq=256, tk=256, heads=2, kv_heads=1)
CAUSAL = masks.Window(None, 0)  # not Causal(): the cases hand masks to jit, where its offset would become an array
CASES = {
    "full, cross": conformance.Case(lambda *_: masks.Full(), **SIZES | dict(tq=128, v_size=128)),
    "packed causal, cap": conformance.Case(lambda *_: CAUSAL & masks.Segments(IDS), soft_cap=3.0, **SIZES),
    "packed encoder": conformance.Case(lambda *_: masks.Segments(IDS), **SIZES),
    "windows": conformance.Case(lambda *_: masks.Window(20, 3), scale=0.3, **SIZES),
    "causal chunks": conformance.Case(lambda *_: masks.Chunked(48) & CAUSAL, **SIZES),
}


WHY_NOT = ahead_of_time.why_not("v6e:2x2")


class WithLse(SplashBackend):
    """The log-sum-exp that the cases ask for comes from the reference; it is not what is tested here."""

    def refuses(self, request):
        return [reason for reason in super().refuses(request) if "log-sum-exp" not in reason]

    def run(self, q, k, v, request):
        return super().run(q, k, v, request)[0], choice.backend("xla").run(q, k, v, request)[1]


@pytest.mark.parametrize("name", CASES)
def test_float32(name, monkeypatch):
    monkeypatch.setitem(choice.BACKENDS, "splash", WithLse())
    errors = conformance.errors("splash", CASES[name], jnp.float32)
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
