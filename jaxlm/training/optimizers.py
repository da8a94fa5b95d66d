"""Optimizers: typed configs, and what the training step calls.

An `Algorithm` (AdamW, Adafactor, Lion, Muon, SGD) turns gradients into a direction; `OptimizerConfig` adds what they
share: schedule, weight decay and its exceptions, settings by group, clipping, freezing, averaging, the spike guard and
schedule-free. `build_optimizer` puts them together for a model's parameters:

    direction  = algorithm(clip(gradient))
    parameter -= learning rate x multiplier x (direction + weight decay x parameter)

The learning rate is a function of the global step, not of a count kept in the optimizer, so that changing the schedule
of a running model is a change of one line. Names of hyperparameters are those of the papers and of optax.
"""

import abc
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.checkpoints.naming import GUARD
from jaxlm.layers.parameters import Parametrization
from jaxlm.training.adafactor import scale_by_adafactor
from jaxlm.training.guard import Skip, SpikeGuard
from jaxlm.training.moments import MomentStorage, stored
from jaxlm.training.parameters import ParameterInfo, Tree, flatten, map_infos, select, unflatten, update
from jaxlm.training.schedules import Schedule


class Multipliers(NamedTuple):
    """Factors on the learning rate, the weight decay and Adam's epsilon of one parameter."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def _adam_multipliers(info: ParameterInfo, parametrization: Parametrization) -> Multipliers:
    # Outside the stacks a parameter meets no residual branch: at the base depth nothing changes with depth.
    depth = parametrization.base_depth if info.depth is None else info.depth
    return Multipliers(
        parametrization.learning_rate_multiplier(info.role, info.width, depth),
        parametrization.weight_decay_multiplier(info.role, info.width),
        parametrization.epsilon_multiplier(info.role, info.width, depth),
    )


@dataclasses.dataclass(frozen=True)
class Algorithm(abc.ABC):
    """What turns gradients into a direction of descent."""

    @property
    def name(self) -> str:
        """Key of its state in the checkpoint."""
        return type(self).__name__.lower()

    @property
    def has_momentum(self) -> bool:
        """Whether it averages gradients, which schedule-free must do in its place."""
        return True

    @abc.abstractmethod
    def transform(self, infos: Tree, multipliers: Tree) -> optax.GradientTransformation:
        """Gradients -> direction, for the parameters in `infos`."""

    def multipliers(self, info: ParameterInfo, parametrization: Parametrization) -> Multipliers:
        """How this parameter's hyperparameters follow width and depth. Here: as for Adam, whose steps have no scale."""
        return _adam_multipliers(info, parametrization)


@dataclasses.dataclass(frozen=True)
class AdamW(Algorithm):
    """Adam with decoupled weight decay (arXiv 1412.6980, 1711.05101).

    Attributes:
      b1, b2: decay of the first and second moment; 0.95 is what large language models use (GPT-3, arXiv 2005.14165, B;
        Adam's own is 0.999).
      eps: added to the root of the second moment.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    @property
    @override
    def has_momentum(self) -> bool:
        return self.b1 > 0

    @override
    def transform(self, infos: Tree, multipliers: Tree) -> optax.GradientTransformation:
        def adam(eps: float) -> optax.GradientTransformation:
            if self.b1 == 0:  # without a first moment to store
                return optax.scale_by_rms(self.b2, eps, eps_in_sqrt=False, bias_correction=True)
            return optax.scale_by_adam(self.b1, self.b2, eps)

        factors = {path: factor.eps for path, factor in flatten(multipliers).items()}
        if set(factors.values()) <= {1.0}:
            return adam(self.eps)
        labels = {path: f"eps_{self.eps * factor:.6g}" for path, factor in factors.items()}
        return by_label(
            {f"eps_{self.eps * factor:.6g}": adam(self.eps * factor) for factor in factors.values()}, labels
        )


@dataclasses.dataclass(frozen=True)
class Adafactor(Algorithm):
    """Adafactor with T5's settings; T5 trains with learning rate `InverseSquareRoot()` and no weight decay.

    Attributes: see `jaxlm.training.adafactor.scale_by_adafactor`.
    """

    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    min_dim_size_to_factor: int = 128
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3

    @property
    @override
    def has_momentum(self) -> bool:
        return False

    @override
    def transform(self, infos: Tree, multipliers: Tree) -> optax.GradientTransformation:
        return scale_by_adafactor(infos, **dataclasses.asdict(self))

    @override
    def multipliers(self, info: ParameterInfo, parametrization: Parametrization) -> Multipliers:
        factors = _adam_multipliers(info, parametrization)
        if self.multiply_by_parameter_scale and info.role == "hidden":
            # The update already shrinks with the parameter, whose entries are of order 1/sqrt(width).
            root = parametrization.width_ratio(info.width) ** 0.5
            return factors._replace(learning_rate=factors.learning_rate * root, weight_decay=root)
        return factors


@dataclasses.dataclass(frozen=True)
class Lion(Algorithm):
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675).

    Attributes:
      b1: weight of the momentum in the direction.
      b2: decay of the momentum.
    """

    b1: float = 0.9
    b2: float = 0.99

    @override
    def transform(self, infos: Tree, multipliers: Tree) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclasses.dataclass(frozen=True)
