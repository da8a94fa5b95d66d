"""Evaluation tasks as data: where rows come from, how they become questions, how answers are judged.

    EvaluationTask(
        name="copa",
        source=rows_in("eval", validation="copa/validation.jsonl.gz"),
        prompts=(PromptsourceTemplates("templates", "super_glue/copa"),),
        measure=RankClassification(),
    )

A task with several prompts has the median over them as its result, and their spread (Sanh et al. 2022, arXiv
2110.08207, 6.1). A template that fails on a row leaves that row out; more than 1% of such rows stop the task.
"""

import collections
import dataclasses
import fnmatch
import functools
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from jaxlm.data.prompts import Prompts, Question, QuestionTemplate, Row, TemplateError, row_name
from jaxlm.data.sources import ArrayRecordSource, Source, TextFiles
from jaxlm.evaluation.intervals import Estimate, estimate
from jaxlm.evaluation.measures import Judged, Measure
from jaxlm.evaluation.subject import Subject
from jaxlm.evaluation.text_model import TextModel

_FAILING_SHARE = 0.01
_FAILURES_SHOWN = 5


class TaskError(ValueError):
    """A task cannot be evaluated; others can."""


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Solved examples before the question.

    Attributes:
      count: how many.
      split: of the task's source that they are drawn from; never the question itself.
      seed: which ones; a row gets the same whatever else is evaluated.
      separator: stands after each example.
    """

    count: int
    split: str = "train"
    seed: int = 0
    separator: str = "\n\n"

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"FewShot.count must be at least 1, not {self.count}; None is no FewShot.")


@dataclasses.dataclass(frozen=True)
class EvaluationTask:
    """A task.

    Attributes:
      name: what results call it.
      source: of rows; see `rows_in`.
      prompts: templates for them.
      measure: what is asked, and how it is judged.
      split: of the source.
      few_shot: solved examples before each question, or None.
      group: field of a row by which metrics are given apart as well (a domain, a paradigm); two make a grid; or None.
      limit: take only the first so many rows; None takes all.
    """

    name: str
    source: Source
    prompts: tuple[Prompts, ...]
    measure: Measure
    split: str = "validation"
    few_shot: FewShot | None = None
    group: str | tuple[str, str] | None = None
    limit: int | None = None

    def __post_init__(self):
        if not self.prompts:
            raise ValueError(f"EvaluationTask {self.name!r} has no prompts; give at least one.")

    def evaluate(
        self, subject: Subject, *, samples: int = 1000, seed: int = 0, report: Callable[[str], None] = print
    ) -> tuple["TaskResult", Iterator[dict[str, Any]]]:
        """`evaluate_task` of a model as the suite has it."""
        return evaluate_task(self, subject.text_model, samples=samples, seed=seed, report=report)

    @property
    def writes(self) -> tuple[str, ...]:
        """Files that other tasks may read."""
        return ()

    def check(self, written: Collection[str] = ()) -> None:
        """Looks whether templates and files are there, before a model is: what can be seen without reading rows.

        Args:
          written: files that are made before the task is asked.

        Raises:
          TaskError: they are not; the message has task and path.
        """
        try:
            task_templates(self)
            for split in (self.split, *([self.few_shot.split] if self.few_shot else [])):
                check_files(self.source, split, written)
        except (ValueError, OSError) as error:
            raise error if isinstance(error, TaskError) else TaskError(f"Task {self.name}: {error}") from error


def check_files(source: Source, split: str, written: Collection[str] = ()) -> None:
    """Whether a split's files are there, of sources that are files on disk; others are not looked at.

    Raises:
      ValueError: they are not, and none of them is among those `written` later.
    """
    if isinstance(source, TextFiles):
        pattern = source.validation if split == "validation" and source.validation else source.pattern
        patterns = (pattern,) if isinstance(pattern, str) else pattern
        if any(_reads(one, path) for path in written for one in patterns):
            return
    if isinstance(source, TextFiles | ArrayRecordSource):
        source.shards(split)


def _reads(pattern: str, path: str) -> bool:
    """Whether a pattern of `TextFiles`, a glob or a folder, is of a file that is not there yet."""
    pattern, path = (os.path.abspath(os.path.expanduser(one)) for one in (pattern, path))
    globs = (pattern, pattern.replace("/**/", "/"))
    return path.startswith(pattern + os.sep) or any(fnmatch.fnmatch(path, one) for one in globs)


def rows_in(folder: str, validation: str, train: str | None = None) -> TextFiles:
    """Rows of JSON-lines or parquet files in a folder.

    Args:
      folder: where the files are.
      validation: the rows to evaluate, a path or glob inside it.
      train: those that few-shot examples are drawn from; None is the same ones.
    """
    return TextFiles(
        pattern=os.path.join(folder, train or validation), validation=os.path.join(folder, validation), held_out=0.0
    )


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a model reached on a task.

    Attributes:
      task: its name.
      primary: the metric that stands for it.
      metrics: {metric: estimate}, the median over prompts.
      prompts: {prompt: {metric: value}}.
      groups: {group: {metric: estimate}}; of two fields, their values with a comma between.
      grid: {first field's value: {second's: primary metric}} where groups are by two fields.
      chance: of blind guesses in the primary metric, or None.
      rows: read.
      questions: asked, all prompts together.
      not_applicable: questions that a template did not apply to.
      failed: questions that failed to render.
      truncated: questions whose context lost its beginning.
    """

    task: str
    primary: str
    metrics: dict[str, Estimate]
    prompts: dict[str, dict[str, float]]
    groups: dict[str, dict[str, Estimate]]
    grid: dict[str, dict[str, float]]
    chance: float | None
    rows: int
    questions: int
    not_applicable: int
    failed: int
    truncated: int

    @property
    def notes(self) -> tuple[str, str, str, str]:
        """For a table: prompts, their spread, questions, what was left out."""
        values = [metrics[self.primary] for metrics in self.prompts.values()]
        spread = "" if len(values) == 1 else f"{min(values):.4f} to {max(values):.4f}"
        counts = {"left out": self.failed, "not applicable": self.not_applicable, "truncated": self.truncated}
        left = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return str(len(values)), spread, str(self.questions), left


