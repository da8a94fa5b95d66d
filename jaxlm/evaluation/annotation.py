"""What a finetuned model says of texts, written down for another one to learn from.

    FinetuningSweep("intents", labels, annotation=Annotation(texts="unlabelled.jsonl", output="taught.jsonl.gz"))

A file of such rows is a teacher's outputs computed once: a student's `SequenceClassification.taught` reads it
(pre-trained distillation, Turc et al. 2019, arXiv 1908.08962, 3), or whoever wants to look at what was said.
"""

import dataclasses
import gzip
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxlm.data.prompts import Row, text_of
from jaxlm.data.sources import TextFiles
from jaxlm.data.vocabularies import Vocabulary
from jaxlm.evaluation.labelled import LabelKind, Labelled, SequenceClassification
from jaxlm.evaluation.learned import Opened


@dataclasses.dataclass(frozen=True)
class Annotation:
    """Texts that a finetuned model gives probabilities of classes.

    Attributes:
      texts: path or glob of JSON lines or parquet; the kind's template makes the text, a label is not needed.
      output: JSON lines, packed if the name ends in .gz: each row as it was, and `field`.
      field: gets {class: probability}, probabilities to the last bit of float32.
    """

    texts: str
    output: str
    field: str = "taught"

    @property
    def source(self) -> TextFiles:
        """The texts' files."""
        return TextFiles(self.texts, held_out=0.0)

    def rows(self) -> Iterator[Row]:
        """All rows of the files, in order."""
        for shard in self.source.shards("train"):
            yield from self.source.read(shard)


def check(annotation: Annotation, labels: LabelKind) -> None:
    """Raises ValueError where labels of this kind cannot be written down."""
    if not isinstance(labels, SequenceClassification):
        raise ValueError(
            f"an Annotation gives probabilities of a text's classes, which {type(labels).__name__} has none of; use "
            f"SequenceClassification, or set the annotation to None"
        )


def annotate(
    annotation: Annotation,
    opened: Opened,
    vocabulary: Vocabulary,
    outputs_of: Callable[[dict[str, Any]], Any],
    *,
    chunk: int = 1024,
) -> tuple[int, int]:
    """Writes the file, whole or not at all.

    Args:
      annotation: which texts, and where to.
      opened: the task that the model was finetuned on.
      vocabulary: of the model.
      outputs_of: a batch on the devices -> logits [B, C].
      chunk: texts that are encoded together.

    Returns:
      (rows, those whose text lost its end).

    Raises:
      ValueError: a row has no text.
      OSError: there are no such files, or they cannot be written.
    """
    from scipy.special import softmax  # takes a second to import

    text, kind, size = text_of(opened.task.labels.text), opened.task.labels, opened.task.batch_size
    names, rows, cut = [str(name) for name in opened.classes], 0, 0
    path = pathlib.Path(annotation.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    pack = gzip.open if path.suffix == ".gz" else open
    try:
        with pack(unfinished, "wt", encoding="utf-8") as file:
            for taken in itertools.batched(annotation.rows(), chunk):
                ids = vocabulary.encode_batch([text(row) for row in taken])
                if empty := [i for i, each in enumerate(ids) if not len(each)]:
                    raise ValueError(f"row {rows + empty[0]} of {annotation.texts} has no text")
                examples = Labelled([(each,) for each in ids], [0] * len(ids))
                for start in range(0, len(ids), size):
                    chosen = range(start, min(start + size, len(ids)))
                    logits = np.asarray(outputs_of(opened.on_devices(examples, chosen)))
                    chances = softmax(kind.labelled(logits, examples, chosen, opened.rows), axis=-1)
                    for i, given in zip(chosen, chances):
                        said = {name: float(f"{p:.9g}") for name, p in zip(names, given)}
                        file.write(json.dumps(taken[i] | {annotation.field: said}, ensure_ascii=False) + "\n")
                rows += len(ids)
                cut += sum(len(each) > opened.rows.room for each in ids)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return rows, cut
