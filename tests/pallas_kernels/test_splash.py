"""jax's TPU kernel behind our call: interpreted it gives the reference's numbers, and it compiles for TPUs."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choice, masks
from pallas_kernels.backends.splash import SplashBackend
from tests.pallas_kernels import conformance

IDS = np.zeros((2, 256), np.int32)
IDS[0, :100], IDS[0, 100:160], IDS[0, 160:210], IDS[1] = 1, 2, 3, 1
SIZES = dict(tq=256, tk=256, heads=2, kv_heads=1)
CASES = {
    "full, cross": conformance.Case(lambda *_: masks.Full(), **SIZES | dict(tq=128, v_size=128)),
    "packed causal, cap": conformance.Case(lambda *_: masks.Causal() & masks.Segments(IDS), soft_cap=3.0, **SIZES),
    "packed encoder": conformance.Case(lambda *_: masks.Segments(IDS), **SIZES),
    "windows": conformance.Case(lambda *_: masks.Causal(3) & masks.Window(20, None), scale=0.3, **SIZES),
    "causal chunks": conformance.Case(lambda *_: masks.Chunked(48) & masks.Causal(), **SIZES),
}


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
