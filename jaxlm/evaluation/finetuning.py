"""Finetuning sweeps: a task learnt by a whole model, at every learning rate with every seed, from the same parameters.

The rate is an argument of one compiled step, so that all trials of a sweep, and those of other models of the same form,
share it. A trial is small beside pretraining and leaves nothing behind but its figures, and the best of a sweep what it
says of further texts, if asked (`annotation.py`).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.evaluation.annotation import Annotation, annotate, check
from jaxlm.evaluation.intervals import student
from jaxlm.evaluation.learned import (
    Form,
    LearnedResult,
    LearnedTask,
    Opened,
    Trial,
    best_setting,
    labeller_of,
    outputs_program,
)
from jaxlm.evaluation.subject import Subject
from jaxlm.evaluation.tasks import TaskError, check_files
from jaxlm.layers.context import Context
from jaxlm.models.labeller import Labeller
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.training.optimizers import AdamW, Optimizer, OptimizerConfig, build_optimizer
from jaxlm.training.parameters import Tree, split_model
from jaxlm.training.schedules import Join, Linear
from jaxlm.training.state import seed_data, state_shardings
from jaxlm.training.step import count_tokens

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class FinetuningSweep(LearnedTask):
    """Learning rates x seeds, AdamW with a linear warm-up and decay (BERT, arXiv 1810.04805, A.3).

    A seed is that of the head's initial values, of the order of examples and of dropout. Dropout is the model's own.

    Attributes:
      rates: peaks of the learning rate that are tried.
      seeds: one trial each for every rate.
      epochs: over the training split.
      warmup: share of the steps.
      weight_decay: of matrices, multiplied by the learning rate.
      annotation: texts that the trial which is best on the validation split labels in the end, for a student to learn
        from; None labels none.
      after: a sweep of the same classes, run first; trials start from the model, head and all, of its best trial on the
        validation split. None starts them from the trained model.
    """

    rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: float = 3.0
    warmup: float = 0.1
    weight_decay: float = 0.01
    annotation: Annotation | None = None
    after: "FinetuningSweep | None" = None

    def __post_init__(self):
        super().__post_init__()
        if self.annotation is not None:
            try:
                check(self.annotation, self.labels)
            except ValueError as error:
                raise ValueError(f"FinetuningSweep {self.name!r}: {error}.") from error
        if (first := self.after) is not None and self._reads() != first._reads():
            raise ValueError(
                f"FinetuningSweep {self.name!r} starts from what {first.name!r} has learnt, so that labels, "
                f"architecture and pooling must be of the same kind; they are {self._reads()} and {first._reads()}."
            )
        if not self.rates or not self.seeds or min(self.rates) <= 0 or self.epochs <= 0:
            raise ValueError(
                f"FinetuningSweep {self.name!r} needs rates above 0, seeds and epochs; got {self.rates}, {self.seeds}, "
                f"{self.epochs}."
            )

    def _reads(self) -> tuple[str, str, str]:
        return type(self.labels).__name__, getattr(self.architecture, "value", "its own"), self.pooling.value

    @property
    @override
    def writes(self) -> tuple[str, ...]:
        own = () if self.annotation is None else (self.annotation.output,)
        return own if self.after is None else (*own, *self.after.writes)

    @override
    def check(self, written: Collection[str] = ()) -> None:
        if self.after is not None:
            self.after.check(written)
            written = {*written, *self.after.writes}
        super().check(written)
        if self.annotation is not None:
            self._annotating(check_files, self.annotation.source, "train", written)

    @override
    def evaluate(
        self, subject: Subject, *, samples: int = 1000, seed: int = 0, report: Callable[[str], None] = print
    ) -> tuple[LearnedResult, Iterator[dict[str, Any]]]:
        del samples, seed  # intervals are over the sweep's own seeds
        opened, primary = self.opened(subject.pretrained, subject.parallel), self.labels.primary
        trials, _ = self._swept(subject, opened, report, keep=self.annotation is not None)
        chosen = best_setting(trials, primary)
        at_best = [trial for trial in trials if trial.setting == chosen]
        metrics = {name: student([trial.test[name] for trial in at_best]) for name in self.labels.metrics}
        values = [trial.test[primary] for trial in at_best]
        result = opened.result(
            trials,
            metrics,
            spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            how="finetuning",
            setting="learning rate",
            chosen=chosen,
        )
        return result, ({"task": self.name, **dataclasses.asdict(trial)} for trial in trials)

    def _swept(
        self, subject: Subject, opened: Opened, report: Callable[[str], None], *, keep: bool
    ) -> tuple[list[Trial], tuple[Trial, Tree] | None]:
        """All trials, and if kept the best on the validation split with its parameters; they annotate what is asked."""
        if self.annotation is not None:
            self._annotating(self.annotation.source.shards, "train")  # before hours are spent on training
        start = {"body": opened.body} if self.after is None else self._model_of(self.after, subject, opened, report)
        trials, primary, best = [], self.labels.primary, None
        for rate in self.rates:
            for attempt in self.seeds:
                try:
                    done, params = run_trial(self, opened, start, rate, attempt)
                except ValueError as error:
                    raise TaskError(f"Task {self.name}: {error}") from error
                trials.append(done)
                if keep and (best is None or done.validation[primary] > best[0].validation[primary]):
                    best = done, params
                report(
                    f"{self.name}, rate {rate:g}, seed {attempt}: validation {primary} {done.validation[primary]:.4f}"
                    f"{', diverged' if done.diverged else ''}"
                )
        if self.annotation is not None:
            report(self._annotated(opened, subject, *best))
        return trials, best

    def _model_of(
        self, sweep: "FinetuningSweep", subject: Subject, opened: Opened, report: Callable[[str], None]
    ) -> Tree:
        """The parameters that another sweep ends with."""
        other = sweep.opened(subject.pretrained, subject.parallel)
        mine, its = (list(map(str, x.classes)) for x in (opened, other))  # those of distributions are texts
        if mine != its:
            raise TaskError(
                f"Task {self.name} starts from what {sweep.name} has learnt, whose {len(its)} classes "
                f"({', '.join(its)[:60]}) are not its own {len(mine)} ({', '.join(mine)[:60]})."
            )
        _, best = sweep._swept(subject, other, report, keep=True)
        return best[1]

    def _annotated(self, opened: Opened, subject: Subject, trial: Trial, params: Tree) -> str:
        judge, vocabulary = outputs_program(opened.form), subject.pretrained.vocabulary
        rows, cut = self._annotating(annotate, self.annotation, opened, vocabulary, lambda batch: judge(params, batch))
        return (
            f"{self.name}: the model of rate {trial.setting:g}, seed {trial.seed} labelled {rows:,} texts"
            f"{f' ({cut:,} of them cut)' if cut else ''} in {self.annotation.output}"
        )

    def _annotating[T](self, do: Callable[..., T], *arguments: Any) -> T:
        try:
            return do(*arguments)
        except (ValueError, OSError) as error:
            raise TaskError(f"Task {self.name}, its annotation: {str(error).rstrip('.')}.") from error


def run_trial(task: FinetuningSweep, opened: Opened, start: Tree, rate: float, seed: int) -> tuple[Trial, Tree]:
    """Finetunes once and judges the result on validation and test.

    Args:
      task: the sweep.
      opened: what it was opened on.
      start: parameters {"body": ...} of the trained model, or {"body": ..., "head": ...}; a head that is not given is
        drawn by the seed.
      rate: the learning rate's peak.
      seed: of the trial.

    Returns:
      what came of it, and the finetuned parameters.
    """
    examples = len(opened.examples["train"])
    recipe = Recipe(task.warmup, task.weight_decay, max(1, round(task.epochs * examples / task.batch_size)))
    begin, step, judge = _begin(opened.form, recipe), _step(opened.form, recipe), outputs_program(opened.form)
    key = seed_data(seed)
    params, moments = begin(start, key)
    for index, chosen in enumerate(order(examples, task.batch_size, recipe.steps, seed)):
        params, moments = step(params, moments, opened.batch("train", chosen), np.float32(rate), np.int32(index), key)
    found = {split: opened.everything(split, lambda batch: judge(params, batch)) for split in ("validation", "test")}
    trial = Trial(
        setting=rate,
        seed=seed,
        **{split: opened.judged(split, outputs) for split, outputs in found.items()},
        diverged=not all(np.isfinite(outputs).all() for outputs in found.values()),
    )
    return trial, params


def order(examples: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The examples of each step: one permutation after the other, cut into whole batches."""
    rng = np.random.default_rng(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting += rng.permutation(examples).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a trial is trained, but for its rate and seed.

    Attributes:
      warmup, weight_decay: see `FinetuningSweep`.
      steps: of the trial.
    """

    warmup: float
    weight_decay: float
    steps: int


@functools.lru_cache(maxsize=8)
def _optimizer(form: Form, recipe: Recipe) -> Optimizer:
    """At a schedule whose peak is 1: updates are proportional to the rate, which the step multiplies by."""
    schedule = Join((Linear(0.0, 1.0), Linear(1.0, 0.0)), lengths=(recipe.warmup,))
    config = OptimizerConfig(AdamW(b2=0.999), schedule, weight_decay=recipe.weight_decay)
    infos = labeller_of(form)[2]
    return build_optimizer(config, infos, total_steps=recipe.steps, parametrization=form.config.scaling)


@functools.lru_cache(maxsize=8)
def _begin(form: Form, recipe: Recipe) -> Callable[[Tree, np.ndarray], tuple[Tree, Any]]:
    """(parameters to start from, seed) -> all parameters in float32, and the optimizer's state."""
    optimizer = _optimizer(form, recipe)

    def begin(given: Tree, seed: jax.Array) -> tuple[Tree, Any]:
        key = jax.random.wrap_key_data(seed)
        params = split_model(Labeller(form.config, form.head_size, key=key))[1]
        # A trained model may have been read in the type it computes in; what is learnt on top needs float32.
        params |= jax.tree.map(lambda x: x.astype(jnp.float32), given)
        return params, optimizer.init(params)

    abstract = jax.eval_shape(begin, labeller_of(form)[1], seed_data(0))
    return jax.jit(begin, out_shardings=state_shardings(abstract, optimizer.infos, form.parallel))


@functools.lru_cache(maxsize=8)
def _step(form: Form, recipe: Recipe) -> Callable[..., tuple[Tree, Any]]:
    """(parameters, optimizer's state, batch, rate, step, seed) -> the next parameters and state."""
    optimizer, ops, definition = _optimizer(form, recipe), ShardedOps(form.parallel), labeller_of(form)[0]

    def loss(params: Tree, batch: Batch, key: jax.Array) -> jax.Array:
        context = Context(ops=ops, dropout_key=key)
        outputs, side = form.kind.outputs(definition.merge(params), batch, form.pooling, context)
        of_layers = sum(side.losses.values(), jnp.float32(0.0)) / jnp.maximum(count_tokens(batch), 1.0)
        return form.kind.loss(outputs, batch) + of_layers

    def step(params: Tree, state: Any, batch: Batch, rate: jax.Array, index: jax.Array, seed: jax.Array):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), index)
        value, grads = jax.value_and_grad(loss)(params, batch, key)
        updates, state, _ = optimizer.update(grads, state, params, step=index, loss=value)
        return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), state

    return jax.jit(step, donate_argnums=(0, 1))
