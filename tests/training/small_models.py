"""Small real models and batches, shared by the tests that train them and by their subprocesses."""

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, Parametrization
from jaxlm.layers.positions import Rope
from jaxlm.layers.remat import Remat
from jaxlm.layers.stack import StackConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig

VOCABULARY = 64


def decoder(
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    *,
    head_dim=8,
    dropout=0.0,
    remat=Remat.FULL,
    parametrization: Parametrization | None = None,
    init: InitConfig | None = None,
) -> LanguageModelConfig:
    """A causal decoder: RoPE, grouped queries, SwiGLU, a head of its own, scanned layers."""
    block = BlockConfig(
        AttentionConfig(heads, head_dim, kv_heads, position=Rope(), dropout=dropout),
        FeedForwardConfig(2 * width, Activation.SILU, gated=True, dropout=dropout),
        NormConfig(),
        dropout=dropout,
    )
    return LanguageModelConfig(
        Architecture.CAUSAL_DECODER,
        VOCABULARY,
        width,
        EmbeddingConfig(),
        HeadConfig(tied=False),
        init or InitConfig(),
        decoder=StackConfig((block,), layers, final_norm=NormConfig(), remat=remat),
        parametrization=parametrization,
    )


def packed_batch(seed: int, size: int = 8, length: int = 16) -> dict[str, np.ndarray]:
    """Rows with one or two documents and padding, of tokens that follow from the one before."""
    rng = np.random.default_rng(seed)
    targets = ((rng.integers(1, VOCABULARY, (size, 1)) + 3 * np.arange(length)) % (VOCABULARY - 1) + 1).astype(np.int32)
    place = np.arange(length)[None]
    cut, end = rng.integers(1, length // 2, (size, 1)), rng.integers(length // 2, length + 1, (size, 1))
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0)).astype(np.int32)
    positions = np.where(place < cut, place, np.where(place < end, place - cut, 0)).astype(np.int32)
    inputs = np.where(positions == 0, 0, np.roll(targets, 1, 1)) * (segments > 0)
    return {
        "decoder_input_tokens": inputs.astype(np.int32),
        "decoder_target_tokens": targets * (segments > 0),
        "decoder_loss_weights": (segments > 0).astype(np.float32),
        "decoder_segment_ids": segments,
        "decoder_positions": positions,
    }
