"""Small models with features that no class of transformers has together, for the modelling file of our own."""

import dataclasses
from typing import Any

from jaxlm.architecture import Architecture
from jaxlm.layers.attention import AttentionConfig, QKNorm
from jaxlm.layers.block import Arrangement, BlockConfig, Placement
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.mixture_of_experts import MixtureOfExpertsConfig, Scoring
from jaxlm.layers.norms import NormConfig, NormKind
from jaxlm.layers.parameters import InitConfig, InitScheme, Parametrization, Scaling
from jaxlm.layers.positions import (
    Alibi,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    RelativePositions,
    Rope,
    SinusoidalPositions,
    YarnScaling,
)
from jaxlm.layers.stack import StackConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig

WIDTH, VOCABULARY = 24, 64
LAYER_NORM = NormConfig(NormKind.LAYER, 1e-5, bias=True)


def model(architecture: str, stack: StackConfig, **options: Any) -> LanguageModelConfig:
    """A model of one stack; matrices are large, so that every feature counts."""
    architecture = Architecture(architecture)
    name = "encoder" if architecture is Architecture.ENCODER else "decoder"
    options = {"embedding": EmbeddingConfig(), "head": HeadConfig(), name: stack, **options}
    return LanguageModelConfig(architecture, VOCABULARY, WIDTH, init=InitConfig(InitScheme.FIXED, 0.2), **options)


def _sandwich() -> LanguageModelConfig:
    norm = NormConfig(scale_offset=1.0)
    attention = AttentionConfig(
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        position=Rope(500.0, 0.5, Llama3Scaling(4.0, 1.0, 4.0, 12)),
        window=(5, 0),
        qk_norm=QKNorm.HEAD,
        qk_norm_config=norm,
        soft_cap=3.0,
        qkv_bias=True,
        output_bias=True,
        sinks=True,
    )
    fed = FeedForwardConfig(40, Activation.GELU_TANH, gated=True, bias=True)
    block = BlockConfig(attention, fed, norm, placement=Placement.SANDWICH)
    far = dataclasses.replace(attention, window=None, position=Rope(900.0, 1.0, LinearScaling(2.0)))
    whole = dataclasses.replace(block, attention=far)
    stack = StackConfig((block, whole), 4, prologue=(whole,), final_norm=norm)
    head = HeadConfig(tied=False, soft_cap=4.0)
    return model("prefix_decoder", stack, embedding=EmbeddingConfig(scale_by_width=True), head=head)


def _buckets() -> LanguageModelConfig:
    fed = FeedForwardConfig(40, Activation.SQUARED_RELU, gated=False, bias=True)
    block = BlockConfig(AttentionConfig(3, 8, scale=1.0), fed, LAYER_NORM, arrangement=Arrangement.PARALLEL)
    relative = RelativePositions(8, 12, bidirectional=False)
    stack = StackConfig((block,), 2, final_norm=LAYER_NORM, relative_positions=relative)
    rule = Parametrization(Scaling.COMPLETEP, base_width=16, base_depth=1, alpha=0.7)
    by_width = {"embedding": EmbeddingConfig(scale_by_width=True), "head": HeadConfig(scale_by_width=True)}
    return model("causal_decoder", stack, parametrization=rule, **by_width)


def _experts() -> LanguageModelConfig:
    shared = FeedForwardConfig(16, Activation.RELU)
    experts = MixtureOfExpertsConfig(
        20, num_experts=4, experts_per_token=2, scoring=Scoring.SIGMOID, scale=2.5, shared=shared, z_loss=0.0
    )
    near = BlockConfig(AttentionConfig(3, 8, position=Alibi()), experts, LAYER_NORM, LAYER_NORM)
    plain = MixtureOfExpertsConfig(20, gated=False, num_experts=3, experts_per_token=1, normalize=False)
    table = AttentionConfig(4, 8, num_kv_heads=1, position=RelativePositions(8, 12))
    far = BlockConfig(table, plain, LAYER_NORM, arrangement=Arrangement.PARALLEL_NORMS)
    rule = Parametrization(Scaling.MUP, base_width=16, base_head_dim=4)
    stack = StackConfig((near, far), 2, final_norm=LAYER_NORM)
    embedding = EmbeddingConfig(positions=LearnedPositions(48, unused=2))
    return model("causal_decoder", stack, embedding=embedding, parametrization=rule)


def _encoder() -> LanguageModelConfig:
    fed = FeedForwardConfig(40, Activation.GELU, gated=False, bias=True)
    attention = AttentionConfig(4, 6, qkv_bias=True, window=(4, 6))
    block = BlockConfig(attention, fed, LAYER_NORM, placement=Placement.POST)
    embedding = EmbeddingConfig(width=16, positions=SinusoidalPositions(100.0), types=2, norm=LAYER_NORM)
    head = HeadConfig(bias=True, transform=Activation.SILU, transform_norm=LAYER_NORM)
    return model("encoder", StackConfig((block,), 2), embedding=embedding, head=head, pooler=True)


def _encoder_decoder() -> LanguageModelConfig:
    norm, fed = NormConfig(), FeedForwardConfig(40, Activation.RELU, gated=True)
    attention = AttentionConfig(4, 8, position=Rope(300.0, 1.0, YarnScaling(4.0, 12)))
    block = BlockConfig(attention, fed, norm, placement=Placement.OUTPUT)
    writes = dataclasses.replace(block, cross_attention=AttentionConfig(2, 8, num_kv_heads=1), placement=Placement.PRE)
    return model(
        "encoder_decoder",
        StackConfig((writes,), 3, final_norm=norm),
        encoder=StackConfig((block,), 2, final_norm=norm),
        head=HeadConfig(scale_by_width=True),
    )


def _ahead() -> LanguageModelConfig:
    norm = NormConfig(scale=False)
    attention = AttentionConfig(
        4,
        8,
        position=Rope(300.0, 1.0, NtkScaling(3.0, 12)),
        qk_norm=QKNorm.ALL,
        qk_norm_config=NormConfig(),
    )
    block = BlockConfig(attention, FeedForwardConfig(40), norm, placement=Placement.OUTPUT)
    options = dict(future_tokens=2, future_block=block)
    return model("causal_decoder", StackConfig((block,), 2, final_norm=norm), **options)


OWN_CASES = {
    "sandwich": _sandwich(),
    "buckets": _buckets(),
    "experts": _experts(),
    "encoder": _encoder(),
    "encoder_decoder": _encoder_decoder(),
    "ahead": _ahead(),
}
