"""A study of adaptations, run to its end: losses by cell, claims by seed, and what layers do, as JSON.

python -m benchmarks.adaptations t5gemma --folder=studies/t5gemma      # runs what is missing; results/t5gemma.json
python -m benchmarks.adaptations t5gemma --name=t5gemma_slow --gin.ADAPTATION_RATE="'LEARNING_RATE = 3e-3'"
python -m benchmarks.adaptations yi
"""

import argparse
import csv
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.step import RESULTS
from jaxlm.configuration import resolve
from jaxlm.studies.config import Finding, Match, StudyConfig
from jaxlm.studies.findings import compare
from jaxlm.studies.results import interval
from jaxlm.training import machine

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    """Runs a study and writes its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="of gin_configs/studies")
    parser.add_argument("--folder", help="of the study, if there is one; default: as the study says")
    parser.add_argument("--name", help="of the file in results/; default: the study's")
    parser.add_argument("--read", action="store_true", help="run nothing: take what is finished")
    args, bindings = parser.parse_known_args()
    file = f"--gin_file=gin_configs/studies/{args.study}.gin"
    study = resolve(StudyConfig, [file, *bindings])
    folder = pathlib.Path(args.folder or study.study_dir)
    if not args.read:
        command = [sys.executable, "-m", "jaxlm.study", file, f"--gin.STUDY_DIR='{folder}'", *bindings]
        subprocess.run(command, cwd=ROOT, check=True)
    rows = [row for row in csv.DictReader((folder / "cells.csv").open()) if row["status"] == "finished"]
    matches = (match(one, rows, folder) for one in study.matches)
    results: dict[str, Any] = {
        "losses": losses(study, rows),
        "claims": [claim(finding, rows) for finding in study.findings],
        "matches": list(filter(None, matches)),
    }
    if args.study == "yi":
        results["layers"] = layers(rows, folder)
    results |= {"seeds": study.seeds, "bindings": bindings, "machine": machine.facts()}
    text = json.dumps(results, indent=1) + "\n"
    (RESULTS / f"{args.name or args.study}.json").write_text(text)
    print(text)


def value_of(row: Mapping[str, str], metric: str) -> float:
    """A number of a finished run."""
    return float(row[metric])


def losses(study: StudyConfig, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The measures of each leg and cell, with 95% intervals over seeds."""
    found = []
    for leg, cell in itertools.product((leg.name for leg in study.legs), study.cells):
        of_cell = [row for row in rows if row["leg"] == leg and cell.items() <= row.items()]
        for metric in study.measures if of_cell else ():
            over = interval([value_of(row, metric) for row in of_cell])
            entry = {"leg": leg, **cell, "metric": metric, "mean": over.mean, "half_width": (over.high - over.low) / 2}
            found.append(entry | {"values": over.values})
    return found


def side(rows: list[dict[str, str]], of: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """{seed: row} of the runs that a claim speaks of."""
    return {row["seed"]: row for row in rows if of.items() <= row.items()}


def claim(finding: Finding, rows: list[dict[str, str]]) -> dict[str, Any]:
    """What `findings.compare` says of a claim: its difference by seed, None where runs are missing, and the verdict."""
    metric = finding.metric
    sides = (side(rows, of).items() for of in (finding.less, finding.more))
    less, more = ({int(seed): value_of(row, metric) if row.get(metric) else None for seed, row in of} for of in sides)
    decision = compare(finding, less, more)
    return {
        "claim": finding.name,
        "metric": metric,
        "seeds": decision.seeds,
        "difference": decision.difference and dataclasses.asdict(decision.difference),
        "verdict": decision.verdict.value,
    }


def match(one: Match, rows: list[dict[str, str]], folder: pathlib.Path) -> dict[str, Any] | None:
    """Share of the other runs' steps after which the adapted runs are at their last loss, by seed.

    Between evaluations by a straight line; "at most", where the first evaluation is already below. None where runs are
    missing.
    """
    adapted, scratch = side(rows, one.adapted), side(rows, one.scratch)
    if not adapted or adapted.keys() != scratch.keys():
        return None
    shares, bounded = [], False
    for seed in sorted(adapted):
        steps, values = curve(folder, adapted[seed], one.metric)
        below = np.flatnonzero(values <= value_of(scratch[seed], one.metric))
        if not len(below):
            return {"match": one.name, "share": None}
        i = int(below[0])
        at = float(steps[i])
        if i:
            done = (values[i - 1] - value_of(scratch[seed], one.metric)) / (values[i - 1] - values[i])
            at = float(steps[i - 1] + done * (steps[i] - steps[i - 1]))
        bounded |= i == 0
        shares.append(at / float(scratch[seed]["steps"]))
    return {"match": one.name, "share": shares, "at_most": bounded}


def curve(folder: pathlib.Path, row: Mapping[str, str], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a run."""
    lines = (folder / "runs" / row["address"] / f"seed{row['seed']}" / "metrics.jsonl").read_text().splitlines()
    found = [(line["step"], line[metric]) for line in map(json.loads, lines) if metric in line]
    steps, values = zip(*found, strict=True)
    return np.array(steps), np.array(values)


def layers(rows: list[dict[str, str]], folder: pathlib.Path) -> list[dict[str, Any]]:
    """What `tools.layer_similarity` says of each seed's shallow run, two layers at a time."""
    runs = dict.fromkeys(
        folder / "runs" / row["address"] / f"seed{row['seed']}" for row in rows if row["leg"] == "shallow"
    )
    found = []
    for run in runs:
        out = folder / "layers.json"
        command = [sys.executable, "-m", "tools.layer_similarity", run, "--span=2", "--batches=16", f"--out={out}"]
        subprocess.run(command, cwd=ROOT, check=True)
        found.append(json.loads(out.read_text()))
    return found


if __name__ == "__main__":
    main()
