"""Says of a model's layers how much each changes, and what standing twice does to the loss: which to duplicate.

python -m tools.layer_similarity runs/quickstart                  # on the run's own held-out text
python -m tools.layer_similarity runs/quickstart --span=2         # two layers at a time
python -m tools.layer_similarity hf/llama --files='books/*.txt'   # a Hugging Face folder, on text of yours

The last line is what gin_configs/adaptations/deeper.gin takes as LAYERS (docs/surgery.md).
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping

import numpy as np

from jaxlm.checkpoints import pretrained
from jaxlm.checkpoints.manifest import CheckpointError, Verify
from jaxlm.checkpoints.sources import open_source
from jaxlm.checkpoints.stored import StoredCheckpoint
from jaxlm.configuration import resolve_text
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import build_loader
from jaxlm.data.sources import TextFiles
from jaxlm.data.tasks import text_task
from jaxlm.evaluation.layer_similarity import LayerReport, layer_report
from jaxlm.objectives.full_lm import FullLM
from jaxlm.run import RunConfig, open_loader


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run's folder, one of its steps, or a Hugging Face folder")
    parser.add_argument("--span", type=int, default=1, help="layers that are looked at together (default: 1)")
    parser.add_argument("--files", help="text to look at, a glob; default: the run's held-out split, by its objective")
    parser.add_argument("--batches", type=int, default=8, help="most batches of 8 rows (default: 8)")
    parser.add_argument("--out", help="also write the numbers to this JSON file")
    args = parser.parse_args(arguments)
    try:
        model = pretrained.load(args.model)
        batches = itertools.islice(batches_of(args.model, model, args.files), args.batches)
        report = layer_report(model.model, batches, args.span)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"layer_similarity: {error}", file=sys.stderr)
        return 1
    show(report, len(report.spans) + args.span - 1)
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    return 0


def batches_of(path: str, model: pretrained.Pretrained, files: str | None) -> Iterator[Mapping[str, np.ndarray]]:
    """Held-out batches of a run, or of text files.

    Raises:
      ValueError: the model has neither a run's data nor files.
    """
    options = {"split": "validation", "one_pass": True, "batch_size": 8}
    if files is not None:
        if model.vocabulary is None:
            raise ValueError(f"{model.source} has no vocabulary to read text with: {model.no_vocabulary}")
        task = text_task("files", TextFiles(pattern=files, validation=files), model.vocabulary)
        data = DataConfig(mixture=task, feature_lengths={"targets": min(model.context_length or 512, 512)})
        return build_loader(data, objective=FullLM(), architecture=model.config.architecture, **options)
    source = open_source(path, None, Verify.SIZES)
    run = resolve_text(source.config) if isinstance(source, StoredCheckpoint) else None
    if not isinstance(run, RunConfig):
        raise ValueError(f"{path} says nothing of data; give text with --files.")
    return open_loader(run, run.phases[-1], **options)


def show(report: LayerReport, depth: int) -> None:
    """Prints the table and what follows from it."""
    print(f"Loss {report.loss:.4f} nats a target, over {report.tokens:,} targets.")
    print("layers    cosine of input and output    loss with them twice")
    for span in report.spans:
        name = str(span.first) if span.first == span.last else f"{span.first}-{span.last}"
        print(f"{name:9} {span.cosine:26.4f}    {span.loss:.4f} ({span.loss - report.loss:+.4f})")
    print(f"Duplicating hurts least with LAYERS = {report.mildest.order(depth)}")


if __name__ == "__main__":
    sys.exit(main())
