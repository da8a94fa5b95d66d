"""Run with 8 devices by test_sharded.py: what the engine writes on a mesh, against one device."""

import json

import jax
import numpy as np
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.engine import Engine, EngineConfig
from jaxlm.decoding.previews import Prompt, SampleConfig, preview
from jaxlm.decoding.requests import Request
from jaxlm.decoding.sampling import SamplingConfig
from jaxlm.layers import (
    AttentionConfig,
    BlockConfig,
    Context,
    EmbeddingConfig,
    FeedForwardConfig,
    InitConfig,
    MixtureOfExpertsConfig,
    NormConfig,
    Rope,
    StackConfig,
)
from jaxlm.models import HeadConfig, LanguageModelConfig, build_model
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.parallel.stages import Pipeline
from jaxlm.training.compiles import CompileCounter

ATTENTION = AttentionConfig(4, 8, num_kv_heads=2, position=Rope())
PLAIN = BlockConfig(ATTENTION, FeedForwardConfig(32), NormConfig())
WINDOWED = BlockConfig(
    AttentionConfig(4, 8, num_kv_heads=2, window=(5, 0), position=Rope()),
    MixtureOfExpertsConfig(num_experts=4, experts_per_token=2, hidden=32),
    NormConfig(),
)
MESH = MeshConfig(data=1, fsdp=2, tensor=2, expert=2)
CONFIG = LanguageModelConfig(
    Architecture.CAUSAL_DECODER,
    40,
    32,
    EmbeddingConfig(),
    HeadConfig(),
    InitConfig(std=0.4),
    decoder=StackConfig((PLAIN, WINDOWED), 2, final_norm=NormConfig()),
)
REQUESTS = [
    Request(prompt, SamplingConfig(6 + i, temperature=float(i % 2)), seed=i)
    for i, prompt in enumerate([[5, 6, 7], [9], list(range(2, 15)), [4, 4], [], [3] * 7])
]


def placed(model, parallel):
    """The model on a mesh."""
    graph, state = nnx.split(model)
    put = {
        path: variable.replace(
            jax.device_put(variable.get_value(), parallel.sharding(variable.get_metadata()["axes"], variable.shape))
        )
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(put))


def written(model, **options):
    """(the engine, tokens of all answers)."""
    engine = Engine(CachedModel(model, start_id=0, **options), EngineConfig(slots=4, steps=4))
    return engine, [answer.tokens.tolist() for answer in engine.generate(REQUESTS)]


class Letters:
    """A vocabulary of letters, for previews."""

    size, pad_id, eos_id, mask_id = 40, 0, 39, None

    def info(self):
        return self

    def decode(self, ids):
        return "".join(chr(97 + int(i) % 26) for i in ids)


def refusal(config):
    """What is said of a mesh that cannot decode."""
    try:
        CachedModel(build_model(CONFIG, key=jax.random.key(0)), start_id=0, context=on(config)[1])
    except ValueError as error:
        return str(error)
    return ""


def on(mesh):
    """(Parallelism, Context) of a mesh."""
    parallel = ParallelConfig(mesh, pipeline=Pipeline(2)).on()
    return parallel, Context(ops=ShardedOps(parallel))


def shown(mesh):
    """A preview on a mesh; None: on one device."""
    model, context = build_model(CONFIG, key=jax.random.key(1)), Context()
    if mesh is not None:
        parallel, context = on(mesh)
        model = placed(model, parallel)
    config = SampleConfig(period=1, sampling=SamplingConfig(6, temperature=0.0))
    prompts = [Prompt(np.array([5, 6, 7]), np.array([8])), Prompt(np.array([9] * 11), np.array([8]))]
    return preview(model, prompts, Letters(), config, context=context)


model = build_model(CONFIG, key=jax.random.key(0))
_, alone = written(model)
parallel, context = on(MESH)
engine, tokens = written(placed(model, parallel), context=context)
with CompileCounter() as compiles:
    engine.generate(REQUESTS)
keys = engine._slots.caches.blocks[0].attention.keys.values
found = {"same": tokens == alone, "compiles": compiles.names, "spec": str(keys.sharding.spec)}
found["previews"] = [shown(mesh) for mesh in (None, MeshConfig(sequence=4), MeshConfig(stage=2))]
found["refusals"] = [refusal(mesh) for mesh in (MeshConfig(sequence=2), MeshConfig(stage=2))]
print(json.dumps(found))