class SGD(Algorithm):
    """Stochastic gradient descent.

    Attributes:
      momentum: decay of the gradients' running sum; 0 keeps none.
      nesterov: look ahead by one step of the momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False

    @property
    @override
    def has_momentum(self) -> bool:
        return self.momentum > 0

    @override
    def transform(self, infos: Tree, multipliers: Tree) -> optax.GradientTransformation:
        return optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()

    @override
    def multipliers(self, info: ParameterInfo, parametrization: Parametrization) -> Multipliers:
        if info.depth is not None and parametrization.depth_ratio(info.depth) != 1.0:
            raise ValueError(
                "SGD has no rule for depth, CompleteP is stated for Adam; keep the base depth or use AdamW."
            )
        # Table 8 of muP: fan-out of inputs and vectors, fan-in of the output, grow with width.
        return Multipliers(1.0 if info.role == "hidden" else parametrization.width_ratio(info.width))


@dataclasses.dataclass(frozen=True)
class Muon(Algorithm):
    """Orthogonalised momentum for hidden matrices, AdamW for embeddings, head and vectors (Jordan et al. 2024).

    Attention kernels are orthogonalised as the matrices they are, [embed, heads x head_dim], layer by layer.

    Attributes:
      beta: decay of the momentum.
      nesterov: look ahead by one step of the momentum.
      ns_steps: Newton-Schulz iterations.
      consistent_rms: scale updates to this root mean square x sqrt(larger side), so that one learning rate and weight
        decay serve both halves (0.2: Liu et al. 2025, arXiv 2502.16982); None scales by sqrt(max(1, out / in)).
      adam_b1, adam_b2, eps: of the AdamW half.
      adam_learning_rate_multiplier: its learning rate relative to the matrices'.
    """

    beta: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    consistent_rms: float | None = 0.2
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    eps: float = 1e-8
    adam_learning_rate_multiplier: float = 1.0

    @override
    def transform(self, infos: Tree, multipliers: Tree) -> optax.GradientTransformation:
        flat = flatten(infos)
        labels = {path: "muon" if self._is_matrix(info) else "adamw" for path, info in flat.items()}
        dimension_numbers = unflatten(
            {
                path: optax.contrib.MuonDimensionNumbers(*info.matrix_dims)
                for path, info in flat.items()
                if labels[path] == "muon"
            }
        )
        scales = unflatten({path: self._scale(info) for path, info in flat.items() if labels[path] == "muon"})
        muon = optax.chain(
            optax.contrib.scale_by_muon(
                ns_steps=self.ns_steps,
                beta=self.beta,
                nesterov=self.nesterov,
                weight_dimension_numbers=dimension_numbers,
            ),
            optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: s * u, updates, scales)),
        )
        adam = AdamW(self.adam_b1, self.adam_b2, self.eps)
        rest = {path: label for path, label in labels.items() if label == "adamw"}
        transforms = {"adamw": adam.transform(*(select(tree, unflatten(rest)) for tree in (infos, multipliers)))}
        return by_label({"muon": muon, **transforms}, labels)

    @override
    def multipliers(self, info: ParameterInfo, parametrization: Parametrization) -> Multipliers:
        if not self._is_matrix(info):
            factors = _adam_multipliers(info, parametrization)
            return factors._replace(learning_rate=factors.learning_rate * self.adam_learning_rate_multiplier)
        if self.consistent_rms is not None:
            return _adam_multipliers(info, parametrization)
        return Multipliers()  # an update of spectral norm 1 moves the activations as much at every width

    def _scale(self, info: ParameterInfo) -> float:
        fan_in, fan_out = (math.prod(info.shape[i] for i in dims) for dims in info.matrix_dims)
        if self.consistent_rms is None:
            return max(1.0, fan_out / fan_in) ** 0.5
        return self.consistent_rms * max(fan_in, fan_out) ** 0.5

    def _is_matrix(self, info: ParameterInfo) -> bool:
        return info.role == "hidden" and info.matrix_dims is not None


@dataclasses.dataclass(frozen=True)
class ScheduleFree:
    """Averages iterates in place of a decaying schedule and of momentum (Defazio et al. 2024, arXiv 2405.15682).

    Evaluation and export use the averaged parameters, `Optimizer.evaluation_params`.

    Attributes:
      b1: beta, how far gradients are taken from the average towards the newest iterate.
      weight_lr_power: iterates weigh by the largest learning rate so far to this power.
    """

    b1: float = 0.9
    weight_lr_power: float = 2.0


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Settings for the parameters whose path matches; the first group that matches holds.

    Attributes:
      pattern: regular expression searched in paths such as "decoder/layers/17/attention/query/kernel"; layers are
        counted in the same way whether the stack is scanned or not.
      learning_rate_multiplier: factor on the learning rate.
      weight_decay: in place of the optimizer's, whatever the role; None keeps what it would be.
    """

    pattern: str
    learning_rate_multiplier: float = 1.0
    weight_decay: float | None = None


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How a model's parameters are updated.

    Attributes:
      algorithm: AdamW, Adafactor, Lion, Muon or SGD.
      learning_rate: its schedule over the run.
      weight_decay: decoupled, multiplied by the learning rate (optax's and PyTorch's convention).
      decay_roles: roles of the parameters that decay. By default matrices; not embeddings, norms, biases, tables.
      clip_global_norm: largest norm of the whole gradient; None does not clip.
      groups: exceptions by pattern.
      freeze: patterns of parameters that stay as they are. They have no gradient and no optimizer state (where only
        some layers of a scanned stack are frozen, the stack's state is whole).
      moments: how the algorithm's moments are stored between steps; None keeps float32.
      ema_decay: keep an exponential moving average of the parameters with this decay; None keeps none.
      guard: what happens to steps that are outliers; None takes every step.
      schedule_free: average iterates; None does not.
    """

    algorithm: Algorithm
    learning_rate: Schedule
    weight_decay: float = 0.0
    decay_roles: tuple[str, ...] = ("hidden", "output")
    clip_global_norm: float | None = 1.0
    groups: tuple[ParameterGroup, ...] = ()
    freeze: tuple[str, ...] = ()
    moments: MomentStorage | None = None
    ema_decay: float | None = None
    guard: SpikeGuard | None = None
    schedule_free: ScheduleFree | None = None

    def __post_init__(self):
        if self.schedule_free and (self.algorithm.has_momentum or isinstance(self.algorithm, Adafactor)):
            raise ValueError(
                f"Schedule-free averages in place of momentum, which {self.algorithm} has of its own; use "
                f"AdamW(b1=0.0) or SGD(momentum=0.0)."
            )
        for pattern in (*self.freeze, *(group.pattern for group in self.groups)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"The parameter pattern {pattern!r} is no regular expression: {error}.") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """An `OptimizerConfig` made ready for one model; made by `build_optimizer`.

    Attributes:
      config: what it was made from.
      infos: of every parameter of the model.
      trainable: the part of `infos` that is trained.
      total_steps: span of the learning-rate schedule.
      algorithm: the direction of descent, on trainable parameters.
      rates: learning-rate multiplier and weight decay of each trainable parameter, numbers or [layers, 1, ...].
      masks: for arrays of a scanned stack of which only some layers are frozen: 0 for those, 1 for the others.
    """

    config: OptimizerConfig
    infos: Tree
    trainable: Tree
    total_steps: int
    algorithm: optax.GradientTransformationExtraArgs
    rates: Tree
    masks: dict[tuple[str, ...], np.ndarray]

    def learning_rate(self, step: jax.Array | int) -> jax.Array:
        """The scheduled learning rate at a step, before multipliers."""
        return self.config.learning_rate(step, self.total_steps)

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """All parameters as (trained, frozen)."""
        trained = flatten(self.trainable)
        flat = flatten(params)
        return select(params, self.trainable), unflatten({p: leaf for p, leaf in flat.items() if p not in trained})

    def init(self, params: Tree) -> dict[str, Any]:
        """State for all of the model's `params`; a dict with the algorithm's name and, if configured, `GUARD`."""
        state = {self.config.algorithm.name: self.algorithm.init(self.split(params)[0])}
        if self.config.guard:
            state[GUARD] = self.config.guard.init()
        return state

    def update(
        self, grads: Tree, state: dict[str, Any], trained: Tree, *, step: jax.Array, loss: jax.Array
    ) -> tuple[Tree, dict[str, Any], dict[str, jax.Array]]:
        """One update.

        Args:
          grads: gradients of the trained parameters.
          state: from `init` or the previous update.
          trained: the trained parameters.
          step: int32 scalar, the global step from 0.
          loss: the step's loss, for the guard.

        Returns:
          what to add to the trained parameters, the new state, and {"grad_norm", "learning_rate", "diverged"}, with a
          guard also "skipped". "diverged" is 1 where the loop must not build upon the step: loss or gradient are not
          finite, or the guard's policy gives up.
        """
        name = self.config.algorithm.name
        if self.masks:
            flat = flatten(grads)
            grads = unflatten({path: g * self.masks[path] if path in self.masks else g for path, g in flat.items()})
        grad_norm = optax.tree.norm(grads)
        scalars = {"grad_norm": grad_norm, "learning_rate": self.learning_rate(step)}
        diverged = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        if (limit := self.config.clip_global_norm) is not None:
            # A single factor, so that the product fuses into the update instead of writing clipped gradients.
            factor = jnp.minimum(1.0, limit / jnp.maximum(grad_norm, jnp.finfo(jnp.float32).tiny))
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, new = self.algorithm.update(grads, state[name], trained, step=step)
        new_state = {name: new}
        if self.config.guard:
            skip, new_state[GUARD] = self.config.guard.judge(state[GUARD], loss, grad_norm)
            updates = jax.tree.map(lambda u: jnp.where(skip, 0.0, u), updates)
            new_state[name] = jax.tree.map(lambda old, fresh: jnp.where(skip, old, fresh), state[name], new)
            scalars["skipped"] = skip.astype(jnp.float32)
            diverged = (self.config.guard.policy or Skip()).gives_up(skip, new_state[GUARD].in_a_row)
        return updates, new_state, scalars | {"diverged": diverged.astype(jnp.float32)}

    def evaluation_params(self, params: Tree, state: dict[str, Any]) -> Tree:
        """The parameters to evaluate and export: `params`, or schedule-free's average."""
        if not self.config.schedule_free:
            return params
        trained = self.split(params)[0]
        averaged = optax.contrib.schedule_free_eval_params(state[self.config.algorithm.name], trained)
        return update(params, averaged)


def build_optimizer(
    config: OptimizerConfig, infos: Tree, *, total_steps: int, parametrization: Parametrization
) -> Optimizer:
    """The optimizer of a model.

    Args:
      config: what to do.
      infos: a `ParameterInfo` for each parameter of the model, from `jaxlm.training.parameters.split_model`.
      total_steps: length of the run, over which the schedule is stretched.
      parametrization: the model's own; says how rates follow width and depth.

    Raises:
      ValueError: a pattern of `groups` or `freeze` matches no parameter, or everything is frozen.
    """
    names = [name for info in flatten(infos).values() for name in info.names]
    for pattern in (*config.freeze, *(group.pattern for group in config.groups)):
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"The parameter pattern {pattern!r} matches none of the model's {len(names)} parameters; paths look "
                f"like {names[0]!r} and {names[-1]!r}."
            )

    def is_trained(name: str) -> bool:
        return not any(re.search(pattern, name) for pattern in config.freeze)

    shares = {path: info.per_layer(is_trained) for path, info in flatten(infos).items()}
    trained = {path: info for path, info in flatten(infos).items() if np.any(shares[path])}
    if not trained:
        raise ValueError(f"The patterns of `freeze` {config.freeze} match every parameter; nothing is left to train.")
    trainable = unflatten(trained)
    multipliers = map_infos(lambda info: config.algorithm.multipliers(info, parametrization), trainable)
    rates = map_infos(lambda info, factors: _rates(info, factors, config, is_trained), trainable, multipliers)
    direction = config.algorithm.transform(trainable, multipliers)
    if config.moments is not None:
        direction = stored(direction, config.moments, trainable)
    algorithm = optax.chain(direction, _descend(config, total_steps, rates))
    if config.schedule_free:
        algorithm = _averaging(algorithm, config, total_steps)
    return Optimizer(
        config=config,
        infos=infos,
        trainable=trainable,
        total_steps=total_steps,
        algorithm=optax.with_extra_args_support(algorithm),
        rates=rates,
        masks={path: shares[path] for path in trained if isinstance(shares[path], np.ndarray)},
    )


