"""Causal, then masked language modelling of a small encoder (arXiv 2507.00994): the shipped study, and early probes.

    python -m benchmarks.clm_then_mlm --data DATA --work WORK    # writes results/clm_then_mlm.json and clm_then_mlm.md

DATA holds pretrain/books_pd and finetune/banking77. The study's own sizes: two layers, 600 steps, three seeds. What its
models are asked is made here of real text, small enough for two cores:

  punctuation   which mark followed a word of a book (comma, full stop, another, none), read lower-case without marks: a
                linear probe and a finetuning sweep of word classification; of words without a mark one in seven is
                asked, so that guessing the commonest class is of little use
  intents       BANKING77: a linear probe of 77 classes
  same_intent   whether two of its requests mean the same: a linear probe of sentence pairs

Then the probes are repeated at early checkpoints of the causal trunk and of the masked run, each under its own mask and
the causal one under the full mask too: what is learnt per step. Stopped, it goes on where it was. Beside other work set
OPENBLAS_NUM_THREADS=1: fits of probes are small, and several threads wait for each other.
"""

import argparse
import dataclasses
import gzip
import json
import pathlib
import re
import shutil

import numpy as np

from benchmarks.step import RESULTS
from jaxlm import study as runner
from jaxlm.architecture import Architecture
from jaxlm.checkpoints import pretrained
from jaxlm.configuration import resolve
from jaxlm.evaluation.probing import LinearProbe
from jaxlm.evaluation.suite import EvaluationConfig, evaluate
from jaxlm.studies.config import StudyConfig
from jaxlm.studies.jobs import expand
from jaxlm.studies.results import answered, finished_runs, interval
from jaxlm.studies.settings import resolved_evaluation
from jaxlm.studies.store import Store
from jaxlm.training import machine

STEPS = (50, 100, 150, 300)
MARKS = {",": "comma", ".": "stop", ";": "other", ":": "other", "?": "other", "!": "other"}
WORDS = 24  # of a row of punctuation

STUDY = """
from __gin__ import dynamic_registration

include 'gin_configs/studies/clm_then_mlm.gin'

STUDY_DIR = '{work}/study'
CORPUS = "CORPUS_FILES = '{books}/train-00000-of-00007.jsonl.gz'"
HELD_OUT = "CORPUS_VALIDATION_FILES = '{books}/validation.jsonl.gz'"
QUESTIONS = {{'labels': ('{work}/questions.gin',)}}
"""
QUESTIONS = """
from __gin__ import dynamic_registration
from jaxlm.evaluation import finetuning
from jaxlm.evaluation import labelled
from jaxlm.evaluation import probing

include 'gin_configs/evaluation/encoders.gin'

EVALUATION_DATA = '{work}/tasks'
RATES = (3e-4, 1e-3, 3e-3)
TASKS = [
    @punctuation/finetuning.FinetuningSweep(),
    @punctuation/probing.LinearProbe(),
    @intents/probing.LinearProbe(),
    @same_intent/probing.LinearProbe(),
]
FINETUNING_SEEDS = (0, 1)
EPOCHS = 2.0
probing.LinearProbe.strengths = (1e-3, 1e-2, 1e-1)

punctuation/finetuning.FinetuningSweep.name = 'punctuation'
punctuation/finetuning.FinetuningSweep.limit = 400
punctuation/finetuning.FinetuningSweep.labels = @punctuation/labelled.TokenClassification()
punctuation/probing.LinearProbe.name = 'punctuation_probe'
punctuation/probing.LinearProbe.labels = @punctuation/labelled.TokenClassification()
punctuation/labelled.TokenClassification.rows = @punctuation/labelled.LabelledRows()
punctuation/labelled.TokenClassification.words = 'words'
punctuation/labelled.TokenClassification.labels = 'marks'
punctuation/labelled.TokenClassification.separator = ' '
punctuation/labelled.TokenClassification.primary = 'accuracy'
punctuation/labelled.LabelledRows.train = 'punctuation/train.jsonl'
punctuation/labelled.LabelledRows.validation = 'punctuation/validation.jsonl'
punctuation/labelled.LabelledRows.test = 'punctuation/test.jsonl'

intents/probing.LinearProbe.limit = 1200
intents/labelled.LabelledRows.train = 'banking77/train.jsonl.gz'
intents/labelled.LabelledRows.test = 'banking77/test.jsonl.gz'

same_intent/probing.LinearProbe.name = 'same_intent_probe'
same_intent/probing.LinearProbe.labels = @same_intent/labelled.SentenceSimilarity()
same_intent/probing.LinearProbe.limit = 600
same_intent/labelled.SentenceSimilarity.rows = @same_intent/labelled.LabelledRows()
same_intent/labelled.SentenceSimilarity.first = '{{{{ first }}}}'
same_intent/labelled.SentenceSimilarity.second = '{{{{ second }}}}'
same_intent/labelled.SentenceSimilarity.score = 'same'
same_intent/labelled.SentenceSimilarity.high = 1.0
same_intent/labelled.LabelledRows.train = 'same_intent/train.jsonl'
same_intent/labelled.LabelledRows.validation = 'same_intent/validation.jsonl'
same_intent/labelled.LabelledRows.test = 'same_intent/test.jsonl'
"""


