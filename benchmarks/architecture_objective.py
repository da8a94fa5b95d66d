"""The study of architectures and objectives (arXiv 2204.05832) on real text: from data sets to its report.

python -m benchmarks.architecture_objective --data DATA --work WORK    # writes results/architecture_objective/

DATA holds books, prompted pairs, evaluation sets and templates, as README.md here has them. WORK/corpus gets what
gin_configs/studies/architecture_objective.gin reads: books with a vocabulary made of them, other books held out, and
prompted pairs; both without what shares 13 words in a row with a question. All other arguments are the study's, such
as --gin.TOKENS=2e6; with --plan nothing is trained. Stopped, it goes on where it was.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from typing import Any

from benchmarks import guides
from benchmarks.step import RESULTS
from benchmarks.study import found_by, shown, time_of
from jaxlm.configuration import resolve
from jaxlm.studies.config import StudyConfig
from jaxlm.studies.jobs import expand
from jaxlm.studies.results import Run, finished_runs, interval
from jaxlm.studies.store import Store
from jaxlm.training import machine

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = "--gin_file=gin_configs/studies/architecture_objective.gin"
KEPT = RESULTS / "architecture_objective"
"""The report with its pictures, the table of all runs, and summary.json."""


def prepare(data: pathlib.Path, work: pathlib.Path) -> None:
    """The study's corpus, and a link to the gin files, which are named from the folder that the study runs in."""
    corpus = work / "corpus"
    if (corpus / "accounts.json").exists():
        return
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir(parents=True)
    (work / "gin_configs").unlink(missing_ok=True)
    (work / "gin_configs").symlink_to(ROOT / "gin_configs")
    (corpus / "evaluation").symlink_to(data.resolve() / "eval")
    with tarfile.open(data / "finetune" / "promptsource_templates" / "templates.tar.gz") as templates:
        templates.extractall(corpus, filter="data")
    (corpus / "validation").mkdir()
    books = data / "pretrain" / "books_pd"
    shutil.copyfile(books / "validation.jsonl.gz", corpus / "validation" / "books.jsonl.gz")
    against = ("--against", corpus / "evaluation" / "*" / "*.jsonl.gz")
    accounts = {name: corpus / f"{name}.json" for name in ("books", "pairs")}
    of_books = ("--windows", "--out", corpus, "--account", accounts["books"])
    of_pairs = ("--out", corpus / "prompted", "--account", accounts["pairs"])
    cleaned = (
        start("decontaminate", books / "train-*", *against, *of_books),
        start("decontaminate", data / "finetune" / "t0_50k" / "train.jsonl.gz", *against, *of_pairs),
    )
    for process in cleaned:
        finish(process)
    vocabulary = ("--size", "4096", "--out", corpus / "vocabulary.model")
    finish(start("train_vocabulary", "--files", corpus / "part-*.jsonl.gz", *vocabulary))
    found = {name: json.loads(path.read_text())["summary"] for name, path in accounts.items()}
    (corpus / "accounts.json").write_text(json.dumps(found))


def start(tool: str, *arguments: str | pathlib.Path) -> subprocess.Popen:
    """Starts a tool of this repository."""
    return subprocess.Popen([sys.executable, "-m", f"tools.{tool}", *map(str, arguments)], cwd=ROOT)


def finish(process: subprocess.Popen) -> None:
    """Waits for it.

    Raises:
      subprocess.CalledProcessError: it failed.
    """
    if status := process.wait():
        raise subprocess.CalledProcessError(status, process.args)


