"""The state of training: a pytree of step, parameters, optimizer state and average; how it is made on a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoints import naming
from jaxlm.checkpoints.naming import GUARD
from jaxlm.checkpoints.stored import StoredCheckpoint
from jaxlm.layers.stacking import StackLayout
from jaxlm.parallel.parallelism import Memory, Parallelism
from jaxlm.training.moments import moment_order
from jaxlm.training.optimizers import Optimizer
from jaxlm.training.parameters import (
    ModelDefinition,
    ParameterInfo,
    Tree,
    flatten,
    info_of,
    split_model,
    unflatten,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step and lies on the devices.

    There is no random key in it: the step's key is fold_in(key(seed), step).

    Attributes:
      step: int32 scalar, number of updates done.
      params: the model's parameters, a nested dict.
      opt_state: from `Optimizer.init`, a dict.
      ema_params: exponential moving average of `params`, or None.
    """

    step: jax.Array
    params: Tree
    opt_state: dict[str, Any]
    ema_params: Tree | None = None


def abstract_model(make_model: Callable[[jax.Array], nnx.Module]) -> tuple[ModelDefinition, Tree, Tree]:
    """The model without its arrays: definition, shapes, and a `ParameterInfo` for each parameter.

    Args:
      make_model: key -> model, e.g. `lambda key: LanguageModel(config, key=key)`.
    """
    return split_model(nnx.eval_shape(make_model, jax.eval_shape(lambda: jax.random.key(0))))


def initializer(
    make_model: Callable[[jax.Array], nnx.Module], optimizer: Optimizer, parallel: Parallelism
) -> Callable[[int], TrainState]:
    """seed -> a fresh state, made in place: every device computes its own shards and nothing exists whole.

    The random bits do not depend on the mesh; the numbers made of them may differ in the last place, where a compiler
    vectorises a shard in another way than the whole. All seeds share one program.
    """

    def init(seed: jax.Array) -> TrainState:
        _, params, _ = split_model(make_model(jax.random.wrap_key_data(seed)))
        return fresh_state(params, optimizer)

    return _by_seed(init, optimizer.infos, parallel)


def params_initializer(
    make_model: Callable[[jax.Array], nnx.Module], infos: Tree, parallel: Parallelism
) -> Callable[[int], Tree]:
    """seed -> the parameters of `initializer` alone, for a run that may take others in their place.

    Args:
      infos: a `ParameterInfo` for each parameter.
    """
    return _by_seed(lambda seed: split_model(make_model(jax.random.wrap_key_data(seed)))[1], infos, parallel)


def _by_seed[T](init: Callable[[jax.Array], T], infos: Tree, parallel: Parallelism) -> Callable[[int], T]:
    program = jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init, seed_data(0)), infos, parallel))
    return lambda seed: program(seed_data(seed))


