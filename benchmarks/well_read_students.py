"""Pre-trained distillation (Well-Read Students, arXiv 1908.08962): what do pretraining and a teacher each bring?

    python -m benchmarks.well_read_students --data DATA --work WORK    # writes results/well_read_students.json

DATA holds finetune/banking77: requests to a bank of 77 intents. Teacher and student are encoders of bytes, pretrained
as masked language models on the requests without their labels. The teacher is finetuned on LABELS of them, for
TEACHER_STEPS, so that it knows more than a student would, and labels TEXTS of the others; students learn from these for
as many steps as one that is finetuned on the same LABELS labels, and all of them again from random parameters:
pre-trained distillation (PD), distillation, pretraining and finetuning (PF), finetuning. One goes on with the labels
after distillation, the paper's last step. Students are judged on the test split, by the learning rate that the
validation split chose, over SEEDS of head, order and dropout. What WORK holds already is not done again.
"""

import argparse
import dataclasses
import gzip
import json
import pathlib

import jax
import numpy as np

from benchmarks.step import RESULTS
from jaxlm.checkpoints import pretrained
from jaxlm.checkpoints.pretrained import Pretrained
from jaxlm.configuration import resolve
from jaxlm.evaluation.annotation import Annotation
from jaxlm.evaluation.finetuning import FinetuningSweep
from jaxlm.evaluation.intervals import student as interval
from jaxlm.evaluation.labelled import LabelledRows, SequenceClassification
from jaxlm.evaluation.learned import LearnedResult
from jaxlm.evaluation.subject import Subject
from jaxlm.models import build_model
from jaxlm.run import RunConfig
from jaxlm.train import Outcome, train
from jaxlm.training import machine

LABELS, TEXTS = 1000, (1000, 8000)
STEPS, BATCH, RATES, SEEDS = 400, 32, (1e-3, 3e-3), (0, 1, 2)
TEACHER_STEPS = 1600
LENGTH = 128
SIZES = {
    "teacher": {"NUM_LAYERS": 3, "WIDTH": 96, "NUM_HEADS": 3, "NUM_KV_HEADS": 3, "HEAD_DIM": 32, "HIDDEN": 384},
    "student": {"NUM_LAYERS": 2, "WIDTH": 64, "NUM_HEADS": 2, "NUM_KV_HEADS": 2, "HEAD_DIM": 32, "HIDDEN": 256},
}
PRETRAINING = {"TRAIN_STEPS": 600, "BATCH_SIZE": 32, "LEARNING_RATE": 2e-3, "EVAL_PERIOD": 200}


