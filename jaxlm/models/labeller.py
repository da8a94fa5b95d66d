"""Labeller: a trained language model without its vocabulary head, under a head for labels; and how states are pooled.

Of an encoder-decoder the encoder is taken, as for sentence embeddings from T5 (Ni et al. 2021, arXiv 2108.08877, 3.2);
of the other architectures the one stack there is, under the mask that is asked for.
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.parameters import ParameterMaker, PathKey
from jaxlm.layers.side_values import SideValues
from jaxlm.layers.stacking import StackLayout
from jaxlm.models.config import LanguageModelConfig
from jaxlm.models.heads import LabelHead
from jaxlm.models.language_model import Batch, LanguageModel


class Pooling(enum.Enum):
    """A text's vector from those of its tokens: their MEAN, or the LAST one, which alone has read all of a causal text.

    Tokens that are not the text's own (a decoder's start, an end-of-text id) are not pooled.
    """

    MEAN = "mean"
    LAST = "last"


def body_config(config: LanguageModelConfig, architecture: Architecture | None = None) -> LanguageModelConfig:
    """The configuration of a trained model's body: no vocabulary head; of an encoder-decoder its encoder.

    Args:
      config: of the trained model.
      architecture: the mask to use in place of its own; None keeps it.

    Raises:
      ValueError: the weights cannot be used under that mask.
    """
    if config.architecture is not Architecture.ENCODER_DECODER:
        if architecture is Architecture.ENCODER_DECODER:
            raise ValueError(
                f"A model of one stack ({config.architecture.value}) cannot be used as an encoder_decoder; leave the "
                f"architecture None, or choose causal_decoder, prefix_decoder or encoder."
            )
        return dataclasses.replace(config, head=None, architecture=architecture or config.architecture)
    if architecture not in (None, Architecture.ENCODER):
        raise ValueError(
            f"Of an encoder_decoder the encoder is labelled with, which cannot be a {architecture.value}; leave the "
            f"architecture None."
        )
    return dataclasses.replace(
        config,
        architecture=Architecture.ENCODER,
        width=config.width_of("encoder"),
        embedding=config.encoder_embedding or config.embedding,
        head=None,
        decoder=None,
        encoder_width=None,
        encoder_embedding=None,
    )


def body_of(model: LanguageModel, architecture: Architecture | None = None) -> LanguageModel:
    """A trained model's body, which shares the model's arrays; see `body_config`."""
    config = body_config(model.config, architecture)
    body = nnx.eval_shape(lambda: LanguageModel(config, key=jax.random.key(0)))
    own = nnx.to_pure_dict(nnx.state(model))
    if model.encoder_embedding is not None:
        own["embedding"] = own["encoder_embedding"]
    graph, state = nnx.split(body)
    wanted = nnx.to_pure_dict(state)
    return nnx.merge(graph, {name: own[name] for name in wanted})


class Labeller(nnx.Module):
    """A body and a head. Parameters lie under `body` and `head`."""

    def __init__(self, body: LanguageModelConfig, labels: int | None, *, key: jax.Array):
        """Makes all parameters.

        Args:
          body: see `body_config`.
          labels: of the head; None is no head.
          key: jax key.
        """
        root = PathKey(key)
        self.body = LanguageModel(body, key=root.at("body").key)
        make = ParameterMaker(body.init, body.scaling, body.width)
        self.head = None if labels is None else LabelHead(labels, make, key=root.at("head"))

    @property
    def layouts(self) -> tuple[StackLayout, ...]:
        """The scanned stacks among the parameters."""
        return tuple(dataclasses.replace(layout, path=("body", *layout.path)) for layout in self.body.layouts)

    def token_states(self, batch: Batch, *, context: Context = LOCAL) -> tuple[jax.Array, SideValues]:
        """Hidden states after the final norm, [B, T, E] in the rows' own order; and the layers' side values."""
        hidden, side = self.body.hidden_states(batch, context=context)
        return context.ops.restore(hidden), side


def pooled(hidden: jax.Array, text: jax.Array, pooling: Pooling) -> jax.Array:
    """A vector for each row, float32 [B, E].

    Args:
      hidden: [B, T, E].
      text: bool [B, T], the columns that hold tokens of the text; a row may have none, and gives 0.
      pooling: see `Pooling`.
    """
    hidden = hidden.astype(jnp.float32)
    if pooling is Pooling.MEAN:
        weights = text.astype(jnp.float32)
        return jnp.einsum("bte,bt->be", hidden, weights) / jnp.maximum(weights.sum(1), 1.0)[:, None]
    columns = jnp.arange(text.shape[1])
    is_last = columns == jnp.where(text, columns, -1).max(1, keepdims=True)
    return jnp.einsum("bte,bt->be", hidden, is_last.astype(jnp.float32))
