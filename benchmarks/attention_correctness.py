"""Errors of every attention backend that runs here: all masks and scores, outputs and gradients.

    python -m benchmarks.attention correctness [backend ...]    # writes them to results/attention_correctness.json
    python -m benchmarks.attention correctness --missing [...]  # only the cases that the file has not

The cases are those of pallas_kernels/conformance.py. A float32 error is ||x - r|| / ||r|| against float64
arithmetic written out, the largest of output, log-sum-exp and all gradients; a bfloat16 one is that divided by the
error of the plain XLA form of the same type. Kernels are interpreted, with blocks of 128 on TPUs, so that a case has
several; what a matrix unit rounds only its machine shows. Minutes, and an hour for the interpreted GPU kernels.
"""

import json
import pathlib
import sys
from typing import Any

import jax.numpy as jnp

from jaxlm.training import machine
from pallas_kernels import conformance
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.backends.pallas_tpu import PallasTpuBackend
from pallas_kernels.backends.splash import SplashBackend
from pallas_kernels.backends.xla_chunked import XlaChunkedBackend
from pallas_kernels.requests import UnsupportedAttention
from pallas_kernels.tpu.attention import TpuKernels
from pallas_kernels.tpu.block_sizes import Blocks

RESULTS = pathlib.Path(__file__).parent / "results"
TARGETS = {"float32": 1e-5, "bfloat16": 2.0}
SMALL = Blocks(128, 128, 128, 128)
BACKENDS = ("xla", "xla_chunked", "xla_blocks", "splash", "pallas_tpu", "pallas_gpu")


def errors_of(backend: str, case: conformance.Case, plain: dict[str, float]) -> dict[str, Any]:
    """The largest float32 error and the largest bfloat16 ratio, and of what; or why a type has none."""
    row: dict[str, Any] = {}
    for dtype, unit in (("float32", dict.fromkeys(plain, 1.0)), ("bfloat16", plain)):
        try:
            errors = conformance.errors(backend, case, jnp.dtype(dtype))
        except UnsupportedAttention as refusal:
            row[f"{dtype}_refused"] = str(refusal)
            continue
        ratios = {name: error / unit[name] for name, error in errors.items()}
        worst = max(ratios, key=ratios.get)
        row |= {dtype: float(f"{ratios[worst]:.3g}"), f"{dtype}_of": worst}
    return row


def main() -> None:
    """Measures the named backends, or all, and writes their results; those of others stay."""
    missing = "--missing" in sys.argv
    wanted = [name for name in sys.argv[1:] if name != "--missing"] or BACKENDS
    path = RESULTS / "attention_correctness.json"
    ATTENTION.backends["xla_chunked"] = XlaChunkedBackend(budget=1)  # blocks of 64 queries: the cases are short
    ATTENTION.backends["splash"] = conformance.WithReferenceLse(SplashBackend())
    ATTENTION.backends["pallas_tpu"] = PallasTpuBackend(TpuKernels(SMALL, SMALL))
    table = json.loads(path.read_text())["backends"] if path.exists() else {}
    table |= {name: table.get(name, {}) if missing else {} for name in wanted}
    cases = conformance.CASES | {f"{name} (256)": case for name, case in conformance.STATIC_CASES.items()}
    for name, case in cases.items():  # written after each: the whole takes long
        # For splash 200 queries are no multiple of 128.
        left = [backend for backend in wanted if not (backend == "splash" and name in conformance.CASES)]
        left = [backend for backend in left if not (missing and name in table[backend])]
        plain = conformance.errors("xla", case, jnp.bfloat16) if left else {}
        for backend in left:
            table[backend][name] = errors_of(backend, case, plain)
            print(backend, name, table[backend][name], flush=True)
        path.write_text(json.dumps(summary(table), indent=2) + "\n")
    print(f"{path.name} is written; largest {summary(table)['largest']}, allowed {TARGETS}")


def summary(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is written: the machine, the targets, the largest errors of all backends, and the errors."""
    rows = [row for rows in table.values() for row in rows.values()]
    return {
        "machine": machine.facts(),
        "targets": TARGETS,
        "largest": {kind: max((row.get(kind, 0.0) for row in rows), default=0.0) for kind in TARGETS},
        "backends": table,
    }


if __name__ == "__main__":
    main()
