"""Shared memory of a thread block: matrices that tensor cores read, and rings of them between warpgroups."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_SWIZZLE = 128  # bytes; the widest pattern, in which neither copies nor tensor cores meet on a bank


def matrix(shape: tuple[int, ...], dtype: jnp.dtype) -> plgpu.SMEM:
    """Room for matrices (the last two axes) of 16-bit numbers, in the tiles that tensor cores read."""
    tiling = plgpu.TilingTransform((8, _SWIZZLE // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(_SWIZZLE)))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers that one warpgroup fills by asynchronous copies while others read those filled before.

    All take part in the same steps 0, 1, ...; step n uses buffer n modulo their number. For each step the filler calls
    `fill`, and each reader `wait` and then `free`; at the end the filler calls `drain`.

    Attributes:
      buffers: [stages, ...].
      filled, freed: barriers, one a buffer.
    """

    buffers: jax.Ref
    filled: jax.Ref
    freed: jax.Ref

    @staticmethod
    def scratch(buffers: plgpu.SMEM, readers: int) -> tuple:
        """What to allocate for a ring that `readers` warpgroups read."""
        stages = buffers.shape[0]
        return buffers, plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=readers, num_barriers=stages)

    def fill(self, step: jax.Array, source: jax.Ref) -> None:
        """Starts the copy of `source` as soon as all readers have freed the buffer."""
        slot = self._slot(step)

        @pl.when(step >= self._stages)
        def _():
            plgpu.barrier_wait(self.freed.at[slot])

        plgpu.copy_gmem_to_smem(source, self.buffers.at[slot], self.filled.at[slot])

    def wait(self, step: jax.Array) -> jax.Ref:
        """The buffer of this step, once it is filled."""
        slot = self._slot(step)
        plgpu.barrier_wait(self.filled.at[slot])
        return self.buffers.at[slot]

    def free(self, step: jax.Array) -> None:
        """Lets go of the buffer of this step."""
        plgpu.barrier_arrive(self.freed.at[self._slot(step)])

    def drain(self, steps: jax.Array) -> None:
        """Waits until the readers have freed what was filled in the last of `steps` steps."""

        @pl.loop(jnp.maximum(steps - self._stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(self.freed.at[self._slot(step)])

    @property
    def _stages(self) -> int:
        return self.buffers.shape[0]

    def _slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self._stages))
