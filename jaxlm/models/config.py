"""Model configurations: one typed tree says everything about a model."""

import dataclasses
import enum

import jax.numpy as jnp

from jaxlm.architecture import Architecture
from jaxlm.layers.block import BlockKind
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import Activation
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, Parametrization, Scaling
from jaxlm.layers.positions import LearnedPositions
from jaxlm.layers.quantized import Quantization
from jaxlm.layers.stack import StackConfig


class ComputeType(enum.Enum):
    """Type of activations and of matrix products. Parameters, softmax, norms and logits are float32 in all.

    INT8 and FP8: activations are bfloat16, and the linear layers of the stacks multiply in 8 bits, see `Quantization`.
    Embeddings, the head, routers, experts (whose products are grouped) and attention itself do as in BFLOAT16.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def dtype(self) -> jnp.dtype:
        """The jax type of activations."""
        return jnp.dtype("float32" if self is ComputeType.FLOAT32 else "bfloat16")

    @property
    def quantization(self) -> Quantization | None:
        """How the linear layers of the stacks multiply, if not in `dtype`."""
        return {ComputeType.INT8: Quantization.INT8, ComputeType.FP8: Quantization.FP8}.get(self)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """From hidden states to logits over the vocabulary.

    Attributes:
      tied: the output matrix is the token embedding (then with its width), not one of its own.
      scale_by_width: hidden states are divided by sqrt(model width) (T5's tied head); under muP and CompleteP by
        sqrt(base width), beside their own factor.
      soft_cap: logits become soft_cap * tanh(logit / soft_cap) (Gemma 2: 30); None leaves them.
      bias: a bias a token (BERT).
      transform: a dense layer with this activation before the output (BERT's masked-LM head); None is no such layer.
        It also leads from the model's width to that of a tied embedding of another width.
      transform_bias: bias of that layer.
      transform_norm: norm after it, or None.
    """

    tied: bool = True
    scale_by_width: bool = False
    soft_cap: float | None = None
    bias: bool = False
    transform: Activation | None = None
    transform_bias: bool = True
    transform_norm: NormConfig | None = None

    def __post_init__(self):
        if self.transform is not None:
            object.__setattr__(self, "transform", Activation(self.transform))
        elif self.transform_norm is not None:
            raise ValueError("HeadConfig.transform_norm needs HeadConfig.transform, the layer it follows.")


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """A language model.

    An encoder-decoder has two stacks. Each other architecture has one, given as `decoder` or `encoder`: the name says
    where its parameters lie, not what it does, so that a change of `architecture` runs the same parameters.

    Attributes:
      architecture: which tokens see which.
      vocab_size: rows of the embedding table (V).
      width: model width (E).
      embedding: tokens, positions, types.
      head: logits; None: it has none (the discriminator of a replaced-token detector).
      init: how parameters start.
      encoder: a stack or None.
      decoder: a stack or None.
      encoder_width: width of the encoder where it differs from `width`, which is then the decoder's (T5Gemma,
        arXiv 2504.06225, 2: unbalanced sizes); None is `width`.
      encoder_embedding: the encoder's own tokens and positions; None: it shares `embedding` with the decoder.
      parametrization: standard, muP or CompleteP; None is standard.
      compute: type of activations and products; the one switch of precision.
      future_tokens: multi-token prediction (arXiv 2404.19737): n blocks side by side on top of the stack, block i
        predicting the (i+1)th next token, all through one head. 0 predicts the next token without such blocks.
      future_block: those blocks; needed if future_tokens > 0.
      pooler: BERT's dense layer with tanh on the first token, for classifiers; pretraining does not use it.
    """

    architecture: Architecture
    vocab_size: int
    width: int
    embedding: EmbeddingConfig
    head: HeadConfig | None
    init: InitConfig
    encoder: StackConfig | None = None
    decoder: StackConfig | None = None
    encoder_width: int | None = None
    encoder_embedding: EmbeddingConfig | None = None
    parametrization: Parametrization | None = None
    compute: ComputeType = ComputeType.FLOAT32
    future_tokens: int = 0
    future_block: BlockKind | None = None
    pooler: bool = False

    def __post_init__(self):
        object.__setattr__(self, "architecture", Architecture(self.architecture))
        object.__setattr__(self, "compute", ComputeType(self.compute))
        self._check_stacks()
        if self.width < 1 or self.vocab_size < 1:
            raise ValueError(f"width={self.width} and vocab_size={self.vocab_size} of a model must be positive.")
        self._check_encoder()
        narrow = self.embedding.width not in (None, self.width)
        if narrow and self.head is not None and self.head.tied and self.head.transform is None:
            raise ValueError(
                f"The tied output has the embedding's width {self.embedding.width}, hidden states the model's width "
                f"{self.width}: give HeadConfig.transform, which leads from one to the other, or tied=False."
            )
        if (self.future_tokens > 0) != (self.future_block is not None):
            raise ValueError(
                f"future_tokens={self.future_tokens} and future_block={self.future_block} do not go together: set "
                f"both for multi-token prediction, or neither."
            )
        if self.future_tokens and self.architecture.has_encoder_features:
            raise ValueError(
                f"Multi-token prediction runs on a causal_decoder or prefix_decoder, not on {self.architecture.value}."
            )

    def _check_stacks(self):
        if self.architecture is Architecture.ENCODER_DECODER:
            if self.encoder is None or self.decoder is None:
                raise ValueError("An encoder_decoder needs both StackConfigs, encoder and decoder.")
            if not all(block.crosses for block in self.decoder.all_blocks):
                raise ValueError("Every block of an encoder_decoder's decoder needs BlockConfig.cross_attention.")
        elif (self.encoder is None) == (self.decoder is None):
            raise ValueError(
                f"The architecture {self.architecture.value} has one stack: give either decoder or encoder, and leave "
                f"the other None."
            )
        for name, config in self.stacks.items():
            crosses = name == "decoder" and self.architecture is Architecture.ENCODER_DECODER
            blocks = config.all_blocks if self.future_block is None else (*config.all_blocks, self.future_block)
            if not crosses and any(block.crosses for block in blocks):
                raise ValueError(
                    f"A block of the {name} has cross_attention, but the architecture {self.architecture.value} gives "
                    f"it nothing to attend to; only the decoder of an encoder_decoder has."
                )
            reads = crosses or self.architecture is Architecture.CAUSAL_DECODER
            if not reads and (running := [block.running_state for block in blocks if block.running_state]):
                raise ValueError(
                    f"The {name} of the architecture {self.architecture.value} shows tokens what follows them, but a "
                    f"layer of {running[0]} carries a state that knows only what came before; use causal_decoder."
                )

    def _check_encoder(self):
        if (self.encoder_width or self.encoder_embedding) and self.architecture is not Architecture.ENCODER_DECODER:
            raise ValueError(
                f"encoder_width={self.encoder_width} and encoder_embedding={self.encoder_embedding} tell an encoder "
                f"from a decoder, but the architecture {self.architecture.value} has one stack, with `width` and "
                f"`embedding`; leave them None."
            )
        if self.width_of("encoder") == self.width:
            return
        if self.encoder_width < 1 or self.encoder_embedding is None:
            raise ValueError(
                f"encoder_width={self.encoder_width} must be positive, and an encoder of another width than the "
                f"decoder's {self.width} cannot share its embedding: give encoder_embedding."
            )
        if self.scaling.kind is not Scaling.STANDARD:
            raise ValueError(
                f"The parametrization {self.scaling.kind.value} follows one width, but encoder_width="
                f"{self.encoder_width} is not width={self.width}; use 'standard'."
            )

    def width_of(self, stack: str) -> int:
        """Width of the stack of this name."""
        return self.width if stack == "decoder" or self.encoder_width is None else self.encoder_width

    def learned_length(self, stack: str) -> int | None:
        """Learned positions of the stack of this name; None: it has none, and they limit nothing."""
        own = self.encoder_embedding if stack == "encoder" else None
        positions = (own or self.embedding).positions
        return positions.max_length if isinstance(positions, LearnedPositions) else None

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """The stacks there are, by name."""
        return {name: s for name, s in (("encoder", self.encoder), ("decoder", self.decoder)) if s is not None}

    @property
    def scaling(self) -> Parametrization:
        """`parametrization`, or the standard one."""
        return self.parametrization or Parametrization()


class EmbeddingSharing(enum.Enum):
    """Token embeddings of generator and discriminator.

    UNTIED: two tables. TIED: one table, trained by both losses (ELECTRA, arXiv 2003.10555, 3.2), positions and types
    with it. GRADIENT_DISENTANGLED: the discriminator's is the generator's, without gradient, plus a table of its own
    that starts at 0 (DeBERTaV3, arXiv 2111.09543, 3.3).
    """

    UNTIED = "untied"
    TIED = "tied"
    GRADIENT_DISENTANGLED = "gradient_disentangled"


@dataclasses.dataclass(frozen=True)
class ReplacedTokenDetectorConfig:
    """A generator that fills masks and a discriminator that finds what it filled.

    Attributes:
      discriminator: an encoder without a vocabulary head.
      generator: an encoder, usually narrower; None draws replacements uniformly from the vocabulary.
      sharing: see `EmbeddingSharing`.
      head_activation: of the discriminator's dense layer before the verdict.
    """

    discriminator: LanguageModelConfig
    generator: LanguageModelConfig | None = None
    sharing: EmbeddingSharing = EmbeddingSharing.UNTIED
    head_activation: Activation = Activation.GELU

    def __post_init__(self):
        object.__setattr__(self, "sharing", EmbeddingSharing(self.sharing))
        object.__setattr__(self, "head_activation", Activation(self.head_activation))
        for name, model in (("discriminator", self.discriminator), ("generator", self.generator)):
            if model is not None and model.architecture is not Architecture.ENCODER:
                raise ValueError(
                    f"The {name} of a replaced-token detector must have the architecture encoder, not "
                    f"{model.architecture.value}: it judges each position from both sides."
                )
        if self.discriminator.head is not None:
            raise ValueError(
                f"The discriminator has no use for a vocabulary head; set its LanguageModelConfig.head to None, not to "
                f"{self.discriminator.head}."
            )
        if self.sharing is EmbeddingSharing.UNTIED:
            return
        if self.generator is None:
            raise ValueError(f"sharing={self.sharing.value!r} needs a generator; without one use 'untied'.")
        shapes = [(m.vocab_size, m.embedding.width or m.width) for m in (self.generator, self.discriminator)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Shared embeddings must have one shape, but the generator's are {shapes[0]} and the discriminator's "
                f"{shapes[1]}; set EmbeddingConfig.width of the generator to {shapes[1][1]}."
            )

    @property
    def architecture(self) -> Architecture:
        """The architecture that batches are laid out for."""
        return self.discriminator.architecture

    @property
    def vocab_size(self) -> int:
        """Rows of the discriminator's embedding table."""
        return self.discriminator.vocab_size


ModelConfig = LanguageModelConfig | ReplacedTokenDetectorConfig
