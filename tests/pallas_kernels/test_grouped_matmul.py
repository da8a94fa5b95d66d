"""Every backend of grouped_matmul equals the float64 product of each group, forward and backward, and leaks nothing."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import ahead_of_time, platforms
from pallas_kernels.ahead_of_time import Case
from pallas_kernels.gpu import grouped_matmul as hopper
from pallas_kernels.grouped_matmul import GROUPED_MATMUL, UnsupportedGroupedMatmul, grouped_matmul

HERE = "tests.pallas_kernels.test_grouped_matmul"
M, K, N, G = 200, 128, 192, 4  # M divides no tile, and K and N are of 128 and of 64
KINDS = [
    ("ragged_dot", "float32"),
    ("ragged_dot", "bfloat16"),
    ("megablox", "float32"),
    ("megablox", "bfloat16"),
    ("pallas_gpu", "bfloat16"),
]
SIZES = [
    (70, 0, 100, 14),  # an empty group, a border inside a tile, rows in no group
    (0, 128, 72, 0),  # a border between two tiles, empty first and last, all rows used
    (200, 0, 0, 0),
    (0, 0, 0, 0),
    (1, 1, 1, 1),
]


def arrays(seed: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in [(M, K), (G, K, N), (M, N)])


@functools.cache
def jitted(backend: str):
    """(x, w, group sizes, dy) -> y, dx, dw: one compile for all group sizes."""

    def run(x, w, sizes, dy):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
        return y, *pullback(dy)

    return jax.jit(run)


def exact(x, w, sizes, dy):
    """y, dx, dw by a loop over groups, float64."""
    x, w, dy = map(float64, (x, w, dy))
    y, dx, dw = np.zeros((M, N)), np.zeros((M, K)), np.zeros((G, K, N))
    for g, (start, end) in enumerate(zip(np.cumsum(sizes) - sizes, np.cumsum(sizes))):
        rows = slice(start, end)
        y[rows], dx[rows] = x[rows] @ w[g], dy[rows] @ w[g].T
        dw[g] = x[rows].T @ dy[rows]
    return y, dx, dw


@jax.jit
def plain(x, w, sizes, dy):
    """The same as XLA would do it without a thought: each group's rows, others 0, times its matrix."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(M)[:, None]
    of = [(row >= end - size) & (row < end) for size, end in zip(sizes, ends)]
    x_of, dy_of = ([jnp.where(mine, a, jnp.zeros_like(a)) for mine in of] for a in (x, dy))
    y, dx = sum(a @ m for a, m in zip(x_of, w)), sum(a @ m.T for a, m in zip(dy_of, w))
    return y, dx, jnp.stack([a.T @ b for a, b in zip(x_of, dy_of)])


def float64(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def check(backend, dtype, sizes, seed=0):
    x, w, dy = arrays(seed, dtype)
    sizes = np.asarray(sizes, np.int32)
    expected, rounded = exact(x, w, sizes, dy), plain(x, w, sizes, dy)
    used = sizes.sum()
    hidden = jnp.arange(M)[:, None] >= used  # rows in no group hold what must not be felt
    got = jitted(backend)(jnp.where(hidden, jnp.nan, x), w, sizes, jnp.where(hidden, jnp.inf, dy))
    for array, reference, xla in zip(got, expected, rounded):
        assert array.dtype == dtype
        error = np.linalg.norm(float64(array) - reference)
        if dtype == "float32":
            assert error <= 1e-5 * np.linalg.norm(reference)
        else:
            assert error <= 2 * np.linalg.norm(float64(xla) - reference)
    y, dx, dw = map(float64, got)
    assert not y[used:].any() and not dx[used:].any() and not dw[sizes == 0].any()


@pytest.mark.parametrize("backend, dtype", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_loop_over_groups(backend, dtype, sizes):
    check(backend, dtype, sizes)


@pytest.mark.parametrize("backend, dtype", KINDS)
def test_any_group_sizes(backend, dtype, full):
    # The GPU interpreter takes seconds an example; what it runs by, `test_visits_cover_each_row_once` has seen more of.
    @settings(max_examples=200 if full else 2 if backend == "pallas_gpu" else 10, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, M), min_size=G, max_size=G), st.integers(0, 100))
    def holds(cuts, seed):
        cuts = sorted(cuts)
        check(backend, dtype, np.diff([0, *cuts]), seed)

    holds()


