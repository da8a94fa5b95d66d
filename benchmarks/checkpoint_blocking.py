"""How long training waits for its checkpoints, as a share of the time between them, at the quickstart's policy.

    python -m benchmarks.checkpoint_blocking        # writes results/checkpoint_blocking.json

The quickstart's model, data and period between saves, for a few saves; times are those of the run's own ledger.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.step import RESULTS
from benchmarks.tiny_runs import ROOT
from jaxlm.training import machine

TARGET = 0.05


def measure(folder: pathlib.Path, saves: int, period: int) -> dict[str, float | int]:
    """Seconds of steps and of waiting for saves, over whole periods."""
    subprocess.run(
        [
            *(sys.executable, "-m", "jaxlm.train", "--gin_file=gin_configs/runs/quickstart.gin"),
            *(f"--gin.MODEL_DIR='{folder}'", f"--gin.TRAIN_STEPS={saves * period}"),
            *("--gin.RunConfig.samples=None", "--gin.RunConfig.evaluation=None", "--gin.RunConfig.baselines=False"),
        ],
        cwd=ROOT,
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
    parser.add_argument("--period", type=int, default=150, help="steps between saves; the quickstart's")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "checkpoint_blocking.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(pathlib.Path(folder) / "run", args.saves, args.period)
    share = row["save"] / (row["save"] + row["step"] + row["data_wait"])
    print(f"Saves blocked training {share:.2%} of the time between them (target {TARGET:.0%})")
    args.out.write_text(
        json.dumps({**row, "share": round(share, 5), "target": TARGET, "machine": machine.facts()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
