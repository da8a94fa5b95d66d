"""How answers are judged: what a task asks the model for, and the metrics that follow from it.

A metric of a row is a pair (sum, weight), and of a set of rows the ratio of their totals: accuracies weigh each row 1,
bits per byte weigh it by its bytes. A metric of the corpus, which is no mean over rows, is made of more sums. So any
resampling of rows has its value at once (`jaxlm.evaluation.intervals`).
"""

import abc
import collections
import dataclasses
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, override

import numpy as np

from jaxlm.data.prompts import Question
from jaxlm.evaluation.intervals import ratio
from jaxlm.evaluation.scoring import Score
from jaxlm.evaluation.text_model import TextModel

Metrics = dict[str, tuple[float, ...]]
"""What a row adds to the sums of each metric: (sum, weight), unless `Measure.value` says otherwise."""

LESS_IS_BETTER = frozenset(
    ("gold_nll", "gold_bits_per_byte", "cross_entropy", "perplexity", "word_perplexity", "bits_per_byte")
)
"""Of the metrics below; of the others more is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """What a model made of one question.

    Attributes:
      metrics: {name: what it adds to the metric's sums}.
      details: what to keep of it in the file of examples; JSON-able.
      dropped: tokens of contexts that had no room.
    """

    metrics: Metrics
    details: dict[str, Any]
    dropped: int = 0


class Measure(abc.ABC):
    """What is asked of a model, and how its answers are judged."""

    primary: str
    """The metric that stands for the task."""

    transforms: ClassVar[Mapping[str, Callable[[np.ndarray], np.ndarray]]] = {}
    """What is applied to a metric's ratio before it is shown: exp for perplexities."""

    @abc.abstractmethod
    def refuses(self, question: Question) -> str | None:
        """Why the question cannot be judged, such as a missing gold answer; None if it can."""

    @abc.abstractmethod
    def judge(self, model: TextModel, questions: Sequence[Question]) -> list[Judged]:
        """Asks the model all questions."""

    def chance(self, question: Question) -> float | None:
        """The expected value of `primary` for blind guesses; None where that has no meaning."""
        return None

    def value(self, metric: str, totals: np.ndarray) -> np.ndarray:
        """A metric of rows by what they add up to, [K, ...] -> [...]; nan where no row has it."""
        found, transform = ratio(totals), self.transforms.get(metric)
        with np.errstate(over="ignore"):  # one that overflows is infinite
            return found if transform is None else transform(found)


_NO_GOLD = "it does not say which choice is right"
_NO_ANSWER = "it has no right answer"


@dataclasses.dataclass(frozen=True)
class RankClassification(Measure):
    """The choice with the highest log-likelihood after the context (Brown et al. 2020, arXiv 2005.14165, 2.4).

    Also minimal pairs: two sentences as choices, after no context, of which the first is gold.

    Attributes:
      primary: "accuracy" ranks sums of log-probabilities; "accuracy_per_token" and "accuracy_per_byte" divide them by
        the choice's tokens or UTF-8 bytes; "accuracy_calibrated" subtracts each choice's log-likelihood after
        `unconditional` (PMI, Holtzman et al. 2021, arXiv 2104.08315).
      unconditional: a context that says nothing of the question, such as "Answer:"; None computes no calibrated
        accuracy, at half the cost.
    """

    primary: str = "accuracy"
    unconditional: str | None = None

    def __post_init__(self):
        known = ["accuracy", "accuracy_per_token", "accuracy_per_byte"]
        known += ["accuracy_calibrated"] if self.unconditional is not None else []
        if self.primary not in known:
            raise ValueError(
                f"RankClassification.primary={self.primary!r} is none of {known}; accuracy_calibrated needs "
                f"RankClassification.unconditional."
            )

    @override
    def refuses(self, question: Question) -> str | None:
        if len(question.choices) < 2:
            return f"it has {len(question.choices)} choices to rank"
        return _NO_GOLD if question.gold is None else None

    @override
    def chance(self, question: Question) -> float:
        return 1.0 / len(question.choices)

    @override
    def judge(self, model: TextModel, questions: Sequence[Question]) -> list[Judged]:
        pairs = [pair for question in questions for pair in question.pairs]
        scores = iter(model.score(pairs))
        alone: dict[str, float] = {}
        if self.unconditional is not None:
            texts = list(dict.fromkeys(text for _, text in pairs))
            found = model.score([(self.unconditional, text) for text in texts])
            alone = {text: score.total for text, score in zip(texts, found)}
        return [self._judged(question, [next(scores) for _ in question.choices], alone) for question in questions]

    def _judged(self, question: Question, scores: list[Score], alone: Mapping[str, float]) -> Judged:
        totals = [score.total for score in scores]
        ranked = {
            "accuracy": totals,
            "accuracy_per_token": [t / len(s.log_probabilities) for t, s in zip(totals, scores)],
            "accuracy_per_byte": [t / max(len(c.encode()), 1) for t, c in zip(totals, question.choices)],
        }
        if alone:
            ranked["accuracy_calibrated"] = [t - alone[c] for t, c in zip(totals, question.choices)]
        chosen = {name: max(range(len(values)), key=values.__getitem__) for name, values in ranked.items()}
        metrics = {name: (float(index == question.gold), 1.0) for name, index in chosen.items()}
        # Of the right choice; smoother than an accuracy where that is near chance.
        metrics["gold_nll"] = (-totals[question.gold], 1.0)
        size = max(len(question.choices[question.gold].encode()), 1)
        metrics["gold_bits_per_byte"] = (-totals[question.gold] / math.log(2.0), size)
        details = {"log_likelihoods": totals, "gold": question.gold, "chosen": chosen[self.primary]}
        if alone:
            details["unconditional"] = [alone[choice] for choice in question.choices]
        return Judged(metrics, details, sum(score.dropped for score in scores))


def _text_metrics(score: Score, text: str) -> Metrics:
    nats, tokens = -score.total, len(score.log_probabilities)
    return {
        "cross_entropy": (nats, tokens),
        "perplexity": (nats, tokens),
        "bits_per_byte": (nats / math.log(2.0), len(text.encode())),
        "word_perplexity": (nats, max(len(text.split()), 1)),
    }


@dataclasses.dataclass(frozen=True)
class Continuation(Measure):
    """The first right answer after the context: its likelihood, and whether greedy decoding gives it (LAMBADA)."""

    primary: str = "accuracy"
    transforms: ClassVar = {"perplexity": np.exp, "word_perplexity": np.exp}

    @override
    def refuses(self, question: Question) -> str | None:
        return None if question.answers else _NO_ANSWER

    @override
    def judge(self, model: TextModel, questions: Sequence[Question]) -> list[Judged]:
        scores = model.score([(question.contexts[0], question.answers[0]) for question in questions])
        return [
            Judged(
                {"accuracy": (float(score.is_greedy), 1.0), **_text_metrics(score, question.answers[0])},
                {"log_likelihood": score.total, "tokens": len(score.log_probabilities), "greedy": score.is_greedy},
                score.dropped,
            )
            for question, score in zip(questions, scores)
        ]


@dataclasses.dataclass(frozen=True)
class TextLikelihood(Measure):
    """Perplexity and bits per byte of whole texts, however long; the text is the question's answer."""

    primary: str = "bits_per_byte"
    transforms: ClassVar = {"perplexity": np.exp, "word_perplexity": np.exp}

    @override
    def refuses(self, question: Question) -> str | None:
        return None if question.answers and question.answers[0] else "it has no text"

    @override
    def judge(self, model: TextModel, questions: Sequence[Question]) -> list[Judged]:
        texts = [question.answers[0] for question in questions]
        return [
            Judged(
                _text_metrics(score, text),
                {"log_likelihood": score.total, "tokens": len(score.log_probabilities), "bytes": len(text.encode())},
            )
            for text, score in zip(texts, model.rolling(texts))
        ]


@dataclasses.dataclass(frozen=True)
class Generation(Measure):
    """The model writes an answer, which is compared with the right ones, the most similar of which counts.

    Attributes:
      primary: one of `metrics`.
      metrics: "exact_match" and "f1" of words, both without case, punctuation and articles (Rajpurkar et al. 2016,
        arXiv 1606.05250); "rouge1", "rouge2", "rougeL" (package rouge-score, F-measure with stemming); "sentence_bleu"
        and "chrf" (package sacrebleu, of each text; the mean over them); "corpus_bleu" (sacrebleu, of all texts
        together against all right answers, as papers report BLEU).
      max_new_tokens: at most so many.
      stop: texts at which an answer ends.
    """

    primary: str = "exact_match"
    metrics: tuple[str, ...] = ("exact_match", "f1")
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self):
        if "bleu" in self.metrics:
            raise ValueError(
                "Generation.metrics has 'bleu', which does not say of what; write corpus_bleu (of all texts together, "
                "as papers report it) or sentence_bleu (the mean over texts, which was called bleu before)."
            )
        if unknown := [name for name in self.metrics if name not in (*_SIMILARITIES, _CORPUS_BLEU)]:
            raise ValueError(
                f"Generation.metrics has {unknown[0]!r}; there are {sorted((*_SIMILARITIES, _CORPUS_BLEU))}."
            )
        if self.primary not in self.metrics:
            raise ValueError(f"Generation.primary={self.primary!r} is none of Generation.metrics, {self.metrics}.")

    @override
    def refuses(self, question: Question) -> str | None:
        return None if question.answers else _NO_ANSWER

    @override
    def judge(self, model: TextModel, questions: Sequence[Question]) -> list[Judged]:
        rows = {name: self._of_row(name) for name in self.metrics}  # packages are missed before work
        contexts = [question.contexts[0] for question in questions]
        texts = model.generate(contexts, max_new_tokens=self.max_new_tokens, stop=self.stop)
        return [
            Judged(
                {name: of(text, question.answers) for name, of in rows.items()},
                {"generated": text, "answers": list(question.answers)},
            )
            for question, text in zip(questions, texts)
        ]

    @override
    def value(self, metric: str, totals: np.ndarray) -> np.ndarray:
        return _corpus_bleu(totals) if metric == _CORPUS_BLEU else super().value(metric, totals)

    def _of_row(self, metric: str) -> Callable[[str, Sequence[str]], tuple[float, ...]]:
        """(text, right answers) -> what the row adds to the metric's sums."""
        if metric == _CORPUS_BLEU:
            return _bleu_counts()
        similarity = _SIMILARITIES[metric](metric)
        return lambda text, answers: (max(similarity(text, answer) for answer in answers), 1.0)