def write_splits(data: pathlib.Path, folder: pathlib.Path) -> None:
    """The labelled requests, those to be labelled by the teacher, and the splits that judge; none is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    source = data / "finetune" / "banking77"
    train, test = (
        [json.loads(line) for line in gzip.open(source / f"{split}.jsonl.gz", "rt", encoding="utf-8")]
        for split in ("train", "test")
    )
    order = np.random.default_rng(0).permutation(len(train))
    rows = [train[i] for i in order]
    parts = {"validation": rows[:1000], "labels": rows[1000 : 1000 + LABELS], "test": test}
    rest = rows[1000 + LABELS :]
    parts |= {"texts": rest[: max(TEXTS)], "unlabelled": [{"text": row["text"]} for row in rows[1000:]]}
    for name, found in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def pretrain(who: str, rows: pathlib.Path, work: pathlib.Path) -> Pretrained:
    """A masked language model of one of the two sizes."""
    settings = SIZES[who] | PRETRAINING | {"MODEL_DIR": str(work / who), "FILES": str(rows / "unlabelled.jsonl")}
    files = ("models/tiny/encoder", "objectives/masked_lm", "data/files", "runs/pretrain")
    flags = [f"--gin_file=gin_configs/{name}.gin" for name in files]
    flags += [f"--gin.{name}={value!r}" for name, value in settings.items()]
    flags.append(f"--gin.TASK_FEATURE_LENGTHS={{'targets': {LENGTH}}}")
    assert train(resolve(RunConfig, flags)) is Outcome.FINISHED
    return pretrained.load(work / who)


def untrained(model: Pretrained) -> Pretrained:
    """The same model before it had read anything."""
    return dataclasses.replace(model, model=build_model(model.config, key=jax.random.key(1)))


def sweep(
    name: str, file: str, rows: pathlib.Path, examples: int, *, steps: int = STEPS, seeds=SEEDS, **options
) -> FinetuningSweep:
    """So many steps on a file of so many rows."""
    files = LabelledRows(str(rows), train=file, validation="validation.jsonl", test="test.jsonl")
    taught = "taught" if file.startswith("taught") else None
    return FinetuningSweep(
        name,
        SequenceClassification(files, taught=taught),
        batch_size=BATCH,
        max_length=LENGTH,
        rates=RATES,
        seeds=seeds,
        epochs=steps * BATCH / examples,
        **options,
    )


def judged(task: FinetuningSweep, model: Pretrained, known: dict, path: pathlib.Path) -> dict:
    """{"test": accuracies by seed at the chosen rate, "rate"}; `known` results are kept in `path`."""
    if task.name not in known:
        result: LearnedResult = task.evaluate(Subject(model))[0]
        at_best = [trial.test["accuracy"] for trial in result.trials if trial.setting == result.chosen]
        known[task.name] = {"rate": result.chosen, "test": at_best}
        path.write_text(json.dumps(known))
    print(task.name, known[task.name], flush=True)
    return known[task.name]


def main() -> None:
    """Runs what is missing, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "well_read_students.json")
    args = parser.parse_args()
    rows, cached = args.work / "rows", args.work / "known.json"
    write_splits(args.data, rows)
    known = json.loads(cached.read_text()) if cached.exists() else {}
    teacher, small = (pretrain(who, rows, args.work) for who in SIZES)
    annotation = Annotation(str(rows / "texts.jsonl"), str(rows / f"taught_{max(TEXTS)}.jsonl"))
    teaching = sweep("teacher", "labels.jsonl", rows, LABELS, steps=TEACHER_STEPS, seeds=(0,), annotation=annotation)
    found = {"teacher": judged(teaching, teacher, known, cached)}
    lines = pathlib.Path(annotation.output).read_text().splitlines(keepends=True)
    for count in TEXTS[:-1]:
        (rows / f"taught_{count}.jsonl").write_text("".join(lines[:count]))
    for start, model in (("pretrained", small), ("random", untrained(small))):
        for name, file, examples in (
            (f"{LABELS} labels", "labels.jsonl", LABELS),
            *((f"{count} texts of the teacher's", f"taught_{count}.jsonl", count) for count in TEXTS),
        ):
            task = sweep(f"{start}, {name}", file, rows, examples)
            found[task.name] = judged(task, model, known, cached)
    most = sweep("texts first", f"taught_{max(TEXTS)}.jsonl", rows, max(TEXTS))
    both = sweep(f"pretrained, {max(TEXTS)} texts of the teacher's, then {LABELS} labels", "labels.jsonl", rows, LABELS)
    found[both.name] = judged(dataclasses.replace(both, after=most), small, known, cached)
    pairs = [(both.name, f"pretrained, {max(TEXTS)} texts of the teacher's")]
    for count in TEXTS:
        taught = f"{count} texts of the teacher's"
        pairs += [(f"pretrained, {taught}", other) for other in (f"pretrained, {LABELS} labels", f"random, {taught}")]
    differences = {
        f"{of}, less {other}": dataclasses.asdict(interval(np.subtract(found[of]["test"], found[other]["test"])))
        for of, other in pairs
    }
    record = {
        "accuracy": found,
        "differences": differences,
        "labels": LABELS,
        "steps": STEPS,
        "teacher_steps": TEACHER_STEPS,
        "sizes": SIZES,
    }
    args.out.write_text(json.dumps(record | {"machine": machine.facts()}, indent=1) + "\n")
    for name, estimate in differences.items():
        print(f"{name}: {estimate['value']:+.4f} [{estimate['low']:+.4f}, {estimate['high']:+.4f}]")


if __name__ == "__main__":
    main()
