"""T5Gemma (arXiv 2504.06225): an encoder-decoder of Gemma 2's blocks, each side with its own embedding and width."""

import dataclasses

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface import llama
from jaxlm.checkpoints.huggingface.family import Family, Json, causal_decoder, one
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.gemma import Gemma2
from jaxlm.checkpoints.huggingface.tensors import Linear, Same, Table, entry, layers, linear, norm
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.stack import StackConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig

BLOCK: Table = (
    *llama.ATTENTION,
    *llama.GATED,
    *norm("pre_self_attn_layernorm", "attention_norms/before"),
    *norm("post_self_attn_layernorm", "attention_norms/after"),
    *linear("cross_attn.q_proj", "cross_attention/query"),
    *linear("cross_attn.k_proj", "cross_attention/key"),
    *linear("cross_attn.v_proj", "cross_attention/value"),
    *linear("cross_attn.o_proj", "cross_attention/output", inputs=2),
    *norm("pre_cross_attn_layernorm", "cross_attention_norms/before"),
    *norm("post_cross_attn_layernorm", "cross_attention_norms/after"),
    *norm("pre_feedforward_layernorm", "feed_forward_norms/before"),
    *norm("post_feedforward_layernorm", "feed_forward_norms/after"),
)


class T5Gemma(Family):
    """T5Gemma, whose `config.json` has one Gemma 2 for each side."""

    model_type = "t5gemma"
    architecture = "T5GemmaForConditionalGeneration"
    side = Gemma2()

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        inner = fields.part("encoder")
        inner("final_logit_softcapping", None)  # only a decoder has logits
        encoder = self.side.read(inner)
        inner = fields.part("decoder")
        inner.expect("cross_attention_hidden_size", encoder.width)
        decoder = self.side.read(inner)
        for config in (encoder, decoder):
            fields.expect("vocab_size", config.vocab_size)
        return LanguageModelConfig(
            Architecture.ENCODER_DECODER,
            decoder.vocab_size,
            decoder.width,
            EmbeddingConfig(scale_by_width=True),
            dataclasses.replace(decoder.head, tied=fields("tie_word_embeddings", True)),
            InitConfig(),
            encoder=attending(encoder.decoder, _both_sides),
            decoder=crossing(decoder.decoder),
            encoder_width=None if encoder.width == decoder.width else encoder.width,
            encoder_embedding=EmbeddingConfig(scale_by_width=True),
        )

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        encoder = attending(config.encoder, _left_side)
        sides = {"encoder": (encoder, HeadConfig()), "decoder": (config.decoder, config.head)}

        def side(name: str) -> Json:
            stack, head = sides[name]
            gemma = causal_decoder(
                config.vocab_size,
                config.width_of(name),
                [dataclasses.replace(block, cross_attention=None) for block in stack.all_blocks],
                head=head,
                final_norm=stack.final_norm,
            )
            return {"model_type": "t5_gemma_module", **self.side.write(gemma)}

        return {
            "encoder": side("encoder"),
            "decoder": side("decoder") | {"cross_attention_hidden_size": config.width_of("encoder")},
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.head.tied,
            "is_encoder_decoder": True,
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        sides = (("encoder", "encoder_embedding"), ("decoder", "embedding"))
        return (
            *(
                e
                for name, embedding in sides
                for e in (
                    entry(f"model.{name}.embed_tokens.weight", f"{embedding}/tokens", form=Same()),
                    *layers(BLOCK, config.stacks[name].depth, f"model.{name}.layers", f"{name}/layers"),
                    *norm(f"model.{name}.norm", f"{name}/norm"),
                )
            ),
            entry("lm_head.out_proj.weight", "vocabulary_head/kernel", form=Linear()),
        )


def attending(stack: StackConfig, change) -> StackConfig:
    """The stack with `change` made to each attention layer."""
    blocks = tuple(dataclasses.replace(block, attention=change(block.attention)) for block in stack.blocks)
    return dataclasses.replace(stack, blocks=blocks)


def crossing(stack: StackConfig) -> StackConfig:
    """The stack whose blocks have a cross-attention: their attention without positions and window."""
    blocks = tuple(
        dataclasses.replace(block, cross_attention=dataclasses.replace(block.attention, position=None, window=None))
        for block in stack.blocks
    )
    return dataclasses.replace(stack, blocks=blocks)


def _both_sides(attention: AttentionConfig) -> AttentionConfig:
    """A window that counts the query itself to the left, as one that does not on either side (transformers')."""
    if attention.window is None:
        return attention
    width = attention.window[0] + 1
    return dataclasses.replace(attention, window=(width, width))


def _left_side(attention: AttentionConfig) -> AttentionConfig:
    """The reverse of `_both_sides`."""
    if attention.window is None:
        return attention
    width = one(attention.window, "their window's sides")
    return dataclasses.replace(attention, window=(width - 1, 0))