class Rates(NamedTuple):
    """Learning-rate multiplier and weight decay of one array: numbers, or [layers, 1, ...] where its layers differ."""

    learning_rate: float | np.ndarray
    weight_decay: float | np.ndarray


def _rates(
    info: ParameterInfo, factors: Multipliers, config: OptimizerConfig, is_trained: Callable[[str], bool]
) -> Rates:
    decay = config.weight_decay if info.role in config.decay_roles else 0.0

    def group(name: str) -> ParameterGroup | None:
        return next((group for group in config.groups if re.search(group.pattern, name)), None)

    def learning_rate(name: str) -> float:
        found = group(name)
        return is_trained(name) * factors.learning_rate * (found.learning_rate_multiplier if found else 1.0)

    def weight_decay(name: str) -> float:
        found = group(name)
        return factors.weight_decay * (decay if found is None or found.weight_decay is None else found.weight_decay)

    return Rates(info.per_layer(learning_rate), info.per_layer(weight_decay))


def _descend(config: OptimizerConfig, total_steps: int, rates: Tree) -> optax.GradientTransformationExtraArgs:
    """Direction -> update: weight decay, learning rate and sign."""

    def apply(updates: Tree, state: Any, params: Tree, *, step: jax.Array, **_: Any) -> tuple[Tree, Any]:
        learning_rate = config.learning_rate(step, total_steps)

        def descend(rate: Rates, direction: jax.Array, param: jax.Array) -> jax.Array:
            if np.any(rate.weight_decay):
                direction = direction + rate.weight_decay * param
            return -(learning_rate * rate.learning_rate) * direction

        return jax.tree.map(descend, rates, updates, params, is_leaf=lambda node: isinstance(node, Rates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), apply)


