"""What a family's adapter is, and what adapters share: reading and writing RoPE, heads and layer patterns."""

import dataclasses
import enum
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Table
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import Activation
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, Scaling
from jaxlm.layers.positions import LinearScaling, Llama3Scaling, NtkScaling, Rope, YarnScaling
from jaxlm.layers.stack import Layers, Remat, StackConfig
from jaxlm.layers.step_sizes import StepSizes
from jaxlm.models.config import (
    ComputeType,
    HeadConfig,
    LanguageModelConfig,
    ModelConfig,
    ReplacedTokenDetectorConfig,
)

Json = dict[str, Any]

FOREIGN = "it is a model of another kind"
"""Why a family refuses a model that lacks what all of the family have."""


class Family:
    """An adapter between one Hugging Face model class and `ModelConfig`.

    A subclass has `model_type` and `architecture` as `config.json` has them, and three methods. `write` need not judge
    whether a model belongs to the family: `refusals` reads back what it wrote and compares.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    # A modelling file in this package that a folder of the family brings along; None: transformers has the class.
    code: ClassVar[str | None] = None
    # The architectures that such a file computes.
    computes: ClassVar[tuple[Architecture, ...]] = ()
    # The field of config.json that says how many tokens the longest row had.
    length_field: ClassVar[str] = "max_position_embeddings"
    # What the family says in generation_config.json.
    generation: ClassVar[Json] = {}
    # What the architecture was called before.
    formerly: ClassVar[tuple[str, ...]] = ()
    # {how a tensor's name may end: how it ends today}: older names, and those of tensors that are tied to another.
    # Where both are there they must be equal.
    endings: ClassVar[Mapping[str, str]] = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    # How the names begin of what released folders hold and the architecture does not compute, such as other heads.
    beyond: ClassVar[tuple[str, ...]] = ()

    def read(self, fields: Fields) -> ModelConfig:
        """The model that a `config.json` describes.

        Raises:
          ValueError: something in it has no equivalent here.
        """
        raise NotImplementedError

    def write(self, config: ModelConfig) -> Json:
        """The `config.json` of a model of this family, without what is common to all."""
        raise NotImplementedError

    def table(self, config: ModelConfig) -> Table:
        """Which tensor holds which parameter, in the form that is written."""
        raise NotImplementedError

    def twice(self, config: ModelConfig) -> Mapping[str, str]:
        """{another name: name in the table} of tensors that are written under both, since transformers reads either."""
        return {}

    def check_ids(self, config: ModelConfig, ids: Mapping[str, Any]) -> None:
        """Raises ValueError if transformers would read something into the special ids of `config.json`."""

    def table_of(self, config: ModelConfig, tensors: Collection[str]) -> Table:
        """The table of a checkpoint with these tensors, for families that are found in several forms."""
        return self.table(config)

    def model_of(
        self, values: Mapping[str, Any], *, ignore: tuple[str, ...] = (), tensors: Collection[str] | None = None
    ) -> ModelConfig:
        """`read`, with a complaint about fields that it did not look at.

        Args:
          values: the parsed `config.json`.
          ignore: fields to pass over.
          tensors: names of the checkpoint's tensors; None: not known.

        Raises:
          ValueError: see `read` and `Fields.finish`.
        """
        fields = Fields(values, ignore, tensors)
        config = self.read(fields)
        fields.finish()
        return config

    def refusals(self, config: ModelConfig) -> list[str]:
        """Why this family cannot express a model: one clause a difference, [] if it can."""
        try:
            again = self.model_of({"model_type": self.model_type, **self.write(config)})
        except ValueError as error:
            return [f"it has no {self.model_type} equivalent ({error})"]
        except (AttributeError, TypeError, KeyError):  # parts that `write` reads are not there
            return [FOREIGN]
        return differences(essence(config), essence(again), self.model_type)


def essence(config: ModelConfig) -> ModelConfig:
    """The configuration without what does not change the function: initialisation, dropout, losses of routers, remat,
    backends, type.

    A stack's layers are written out one by one, so that a pattern of four and two patterns of two are the same.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(plain(part) for part in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            neutral = {"dropout": 0.0, "backend": "auto", "balance_loss": 0.0, "z_loss": 0.0, "steps": StepSizes()}
            changes |= {name: plainly for name, plainly in neutral.items() if name in changes}
            if isinstance(value, AttentionConfig):  # what None stands for
                changes["num_kv_heads"] = value.kv_heads
                changes["scale"] = value.score_scale(config.scaling)
            if isinstance(value, StackConfig):
                blocks = tuple(plain(block) for block in value.all_blocks)
                changes |= {"blocks": blocks, "num_layers": len(blocks), "prologue": ()}
                changes |= {"layers": Layers.SCAN, "remat": Remat.NONE}
            return dataclasses.replace(value, **changes)
        return value

    if isinstance(config, ReplacedTokenDetectorConfig):
        generator = None if config.generator is None else essence(config.generator)
        return dataclasses.replace(config, discriminator=essence(config.discriminator), generator=generator)
    standard = config.scaling.kind is Scaling.STANDARD
    config = dataclasses.replace(
        config,
        init=InitConfig(),
        compute=ComputeType.FLOAT32,
        parametrization=None if standard else config.parametrization,
    )
    return plain(config)


