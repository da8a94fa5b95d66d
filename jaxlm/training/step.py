"""The training step: one jitted function, state donated, compiled once."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.layers.context import Context
from jaxlm.objectives.base import LossConfig, Objective
from jaxlm.objectives.distillation import Taught
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.training.optimizers import Optimizer
from jaxlm.training.parameters import LAYER, ModelDefinition, ParameterInfo, Tree, flatten, update
from jaxlm.training.state import (
    TrainState,
    on_device,
    seed_data,
    state_shardings,
    stored_gradients,
    to_store,
    working_copy,
)
from jaxlm.training.teacher import Teacher

Batch = Mapping[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""(sum, weight) pairs: scalars, or one entry a layer or a data set."""


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step is computed.

    Attributes:
      microbatches: the batch is cut into this many, one after the other; their gradients add up to exactly the
        whole batch's. Needs the memory of one.
      layer_norm_period: every so many steps the metrics hold the norms of parameters, gradients and updates of each
        layer; 0 never. It costs nothing on the other steps and compiles nothing new.
      seed: of dropout and of sampling inside the loss; of a run, `RunConfig.seed` takes its place.
      byte_lengths: bytes that each id stands for, [V] (`Vocabulary.byte_lengths`), which turns nats per token into
        bits per byte; None counts no bytes.
    """

    microbatches: int = 1
    layer_norm_period: int = 0
    seed: int = 0
    byte_lengths: np.ndarray | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        if self.microbatches < 1:
            raise ValueError(f"StepConfig.microbatches is {self.microbatches}; it must be at least 1.")


def make_train_step(
    definition: ModelDefinition,
    objective: Objective,
    optimizer: Optimizer,
    parallel: Parallelism,
    *,
    config: StepConfig,
    loss: LossConfig,
    teacher: Teacher | None = None,
) -> "TrainStep":
    """The function (state, batch) -> (state, metrics).

    Args:
      definition: the model's structure.
      objective: gives the loss.
      optimizer: made for the same model.
      parallel: where state and batch lie.
      config: microbatches, norms, seed.
      loss: z-loss, smoothing, chunking, distillation.
      teacher: the model that `loss.distillation` names; the step is to be given its parameters (`with_teacher`).

    Returns:
      the step. It takes the state's buffers (they must not be used again). Metrics hold what the objective
      reports, and "loss", "loss/<term>", "grad_norm", "learning_rate", "diverged", "tokens" and "bytes" (see `counts`),
      with a guard "skipped", "spike_loss" and "spike_grad_norm" (of skipped steps), and
      "norms/<parameters|gradients|updates>/<layer>" on the steps that have them.
      A skipped step counts for nothing in the objective's metrics, "loss", "tokens", "bytes" and "grad_norm".
    """
    ops = ShardedOps(parallel)
    coefficients = dict(objective.coefficients)

    def microbatch_loss(
        trained: Tree, fixed: tuple[Tree, Tree], batch: Batch, weights: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Metrics]]:
        frozen, taught_by = fixed
        model = definition.merge(update(trained, frozen))
        if teacher is not None:
            model = Taught(model, teacher.definition.merge(taught_by), teacher.start_id)
        context = Context(ops=ops, dropout_key=key)
        sums, metrics, side = objective.loss_sums(model, batch, context=context, config=loss)
        terms = {term: value / weights[term] for term, value in sums.items()}
        from_layers = {term: value / weights["tokens"] for term, value in side.losses.items()}
        total = sum(coefficients[term] * value for term, value in terms.items()) + sum(from_layers.values())
        return total, (terms | from_layers, metrics | side.metrics)

    gradient = jax.value_and_grad(microbatch_loss, has_aux=True)

    def scattered(found: tuple[Any, Tree]) -> tuple[Any, Tree]:
        return found[0], stored_gradients(found[1], optimizer.infos, parallel)

    def whole_gradient(trained: Tree, fixed: tuple[Tree, Tree], batch: Batch, key: jax.Array):
        # The denominators of the whole batch, not of a microbatch: the mean of means would be another loss.
        weights = {**objective.loss_weights(batch), "tokens": count_tokens(batch)}
        weights = {term: jnp.where(w > 0, w, 1.0) for term, w in weights.items()}
        if config.microbatches == 1:
            return scattered(gradient(trained, fixed, batch, weights, jax.random.fold_in(key, 0)))
        pieces = _microbatches(batch, config.microbatches, parallel)

        def accumulate(total, piece):
            i, microbatch = piece
            found = scattered(gradient(trained, fixed, microbatch, weights, jax.random.fold_in(key, i)))
            return scattered(jax.tree.map(jnp.add, total, found)), None

        first = jax.tree.map(lambda x: x[0], pieces)
        zero = jax.eval_shape(lambda *arguments: scattered(gradient(*arguments)), trained, fixed, first, weights, key)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)
        return jax.lax.scan(accumulate, zero, (jnp.arange(config.microbatches), pieces))[0]

    def step(state: TrainState, batch: Batch, seed: jax.Array, taught_by: Tree) -> tuple[TrainState, Metrics]:
        batch = widen(batch)
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), state.step)
        shardings = state_shardings(state, optimizer.infos, parallel)
        working = working_copy(state.params, optimizer.infos, parallel)
        learning, frozen = optimizer.split(working)
        (total, (terms, metrics)), grads = whole_gradient(learning, (frozen, taught_by), batch, key)
        trained, _ = optimizer.split(state.params)
        opt_state = on_device(state.opt_state, shardings.opt_state)
        updates, opt_state, scalars = optimizer.update(grads, opt_state, trained, step=state.step, loss=total)
        params = update(state.params, optax.apply_updates(trained, updates))
        ema_params = state.ema_params
        if (decay := optimizer.config.ema_decay) is not None:
            ema_params = jax.tree.map(lambda mean, new: decay * mean + (1.0 - decay) * new, ema_params, params)
        one = jnp.float32(1.0)
        metrics |= {f"loss/{term}": (value, one) for term, value in terms.items()} | {"loss": (total, one)}
        metrics |= counts(batch, config.byte_lengths, loss.num_datasets)
        if "skipped" in scalars:  # its loss may be NaN, which a weight of 0 would not cure
            skipped = scalars["skipped"] > 0
            metrics = jax.tree.map(lambda x: jnp.where(skipped, 0.0, x), metrics)
            metrics["spike_loss"] = (jnp.where(skipped, total, 0.0), scalars["skipped"])
            grad_norm = scalars.pop("grad_norm")  # it may not be finite either
            metrics["spike_grad_norm"] = (jnp.where(skipped, grad_norm, 0.0), scalars["skipped"])
            metrics["grad_norm"] = (jnp.where(skipped, 0.0, grad_norm), 1.0 - scalars["skipped"])
        metrics |= {name: (value, one) for name, value in scalars.items()}
        if config.layer_norm_period:
            due = state.step % config.layer_norm_period == 0
            metrics |= layer_norms(
                due, optimizer.infos, {"parameters": state.params, "gradients": grads, "updates": updates}
            )
        new_state = TrainState(state.step + 1, params, opt_state, ema_params)
        # Without this the compiler may lay the new state out in another way than the old one, and compile again.
        return to_store(new_state, shardings), replicated(metrics, parallel.mesh)

    return TrainStep(jax.jit(step, donate_argnums=0), seed_data(config.seed), teacher.abstract if teacher else {})


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """(state, batch) -> (state, metrics). Runs that differ in their seed alone share the compiled program.

    Attributes:
      jitted: (state, batch, seed, teacher's parameters) -> (state, metrics), the state donated.
      seed: see `seed_data`.
      taught_by: a teacher's parameters, or, where it only is to be lowered, their shapes; {} without a teacher.
    """

    jitted: Callable[[TrainState, Batch, np.ndarray, Tree], tuple[TrainState, Metrics]]
    seed: np.ndarray
    taught_by: Tree = dataclasses.field(default_factory=dict)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step."""
        return self.jitted(state, batch, self.seed, self.taught_by)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step for arguments of these shapes and shardings, not compiled yet."""
        return self.jitted.lower(state, batch, self.seed, self.taught_by)

    def with_seed(self, seed: int) -> "TrainStep":
        """The same program for another run."""
        return dataclasses.replace(self, seed=seed_data(seed))

    def with_teacher(self, params: Tree) -> "TrainStep":
        """The same program, taught by a model with these parameters."""
        return dataclasses.replace(self, taught_by=params)

    @property
    def compiles(self) -> int:
        """How often it has been compiled."""
        return self.jitted._cache_size()


def spike_signs(metrics: Metrics) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one step's metrics, on the devices: whether it is a spike (or not finite), its loss and its gradient norm."""
    guarded = "skipped" in metrics
    names = ("skipped", "spike_loss", "spike_grad_norm") if guarded else ("diverged", "loss", "grad_norm")
    flag, loss, grad_norm = (metrics[name][0] for name in names)
    return flag, loss, grad_norm


def widen(batch: Batch) -> dict[str, jax.Array]:
    """The batch with integers as int32: loaders may send narrower ones over the bus."""
    return {name: x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x for name, x in batch.items()}


def replicated(tree: Any, mesh: Mesh) -> Any:
    """`tree`, whole on every device, so that every host can read it."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def count_tokens(batch: Batch) -> jax.Array:
    """f32: positions that are not padding, of encoder and decoder."""
    segments = [ids for name, ids in batch.items() if name.endswith("_segment_ids")]
    return sum((jnp.sum(ids > 0, dtype=jnp.float32) for ids in segments), jnp.float32(0.0))


def counts(batch: Batch, byte_lengths: np.ndarray | None, num_datasets: int) -> Metrics:
    """What the batch holds, each with weight 1.

    "tokens": positions that are not padding, of encoder and decoder. "bytes": bytes of text that the targets with a
    weight stand for; "bytes_by_dataset": the same for each data set, where there are several.
    """
    one = jnp.float32(1.0)
    metrics = {"tokens": (count_tokens(batch), one)}
    if byte_lengths is not None:
        stack = "decoder" if "decoder_target_tokens" in batch else "encoder"
        lengths = jnp.asarray(byte_lengths, jnp.float32)[batch[f"{stack}_target_tokens"]]
        lengths = jnp.where(batch[f"{stack}_loss_weights"] > 0, lengths, 0.0)
        metrics["bytes"] = (lengths.sum(), one)
        if num_datasets > 1:
            by_dataset = jax.ops.segment_sum(lengths.ravel(), batch["dataset_ids"].ravel(), num_datasets)
            metrics["bytes_by_dataset"] = (by_dataset, jnp.ones(num_datasets))
    return metrics


def layer_norms(due: jax.Array, infos: Tree, trees: dict[str, Tree]) -> Metrics:
    """Norm of each layer of each tree, as metrics "norms/<tree>/<layer>" with weight 1 where `due`, else 0.

    Identity layers of a pipeline have weight 0.

    A layer is what lies under ".../layers/<i>"; other parameters are grouped by the module that holds them. In a
    scanned stack a metric has one entry for each of the layers in it ([repeats]).
    """
    groups: dict[str, list[tuple[str, ...]]] = {}
    flat_infos: dict[tuple[str, ...], ParameterInfo] = flatten(infos)
    for path in flat_infos:
        groups.setdefault(_layer_of("/".join(path)), []).append(path)

    def norms() -> dict[str, jax.Array]:
        found = {}
        for label, tree in trees.items():
            flat = flatten(tree)
            for group, paths in groups.items():
                squares = [_squares(flat[path], flat_infos[path]) for path in paths if path in flat]
                if squares:
                    found[f"norms/{label}/{group}"] = jnp.sqrt(sum(squares))
        return found

    shapes = jax.eval_shape(norms)
    values = jax.lax.cond(due, norms, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    identities = {group: list(flat_infos[paths[0]].identities) for group, paths in groups.items()}

    def weight(name: str, value: jax.Array) -> jax.Array:
        everywhere = jnp.broadcast_to(due.astype(jnp.float32), value.shape)
        rows = identities[name.split("/", 2)[2]]
        return everywhere.at[np.array(rows)].set(0.0) if rows else everywhere

    return {name: (value, weight(name, value)) for name, value in values.items()}


def layer_names(infos: Tree) -> dict[str, tuple[str, ...]]:
    """For each group of `layer_norms`, the layers that its entries stand for."""
    return {
        _layer_of("/".join(info.path)): tuple(_layer_of(name) for name in info.names)
        for info in flatten(infos).values()
    }


def _layer_of(name: str) -> str:
    """The layer that a parameter belongs to, or the module that holds it."""
    found = LAYER.match(name)
    return found["layer"] if found else name.rpartition("/")[0] or name


def _squares(x: jax.Array, info: ParameterInfo) -> jax.Array:
    """Sum of squares, [layers] for a stacked array."""
    dims = tuple(range(1, x.ndim)) if info.stacked else None
    return jnp.sum(jnp.square(x.astype(jnp.float32)), dims)


def _microbatches(batch: Batch, count: int, parallel: Parallelism) -> dict[str, jax.Array]:
    """[B, ...] -> [count, B / count, ...].

    Microbatch i takes rows i, i + count, ... so that each device cuts its own rows and none travels.
    """
    size = len(next(iter(batch.values())))
    if size % count:
        raise ValueError(f"A batch of {size} examples cannot be cut into {count} equal microbatches.")
    parallel.batch_sharding(size // count)  # raises where a microbatch would leave devices idle
    return {name: jnp.swapaxes(x.reshape(size // count, count, *x.shape[1:]), 0, 1) for name, x in batch.items()}
