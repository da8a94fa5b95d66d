"""Memory and time of checkpoint surgery beside a plain warm start of a model of the same size.

    python -m benchmarks.surgery        # writes results/surgery.json

Each case is a process of its own, which fills a float32 model from checkpoints of it: as they are, with every leaf
changed, as the mean of three; for a model, and for one of three times its layers. Memory is the process's peak above
what it held before, less the new parameters. Leaves that nothing changes are read together, 1 GiB at a time; what a
surgery may hold of others is a few leaves, so that three times the layers should take no more.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks.step import RESULTS
from benchmarks.tiny_runs import ENVIRONMENT, ROOT
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.checkpoints.surgery import Fill, PickLayers, Resize, Scale, Soup
from jaxlm.checkpoints.warm_start import WarmStart, warm_start
from jaxlm.training import machine

LAYERS, SIDE = (60, 180), 1024  # a layer is one leaf of 4.2 MB, the embedding one of 16.8 MB
VOCAB = 4 * SIDE
CASES = ("as it is", "layers repeated", "vocabulary resized", "every leaf scaled", "mean of three")


def parameters(seed: int, layers: int, vocab: int = VOCAB) -> dict:
    """A model of equal layers, filled on the device."""
    keys = iter(jax.random.split(jax.random.key(seed), layers + 1))
    blocks = {str(i): {"kernel": jax.random.normal(next(keys), (SIDE, SIDE))} for i in range(layers)}
    return {"decoder": {"layers": blocks}, "embedding": jax.random.normal(next(keys), (vocab, SIDE))}


def run_case(case: str, layers: int, folders: list[str]) -> dict[str, float]:
    """One case, in this process."""
    order = ((0, layers // 2), (0, layers // 2))
    rules = {
        "as it is": (),
        "layers repeated": (PickLayers(order),),
        "vocabulary resized": (Resize("embedding", 0, fill=Fill.DRAWN),),
        "every leaf scaled": (Scale(".*", 0.5),),
        "mean of three": (Soup(tuple(folders[1:])),),
    }[case]
    vocab = VOCAB + 128 if case == "vocabulary resized" else VOCAB
    fresh = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: parameters(0, layers, vocab)))
    jax.block_until_ready(fresh)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, cpu = _memory("VmRSS"), time.process_time()
    started = warm_start(fresh, WarmStart(folders[0], rules=rules), report=lambda _: None)
    jax.block_until_ready(started.params)
    size = sum(x.nbytes for x in jax.tree.leaves(started.params))
    return {
        "model_mb": size / 1e6,
        "extra_mb": (_memory("VmHWM") - before - size) / 1e6,
        "cpu_seconds": time.process_time() - cpu,
    }


def _memory(name: str) -> int:
    """Bytes that Linux has for this process under a name: VmRSS now, VmHWM at most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Measures, prints, writes results/surgery.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "surgery.json")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.case:
        print(json.dumps(run_case(args.case, args.layers, args.folders)))
        return
    rows = [row for layers in LAYERS for row in measure(layers)]
    args.out.write_text(json.dumps({"rows": rows, "machine": machine.facts()}, indent=1) + "\n")


def measure(layers: int) -> list[dict]:
    """All cases for a model of so many layers."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [f"{scratch}/{i}" for i in range(3)]
        for i, folder in enumerate(folders):
            with CheckpointManager(folder, CheckpointConfig()) as manager:
                manager.save(1, {"params": parameters(i, layers)})
        for case in CASES:
            options = ["--case", case, "--layers", str(layers), "--folders", *folders]
            command = [sys.executable, "-m", "benchmarks.surgery", *options]
            out = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
            found = {name: round(value, 2) for name, value in json.loads(out.stdout.splitlines()[-1]).items()}
            rows.append({"case": case, "layers": layers, **found})
            print(rows[-1], flush=True)
    for row in rows:
        row["cpu_over_plain"] = round(row["cpu_seconds"] / rows[0]["cpu_seconds"], 2)
    return rows


if __name__ == "__main__":
    main()
