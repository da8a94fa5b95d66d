"""OLMo 2 (arXiv 2501.00656): norms on the branches' outputs, normalised queries and keys."""

from jaxlm.checkpoints.huggingface import llama
from jaxlm.checkpoints.huggingface.family import (
    Family,
    Json,
    activation,
    activation_name,
    causal_decoder,
    rope,
    written_rope,
)
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Table, norm
from jaxlm.layers.attention import AttentionConfig, QKNorm
from jaxlm.layers.block import BlockConfig, Placement
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig

BLOCK: Table = (
    *llama.ATTENTION,
    *llama.GATED,
    *norm("post_attention_layernorm", "attention_norms/after"),
    *norm("post_feedforward_layernorm", "feed_forward_norms/after"),
)


class Olmo2(Family):
    """OLMo 2."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        normed, biased = NormConfig(epsilon=fields("rms_norm_eps", 1e-5)), fields("attention_bias", False)
        attention = AttentionConfig(
            **llama.sizes(fields),
            position=rope(fields),
            qk_norm=QKNorm.ALL,
            qk_norm_config=normed,
            qkv_bias=biased,
            output_bias=biased,
        )
        gated = FeedForwardConfig(fields("intermediate_size"), activation(fields("hidden_act", "silu")), gated=True)
        fields("max_position_embeddings", None)
        return causal_decoder(
            fields("vocab_size"),
            fields("hidden_size"),
            [BlockConfig(attention, gated, normed, placement=Placement.OUTPUT)] * fields("num_hidden_layers"),
            head=HeadConfig(tied=fields("tie_word_embeddings", False)),
            final_norm=normed,
        )

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        block = config.decoder.all_blocks[0]
        return llama.written_sizes(config) | {
            "attention_bias": block.attention.qkv_bias,
            "hidden_act": activation_name(block.feed_forward.activation, "silu"),
            **written_rope(block.attention.position),
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return llama.table(config, BLOCK)
