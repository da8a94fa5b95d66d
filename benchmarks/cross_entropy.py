"""Cross-entropy over chunks beside the loss that keeps its logits: processor time, and memory at a large vocabulary.

    python -m benchmarks.cross_entropy            # everything; writes results/cross_entropy.json
    python -m benchmarks.cross_entropy --only time memory

Time is forward and backward on this machine, in processor seconds of all threads; the programs take turns, and ratios
are of medians. Memory is the compiler's own account of arguments, results and temporaries, over the size of (x, w, dx,
dw); for TPUs and the H200 the program is compiled ahead of time, and the backend is what "auto" takes there. Cycles are
the TPU compiler's estimates for one chunk of ids in plain jax, which is a loop's body, for the sum in plain jax and for
the kernel, each for as many ids; nothing ran on a TPU.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.training import machine
from pallas_kernels.ahead_of_time import Case, compile_for, memory, tpu_cycles
from pallas_kernels.cross_entropy import OutputProjection, cross_entropy, token_scores

RESULTS = pathlib.Path(__file__).parent / "results"
TARGETS = {"sum": 1.15, "scores": 1.4, "memory": 1.3}
# Tokens, width, vocabulary: the quickstart's, the floor's of benchmarks/step.py, and a usual vocabulary at its width.
TIMED = ((4096, 128, 4096), (4096, 256, 8192), (2048, 256, 32768))
# 8k tokens by 128k ids.
TOKENS, VOCABULARY = 8192, 131_072
WIDTHS = {"cpu": (2048, 4096), "v6e:2x2": (4096,), "h200": (4096,)}
CYCLES_OF = ("v6e:2x2",)
# Tokens, width, ids of a cycle estimate.
CYCLES = (1024, 2048, 4096)
TYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))  # of x and w


def kept(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted sum from logits that live until the backward pass, and derivatives by jax."""
    logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    largest = jax.lax.stop_gradient(logits.max(-1))
    log_z = largest + jnp.log(jnp.exp(logits - largest[:, None]).sum(-1))
    label = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return (weights * (log_z - label)).sum()