def _averaging(
    algorithm: optax.GradientTransformation, config: OptimizerConfig, total_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Schedule-free around an algorithm. Iterates weigh by the global step's rate: its own count may start again."""
    averaging = functools.partial(optax.contrib.schedule_free, algorithm, **dataclasses.asdict(config.schedule_free))

    def apply(updates: Tree, state: Any, params: Tree, *, step: jax.Array, **extra: Any) -> tuple[Tree, Any]:
        learning_rate = jnp.asarray(config.learning_rate(step, total_steps), state.max_lr.dtype)
        return averaging(learning_rate).update(updates, state, params, step=step, **extra)

    return optax.GradientTransformationExtraArgs(averaging(0.0).init, apply)


def by_label(
    transforms: dict[str, optax.GradientTransformation], labels: dict[tuple[str, ...], str]
) -> optax.GradientTransformationExtraArgs:
    """Each parameter by the transform of its label; a transform sees a nested dict of its own parameters only.

    (`optax.partition` would hand every transform the whole tree with holes in it.)
    """
    extended: dict[str, Callable] = {label: optax.with_extra_args_support(t) for label, t in transforms.items()}

    def part(tree: Tree, label: str) -> Tree:
        return unflatten({path: leaf for path, leaf in flatten(tree).items() if labels[path] == label})

    def init(params: Tree) -> dict[str, Any]:
        return {label: transform.init(part(params, label)) for label, transform in extended.items()}

    def apply(updates: Tree, state: dict[str, Any], params: Tree, **extra: Any) -> tuple[Tree, dict[str, Any]]:
        new_updates, new_state = {}, {}
        for label, transform in extended.items():
            done, new_state[label] = transform.update(part(updates, label), state[label], part(params, label), **extra)
            new_updates.update(flatten(done))
        return unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init, apply)
