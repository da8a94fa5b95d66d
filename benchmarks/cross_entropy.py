"""Cross-entropy over chunks beside the loss that keeps its logits: processor time, and memory at a large vocabulary.

    python -m benchmarks.cross_entropy            # everything; writes results/cross_entropy.json
    python -m benchmarks.cross_entropy --only time

Time is forward and backward on this machine, in processor seconds of all threads; the programs take turns, and ratios
are of medians. Memory is the compiler's own account of arguments, results and temporaries, over the size of (x, w, dx,
dw); for TPUs the program is compiled ahead of time and no TPU is needed.
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.training import machine
from pallas_kernels.cross_entropy import OutputProjection, cross_entropy, token_scores

RESULTS = pathlib.Path(__file__).parent / "results"
TARGETS = {"sum": 1.15, "scores": 1.4, "memory": 1.3}
# Tokens, width, vocabulary: the quickstart's, the floor's of benchmarks/step.py, and a usual vocabulary at its width.
TIMED = ((4096, 128, 4096), (4096, 256, 8192), (2048, 256, 32768))
# 8k tokens by 128k ids.
TOKENS, WIDTHS, VOCABULARY = 8192, (2048, 4096), 131_072
TOPOLOGIES = ("cpu", "v5e:2x2", "v6e:2x2")
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


def device_mesh(topology: str) -> Mesh:
    """One device: this machine's, or a TPU's of a topology that is elsewhere."""
    if topology == "cpu":
        return Mesh(np.array(jax.devices()[:1]), ("x",))
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices[:1]), ("x",))


def measure_memory(topology: str, form: str, width: int, types: tuple[str, str]) -> dict[str, Any]:
    """Peak memory of forward and backward over the size of (x, w, dx, dw)."""
    mesh = device_mesh(topology)
    x_type, w_type = map(jnp.dtype, types)

    def array(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    inputs = (
        array(x_type, TOKENS, width),
        array(w_type, width, VOCABULARY),
        array(jnp.dtype("int32"), TOKENS),
        array(jnp.dtype("float32"), TOKENS),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        memory = with_gradients(PROGRAMS[form]).lower(*inputs).compile().memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    four = 2 * (TOKENS * width * x_type.itemsize + width * VOCABULARY * w_type.itemsize)
    return {
        "device": topology,
        "form": form,
        "width": width,
        "x": types[0],
        "w": types[1],
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 3),
        "ratio": round(peak / four, 3),
    }


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
    for topology in TOPOLOGIES:
        for width in WIDTHS:
            for types in TYPES:
                for form in ("sum", "scores"):
                    rows.append(row := measure_memory(topology, form, width, types))
                    print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def main() -> None:
    """Measures, prints, writes results/cross_entropy.json; with --only, replaces that part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "cross_entropy.json")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    results |= {"machine": machine.facts(), "targets": TARGETS}
    if args.only != "memory":
        results["time"] = time_table(args.rounds)
    if args.only != "time":
        results["memory"] = memory_table()
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine may have no TPU to ask
    main()
