"""Several tasks in one go: their configuration, the table, and the files that remain."""

import dataclasses
import json
import os
import pathlib
import traceback
from collections.abc import Callable, Container, Iterable
from typing import Any

import rich.box
from rich.table import Table
from rich.text import Text

from jaxlm.checkpoints.pretrained import Pretrained
from jaxlm.evaluation.intervals import Estimate
from jaxlm.evaluation.learned import LearnedResult, LearnedTask
from jaxlm.evaluation.scoring import ScoringConfig
from jaxlm.evaluation.subject import Subject
from jaxlm.evaluation.tasks import EvaluationTask, TaskError, TaskResult
from jaxlm.evaluation.text_model import TextFormat
from jaxlm.parallel.parallelism import ParallelConfig

Task = EvaluationTask | LearnedTask
Result = TaskResult | LearnedResult


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What a model is asked.

    Attributes:
      tasks: questions, finetuning sweeps and probes, in the order of the table; names differ.
      format: how texts are put to the model; None: as `TextFormat` has it.
      scoring: rows and batches; None: as `ScoringConfig` has it.
      context_length: tokens that the model reads; None is what it says of itself.
      samples: bootstrap resamplings for intervals; 0 gives none.
      seed: of these.
      limit: rows of each task, the first ones; None takes what the tasks say.
      parallel: the mesh to put the model on; None is one device.
    """

    tasks: tuple[Task, ...]
    format: TextFormat | None = None
    scoring: ScoringConfig | None = None
    context_length: int | None = None
    samples: int = 1000
    seed: int = 0
    limit: int | None = None
    parallel: ParallelConfig | None = None

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"EvaluationConfig.tasks needs tasks of different names, got {names}.")

    def only(self, names: Iterable[str]) -> "EvaluationConfig":
        """The same with these tasks alone.

        Raises:
          ValueError: there is no such task.
        """
        found = {task.name: task for task in self.tasks}
        names = list(names)
        if unknown := [name for name in names if name not in found]:
            raise ValueError(f"There is no task {unknown[0]!r} among {sorted(found)}.")
        return dataclasses.replace(self, tasks=tuple(found[name] for name in names))


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """What a model reached.

    Attributes:
      model: the folder it was read from.
      results: of the tasks that were evaluated.
      failures: {task: sentence} of the others.
      known: {task: result as JSON has it} of tasks that had been evaluated before.
    """

    model: str
    results: tuple[Result, ...]
    failures: dict[str, str]
    known: dict[str, Any] = dataclasses.field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        return {
            "model": self.model,
            "tasks": self.known | {result.task: dataclasses.asdict(result) for result in self.results},
            "failures": self.failures,
        }

    def table(self) -> Table:
        """For a console: a line a task, in its primary metric."""
        table = Table(title=self.model, box=rich.box.SIMPLE_HEAD, title_justify="left")
        for name, side in (
            *(("task", "left"), ("metric", "left"), ("value", "right"), ("95% interval", "right"), ("chance", "right")),
            *(("prompts, trials", "right"), ("spread", "right"), ("questions", "right"), ("notes", "left")),
        ):
            table.add_column(name, justify=side)
        for result in self.results:
            table.add_row(*_line(result))
        for name, sentence in self.failures.items():
            table.add_row(Text(name), *[""] * 7, Text(sentence))
        return table

    def grids(self) -> list[Table]:
        """Of each task whose groups are by two fields, its primary metric by both."""
        return [_grid(result) for result in self.results if isinstance(result, TaskResult) and result.grid]


RESULTS, EXAMPLES = "results.json", "examples.jsonl"
AGAIN = "again"
"""Marks results of which the tasks that failed are to be asked once more."""


def results_in(folder: pathlib.Path) -> dict[str, Any] | None:
    """What a folder's results are, as `SuiteResult.json` has them; None where there are none."""
    try:
        return json.loads((folder / RESULTS).read_text())
    except FileNotFoundError:
        return None


def failures_in(folder: pathlib.Path) -> dict[str, str]:
    """{task: sentence} of the tasks that failed, by a folder's results; nothing where there are none."""
    return (results_in(folder) or {}).get("failures", {})


def try_again(folder: pathlib.Path) -> None:
    """Has the next `evaluate` ask what failed, and keep what did not."""
    (folder / AGAIN).touch()


