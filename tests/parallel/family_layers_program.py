"""Run with 8 devices by test_family_layers.py: layers that some families add, on meshes and on one device."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.layers import (
    AttentionConfig,
    BlockConfig,
    DisentangledAttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    InitConfig,
    MixtureOfExpertsConfig,
    NormConfig,
    RelativeEmbeddings,
    StackConfig,
)
from jaxlm.layers.context import LOCAL, Context
from jaxlm.models import HeadConfig, LanguageModelConfig, build_model
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.training.parameters import split_model

B, T, VOCABULARY = 4, 16, 24
rng = np.random.default_rng(0)
NORM = NormConfig()
BLOCK = BlockConfig(AttentionConfig(2, 8), FeedForwardConfig(16), NORM)
EXPERTS = MixtureOfExpertsConfig(16, num_experts=4, shared=FeedForwardConfig(16), shared_gate="sigmoid")


def stack(relative=None, **changes):
    return StackConfig((dataclasses.replace(BLOCK, **changes),), 1, final_norm=NORM, relative_positions=relative)


DISENTANGLED = stack(RelativeEmbeddings(8, 12, NORM), attention=DisentangledAttentionConfig(2, 8))
COMMON = (VOCABULARY, 16, EmbeddingConfig(), HeadConfig(), InitConfig(std=0.3))
MODELS = {
    "disentangled": LanguageModelConfig(Architecture.ENCODER, *COMMON, encoder=DISENTANGLED),
    "two widths, shared gate": LanguageModelConfig(
        Architecture.ENCODER_DECODER,
        *COMMON,
        encoder=stack(),
        decoder=stack(cross_attention=AttentionConfig(2, 8), feed_forward=EXPERTS),
        encoder_width=24,
        encoder_embedding=EmbeddingConfig(),
    ),
}


def batch():
    found = {}
    for side in ("encoder", "decoder"):
        cut = rng.integers(4, 12, B)
        segments = np.where(np.arange(T) < cut[:, None], 1, 2)
        positions = np.where(np.arange(T) < cut[:, None], np.arange(T), np.arange(T) - cut[:, None])
        tokens = rng.integers(1, VOCABULARY, (B, T))
        for name, x in (("input_tokens", tokens), ("segment_ids", segments), ("positions", positions)):
            found[f"{side}_{name}"] = jnp.asarray(x, jnp.int32)
    return found


def outputs(config, mesh):
    """Hidden states, and the gradient of a function of them."""
    definition, params, _ = split_model(build_model(config, key=jax.random.key(0)))
    context = LOCAL
    if mesh is not None:
        context = Context(ShardedOps(ParallelConfig(mesh).on()))

    def loss(params, batch):
        hidden = definition.merge(params).hidden_states(batch, context=context)[0]
        return jnp.sum(jnp.sin(hidden)), hidden

    gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(params, BATCH)
    return [np.asarray(x) for x in (hidden, *jax.tree.leaves(gradient))]


BATCH = batch()
answer = {}
for name, config in MODELS.items():
    whole, meshed = outputs(config, None), outputs(config, MeshConfig(data=2, fsdp=2, tensor=2))
    answer[name] = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(whole, meshed, strict=True))
try:
    outputs(MODELS["disentangled"], MeshConfig(data=4, sequence=2))
    answer["refusal"] = None
except ValueError as error:
    answer["refusal"] = str(error)
print(json.dumps(answer))