def seed_data(seed: int) -> np.ndarray:
    """The data of `jax.random.key(seed)`: an argument of a compiled program, so that other seeds can use it too."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def starter(params: Tree, optimizer: Optimizer, parallel: Parallelism) -> Callable[[Tree], TrainState]:
    """Parameters -> the state at step 0 of a run that starts from them, laid out as the step expects it.

    The parameters' buffers are taken.

    Args:
      params: their shapes.
    """

    def start(params: Tree) -> TrainState:
        return fresh_state(params, optimizer)

    shardings = state_shardings(jax.eval_shape(start, params), optimizer.infos, parallel)
    return jax.jit(start, out_shardings=shardings, donate_argnums=0)


def fresh_state(params: Tree, optimizer: Optimizer) -> TrainState:
    """The state at step 0 with `params`; inside jit, see `initializer` and `starter`."""
    # Buffers of a donated state must not be shared, hence the copy.
    ema = jax.tree.map(jnp.copy, params) if optimizer.config.ema_decay is not None else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def abstract_state(params: Tree, optimizer: Optimizer, parallel: Parallelism) -> TrainState:
    """A state's shapes, types and shardings, to restore a checkpoint into.

    Args:
      params: shapes of the parameters, from `abstract_model`.
    """
    state = jax.eval_shape(lambda params: fresh_state(params, optimizer), params)
    shardings = state_shardings(state, optimizer.infos, parallel)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def restore_state(
    saved: StoredCheckpoint, params: Tree, optimizer: Optimizer, parallel: Parallelism, layouts: tuple[StackLayout, ...]
) -> TrainState:
    """The state in a checkpoint. Its spike guard, where the run has another or none, is dropped, and a new one begins.

    Args:
      saved: of this model and optimizer.
      params: shapes of the parameters, from `abstract_model`.
      layouts: the model's scanned stacks.

    Raises:
      CheckpointError: as `StoredCheckpoint.restore`.
    """
    target = abstract_state(params, optimizer, parallel)
    wanted = target.opt_state.get(GUARD, {})
    on_disk = {path[2:]: leaf.shape for path, leaf in saved.leaves.items() if path[:2] == ("opt_state", GUARD)}
    if on_disk == {path: leaf.shape for path, leaf in naming.flatten(wanted).items()}:
        return saved.restore(target, layouts)
    leaves = {path: leaf for path, leaf in saved.leaves.items() if path[:2] != ("opt_state", GUARD)}
    rest = {name: part for name, part in target.opt_state.items() if name != GUARD}
    saved, target = dataclasses.replace(saved, leaves=leaves), dataclasses.replace(target, opt_state=rest)
    state = saved.restore(target, layouts)
    if not wanted:
        return state
    guard = jax.jit(optimizer.config.guard.init, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))()
    return dataclasses.replace(state, opt_state=state.opt_state | {GUARD: guard})


def unsplit_dimensions(infos: Tree, parallel: Parallelism) -> tuple[str, ...]:
    """A sentence for each dimension of parameters that the mesh cannot split, as they are used or stored.

    Args:
      infos: a `ParameterInfo` for each parameter.
      parallel: the mesh and its logical-axis rules.
    """
    reasons: list[str] = []
    for info in flatten(infos).values():
        parallel.sharding(info.axes, info.shape, reasons=reasons)
        parallel.stored(info.axes, info.shape, reasons=reasons)
    return tuple(dict.fromkeys(reasons))


def state_shardings(state: Any, infos: Tree, parallel: Parallelism) -> Any:
    """Shardings of a state, or of any tree with leaves that lie at a parameter's path and have its rank.

    Parameters, averages and moments follow their parameter's logical axes by `Parallelism.state_rules`; everything else
    (counters, the guard's window) is replicated. Dimensions that do not divide are replicated (`unsplit_dimensions`).
    Moments lie in the memory that `ParallelConfig.moments` names.

    Args:
      state: a tree of arrays or of `jax.ShapeDtypeStruct`.
      infos: a `ParameterInfo` for each parameter.
      parallel: the mesh and its logical-axis rules.

    Returns:
      the same tree of `NamedSharding`.
    """
    by_path: dict[tuple[str, ...], ParameterInfo] = flatten(infos)

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        info = info_of(path, by_path)
        if info is None or len(leaf.shape) != len(info.axes):
            return NamedSharding(parallel.mesh, PartitionSpec())
        found = parallel.stored(info.axes, tuple(leaf.shape))
        on_host = parallel.config.moments is Memory.HOST and moment_order(path) is not None
        return found.with_memory_kind(Memory.HOST.value) if on_host else found

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def on_device(tree: Any, shardings: Any) -> Any:
    """Inside jit: `tree`, which lies by `shardings`, with what is in the host's memory fetched from there."""
    return jax.tree.map(lambda x, s: jax.device_put(x, _on_device(s)) if _on_host(s) else x, tree, shardings)


def to_store(tree: Any, shardings: Any) -> Any:
    """Inside jit: `tree` laid out by `shardings`, in the memory that they name."""
    tree = jax.lax.with_sharding_constraint(tree, jax.tree.map(_on_device, shardings))
    return jax.tree.map(lambda x, s: jax.device_put(x, s) if _on_host(s) else x, tree, shardings)


def _on_host(sharding: NamedSharding) -> bool:
    return sharding.memory_kind == Memory.HOST.value


def _on_device(sharding: NamedSharding) -> NamedSharding:
    return sharding.with_memory_kind(Memory.DEVICE.value) if _on_host(sharding) else sharding


def working_copy(params: Tree, infos: Tree, parallel: Parallelism) -> Tree:
    """Inside jit: stored parameters as the model is to be given them.

    Where parameters are stored in other pieces than they are used in (`ParallelConfig.state_rules`), they are cast to
    the types the model uses and gathered, once. Otherwise they are what is stored: under FSDP each layer casts and
    gathers its own when it is its turn.

    Args:
      params: stored, or some of them.
      infos: a `ParameterInfo` for each parameter.
      parallel: how both lie on the mesh.
    """
    if not parallel.gathers:
        return params
    by_path = flatten(infos)

    def gathered(path: tuple[str, ...], x: jax.Array) -> jax.Array:
        info = by_path[path]
        # Placed before and after the cast: else the partitioner is free to gather first and to cast what it gathered.
        x = x if info.used_as is None else x.astype(info.used_as)
        x = jax.lax.with_sharding_constraint(x, parallel.stored(info.axes, x.shape))
        return jax.lax.with_sharding_constraint(x, parallel.sharding(info.axes, x.shape))

    return unflatten({path: gathered(path, x) for path, x in flatten(params).items()})


def stored_gradients(grads: Tree, infos: Tree, parallel: Parallelism) -> Tree:
    """Inside jit: gradients of `working_copy`, in float32, of the pieces of parameters that a device stores."""
    by_path = flatten(infos)

    def scattered(path: tuple[str, ...], x: jax.Array) -> jax.Array:
        if parallel.mesh.size > 1:
            x = jax.lax.with_sharding_constraint(x, parallel.stored(by_path[path].axes, x.shape))
        return x.astype(by_path[path].dtype)

    return unflatten({path: scattered(path, x) for path, x in flatten(grads).items()})
