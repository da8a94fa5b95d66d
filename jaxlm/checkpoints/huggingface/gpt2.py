"""GPT-2 (Radford et al. 2019): learned positions, fused and transposed projections."""

from collections.abc import Collection

from jaxlm.checkpoints.huggingface.family import Family, Json, activation, activation_name, causal_decoder
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Linear, Same, Table, entry, layers, linear, norm
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig, NormKind
from jaxlm.layers.positions import LearnedPositions
from jaxlm.models.config import HeadConfig, LanguageModelConfig

BLOCK: Table = (
    *norm("ln_1", "attention_norms/before"),
    *linear("attn.c_attn", "attention/query", "attention/key", "attention/value", transposed=True),
    *linear("attn.c_proj", "attention/output", inputs=2, transposed=True),
    *norm("ln_2", "feed_forward_norms/before"),
    *linear("mlp.c_fc", "feed_forward/up", transposed=True),
    *linear("mlp.c_proj", "feed_forward/down", transposed=True),
)


class GPT2(Family):
    """GPT-2."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        width, heads = fields("n_embd"), fields("n_head")
        normed = NormConfig(NormKind.LAYER, fields("layer_norm_epsilon", 1e-5), bias=True)
        fields.expect("scale_attn_weights", True)
        fields.expect("scale_attn_by_inverse_layer_idx", False)
        fields.expect("add_cross_attention", False)
        fields("reorder_and_upcast_attn", None)  # of numerics alone
        act = activation(fields("activation_function", "gelu_new"))
        block = BlockConfig(
            AttentionConfig(heads, width // heads, qkv_bias=True, output_bias=True),
            FeedForwardConfig(fields("n_inner", 4 * width), act, gated=False, bias=True),
            normed,
        )
        return causal_decoder(
            fields("vocab_size"),
            width,
            [block] * fields("n_layer"),
            embedding=EmbeddingConfig(positions=LearnedPositions(fields("n_positions"))),
            head=HeadConfig(tied=fields("tie_word_embeddings", True)),
            final_norm=normed,
        )

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        block = config.decoder.all_blocks[0]
        return {
            "vocab_size": config.vocab_size,
            "n_embd": config.width,
            "n_layer": config.decoder.depth,
            "n_head": block.attention.num_heads,
            "n_inner": block.feed_forward.hidden,
            "n_positions": config.embedding.positions.max_length,
            "activation_function": activation_name(block.feed_forward.activation, "gelu_new"),
            "layer_norm_epsilon": block.norm.epsilon,
            "tie_word_embeddings": config.head.tied,
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return self.named(config, "transformer.")

    def table_of(self, config: LanguageModelConfig, tensors: Collection[str]) -> Table:
        """See `Family`; the released folders hold the tensors of `GPT2Model`, whose names begin without a prefix."""
        return self.named(config, "" if "wte.weight" in tensors else "transformer.")

    def named(self, config: LanguageModelConfig, prefix: str) -> Table:
        """The table with this before every name but the output matrix's."""
        return (
            entry(f"{prefix}wte.weight", "embedding/tokens", form=Same()),
            entry(f"{prefix}wpe.weight", "embedding/positions", form=Same()),
            *layers(BLOCK, config.decoder.depth, f"{prefix}h", "decoder/layers"),
            *norm(f"{prefix}ln_f", "decoder/norm"),
            entry("lm_head.weight", "vocabulary_head/kernel", form=Linear()),
        )
