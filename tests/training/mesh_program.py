"""Run with 8 devices by test_meshes.py: loss and gradients of one step on several meshes, against one device."""

import json

import jax
import numpy as np
from small_models import decoder, packed_batch

from jaxlm.layers.parameters import Parametrization
from jaxlm.models.language_model import LanguageModel
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.full_lm import FullLM
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.training import optimizers, schedules
from jaxlm.training.parameters import flatten
from jaxlm.training.prefetch import to_devices
from jaxlm.training.state import abstract_model, init_state
from jaxlm.training.step import StepConfig, make_train_step

config = decoder(dropout=0.1)


def make(key):
    return LanguageModel(config, key=key)


definition, _, infos = abstract_model(make)
# Plain SGD with rate 1: what the step takes from the parameters is the gradient.
optimizer = optimizers.build_optimizer(
    optimizers.OptimizerConfig(optimizers.SGD(), schedules.Constant(1.0), clip_global_norm=None),
    infos,
    total_steps=1,
    parametrization=Parametrization(),
)


def run(mesh_config, devices, microbatches=1):
    parallel = ParallelConfig(mesh_config).on(jax.devices()[:devices])
    state = init_state(make, optimizer, parallel, seed=3)
    before = jax.device_get(state.params)
    sharded = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    step = make_train_step(
        definition,
        FullLM(),
        optimizer,
        parallel,
        config=StepConfig(microbatches=microbatches),
        loss=LossConfig(z_loss=1e-4, token_chunk=64),
    )
    state, metrics = step(state, to_devices(packed_batch(0), parallel))
    grads = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), before, jax.device_get(state.params))
    return before, float(metrics["loss"][0]), flatten(grads), sharded


initial, loss, grads, _ = run(MeshConfig(), 1)
total = np.sqrt(sum((g**2).sum() for g in grads.values()))
answer = {}
for name, mesh_config in (
    ("data", MeshConfig()),
    ("fsdp", MeshConfig(fsdp=8)),
    ("data x fsdp x tensor", MeshConfig(fsdp=2, tensor=2)),
    ("slices x fsdp x sequence", MeshConfig(slices=2, fsdp=2, sequence=2)),
):
    other_initial, other_loss, other, sharded = run(mesh_config, 8)
    answer[name] = {
        # The same random bits; a normal number made of them may differ in its last place (2^-23 relative).
        "start": max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (initial, other_initial)))),
        "loss": abs(other_loss - loss) / loss,
        # Law 3: ||g - g'|| <= 1e-5 max(||g||, 1e-3 ||all g||), leaf by leaf.
        "gradients": max(
            np.linalg.norm(g - other[path]) / max(np.linalg.norm(g), 1e-3 * total) for path, g in grads.items()
        ),
        "sharded": sharded,
    }
print(json.dumps(answer))
