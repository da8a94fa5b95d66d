"""Products of matrices on a warpgroup's tensor cores, and what differs between a GPU and the interpreter.

jax's interpreter of GPU kernels knows neither `pl.run_state` nor a left operand in registers. In `accumulate`, and
nowhere else in these kernels, the two part: there the interpreter multiplies what it reads from shared memory.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def product(left: jax.Ref, right: jax.Ref, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """left right, float32, of two matrices in shared memory; `meanwhile` is called once the product has started."""

    def run(result):
        plgpu.wgmma(result, left, right)
        meanwhile()
        return result[...]

    return pl.run_scoped(run, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def accumulate(total: jax.Array, left: jax.Array, right: jax.Ref, interpreted: bool) -> jax.Array:
    """total + left right, float32; left in registers, right in shared memory."""
    if interpreted:
        total = total + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # Unlike a tensor core's, this reading must be declared done before the next copy.
        return total

    def run(result):
        plgpu.wgmma(result, left, right)

    return pl.run_state(run)(plgpu.ACC.init(total))
