"""A study from an empty folder to its report: how long it takes, and what is neither training nor evaluation.

python -m benchmarks.study                             # the toy study; writes results/study.json; about ten minutes
python -m benchmarks.study --gin_file=gin_configs/studies/yi.gin --name study_yi --workers=2

The same command is then given a second time, to see what it repeats. The study's folder stays where something failed.
"""

import argparse
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.step import RESULTS
from jaxlm.configuration import resolve
from jaxlm.studies.config import StudyConfig
from jaxlm.studies.findings import decide
from jaxlm.studies.jobs import Plan, expand
from jaxlm.studies.results import account, finished_runs
from jaxlm.studies.store import Store
from jaxlm.training import machine


def run_once(arguments: list[str]) -> dict[str, float]:
    """Seconds of one command of the study."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "jaxlm.study", *arguments], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": round(time.monotonic() - start), "cpu_seconds": round(cpu)}


def looked_at(study: StudyConfig, plan: Plan, store: Store) -> dict[str, Any]:
    """What a finished study's folder says of its time and of its claims."""
    spent, runs = account(plan, store), finished_runs(plan, store)
    verdicts = [decide(finding, runs) for finding in study.findings]
    return {
        "runs": len({(run.job.address, run.seed) for run in runs}),
        "worker_seconds": round(spent.workers),
        "seconds": {activity.value: round(seconds, 1) for activity, seconds in spent.runs.items()},
        "overhead": round(spent.overhead, 4),
        "claims": {
            one.finding.name: {
                "verdict": one.verdict.value,
                "difference": one.difference and [one.difference.mean, one.difference.low, one.difference.high],
                "metric": one.finding.metric,
            }
            for one in verdicts
        },
    }


def main() -> None:
    """Runs the study in a folder of its own, prints what it took and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", default="gin_configs/studies/quickstart.gin")
    parser.add_argument("--name", default="study", help="of the file in results/")
    parser.add_argument("--workers", type=int, default=1)
    args, rest = parser.parse_known_args()
    folder = pathlib.Path(tempfile.mkdtemp())
    print(f"The study lies in {folder} while it runs.")
    described = [f"--gin_file={args.gin_file}", *rest, f"--gin.STUDY_DIR='{folder}/study'"]
    command = [*described, f"--workers={args.workers}"]
    took = run_once(command)
    study, store = resolve(StudyConfig, described), Store(folder / "study")
    found = looked_at(study, expand(study, store), store)
    trained = sum(account(expand(study, store), store).runs.values())
    again = run_once(command)
    again["seconds_of_runs"] = sum(account(expand(study, store), store).runs.values()) - trained
    shutil.rmtree(folder)
    results = {
        "study": args.gin_file,
        "workers": args.workers,
        **took,
        **found,
        "again": again,
        "machine": machine.facts(),
    }
    print(json.dumps(results, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
