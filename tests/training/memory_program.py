"""Run with 8 devices by test_memory.py: ZeRO-1, moments on the host, microbatches, against plain data parallel."""

import json
import sys

import jax
import numpy as np
from small_models import decoder, packed_batch

from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.layers.parameters import Parametrization
from jaxlm.models.language_model import LanguageModel
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.full_lm import FullLM
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import Memory, ParallelConfig
from jaxlm.training.moments import MomentStorage, moment_order
from jaxlm.training.optimizers import SGD, OptimizerConfig, build_optimizer
from jaxlm.training.parameters import flatten
from jaxlm.training.prefetch import to_devices
from jaxlm.training.schedules import Constant
from jaxlm.training.state import abstract_model, abstract_state, initializer
from jaxlm.training.step import StepConfig, make_train_step

config = decoder()


def make(key):
    return LanguageModel(config, key=key)


definition, abstract, infos = abstract_model(make)


RATE = 64.0  # so large that the parameters' own rounding is far below the gradient's


def run(parallel_config, moments=None, microbatches=1):
    """Two steps of SGD with momentum: what the first takes from the parameters is the gradient, times the rate."""
    optimizer = build_optimizer(
        OptimizerConfig(SGD(momentum=0.9), Constant(RATE), clip_global_norm=None, moments=moments),
        infos,
        total_steps=1,
        parametrization=Parametrization(),
    )
    parallel = parallel_config.on()
    state = initializer(make, optimizer, parallel)(3)
    before = jax.device_get(state.params)
    step = make_train_step(
        definition,
        FullLM(),
        optimizer,
        parallel,
        config=StepConfig(microbatches=microbatches),
        loss=LossConfig(z_loss=1e-4),
    )
    state, metrics = step(state, to_devices(packed_batch(0, 16), parallel))
    grads = jax.tree.map(lambda a, b: (np.float64(a) - np.float64(b)) / RATE, before, jax.device_get(state.params))
    state, _ = step(state, to_devices(packed_batch(1, 16), parallel))
    return float(metrics["loss"][0]), flatten(grads), state, step.compiles, (optimizer, parallel)


loss, grads, _, _, _ = run(ParallelConfig(MeshConfig()))
total = np.sqrt(sum((g**2).sum() for g in grads.values()))
levers = ParallelConfig(MeshConfig(fsdp=2), state_rules=(("embed", ("fsdp", "data")),), moments=Memory.HOST)
other_loss, other, state, compiles, (optimizer, parallel) = run(levers, MomentStorage(), microbatches=2)


def facts(tree):
    return [
        (moment_order(path) is not None, leaf.sharding.memory_kind, str(leaf.dtype), leaf.sharding.num_devices)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.ndim
    ]


target = abstract_state(abstract, optimizer, parallel)
with CheckpointManager(sys.argv[1], CheckpointConfig(), definition.layouts) as manager:
    manager.save(2, state)
with CheckpointManager(sys.argv[1], CheckpointConfig(), definition.layouts) as manager:
    restored = manager.restore(target).state
leaves = [jax.tree.leaves(tree) for tree in (state, restored)]
print(
    json.dumps(
        {
            "loss": abs(other_loss - loss) / loss,
            "gradients": max(
                np.linalg.norm(g - other[path]) / max(np.linalg.norm(g), 1e-3 * total) for path, g in grads.items()
            ),
            "compiles": compiles,
            "moments": sorted({fact[1:3] for fact in facts(state) if fact[0]}),
            "others": sorted({fact[1:3] for fact in facts(state) if not fact[0]}),
            "whole": [
                "/".join(path)
                for path, leaf in flatten(state.params).items()
                if leaf.addressable_shards[0].data.size * 8 != leaf.size
            ],
            "restored": all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*leaves)),
            "restored_where": all(a.sharding == b.sharding for a, b in zip(*leaves)),
        }
    )
)