def answers(study: StudyConfig, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Means over an evaluation's tasks, with intervals over seeds: right answers' bits per byte, and the tasks' own."""
    found = []
    for evaluation in dict.fromkeys(name for leg in study.legs for name in leg.evaluations):
        for leg, cell in {(run.leg, tuple(run.cell.items())): None for run in runs}:
            of_cell = [run for run in runs if (run.leg, tuple(run.cell.items())) == (leg, cell)]
            for metric in ("gold_bits_per_byte", "primary"):
                of = [run.score(evaluation, None if metric == "primary" else metric) for run in of_cell]
                if None not in of:
                    entry = {"evaluation": evaluation, "metric": metric, "leg": leg, **dict(cell)}
                    found.append(entry | shown(interval(of)))
    return found


def keep(study: StudyConfig, store: Store, corpus: pathlib.Path, bindings: list[str]) -> None:
    """Writes the results, of what is finished."""
    shutil.rmtree(KEPT, ignore_errors=True)
    shutil.copytree(store.path, KEPT, ignore=lambda _, names: [name for name in names if not kept(name)])
    summary = {"bindings": bindings, "seeds": study.seeds, "corpus": json.loads((corpus / "accounts.json").read_text())}
    runs = finished_runs(expand(study, store), store)
    summary |= time_of(study, store) | found_by(study, runs) | {"answers": answers(study, runs)}
    summary["machine"] = machine.facts()
    (KEPT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def kept(name: str) -> bool:
    """Whether a file of a study's folder is the report, one of its pictures, or the table of its runs."""
    return name == "figures" or pathlib.Path(name).suffix in (".md", ".png", ".csv")


def committed(name: str) -> str:
    """A table of the committed results, for docs/studies.md: "cells" or "findings"."""
    summary = json.loads((KEPT / "summary.json").read_text())
    return {"cells": cells_table, "findings": findings_table}[name](summary)


def cells_table(summary: dict[str, Any]) -> str:
    """Each cell's loss, and its answers before and after finetuning."""
    columns = [("loss", "measures", {"leg": "pretrain", "metric": "validation/cross_entropy"})]
    for evaluation, metric, title in (
        ("T0-Eval", "gold_bits_per_byte", "T0, bits per byte"),
        ("EAI-Eval", "gold_bits_per_byte", "EAI, bits per byte"),
        ("T0-Eval", "primary", "T0, accuracy"),
    ):
        of = {"evaluation": evaluation, "metric": metric}
        columns += [(f"{title}: before", "answers", of | {"leg": "pretrain"})]
        columns += [("after finetuning", "answers", of | {"leg": "finetune"})]
    rows = [f"| cell | {' | '.join(title for title, *_ in columns)} |", "|---|" + "--:|" * len(columns)]
    for cell in [of for of in summary["measures"] if of["leg"] == "pretrain"]:
        name = {factor: cell[factor] for factor in ("architecture", "objective")}
        shown = []
        for _, kind, of in columns:
            found = [entry for entry in summary[kind] if (name | of).items() <= entry.items()]
            shown.append(" ".join(with_half_width(entry) for entry in found))
        rows.append(f"| {':'.join(name.values())} | {' | '.join(shown)} |")
    return "\n".join(rows)


def findings_table(summary: dict[str, Any]) -> str:
    """The paper's claims and what the intervals say of them, by what they were tested on; ratios of tokens."""
    columns = {
        "validation/cross_entropy": "loss",
        "T0-Eval/gold_bits_per_byte": "T0's tasks, bits per byte",
        "EAI-Eval/gold_bits_per_byte": "EAI's tasks, bits per byte",
    }
    claims: dict[str, dict[str, str]] = {}
    for claim in summary["claims"]:
        difference = with_half_width(claim["difference"]) if claim["difference"] else ""
        claims.setdefault(claim["claim"], {})[claim["metric"]] = f"{claim['verdict']}: {difference}"
    rows = [f"| claim | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    rows += [f"| {name} | {' | '.join(found.get(of, '') for of in columns)} |" for name, found in claims.items()]
    rows += ["", "| tokens from scratch over those of the adaptation, at equal loss | ratio |", "|---|--:|"]
    for match in summary["tokens_to_the_same_loss"]:
        rows.append(f"| {match['match']} | {match['in_words']} |")
    return "\n".join(rows)


def with_half_width(values: dict[str, Any], digits: int = 3) -> str:
    """A mean and half its interval."""
    half = "" if values["low"] is None else f" ± {(values['high'] - values['low']) / 2:.{digits}f}"
    return f"{values['mean']:.{digits}f}{half}"


def main() -> None:
    """Prepares the data, runs what is missing of the study, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    args, rest = parser.parse_known_args()
    prepare(args.data, args.work)
    command = [sys.executable, "-m", "jaxlm.study", FILE, *rest]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    status = subprocess.run(command, cwd=args.work, env=environment).returncode
    if "--plan" in rest or status not in (0, 1):  # 1: something failed, which the report says
        sys.exit(status)
    os.chdir(args.work)
    bindings = [argument for argument in rest if argument.startswith("--gin")]
    study = resolve(StudyConfig, [FILE, *bindings])
    keep(study, Store(pathlib.Path(study.study_dir)), args.work / "corpus", bindings)
    guides.fill("studies.md", "architecture_objective", committed)


if __name__ == "__main__":
    main()
