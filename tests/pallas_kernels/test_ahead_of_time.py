"""Programs compile for machines that are not there, and the instruments tell what the compilers know."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import ahead_of_time, platforms
from pallas_kernels.ahead_of_time import Case

HERE = "tests.pallas_kernels.test_ahead_of_time"


def needs(topology: str) -> None:
    if reason := ahead_of_time.why_not(topology):
        pytest.skip(reason)


def _matmul_kernel(x_ref, y_ref, out_ref):
    out_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32).astype(out_ref.dtype)


def matmul(x: jax.Array, y: jax.Array, *, tile: int) -> jax.Array:
    return pl.pallas_call(
        _matmul_kernel,
        grid=(x.shape[0] // tile, y.shape[1] // tile),
        in_specs=[
            pl.BlockSpec((tile, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((y.shape[0], tile), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((tile, tile), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), x.dtype),
        name="matmul",
        interpret=platforms.tpu_interpret(),
    )(x, y)


def squares(size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct((size, size), jnp.bfloat16),) * 2


def products(size: int, times: int):
    """A case: x y ... y, `times` kernels of size^3."""

    def chain(x, y):
        for _ in range(times):
            x = matmul(x, y, tile=256)
        return x

    return chain, squares(size)


def gpu_copies(size: int):
    """A case: x + 1 by a Mosaic GPU kernel, one row of 128 a block."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(x_ref, out_ref):
        row = jax.lax.axis_index("row")
        out_ref[row] = x_ref[row] + 1.0

    shape = jax.ShapeDtypeStruct((size, 128), jnp.float32)
    return plgpu.kernel(kernel, out_type=shape, grid=(size,), grid_names=("row",)), (shape,)


def broken():
    raise OSError("no such luck")


def aborting():
    os.abort()


def test_compiles_for_a_tpu():
    needs("v6e:2x2")
    compiled = ahead_of_time.compile_for("v6e:2x2", functools.partial(matmul, tile=256), *squares(512))
    assert "tpu_custom_call" in compiled.as_text(), "the kernel was interpreted: its mesh is not that of a TPU"
    memory = ahead_of_time.memory(compiled)
    each = 512 * 512 * 2
    assert (memory.arguments, memory.outputs) == (2 * each, each)
    assert memory.peak >= 3 * each


def test_memory_sees_what_is_kept():
    """The scores [8192, 8192] of dense attention are too large for the chip's own memory; adding 1 keeps nothing."""
    needs("v6e:2x2")
    x = jax.ShapeDtypeStruct((8192, 256), jnp.float32)
    attention = ahead_of_time.compile_for("v6e:2x2", lambda x: jax.nn.softmax(x @ x.T) @ x, x)
    assert ahead_of_time.memory(attention).temporaries >= 8192 * 8192 * 4
    assert ahead_of_time.memory(attention).peak >= 8192 * 8192 * 4
    assert ahead_of_time.memory(ahead_of_time.compile_for("v6e:2x2", lambda x: x + 1, x)).temporaries == 0


@pytest.mark.full
@pytest.mark.parametrize("topology", ahead_of_time.TPUS)
def test_compiles_for_every_tpu(topology):
    needs(topology)
    compiled = ahead_of_time.compile_for(topology, functools.partial(matmul, tile=256), *squares(512))
    assert "tpu_custom_call" in compiled.as_text()


def test_cycles_grow_with_the_work():
    """Eight times the multiplications take several times the cycles; the same kernel twice takes them twice."""
    needs("v6e:2x2")
    one, large, twice = (
        ahead_of_time.tpu_cycles(Case(f"{HERE}:products", {"size": size, "times": times}), "v6e:2x2")
        for size, times in [(512, 1), (1024, 1), (512, 4)]
    )
    [small_cycles], [large_cycles] = one.values(), large.values()
    assert all(op.startswith("matmul") for op in one)
    flop_per_cycle = 524_288  # the most a v6e core can do: four 256 x 256 arrays of multipliers and adders
    assert small_cycles >= 2 * 512**3 / flop_per_cycle and large_cycles >= 2 * 1024**3 / flop_per_cycle
    assert large_cycles > 3 * small_cycles
    assert sum(twice.values()) > 2 * small_cycles, "equal operations count as often as they run"