def differences(ours: Any, theirs: Any, family: str, where: str = "") -> list[str]:
    """How two configurations differ: "decoder.blocks[0].attention.sinks is True, in a llama False"."""
    if type(ours) is type(theirs) and dataclasses.is_dataclass(ours):
        prefix = f"{where}." if where else ""
        pairs = [
            (f"{prefix}{f.name}", getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ours)
        ]
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs))]
    else:
        return [] if ours == theirs else [f"{where} is {_shown(ours)}, in a {family} {_shown(theirs)}"]
    return [difference for name, a, b in pairs for difference in differences(a, b, family, name)]


def _shown(value: Any) -> str:
    return repr(value.value) if isinstance(value, enum.Enum) else repr(value)


ACTIVATIONS = {
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.SQUARED_RELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "tanh": Activation.TANH,
}


def activation(name: str) -> Activation:
    """Of a `hidden_act`.

    Raises:
      ValueError: unknown here.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"The activation {name!r} is not among {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def activation_name(of: Activation, *prefer: str) -> str:
    """The `hidden_act` of an activation, one of `prefer` if it has several names."""
    names = [name for name, value in ACTIVATIONS.items() if value is of]
    if not names:
        raise ValueError(f"the activation {of.value} has no Hugging Face name")
    return next((name for name in prefer if name in names), names[0])


def rope(
    fields: Fields, *, layer_type: str | None = None, default_base: float = 10000.0, fraction: float = 1.0
) -> Rope:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    Args:
      fields: the configuration; positions up to `max_position_embeddings` were trained on.
      layer_type: the entry for layers of this type, where they differ.
      default_base: where neither says.
      fraction: of a head's dimensions that are rotated, where neither says.

    Raises:
      ValueError: a kind of scaling that does not exist here.
    """
    theta, scaling = fields("rope_theta", default_base), fields("rope_scaling", None)
    parameters: Mapping[str, Any] = fields("rope_parameters", None) or {"rope_theta": theta, **(scaling or {})}
    if layer_type is not None and layer_type in parameters:
        parameters = parameters[layer_type]
    rest = dict(parameters)
    kind = rest.pop("rope_type", rest.pop("type", "default"))
    base, fraction = rest.pop("rope_theta", theta), rest.pop("partial_rotary_factor", fraction)
    trained = rest.pop("original_max_position_embeddings", None) or fields("max_position_embeddings", None)
    match kind:
        case "default":
            found = None
        case "linear":
            found = LinearScaling(rest.pop("factor"))
        case "dynamic":
            found = NtkScaling(rest.pop("factor"), trained)
        case "llama3":
            low, high = rest.pop("low_freq_factor"), rest.pop("high_freq_factor")
            found = Llama3Scaling(rest.pop("factor"), low, high, trained)
        case "yarn":
            if not (truncate := rest.pop("truncate", True)):
                raise ValueError(
                    f"YaRN with truncate = {truncate}, a ramp that does not end at whole dimensions, has no equivalent "
                    f"here."
                )
            fast, slow = rest.pop("beta_fast", None) or 32.0, rest.pop("beta_slow", None) or 1.0
            found = YarnScaling(rest.pop("factor"), trained, fast, slow, rest.pop("attention_factor", None))
        case _:
            raise ValueError(f"RoPE scaling of type {kind!r} is not among default, linear, dynamic, llama3, yarn.")
    if left := {name: value for name, value in rest.items() if value}:
        raise ValueError(f"RoPE parameters {left} of type {kind!r} have no equivalent here.")
    return Rope(float(base), fraction, found)


