"""Law 3, for programs that tests run with 8 devices: loss and gradients of one step, on meshes and on one device."""

import dataclasses

import jax
import numpy as np

from jaxlm.layers.parameters import Parametrization
from jaxlm.models.config import LanguageModelConfig
from jaxlm.models.language_model import LanguageModel
from jaxlm.objectives.base import Distillation, LossConfig
from jaxlm.objectives.full_lm import FullLM
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism
from jaxlm.training import optimizers, schedules
from jaxlm.training.parameters import Tree, flatten, split_model, unflatten
from jaxlm.training.prefetch import to_devices
from jaxlm.training.state import abstract_model, initializer
from jaxlm.training.step import StepConfig, make_train_step
from jaxlm.training.teacher import Teacher

RATE = 1024.0
"""Of the step that gradients are read from: large, or what parameters are rounded to would show in small gradients."""


def placed_teacher(config: LanguageModelConfig, parallel: Parallelism) -> tuple[Teacher, Tree]:
    """A teacher of random parameters, and these on a mesh."""
    definition, params, infos = split_model(LanguageModel(config, key=jax.random.key(7)))
    kinds = flatten(infos)
    placed = {
        path: jax.device_put(leaf, parallel.sharding(kinds[path].axes, leaf.shape))
        for path, leaf in flatten(params).items()
    }
    return Teacher(config, definition, params, 0, "", None), unflatten(placed)


def agreement(
    config: LanguageModelConfig,
    batch: dict[str, np.ndarray],
    meshes: dict[str, tuple[MeshConfig, int]],
    teacher: LanguageModelConfig | None = None,
) -> dict[str, dict[str, float]]:
    """How far one training step on each mesh (a configuration, a number of devices) is from that on one device.

    With a teacher half of the loss is the divergence from it.

    Returns:
      for each mesh "start" and "loss", the largest differences; "gradients", the largest of
      ||g - g'|| / max(||g||, 1e-3 ||all g||) over leaves; "sharded", how many parameters are split; "metrics".
    """

    def make(key):
        return LanguageModel(config, key=key)

    definition, _, infos = abstract_model(make)
    # Plain SGD: what the step takes from the parameters is the rate times the gradient.
    optimizer = optimizers.build_optimizer(
        optimizers.OptimizerConfig(optimizers.SGD(), schedules.Constant(RATE), clip_global_norm=None),
        infos,
        total_steps=1,
        parametrization=Parametrization(),
    )

    def run(mesh_config, devices):
        parallel = ParallelConfig(mesh_config).on(jax.devices()[:devices])
        state = initializer(make, optimizer, parallel)(3)
        before = jax.device_get(state.params)
        sharded = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
        loss, taught_by, options = LossConfig(z_loss=1e-4, token_chunk=64), {}, {}
        if teacher is not None:
            loss = dataclasses.replace(loss, distillation=Distillation("", temperature=2.0, share=0.5))
            options["teacher"], taught_by = placed_teacher(teacher, parallel)
            sharded = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(taught_by))
        step = make_train_step(definition, FullLM(), optimizer, parallel, config=StepConfig(), loss=loss, **options)
        step = step.with_teacher(taught_by)
        state, metrics = step(state, to_devices(batch, parallel))
        after = jax.device_get(state.params)
        grads = jax.tree.map(lambda a, b: (np.float64(a) - np.float64(b)) / RATE, before, after)
        metrics = {name: float(total / weight) for name, (total, weight) in metrics.items() if total.ndim == 0}
        return before, metrics, flatten(grads), sharded

    initial, one, grads, _ = run(MeshConfig(), 1)
    total = np.sqrt(sum((g**2).sum() for g in grads.values()))
    answer = {}
    for name, mesh in meshes.items():
        other_initial, other, other_grads, sharded = run(*mesh)
        answer[name] = {
            # The same random bits; a normal number made of them may differ in its last place (2^-23 relative).
            "start": max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (initial, other_initial)))),
            "loss": abs(other["loss"] - one["loss"]) / one["loss"],
            "gradients": max(
                np.linalg.norm(g - other_grads[path]) / max(np.linalg.norm(g), 1e-3 * total)
                for path, g in grads.items()
            ),
            "sharded": sharded,
            "metrics": {key: (one[key], other[key]) for key in one if key.startswith(("router/", "loss/"))},
        }
    return answer
