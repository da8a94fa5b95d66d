"""Evaluation in the training loop: loss over a finite validation loader, as a whole and by data set."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax

from jaxlm.layers.context import Context
from jaxlm.objectives.base import LossConfig, Objective
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.training import metrics
from jaxlm.training.optimizers import Optimizer
from jaxlm.training.parameters import ModelDefinition
from jaxlm.training.prefetch import Prefetcher
from jaxlm.training.state import TrainState, working_copy
from jaxlm.training.step import Batch, Metrics, StepConfig, counts, replicated, widen


def make_eval_step(
    definition: ModelDefinition,
    objective: Objective,
    optimizer: Optimizer,
    parallel: Parallelism,
    *,
    config: StepConfig,
    loss: LossConfig,
) -> Callable[[TrainState, Batch], Metrics]:
    """The jitted function (state, batch) -> metrics, without dropout, on the parameters one would ship.

    These are the exponential moving average where there is one, else schedule-free's average, else the parameters.
    Arguments as for `make_train_step`.
    """
    context = Context(ops=ShardedOps(parallel))

    def step(state: TrainState, batch: Batch) -> Metrics:
        batch = widen(batch)
        params = state.ema_params
        if params is None:
            params = optimizer.evaluation_params(state.params, state.opt_state)
        params = working_copy(params, optimizer.infos, parallel)
        _, found, side = objective.loss_sums(definition.merge(params), batch, context=context, config=loss)
        found = {**found, **side.metrics, **counts(batch, config.byte_lengths, loss.num_datasets)}
        return replicated(found, parallel.mesh)

    return jax.jit(step)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a state when called.

    Attributes:
      step: from `make_eval_step`.
      make_loader: makes the validation loader anew: finite, in a fixed order, every example once.
      parallel: where batches go.
      names: of data sets and objectives.
      prefix: of the metrics' names.
      max_batches: stop after this many; None takes all.
    """

    step: Callable[[TrainState, Batch], Metrics]
    make_loader: Callable[[], Any]
    parallel: Parallelism
    names: metrics.Names
    prefix: str = "validation"
    max_batches: int | None = None

    def __call__(self, state: TrainState) -> dict[str, float]:
        """{"validation/cross_entropy": nats per token, "validation/bits_per_byte", ".../cross_entropy/<data set>"}.

        Raises:
          ValueError: the loader yields no batch.
        """
        totals = None
        with Prefetcher(self.make_loader(), self.parallel) as batches:
            for batch, _ in itertools.islice(batches, self.max_batches):
                found = self.step(state, batch)
                totals = metrics.add(metrics.zero(found) if totals is None else totals, found, 0)
        if totals is None:
            raise ValueError(f"The loader of {self.prefix!r} yields no batch; give it more data or a smaller batch.")
        return {f"{self.prefix}/{name}": value for name, value in metrics.read(totals.metrics, self.names).items()}