@pytest.mark.parametrize("backend, dtype", [kind for kind in KINDS if kind[0] != "ragged_dot" or kind[1] == "float32"])
def test_groups_keep_to_themselves(backend, dtype):
    """Infinities in one group's rows stay in its rows and in its matrix's gradient."""
    x, w, dy = arrays(0, dtype)
    sizes = jnp.asarray([70, 0, 100, 14], jnp.int32)
    bad = (jnp.arange(M) >= 70) & (jnp.arange(M) < 170)
    y, dx, dw = jitted(backend)(x, w, sizes, dy)
    bad_y, bad_dx, bad_dw = jitted(backend)(
        jnp.where(bad[:, None], jnp.inf, x), w, sizes, jnp.where(bad[:, None], jnp.inf, dy)
    )
    for good, array in [(y, bad_y), (dx, bad_dx)]:
        np.testing.assert_array_equal(float64(good)[~bad], float64(array)[~bad])
        assert not np.isfinite(float64(array)[bad]).all()
    np.testing.assert_array_equal(float64(dw)[[0, 1, 3]], float64(bad_dw)[[0, 1, 3]])
    assert not np.isfinite(float64(bad_dw)[2]).all()


def test_visits_cover_each_row_once():
    """The plan of the GPU kernel: each row of a group is in one visit of that group, in the visit's own block."""
    rng = np.random.default_rng(0)
    visits = jax.jit(hopper._visits, static_argnums=1)
    for _ in range(50):
        sizes = np.diff([0, *np.sort(rng.choice([0, 128, 256, 384, 511, 512, *rng.integers(0, 512, 6)], 5))])
        owner = np.full(512, -1)
        for block, group, start, end in np.stack(visits(jnp.asarray(sizes, jnp.int32), 4), axis=1):
            assert (
                0 <= block < 4 and 0 <= group < 5 and (start == end or block * 128 <= start < end <= block * 128 + 128)
            )
            assert (owner[start:end] == -1).all()
            owner[start:end] = group
        np.testing.assert_array_equal(owner[: sizes.sum()], np.repeat(np.arange(5), sizes))
        assert (owner[sizes.sum() :] == -1).all()


def test_no_races(no_races, monkeypatch):
    """The GPU kernels wait for the tiles they read. (The interpreter multiplies at once: it sees no late wgmma.)"""
    monkeypatch.setattr(platforms, "gpu_interpret", lambda: {"interpret": plgpu.InterpretGPUParams(detect_races=True)})
    x, w, dy = arrays(0, "bfloat16")
    sizes = jnp.asarray([70, 0, 100, 14], jnp.int32)
    with no_races():
        hopper.by_rows(dy, w, sizes, transposed=True).block_until_ready()
        hopper.by_groups(x, dy, sizes).block_until_ready()


def shapes(m: int, k: int, n: int, g: int, dtype: str = "bfloat16"):
    struct = jax.ShapeDtypeStruct
    return struct((m, k), dtype), struct((g, k, n), dtype), struct((g,), jnp.int32)


def with_gradients(x, w, sizes):
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return pullback(y)


def gradients_case(m: int, k: int, n: int, g: int, dtype: str):
    """A case: `auto` on the case's platform, forward and backward."""
    return with_gradients, shapes(m, k, n, g, dtype)


@pytest.mark.parametrize(
    "topology",
    [t if t == "v6e:2x2" else pytest.param(t, marks=pytest.mark.full) for t in ahead_of_time.TPUS],
)
def test_compiles_for_tpus(topology):
    if reason := ahead_of_time.why_not(topology):
        pytest.skip(reason)
    compiled = ahead_of_time.compile_for(topology, with_gradients, *shapes(1000, 256, 384, 4))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.full)])
