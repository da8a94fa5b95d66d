"""DeBERTa-v2 and v3 (arXiv 2006.03654, 2111.09543): encoders with disentangled attention, and a masked-LM head.

transformers has no enhanced mask decoder, which the released checkpoints do not hold either: its masked-LM model reads
the last layer.
"""

import dataclasses
from collections.abc import Collection

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface.family import Family, Json, activation, activation_name, stack
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Linear, Reversed, Same, Table, Vector, entry, layers, linear, norm
from jaxlm.layers.block import BlockConfig, Placement
from jaxlm.layers.convolved_block import ConvolvedBlockConfig
from jaxlm.layers.disentangled_attention import DisentangledAttentionConfig, RelativeEmbeddings
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig, NormKind
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import LearnedPositions
from jaxlm.models.config import HeadConfig, LanguageModelConfig

BLOCK: Table = (
    *linear("attention.self.query_proj", "attention/query"),
    *linear("attention.self.key_proj", "attention/key"),
    *linear("attention.self.value_proj", "attention/value"),
    *linear("attention.self.pos_key_proj", "attention/position_key"),
    *linear("attention.self.pos_query_proj", "attention/position_query"),
    *linear("attention.output.dense", "attention/output", inputs=2),
    *norm("attention.output.LayerNorm", "attention_norms/after"),
    *linear("intermediate.dense", "feed_forward/up"),
    *linear("output.dense", "feed_forward/down"),
    *norm("output.LayerNorm", "feed_forward_norms/after"),
)
HEAD = ("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm", "lm_predictions.lm_head.bias")
LEGACY_HEAD = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
LEGACY_OUTPUT = "cls.predictions.decoder.weight"


