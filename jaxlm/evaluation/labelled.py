"""Labelled data as data: a text's class, the classes of its words, how similar two texts are.

    SequenceClassification(LabelledRows("data", train="train.jsonl", test="test.jsonl"), text="{{ text }}")
    TokenClassification(LabelledRows(...), words="tokens", labels="tags")
    SentenceSimilarity(LabelledRows(...), first="{{ sentence1 }}", second="{{ sentence2 }}", score="score")

A kind of label says what a row's texts and labels are, what a model's outputs are taken for, and the loss. Who learns,
a whole model (`finetuning.py`) or a linear probe (`probing.py`), is not its matter.
"""

import abc
import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.prompts import Row, TemplateError, text_of, value_of
from jaxlm.data.sources import TextFiles
from jaxlm.data.vocabularies import Vocabulary
from jaxlm.evaluation.text_rows import Batch, TextRows
from jaxlm.layers.context import Context
from jaxlm.layers.side_values import SideValues
from jaxlm.models.labeller import Labeller, Pooling, pooled

SPLITS = ("train", "validation", "test")
UNLABELLED = -1
"""In place of a class on columns that have none."""


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Rows of JSON lines or parquet, in three splits. Rates and strengths are chosen on "validation", never on "test".

    Attributes:
      folder: where the files are.
      train, test: paths or globs inside it.
      validation: the same; None holds a share of `train` out, by the hash of a row's place.
      held_out: that share.
      where: {split: Jinja expression} of the rows that belong to it, for files that hold several splits.
    """

    folder: str
    train: str
    test: str
    validation: str | None = None
    held_out: float = 0.1
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if unknown := set(self.where) - set(SPLITS):
            raise ValueError(f"LabelledRows.where names the splits {sorted(unknown)}; there are {', '.join(SPLITS)}.")

    def source(self, split: str) -> tuple[TextFiles, str]:
        """(files, which of their splits) of a split."""
        if split == "test":
            return TextFiles(os.path.join(self.folder, self.test), held_out=0.0), "train"
        validation = None if self.validation is None else os.path.join(self.folder, self.validation)
        return TextFiles(os.path.join(self.folder, self.train), validation, held_out=self.held_out), split

    def read(self, split: str, limit: int | None = None) -> list[Row]:
        """The rows of a split; with a limit so many of them, drawn at random but always the same.

        Raises:
          ValueError: there are none.
        """
        source, part = self.source(split)
        rows = [row for shard in source.shards(part) for row in source.read(shard)]
        if split in self.where:
            belongs = value_of(self.where[split])
            rows = [row for row in rows if belongs(row)]
        if not rows:
            raise ValueError(f"the split {split!r} has no rows")
        if limit is not None and limit < len(rows):
            chosen = np.random.default_rng(0).permutation(len(rows))[:limit]
            rows = [rows[i] for i in sorted(chosen.tolist())]
        return rows


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """A split as ids and labels.

    Attributes:
      texts: ids of each example's texts, one or two.
      labels: of each example: a class, a score, or an array of the classes of `places`.
      places: of each example, which tokens have a label, ascending; None where the example has one as a whole.
    """

    texts: list[tuple[np.ndarray, ...]]
    labels: list[Any]
    places: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(ids) for texts in self.texts for ids in texts)


class LabelKind(abc.ABC):
    """What rows are labelled with, and how a model's outputs are judged by it."""

    metrics: ClassVar[tuple[str, ...]]  # of `label_metrics.METRICS`
    texts_each: ClassVar[int] = 1

    rows: LabelledRows
    primary: str

    def __post_init__(self):
        if self.primary not in self.metrics:
            raise ValueError(f"{type(self).__name__}.primary is {self.primary!r}; it has {', '.join(self.metrics)}.")

    @abc.abstractmethod
    def read(self, vocabulary: Vocabulary, limit: int | None) -> tuple[dict[str, Labelled], tuple[Any, ...]]:
        """({split: examples}, the classes in order; () for scores). At most `limit` rows a split.

        Raises:
          ValueError: rows are missing, or one has no text or no label; the message names split and row.
        """

    def batch(self, examples: Labelled, chosen: Sequence[int], rows: TextRows, size: int) -> tuple[Batch, Batch]:
        """A batch of `size` examples, filled up with empty ones of weight 0.

        Returns:
          features of `TextRows.batch`, with `texts_each` rows an example one after the other; and "labels", "weights".
        """
        empty = (np.zeros(0, np.int32),) * self.texts_each
        texts = [examples.texts[i] for i in chosen] + [empty] * (size - len(chosen))
        return rows.batch([ids for both in texts for ids in both]), self._labels(examples, chosen, rows, size)

    @abc.abstractmethod
    def _labels(self, examples: Labelled, chosen: Sequence[int], rows: TextRows, size: int) -> Batch: ...

    @abc.abstractmethod
    def head_size(self, classes: Sequence[Any]) -> int | None:
        """Outputs of the head; None where there is no head."""

    @abc.abstractmethod
    def outputs(
        self, model: Labeller, batch: Mapping[str, jax.Array], pooling: Pooling, context: Context
    ) -> tuple[jax.Array, SideValues]:
        """What `loss` and `predictions` are taken of, float32, and the layers' side values."""

    @abc.abstractmethod
    def features(
        self, model: Labeller, batch: Mapping[str, jax.Array], pooling: Pooling, context: Context
    ) -> jax.Array:
        """What a linear probe reads, float32 [B, ...]; at a column each where columns are labelled."""

    @abc.abstractmethod
    def loss(self, outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The mean loss of the labels that count."""

    @abc.abstractmethod
    def labelled(self, outputs: np.ndarray, examples: Labelled, chosen: Sequence[int], rows: TextRows) -> np.ndarray:
        """The outputs [B, ...] that have a label, one after the other: [n, ...]."""

    @abc.abstractmethod
    def predictions(self, outputs: np.ndarray) -> np.ndarray:
        """Classes or scores [n] of outputs that have a label."""

    def gold(self, examples: Labelled, rows: TextRows) -> tuple[np.ndarray, np.ndarray]:
        """(labels [n] in the order of `labelled`, the example that each is of)."""
        return np.asarray(examples.labels), np.arange(len(examples))

    @abc.abstractmethod
    def chance(self, train: np.ndarray, test: np.ndarray) -> float | None:
        """What the primary metric is for who has seen labels alone."""


class _Classes(LabelKind):
    """What the two kinds of classification share."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")

    @override
    def head_size(self, classes):
        return len(classes)

    @override
    def loss(self, outputs, batch):
        labels, log_p = batch["labels"], jax.nn.log_softmax(outputs)
        if labels.ndim == outputs.ndim:  # distributions: what is left to learn of them, 0 for who has learnt all
            nats = (jax.scipy.special.xlogy(labels, labels) - labels * log_p).sum(-1)
        else:
            nats = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
        return _mean(nats, batch["weights"])

    @override
    def predictions(self, outputs):
        return np.nan_to_num(outputs).argmax(-1)

    @override
    def chance(self, train, test):
        from jaxlm.evaluation.label_metrics import METRICS

        commonest = np.full_like(test, np.bincount(train).argmax())
        return METRICS[self.primary](test, commonest, np.ones(len(test)))


