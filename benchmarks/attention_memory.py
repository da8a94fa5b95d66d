"""What attention takes beside its arguments and results, by the compiler's account, and what blocks cost on a CPU.

    python -m benchmarks.attention memory       # writes results/attention_memory.json

Programs are the forward pass and the gradient of q, k and v in a packed causal row of 32,768 tokens. "scores" is what
the whole matrix of scores would take in float32: a program below it does not hold one. TPU programs are compiled
without a TPU.

The second table is for `pallas_kernels.attention_backends`: processor seconds of the gradient on this machine, the
least of several runs, with the whole matrix and in blocks.
"""

import functools
import json
import pathlib
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.training import machine
from pallas_kernels import ahead_of_time, masks
from pallas_kernels.attention import UnsupportedAttention, attention
from pallas_kernels.attention_backends import SMALL_SCORES

RESULTS = pathlib.Path(__file__).parent / "results"
LENGTH, HEADS, SIZE = 32768, 4, 128
PLACES = {
    "cpu": ("xla_chunked", "xla_blocks"),
    "v6e:2x2": ("xla_chunked", "xla_blocks", "splash", "pallas_tpu"),
    "h200": ("xla_chunked", "xla_blocks", "pallas_gpu"),
}
SHAPES = ((4, 4, 128), (16, 4, 128), (8, 4, 256), (4, 4, 512), (4, 8, 512), (8, 8, 512), (1, 8, 2048), (1, 4, 4096))


def forward(backend: str, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attention of a packed causal row."""
    return attention(q, k, v, mask=masks.Causal() & masks.Segments(ids), backend=backend)


def gradient(backend: str, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> Any:
    """The gradient of the sum of its results."""
    loss = lambda *args: forward(backend, *args, ids).astype(jnp.float32).sum()  # noqa: E731
    return jax.grad(loss, (0, 1, 2))(q, k, v)


def shapes(batch: int, heads: int, length: int, size: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """q, k, v and segment ids."""
    x = jax.ShapeDtypeStruct((batch, length, heads, size), dtype)
    return [x, x, x, jax.ShapeDtypeStruct((batch, length), jnp.int32)]


def compiled_for(place: str, function: Callable, arguments: list[jax.ShapeDtypeStruct]) -> jax.stages.Compiled:
    """`function` compiled for this CPU or for a topology."""
    if place == "cpu":
        return jax.jit(function).lower(*arguments).compile()
    return ahead_of_time.compile_for(place, function, *arguments)


def temporaries() -> list[dict[str, Any]]:
    """A row a place, backend and pass: MiB of temporaries, or why there is no number."""
    arguments = shapes(1, HEADS, LENGTH, SIZE, jnp.bfloat16)
    table = []
    for place, backends in PLACES.items():
        for backend in backends:
            for what, function in (("forward", forward), ("gradient", gradient)):
                row = {"place": place, "backend": backend, "pass": what}
                reason = None if place == "cpu" else ahead_of_time.why_not(place)
                try:
                    if reason is None:
                        compiled = compiled_for(place, functools.partial(function, backend), arguments)
                        row["temporaries_mib"] = round(ahead_of_time.memory(compiled).temporaries / 2**20, 1)
                except UnsupportedAttention as error:
                    reason = str(error)
                table.append(row if reason is None else row | {"not_measured": reason})
                print(table[-1], flush=True)
    return table


def processor_seconds(program: Callable[[], Any], seconds: float = 2.0) -> float:
    """The least processor time of several runs, all threads together."""
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds or len(times) < 3:
        before = resource.getrusage(resource.RUSAGE_SELF)
        jax.block_until_ready(program())
        after = resource.getrusage(resource.RUSAGE_SELF)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def border() -> list[dict[str, Any]]:
    """A row a shape: what the whole matrix takes, and what blocks take of its time and memory."""
    rng, table = np.random.default_rng(0), []
    for batch, heads, length in SHAPES:
        structs = shapes(batch, heads, length, 64, jnp.float32)
        q, k, v = (jnp.asarray(rng.normal(size=s.shape), s.dtype) for s in structs[:3])
        ids = jnp.asarray(np.repeat([1, 2, 3, 4], length // 4)[None].repeat(batch, 0), jnp.int32)
        found = {}
        for backend in ("xla", "xla_chunked"):
            program = compiled_for("cpu", functools.partial(gradient, backend), structs)
            found[backend] = processor_seconds(lambda: program(q, k, v, ids)), ahead_of_time.memory(program).temporaries  # noqa: B023
        (whole, whole_bytes), (blocks, block_bytes) = found["xla"], found["xla_chunked"]
        table.append(
            {
                "batch, heads, length": [batch, heads, length],
                "scores_mib": 4 * batch * heads * length**2 / 2**20,
                "xla_cpu_seconds": round(whole, 4),
                "chunked_over_xla_time": round(blocks / whole, 2),
                "xla_temporaries_mib": round(whole_bytes / 2**20, 1),
                "chunked_temporaries_mib": round(block_bytes / 2**20, 1),
            }
        )
        print(table[-1], flush=True)
    return table


def main() -> None:
    """Measures and writes the results."""
    memory = temporaries()
    scores = 4 * HEADS * LENGTH**2 / 2**20
    result = {
        "machine": machine.facts(),
        "shape": {"batch": 1, "heads": HEADS, "length": LENGTH, "head_size": SIZE, "dtype": "bfloat16"},
        "scores_mib": scores,
        "none_holds_the_scores": all(row["temporaries_mib"] < scores for row in memory if "temporaries_mib" in row),
        "temporaries": memory,
        "blocks_on_a_cpu": border(),
        "border_mib": SMALL_SCORES / 2**20,
    }
    path = RESULTS / "attention_memory.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path.name} is written")


if __name__ == "__main__":
    main()