class DebertaV2(Family):
    """DeBERTa-v2 and v3: one class."""

    model_type = "deberta-v2"
    architecture = "DebertaV2ForMaskedLM"
    endings = Family.endings | {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    # The discriminator's head, positions that only an enhanced mask decoder reads, and what training added to the
    # generator's embeddings to give those that are there.
    beyond = (
        "mask_predictions.",
        "deberta.embeddings.position_embeddings.",
        "deberta.embeddings.word_embeddings._weight",
    )

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        width, heads, longest = fields("hidden_size"), fields("num_attention_heads"), fields("max_position_embeddings")
        normed = NormConfig(NormKind.LAYER, fields("layer_norm_eps", 1e-7), bias=True)
        act = activation(fields("hidden_act", "gelu"))
        fields("legacy", None)  # names of the head's tensors
        for name in ("pooler_dropout", "pooler_hidden_act", "pooler_hidden_size"):
            fields(name, None)  # masked language models have no pooler
        fields.expect("embedding_size", width)
        fields.expect("relative_attention", True)
        fields.expect("conv_groups", 1)
        named = fields("pos_att_type", ())
        terms = {term.strip() for term in (named.lower().split("|") if isinstance(named, str) else named)}
        if not terms or terms - {"c2p", "p2c"}:
            raise ValueError(f"pos_att_type must have c2p, p2c or both, not {named!r}.")
        span, buckets = fields("max_relative_positions", -1), fields("position_buckets", -1)
        span = longest if span < 1 else span
        vectors_normed = "layer_norm" in [kind.strip() for kind in fields("norm_rel_ebd", "none").lower().split("|")]
        attention = DisentangledAttentionConfig(
            heads,
            fields("attention_head_size", width // heads),
            qkv_bias=True,
            output_bias=True,
            content_to_position="c2p" in terms,
            position_to_content="p2c" in terms,
            shared_projections=fields("share_att_key", False),
        )
        fed = FeedForwardConfig(fields("intermediate_size"), act, gated=False, bias=True)
        block = BlockConfig(attention, fed, normed, placement=Placement.POST)
        blocks, taps = [block] * fields("num_hidden_layers"), fields("conv_kernel_size", 0)
        convolved = activation(fields("conv_act", "tanh"))
        if taps > 0:
            options = {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}
            blocks[0] = ConvolvedBlockConfig(**options, taps=taps, convolution_activation=convolved)
        return LanguageModelConfig(
            Architecture.ENCODER,
            fields("vocab_size"),
            width,
            EmbeddingConfig(
                positions=LearnedPositions(longest) if fields("position_biased_input", True) else None,
                types=fields("type_vocab_size", 0),
                norm=normed,
            ),
            HeadConfig(tied=fields("tie_word_embeddings", True), bias=True, transform=act, transform_norm=normed),
            InitConfig(),
            encoder=stack(
                blocks,
                relative_positions=RelativeEmbeddings(
                    buckets if buckets > 0 else span,
                    max_distance=span if buckets > 0 else None,
                    norm=normed if vectors_normed else None,
                ),
            ),
        )

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        block, vectors = config.encoder.all_blocks[0], config.encoder.relative_positions
        attention, positions = block.attention, config.embedding.positions
        bucketed = vectors.max_distance is not None
        terms = {"c2p": attention.content_to_position, "p2c": attention.position_to_content}
        convolution = {}
        if isinstance(block, ConvolvedBlockConfig):
            convolution = {"conv_kernel_size": block.taps, "conv_act": activation_name(block.convolution_activation)}
        return convolution | {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": config.encoder.depth,
            "num_attention_heads": attention.num_heads,
            "attention_head_size": attention.head_dim,
            "intermediate_size": block.feed_forward.hidden,
            "hidden_act": activation_name(block.feed_forward.activation, "gelu"),
            "layer_norm_eps": block.norm.epsilon,
            "max_position_embeddings": (vectors.max_distance or vectors.span)
            if positions is None
            else positions.max_length,
            "position_biased_input": positions is not None,
            "type_vocab_size": config.embedding.types,
            "tie_word_embeddings": config.head.tied,
            "relative_attention": True,
            "pos_att_type": [name for name, there in terms.items() if there],
            "share_att_key": attention.shared_projections,
            "max_relative_positions": vectors.max_distance if bucketed else vectors.span,
            "position_buckets": vectors.span if bucketed else -1,
            "norm_rel_ebd": "none" if vectors.norm is None else "layer_norm",
            "legacy": False,
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return self.named(config, HEAD)

    def table_of(self, config: LanguageModelConfig, tensors: Collection[str]) -> Table:
        """See `Family`."""
        return self.named(config, LEGACY_HEAD if LEGACY_HEAD[-1] in tensors else HEAD)

    def named(self, config: LanguageModelConfig, head: tuple[str, str, str]) -> Table:
        """The table with a head of these names."""
        dense, normed, bias = head
        embeddings = "deberta.embeddings"
        return (
            entry(f"{embeddings}.word_embeddings.weight", "embedding/tokens", form=Same()),
            entry(f"{embeddings}.position_embeddings.weight", "embedding/positions", form=Same()),
            entry(f"{embeddings}.token_type_embeddings.weight", "embedding/types", form=Same()),
            *norm(f"{embeddings}.LayerNorm", "embedding/norm"),
            entry("deberta.encoder.rel_embeddings.weight", "encoder/relative/table", form=Same()),
            *norm("deberta.encoder.LayerNorm", "encoder/relative/norm"),
            entry("deberta.encoder.conv.conv.weight", "encoder/layers/0/convolution/kernel", form=Reversed()),
            entry("deberta.encoder.conv.conv.bias", "encoder/layers/0/convolution/bias", form=Vector()),
            *norm("deberta.encoder.conv.LayerNorm", "encoder/layers/0/convolution_norm"),
            *layers(BLOCK, config.encoder.depth, "deberta.encoder.layer", "encoder/layers"),
            *linear(dense, "vocabulary_head/transform"),
            *norm(normed, "vocabulary_head/norm"),
            entry(bias, "vocabulary_head/bias", form=Vector()),
            *((entry(LEGACY_OUTPUT, "vocabulary_head/kernel", form=Linear()),) if head is LEGACY_HEAD else ()),
        )