@dataclasses.dataclass(frozen=True)
class SequenceClassification(_Classes):
    """A class for each text, from its pooled states.

    Attributes:
      rows: the data.
      text: Jinja template of the text; of several fields it is one text (a cross-encoder's pair).
      label: Jinja expression of its class: a number or a name.
      taught: Jinja expression of a distribution, {class: probability}, which is learnt on the training split in place
        of a class: what a teacher wrote (`annotation.Annotation`). None learns `label`, which judges in either case.
      primary: the metric that stands for it.
    """

    rows: LabelledRows
    text: str = "{{ text }}"
    label: str = "label"
    taught: str | None = None
    primary: str = "accuracy"

    @override
    def read(self, vocabulary, limit):
        text, label = text_of(self.text), value_of(self.label)
        of_split = {"train": value_of(self.taught)} if self.taught else {}

        def pairs_of(split: str) -> list[tuple[str, Any]]:
            value = of_split.get(split, label)
            return _rendered(self.rows, split, limit, lambda row: (text(row), value(row)))

        found = {split: pairs_of(split) for split in SPLITS}
        if self.taught:  # classes are keys of JSON, so texts
            judges = [label for split in SPLITS[1:] for _, label in found[split]]
            classes = _numbered((name for _, chances in found["train"][:1] for name in chances), like=judges)
            labels = {split: [(text, str(label)) for text, label in found[split]] for split in SPLITS[1:]}
            labels["train"] = [(text, _distribution(classes, of, i)) for i, (text, of) in enumerate(found["train"])]
        else:
            classes, labels = _numbered(label for _, label in found["train"]), found
        examples = {}
        for split, pairs in labels.items():
            texts = [(ids,) for ids in _encoded(vocabulary, [text for text, _ in pairs], split)]
            given = [label for _, label in pairs]
            if split not in of_split:
                given = [_index(classes, label, split, i) for i, label in enumerate(given)]
            examples[split] = Labelled(texts, given)
        return examples, tuple(classes)

    @override
    def _labels(self, examples, chosen, rows, size):
        labels = np.stack([np.asarray(examples.labels[i]) for i in chosen])
        filler = np.zeros((size - len(chosen), *labels.shape[1:]), labels.dtype)
        weights = (np.arange(size) < len(chosen)).astype(np.float32)
        dtype = np.int32 if labels.ndim == 1 else np.float32
        return {"labels": np.concatenate([labels, filler]).astype(dtype), "weights": weights}

    @override
    def gold(self, examples, rows):
        labels = np.asarray(examples.labels)
        return labels if labels.ndim == 1 else labels.argmax(-1), np.arange(len(examples))

    @override
    def features(self, model, batch, pooling, context):
        return pooled(model.token_states(batch, context=context)[0], batch["text"] > 0, pooling)

    @override
    def outputs(self, model, batch, pooling, context):
        hidden, side = model.token_states(batch, context=context)
        return model.head(pooled(hidden, batch["text"] > 0, pooling)), side

    @override
    def labelled(self, outputs, examples, chosen, rows):
        return outputs[: len(chosen)]