def test_compiles_for_an_h200(dtype):
    if reason := ahead_of_time.why_not("h200"):
        pytest.skip(reason)
    case = Case(f"{HERE}:gradients_case", {"m": 1000, "k": 256, "n": 384, "g": 4, "dtype": dtype})
    kernels = ahead_of_time.gpu_registers(case)
    assert sorted(k.kernel.removesuffix("_mosaic_gpu_kernel") for k in kernels) == [
        "grouped_matmul_by_groups",
        "grouped_matmul_by_rows",
        "grouped_matmul_by_rows",
    ]
    assert all(k.spill_stores == k.spill_loads == 0 for k in kernels)


def on(platform: str, kind: str):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize(
    "platform, kind, k, dtype, expected",
    [
        ("tpu", "TPU v6 lite", 128, "bfloat16", "megablox"),
        ("tpu", "TPU v6 lite", 128, "float16", "ragged_dot (not megablox: it multiplies bfloat16 and float32"),
        ("gpu", "NVIDIA H200", 128, "bfloat16", "pallas_gpu"),
        ("gpu", "NVIDIA H200", 100, "bfloat16", "ragged_dot (not pallas_gpu: K and N must be multiples of 64"),
        ("gpu", "NVIDIA A100", 128, "bfloat16", "ragged_dot (not pallas_gpu: it runs on Hopper GPUs"),
        ("cpu", "cpu", 128, "bfloat16", "ragged_dot"),
    ],
)
def test_auto_says_what_it_takes(platform, kind, k, dtype, expected, caplog):
    GROUPED_MATMUL._announced.clear()
    x, w, _ = shapes(64, k, 128, 2, dtype)
    with on(platform, kind), caplog.at_level(logging.INFO, "pallas_kernels"):
        chosen = GROUPED_MATMUL.choose("auto", x, w)
        assert GROUPED_MATMUL.choose("auto", x, w) is chosen
    assert expected.startswith(chosen.name)
    [record] = caplog.records
    assert f"runs on {expected}" in record.getMessage()


def test_named_backends_refuse():
    x, w, sizes = (jnp.zeros(s.shape, s.dtype) for s in shapes(64, 100, 128, 2, "float32"))
    with pytest.raises(UnsupportedGroupedMatmul) as refused:
        grouped_matmul(x, w, sizes, backend="pallas_gpu")
    assert str(refused.value) == (
        "pallas_gpu cannot: it multiplies bfloat16 and float16, not float32; K and N must be multiples of 64, not 100 "
        "and 128. Backends that can: ragged_dot, megablox."
    )
    with pytest.raises(UnsupportedGroupedMatmul, match="no grouped_matmul backend 'cublas'; there are megablox, "):
        grouped_matmul(x, w, sizes, backend="cublas")
    with on("gpu", "NVIDIA H200"):
        assert "it runs on TPUs" in GROUPED_MATMUL.backend("megablox").refuses(x, w)[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": ((64, 96), "float32")}, r"takes x \[M, K\] and w \[G, K, N\]; got x \(64, 96\), w \(2, 128, 32\)"),
        ({"w": ((128, 32), "float32")}, r"takes x \[M, K\] and w \[G, K, N\]; got x \(64, 128\), w \(128, 32\)"),
        ({"sizes": ((3,), "int32")}, r"group_sizes \[G\], one of each matrix.*group_sizes \(3,\)"),
        ({"sizes": ((2,), "float32")}, "group_sizes must be int32, not float32: convert it"),
        ({"w": ((2, 128, 32), "bfloat16")}, "of one type, not float32 and bfloat16: convert one"),
    ],
)
def test_bad_input_is_one_sentence(change, message):
    given_shapes = {"x": ((64, 128), "float32"), "w": ((2, 128, 32), "float32"), "sizes": ((2,), "int32")} | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*(jnp.zeros(shape, dtype) for shape, dtype in given_shapes.values()))