def summed(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Gradients in the forward pass."""
    return cross_entropy(x, OutputProjection(w), labels, weights)[0]


def scored(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Log-probabilities token by token, logits computed twice."""
    return -(weights * token_scores(x, OutputProjection(w), labels).log_probability).sum()


PROGRAMS: dict[str, Callable[..., jax.Array]] = {"kept": kept, "sum": summed, "scores": scored}


def with_gradients(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """jitted (x, w, labels, weights) -> (loss, (dx, dw))."""
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def arguments(tokens: int, width: int, vocabulary: int) -> tuple[jax.Array, ...]:
    """x, w, labels and weights in float32."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(tokens, width)), rng.normal(size=(width, vocabulary)) * width**-0.5
    labels = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), labels, jnp.ones(tokens, jnp.float32)


def measure_time(tokens: int, width: int, vocabulary: int, rounds: int) -> dict[str, Any]:
    """Processor seconds of the programs, run in turn, and how far their results lie apart."""
    inputs = arguments(tokens, width, vocabulary)
    programs = {name: with_gradients(loss).lower(*inputs).compile() for name, loss in PROGRAMS.items()}
    seconds, results = {name: [] for name in PROGRAMS}, {}
    for i in range(rounds + 1):
        for name in PROGRAMS if i % 2 else reversed(PROGRAMS):
            start = time.process_time()
            results[name] = jax.block_until_ready(programs[name](*inputs))
            if i:
                seconds[name].append(time.process_time() - start)
    medians = {name: float(np.median(spent)) for name, spent in seconds.items()}
    return {
        "tokens": tokens,
        "width": width,
        "vocabulary": vocabulary,
        "rounds": rounds,
        "cpu_seconds": {name: round(spent, 4) for name, spent in medians.items()},
        "ratio": {name: round(medians[name] / medians["kept"], 3) for name in PROGRAMS if name != "kept"},
        "largest_relative_difference": {
            name: max(difference(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(results["kept"])))
            for name, found in results.items()
            if name != "kept"
        },
    }


def difference(a: jax.Array, b: jax.Array) -> float:
    """||a - b|| / ||b||."""
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def measure_memory(device: str, form: str, width: int, types: tuple[str, str]) -> dict[str, Any]:
    """Peak memory of forward and backward over the size of (x, w, dx, dw)."""
    x_type, w_type = map(jnp.dtype, types)
    array = jax.ShapeDtypeStruct
    inputs = (
        array((TOKENS, width), x_type),
        array((width, VOCABULARY), w_type),
        array((TOKENS,), jnp.int32),
        array((TOKENS,), jnp.float32),
    )
    step = with_gradients(PROGRAMS[form])
    compiled = step.lower(*inputs).compile() if device == "cpu" else compile_for(device, step, *inputs)
    needed = memory(compiled)
    peak = needed.arguments + needed.outputs + needed.temporaries
    four = 2 * (TOKENS * width * x_type.itemsize + width * VOCABULARY * w_type.itemsize)
    return {
        "device": device,
        "form": form,
        "width": width,
        "x": types[0],
        "w": types[1],
        "temporary_gb": round(needed.temporaries / 1e9, 3),
        "ratio": round(peak / four, 3),
    }


def one_chunk(backend: str, gradients: bool, recompute: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Cross-entropy of `CYCLES`' size: all ids for the kernel and the sum; plain jax takes half in its loop's body."""
    tokens, width, ids = CYCLES

    def loss(x: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
        if not recompute:
            return cross_entropy(x, OutputProjection(w), labels, jnp.ones(tokens), backend=backend)[0]
        return token_scores(x, OutputProjection(w), labels, chunk=ids // 2, backend=backend).log_probability.sum()

    array = jax.ShapeDtypeStruct
    inputs = array((tokens, width), jnp.bfloat16), array((width, ids), jnp.bfloat16), array((tokens,), jnp.int32)
    return jax.grad(loss, (0, 1)) if gradients else loss, inputs


def time_table(rounds: int) -> list[dict[str, Any]]:
    """`measure_time` of all sizes, printed."""
    rows = []
    for size in TIMED:
        rows.append(row := measure_time(*size, rounds))
        print(
            f"{row['tokens']} tokens x {row['vocabulary']} ids, width {row['width']}: CPU-s {row['cpu_seconds']}, "
            f"ratios to kept logits {row['ratio']}, differences {row['largest_relative_difference']}",
            flush=True,
        )
    return rows


def memory_table() -> list[dict[str, Any]]:
    """`measure_memory` of all programs, printed."""
    rows = []
    for device, widths in WIDTHS.items():
        for width in widths:
            for types in TYPES:
                for form in ("sum", "scores"):
                    rows.append(row := measure_memory(device, form, width, types))
                    print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def cycles_table() -> list[dict[str, Any]]:
    """Estimated cycles for half of `CYCLES`' ids, printed: of each operation above a hundredth of the whole."""
    rows = []
    for device in CYCLES_OF:
        for gradients in (False, True):
            for backend, recompute, halves in (("xla", True, 1), ("xla", False, 2), ("pallas_tpu", True, 2)):
                # A loop's body is counted once. The sum has none here: on TPUs all ids are one block.
                options = {"backend": backend, "gradients": gradients, "recompute": recompute}
                case = Case("benchmarks.cross_entropy:one_chunk", options)
                found = {name: cycles // halves for name, cycles in tpu_cycles(case, device, timeout=900).items()}
                total = sum(found.values())
                row = {"device": device, **options, "cycles": total}
                row["operations"] = {name: cycles for name, cycles in found.items() if cycles > total / 100}
                rows.append(row)
                print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def main() -> None:
    """Measures, prints, writes results/cross_entropy.json; with --only, replaces those parts of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=("time", "memory", "cycles"), default=["time", "memory", "cycles"])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "cross_entropy.json")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"machine": machine.facts(), "targets": TARGETS}
    if "time" in args.only:
        results["time"] = time_table(args.rounds)
    if "memory" in args.only:
        results["memory"] = memory_table()
    if "cycles" in args.only:
        results["cycles"] = {"tokens, width, ids": (*CYCLES[:2], CYCLES[2] // 2), "estimates": cycles_table()}
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
