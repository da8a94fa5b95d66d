"""How long training waits for its checkpoints, as a share of the time between them, at the quickstart's policy.

    python -m benchmarks.checkpoint_blocking        # writes results/checkpoint_blocking.json

The quickstart's model and data, for a few saves; times are those of the run's own ledger. Its policy is a save every
150 steps; --period=30 saves more often, and the share is still that of 150 steps.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import jax

from benchmarks.step import RESULTS
from benchmarks.tiny_runs import ENVIRONMENT, ROOT
from jaxlm.training import machine

TARGET = 0.05
POLICY = 150  # steps between saves, of gin_configs/runs/quickstart.gin


def measure(folder: pathlib.Path, saves: int, period: int) -> dict[str, float | int]:
    """Seconds of steps and of waiting for saves, over whole periods."""
    subprocess.run(
        [
            *(sys.executable, "-m", "jaxlm.train", "--gin_file=gin_configs/runs/quickstart.gin"),
            *(
                f"--gin.MODEL_DIR='{folder}'",
                f"--gin.TRAIN_STEPS={saves * period}",
                f"--gin.CHECKPOINT_PERIOD={period}",
            ),
            *("--gin.EVAL_PERIOD=1000000", "--gin.EVAL_STEPS=1", "--gin.RunConfig.baselines=False"),
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
    )
    seconds = {"step": 0.0, "data_wait": 0.0, "save": 0.0}
    for line in (folder / "goodput.jsonl").read_text().splitlines():
        record = json.loads(line)
        # From the end of the first save, which compiles what splits the stacks, to the end of the last but one: at the
        # end of the run the last one is waited for.
        if record["event"] == "spent" and period < (record["step"] or 0) <= (saves - 1) * period:
            for name in seconds:
                seconds[name] += record["seconds"].get(name, 0.0)
    return {"period": period, "saves": saves - 2} | {name: round(value, 3) for name, value in seconds.items()}


def main() -> None:
    """Measures, prints, writes results/checkpoint_blocking.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--period", type=int, default=POLICY, help="steps between saves")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "checkpoint_blocking.json")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        row = measure(pathlib.Path(folder) / "run", args.saves, args.period)
    blocked = row["save"] / row["saves"]
    between = (row["step"] + row["data_wait"]) / (row["saves"] * args.period) * POLICY
    share = blocked / (blocked + between)
    print(f"Saves blocked training {share:.2%} of the time between them (target {TARGET:.0%})")
    args.out.write_text(
        json.dumps(
            {**row, "policy": POLICY, "share": round(share, 5), "target": TARGET, "machine": machine.facts()}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
