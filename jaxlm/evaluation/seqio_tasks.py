"""Evaluation tasks in seqio's registries, with metric functions, so that seqio's evaluator and T5X's run them.

    names = register_with_seqio(config.tasks, vocabulary)
    evaluator = seqio.Evaluator(names["copa"], seqio.EncDecFeatureConverter(pack=False), eval_split="validation")
    metrics, _ = evaluator.evaluate(compute_metrics=True, **model_functions(text_model))

Rank classification has a row for each choice, under T5's names ("idx": question and choice, "is_correct"), and a
metric function of scores; generation a row for each question, and one of predictions. The judgement is that of
`jaxlm.evaluation.measures`, given the model's answers: the same numbers as `evaluate_task` has by one prompt.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data.prompts import Question
from jaxlm.data.vocabularies import Vocabulary
from jaxlm.evaluation.intervals import estimate
from jaxlm.evaluation.measures import Continuation, Generation, Measure, RankClassification
from jaxlm.evaluation.tasks import Asked, EvaluationTask, TaskError, ask, task_templates
from jaxlm.evaluation.text_model import TextModel, until
from jaxlm.objectives.supervised import Eos

# What a score does not tell: whether greedy decoding gives the text.
_UNTOLD = {Continuation: ("accuracy",)}


def register_with_seqio(
    tasks: Iterable[EvaluationTask],
    vocabulary: Vocabulary,
    *,
    eos: Eos = Eos.TARGETS,
    report: Callable[[str], None] = print,
) -> dict[str, str]:
    """Puts evaluation tasks into seqio's registries.

    A task with several prompts becomes a seqio mixture of its name, of a task for each prompt ("<task>_<prompt>"); the
    median over them is for the caller to take. Rows are read and templates rendered when seqio first reads a task.

    Args:
      tasks: which.
      vocabulary: the model's.
      eos: which texts end with the end-of-text id, as in finetuning (`Supervised.eos`): T0's targets, or T5's both.
      report: is given a line for each of the first rows that a template fails on.

    Returns:
      {task: its name in seqio's registries}.

    Raises:
      TaskError: seqio's rows cannot express the task's measure, its templates cannot be read, or seqio knows its name.
    """
    from jaxlm.data import seqio_bridge  # TensorFlow

    names = {}
    for task in tasks:
        if not isinstance(task.measure, RankClassification | Continuation | Generation):
            raise TaskError(
                f"Task {task.name} is judged by {type(task.measure).__name__}, which seqio's rows of inputs and "
                f"targets cannot express; evaluate it with jaxlm.evaluate."
            )
        try:
            prompts = [template.name for template in task_templates(task)]
            asked = functools.cache(functools.partial(ask, task, report))
            by_prompt = [_Prompted(task.measure, asked, prompt) for prompt in prompts]
            alone = len(prompts) == 1
            questions = [
                seqio_bridge.SeqioQuestions(
                    task.name if alone else f"{task.name}/{prompt.name}", task.split, prompt.rows, (prompt.metric_fn,)
                )
                for prompt in by_prompt
            ]
            seqio_bridge.register_questions(questions, vocabulary, eos=eos, mixture=None if alone else task.name)
        except ValueError as error:
            raise error if isinstance(error, TaskError) else TaskError(f"Task {task.name}: {error}") from error
        names[task.name] = seqio_bridge.seqio_name(task.name)
    return names


@dataclasses.dataclass(frozen=True)
class _Told:
    """A `Score` of which the sum is known."""

    total: float
    tokens: int
    dropped: int = 0
    is_greedy: bool = False

    @property
    def log_probabilities(self) -> range:
        """As many as there are tokens; their values are not known."""
        return range(self.tokens)


class _Recorder:
    """Stands for a model to find out what a measure asks of one."""

    def __init__(self):
        self.asked: list[tuple[str, str]] = []

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[_Told]:
        self.asked += pairs
        return [_Told(0.0, 1)] * len(pairs)


class _Replay:
    """Stands for a model whose answers are known, in the order in which they are asked for."""

    def __init__(self, answers: Iterator[Any]):
        self._answers = answers

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[_Told]:
        return [next(self._answers) for _ in pairs]

    def generate(self, contexts: Sequence[str], *, stop: Sequence[str], **unused) -> list[str]:
        stop = tuple(text for text in stop if text)
        return [until(next(self._answers), stop) for _ in contexts]


class _Prompted:
    """A task by one of its prompts, as seqio's rows and metric function."""

    def __init__(self, measure: Measure, asked: Callable[[], Asked], name: str):
        self.name, self._measure, self._asked = name, measure, asked
        self.metric_fn = self._of_predictions if isinstance(measure, Generation) else self._of_scores

    @functools.cached_property
    def _questions(self) -> list[Question]:
        return list(self._asked().questions[self.name].values())

    def _requests(self, question: Question) -> list[tuple[str, str]]:
        """The (inputs, targets) that a question needs answers to."""
        if isinstance(self._measure, Generation):
            return [(question.contexts[0], question.answers[0])]
        recorder = _Recorder()
        self._measure.judge(recorder, [question])
        return recorder.asked

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all questions, one question after the other."""
        rows = []
        for i, question in enumerate(self._questions):
            for k, (context, text) in enumerate(self._requests(question)):
                right = k == question.gold if question.choices else True
                rows.append({"inputs": context, "targets": text, "idx": (i, k), "is_correct": right})
        if not rows:
            raise TaskError(f"The prompt {self.name!r} applies to no row; leave it out by naming the others.")
        return rows

    def _of_scores(self, targets: Sequence[Any], scores: Sequence[float]) -> dict[str, float]:
        return self._metrics(
            {idx: _Told(float(score), tokens) for (idx, tokens), score in zip(targets, scores, strict=True)}
        )

    def _of_predictions(self, targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
        return self._metrics({idx: text for (idx, _), text in zip(targets, predictions, strict=True)})

    def _metrics(self, answers: Mapping[tuple[int, int], Any]) -> dict[str, float]:
        """The metrics of the questions that were answered whole: an evaluator may take the first rows alone."""
        judged = []
        for i, question in enumerate(self._questions):
            mine = [(i, k) for k in range(len(self._requests(question)))]
            if all(idx in answers for idx in mine):
                judged += self._measure.judge(_Replay(answers[idx] for idx in mine), [question])
        if not judged:
            raise TaskError(f"By prompt {self.name!r} no question was answered whole; evaluate more rows.")
        found = {}
        for name in judged[0].metrics:
            if name not in _UNTOLD.get(type(self._measure), ()):
                statistics = np.array([[judgement.metrics[name]] for judgement in judged]).T
                value = functools.partial(self._measure.value, name)
                found[name] = estimate(statistics, samples=0, seed=0, value=value).value
        return found


def model_functions(model: TextModel, *, max_new_tokens: int = 64) -> dict[str, Callable[..., Any]]:
    """`score_fn` and `predict_fn` of `seqio.Evaluator.evaluate` for a model of ours.

    They read what seqio's converters make of a row without packing: `EncDecFeatureConverter` for an encoder-decoder,
    `PrefixLMFeatureConverter` for decoders.

    Args:
      model: whom to ask.
      max_new_tokens: of a prediction.
    """

    def score(dataset: Any, model_feature_shapes: Any = None) -> list[tuple[int, float]]:
        del model_feature_shapes
        numbers, pairs = _pairs(dataset)
        return [(number, score.total) for number, score in zip(numbers, model.score_ids(pairs), strict=True)]

    def predict(dataset: Any, model_feature_shapes: Any = None) -> list[tuple[int, list[int]]]:
        del model_feature_shapes
        numbers, pairs = _pairs(dataset)
        written = model.generate_ids([inputs for inputs, _ in pairs], max_new_tokens=max_new_tokens)
        # Of one length, since seqio makes an array of them.
        return [(number, [*map(int, ids), *[0] * (max_new_tokens - len(ids))]) for number, ids in zip(numbers, written)]

    return {"score_fn": score, "predict_fn": predict}


def _pairs(dataset: Any) -> tuple[list[int], list[tuple[np.ndarray, np.ndarray]]]:
    """Numbers of the rows and their (inputs, targets), of an enumerated dataset of seqio's features."""
    numbers, pairs = [], []
    for number, features in dataset.as_numpy_iterator():
        targets, weights = features["decoder_target_tokens"], features["decoder_loss_weights"]
        first, last = np.flatnonzero(weights)[[0, -1]]
        inputs = features.get("encoder_input_tokens")
        inputs = targets[:first] if inputs is None else inputs[: np.flatnonzero(inputs).max(initial=-1) + 1]
        numbers.append(int(number))
        pairs.append((inputs.astype(np.int32), targets[first : last + 1].astype(np.int32)))
    return numbers, pairs
