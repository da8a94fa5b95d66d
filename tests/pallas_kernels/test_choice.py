"""Who computes attention: what each backend refuses, by name, and whom "auto" takes on which machine."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import masks
from pallas_kernels.attention import UnsupportedAttention, attention
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.backends import cudnn
from pallas_kernels.biases import AlibiBias, DenseBias, RelativeBias
from pallas_kernels.choice import Candidate
from pallas_kernels.requests import WHOLE, Request

DEVICES = {
    "v6e": ("tpu", "TPU v6 lite"),
    "h200": ("gpu", "NVIDIA H200"),
    "a100": ("gpu", "NVIDIA A100"),
    "mi300": ("gpu", "AMD Instinct MI300X"),
}


@contextlib.contextmanager
def machine(name):
    """As if a program were traced for the machine; "cpu" is this one."""
    if name == "cpu":
        yield
        return
    platform, kind = DEVICES[name]
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        yield


def request(mask=None, tq=4096, tk=None, heads=8, kv_heads=8, size=128, v_size=None, dtype=jnp.bfloat16, **options):
    tk, v_size = tk or tq, v_size or size
    defaults = dict(
        mask=masks.Causal() if mask is None else mask,
        bias=None,
        scale=1.0,
        soft_cap=None,
        dropout_rate=0.0,
        dropout_seed=None,
        origin=WHOLE,
        needs_lse=False,
        q_shape=(2, tq, heads, size),
        k_shape=(2, tk, kv_heads, size),
        v_shape=(2, tk, kv_heads, v_size),
        dtype=jnp.dtype(dtype),
    )
    return Request(**{**defaults, **options})


IDS = np.ones((2, 4096), np.int32)
PACKED_PREFIX = masks.PrefixLM(np.zeros((2, 4096), np.int32)) & masks.Segments(IDS)
DROPOUT = dict(dropout_rate=0.1, dropout_seed=jnp.uint32(1))
REQUESTS = {
    "causal": request(),
    "causal packed": request(masks.Causal() & masks.Segments(IDS)),
    "packed prefix": request(PACKED_PREFIX),
    "window": request(masks.Causal() & masks.Window(255, 0)),
    "lengths": request(masks.KVLength(np.array([7, 9], np.int32))),
    "alibi": request(bias=AlibiBias(jnp.ones(8))),
    "soft cap": request(soft_cap=30.0),
    "dropout": request(**DROPOUT),
    "log-sum-exp": request(needs_lse=True),
    "short": request(tq=128, heads=2, kv_heads=2),
    "dense": request(masks.Dense(np.ones((1, 1, 4096, 4096), bool))),
}
AUTOMATIC = {
    "cpu": dict.fromkeys(REQUESTS, "xla_blocks") | {"short": "xla", "dense": "xla_chunked"},
    "v6e": dict.fromkeys(REQUESTS, "pallas_tpu") | {"dense": "xla_chunked"},
    "h200": dict.fromkeys(REQUESTS, "pallas_gpu")
    | dict.fromkeys(["causal", "window", "lengths", "short"], "cudnn")
    | {"dense": "xla_chunked"},
    "mi300": dict.fromkeys(REQUESTS, "xla_chunked") | {"short": "xla"},
}


@pytest.mark.parametrize("name", AUTOMATIC)
def test_automatic_choices(name, monkeypatch):
    monkeypatch.setattr(cudnn, "_has_gpu", lambda: True)
    with machine(name):
        assert {call: ATTENTION.choose("auto", request).name for call, request in REQUESTS.items()} == AUTOMATIC[name]


def test_every_order_ends_with_one_that_refuses_nothing():
    for order in ATTENTION.order.values():
        assert order[-1].name == "xla_chunked" and not order[-1].better_not(REQUESTS["causal"])
        assert all(candidate.name in ATTENTION.backends and candidate.reason for candidate in order)


def test_a_program_compiled_ahead_of_time_does_without_cudnn():
    with machine("h200"):
        assert "does not compile ahead of time" in ATTENTION.backend("cudnn").refuses(request())[0]


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(dtype=jnp.float32), "float32; it takes float16 and bfloat16"),
        (dict(size=264), "heads of size 264; they must be multiples of 8, 256 at most on h200"),
        (dict(size=60), "heads of size 60"),
        (dict(v_size=64), "heads of size 128 for keys and 64 for values"),
        (dict(soft_cap=5.0), "the soft cap"),
        (DROPOUT, "dropout, for which it has random numbers of its own"),
        (dict(needs_lse=True), "the log-sum-exp"),
        (dict(mask=PACKED_PREFIX), "the mask PrefixLM & Segments; it takes Full"),
        (dict(mask=masks.Window(3, 3)), "the mask Window; it takes Full"),
        (dict(mask=masks.Window(3, None)), "the mask Window; it takes Full"),
        (dict(mask=masks.Causal(2)), "the mask Causal; it takes Full"),
        (dict(mask=masks.Causal(), tk=8192), "4096 queries and 8192 keys under a causal mask"),
        (dict(mask=masks.Window(9, 0) & masks.KVLength(4)), "a window and lengths together"),
        (dict(bias=RelativeBias(jnp.ones((8, 8)))), "RelativeBias; it takes DenseBias"),
        (dict(bias=DenseBias(jnp.ones((1, 8, 1, 4096), jnp.bfloat16))), r"a bias of shape \[1, 8, 1, 4096\]"),
        (dict(bias=DenseBias(jnp.ones((1, 1, 64, 64))), tq=64), "a bias in float32; it must be bfloat16"),
        (
            dict(bias=DenseBias(jnp.ones((1, 1, 63, 63), jnp.bfloat16)), tq=63),
            "63 queries and 63 keys; both must be even",
        ),
    ],
)
def test_cudnn_refuses(options, reason, monkeypatch):
    monkeypatch.setattr(cudnn, "_has_gpu", lambda: True)
    options = {"mask": masks.Full(), **options}
    refuses_for(reason, "cudnn", "h200", request(**options))


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(bias=AlibiBias(jnp.ones(8))), "^bias$"),
        (DROPOUT, "dropout"),
        (dict(needs_lse=True), "the log-sum-exp"),
        (dict(dtype=jnp.float16), "float16; it takes float32 and bfloat16"),
        (dict(tq=4000), "4000 queries and 4000 keys; both must be multiples of 128"),
        (dict(mask=PACKED_PREFIX), "the mask PrefixLM & Segments; it takes Full, Causal.int."),
        (dict(mask=masks.Causal(np.int32(3))), "the mask Causal; it takes"),
        (dict(mask=masks.Causal(-1)), "under which some query sees no key"),
        (dict(mask=masks.Window(5, None), tk=2048), "under which some query sees no key"),
        (dict(mask=masks.Segments(IDS, IDS)), "the mask Segments; it takes Full, Causal.int."),
        (dict(mask=masks.Segments(IDS) & masks.Window(9, -1) & masks.Window(None, 3)), "some query sees no key"),
    ],
)
def test_splash_refuses(options, reason):
    refuses_for(reason, "splash", "v6e", request(**options))


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(dtype=jnp.float32), "float32; it takes"),
        (dict(mask=masks.Window(1, 1) | masks.GlobalTokens(2)), "one key interval a query"),
        (dict(mask=masks.Segments(IDS, contiguous=False)), "one key interval a query"),
        (dict(mask=masks.BlockSparse(np.zeros((1, 1, 32, 1)), np.ones((1, 1, 32)), (128, 128))), "one key interval"),
        (dict(bias=AlibiBias(jnp.ones(8))), "AlibiBias; it takes DenseBias"),
        (dict(bias=DenseBias(jnp.ones((1, 1, 1, 1))), soft_cap=3.0), "a soft cap with a bias"),
        (DROPOUT, "dropout"),
        (dict(needs_lse=True), "the log-sum-exp"),
    ],
)
def test_tokamax_refuses(options, reason, monkeypatch):
    monkeypatch.setattr("pallas_kernels.backends.tokamax._version", lambda: "0.0.17")
    refuses_for(reason, "tokamax", "h200", request(**options))


@pytest.mark.parametrize(
    "name, elsewhere, reason",
    [
        ("splash", "h200", "it is a TPU kernel"),
        ("cudnn", "v6e", "it runs on NVIDIA GPUs, not on v6e"),
        ("cudnn", "cpu", "it runs on NVIDIA GPUs, not on cpu"),
        ("cudnn", "mi300", "not on amd instinct"),
        ("tokamax", "a100", "runs on Hopper and Blackwell GPUs, not on nvidia a100"),
    ],
)
def test_other_machines_are_refused(name, elsewhere, reason, monkeypatch):
    monkeypatch.setattr("pallas_kernels.backends.tokamax._version", lambda: "0.0.17")
    refuses_for(reason, name, elsewhere, request(masks.Full(), size=64))


def refuses_for(reason, name, where, call):
    """One reason, and the same call without what was refused would have been taken."""
    with machine(where):
        with pytest.raises(UnsupportedAttention, match="cannot: .* Backends that can: .*xla"):
            ATTENTION.choose(name, call)
        (given,) = ATTENTION.backend(name).refuses(call)
    assert re.search(reason, given)


@pytest.mark.parametrize("name", sorted(ATTENTION.backends))
def test_a_traced_offset_is_answered(name):
    """Whether a traced offset is 0 is not known: a backend that needs to know refuses, and none fails."""
    with machine("h200"):
        jax.eval_shape(lambda offset: ATTENTION.backend(name).refuses(request(masks.Causal(offset))) and None, 0)


class Fussy:
    """A backend that takes no bias."""

    name = "fussy"

    def refuses(self, request):
        return ["bias"] if request.bias is not None else []

    def run(self, q, k, v, request):
        return "fussy ran", None


def test_backends_are_named_and_refusals_say_why(monkeypatch, caplog):
    x = np.ones((1, 4, 2, 8), np.float32)
    biased = dict(mask=masks.Full(), bias=AlibiBias(np.ones(2)))
    with pytest.raises(UnsupportedAttention, match="no attention backend 'flash'; there are .*xla.* and 'auto'"):
        attention(x, x, x, mask=masks.Full(), backend="flash")
    for other in list(ATTENTION.backends):
        if other != "xla":
            monkeypatch.delitem(ATTENTION.backends, other)
    monkeypatch.setitem(ATTENTION.backends, "fussy", Fussy())
    assert attention(x, x, x, mask=masks.Full(), backend="fussy") == "fussy ran"
    with pytest.raises(UnsupportedAttention, match="fussy cannot: bias. Backends that can: xla."):
        attention(x, x, x, **biased, backend="fussy")

    order = Candidate("fussy", "it is fast"), Candidate("xla", "it can")
    monkeypatch.setitem(ATTENTION.order, "cpu", order)
    monkeypatch.setattr(ATTENTION, "_announced", set())
    caplog.set_level("INFO", "pallas_kernels")
    assert attention(x, x, x, mask=masks.Full()) == "fussy ran"
    for _ in range(2):
        assert attention(x, x, x, **biased).shape == x.shape
    assert caplog.messages == ["attention on cpu runs on fussy", "attention on cpu runs on xla (not fussy: bias)"]


def test_importing_attention_imports_no_kernel(run_python):
    code = (
        "import sys, pallas_kernels.attention; print([m for m in sys.modules if 'pallas' in m and 'experimental' in m])"
    )
    assert run_python(code).stdout.strip() == "[]"
