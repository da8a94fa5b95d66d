"""Llama 2 and 3, Mistral, Qwen 2 and 3: pre-norm decoders with RoPE, grouped-query attention and SwiGLU."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxlm.checkpoints.huggingface.family import (
    Family,
    Json,
    activation,
    activation_name,
    causal_decoder,
    layer_types,
    one,
    rope,
    sliding_window,
    written_layer_types,
    written_rope,
)
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Linear, Same, Table, entry, layers, linear, norm
from jaxlm.layers.attention import AttentionConfig, QKNorm
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig

ATTENTION: Table = (
    *linear("self_attn.q_proj", "attention/query"),
    *linear("self_attn.k_proj", "attention/key"),
    *linear("self_attn.v_proj", "attention/value"),
    *linear("self_attn.o_proj", "attention/output", inputs=2),
    *norm("self_attn.q_norm", "attention/query_norm"),
    *norm("self_attn.k_norm", "attention/key_norm"),
)
GATED: Table = (
    *linear("mlp.gate_proj", "feed_forward/gate"),
    *linear("mlp.up_proj", "feed_forward/up"),
    *linear("mlp.down_proj", "feed_forward/down"),
)
BLOCK: Table = (
    *ATTENTION,
    *GATED,
    *norm("input_layernorm", "attention_norms/before"),
    *norm("post_attention_layernorm", "feed_forward_norms/before"),
)


def table(config: LanguageModelConfig, block: Table = BLOCK) -> Table:
    """The table of a decoder named as in Llama, of these blocks."""
    return (
        entry("model.embed_tokens.weight", "embedding/tokens", form=Same()),
        *layers(block, config.decoder.depth, "model.layers", "decoder/layers"),
        *norm("model.norm", "decoder/norm"),
        entry("lm_head.weight", "vocabulary_head/kernel", form=Linear()),
    )


def sizes(fields: Fields) -> Json:
    """Of `AttentionConfig`: heads and their size."""
    heads = fields("num_attention_heads")
    return {
        "num_heads": heads,
        "num_kv_heads": fields("num_key_value_heads", heads),
        "head_dim": fields("head_dim", fields("hidden_size") // heads),
    }


def written_sizes(config: LanguageModelConfig) -> Json:
    """What all decoders named as in Llama write."""
    blocks = config.decoder.all_blocks
    attention = blocks[0].attention
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": blocks[0].feed_forward.hidden,
        "rms_norm_eps": blocks[0].norm.epsilon,
        "tie_word_embeddings": config.head.tied,
    }


def dense(fields: Fields, *, bias: bool = False) -> FeedForwardConfig:
    """The gated feed-forward layer of a configuration."""
    named = activation(fields("hidden_act", "silu"))
    return FeedForwardConfig(fields("intermediate_size"), named, gated=True, bias=bias)


class Llama(Family):
    """Llama 1 to 3 (arXiv 2307.09288, 2407.21783)."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        biased, mlp_biased = fields("attention_bias", False), fields("mlp_bias", False)
        fields.expect("pretraining_tp", *range(1, 65))  # how a matrix product is cut up, not what it is
        return self.decoder(
            fields,
            {"qkv_bias": biased, "output_bias": biased},
            [{}] * fields("num_hidden_layers"),
            [dense(fields, bias=mlp_biased)] * fields("num_hidden_layers"),
        )

    def decoder(
        self,
        fields: Fields,
        attention: Json,
        by_layer: list[Json],
        fed: Sequence[FeedForwardConfig] | None = None,
    ) -> LanguageModelConfig:
        """A decoder of the family.

        Args:
          fields: the configuration.
          attention: options of AttentionConfig, of all layers.
          by_layer: more of them, of each layer.
          fed: the feed-forward layers; None: `dense` ones.
        """
        normed = NormConfig(epsilon=fields("rms_norm_eps", 1e-6))
        if attention.get("qk_norm"):
            attention = {**attention, "qk_norm_config": normed}
        common = AttentionConfig(**sizes(fields), position=rope(fields), **attention)
        fed = [dense(fields)] * len(by_layer) if fed is None else fed
        blocks = [BlockConfig(dataclasses.replace(common, **o), f, normed) for o, f in zip(by_layer, fed, strict=True)]
        for name in ("max_position_embeddings", "max_sequence_length"):
            fields(name, None)
        head = HeadConfig(tied=fields("tie_word_embeddings", False))
        return causal_decoder(fields("vocab_size"), fields("hidden_size"), blocks, head=head, final_norm=normed)

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        block = config.decoder.all_blocks[0]
        return self.common(config) | {
            "attention_bias": block.attention.qkv_bias,
            "mlp_bias": block.feed_forward.bias,
        }

    def common(self, config: LanguageModelConfig) -> Json:
        """What the whole family writes."""
        block = config.decoder.all_blocks[0]
        return written_sizes(config) | {
            "hidden_act": activation_name(block.feed_forward.activation, "silu"),
            **written_rope(block.attention.position),
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return table(config)


class Mistral(Llama):
    """Mistral 7B (arXiv 2310.06825): every layer may attend within a window."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        return self.decoder(fields, {"window": sliding_window(fields)}, [{}] * fields("num_hidden_layers"))

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        seen = one([block.attention.window for block in config.decoder.all_blocks], "their window")
        return self.common(config) | {"sliding_window": None if seen is None else seen[0] + 1}


class Qwen2(Llama):
    """Qwen 2 and 2.5 (arXiv 2407.10671): biases on queries, keys and values; some layers may have a window."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        return self.decoder(fields, {"qkv_bias": True}, self.windows(fields))

    def windows(self, fields: Fields) -> list[Json]:
        """Each layer's window."""
        count, first, narrow = fields("num_hidden_layers"), fields("max_window_layers", 28), sliding_window(fields)
        slides = fields("use_sliding_window", False) and narrow is not None
        default = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(count)]
        kinds = layer_types(fields, count, default)
        return [{"window": narrow if slides and kind == "sliding_attention" else None} for kind in kinds]

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        return self.common(config) | self.written_windows(config)

    def written_windows(self, config: LanguageModelConfig) -> Json:
        """The fields that `windows` reads."""
        seen: list[Any] = [block.attention.window for block in config.decoder.all_blocks]
        if not any(seen):
            return {"use_sliding_window": False}
        first = next(i for i, width in enumerate(seen) if width is not None)
        return {"use_sliding_window": True, "max_window_layers": first, **written_layer_types(seen)}


class Qwen3(Qwen2):
    """Qwen 3 (arXiv 2505.09388): no biases, normalised queries and keys."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        biased = fields("attention_bias", False)
        options = {"qkv_bias": biased, "output_bias": biased, "qk_norm": QKNorm.HEAD}
        return self.decoder(fields, options, self.windows(fields))

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        biased = config.decoder.all_blocks[0].attention.qkv_bias
        return self.common(config) | self.written_windows(config) | {"attention_bias": biased}
