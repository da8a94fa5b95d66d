"""Ranks block sizes of the TPU attention kernels, for the table in `pallas_kernels/tpu/block_sizes.py`.

    python -m pallas_kernels.tune --topology v6e:2x2 --kernel forward --size 128

On a machine with a TPU each choice is timed there; without one, it is compiled for the topology and ranked by its
compiler's estimate of cycles, which is good for ranking and says nothing of time. All blocks are computed, masked; what
larger blocks lose because they can skip less is not in the figures, so they are limited to `--largest`.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ahead_of_time
from pallas_kernels.ahead_of_time import CannotCompile, Case
from pallas_kernels.fused import inputs_of
from pallas_kernels.masks import Window
from pallas_kernels.requests import WHOLE, Request
from pallas_kernels.tpu.attention import whole
from pallas_kernels.tpu.attention_backward import backward
from pallas_kernels.tpu.attention_forward import forward
from pallas_kernels.tpu.block_sizes import Blocks
from pallas_kernels.tpu.operands import Sizes

KERNELS = ("forward", "backward")
_HEADS = 4


def program(
    kernel: str, blocks: dict[str, int], size: int, length: int, dtype: str = "bfloat16"
) -> tuple[Callable, tuple[Any, ...]]:
    """One kernel over every block of 4 heads, each masked on both sides; as `ahead_of_time.Case` has it.

    Args:
      kernel: "forward" or "backward".
      blocks: the fields of `Blocks`.
      size: of a head.
      length: of queries and keys.
      dtype: of the arrays.
    """
    shape = (_HEADS, length, 1, size)  # heads are examples here: no copy brings the arrays in the kernel's order

    def run(q, k, v, lse, delta, rows):
        mask = Window(length, 0)
        request = Request(mask, None, size**-0.5, None, 0.0, None, WHOLE, False, shape, shape, shape, q.dtype)
        inputs = dataclasses.replace(inputs_of(request), rows=rows)
        sizes = Sizes.of(q, k, v, Blocks(**blocks))
        walk = whole(sizes, 1, masked=True)
        if kernel == "forward":
            return forward(q, k, v, inputs, walk, sizes)
        return backward(q, k, v, inputs, lse, delta, v, walk, sizes, 0)

    array = jax.ShapeDtypeStruct(shape, dtype)
    row = jax.ShapeDtypeStruct((_HEADS, 1, length), jnp.float32)
    return run, (array, array, array, row, row, jax.eval_shape(lambda: Window(length, 0).rows(length, length)))


def candidates(largest: int, length: int) -> list[Blocks]:
    """Blocks worth trying: up to `largest` queries and keys, in tiles of 256 to 1024 that the registers may hold."""
    sides = [n for n in (512, 1024, 2048, 4096) if n <= min(largest, length)]
    tiles = [(q, k) for q, k in itertools.product((256, 512, 1024), repeat=2) if q * k <= 512 * 1024]
    return [
        Blocks(queries, keys, *tile)
        for queries, keys in itertools.product(sides, repeat=2)
        for tile in tiles
        if tile[0] <= queries and tile[1] <= keys
    ]


def estimated_cycles(topology: str, kernel: str, blocks: Blocks, size: int, length: int) -> int:
    """The compiler's estimate for one choice.

    Raises:
      CannotCompile: the blocks have no room, or the estimator gives up.
    """
    arguments = dict(kernel=kernel, blocks=dataclasses.asdict(blocks), size=size, length=length)
    # The estimator of v5e gives up where operands lie in vector memory: there they stay in main memory.
    options = {"xla_vf_vmem_memory_space_assignment": False} if topology.startswith("v5e") else None
    found = ahead_of_time.tpu_cycles(Case("pallas_kernels.tune:program", arguments, options), topology)
    return next(cycles for name, cycles in found.items() if name.startswith(f"attention_{kernel}"))


def measured_seconds(kernel: str, blocks: Blocks, size: int, length: int, runs: int = 20) -> float:
    """The median time of one choice on the default device."""
    function, shapes = program(kernel, dataclasses.asdict(blocks), size, length)
    compiled = jax.jit(function)
    rng = np.random.default_rng(0)
    *arrays, _ = (jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shape) for shape in shapes)
    arguments = (*arrays, Window(length, 0).rows(length, length))
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rank(choices: list[Blocks], cost: Callable[[Blocks], float]) -> list[tuple[float, Blocks]]:
    """The choices that work and their costs, the cheapest first; the others are said and left out."""
    found = []
    for blocks in choices:
        try:
            found.append((cost(blocks), blocks))
        except (CannotCompile, jax.errors.JaxRuntimeError) as error:
            print(f"{blocks}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(json.dumps({**dataclasses.asdict(blocks), "cost": found[-1][0]}), flush=True)
    return sorted(found, key=lambda entry: entry[0])


def main() -> None:
    """Ranks and prints the choices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", choices=ahead_of_time.TPUS, default="v6e:2x2", help="without a TPU: which to ask")
    parser.add_argument("--kernel", choices=KERNELS, default="forward")
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--length", type=int, default=2048, help="queries and keys")
    parser.add_argument("--largest", type=int, default=1024, help="block")
    options = parser.parse_args()
    shape = options.kernel, options.size, options.length
    timed = jax.devices()[0].platform == "tpu"

    def cost(blocks: Blocks) -> float:
        kernel, size, length = shape
        if timed:
            return measured_seconds(kernel, blocks, size, length)
        return estimated_cycles(options.topology, kernel, blocks, size, length)

    ranked = rank(candidates(options.largest, options.length), cost)
    if not ranked:
        raise SystemExit(
            f"No blocks up to {options.largest} work for the {options.kernel} kernel of size {options.size}."
        )
    unit = "seconds on this TPU" if timed else f"estimated cycles on {options.topology}"
    print(f"\nBest: {options.size}: {ranked[0][1]}, {ranked[0][0]:.6g} {unit}")


if __name__ == "__main__":
    main()
