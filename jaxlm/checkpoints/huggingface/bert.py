"""BERT, RoBERTa and ELECTRA: post-norm encoders with learned positions, and a masked-LM head or a verdict a token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface.family import Family, Json, activation, activation_name, stack
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Linear, Same, Table, Vector, entry, layers, linear, norm
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig, Placement
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.norms import NormConfig, NormKind
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import LearnedPositions
from jaxlm.models.config import HeadConfig, LanguageModelConfig, ReplacedTokenDetectorConfig

BLOCK: Table = (
    *linear("attention.self.query", "attention/query"),
    *linear("attention.self.key", "attention/key"),
    *linear("attention.self.value", "attention/value"),
    *linear("attention.output.dense", "attention/output", inputs=2),
    *norm("attention.output.LayerNorm", "attention_norms/after"),
    *linear("intermediate.dense", "feed_forward/up"),
    *linear("output.dense", "feed_forward/down"),
    *norm("output.LayerNorm", "feed_forward_norms/after"),
)
# What Google's configurations say of a pooler, and that attention goes both ways.
POOLER = """directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type""".split()


class Bert(Family):
    """BERT (arXiv 1810.04805)."""

    model_type = "bert"
    architecture = "BertForMaskedLM"
    body = "bert"
    head = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
    output = "cls.predictions.decoder.weight"
    unused_positions = 0
    transform: Activation | None = None  # that of the blocks
    endings = Family.endings | {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    beyond = ("bert.pooler.", "cls.seq_relationship.")

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        width, heads = fields("hidden_size"), fields("num_attention_heads")
        normed = NormConfig(NormKind.LAYER, fields("layer_norm_eps", 1e-12), bias=True)
        act = activation(fields("hidden_act", "gelu"))
        fields.expect("position_embedding_type", "absolute")
        fields.expect("add_cross_attention", False)
        for name in POOLER:
            fields(name, None)
        positions = fields("max_position_embeddings") - self.unused_positions
        block = BlockConfig(
            AttentionConfig(heads, width // heads, qkv_bias=True, output_bias=True),
            FeedForwardConfig(fields("intermediate_size"), act, gated=False, bias=True),
            normed,
            placement=Placement.POST,
        )
        return LanguageModelConfig(
            Architecture.ENCODER,
            fields("vocab_size"),
            width,
            EmbeddingConfig(
                width=self.embedding_width(fields),
                positions=LearnedPositions(positions, unused=self.unused_positions),
                types=fields("type_vocab_size", 2),
                norm=normed,
            ),
            HeadConfig(
                tied=fields("tie_word_embeddings", True),
                bias=True,
                transform=self.transform or act,
                transform_norm=normed,
            ),
            InitConfig(),
            encoder=stack([block] * fields("num_hidden_layers")),
        )

    def embedding_width(self, fields: Fields) -> int | None:
        """Width of the tables; None is the model's."""
        return None

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        block = config.encoder.all_blocks[0]
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": config.encoder.depth,
            "num_attention_heads": block.attention.num_heads,
            "intermediate_size": block.feed_forward.hidden,
            "hidden_act": activation_name(block.feed_forward.activation, "gelu"),
            "layer_norm_eps": block.norm.epsilon,
            "max_position_embeddings": config.embedding.positions.max_length + self.unused_positions,
            "type_vocab_size": config.embedding.types,
            "tie_word_embeddings": config.head.tied,
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        dense, normed, bias = self.head
        embeddings = f"{self.body}.embeddings"
        return (
            entry(f"{embeddings}.word_embeddings.weight", "embedding/tokens", form=Same()),
            entry(f"{embeddings}.position_embeddings.weight", "embedding/positions", form=Same()),
            entry(f"{embeddings}.token_type_embeddings.weight", "embedding/types", form=Same()),
            *norm(f"{embeddings}.LayerNorm", "embedding/norm"),
            *linear(f"{self.body}.embeddings_project", "embedding/projection"),
            *layers(BLOCK, config.encoder.depth, f"{self.body}.encoder.layer", "encoder/layers"),
            *linear(dense, "vocabulary_head/transform"),
            *norm(normed, "vocabulary_head/norm"),
            entry(bias, "vocabulary_head/bias", form=Vector()),
            entry(self.output, "vocabulary_head/kernel", form=Linear()),
        )

    def twice(self, config: LanguageModelConfig) -> Mapping[str, str]:
        """See `Family`: the bias of an output matrix of its own is in the matrix's layer, a tied one's beside it."""
        own = {name: today for name, today in self.endings.items() if name not in Family.endings}
        return own if own and not config.head.tied else {}


class Roberta(Bert):
    """RoBERTa (arXiv 1907.11692): positions count from two."""

    model_type = "roberta"
    architecture = "RobertaForMaskedLM"
    body = "roberta"
    head = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
    output = "lm_head.decoder.weight"
    unused_positions = 2
    transform = Activation.GELU
    endings = Family.endings | {"lm_head.decoder.bias": "lm_head.bias"}
    beyond = ("roberta.pooler.",)

    def check_ids(self, config: LanguageModelConfig, ids: Mapping[str, Any]) -> None:
        """See `Family`: transformers counts positions from padding's id, and skips tokens with it."""
        if (pad := ids.get("pad_token_id", 1)) != self.unused_positions - 1:
            raise ValueError(
                f"A RoBERTa pads with id {self.unused_positions - 1}, but this vocabulary with {pad}, from which "
                f"transformers would count positions; export it as bert, with LearnedPositions.unused = 0."
            )


class ElectraGenerator(Bert):
    """ELECTRA's generator (arXiv 2003.10555): BERT with narrower embeddings."""

    model_type = "electra"
    architecture = "ElectraForMaskedLM"
    body = "electra"
    head = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")
    output = "generator_lm_head.weight"
    transform = Activation.GELU
    endings = Family.endings
    beyond = ()

    def embedding_width(self, fields: Fields) -> int | None:
        """See `Bert`."""
        width = fields("embedding_size", 128)
        return None if width == fields("hidden_size") else width

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        return super().write(config) | {"embedding_size": config.embedding.width or config.width}


class ElectraDiscriminator(ElectraGenerator):
    """ELECTRA's discriminator, as a detector without a generator; its head has the activation of the blocks."""

    architecture = "ElectraForPreTraining"

    def read(self, fields: Fields) -> ReplacedTokenDetectorConfig:
        """See `Family`."""
        encoder = super().read(fields)
        act = encoder.encoder.blocks[0].feed_forward.activation
        return ReplacedTokenDetectorConfig(dataclasses.replace(encoder, head=None), head_activation=act)

    def write(self, config: ReplacedTokenDetectorConfig) -> Json:
        """See `Family`."""
        headed = dataclasses.replace(config.discriminator, head=HeadConfig(transform=config.head_activation))
        return super().write(headed)

    def table(self, config: ReplacedTokenDetectorConfig) -> Table:
        """See `Family`."""
        encoder = super().table(config.discriminator)
        return (
            *(dataclasses.replace(e, paths=tuple(f"discriminator/{path}" for path in e.paths)) for e in encoder),
            *linear("discriminator_predictions.dense", "verdict/dense"),
            *linear("discriminator_predictions.dense_prediction", "verdict"),
        )
