"""Kills runs and moves them to other numbers of devices: is what comes out the run that nobody touched?

    python -m benchmarks.survival        # 60 kills and the elastic run; writes results/survival.json

Kills are SIGKILL, at a random moment of the process's life (imports, compiling, steps, saves) or as soon as a save has
begun. The killed run is started again with the same command until it is finished; then another begins. The elastic run
goes from 8 devices to 4 and back. `tests/train/test_survival.py` does the same with 3 kills.
"""

import argparse
import collections
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.step import RESULTS
from benchmarks.tiny_runs import ENVIRONMENT, ROOT, Workshop, metrics
from jaxlm.checkpoints import naming, stored
from jaxlm.training import machine

STEPS, PERIOD = 24, 2
# An encoder-decoder on span corruption, packed while it reads, with dropout.
RUN = (
    f"TRAIN_STEPS = {STEPS}\nCHECKPOINT_PERIOD = {PERIOD}\nEVAL_PERIOD = 0\nrun.RunConfig.samples = None\n"
    "DROPOUT = 0.1\nTASK_FEATURE_LENGTHS = {'inputs': 32, 'targets': 16}\nWIDTH = 16\n"
    "config.DataConfig.packing = 'first_fit'\nconfig.DataConfig.virtual_shards = 8\nconfig.DataConfig.look_ahead = 8\n"
)


def make_gin(workshop: Workshop, name: str, text: str = "") -> pathlib.Path:
    """The gin file of the run, with changes."""
    return workshop.gin(
        name,
        RUN + text,
        model="encoder_decoder",
        objective="span_corruption",
        imports=("run", "checkpoints.manager", "parallel.mesh"),
    )


def live(
    arguments: list[str], checkpoints: pathlib.Path, when: str | None, rng: random.Random, seconds: float
) -> tuple[int, str]:
    """Starts a run in a process; returns its exit status (-9: killed) and what it printed.

    Args:
      checkpoints: its folder of checkpoints.
      when: "random", up to `seconds` after its start; "saving", as soon as an unfinished checkpoint is seen; None
        lets it live.
    """
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "jaxlm.train", *arguments]
        with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT) as process:
            if when == "random":
                try:
                    process.wait(rng.uniform(0.0, seconds))
                except subprocess.TimeoutExpired:
                    process.kill()
            elif when == "saving":
                before = unfinished(checkpoints)  # of earlier kills; the next save removes them
                while process.poll() is None:
                    if unfinished(checkpoints) - before:
                        time.sleep(rng.uniform(0.0, 0.01))
                        process.kill()
                        break
                    time.sleep(0.002)
        output.seek(0)
        return process.returncode, output.read()


def unfinished(checkpoints: pathlib.Path) -> set[str]:
    """Saves that were begun and not committed."""
    if not checkpoints.is_dir():
        return set()
    return {path.name for path in checkpoints.iterdir() if "orbax-checkpoint-tmp" in path.name}


def kill_runs(
    workshop: Workshop,
    gin: pathlib.Path,
    expected: Mapping[int, Mapping[str, float]],
    *,
    at_random: int,
    saving: int,
    seconds: float,
    seed: int = 0,
) -> dict[str, int]:
    """Kills runs as often as asked for; each is then brought to its end and compared.

    Args:
      gin: of the run.
      expected: metrics of the run that nobody touched.
      at_random, saving: kills of either kind. A kill of the second kind counts if it left an unfinished checkpoint.
      seconds: how long a process of the run lives.

    Returns:
      counts; "runs that differ" and "commits lost" should be 0.
    """
    rng = random.Random(seed)
    plan = ["random"] * at_random + ["saving"] * saving
    rng.shuffle(plan)
    counts = collections.Counter({"kills": 0, "inside a save": 0, "runs that differ": 0, "commits lost": 0})
    number, newest = 0, None
    while plan or newest is not None:
        folder = workshop.folder / f"killed_{number}"
        checkpoints = folder / "checkpoints"
        when = plan[-1] if plan else None
        status, output = live(workshop.arguments(folder, gin), checkpoints, when, rng, seconds)
        continued = re.search(r"Continues from the checkpoint of step ([\d,]+)", output)
        if continued is not None and int(continued[1].replace(",", "")) != (newest or 0):
            counts["commits lost"] += 1
        if status == 0:
            counts["runs compared"] += 1
            counts["runs that differ"] += metrics(folder) != expected
            number, newest = number + 1, None
            continue
        if status != -9:
            raise RuntimeError(f"The run ended with status {status}:\n{output}")
        hit = bool(unfinished(checkpoints))
        counts["kills"] += 1
        counts["inside a save"] += hit
        counts["before the first step of a process"] += "| ETA" not in output
        if when == "random" or hit:
            plan.pop()
        said: list[str] = []
        checkpoint = stored.open_latest(checkpoints, report=said.append)
        found = 0 if checkpoint is None else checkpoint.step
        counts["commits lost"] += bool(said) or found < (newest or 0)
        logged = metrics(folder) if (folder / "metrics.jsonl").exists() else {}
        counts["steps done again"] += max(max(logged, default=0) - found, 0)
        newest = found
        print(f"{when}: step {found}; {len(plan)} to go", file=sys.stderr, flush=True)
    return dict(counts)


