"""The Hopper attention kernels, interpreted on the CPU: against float64, for races; and compiled for an H200.

The interpreter takes seconds for each thread block. The ordinary run therefore has few cases with many features each;
the full one has the cases that all backends share.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks import attention_gpu
from pallas_kernels import ahead_of_time, conformance, masks
from pallas_kernels.attention import UnsupportedAttention, attention
from pallas_kernels.backends.pallas_gpu import PallasGpuBackend
from pallas_kernels.biases import AlibiBias
from pallas_kernels.conformance import CASES, Case
from pallas_kernels.fused import inputs_of
from pallas_kernels.gpu import operands
from pallas_kernels.requests import WHOLE, Request

BF16, F16 = jnp.dtype("bfloat16"), jnp.dtype("float16")


def packed_prefix(batch, tq, tk):
    """Three examples and padding, of which no border is one of a block."""
    ids = np.repeat([[1, 2, 3, 0]], [60, 75, 50, 15], axis=1)
    ends = np.repeat([[20, 100, 140, 0]], [60, 75, 50, 15], axis=1)
    return masks.PrefixLM(np.repeat(ends, batch, 0)) & masks.Segments(np.repeat(ids, batch, 0))


def one_head_sees_less(batch, tq, tk):
    visible = np.ones((1, 2, 2, 2), bool)
    visible[0, 1, 1, 0] = False
    return masks.BlockSparse.of_map(visible, (128, 128)) & masks.Causal()


FEW = dict(batch=1, heads=2, kv_heads=1)
MANY_FEATURES = {
    "shared keys, diagonals": (BF16, dataclasses.replace(CASES["relative"], mask=packed_prefix, **FEW)),
    "two intervals, cap, ALiBi, wider values": (
        F16,
        Case(
            lambda *_: masks.Window(15, 15) | masks.GlobalTokens(5),
            bias=lambda h: AlibiBias(jnp.asarray(2.0 ** -np.arange(1, h + 1), jnp.float32)),
            soft_cap=3.0,
            v_size=128,
            **FEW,
        ),
    ),
    "block lists by head, dropout, dense bias": (
        BF16,
        Case(one_head_sees_less, bias=CASES["dense bias"].bias, dropout=0.3, size=128, **FEW),
    ),
    "widest heads, fewer queries, sinks": (
        BF16,
        Case(lambda *_: masks.Causal(40), sinks=True, tq=70, tk=150, size=256, v_size=256, **FEW),
    ),
}


def check(case: Case, dtype: jnp.dtype) -> None:
    """Errors at most twice those of plain XLA in the same type."""
    found, allowed = (conformance.errors(backend, case, dtype) for backend in ("pallas_gpu", "xla"))
    wrong = {name: (error, allowed[name]) for name, error in found.items() if not error <= 2 * allowed[name]}
    assert not wrong, f"(error, plain XLA's) {wrong}"


@pytest.mark.parametrize("name", MANY_FEATURES)
def test_matches_the_reference(name):
    dtype, case = MANY_FEATURES[name]
    check(case, dtype)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_conforms(name):
    conformance.check("pallas_gpu", name, BF16)


@pytest.mark.full
def test_nothing_leaks_between_segments():
    conformance.check_nothing_leaks("pallas_gpu", BF16)


def test_hidden_keys_and_queries_may_be_nan():
    q, k, v = (
        jnp.ones((1, 100, 1, 64), BF16) * jnp.linspace(-1, 1, 100, dtype=BF16)[None, :, None, None] for _ in "qkv"
    )
    mask = masks.Segments(np.repeat([[1, 2]], [30, 70], axis=1))
    own = (jnp.arange(100) < 30)[None, :, None, None]
    dirty = attention(jnp.where(own, q, jnp.nan), jnp.where(own, k, jnp.nan), v, mask=mask, backend="pallas_gpu")
    clean = attention(q, k, v, mask=mask, backend="pallas_gpu")
    np.testing.assert_array_equal(np.asarray(dirty[:, :30], np.float32), np.asarray(clean[:, :30], np.float32))
    assert np.isfinite(np.asarray(clean, np.float32)).all()


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(64, marks=pytest.mark.full),
        256,  # two warpgroups share keys, and write where the other reads
    ],
)
def test_no_races(size, no_races):
    case = Case(packed_prefix, size=size, v_size=size, batch=1, heads=1, kv_heads=1)
    with no_races(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        conformance.run("pallas_gpu", case, BF16)


def request_of(mask, dtype=BF16, size=64, v_size=64, **options):
    shape = (2, 200, 4, size)
    fields = dict(bias=None, scale=1.0, soft_cap=None, dropout_rate=0.0, dropout_seed=None, origin=WHOLE)
    shapes = dict(q_shape=shape, k_shape=shape, v_shape=(*shape[:3], v_size))
    return Request(mask=mask, needs_lse=True, dtype=jnp.dtype(dtype), **shapes, **fields | options)


@pytest.mark.parametrize("by_keys", [False, True])
def test_visits_are_the_blocks_with_something_to_see(by_keys):
    mask = packed_prefix(2, 200, 200)
    seen = np.pad(np.asarray(mask.dense(200, 200))[:, 0], ((0, 0), (0, 56), (0, 56)))
    blocks = seen.reshape(2, 4, 64, 2, 128).any((2, 4))
    lists = operands.visits(operands.plan_of(inputs_of(request_of(mask)), 200, (64, 128)), by_keys=by_keys)
    for example, expected in enumerate(blocks.swapaxes(1, 2) if by_keys else blocks):
        for row, (count, visits) in enumerate(zip(lists["count"][example, 0], lists["visits"][example, 0])):
            np.testing.assert_array_equal(np.asarray(visits[:count]) >> 1, np.flatnonzero(expected[row]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(mask=masks.Full(), dtype=jnp.float32), "q is float32, and its matrix products take bfloat16 or float16"),
        (dict(mask=masks.Full(), size=80), "the head size of q and k is 80, not one of 64, 128, 256"),
        (dict(mask=masks.Full(), v_size=32), "the head size of v is 32, not one of 64, 128, 256"),
        (dict(mask=masks.Dense(np.ones((1, 1, 200, 200), bool))), "the mask Dense is not made of key intervals"),
        (
            dict(mask=masks.BlockSparse.of_map(np.ones((1, 1, 5, 5), bool), (40, 40))),
            "BlockSparse.block=(40, 40) is not in multiples of 64",
        ),
    ],
)
def test_refusals_say_why(options, reason):
    backend = PallasGpuBackend()
    assert backend.refuses(request_of(**options)) == [reason]
    assert not backend.refuses(request_of(masks.Causal()))


@pytest.mark.parametrize("chip", ["TPU v5 lite", "NVIDIA A100-SXM4-80GB"])
def test_other_chips_are_refused(chip):
    device = AbstractDevice(device_kind=chip, num_cores=None, platform="tpu" if "TPU" in chip else "gpu")
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), BF16)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        with pytest.raises(UnsupportedAttention, match="it runs on Hopper GPUs"):
            jax.eval_shape(lambda q: attention(q, q, q, mask=masks.Causal(), backend="pallas_gpu"), x)


def skip_without_compiler():
    if reason := ahead_of_time.why_not("h200"):
        pytest.skip(reason)


def test_compiles_for_h200():
    skip_without_compiler()
    run, shapes = attention_gpu.program("packed prefix", 128, "bfloat16", tokens=1024)
    ahead_of_time.compile_for("h200", run, *shapes)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_registers_suffice(size, dtype):
    skip_without_compiler()
    case = ahead_of_time.Case(
        "benchmarks.attention_gpu:program", dict(mask="packed prefix", size=size, dtype=dtype, tokens=1024)
    )
    spilled = {kernel.kernel: kernel.spill_loads for kernel in ahead_of_time.gpu_registers(case)}
    assert len(spilled) == 3 and not any(spilled.values()), spilled