def rows_of(path: pathlib.Path) -> list[dict]:
    """The rows of gzipped JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_tasks(data: pathlib.Path, folder: pathlib.Path) -> None:
    """The data sets of the tasks. Books of the validation file alone, which no run was trained on."""
    if (folder / "done").exists():
        return
    rng = np.random.default_rng(0)
    books = rows_of(data / "pretrain" / "books_pd" / "validation.jsonl.gz")
    shares = {"train": books[:5], "validation": books[5:7], "test": books[7:]}
    for split, count in (("train", 900), ("validation", 300), ("test", 400)):
        windows = [row for book in shares[split] for row in punctuated(book["text"])]
        chosen = rng.permutation(len(windows))[:count]
        _write(folder / "punctuation" / f"{split}.jsonl", [windows[i] for i in chosen])
    banking = folder / "banking77"
    banking.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        shutil.copyfile(data / "finetune" / "banking77" / f"{split}.jsonl.gz", banking / f"{split}.jsonl.gz")
    train, test = (rows_of(banking / f"{split}.jsonl.gz") for split in ("train", "test"))
    order = rng.permutation(len(train))
    parts = {"train": [train[i] for i in order[1000:]], "validation": [train[i] for i in order[:1000]], "test": test}
    for split, count in (("train", 1500), ("validation", 400), ("test", 600)):
        _write(folder / "same_intent" / f"{split}.jsonl", pairs(parts[split], count, rng))
    (folder / "done").touch()


def punctuated(text: str) -> list[dict]:
    """Rows of words without their marks, and which mark followed each."""
    found = re.findall(r"([A-Za-z']+)([,.;:?!]?)", text)
    words = [word.lower() for word, _ in found]
    marks = [MARKS[mark] if mark else ("none" if i % 7 == 0 else None) for i, (_, mark) in enumerate(found)]
    cuts = range(0, len(words) - WORDS, WORDS)
    return [{"words": words[i : i + WORDS], "marks": marks[i : i + WORDS]} for i in cuts]


def pairs(rows: list[dict], count: int, rng: np.random.Generator) -> list[dict]:
    """Pairs of requests, half of them of one intent."""
    by_label: dict[int, list[str]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row["text"])
    labels = [label for label, texts in by_label.items() if len(texts) > 1]
    made = []
    for i in range(count):
        if i % 2:
            label = labels[rng.integers(len(labels))]
            first, second = (by_label[label][k] for k in rng.choice(len(by_label[label]), 2, replace=False))
        else:
            one, other = rng.choice(len(labels), 2, replace=False)
            first, second = (by_label[labels[k]][rng.integers(len(by_label[labels[k]]))] for k in (one, other))
        made.append({"first": first, "second": second, "same": i % 2})
    return made


def _write(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def early_probes(
    study: StudyConfig, store: Store, cached: pathlib.Path
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{how: {step: {task: primary metric by seed}}} of the causal trunk under both masks and of the masked run."""
    plan = expand(study, store)
    jobs = {(cell["causal"], leg.name): job for cell, leg, job in plan.of_cells}
    questions = resolved_evaluation(study.legs[1].evaluations["labels"])
    probes = tuple(task for task in questions.tasks if isinstance(task, LinearProbe))
    full = tuple(dataclasses.replace(task, architecture=Architecture.ENCODER) for task in probes)
    sides = {
        "causal, causal mask": (jobs["100%", "trunk"], probes),
        "causal, full mask": (jobs["100%", "trunk"], full),
        "masked": (jobs["0%", "pretrain"], probes),
    }
    known = json.loads(cached.read_text()) if cached.exists() else {}
    for how, (job, tasks) in sides.items():
        for step in STEPS:
            for seed in study.seeds:
                key = f"{how}/{step}/{seed}"
                if key in known:
                    continue
                model = pretrained.load(store.run_folder(job, seed).path, step=step)
                result = evaluate(EvaluationConfig(tasks, samples=0), model, report=lambda _: None)
                assert not result.failures, result.failures
                known[key] = {found.task: found.metrics[found.primary].value for found in result.results}
                cached.write_text(json.dumps(known))
                print(key, known[key], flush=True)
    return {
        how: {
            str(step): {
                task.name: [known[f"{how}/{step}/{seed}"][task.name] for seed in study.seeds] for task in probes
            }
            for step in STEPS
        }
        for how in sides
    }


def without_pictures(report: str) -> str:
    """The report's text; not its last section, on time, which knows nothing of workers that were stopped by force."""
    lines = report.split("\n## Time\n")[0].splitlines()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if not line.startswith("!["))).rstrip() + "\n"


def main() -> None:
    """Runs what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "clm_then_mlm.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    write_tasks(args.data, args.work / "tasks")
    gin, work = args.work / "study.gin", args.work.resolve()
    gin.write_text(STUDY.format(work=work, books=(args.data / "pretrain" / "books_pd").resolve()))
    (args.work / "questions.gin").write_text(QUESTIONS.format(work=work))
    assert runner.main([f"--gin_file={gin}", "--worker"]) == 0
    study = resolve(StudyConfig, [f"--gin_file={gin}"])
    store = Store(pathlib.Path(study.study_dir))
    for job in expand(study, store).jobs.values():
        if not store.is_finished(job):
            raise SystemExit(f"{job.address} is not finished: {store.failures(job)}")
    early = early_probes(study, store, args.work / "early.json")
    assert runner.main([f"--gin_file={gin}", "--report"]) == 0
    runs = finished_runs(expand(study, store), store)
    final = {
        leg.name: {
            task: {cell: dataclasses.asdict(value) for cell, value in cells.items()}
            for task, cells in answered(runs, leg.name, "labels").items()
        }
        for leg in study.legs
    }
    ahead = {
        task: {
            step: {
                how: dataclasses.asdict(interval(np.subtract(early[how][step][task], early["masked"][step][task])))
                for how in early
                if how != "masked"
            }
            for step in map(str, STEPS)
        }
        for task in next(iter(early["masked"].values()))
    }
    record = {"final": final, "early": early, "causal_less_masked": ahead, "machine": machine.facts()}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(without_pictures((store.path / "report.md").read_text()))
    print(f"Wrote {args.out}.")


if __name__ == "__main__":
    main()