def evaluate(
    config: EvaluationConfig,
    pretrained: Pretrained,
    *,
    folder: pathlib.Path | None = None,
    report: Callable[[str], None] = print,
    tolerant: bool = False,
) -> SuiteResult:
    """Evaluates a model on all tasks; one that fails does not stop the others.

    Args:
      config: what to ask.
      pretrained: whom.
      folder: where results.json and examples.jsonl (a line a question, or a trial) go; None writes nothing. What it has
        since `try_again` is kept, and not asked again.
      report: is given a line for each task and each row left out.
      tolerant: an error of any kind, such as one of memory, fails the task in which it arises, and not all.

    Raises:
      ValueError: the model cannot be scored at all.
    """
    subject = Subject(
        pretrained,
        format=config.format or TextFormat(),
        scoring=config.scoring or ScoringConfig(),
        context_length=config.context_length,
        parallel=config.parallel.on() if config.parallel else None,
    )
    results, failures, known = [], {}, _known(folder, config)
    with _Examples(folder, known) as examples:
        for task in config.tasks:
            if task.name in known:
                continue
            if config.limit is not None:
                task = dataclasses.replace(task, limit=min(config.limit, task.limit or config.limit))
            try:
                result, records = task.evaluate(subject, samples=config.samples, seed=config.seed, report=report)
                lines = [json.dumps(record, ensure_ascii=False, default=_plain) + "\n" for record in records]
            except TaskError as error:
                failures[task.name] = str(error)
                report(str(error))
                continue
            except Exception as error:
                if not tolerant:
                    raise
                foreseen = isinstance(error, ValueError | OSError)
                failures[task.name] = f"Task {task.name}: {error if foreseen else f'{type(error).__name__}: {error}'}"
                report(failures[task.name] if foreseen else traceback.format_exc())
                continue
            examples.write(lines)
            results.append(result)
            report(f"{result.task}: {result.primary} {result.metrics[result.primary]}")
    result = SuiteResult(pretrained.source, tuple(results), failures, known)
    if folder is not None:
        found = result.json()
        found["tasks"] = {task.name: found["tasks"][task.name] for task in config.tasks if task.name not in failures}
        _write(folder / RESULTS, json.dumps(found, indent=2) + "\n")
        (folder / AGAIN).unlink(missing_ok=True)
    return result


def _known(folder: pathlib.Path | None, config: EvaluationConfig) -> dict[str, Any]:
    """{task: result} that a folder keeps since `try_again`: not of tasks whose files others read, and which are old."""
    if folder is None or not (folder / AGAIN).exists():
        return {}
    found = (results_in(folder) or {"tasks": {}})["tasks"]
    return {task.name: found[task.name] for task in config.tasks if task.name in found and not task.writes}


def _plain(value: Any) -> Any:
    """What JSON has in the place of what it lacks: of numpy's scalars Python's, of dates and the like their text."""
    return value.item() if hasattr(value, "item") else str(value)


class _Examples:
    """The file of examples, which has its name only when it is complete; those of `known` tasks are taken over."""

    def __init__(self, folder: pathlib.Path | None, known: Container[str]):
        self._path = None if folder is None else folder / EXAMPLES
        self._known, self._file = known, None

    def __enter__(self) -> "_Examples":
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(f"{self._path}.partial", "w", encoding="utf-8")
            if self._known and self._path.exists():
                with open(self._path, encoding="utf-8") as lines:
                    self._file.writelines(line for line in lines if json.loads(line)["task"] in self._known)
        return self

    def write(self, lines: Iterable[str]) -> None:
        if self._file is not None:
            self._file.writelines(lines)

    def __exit__(self, kind, error, trace) -> None:
        if self._file is not None:
            self._file.close()
            if kind is None:
                os.replace(f"{self._path}.partial", self._path)


def _write(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _grid(result: TaskResult) -> Table:
    table = Table(title=f"{result.task}: {result.primary}", box=rich.box.SIMPLE_HEAD, title_justify="left")
    columns = list(dict.fromkeys(column for row in result.grid.values() for column in row))
    for name in ("", *columns):
        table.add_column(Text(name), justify="right")
    for name, row in result.grid.items():
        table.add_row(Text(name), *(f"{row[column]:.4f}" if column in row else "" for column in columns))
    return table


def _line(result: Result) -> list[str]:
    found: Estimate = result.metrics[result.primary]
    return [
        result.task,
        result.primary,
        f"{found.value:.4f}",
        "" if found.low is None else f"{found.low:.4f} to {found.high:.4f}",
        "" if result.chance is None else f"{result.chance:.4f}",
        *result.notes,
    ]