def _words(text: str) -> list[str]:
    """Words without case, punctuation and English articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(text: str, answer: str) -> float:
    """1 where both have the same words."""
    return float(_words(text) == _words(answer))


def f1(text: str, answer: str) -> float:
    """F1 of the bags of words; without words on either side, whether there are none on both."""
    ours, theirs = _words(text), _words(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs))


Similarity = Callable[[str, str], float]


def _missing(name: str, package: str) -> ValueError:
    return ValueError(
        f"The metric {name} needs the package {package}: python -m pip install -e '.[evaluation]' in the clone."
    )


def _rouge(name: str) -> Similarity:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing(name, "rouge-score") from error
    scorer = RougeScorer([name], use_stemmer=True)
    return lambda text, answer: scorer.score(answer, text)[name].fmeasure


def _sacrebleu(metric: str) -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise _missing(metric, "sacrebleu") from error
    return sacrebleu


def _of_sentence(name: str) -> Similarity:
    score = getattr(_sacrebleu(name), f"sentence_{name.removeprefix('sentence_')}")
    return lambda text, answer: score(text, [answer]).score


# Each makes the function when asked for it, and imports its package then.
_SIMILARITIES: dict[str, Callable[[str], Similarity]] = {
    "exact_match": lambda name: exact_match,
    "f1": lambda name: f1,
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), _rouge),
    **dict.fromkeys(("sentence_bleu", "chrf"), _of_sentence),
}

_CORPUS_BLEU = "corpus_bleu"


def _bleu_counts() -> Callable[[str, Sequence[str]], tuple[float, ...]]:
    """(text, right answers) -> lengths of text and nearest answer; n-grams of 1 to 4 that are right, and all."""
    bleu = _sacrebleu(_CORPUS_BLEU).BLEU()

    def counts(text: str, answers: Sequence[str]) -> tuple[float, ...]:
        found = bleu.corpus_score([text], [[answer] for answer in answers])
        return found.sys_len, found.ref_len, *found.counts, *found.totals

    return counts


def _corpus_bleu(totals: np.ndarray) -> np.ndarray:
    """BLEU (Papineni et al. 2002) of sums of `_bleu_counts`, [10, ...] -> [...]; nan of no text at all."""
    score = _sacrebleu(_CORPUS_BLEU).BLEU.compute_bleu

    def one(sums: np.ndarray) -> float:
        written, wanted, *counts = map(int, sums)
        # "exp" is what the package's own BLEU of a corpus does with orders of which nothing is right.
        return score(counts[:4], counts[4:], written, wanted, smooth_method="exp").score if wanted else math.nan

    return np.apply_along_axis(one, 0, totals)
