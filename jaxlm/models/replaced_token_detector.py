"""ReplacedTokenDetector: a generator and a discriminator with shared or separate embeddings (ELECTRA, DeBERTaV3)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.parameters import ParameterMaker, PathKey
from jaxlm.layers.side_values import SideValues
from jaxlm.layers.stacking import StackLayout
from jaxlm.models.config import EmbeddingSharing, ReplacedTokenDetectorConfig
from jaxlm.models.heads import TokenBinaryHead
from jaxlm.models.language_model import Batch, LanguageModel
from jaxlm.parallel.stages import ONE_STAGE, Stages


class ReplacedTokenDetector(nnx.Module):
    """Two encoders. `generator` is a LanguageModel, or None for uniform replacements; so is `discriminator`."""

    def __init__(self, config: ReplacedTokenDetectorConfig, *, key: jax.Array, stages: Stages = ONE_STAGE):
        """Makes all parameters; see `LanguageModel`."""
        root = PathKey(key)
        self.generator = (
            LanguageModel(config.generator, key=root.at("generator").key, stages=stages)
            if config.generator is not None
            else None
        )
        self.discriminator = LanguageModel(config.discriminator, key=root.at("discriminator").key, stages=stages)
        encoder = config.discriminator
        make = ParameterMaker(encoder.init, encoder.scaling, encoder.width)
        self.verdict = TokenBinaryHead(
            config.head_activation, make, dtype=encoder.compute.dtype, key=root.at("verdict")
        )
        self.config = config
        ours = self.discriminator.embedding
        if config.sharing is EmbeddingSharing.TIED:
            # One variable in two places, which nnx keeps as one parameter, under `discriminator`.
            self.generator.embedding.tokens = ours.tokens
            for name in ("positions", "types"):
                shared, other = getattr(ours, name), getattr(self.generator.embedding, name)
                if shared is not None and other is not None and shared.shape == other.shape:
                    setattr(self.generator.embedding, name, shared)
        elif config.sharing is EmbeddingSharing.GRADIENT_DISENTANGLED:
            ours.tokens[...] = jnp.zeros_like(ours.tokens[...])

    @property
    def layouts(self) -> tuple[StackLayout, ...]:
        """The scanned stacks among the parameters."""
        models = {"generator": self.generator, "discriminator": self.discriminator}
        return tuple(
            dataclasses.replace(layout, path=(name, *layout.path))
            for name, model in models.items()
            if model is not None
            for layout in model.layouts
        )

    def discriminator_logits(self, batch: Batch, *, context: Context = LOCAL) -> tuple[jax.Array, SideValues]:
        """Whether each token of `encoder_input_tokens` was replaced: float32 logits [B, S]; and the side values."""
        added = None
        if self.config.sharing is EmbeddingSharing.GRADIENT_DISENTANGLED:
            table = jax.lax.stop_gradient(self.generator.embedding.tokens[...])
            added = table[context.ops.arrange(batch["encoder_input_tokens"])]
        hidden, side = self.discriminator.hidden_states(batch, context=context, added_embeddings=added)
        return context.ops.restore(self.verdict(hidden, context)), side