def rope_parameters(of: Rope) -> Json:
    """`rope_parameters` of a Rope."""
    found: Json = {"rope_theta": of.base, "rope_type": "default"}
    if of.fraction != 1.0:
        found["partial_rotary_factor"] = of.fraction
    match of.scaling:
        case LinearScaling(factor):
            found |= {"rope_type": "linear", "factor": factor}
        case NtkScaling(factor, length):
            if length is None:
                raise ValueError("NTK scaling that does not depend on the text's length has no Hugging Face name")
            found |= {"rope_type": "dynamic", "factor": factor, "original_max_position_embeddings": length}
        case Llama3Scaling(factor, low, high, length):
            found |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            found["original_max_position_embeddings"] = length
        case YarnScaling(factor, length, fast, slow, attention_factor):
            found |= {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow}
            found["original_max_position_embeddings"] = length
            if attention_factor is not None:
                found["attention_factor"] = attention_factor
    return found


def written_rope(of: Rope) -> Json:
    """The fields of `config.json` that `rope` reads."""
    found: Json = {"rope_parameters": rope_parameters(of)}
    if isinstance(of.scaling, NtkScaling):  # transformers knows no other length there
        found["max_position_embeddings"] = found["rope_parameters"].pop("original_max_position_embeddings")
    return found


def causal_decoder(
    vocab_size: int,
    width: int,
    blocks: Sequence[BlockConfig],
    *,
    head: HeadConfig,
    embedding: EmbeddingConfig = EmbeddingConfig(),  # noqa: B008 (frozen)
    final_norm: NormConfig | None,
) -> LanguageModelConfig:
    """A decoder with a block for each layer."""
    return LanguageModelConfig(
        Architecture.CAUSAL_DECODER,
        vocab_size,
        width,
        embedding,
        head,
        InitConfig(),
        decoder=stack(blocks, final_norm=final_norm),
    )


def stack(blocks: Sequence[BlockConfig], **options: Any) -> StackConfig:
    """A stack with these layers, as the shortest pattern that repeats; `options` are StackConfig's."""
    blocks, count = tuple(blocks), len(blocks)
    period = next(n for n in range(1, count + 1) if count % n == 0 and blocks[:n] * (count // n) == blocks)
    return StackConfig(blocks[:period], count, **options)


def sliding_window(fields: Fields) -> tuple[int, int] | None:
    """(left, right) of `sliding_window`, which counts the query itself; None if there is none."""
    width = fields("sliding_window", None)
    return None if width is None else (width - 1, 0)


def layer_types(fields: Fields, count: int, default: Sequence[str]) -> tuple[str, ...]:
    """`layer_types`: full_attention or sliding_attention for each layer.

    Raises:
      ValueError: another type, or not as many as layers.
    """
    found = tuple(fields("layer_types", tuple(default)))
    if len(found) != count or set(found) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types must name full_attention or sliding_attention {count} times, not {found}.")
    return found


def written_layer_types(windows: Sequence[tuple[int, int] | None]) -> Json:
    """`layer_types` and `sliding_window` of decoders whose layers have these windows."""
    narrow = {seen for seen in windows if seen is not None}
    found: Json = {"layer_types": ["full_attention" if seen is None else "sliding_attention" for seen in windows]}
    return found | ({"sliding_window": one(sorted(narrow), "their window")[0] + 1} if narrow else {})


def one(values: Sequence[Any], what: str) -> Any:
    """The one value that all layers share.

    Raises:
      ValueError: they differ.
    """
    if len(set(values)) != 1:
        raise ValueError(f"its layers differ in {what}")
    return values[0]
