"""Do our evaluation tasks mean to t5 what they mean here? Its rank classification metric on our rows in seqio.

    pip install --no-deps --target=t5 t5 babel scikit-learn narwhals threadpoolctl
    JAXLM_SHARED_DATA=... python -m benchmarks.seqio_evaluator --reference=t5    # with the extras seqio and evaluation

HellaSwag, ARC-Easy and COPA are registered with seqio. One set of random scores goes to seqio's evaluator with our
metric function, and through t5's postprocessor to t5's `rank_classification`: how far apart are the accuracies, by sums
and by tokens?
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np
import seqio

from jaxlm.configuration import resolve
from jaxlm.data.vocabularies import SentencePieceVocabulary
from jaxlm.evaluation.seqio_tasks import register_with_seqio
from jaxlm.evaluation.suite import EvaluationConfig
from jaxlm.training import machine

RESULTS = pathlib.Path(__file__).parent / "results"
TASKS = ("hellaswag", "arc_easy", "copa")


def both(name: str, seed: int) -> dict[str, Any]:
    """t5's accuracies and ours, of one task and the same random scores."""
    from t5.data import postprocessors
    from t5.evaluation import metrics

    evaluator = seqio.Evaluator(
        name, seqio.EncDecFeatureConverter(pack=False), eval_split="validation", async_compute_metrics=False
    )
    rows = list(evaluator.cached_task_datasets[name].as_numpy_iterator())
    # In proportion to length, so that sums and means per token choose otherwise.
    chance = np.random.default_rng(seed)
    scores = [-len(row["targets"]) * chance.gamma(4.0) for row in rows]
    targets = [postprocessors.rank_classification(None, example=row, is_target=True) for row in rows]
    theirs = {
        "accuracy": metrics.rank_classification(targets, scores)["accuracy"] / 100,
        "accuracy_per_token": metrics.rank_classification(targets, scores, normalize_by_target_length=True)["accuracy"]
        / 100,
    }
    found, _ = evaluator.evaluate(compute_metrics=True, score_fn=lambda dataset, shapes=None: list(enumerate(scores)))
    ours = found.result()[name]
    return {
        "rows": len(rows),
        "t5": {metric: float(value) for metric, value in theirs.items()},
        "ours": {metric: ours[metric] for metric in theirs},
        "distance": max(abs(float(value) - ours[metric]) for metric, value in theirs.items()),
    }


def main() -> None:
    """Prints the comparison and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("JAXLM_SHARED_DATA"), help="folder of the data bundle")
    parser.add_argument("--reference", help="folder that t5 is installed in, if not beside jaxlm")
    args = parser.parse_args()
    if not args.data:
        parser.error("give --data=FOLDER or JAXLM_SHARED_DATA: the folder with eval and tokenizers")
    if args.reference:
        sys.path.append(args.reference)
    data = pathlib.Path(args.data)
    flags = ["--gin_file=gin_configs/evaluation/zero_shot.gin", f"--gin.EVALUATION_DATA='{data / 'eval'}'"]
    vocabulary = SentencePieceVocabulary(str(data / "tokenizers" / "t5_base_32000.spm.model"), extra_ids=100)
    names = register_with_seqio(resolve(EvaluationConfig, flags).only(TASKS).tasks, vocabulary)
    results = {task: both(names[task], seed) for seed, task in enumerate(TASKS)}
    print(json.dumps(results, indent=1))
    results = {"reference": f"t5 {importlib.metadata.version('t5')}", "tasks": results, "machine": machine.facts()}
    (RESULTS / "seqio_evaluator.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