def test_units_of_a_matmul():
    needs("v6e:2x2")
    units = ahead_of_time.tpu_units(Case(f"{HERE}:products", {"size": 512, "times": 1}), "v6e:2x2")
    [kernel] = units.values()
    assert [op.startswith("matmul") for op in units] == [True]
    assert kernel.bundles > 100 and kernel.spills >= 0
    matmul = "MATMUL" if "MATMUL" in kernel.used else "MXU"
    assert 0.1 < kernel.share(matmul) <= 1 and kernel.share("EUP") == 0, "a product needs no transcendental unit"


def test_a_crash_is_an_error():
    needs("v6e:2x2")
    with pytest.raises(ahead_of_time.CannotCompile, match="broken.* failed, with exit status 1") as raised:
        ahead_of_time.tpu_cycles(Case(f"{HERE}:broken"), "v6e:2x2")
    assert "no such luck" in raised.value.__notes__[0]
    with pytest.raises(ahead_of_time.CannotCompile, match="aborting.* failed, with exit status -6"):
        ahead_of_time.tpu_units(Case(f"{HERE}:aborting"), "v6e:2x2")
    with pytest.raises(ahead_of_time.CannotCompile, match="longer than 0.1 seconds"):
        ahead_of_time.tpu_cycles(Case(f"{HERE}:broken"), "v6e:2x2", timeout=0.1)


@pytest.mark.parametrize("name", ["v9:2x2", "v6e", "v6e:0x0", "h100", ""])
def test_unknown_topologies(name):
    for ask in (ahead_of_time.why_not, functools.partial(ahead_of_time.compile_for, function=jnp.sin)):
        with pytest.raises(ValueError, match=f"There is no topology '{name}'; there are sizes of v5e:2x2, .*'h200'.$"):
            ask(name)


def test_impossible_size():
    needs("v5e:2x2")
    with pytest.raises(ValueError, match="libtpu knows no topology 'v5e:3x5': .*not divisible"):
        ahead_of_time.compile_for("v5e:3x5", jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))


def test_instruments_know_their_platform():
    with pytest.raises(ValueError, match="for TPUs, not 'h200'"):
        ahead_of_time.tpu_cycles(Case(f"{HERE}:broken"), "h200")
    with pytest.raises(ValueError, match="for GPUs, not 'v6e:2x2'"):
        ahead_of_time.gpu_registers(Case(f"{HERE}:broken"), "v6e:2x2")


def test_reasons_for_no_plugin(monkeypatch, tmp_path):
    monkeypatch.setattr(ahead_of_time, "_found", lambda module: False)
    assert ahead_of_time.why_not("v6e:2x2") == "compiling for v6e:2x2 needs the package libtpu"
    monkeypatch.delenv(ahead_of_time.CUDA_PLUGIN, raising=False)
    assert ahead_of_time.why_not("h200").startswith("compiling for h200 needs jax-cuda13-plugin: set PALLAS_KERNELS")
    monkeypatch.setenv(ahead_of_time.CUDA_PLUGIN, str(tmp_path))
    assert f"no jax-cuda13-plugin in {tmp_path}" in ahead_of_time.why_not("h200")
    pathlib.Path(tmp_path, "jax_cuda13_plugin").mkdir()
    pathlib.Path(tmp_path, "jax_cuda13_plugin-0.0.1.dist-info").mkdir()
    assert f"is not of jax's version {jax.__version__}" in ahead_of_time.why_not("h200")
    pathlib.Path(tmp_path, f"jax_cuda13_plugin-{jax.__version__}.dist-info").mkdir()
    assert ahead_of_time.why_not("h200") is None


def test_compiles_for_an_h200():
    needs("h200")
    gpu_kernel, shapes = gpu_copies(8)  # has imported Mosaic GPU before the plugin is there
    compiled = ahead_of_time.compile_for("h200", gpu_kernel, *shapes)
    assert "mosaic_gpu" in compiled.as_text()
    assert ahead_of_time.memory(compiled).outputs == 8 * 128 * 4
    assert jax.devices()[0].platform == "cpu" and platforms.current().kind == "cpu"


def test_registers_of_a_gpu_kernel():
    needs("h200")
    [kernel] = ahead_of_time.gpu_registers(Case(f"{HERE}:gpu_copies", {"size": 8}))
    assert 0 < kernel.registers <= 255 and kernel.spill_stores == kernel.spill_loads == 0
    with pytest.raises(ahead_of_time.CannotCompile, match="no Mosaic GPU kernel"):
        ahead_of_time.gpu_registers(Case(f"{HERE}:sines"))


def sines():
    """A case without a kernel."""
    return jnp.sin, (jax.ShapeDtypeStruct((8, 128), jnp.float32),)
