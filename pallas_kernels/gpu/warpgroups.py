"""Thread blocks of one warpgroup that copies and others that compute."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# A lane of each of three warpgroups starts with 168 registers, of 512 there are for the three; the copying one gives
# most of its own away.
_COMPUTING_REGISTERS = 232
_COPYING_REGISTERS = 40


def launch(
    body: Callable[..., None],
    arrays: dict[str, jax.Array],
    *,
    name: str,
    out_type: tuple[jax.ShapeDtypeStruct, ...],
    scratch: dict[str, Any],
    grid: dict[str, int],
    computing: int,
    interpret: dict[str, Any],
) -> tuple[jax.Array, ...]:
    """Runs a kernel on a grid of thread blocks.

    Args:
      body: called as body(refs of `arrays`, refs of the outputs..., **refs of the scratch memory).
      arrays: in the GPU's memory.
      name: of the kernel, for profiles.
      out_type: shapes and types of the outputs.
      scratch: what each thread block allocates.
      grid: {axis: size}; neighbours along the last axis run at the same time.
      computing: warpgroups that compute; one more copies.
      interpret: `platforms.gpu_interpret()`.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=computing + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        **interpret,
    )(arrays)


@dataclasses.dataclass(frozen=True)
class Turns:
    """Keeps two warpgroups half a step apart: while one uses the tensor cores, the other takes exponentials.

    (The "ping-pong" of FlashAttention-3, arXiv 2407.08608, 3.1.) Each step of both has a part of products and one of
    other arithmetic, and `switch` between them and at its end. `begin` and `end` surround all steps, of which both
    have the same number.

    Attributes:
      barrier: that both arrive at; None for no turns.
    """

    barrier: jax.Ref | None

    @staticmethod
    def scratch(wanted: bool) -> plgpu.Barrier | None:
        """What to allocate."""
        return plgpu.Barrier(num_arrivals=2) if wanted else None

    def begin(self, warpgroup: jax.Array) -> None:
        """The second warpgroup waits for the first one's products."""
        pl.when(warpgroup == 1)(self.switch)

    def switch(self) -> None:
        """Lets the other one go on, and waits for it to have come as far."""
        if self.barrier is not None:
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)

    def end(self, warpgroup: jax.Array) -> None:
        """The first warpgroup lets the second one finish."""
        pl.when(warpgroup == 0)(self.switch)


def specialise(copy: Callable[[], None], *compute: Callable[[jax.Array], None], computing: int) -> None:
    """Gives each warpgroup its work: the last one copies.

    Args:
      copy: what that one does.
      *compute: what the others do, given their number; one for all of them, or one for each.
      computing: how many others there are.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == computing)
    def _():
        if computing == 2:
            plgpu.set_max_registers(_COPYING_REGISTERS, action="decrease")
        copy()

    for number, work in enumerate(compute):
        mine = warpgroup == number if len(compute) > 1 else warpgroup < computing

        @pl.when(mine)
        def _(work=work):
            if computing == 2:
                plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
            work(warpgroup)
