"""Gemma 1, 2 and 3 (text): scaled embeddings, norms with 1 + scale, GEGLU; from 2 on sandwich norms and windows."""

import dataclasses
from collections.abc import Sequence

from jaxlm.checkpoints.huggingface import llama
from jaxlm.checkpoints.huggingface.family import (
    Family,
    Json,
    activation,
    activation_name,
    causal_decoder,
    layer_types,
    one,
    rope,
    rope_parameters,
    sliding_window,
    written_layer_types,
    written_rope,
)
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Table, norm
from jaxlm.layers.attention import AttentionConfig, QKNorm
from jaxlm.layers.block import BlockConfig, Placement
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.positions import Rope
from jaxlm.models.config import HeadConfig, LanguageModelConfig

SANDWICH: Table = (
    *llama.ATTENTION,
    *llama.GATED,
    *norm("input_layernorm", "attention_norms/before"),
    *norm("post_attention_layernorm", "attention_norms/after"),
    *norm("pre_feedforward_layernorm", "feed_forward_norms/before"),
    *norm("post_feedforward_layernorm", "feed_forward_norms/after"),
)


class Gemma(Family):
    """Gemma (arXiv 2403.08295)."""

    model_type = "gemma"
    architecture = "GemmaForCausalLM"
    placement = Placement.PRE

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        return self.decoder(fields, AttentionConfig(**self.sizes(fields), position=rope(fields)), HeadConfig())

    def sizes(self, fields: Fields) -> Json:
        """What all attention layers share."""
        biased = fields("attention_bias", False)
        return {**llama.sizes(fields), "qkv_bias": biased, "output_bias": biased}

    def norm(self, fields: Fields) -> NormConfig:
        """Every norm of the family."""
        return NormConfig(epsilon=fields("rms_norm_eps", 1e-6), scale_offset=1.0)

    def decoder(
        self, fields: Fields, attention: AttentionConfig | Sequence[AttentionConfig], head: HeadConfig
    ) -> LanguageModelConfig:
        """A decoder of the family; `attention` of all layers, or of each."""
        count, normed = fields("num_hidden_layers"), self.norm(fields)
        each = [attention] * count if isinstance(attention, AttentionConfig) else attention
        named = fields("hidden_activation", None) or fields("hidden_act", "gelu_pytorch_tanh")
        fields("hidden_act", None)
        gated = FeedForwardConfig(fields("intermediate_size"), activation(named), gated=True)
        fields.expect("use_bidirectional_attention", False)
        fields("max_position_embeddings", None)
        return causal_decoder(
            fields("vocab_size"),
            fields("hidden_size"),
            [BlockConfig(a, gated, normed, placement=self.placement) for a in each],
            embedding=EmbeddingConfig(scale_by_width=True),
            head=dataclasses.replace(head, tied=fields("tie_word_embeddings", True)),
            final_norm=normed,
        )

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        return self.common(config) | written_rope(config.decoder.all_blocks[0].attention.position)

    def common(self, config: LanguageModelConfig) -> Json:
        """What the whole family writes."""
        block = config.decoder.all_blocks[0]
        return llama.written_sizes(config) | {
            "attention_bias": block.attention.qkv_bias,
            "hidden_activation": activation_name(block.feed_forward.activation, "gelu_pytorch_tanh"),
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return llama.table(config)


class Gemma2(Gemma):
    """Gemma 2 (arXiv 2408.00118): soft caps, every other layer within a window."""

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    placement = Placement.SANDWICH

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        whole = AttentionConfig(**self.sizes(fields), position=rope(fields))
        local = dataclasses.replace(whole, window=sliding_window(fields))
        fields.expect(
            "sliding_window_size", fields("sliding_window", None)
        )  # its name at first; some folders have both
        count = fields("num_hidden_layers")
        default = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
        kinds = layer_types(fields, count, default)
        each = [local if kind == "sliding_attention" else whole for kind in kinds]
        return self.decoder(fields, each, HeadConfig(soft_cap=fields("final_logit_softcapping", None)))

    def sizes(self, fields: Fields) -> Json:
        """See `Gemma`."""
        scale = fields("query_pre_attn_scalar", 256) ** -0.5
        return super().sizes(fields) | {"soft_cap": fields("attn_logit_softcapping", None), "scale": scale}

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        return self.common(config) | written_rope(config.decoder.all_blocks[0].attention.position)

    def common(self, config: LanguageModelConfig) -> Json:
        """See `Gemma`."""
        attentions = [block.attention for block in config.decoder.all_blocks]
        scale = attentions[0].scale
        return (
            super().common(config)
            | written_layer_types([attention.window for attention in attentions])
            | {
                "attn_logit_softcapping": attentions[0].soft_cap,
                "final_logit_softcapping": config.head.soft_cap,
                "query_pre_attn_scalar": attentions[0].head_dim if scale is None else round(scale**-2),
            }
        )

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return llama.table(config, SANDWICH)


class Gemma3(Gemma2):
    """Gemma 3, its text model (arXiv 2503.19786): normalised queries and keys, a RoPE of its own for windows."""

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        whole = AttentionConfig(
            **self.sizes(fields),
            position=rope(fields, layer_type="full_attention", default_base=1e6),
            qk_norm=QKNorm.HEAD,
            qk_norm_config=self.norm(fields),
        )
        legacy = fields("rope_local_base_freq", 1e4)
        near = rope(fields, layer_type="sliding_attention") if fields("rope_parameters", None) else Rope(legacy)
        local = dataclasses.replace(whole, window=sliding_window(fields), position=near)
        count, pattern = fields("num_hidden_layers"), fields("_sliding_window_pattern", 6)
        pattern = fields("sliding_window_pattern", pattern)
        default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
        kinds = layer_types(fields, count, default)
        each = [local if kind == "sliding_attention" else whole for kind in kinds]
        return self.decoder(fields, each, HeadConfig(soft_cap=fields("final_logit_softcapping", None)))

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        attentions = [block.attention for block in config.decoder.all_blocks]
        positions = {
            "sliding_attention": [a.position for a in attentions if a.window is not None],
            "full_attention": [a.position for a in attentions if a.window is None],
        }
        parameters = {
            kind: rope_parameters(one(found, f"the RoPE of their {kind}")) for kind, found in positions.items() if found
        }
        return self.common(config) | {"rope_parameters": parameters}
