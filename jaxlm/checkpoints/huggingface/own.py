"""Models that no class of transformers computes: exported with `modeling_jaxlm.py`, which computes them in PyTorch.

The configuration goes into `config.json` as it is, under `language_model`; tensors have our names and shapes.
"""

import dataclasses
import enum
from typing import Any

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface.family import Family, Json
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Same, Table, entry
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.mixture_of_experts import MixtureOfExpertsConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, Parametrization
from jaxlm.layers.positions import (
    Alibi,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    RelativePositions,
    Rope,
    SinusoidalPositions,
    YarnScaling,
)
from jaxlm.layers.stack import StackConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig

MODELLING = "modeling_jaxlm.py"

# What the modelling file computes: each class with the fields that it looks at. Others must have their defaults.
COVERED: dict[type, tuple[str, ...]] = {
    class_: tuple(fields.split())
    for class_, fields in {
        LanguageModelConfig: "architecture vocab_size width embedding head encoder decoder parametrization "
        "future_tokens future_block pooler",
        EmbeddingConfig: "width positions types scale_by_width norm",
        HeadConfig: "tied scale_by_width soft_cap bias transform transform_bias transform_norm",
        StackConfig: "blocks num_layers prologue final_norm relative_positions",
        BlockConfig: "attention feed_forward norm attention_norm cross_attention placement arrangement",
        AttentionConfig: "num_heads head_dim num_kv_heads position window qk_norm qk_norm_config soft_cap scale "
        "qkv_bias output_bias sinks",
        FeedForwardConfig: "hidden activation gated bias",
        MixtureOfExpertsConfig: "hidden activation gated num_experts experts_per_token scoring normalize scale shared",
        NormConfig: "kind epsilon scale bias scale_offset",
        Parametrization: "kind base_width base_depth base_head_dim alpha",
        Rope: "base fraction scaling",
        LinearScaling: "factor",
        NtkScaling: "factor original_length",
        Llama3Scaling: "factor low_frequency_factor high_frequency_factor original_length",
        YarnScaling: "factor original_length beta_fast beta_slow attention_factor",
        RelativePositions: "buckets max_distance bidirectional",
        Alibi: "",
        LearnedPositions: "max_length unused",
        SinusoidalPositions: "base",
    }.items()
}
# What does not change the function of a trained model.
TRAINING = frozenset("init compute dropout backend layers remat balance_loss z_loss".split())
_BY_NAME = {class_.__name__: class_ for class_ in COVERED}


def described(value: Any) -> Any:
    """A configuration as JSON.

    Raises:
      ValueError: the modelling file does not cover it; the message says what.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [described(part) for part in value]
    if not dataclasses.is_dataclass(value):
        return value
    class_ = type(value)
    if class_ not in COVERED:
        raise ValueError(f"{MODELLING} does not cover {class_.__name__}")
    for field in dataclasses.fields(value):
        found, default = getattr(value, field.name), field.default
        if field.name not in COVERED[class_] and field.name not in TRAINING and found != default:
            raise ValueError(f"{MODELLING} does not cover {class_.__name__}.{field.name} = {found!r}")
    return {"class": class_.__name__} | {name: described(getattr(value, name)) for name in COVERED[class_]}


def configured(value: Any) -> Any:
    """The configuration of a JSON value, the way back from `described`.

    Raises:
      ValueError: it is none.
    """
    if isinstance(value, list):
        return tuple(configured(part) for part in value)
    if not isinstance(value, dict):
        return value
    values = dict(value)
    class_ = _BY_NAME.get(str(values.pop("class", None)))
    if class_ is None or set(values) - set(COVERED[class_]):
        raise ValueError(f"config.json describes {value!r:.80}, which is no part of a model here.")
    fields = {name: configured(part) for name, part in values.items()}
    return class_(**fields | ({"init": InitConfig()} if class_ is LanguageModelConfig else {}))


class OwnDecoder(Family):
    """Causal and prefix decoders."""

    model_type = "jaxlm"
    architecture = "JaxLMForCausalLM"
    auto = "AutoModelForCausalLM"
    computes = (Architecture.CAUSAL_DECODER, Architecture.PREFIX_DECODER)
    code = MODELLING

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        fields("tie_word_embeddings", None)  # of transformers' own tying, which there is none of
        fields("max_position_embeddings", None)
        return configured(fields("language_model"))

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        if config.architecture not in self.computes:
            raise ValueError(f"{self.architecture} is not for the architecture {config.architecture.value}")
        if isinstance(config, LanguageModelConfig) and config.head is None:
            raise ValueError(f"{MODELLING} does not cover a model without a head")
        module = MODELLING.removesuffix(".py")
        return {
            "auto_map": {"AutoConfig": f"{module}.JaxLMConfig", self.auto: f"{module}.{self.architecture}"},
            "is_encoder_decoder": config.architecture is Architecture.ENCODER_DECODER,
            "tie_word_embeddings": False,
            "language_model": described(config),
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        from jaxlm.checkpoints.huggingface.folder import parameter_shapes  # which imports the families

        return tuple(entry(path.replace("/", "."), path, form=Same()) for path in parameter_shapes(config))


class OwnEncoder(OwnDecoder):
    """Encoders."""

    architecture = "JaxLMForMaskedLM"
    auto = "AutoModelForMaskedLM"
    computes = (Architecture.ENCODER,)


class OwnEncoderDecoder(OwnDecoder):
    """Encoder-decoders."""

    architecture = "JaxLMForConditionalGeneration"
    auto = "AutoModelForSeq2SeqLM"
    computes = (Architecture.ENCODER_DECODER,)
