"""A shipped study, run to its end: what it found, how long that took, and what the same command repeats.

python -m benchmarks.study quickstart --workers=2                       # writes results/study_quickstart.json
python -m benchmarks.study yi --layers shallow                          # with what the layers of these runs do
python -m benchmarks.study t5gemma --name t5gemma_slow --gin.ADAPTATION_RATE="'LEARNING_RATE = 3e-3'"

What is not known here, such as bindings, goes to the study. Without --folder it has an empty one of its own, which
stays where something failed.
"""

import argparse
import dataclasses
import json
import operator
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.step import RESULTS
from jaxlm.configuration import resolve
from jaxlm.studies.config import Ladder, StudyConfig
from jaxlm.studies.findings import decide
from jaxlm.studies.jobs import expand
from jaxlm.studies.ladder import Estimate, fit_surface
from jaxlm.studies.ladder_section import ladder_points
from jaxlm.studies.results import Interval, Run, account, finished_runs, interval, matched
from jaxlm.studies.store import Store
from jaxlm.training import machine

OF_A_LAW = ("E", "A", "alpha", "B", "beta", "parameters_exponent")
ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    """Runs the study twice, prints what it found and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="of gin_configs/studies")
    parser.add_argument("--folder", help="of the study: what is finished there is not repeated")
    parser.add_argument("--name", help="the file is results/study_NAME.json; default: the study's")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--layers", metavar="LEG", help="also what tools.layer_similarity says of this leg's runs")
    args, bindings = parser.parse_known_args()
    folder = pathlib.Path(args.folder or f"{tempfile.mkdtemp()}/{args.study}").resolve()
    print(f"The study lies in {folder} while it runs.")
    described = [f"--gin_file=gin_configs/studies/{args.study}.gin", *bindings, f"--gin.STUDY_DIR='{folder}'"]
    command = [*described, f"--workers={args.workers}"]
    took = run_once(command)
    study, store = resolve(StudyConfig, described), Store(folder)
    runs = finished_runs(expand(study, store), store)
    results = {"study": args.study, "bindings": bindings, "seeds": study.seeds, "workers": args.workers, **took}
    results |= {**time_of(study, store), **found_by(study, runs)}
    if study.ladder is not None:
        results["laws"] = laws(study.ladder, runs)
    if args.layers:
        results["layers"] = layers(runs, args.layers, store)
    trained = sum(results["seconds"].values())
    again = run_once(command)
    again["seconds_of_runs"] = sum(time_of(study, store)["seconds"].values()) - trained
    results |= {"again": again, "machine": machine.facts()}
    if not args.folder:
        shutil.rmtree(folder.parent)
    print(json.dumps(results, indent=1))
    (RESULTS / f"study_{args.name or args.study}.json").write_text(json.dumps(results, indent=1) + "\n")


def run_once(arguments: list[str]) -> dict[str, float]:
    """Seconds of one command of the study.

    Raises:
      subprocess.CalledProcessError: something failed.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "jaxlm.study", *arguments], cwd=ROOT, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": round(time.monotonic() - start), "cpu_seconds": round(cpu)}


def time_of(study: StudyConfig, store: Store) -> dict[str, Any]:
    """Where the workers' time went, of all that ever worked in the study's folder."""
    spent = account(expand(study, store), store)
    return {
        "worker_seconds": round(spent.workers),
        "seconds": {activity.value: round(seconds, 1) for activity, seconds in spent.runs.items()},
        "overhead": round(spent.overhead, 4),
        **({"share_waited": round(spent.share_waited, 4)} if spent.waiting else {}),
    }


def found_by(study: StudyConfig, runs: Sequence[Run]) -> dict[str, Any]:
    """The measures of each leg and cell, the claims, and tokens to the same loss, with 95% intervals over seeds."""
    measures = []
    for leg, cell in {(run.leg, tuple(run.cell.items())): None for run in runs}:
        of_cell = [run for run in runs if (run.leg, tuple(run.cell.items())) == (leg, cell)]
        for metric in study.measures:
            if None not in (values := [run.last(metric) for run in of_cell]):
                measures.append({"leg": leg, **dict(cell), "metric": metric, **shown(interval(values))})
    claims = []
    for decision in (decide(finding, runs) for finding in study.findings):
        claim = {"claim": decision.finding.name, "metric": decision.finding.metric, "seeds": decision.seeds}
        claims.append(claim | {"verdict": decision.verdict.value, "difference": shown(decision.difference)})
    matches = []
    for match in filter(None, (matched(match, runs) for match in study.matches)):
        bounds = {"ratio": shown(match.ratio), "at_least": match.at_least, "below": match.below}
        by_seed = {"ratios": match.ratios, "reached": [when.value for when in match.reached], "loss": match.loss}
        matches.append({"match": match.match.name, "in_words": str(match), **bounds, **by_seed})
    trained = len({(run.job.address, run.seed) for run in runs})
    return {"runs": trained, "measures": measures, "claims": claims, "tokens_to_the_same_loss": matches}


def laws(ladder: Ladder, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The scaling law of each group of runs, with 95% intervals over runs drawn with replacement, and its error."""
    found = []
    for levels, points in ladder_points(ladder, runs).items():
        fitted = fit_surface(points, resamples=ladder.resamples)
        numbers = {name: shown(fitted.estimate(operator.attrgetter(name))) for name in OF_A_LAW}
        found.append({"group": levels, "runs": len(points), "error": fitted.error, **numbers})
    return found


def shown(values: Interval | Estimate | None) -> dict[str, Any] | None:
    """An interval as JSON has it; of one seed without bounds."""
    if values is None:
        return None
    return {name: None if value != value else value for name, value in dataclasses.asdict(values).items()}


def layers(runs: Sequence[Run], leg: str, store: Store) -> list[dict[str, Any]]:
    """What `tools.layer_similarity` says of each run of a leg, two layers at a time."""
    found = []
    for folder in dict.fromkeys(store.run_folder(run.job, run.seed).path for run in runs if run.leg == leg):
        out = store.path / "layers.json"
        command = [sys.executable, "-m", "tools.layer_similarity", folder, "--span=2", "--batches=16", f"--out={out}"]
        subprocess.run(command, cwd=ROOT, check=True)
        found.append(json.loads(out.read_text()))
    return found


if __name__ == "__main__":
    main()
