"""The race detectors find races, and the fixture hears of them."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

SHAPE = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def tpu_copy(x, *, patient: bool):
    def kernel(x_ref, out_ref, buffer, arrived):
        copy = pltpu.make_async_copy(x_ref, buffer, arrived)
        copy.start()
        if patient:
            copy.wait()
        out_ref[...] = buffer[...]
        if not patient:
            copy.wait()

    return pl.pallas_call(
        kernel,
        out_shape=SHAPE,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(SHAPE.shape, SHAPE.dtype), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )(x)


def gpu_copy(x, *, patient: bool):
    def kernel(x_ref, out_ref, buffer, arrived):
        plgpu.copy_gmem_to_smem(x_ref, buffer, arrived)
        if patient:
            plgpu.barrier_wait(arrived)
        out_ref[...] = buffer[...]
        if not patient:
            plgpu.barrier_wait(arrived)

    return plgpu.kernel(
        kernel,
        out_type=SHAPE,
        scratch_types=[plgpu.SMEM(SHAPE.shape, SHAPE.dtype), plgpu.Barrier()],
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )(x)


@pytest.mark.parametrize("copy", [tpu_copy, gpu_copy])
def test_races_are_found(copy, no_races):
    x = jnp.ones(SHAPE.shape)
    with no_races():
        assert (copy(x, patient=True) == x).all()
    with pytest.raises((jax.errors.JaxRuntimeError, AssertionError), match="RACE DETECTED"), no_races():
        copy(x, patient=False).block_until_ready()