def evaluate_task(
    task: EvaluationTask,
    model: TextModel,
    *,
    samples: int = 1000,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> tuple[TaskResult, Iterator[dict[str, Any]]]:
    """Evaluates a model on a task.

    Args:
      task: what to ask.
      model: whom.
      samples: bootstrap resamplings for intervals; 0 gives none.
      seed: of these.
      report: is given a line for each of the first rows that fail to render.

    Returns:
      the result, and a JSON-able record for every question.

    Raises:
      TaskError: too many rows fail, rows have no gold answers, or there is nothing that the model can be asked.
    """
    asked = ask(task, report)
    rows = asked.rows
    judged: dict[str, dict[int, Judged]] = {}
    chances: list[float] = []
    for name, questions in asked.questions.items():
        chances += [c for c in (task.measure.chance(q) for q in questions.values()) if c is not None]
        try:
            judged[name] = dict(zip(questions, task.measure.judge(model, list(questions.values()))))
        except ValueError as error:
            raise TaskError(f"Task {task.name}: {error}") from error
    groups = {
        values: _estimates(task, judged, members, samples, seed)
        for values, members in _groups(task, rows, judged).items()
    }
    grid: dict[str, dict[str, float]] = {}
    for values, metrics in groups.items() if isinstance(task.group, tuple) else ():
        grid.setdefault(values[0], {})[values[1]] = metrics[task.measure.primary].value
    result = TaskResult(
        task=task.name,
        primary=task.measure.primary,
        metrics=_estimates(task, judged, range(len(rows)), samples, seed),
        prompts={
            name: {metric: e.value for metric, e in _estimates(task, {name: found}, range(len(rows)), 0, seed).items()}
            for name, found in judged.items()
            if found
        },
        groups={", ".join(values): metrics for values, metrics in groups.items()},
        grid=grid,
        chance=float(np.mean(chances)) if chances else None,
        rows=len(rows),
        questions=sum(map(len, judged.values())),
        not_applicable=asked.not_applicable,
        failed=asked.failed,
        truncated=sum(j.dropped > 0 for found in judged.values() for j in found.values()),
    )
    return result, _records(task, rows, judged)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task's questions.

    Attributes:
      rows: read.
      questions: {prompt: {row's index: question}}.
      not_applicable: questions that a template did not apply to.
      failed: questions that failed to render.
    """

    rows: Sequence[Row]
    questions: dict[str, dict[int, Question]]
    not_applicable: int
    failed: int


def ask(task: EvaluationTask, report: Callable[[str], None] = print) -> Asked:
    """The questions of a task, solved examples included, before any model.

    Args:
      task: whose.
      report: is given a line for each of the first rows that fail to render.

    Raises:
      TaskError: as `evaluate_task`.
    """
    try:
        rows = list(_rows(task, task.split, task.limit))
        templates = task_templates(task)
        shots = _Shots(task) if task.few_shot else None
    except (ValueError, OSError) as error:
        raise error if isinstance(error, TaskError) else TaskError(f"Task {task.name}: {error}") from error
    if not rows:
        raise TaskError(f"Task {task.name} has no rows in the split {task.split!r}.")
    asking, questions = _Asking(task, report), {}
    for template in templates:
        found = asking.questions(template, rows)
        if shots:
            found = {i: shots.before(question, i, template) for i, question in found.items()}
        questions[template.name] = found
    if not any(questions.values()):
        raise TaskError(f"Task {task.name}: no template applies to any row.")
    return Asked(rows, questions, asking.not_applicable, asking.failed)


def task_templates(task: EvaluationTask) -> list[QuestionTemplate]:
    """A task's templates, of different names.

    Raises:
      ValueError: there are none, or two have the same name.
    """
    templates = [template for prompts in task.prompts for template in prompts.templates()]
    if twice := [n for n, k in collections.Counter(t.name for t in templates).items() if k > 1]:
        raise TaskError(f"Task {task.name} has two prompts of the name {twice[0]!r}; give each its own.")
    return templates


class _Asking:
    """Makes questions of rows, and counts what does not become one."""

    def __init__(self, task: EvaluationTask, report: Callable[[str], None]):
        self._task, self._report = task, report
        self.failed = self.not_applicable = 0

    def questions(self, template: QuestionTemplate, rows: Sequence[Row]) -> dict[int, Question]:
        """{row: question}, of the rows that give one."""
        found, failed = {}, 0
        for index, row in enumerate(rows):
            try:
                question = template.question(row)
            except TemplateError as error:
                failed += 1
                if self.failed + failed <= _FAILURES_SHOWN:
                    self._report(f"{self._task.name}: {row_name(index, row)} left out, {error}")
                continue
            if question is None:
                self.not_applicable += 1
            elif reason := self._task.measure.refuses(question):
                raise TaskError(
                    f"Task {self._task.name} cannot be judged: {row_name(index, row)} by prompt {template.name!r} "
                    f"gives a question, but {reason}; use a split with gold answers, or correct the prompt."
                )
            else:
                found[index] = question
        self.failed += failed
        if failed > _FAILING_SHARE * len(rows):
            raise TaskError(
                f"Task {self._task.name} stopped: prompt {template.name!r} fails on {failed} of {len(rows)} rows, more "
                f"than {_FAILING_SHARE:.0%}; correct the prompt or the rows."
            )
        return found


class _Shots:
    """Solved examples."""

    def __init__(self, task: EvaluationTask):
        self._task, self._few = task, task.few_shot
        self._rows = list(_rows(task, self._few.split, None))
        if len(self._rows) <= self._few.count:
            raise ValueError(
                f"FewShot.count is {self._few.count}, but the split {self._few.split!r} has only {len(self._rows)} "
                f"rows."
            )

    def before(self, question: Question, index: int, template: QuestionTemplate) -> Question:
        """The question after its examples."""
        order = random.Random(f"{self._few.seed}/{index}")
        text, wanted = "", self._few.count
        # Rows without an answer, or that the template cannot use, are passed over.
        for other in order.sample(range(len(self._rows)), len(self._rows)):
            if not wanted:
                break
            try:
                solved = template.question(self._rows[other])
            except TemplateError:
                continue
            # Another split may hold the very row, or the same one twice.
            if solved is None or solved == question or (answer := solved.right_answer) is None:
                continue
            text += " ".join(part for part in answer if part) + self._few.separator
            wanted -= 1
        if wanted:
            raise TaskError(f"Task {self._task.name} has too few solved examples in the split {self._few.split!r}.")
        return dataclasses.replace(question, contexts=tuple(text + context for context in question.contexts))


def _rows(task: EvaluationTask, split: str, limit: int | None) -> Iterator[Row]:
    count = 0
    for shard in task.source.shards(split):
        for row in task.source.read(shard):
            if limit is not None and count >= limit:
                return
            count += 1
            yield row


def _estimates(
    task: EvaluationTask, judged: dict[str, dict[int, Judged]], members: Sequence[int], samples: int, seed: int
) -> dict[str, Estimate]:
    """The metrics of some rows."""
    place = {row: i for i, row in enumerate(members)}
    asked = [found for found in judged.values() if any(row in place for row in found)]
    sums = next(iter(asked[0].values())).metrics if asked else {}
    result = {}
    for name, first in sums.items():
        statistics = np.zeros((len(first), len(asked), len(place)))
        for prompt, found in enumerate(asked):
            for row, judgement in found.items():
                if row in place:
                    statistics[:, prompt, place[row]] = judgement.metrics[name]
        value = functools.partial(task.measure.value, name)
        result[name] = estimate(statistics, samples=samples, seed=seed, value=value)
    return result


def _groups(
    task: EvaluationTask, rows: Sequence[Row], judged: dict[str, dict[int, Judged]]
) -> dict[tuple[str, ...], list[int]]:
    groups: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    if task.group is not None:
        for index in sorted({row for found in judged.values() for row in found}):
            groups[tuple(map(str, _group(task, index, rows[index])))].append(index)
    return groups


def _group(task: EvaluationTask, index: int, row: Row) -> tuple[Any, ...]:
    """The values of the fields that rows are grouped by."""
    fields = (task.group,) if isinstance(task.group, str) else task.group or ()
    if missing := [field for field in fields if field not in row]:
        raise TaskError(f"Task {task.name}: row {index} has no {missing[0]!r}, the field to group by.")
    return tuple(row[field] for field in fields)


def _records(
    task: EvaluationTask, rows: Sequence[Row], judged: dict[str, dict[int, Judged]]
) -> Iterator[dict[str, Any]]:
    for prompt, found in judged.items():
        for index, judgement in found.items():
            group = _group(task, index, rows[index])
            yield {
                "task": task.name,
                "prompt": prompt,
                "row": index,
                **({"group": group[0] if len(group) == 1 else group} if group else {}),
                **judgement.details,
                "metrics": {name: list(pair) for name, pair in judgement.metrics.items()},
                **({"dropped": judgement.dropped} if judgement.dropped else {}),
            }
