"""Grouped matmul: what the TPU and GPU compilers say of its kernels, and what the reference costs on a CPU.

    python -m benchmarks.grouped_matmul          # writes results/grouped_matmul.json after each figure

TPU figures are the compiler's estimates of cycles, on no TPU. It takes numbers that kernels read from scalar memory for
0 and cannot know how many steps a grid of dynamic length has. So megablox is compiled with a grid of static length, the
most steps that any group sizes can need (rows / tile + groups - 1, of which the tiles on the borders of groups are
extra work), and with every tile read as the first group's. Its kernel of dw passes over groups of size 0, which is what
the estimate takes each for, so there is none of dw. Of XLA's own ragged_dot, whose loops depend on the group
sizes too, the estimate says nothing certain; it is given beside megablox at a small shape only.
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.training import machine
from pallas_kernels import ahead_of_time, grouped_matmul
from pallas_kernels.ahead_of_time import Case

RESULTS = pathlib.Path(__file__).parent / "results" / "grouped_matmul.json"
EXPERTS = {"m": 8192, "k": 1024, "n": 1024, "g": 8}
SMALL = {"m": 1024, "k": 256, "n": 256, "g": 8}
TILINGS = [(256, 512, 512), (256, 1024, 512), (512, 1024, 512)]  # beside the default
TOPOLOGY, FLOPS_PER_CYCLE = "v6e:2x2", 524_288  # of bfloat16, at most


def product_case(
    m: int, k: int, n: int, g: int, product: str, backend: str, tiles: list[int] | None = None
) -> tuple[Callable, tuple]:
    """One of the three products of a training step: "forward", "dx" or "dw"; `tiles` override megablox's own."""
    if backend == "megablox":
        _count_all_tiles()
    if tiles is not None:
        grouped_matmul.megablox_tiles = lambda *_: tuple(tiles)
    by = grouped_matmul.GROUPED_MATMUL.backend(backend)
    x, y, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in [(m, k), (m, n), (g, k, n)])
    sizes = jax.ShapeDtypeStruct((g,), jnp.int32)
    return {
        "forward": (functools.partial(by.by_rows, transposed=False), (x, w, sizes)),
        "dx": (functools.partial(by.by_rows, transposed=True), (y, w, sizes)),
        "dw": (by.by_groups, (x, y, sizes)),
    }[product]


def _count_all_tiles() -> None:
    """Gives megablox's grid the length that suffices for any group sizes, in place of one that depends on them."""
    # By name: the package shadows the module with its function.
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    make = megablox.make_group_metadata

    def with_static_length(*, m: int, tm: int, group_sizes: jax.Array, **rest: Any) -> tuple[Any, int]:
        metadata, _ = make(m=m, tm=tm, group_sizes=group_sizes, **rest)
        return metadata, m // tm + group_sizes.shape[0] - 1

    megablox.make_group_metadata = with_static_length


def tpu_figures(arguments: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Estimated cycles of the kernel and of the operations that prepare it."""
    start = time.perf_counter()
    cycles = ahead_of_time.tpu_cycles(Case("benchmarks.grouped_matmul:product_case", arguments), TOPOLOGY, timeout)
    kernel = max(cycles, key=cycles.get)
    flops = 2 * arguments["m"] * arguments["k"] * arguments["n"]
    return {
        **arguments,
        "topology": TOPOLOGY,
        "kernel": kernel,
        "kernel_cycles": cycles[kernel],
        "other_cycles": sum(cycles.values()) - cycles[kernel],
        "share_of_peak": round(flops / cycles[kernel] / FLOPS_PER_CYCLE, 3),
        "compile_seconds_on_a_shared_machine": round(time.perf_counter() - start, 1),
    }


def gpu_figures(arguments: dict[str, Any]) -> dict[str, Any]:
    """Registers and spills of the kernel for an H200. Its time is not yet measured."""
    [found] = ahead_of_time.gpu_registers(Case("benchmarks.grouped_matmul:product_case", arguments))
    return {**arguments, "registers": found.registers, "spill_bytes": found.spill_stores + found.spill_loads}


def cpu_figures(m: int, k: int, n: int, g: int, repeats: int = 5) -> dict[str, float]:
    """CPU-seconds of the reference, forward and backward, beside one dense product of the same useful work."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(m, k), (g, k, n)])
    sizes = jnp.full((g,), m // g, jnp.int32)

    def loss(multiply: Callable) -> Callable:
        return jax.jit(jax.grad(lambda x, w: jnp.sum(multiply(x, w) ** 2), argnums=(0, 1)))

    grouped = loss(lambda x, w: grouped_matmul.grouped_matmul(x, w, sizes, backend="ragged_dot"))
    dense = loss(lambda x, w: x @ w[0])
    seconds = {}
    for name, gradient in {"ragged_dot": grouped, "dense": dense}.items():
        jax.block_until_ready(gradient(x, w))
        taken = []
        for _ in range(repeats):
            start = time.process_time()
            jax.block_until_ready(gradient(x, w))
            taken.append(time.process_time() - start)
        seconds[name] = float(np.median(taken))
    return {"m": m, "k": k, "n": n, "g": g, **{f"{name}_cpu_seconds": round(s, 4) for name, s in seconds.items()}}


def main() -> None:
    """Measures what can be measured here, and writes it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=900, help="seconds, of one compile")
    args = parser.parse_args()
    result = {"machine": machine.facts(), "estimates": "TPU cycles are the compiler's estimates", "h200_time": None}
    result |= {"cpu": cpu_figures(**SMALL), "h200": [], "tpu": []}

    def keep(kind: str, figures: dict[str, Any]) -> None:
        result[kind].append(figures)
        print(json.dumps(figures), flush=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")

    print(json.dumps(result["cpu"]))
    if reason := ahead_of_time.why_not("h200"):
        print(reason)
    else:
        for product in ("forward", "dx", "dw"):
            keep("h200", gpu_figures({**EXPERTS, "product": product, "backend": "pallas_gpu"}))
    runs = [{**SMALL, "product": "forward", "backend": backend} for backend in ("megablox", "ragged_dot")]
    runs += [{**EXPERTS, "product": "forward", "backend": "megablox", "tiles": tiles} for tiles in TILINGS]
    runs += [{**EXPERTS, "product": product, "backend": "megablox"} for product in ("forward", "dx")]
    for arguments in runs:
        keep("tpu", tpu_figures(arguments, args.timeout))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
