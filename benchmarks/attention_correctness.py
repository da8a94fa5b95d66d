"""Errors of every attention backend that runs here: all masks and scores, outputs and gradients.

    python -m benchmarks.attention correctness [backend ...]    # writes results/attention_correctness.json

The cases are those of tests/pallas_kernels/conformance.py. A float32 error is ||x - r|| / ||r|| against float64
arithmetic written out, the largest of output, log-sum-exp and all gradients; a bfloat16 one is that divided by the
error of the plain XLA form of the same type. Kernels are interpreted; what a matrix unit rounds only its machine shows.
"""

import json
import pathlib
import sys
from typing import Any

import jax.numpy as jnp

from jaxlm.training import machine
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.backends.splash import SplashBackend
from pallas_kernels.backends.xla_chunked import XlaChunkedBackend
from pallas_kernels.requests import UnsupportedAttention
from tests.pallas_kernels import conformance

RESULTS = pathlib.Path(__file__).parent / "results"
TARGETS = {"float32": 1e-5, "bfloat16": 2.0}
BACKENDS = ("xla", "xla_chunked", "xla_blocks", "splash", "pallas_tpu", "pallas_gpu")


def errors_of(backend: str, case: conformance.Case, plain: dict[str, float]) -> dict[str, Any]:
    """The largest float32 error and the largest bfloat16 ratio, or why there are none."""
    try:
        float32 = conformance.errors(backend, case, jnp.float32)
        bfloat16 = conformance.errors(backend, case, jnp.bfloat16)
    except UnsupportedAttention as refusal:
        return {"refused": str(refusal)}
    ratios = {name: error / plain[name] for name, error in bfloat16.items()}
    worst = max(float32, key=float32.get), max(ratios, key=ratios.get)
    return {
        "float32": float(f"{float32[worst[0]]:.2g}"),
        "float32_of": worst[0],
        "bfloat16": float(f"{ratios[worst[1]]:.3g}"),
        "bfloat16_of": worst[1],
    }


def main() -> None:
    """Measures the named backends, or all, and writes the results."""
    wanted = sys.argv[1:] or BACKENDS
    ATTENTION.backends["xla_chunked"] = XlaChunkedBackend(budget=1)  # blocks of 64 queries: the cases are short
    ATTENTION.backends["splash"] = conformance.WithReferenceLse(SplashBackend())
    table: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    cases = conformance.CASES | {f"{name} (256)": case for name, case in conformance.STATIC_CASES.items()}
    for name, case in cases.items():
        plain = conformance.errors("xla", case, jnp.bfloat16)
        for backend in wanted:
            if backend == "splash" and name in conformance.CASES:
                continue  # 200 queries are no multiple of 128
            table[backend][name] = errors_of(backend, case, plain)
            print(backend, name, table[backend][name], flush=True)
    measured = [row for rows in table.values() for row in rows.values() if "refused" not in row]
    result = {
        "machine": machine.facts(),
        "targets": TARGETS,
        "largest": {kind: max(row[kind] for row in measured) for kind in TARGETS},
        "backends": table,
    }
    path = RESULTS / "attention_correctness.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path.name} is written; largest {result['largest']}, allowed {TARGETS}")


if __name__ == "__main__":
    main()