def elastic(workshop: Workshop) -> dict[str, Any]:
    """8 devices, from step 8 on 4, from step 16 on 8 again; beside runs that stayed on 8 and on 4."""
    gin = make_gin(
        workshop,
        "elastic",
        "CHECKPOINT_PERIOD = 1\nmanager.CheckpointConfig.keep_last = 100\nmesh.MeshConfig.fsdp = 2\n",
    )

    def observe(run: str, devices: int) -> dict[str, Any]:
        found = workshop.observe(run, gin, devices=devices)
        if found["status"]:
            raise RuntimeError(f"The run {run} ended with status {found['status']}:\n{found['errors']}")
        return found

    seen: dict[Any, dict[str, Any]] = {n: observe(f"on_{n}", n) for n in (8, 4)}
    workshop.rewound("on_8", 8, "to_4")
    seen["to_4"] = observe("to_4", 4)
    workshop.rewound("to_4", 16, "to_8")
    seen["to_8"] = observe("to_8", 8)
    batches = seen[8]["batches"]
    runs = {name: workshop.folder / name for name in ("on_8", "on_4", "to_4", "to_8")}
    losses = {name: {s: v["train/loss"] for s, v in metrics(folder).items()} for name, folder in runs.items()}
    later = range(9, STEPS + 1)
    return {
        "same token stream": len(batches) == STEPS
        and seen[4]["batches"] == batches
        and seen["to_4"]["batches"] == {str(step): batches[str(step)] for step in range(9, STEPS + 1)}
        and seen["to_8"]["batches"] == {str(step): batches[str(step)] for step in range(17, STEPS + 1)},
        "first loss, relative": {
            "8 to 4": abs(losses["to_4"][9] / losses["on_8"][9] - 1),
            "4 to 8": abs(losses["to_8"][17] / losses["to_4"][17] - 1),
        },
        "first gradient, of ||g - g'|| / max(||g||, 1e-3 ||all g||) the largest": {
            "8 to 4": gradient_difference(runs["on_8"], runs["to_4"], 9),
            "4 to 8": gradient_difference(runs["to_4"], runs["to_8"], 17),
        },
        "later losses: largest difference from the run on 8": max(
            abs(losses["to_8"][step] - losses["on_8"][step]) for step in later
        ),
        "largest difference between the runs on 8 and on 4": max(
            abs(losses["on_4"][step] - losses["on_8"][step]) for step in later
        ),
    }


def gradient_difference(one: pathlib.Path, other: pathlib.Path, step: int) -> float:
    """How far the gradients of one step of two runs are apart, leaf by leaf; by law 3 at most 1e-5."""
    first, second = gradients(one, step), gradients(other, step)
    whole = np.sqrt(sum((g**2).sum() for g in first.values()))
    return max(
        float(np.linalg.norm(g - second[name]) / max(np.linalg.norm(g), 1e-3 * whole)) for name, g in first.items()
    )


def gradients(folder: pathlib.Path, step: int, b1: float = 0.9) -> dict[str, np.ndarray]:
    """The (clipped) gradients of a step, from Adam's first moments before and after: m' = b1 m + (1 - b1) g."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    moments = []
    for number in (step - 1, step):
        checkpoint = stored.open_checkpoint(folder / "checkpoints", number)
        wanted = {path: leaf for path, leaf in checkpoint.leaves.items() if path[0] == "opt_state" and "mu" in path}
        found = checkpoint.read(
            {path: stored.Request((path,), None, x.shape, x.dtype, device) for path, x in wanted.items()}
        )
        moments.append({naming.show(path): np.asarray(x, np.float64) for path, x in found.items()})
    before, after = moments
    return {name: (after[name] - b1 * before[name]) / (1 - b1) for name in before}


def killed(workshop: Workshop, at_random: int, saving: int) -> dict[str, int]:
    """Kills, after two runs that nobody touched were found to be the same."""
    gin = make_gin(workshop, "killed")
    workshop.observe("untouched", gin)  # builds the data's cache and fills that of programs
    start = time.monotonic()
    status, output = live(workshop.arguments("alone", gin), workshop.folder, None, random.Random(), 0.0)
    seconds = time.monotonic() - start
    expected = metrics(workshop.folder / "untouched")
    if status or metrics(workshop.folder / "alone") != expected:
        raise RuntimeError(f"Two runs that nobody touched differ, or one failed:\n{output}")
    return kill_runs(workshop, gin, expected, at_random=at_random, saving=saving, seconds=seconds)


def main() -> None:
    """Kills, moves, prints, writes results/survival.json: what was not asked for stays as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="elastic, kills; both where none is given")
    parser.add_argument("--at-random", type=int, default=40, help="kills at random moments")
    parser.add_argument("--saving", type=int, default=20, help="kills inside a save")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "survival.json")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    parts = {"elastic": elastic, "kills": lambda workshop: killed(workshop, args.at_random, args.saving)}
    if unknown := set(args.parts) - set(parts):
        parser.error(f"unknown {', '.join(unknown)}; the parts are {', '.join(parts)}")
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            result[name] = parts[name](Workshop(pathlib.Path(folder)))
        print(json.dumps({name: result[name]}, indent=1), flush=True)
        args.out.write_text(json.dumps(result | {"machine": machine.facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
