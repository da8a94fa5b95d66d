"""Small models whose random logits are spread enough that rounding does not change a choice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.layers import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    InitConfig,
    NormConfig,
    Rope,
    StackConfig,
)
from jaxlm.models import HeadConfig, LanguageModelConfig, build_model

VOCAB, WIDTH = 40, 16


@pytest.fixture(scope="session")
def config():
    """A function that gives the configuration of a small model with these self-attentions, one a layer."""

    def make(
        architecture=Architecture.CAUSAL_DECODER,
        *attentions,
        repeats=2,
        stack_changes=None,
        block_changes=None,
        **changes,
    ):
        attentions = attentions or (AttentionConfig(4, 8, num_kv_heads=2, position=Rope()),)
        plain = BlockConfig(attentions[0], FeedForwardConfig(24), NormConfig())
        plain = dataclasses.replace(plain, **(block_changes or {}))
        blocks = tuple(dataclasses.replace(plain, attention=attention) for attention in attentions)
        one = StackConfig(blocks, repeats * len(blocks), final_norm=NormConfig(), **(stack_changes or {}))
        if architecture is Architecture.ENCODER:
            stacks = {"encoder": one}
        elif architecture is Architecture.ENCODER_DECODER:
            cross = AttentionConfig(4, 8, num_kv_heads=2)
            crossing = tuple(dataclasses.replace(block, cross_attention=cross) for block in blocks)
            stacks = {"encoder": one, "decoder": dataclasses.replace(one, blocks=crossing)}
        else:
            stacks = {"decoder": one}
        options = {"embedding": EmbeddingConfig(), "head": HeadConfig(), "init": InitConfig(std=0.4), **changes}
        return LanguageModelConfig(architecture, VOCAB, WIDTH, **options, **stacks)

    return make


@pytest.fixture(scope="session")
def build():
    """A function that gives the model of a configuration with random parameters: norm scales near 1."""

    def fill(config, seed=0):
        graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, key=jax.random.key(0))))
        rng = np.random.default_rng(seed)
        values = {
            path: variable.replace(
                jnp.asarray(rng.normal(size=variable.shape) * 0.3 + (path[-1] == "scale"), jnp.float32)
            )
            for path, variable in nnx.to_flat_state(state)
        }
        return nnx.merge(graph, nnx.from_flat_state(values))

    return fill


ROW = 64


@nnx.jit
def _all_logits(model, batch):
    return model.head(model.hidden_states(batch)[0])


@pytest.fixture(scope="session")
def uncached():
    """A function that gives float32 [T, V], the logits after each token of one text, from its whole row again.

    The text is laid out as training does (docs/architecture.md); `prompt` counts its tokens that are a prefix decoder's
    prefix, and is an encoder-decoder's encoder text.
    """

    def logits(model, tokens, *, prompt=0, source=None):
        architecture = model.config.architecture
        batch = {
            f"decoder_{name}": np.zeros((1, ROW), np.int32) for name in ("input_tokens", "segment_ids", "positions")
        }
        batch["decoder_input_tokens"][0, : len(tokens)] = tokens
        batch["decoder_segment_ids"][0, : len(tokens)] = 1
        batch["decoder_positions"][0, : len(tokens)] = np.arange(len(tokens))
        if architecture is Architecture.PREFIX_DECODER:
            batch["decoder_causal_attention"] = (np.arange(ROW) < prompt).astype(np.int32)[None]
        if architecture is Architecture.ENCODER_DECODER:
            batch |= {"encoder_" + name[8:]: np.zeros_like(x) for name, x in list(batch.items())}
            batch["encoder_input_tokens"][0, : len(source)] = source
            batch["encoder_segment_ids"][0, : len(source)] = 1
            batch["encoder_positions"][0, : len(source)] = np.arange(len(source))
        return np.asarray(_all_logits(model, batch)[0, : len(tokens)])

    return logits