@dataclasses.dataclass(frozen=True)
class TokenClassification(_Classes):
    """A class for each word of a text, from the states at the last piece of the word.

    The last piece, since it is the only one at which a causal model has read the word. (BERT took the first, arXiv
    1810.04805, 5.3.) Words that the row has no room for are neither learnt nor judged, which results count.

    Attributes:
      rows: the data.
      words: Jinja expression of the list of words, or of a text whose characters are the words (proteins).
      labels: Jinja expression of their classes: a list, or a text with a character for each. A word whose class is null
        is read, but neither learnt nor judged.
      separator: stands before each word but the first.
      primary: the metric that stands for it.
    """

    rows: LabelledRows
    words: str = "tokens"
    labels: str = "labels"
    separator: str = " "
    primary: str = "accuracy"

    @override
    def read(self, vocabulary, limit):
        words, labels = value_of(self.words), value_of(self.labels)

        def both(row: Row) -> tuple[list[str], list[Any]]:
            found = list(words(row)), list(labels(row))
            if len(found[0]) != len(found[1]) or not found[0]:
                raise TemplateError(f"it has {len(found[0])} words and {len(found[1])} labels")
            return found

        found = {split: _rendered(self.rows, split, limit, both) for split in SPLITS}
        classes = _numbered(label for _, labels in found["train"] for label in labels if label is not None)
        return {split: self._encode(vocabulary, pairs, classes, split) for split, pairs in found.items()}, tuple(
            classes
        )

    def _encode(self, vocabulary: Vocabulary, pairs: list, classes: Mapping[Any, int], split: str) -> Labelled:
        forms = {form for words, _ in pairs for form in self._forms(words)}
        ids = dict(zip(forms, vocabulary.encode_batch(list(forms))))
        texts, labels, places = [], [], []
        for i, (words, given) in enumerate(pairs):
            pieces = [ids[form] for form in self._forms(words)]
            ends = np.cumsum([len(piece) for piece in pieces])
            kept = [k for k, piece in enumerate(pieces) if len(piece) and given[k] is not None]
            if not ends[-1]:
                raise ValueError(f"row {i} of the split {split!r} has no text")
            texts.append((np.concatenate(pieces).astype(np.int32),))
            places.append(ends[np.array(kept, np.int64)].astype(np.int32) - 1)
            labels.append(np.array([_index(classes, given[k], split, i) for k in kept], np.int32))
        return Labelled(texts, labels, places)

    def _forms(self, words: Sequence[str]) -> list[str]:
        return [word if i == 0 else self.separator + word for i, word in enumerate(words)]

    @override
    def _labels(self, examples, chosen, rows, size):
        labels = np.full((size, rows.length), UNLABELLED, np.int32)
        for row, i in enumerate(chosen):
            labels[row, rows.first + self._read(examples, i, rows)] = self._kept(examples, i, rows)
        return {"labels": labels, "weights": (labels != UNLABELLED).astype(np.float32)}

    def _read(self, examples: Labelled, i: int, rows: TextRows) -> np.ndarray:
        """Places of the words that a row has room for."""
        places = examples.places[i]
        return places[places < rows.room]

    def _kept(self, examples: Labelled, i: int, rows: TextRows) -> np.ndarray:
        return examples.labels[i][: len(self._read(examples, i, rows))]

    @override
    def features(self, model, batch, pooling, context):
        return model.token_states(batch, context=context)[0].astype(jnp.float32)

    @override
    def outputs(self, model, batch, pooling, context):
        hidden, side = model.token_states(batch, context=context)
        return model.head(hidden), side

    @override
    def labelled(self, outputs, examples, chosen, rows):
        return np.concatenate(
            [outputs[row, rows.first + self._read(examples, i, rows)] for row, i in enumerate(chosen)]
        )

    @override
    def gold(self, examples, rows):
        kept = [self._kept(examples, i, rows) for i in range(len(examples))]
        return np.concatenate(kept), np.repeat(np.arange(len(kept)), [len(labels) for labels in kept])


