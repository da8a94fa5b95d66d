"""T5, T5 v1.1, mT5, ByT5 and UL2: encoder-decoders whose layers share a table of relative positions."""

import dataclasses

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface.family import Family, Json, activation, activation_name, stack
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Linear, Same, Table, entry, layers, linear, norm, within
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import RelativePositions
from jaxlm.models.config import HeadConfig, LanguageModelConfig


def attention(path: str) -> Table:
    """Projections, by Mesh TensorFlow's letters."""
    return (
        *linear("q", f"{path}/query"),
        *linear("k", f"{path}/key"),
        *linear("v", f"{path}/value"),
        *linear("o", f"{path}/output", inputs=2),
    )


SELF: Table = (
    *within(attention("attention"), "layer.0.SelfAttention", ""),
    *norm("layer.0.layer_norm", "attention_norms/before"),
)


class T5(Family):
    """T5 (arXiv 1910.10683) and T5 v1.1; ByT5 and UL2 have the same class."""

    model_type = "t5"
    architecture = "T5ForConditionalGeneration"
    formerly = ("T5WithLMHeadModel",)
    endings = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")
    # Positions of the cross-attention, in which a T5 has none; transformers before version 4 added them by mistake.
    beyond = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.",)

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        normed, heads = NormConfig(epsilon=fields("layer_norm_epsilon", 1e-6)), fields("num_heads")
        kind = fields("feed_forward_proj", "relu")
        named = kind.removeprefix("gated-")
        fields("dense_act_fn", None)  # feed_forward_proj says both
        fields("is_gated_act", None)
        # transformers calls the first T5's activation "gelu" where v1.1's is its tanh approximation.
        act = Activation.GELU_TANH if kind == "gated-gelu" else activation(named)
        both = AttentionConfig(heads, fields("d_kv"), scale=1.0)
        fed = FeedForwardConfig(fields("d_ff"), act, gated=kind.startswith("gated-"))
        block = BlockConfig(both, fed, normed)
        depth = fields("num_layers")
        # transformers 5 always says that they are tied, and unties them where it finds both.
        flag = fields("tie_word_embeddings", True)
        tied = not fields.has_tensor("lm_head.weight", default=not flag)
        return LanguageModelConfig(
            Architecture.ENCODER_DECODER,
            fields("vocab_size"),
            fields("d_model"),
            EmbeddingConfig(),
            HeadConfig(tied=tied, scale_by_width=self.scales(fields, flag)),
            InitConfig(),
            encoder=stack([block] * depth, final_norm=normed, relative_positions=self.relative(fields, True)),
            decoder=stack(
                [dataclasses.replace(block, cross_attention=both)] * fields("num_decoder_layers", depth),
                final_norm=normed,
                relative_positions=self.relative(fields, False),
            ),
        )

    def scales(self, fields: Fields, flag: bool) -> bool:
        """Whether hidden states are scaled before the output matrix: where that was tied from the beginning."""
        return fields("scale_decoder_outputs", flag)

    def relative(self, fields: Fields, bidirectional: bool) -> RelativePositions:
        """The table of a stack."""
        buckets = fields("relative_attention_num_buckets", 32)
        return RelativePositions(buckets, fields("relative_attention_max_distance", 128), bidirectional)

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        block, relative = config.encoder.all_blocks[0], config.encoder.relative_positions
        fed = block.feed_forward
        named = activation_name(fed.activation, "relu", "gelu", "gelu_new")
        if fed.gated and fed.activation is Activation.GELU:
            raise ValueError("a T5 calls the tanh approximation gated-gelu, and has no name for GELU itself")
        kind = ("gated-gelu" if fed.activation is Activation.GELU_TANH else f"gated-{named}") if fed.gated else named
        return {
            "vocab_size": config.vocab_size,
            "d_model": config.width,
            "d_kv": block.attention.head_dim,
            "d_ff": fed.hidden,
            "num_layers": config.encoder.depth,
            "num_decoder_layers": config.decoder.depth,
            "num_heads": block.attention.num_heads,
            "feed_forward_proj": kind,
            "layer_norm_epsilon": block.norm.epsilon,
            "relative_attention_num_buckets": relative.buckets,
            "relative_attention_max_distance": relative.max_distance,
            "tie_word_embeddings": config.head.tied,
            "scale_decoder_outputs": config.head.scale_by_width,
            "is_encoder_decoder": True,
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        stacks: list = [entry("shared.weight", "embedding/tokens", form=Same())]
        for name in ("encoder", "decoder"):
            stack, last = getattr(config, name), 1 if name == "encoder" else 2
            fed = stack.all_blocks[0].feed_forward
            inner = f"layer.{last}.DenseReluDense"
            block = (
                *SELF,
                *within(attention("cross_attention"), "layer.1.EncDecAttention", ""),
                *norm("layer.1.layer_norm", "cross_attention_norms/before"),
                *linear(
                    f"{inner}.wi_0" if fed.gated else f"{inner}.wi", "feed_forward/" + ("gate" if fed.gated else "up")
                ),
                *(linear(f"{inner}.wi_1", "feed_forward/up") if fed.gated else ()),
                *linear(f"{inner}.wo", "feed_forward/down"),
                *norm(f"layer.{last}.layer_norm", "feed_forward_norms/before"),
            )
            stacks += [
                entry(
                    f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                    f"{name}/relative/table",
                    form=Same(),
                ),
                *layers(block, stack.depth, f"{name}.block", f"{name}/layers"),
                *norm(f"{name}.final_layer_norm", f"{name}/norm"),
            ]
        return (*stacks, entry("lm_head.weight", "vocabulary_head/kernel", form=Linear()))


class MT5(T5):
    """mT5 (arXiv 2010.11934)."""

    model_type = "mt5"
    architecture = "MT5ForConditionalGeneration"
    formerly = ()

    def scales(self, fields: Fields, flag: bool) -> bool:
        """See `T5`: the class never does."""
        fields.expect("scale_decoder_outputs", False)
        return False
