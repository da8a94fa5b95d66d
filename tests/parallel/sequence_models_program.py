"""Run with 8 devices by test_sequence_parallel.py: losses, metrics and gradients of models whose rows are split."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.layers import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    InitConfig,
    LearnedPositions,
    NormConfig,
    RelativePositions,
    Rope,
    StackConfig,
)
from jaxlm.layers.context import LOCAL, Context
from jaxlm.models import EmbeddingSharing, HeadConfig, LanguageModelConfig, ReplacedTokenDetectorConfig, build_model
from jaxlm.objectives import losses
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.multi_token import MultiTokenPrediction
from jaxlm.objectives.replaced_token_detection import ReplacedTokenDetection
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.training.parameters import split_model

B, T, VOCABULARY = 2, 16, 24
LOSS = LossConfig(num_datasets=2)
rng = np.random.default_rng(0)


def model(architecture, position=None, learned=False, **changes):
    attention = AttentionConfig(2, 8, num_kv_heads=1, position=position, dropout=0.1)
    block = BlockConfig(attention, FeedForwardConfig(16, dropout=0.1), NormConfig(), dropout=0.1)
    stack = StackConfig((block,), 1, final_norm=NormConfig(), dropout=0.1)
    stacks = {"encoder" if architecture is Architecture.ENCODER else "decoder": stack}
    if architecture is Architecture.ENCODER_DECODER:
        cross = dataclasses.replace(block, cross_attention=dataclasses.replace(attention, position=None))
        stacks = {"encoder": stack, "decoder": dataclasses.replace(stack, blocks=(cross,))}
    embedding = EmbeddingConfig(positions=LearnedPositions(T) if learned else None, dropout=0.1)
    config = LanguageModelConfig(architecture, VOCABULARY, 16, embedding, HeadConfig(), InitConfig(), **stacks)
    return dataclasses.replace(config, **changes, **({"future_block": block} if "future_tokens" in changes else {}))


def rows(side):
    """Two segments that cross the runs of the devices, and padding."""
    segments = np.asarray([np.r_[np.repeat([1, 2], cut), np.zeros(T - sum(cut), int)] for cut in ((5, 9), (10, 6))])
    position = np.asarray([np.r_[tuple(map(np.arange, (*cut, T - sum(cut))))] for cut in ((5, 9), (10, 6))])
    found = {
        "input_tokens": rng.integers(1, VOCABULARY, (B, T)),
        "target_tokens": rng.integers(1, VOCABULARY, (B, T)),
        "segment_ids": segments,
        "positions": position,
        "causal_attention": (position < 3).astype(int),
    }
    batch = {f"{side}_{name}": jnp.asarray(x, jnp.int32) for name, x in found.items()}
    return batch | {f"{side}_loss_weights": jnp.asarray((segments > 0) * rng.random((B, T)), jnp.float32)}


BATCH = {
    **{name: x for name, x in rows("encoder").items() if name not in ("encoder_target_tokens", "encoder_loss_weights")},
    **rows("decoder"),
    "dataset_ids": jnp.asarray(rng.integers(0, 2, (B, T)), jnp.int32),
}
ENCODER_BATCH = rows("encoder") | {"dataset_ids": BATCH["dataset_ids"]}
electra = model(Architecture.ENCODER, learned=True)
headless = dataclasses.replace(electra, head=None)
MODELS = {
    "encoder-decoder": (
        model(Architecture.ENCODER_DECODER, RelativePositions(8, 16)),
        losses.cross_entropy_sums,
        BATCH,
    ),
    "prefix decoder": (model(Architecture.PREFIX_DECODER, learned=True), losses.cross_entropy_sums, BATCH),
    "several tokens ahead": (
        model(Architecture.CAUSAL_DECODER, Rope(), future_tokens=2),
        MultiTokenPrediction(num_future=2).loss_sums,
        BATCH,
    ),
    "replaced tokens": (
        ReplacedTokenDetectorConfig(headless, electra, EmbeddingSharing.GRADIENT_DISENTANGLED),
        ReplacedTokenDetection().loss_sums,
        ENCODER_BATCH,
    ),
}
made = {name: split_model(build_model(config, key=jax.random.key(0))) for name, (config, _, _) in MODELS.items()}


def all_losses(ops):
    context = Context(ops=ops, dropout_key=jax.random.key(7))

    def total(params):
        found = {}
        for name, (_, sums, batch) in MODELS.items():
            terms, metrics, *_ = sums(made[name][0].merge(params[name]), batch, context=context, config=LOSS)
            found[name] = terms, metrics
        return sum(jnp.sum(x) for terms, _ in found.values() for x in terms.values()), found

    return jax.jit(jax.value_and_grad(total, has_aux=True))({name: params for name, (_, params, _) in made.items()})


def error(a, b, floor=1e-6):
    return float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), floor))


(_, expected), gradient = all_losses(LOCAL.ops)
(_, found), other = all_losses(ShardedOps(ParallelConfig(MeshConfig(sequence=4, tensor=2)).on()))
whole = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))))
answer = {}
for name in MODELS:
    pairs = [
        zip(*map(jax.tree.leaves, (tree[0][name], tree[1][name]))) for tree in ((found, expected), (other, gradient))
    ]
    values, gradients = ([error(a, b, floor) for a, b in p] for p, floor in zip(pairs, (1e-6, 1e-3 * whole)))
    answer[name] = {"values": max(values), "gradients": max(gradients), "count": len(values)}
print(json.dumps(answer))
