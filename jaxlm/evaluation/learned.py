"""Tasks that are learnt before they are judged: what finetuning sweeps and linear probes share.

A `LearnedTask` is opened on a trained model (`opened`): its body, how rows are laid out, its examples by split. Trials
differ in one number, a learning rate or a strength; the validation split chooses it, the test split judges the choice.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.pretrained import Pretrained
from jaxlm.evaluation.intervals import Estimate
from jaxlm.evaluation.label_metrics import METRICS
from jaxlm.evaluation.labelled import SPLITS, LabelKind, Labelled
from jaxlm.evaluation.subject import Subject
from jaxlm.evaluation.tasks import TaskError, check_files
from jaxlm.evaluation.text_rows import TextRows, text_rows
from jaxlm.layers.context import Context
from jaxlm.models.config import LanguageModelConfig
from jaxlm.models.labeller import Labeller, Pooling, body_config, body_of
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.training.parameters import ModelDefinition, Tree, map_infos, split_model
from jaxlm.training.prefetch import to_devices
from jaxlm.training.state import abstract_model


@dataclasses.dataclass(frozen=True)
class Trial:
    """One attempt.

    Attributes:
      setting: the number that trials differ in.
      seed: of the attempt; None where nothing is random.
      validation, test: metrics on these splits.
      diverged: an output was not finite; metrics then take it for 0.
    """

    setting: float
    seed: int | None
    validation: dict[str, float]
    test: dict[str, float]
    diverged: bool = False


@dataclasses.dataclass(frozen=True)
class LearnedResult:
    """What came of a task.

    Attributes:
      task: its name.
      primary: the metric that stands for it.
      metrics: {metric: estimate} on the test split, of the chosen setting. Of several seeds the mean, with Student's
        95% interval over them; of a probe its value, with the bootstrap's over texts.
      spread: the primary metric's standard deviation over seeds at the chosen setting; None with one seed.
      chance: of a guess from the labels alone.
      how: "finetuning" or "probe".
      setting: what the trials' number is: "learning rate", "L2".
      chosen: the number whose mean over seeds is best on the validation split.
      trials: all.
      architecture: the mask under which the model read.
      rows: {split: examples}.
      truncated: texts of the test split that lost their end.
    """

    task: str
    primary: str
    metrics: dict[str, Estimate]
    spread: float | None
    chance: float | None
    how: str
    setting: str
    chosen: float
    trials: tuple[Trial, ...]
    architecture: str
    rows: dict[str, int]
    truncated: int

    @property
    def notes(self) -> tuple[str, str, str, str]:
        """For a table: trials, their spread over seeds, test examples, what else is to say."""
        diverged = sum(trial.diverged for trial in self.trials)
        settings = {trial.setting for trial in self.trials}
        edge = self.chosen in (min(settings), max(settings)) and len(settings) > 1
        said = [f"{self.how} as {self.architecture}, {self.setting} {self.chosen:g}{' (at the edge)' if edge else ''}"]
        said += [f"{self.truncated} truncated"] * bool(self.truncated) + [f"{diverged} diverged"] * bool(diverged)
        spread = "" if self.spread is None else f"± {self.spread:.4f}"
        return str(len(self.trials)), spread, str(self.rows["test"]), ", ".join(said)


@dataclasses.dataclass(frozen=True)
class LearnedTask(abc.ABC):
    """A task that is learnt.

    Attributes:
      name: what results call it.
      labels: the data and what is predicted of it.
      limit: rows of each split at most, drawn at random but always the same; None takes all.
      batch_size: examples a batch.
      max_length: columns of a row; None is what the model was trained on.
      architecture: the mask under which the model reads (a causal language model as an encoder, say); None is its own,
        and of an encoder-decoder always its encoder's.
      pooling: a text's vector, where it needs one.
    """

    name: str
    labels: LabelKind
    limit: int | None = None
    batch_size: int = 32
    max_length: int | None = None
    architecture: Architecture | None = None
    pooling: Pooling = Pooling.MEAN

    def __post_init__(self):
        object.__setattr__(self, "pooling", Pooling(self.pooling))
        if self.architecture is not None:
            object.__setattr__(self, "architecture", Architecture(self.architecture))
        if self.batch_size < 1:
            raise ValueError(f"{type(self).__name__}.batch_size is {self.batch_size}; it must be at least 1.")

    @abc.abstractmethod
    def evaluate(
        self, subject: Subject, *, samples: int = 1000, seed: int = 0, report: Callable[[str], None] = print
    ) -> tuple[LearnedResult, Iterator[dict[str, Any]]]:
        """Learns and judges.

        Args:
          subject: the trained model.
          samples: bootstrap resamplings for intervals over texts; 0 gives none.
          seed: of these.
          report: is given a line for each trial that takes long.

        Returns:
          the result, and a record for every trial.

        Raises:
          TaskError: rows or model do not go together.
        """

    @property
    def writes(self) -> tuple[str, ...]:
        """Files that other tasks may read."""
        return ()

    def check(self, written: Collection[str] = ()) -> None:
        """Looks whether the labelled files are there, before a model is.

        Args:
          written: files that are made before the task is asked.

        Raises:
          TaskError: they are not; the message has task and path.
        """
        try:
            for split in SPLITS:
                check_files(*self.labels.rows.source(split), written)
        except (ValueError, OSError) as error:
            raise TaskError(f"Task {self.name}: {error}") from error

    def opened(self, pretrained: Pretrained, parallel: Parallelism | None) -> "Opened":
        """The task on a model.

        Raises:
          TaskError: rows or model do not go together.
        """
        try:
            if pretrained.vocabulary is None:
                raise ValueError(pretrained.no_vocabulary)
            config = body_config(pretrained.config, self.architecture)
            examples, classes = self.labels.read(pretrained.vocabulary, self.limit)
            longest = max(examples[split].longest for split in SPLITS)
            rows = text_rows(pretrained, config, longest, self.max_length)
            parallel = parallel or ParallelConfig(MeshConfig()).on(jax.local_devices()[:1])
            parallel.batch_sharding(self.batch_size)  # raises where devices would be left idle
        except (ValueError, OSError) as error:
            raise TaskError(f"Task {self.name}: {str(error).rstrip('.')}.") from error
        _, body, infos = split_model(body_of(pretrained.model, self.architecture))
        body = map_infos(lambda info, x: jax.device_put(x, parallel.sharding(info.axes, x.shape)), infos, body)
        return Opened(self, config, body, rows, examples, classes, parallel)


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A task on a model; see `LearnedTask.opened`.

    Attributes:
      task: the task.
      config: of the body.
      body: its parameters.
      rows: how texts are laid out.
      examples: by split.
      classes: in order.
      parallel: the mesh.
    """

    task: LearnedTask
    config: LanguageModelConfig
    body: Tree
    rows: TextRows
    examples: dict[str, Labelled]
    classes: tuple[Any, ...]
    parallel: Parallelism

    @property
    def form(self) -> "Form":
        """What the programs depend on."""
        labels = self.task.labels
        kind = dataclasses.replace(labels, rows=None)
        return Form(self.config, labels.head_size(self.classes), kind, self.task.pooling, self.parallel)

    def batch(self, split: str, chosen: Sequence[int]) -> dict[str, jax.Array]:
        """Examples of a split on the devices."""
        return self.on_devices(self.examples[split], chosen)

    def on_devices(self, examples: Labelled, chosen: Sequence[int]) -> dict[str, jax.Array]:
        """Some of these examples, laid out as a batch on the devices."""
        made = self.task.labels.batch(examples, chosen, self.rows, self.task.batch_size)
        texts, labels = (to_devices(part, self.parallel) for part in made)
        return texts | labels

    def everything(self, split: str, of_batch: Callable[[dict[str, jax.Array]], jax.Array]) -> np.ndarray:
        """What `of_batch` gives for all of a split's labels, in order: [n, ...]."""
        found, examples, size = [], self.examples[split], self.task.batch_size
        for start in range(0, len(examples), size):
            chosen = range(start, min(start + size, len(examples)))
            given = np.asarray(of_batch(self.batch(split, chosen)))
            found.append(self.task.labels.labelled(given, examples, chosen, self.rows))
        return np.concatenate(found)

    def gold(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(labels [n], the text that each is of)."""
        return self.task.labels.gold(self.examples[split], self.rows)

    def judged(self, split: str, outputs: np.ndarray) -> dict[str, float]:
        """Metrics of outputs [n, ...] of a split."""
        gold, _ = self.gold(split)
        predicted, weights = self.task.labels.predictions(outputs), np.ones(len(gold))
        return {name: METRICS[name](gold, predicted, weights) for name in self.task.labels.metrics}

    def result(self, trials: Sequence[Trial], metrics: dict[str, Estimate], **facts: Any) -> LearnedResult:
        """The result, with what is known without it filled in."""
        labels, test = self.task.labels, self.examples["test"]
        return LearnedResult(
            task=self.task.name,
            primary=labels.primary,
            metrics=metrics,
            chance=labels.chance(self.gold("train")[0], self.gold("test")[0]),
            trials=tuple(trials),
            architecture=self.config.architecture.value,
            rows={split: len(self.examples[split]) for split in SPLITS},
            truncated=sum(any(len(ids) > self.rows.room for ids in texts) for texts in test.texts),
            **facts,
        )


def best_setting(trials: Sequence[Trial], metric: str) -> float:
    """The setting whose mean over seeds is the best on the validation split; of equals the first."""
    found: dict[float, list[float]] = {}
    for trial in trials:
        found.setdefault(trial.setting, []).append(trial.validation[metric])
    return max(found, key=lambda setting: np.mean(found[setting]))


@dataclasses.dataclass(frozen=True)
class Form:
    """What compiled programs depend on: tasks of one form, on models of one form, share them.

    Attributes:
      config: of the body.
      head_size: outputs of the head, or None.
      kind: what is predicted, without its data.
      pooling: a text's vector.
      parallel: the mesh.
    """

    config: LanguageModelConfig
    head_size: int | None
    kind: LabelKind
    pooling: Pooling
    parallel: Parallelism


@functools.lru_cache(maxsize=8)
def labeller_of(form: Form) -> tuple[ModelDefinition, Tree, Tree]:
    """A labeller without its arrays: definition, shapes, and a `ParameterInfo` for each parameter."""
    return abstract_model(lambda key: Labeller(form.config, form.head_size, key=key))


@functools.lru_cache(maxsize=8)
def outputs_program(form: Form) -> Callable[[Tree, dict[str, jax.Array]], jax.Array]:
    """(a labeller's parameters, batch) -> `LabelKind.outputs`."""
    definition, context = labeller_of(form)[0], Context(ops=ShardedOps(form.parallel))
    return jax.jit(lambda params, batch: form.kind.outputs(definition.merge(params), batch, form.pooling, context)[0])


@functools.lru_cache(maxsize=8)
def features_program(form: Form) -> Callable[[Tree, dict[str, jax.Array]], jax.Array]:
    """(a headless labeller's parameters, batch) -> `LabelKind.features`."""
    definition, context = labeller_of(form)[0], Context(ops=ShardedOps(form.parallel))
    return jax.jit(lambda params, batch: form.kind.features(definition.merge(params), batch, form.pooling, context))
