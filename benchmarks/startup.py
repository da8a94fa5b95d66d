"""Processor time from the start of the process to the end of the first training step, nothing compiled beforehand.

    python -m benchmarks.startup        # writes results/startup.json

Three processes are measured: the floor (jax and one step), jaxlm's step alone at the same size, and the whole of
jaxlm.train up to there: configuration, data from a built cache, state, checkpoint manager, first step.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.step import RESULTS, measure_alone
from jaxlm.training import machine

TARGET = 20.0


def train_process(arguments: list[str]) -> dict[str, float]:
    """Processor time at which the trainer has done its first step, and its modules' share of it."""
    code = (
        "import sys, tempfile, time, json, jax\n"
        "from jaxlm.configuration import resolve_or_exit\n"
        "from jaxlm.run import Programs, RunConfig, assemble, make_model\n"
        "from jaxlm.checkpoints.manager import CheckpointManager\n"
        "from jaxlm.training.state import initializer\n"
        "imported = time.process_time()\n"
        "run = resolve_or_exit(RunConfig, sys.argv[1:])\n"
        "parallel = run.parallel.on()\n"
        "parts = assemble(run, run.phases[0], parallel, Programs())\n"
        "checkpoints = CheckpointManager(tempfile.mkdtemp(), run.checkpoints, parts.definition.layouts)\n"
        "assert checkpoints.open() is None\n"
        "state = initializer(make_model(parts.model, parallel), parts.optimizer, parallel)(run.seed)\n"
        "state, metrics = parts.step(state, next(parts.loader))\n"
        "jax.block_until_ready((state, metrics))\n"
        "print(json.dumps({'first_step_cpu_seconds': round(time.process_time(), 2),"
        " 'imports_cpu_seconds': round(imported, 2), 'tensorflow': 'tensorflow' in sys.modules}))\n"
        "parts.loader.close()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"The trainer did not reach its first step:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures, prints, writes results/startup.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", default="gin_configs/runs/quickstart.gin", help="the run to start")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "startup.json")
    args = parser.parse_args()
    rows = {f"{name} (step alone)": measure_alone(name, True, 1) for name in ("floor", "jaxlm")}
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--gin_file={args.gin_file}", f"--gin.MODEL_DIR={folder}"]
        train_process(flags)  # builds the data cache
        rows["jaxlm.train"] = train_process(flags)
    for name, row in rows.items():
        print(f"{name:22} first step done after {row['first_step_cpu_seconds']:.1f} CPU-s (target {TARGET:.0f})")
    result = {"rows": rows, "target_cpu_seconds": TARGET, "machine": machine.facts()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
