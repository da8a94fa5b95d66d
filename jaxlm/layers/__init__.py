"""The parts of models: attention, feed-forward, norms, embeddings, positions, blocks and stacks.

Names here must not be those of modules beside it: gin files find `jaxlm.layers.stack.StackConfig` by attribute.
"""

from jaxlm.layers.attention import AttentionConfig, QKNorm
from jaxlm.layers.block import Arrangement, BlockConfig, Placement
from jaxlm.layers.context import Context
from jaxlm.layers.convolved_block import ConvolvedBlockConfig
from jaxlm.layers.disentangled_attention import DisentangledAttentionConfig, RelativeEmbeddings
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.linear_attention import ChannelDecay, FeatureMap, FixedDecay, HeadDecay, LinearAttentionConfig
from jaxlm.layers.mamba import MambaConfig
from jaxlm.layers.mamba2 import Mamba2Config
from jaxlm.layers.mamba_block import MambaBlockConfig
from jaxlm.layers.mixture_of_experts import MixtureOfExpertsConfig, Scoring
from jaxlm.layers.norms import NormConfig, NormKind
from jaxlm.layers.parameters import InitConfig, InitScheme, Parametrization, ResidualInit, Scaling
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
from jaxlm.layers.remat import Remat, SaveNamed
from jaxlm.layers.stack import Layers, StackConfig
from jaxlm.layers.stacking import StackLayout
from jaxlm.layers.step_sizes import StepSizes

__all__ = [
    "Activation",
    "Alibi",
    "Arrangement",
    "AttentionConfig",
    "BlockConfig",
    "ChannelDecay",
    "Context",
    "ConvolvedBlockConfig",
    "DisentangledAttentionConfig",
    "EmbeddingConfig",
    "FeedForwardConfig",
    "FeatureMap",
    "FixedDecay",
    "HeadDecay",
    "InitConfig",
    "InitScheme",
    "Layers",
    "LearnedPositions",
    "LinearScaling",
    "LinearAttentionConfig",
    "Llama3Scaling",
    "Mamba2Config",
    "MambaBlockConfig",
    "MambaConfig",
    "MixtureOfExpertsConfig",
    "NormConfig",
    "NormKind",
    "NtkScaling",
    "Parametrization",
    "Placement",
    "QKNorm",
    "RelativeEmbeddings",
    "RelativePositions",
    "Remat",
    "ResidualInit",
    "Rope",
    "SaveNamed",
    "Scaling",
    "Scoring",
    "SinusoidalPositions",
    "StackConfig",
    "StackLayout",
    "StepSizes",
    "YarnScaling",
]
