"""Run folders as training leaves them, without the training: for tests of what opens and converts them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.configuration import resolve, resolved_text
from jaxlm.models import build_model
from jaxlm.run import RunConfig


@dataclasses.dataclass(frozen=True)
class Saved:
    """A run's folder as training leaves it, without the training."""

    folder: object
    run: RunConfig
    model: object
    average: dict


def save_run(workshop, name, *bindings, steps=(7,), text="", **options) -> Saved:
    """Checkpoints of a model that was only initialised, and its average, which is twice as large."""
    gin = workshop.gin(name, text, **options)
    run = resolve(RunConfig, workshop.arguments(name, gin, *bindings))
    model = build_model(run.model, key=jax.random.key(0))
    params = nnx.to_pure_dict(nnx.state(model))
    average = jax.tree.map(lambda x: 2 * x, params)
    folder = workshop.folder / name
    with CheckpointManager(folder / "checkpoints", CheckpointConfig(), model.layouts) as manager:
        for step in steps:
            state = {"params": params, "ema_params": average, "step": jnp.int32(step)}
            manager.save(step, state, config=resolved_text(run))
    return Saved(folder, run, model, average)
