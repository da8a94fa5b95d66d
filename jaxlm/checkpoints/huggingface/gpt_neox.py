"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373): parallel branches, partly rotated heads."""

from collections.abc import Collection

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
from jaxlm.checkpoints.huggingface.tensors import ByHead, Linear, Same, Table, entry, layers, linear, norm
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import Arrangement, BlockConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig, NormKind
from jaxlm.models.config import HeadConfig, LanguageModelConfig

BLOCK: Table = (
    *norm("input_layernorm", "attention_norms/before"),
    *linear("attention.query_key_value", "attention/query", "attention/key", "attention/value", fused=ByHead()),
    *linear("attention.dense", "attention/output", inputs=2),
    *norm("post_attention_layernorm", "feed_forward_norms/before"),
    *linear("mlp.dense_h_to_4h", "feed_forward/up"),
    *linear("mlp.dense_4h_to_h", "feed_forward/down"),
)


class GPTNeoX(Family):
    """GPT-NeoX."""

    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        width, heads, biased = fields("hidden_size"), fields("num_attention_heads"), fields("attention_bias", True)
        normed = NormConfig(NormKind.LAYER, fields("layer_norm_eps", 1e-5), bias=True)
        parallel = fields("use_parallel_residual", True)
        position = rope(fields, default_base=fields("rotary_emb_base", 10000.0), fraction=fields("rotary_pct", 0.25))
        fields("max_position_embeddings", None)
        block = BlockConfig(
            AttentionConfig(heads, width // heads, position=position, qkv_bias=biased, output_bias=biased),
            FeedForwardConfig(
                fields("intermediate_size"), activation(fields("hidden_act", "gelu")), gated=False, bias=True
            ),
            normed,
            arrangement=Arrangement.PARALLEL_NORMS if parallel else Arrangement.SEQUENTIAL,
        )
        return causal_decoder(
            fields("vocab_size"),
            width,
            [block] * fields("num_hidden_layers"),
            head=HeadConfig(tied=fields("tie_word_embeddings", False)),
            final_norm=normed,
        )

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        block = config.decoder.all_blocks[0]
        position = written_rope(block.attention.position)
        position["rope_parameters"]["partial_rotary_factor"] = block.attention.position.fraction
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": config.decoder.depth,
            "num_attention_heads": block.attention.num_heads,
            "intermediate_size": block.feed_forward.hidden,
            "hidden_act": activation_name(block.feed_forward.activation, "gelu"),
            "layer_norm_eps": block.norm.epsilon,
            "attention_bias": block.attention.qkv_bias,
            "use_parallel_residual": block.arrangement is Arrangement.PARALLEL_NORMS,
            "tie_word_embeddings": config.head.tied,
            **position,
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return self.named(config, "embed_out.weight")

    def table_of(self, config: LanguageModelConfig, tensors: Collection[str]) -> Table:
        """See `Family`; transformers 5 calculates with another name for the output matrix than it writes."""
        return self.named(config, "lm_head.weight" if "lm_head.weight" in tensors else "embed_out.weight")

    def named(self, config: LanguageModelConfig, output: str) -> Table:
        """The table with an output matrix of this name."""
        return (
            entry("gpt_neox.embed_in.weight", "embedding/tokens", form=Same()),
            *layers(BLOCK, config.decoder.depth, "gpt_neox.layers", "decoder/layers"),
            *norm("gpt_neox.final_layer_norm", "decoder/norm"),
            entry(output, "vocabulary_head/kernel", form=Linear()),
        )
