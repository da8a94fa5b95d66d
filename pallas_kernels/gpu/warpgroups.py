"""Thread blocks of one warpgroup that copies and others that compute."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# With two computing warpgroups each lane of the three starts with 168 of the 512 registers there are; the copying one
# gives most of its own away.
_COMPUTING_REGISTERS = 240
_COPYING_REGISTERS = 24


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