@dataclasses.dataclass(frozen=True)
class SentenceSimilarity(LabelKind):
    """How similar two texts are: the cosine of their pooled states, read one apart from the other.

    The standard form for sentence vectors (a bi-encoder): trained by squared error of the cosine (Reimers and Gurevych
    2019, arXiv 1908.10084, 3), judged by Spearman's correlation (4.1 there). A pair that is read as one text, a
    cross-encoder's, is `SequenceClassification` with both in its template.

    Attributes:
      rows: the data.
      first, second: Jinja templates of the two texts.
      score: Jinja expression of the gold similarity.
      low, high: scores of unrelated and of equal texts, which become 0 and 1 (STS: 0 and 5).
      primary: the metric that stands for it.
    """

    metrics: ClassVar[tuple[str, ...]] = ("spearman", "pearson")
    texts_each: ClassVar[int] = 2

    rows: LabelledRows
    first: str = "{{ sentence1 }}"
    second: str = "{{ sentence2 }}"
    score: str = "score"
    low: float = 0.0
    high: float = 1.0
    primary: str = "spearman"

    def __post_init__(self):
        super().__post_init__()
        if not self.low < self.high:
            raise ValueError(f"SentenceSimilarity needs low < high, got {self.low} and {self.high}.")

    @override
    def read(self, vocabulary, limit):
        first, second, score = text_of(self.first), text_of(self.second), value_of(self.score)

        def parts(row: Row) -> tuple[str, str, float]:
            found = score(row)
            try:
                return first(row), second(row), (float(found) - self.low) / (self.high - self.low)
            except (TypeError, ValueError) as error:
                raise TemplateError(f"its score {found!r} is no number") from error

        examples = {}
        for split in SPLITS:
            rows = _rendered(self.rows, split, limit, parts)
            if not all(-1e-6 <= row[2] <= 1 + 1e-6 for row in rows):
                raise ValueError(
                    f"the split {split!r} has scores outside {self.low} to {self.high}; set SentenceSimilarity.low and "
                    f"high to the scale's ends"
                )
            texts = [_encoded(vocabulary, [row[i] for row in rows], split) for i in (0, 1)]
            examples[split] = Labelled(list(zip(*texts)), [row[2] for row in rows])
        return examples, ()

    @override
    def head_size(self, classes):
        return None

    @override
    def _labels(self, examples, chosen, rows, size):
        labels, weights = np.zeros(size, np.float32), np.zeros(size, np.float32)
        labels[: len(chosen)] = [examples.labels[i] for i in chosen]
        weights[: len(chosen)] = 1.0
        return {"labels": labels, "weights": weights}

    @override
    def features(self, model, batch, pooling, context):
        vectors = self._vectors(model, batch, pooling, context)[0]
        first, second = vectors[:, 0], vectors[:, 1]
        # SentEval's features of a pair (arXiv 1803.05449, 2), both symmetric.
        return jnp.concatenate([jnp.abs(first - second), first * second], axis=-1)

    @override
    def outputs(self, model, batch, pooling, context):
        vectors, side = self._vectors(model, batch, pooling, context)
        norms = jnp.linalg.norm(vectors + 1e-12, axis=-1)
        return (vectors[:, 0] * vectors[:, 1]).sum(-1) / jnp.maximum(norms[:, 0] * norms[:, 1], 1e-6), side

    def _vectors(self, model, batch, pooling, context) -> tuple[jax.Array, SideValues]:
        """[B, 2, E]."""
        hidden, side = model.token_states(batch, context=context)
        vectors = pooled(hidden, batch["text"] > 0, pooling)
        return vectors.reshape(-1, 2, vectors.shape[-1]), side

    @override
    def loss(self, outputs, batch):
        return _mean(jnp.square(outputs - batch["labels"]), batch["weights"])

    @override
    def labelled(self, outputs, examples, chosen, rows):
        return outputs[: len(chosen)]

    @override
    def predictions(self, outputs):
        return np.nan_to_num(outputs)

    @override
    def chance(self, train, test):
        return 0.0


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)


