"""ModernBERT (arXiv 2412.13663): a pre-norm encoder with RoPE, GeGLU and windows in two layers of three."""

import dataclasses

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface.family import (
    Family,
    Json,
    activation,
    activation_name,
    layer_types,
    one,
    rope,
    rope_parameters,
    stack,
)
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Linear, Same, Table, Vector, entry, layers, linear, norm
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig, NormKind
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import Rope
from jaxlm.models.config import HeadConfig, LanguageModelConfig

BLOCK: Table = (
    *norm("attn_norm", "attention_norms/before"),
    *linear("attn.Wqkv", "attention/query", "attention/key", "attention/value"),
    *linear("attn.Wo", "attention/output", inputs=2),
    *norm("mlp_norm", "feed_forward_norms/before"),
    *linear("mlp.Wi", "feed_forward/gate", "feed_forward/up"),
    *linear("mlp.Wo", "feed_forward/down"),
)


class ModernBert(Family):
    """ModernBERT."""

    model_type = "modernbert"
    architecture = "ModernBertForMaskedLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        width, heads, count = fields("hidden_size"), fields("num_attention_heads"), fields("num_hidden_layers")
        normed = NormConfig(NormKind.LAYER, fields("norm_eps", 1e-5), bias=fields("norm_bias", False))
        biased = fields("attention_bias", False)
        for name in ("sparse_pred_ignore_index", "deterministic_flash_attn", "position_embedding_type"):
            fields(name, None)
        for name in ("repad_logits_with_grad", "reference_compile", "max_position_embeddings", "layer_norm_eps"):
            fields(name, None)
        fields.expect("sparse_prediction", False)
        every, half = fields("global_attn_every_n_layers", 3), fields("local_attention", 128) // 2
        default = ["sliding_attention" if i % every else "full_attention" for i in range(count)]
        new = fields("rope_parameters", None)
        far = rope(fields, layer_type="full_attention") if new else Rope(fields("global_rope_theta", 160000.0))
        near = rope(fields, layer_type="sliding_attention") if new else Rope(fields("local_rope_theta", 10000.0))
        whole = AttentionConfig(heads, width // heads, position=far, qkv_bias=biased, output_bias=biased)
        local = dataclasses.replace(whole, position=near, window=(half, half))
        gated = FeedForwardConfig(
            fields("intermediate_size"),
            activation(fields("hidden_activation", "gelu")),
            gated=True,
            bias=fields("mlp_bias", False),
        )
        blocks = [
            BlockConfig(local if kind == "sliding_attention" else whole, gated, normed)
            for kind in layer_types(fields, count, default)
        ]
        blocks[0] = dataclasses.replace(blocks[0], attention_norm=NormConfig(NormKind.NONE))
        return LanguageModelConfig(
            Architecture.ENCODER,
            fields("vocab_size"),
            width,
            EmbeddingConfig(norm=normed),
            HeadConfig(
                tied=fields("tie_word_embeddings", True),
                bias=fields("decoder_bias", True),
                transform=activation(fields("classifier_activation", "gelu")),
                transform_bias=fields("classifier_bias", False),
                transform_norm=normed,
            ),
            InitConfig(),
            encoder=stack(blocks, final_norm=normed),
        )

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        blocks = config.encoder.all_blocks
        block, attentions = blocks[0], [block.attention for block in blocks]
        positions = {
            "full_attention": [a.position for a in attentions if a.window is None],
            "sliding_attention": [a.position for a in attentions if a.window is not None],
        }
        windows = [a.window for a in attentions if a.window is not None]
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": block.attention.num_heads,
            "intermediate_size": block.feed_forward.hidden,
            "hidden_activation": activation_name(block.feed_forward.activation, "gelu"),
            "norm_eps": block.norm.epsilon,
            "norm_bias": block.norm.bias,
            "attention_bias": block.attention.qkv_bias,
            "mlp_bias": block.feed_forward.bias,
            "layer_types": ["full_attention" if a.window is None else "sliding_attention" for a in attentions],
            "local_attention": 2 * one(windows, "their window")[0] if windows else 128,
            "rope_parameters": {
                kind: rope_parameters(one(found, f"the RoPE of their {kind}")) if found else rope_parameters(Rope())
                for kind, found in positions.items()
            },
            "classifier_activation": activation_name(config.head.transform, "gelu"),
            "classifier_bias": config.head.transform_bias,
            "decoder_bias": config.head.bias,
            "tie_word_embeddings": config.head.tied,
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return (
            entry("model.embeddings.tok_embeddings.weight", "embedding/tokens", form=Same()),
            *norm("model.embeddings.norm", "embedding/norm"),
            *layers(BLOCK, config.encoder.depth, "model.layers", "encoder/layers"),
            *norm("model.final_norm", "encoder/norm"),
            *linear("head.dense", "vocabulary_head/transform"),
            *norm("head.norm", "vocabulary_head/norm"),
            entry("decoder.weight", "vocabulary_head/kernel", form=Linear()),
            entry("decoder.bias", "vocabulary_head/bias", form=Vector()),
        )
