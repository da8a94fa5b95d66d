"""What each layer does: cosines and the losses of deeper models, against models that are really made deeper."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.evaluation.layer_similarity import layer_report
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
from jaxlm.layers.context import LOCAL
from jaxlm.models import HeadConfig, LanguageModelConfig, build_model
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.losses import cross_entropy_sums

VOCAB, LENGTH, DEPTH = 17, 10, 3
BLOCK = BlockConfig(AttentionConfig(2, 8, position=Rope()), FeedForwardConfig(24), NormConfig())
CONFIG = LanguageModelConfig(
    Architecture.CAUSAL_DECODER,
    VOCAB,
    16,
    EmbeddingConfig(),
    HeadConfig(),
    InitConfig(std=0.3),
    decoder=StackConfig((BLOCK,), DEPTH, final_norm=NormConfig(), layers="unroll"),
)


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.integers(1, VOCAB, (2, LENGTH)).astype(np.int32)
        ids = np.repeat([[1] * 6 + [2] * 4, [1] * 8 + [0] * 2], 1, axis=0).astype(np.int32)
        yield {
            "decoder_input_tokens": np.roll(tokens, 1, axis=1),
            "decoder_target_tokens": tokens,
            "decoder_loss_weights": (ids > 0).astype(np.float32),
            "decoder_segment_ids": ids,
            "decoder_positions": np.concatenate([np.arange(6), np.arange(4)])[None].repeat(2, 0).astype(np.int32),
        }


def build(depth):
    config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, num_layers=depth))
    return build_model(config, key=jax.random.key(0))


def loss_of(model):
    nats, weight = 0.0, 0.0
    for batch in batches(2):
        _, metrics, _ = cross_entropy_sums(model, batch, context=LOCAL, config=LossConfig())
        nats, weight = nats + float(metrics["cross_entropy"][0]), weight + float(metrics["cross_entropy"][1])
    return nats / weight


def test_losses_are_those_of_deeper_models():
    """Two layers at a time: 0-1 and 1-2 of three, each twice in a model of five."""
    model, deep = build(DEPTH), build(DEPTH + 2)
    report = layer_report(model, batches(2), span=2)
    assert report.loss == pytest.approx(loss_of(model), rel=1e-6) and report.tokens == 2 * (10 + 8)
    params = nnx.to_pure_dict(nnx.state(model))
    for span in report.spans:
        layers = [i for run in span.order(DEPTH) for i in range(*run)]
        assert layers == [*range(span.last + 1), *range(span.first, DEPTH)]
        copied = {str(n): params["decoder"]["layers"][str(i)] for n, i in enumerate(layers)}
        nnx.update(deep, {**params, "decoder": {**params["decoder"], "layers": copied}})
        assert span.loss == pytest.approx(loss_of(deep), rel=1e-6)
        assert abs(span.loss - report.loss) > 1e-3


def test_a_layer_that_does_nothing_is_seen():
    """yi (iv): its cosine is 1, standing twice it changes nothing, and what is recommended is what hurts least."""
    model = build(DEPTH)
    idle = model.decoder.layers["1"]
    for branch in (idle.attention.output, idle.feed_forward.down):
        branch.kernel.set_value(0 * branch.kernel.get_value())
    report = layer_report(model, batches(2))
    assert [span.first for span in report.spans] == [0, 1, 2]
    assert report.mildest.loss == min(span.loss for span in report.spans)
    assert report.spans[1].cosine == pytest.approx(1.0, abs=1e-6)
    assert report.spans[1].loss == pytest.approx(report.loss, abs=1e-7)
    assert max(report.spans[i].cosine for i in (0, 2)) < 0.99


def test_what_cannot_be_looked_at_is_refused():
    with pytest.raises(ValueError, match="A span of 4 layers does not fit a stack of 3"):
        layer_report(build(DEPTH), [], span=4)
    with pytest.raises(ValueError, match="no targets to look at"):
        layer_report(build(DEPTH), [])