def _rendered(source: LabelledRows, split: str, limit: int | None, parts: Any) -> list[Any]:
    found = []
    for i, row in enumerate(source.read(split, limit)):
        try:
            found.append(parts(row))
        except TemplateError as error:
            raise ValueError(f"row {i} of the split {split!r}: {error}") from error
    return found


def _encoded(vocabulary: Vocabulary, texts: list[str], split: str) -> list[np.ndarray]:
    encoded = vocabulary.encode_batch(texts)
    if empty := [i for i, ids in enumerate(encoded) if not len(ids)]:
        raise ValueError(f"row {empty[0]} of the split {split!r} has no text")
    return encoded


def _numbered(labels: Iterable[Any], like: Sequence[Any] = ()) -> dict[Any, int]:
    """{class: its index}, in order: the numbers' that texts name, where what they are `like` are numbers."""
    found = set(labels)
    if len(found) < 2:
        raise ValueError(f"the training rows have the labels {sorted(found, key=str)} alone; there is nothing to learn")
    ordered = sorted(found) if len({type(label) for label in found}) == 1 else sorted(found, key=str)
    if like and all(isinstance(label, int | float) for label in like):
        with contextlib.suppress(ValueError):  # what names no number is no label's, which the first label will say
            ordered = sorted(found, key=float)
    return {label: i for i, label in enumerate(ordered)}


def _distribution(classes: Mapping[str, int], chances: Any, row: int) -> np.ndarray:
    """Probabilities [C] in the order of the classes."""
    if not isinstance(chances, Mapping) or set(chances) != set(classes):
        given = f"the classes {', '.join(map(str, chances))[:60]}" if isinstance(chances, Mapping) else repr(chances)
        raise ValueError(
            f"row {row} of the split 'train' teaches {given}, but must give a probability for each of the "
            f"{len(classes)} classes of row 0"
        )
    found = np.array([chances[name] for name in classes], np.float32)
    if not (found >= 0).all() or abs(found.sum() - 1.0) > 1e-3:
        raise ValueError(f"row {row} of the split 'train' has probabilities that sum to {found.sum():g} and not to 1")
    return found


def _index(classes: Mapping[Any, int], label: Any, split: str, row: int) -> int:
    if label not in classes:
        raise ValueError(f"row {row} of the split {split!r} has the label {label!r}, which no training row has")
    return classes[label]
