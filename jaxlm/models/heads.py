"""Heads: what leads to the vocabulary, a verdict for each token, labels, BERT's pooler."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.context import Context
from jaxlm.layers.feed_forward import Activation
from jaxlm.layers.norms import Norm
from jaxlm.layers.parameters import Linear, ParameterMaker, PathKey
from jaxlm.models.config import HeadConfig
from pallas_kernels.cross_entropy import OutputProjection


class VocabularyHead(nnx.Module):
    """From hidden states [..., E] to an `OutputProjection`, and to what it projects."""

    def __init__(
        self,
        config: HeadConfig,
        make: ParameterMaker,
        vocab_size: int,
        embedding_width: int,
        *,
        dtype: jnp.dtype,
        key: PathKey,
    ):
        width, vocab = make.width, (("vocab", vocab_size),)
        transformed = embedding_width if config.tied and config.transform else width
        self.transform = (
            Linear(
                make,
                (("embed", width),),
                ((None, transformed),),
                bias=config.transform_bias,
                dtype=dtype,
                key=key.at("transform"),
            )
            if config.transform
            else None
        )
        self.norm = Norm(config.transform_norm, make, ((None, transformed),)) if config.transform_norm else None
        self.kernel = None if config.tied else make.head(key.at("kernel"), (("embed", transformed),), vocab)
        self.bias = make.vector(vocab, 0.0) if config.bias else None
        self.config = config
        self.dtype = dtype
        scale = make.parametrization.scaled_width(width) ** -0.5 if config.scale_by_width else 1.0
        self.multiplier = scale / make.parametrization.width_ratio(width)

    def __call__(self, hidden: jax.Array, table: jax.Array, context: Context) -> tuple[jax.Array, OutputProjection]:
        """What the output matrix is applied to, and the matrix with all that follows.

        Args:
          hidden: [..., E].
          table: [V, embedding width], the token embeddings; used if tied.
          context: operations.

        Returns:
          [..., transformed width] in the compute type, and the projection.
        """
        if self.transform is not None:
            hidden = self.config.transform(self.transform(hidden, context))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden.astype(self.dtype), OutputProjection(
            table if self.kernel is None else self.kernel[...],
            None if self.bias is None else self.bias[...],
            vocab_axis=0 if self.kernel is None else 1,
            scale=self.multiplier,
            soft_cap=self.config.soft_cap,
        )


class TokenBinaryHead(nnx.Module):
    """[..., E] hidden states -> [...] float32 logits of one yes-or-no question a token (ELECTRA's discriminator)."""

    def __init__(self, activation: Activation, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey):
        embed, same = (("embed", make.width),), ((None, make.width),)
        self.dense = Linear(make, embed, same, bias=True, dtype=dtype, key=key.at("dense"))
        self.kernel = make.head(key.at("kernel"), embed, ())
        self.bias = make.vector((), 0.0)
        self.activation = activation
        self.multiplier = 1.0 / make.parametrization.width_ratio(make.width)

    def __call__(self, hidden: jax.Array, context: Context) -> jax.Array:
        """The logits."""
        hidden = self.activation(self.dense(hidden, context)).astype(jnp.float32)
        return hidden @ self.kernel[...] * self.multiplier + self.bias[...]


class LabelHead(nnx.Module):
    """[..., E] hidden states -> float32 [..., labels] logits: one matrix and a bias, trained with the task."""

    def __init__(self, labels: int, make: ParameterMaker, *, key: PathKey):
        sides = (("embed", make.width),), ((None, labels),)
        self.kernel = make.readout(key.at("kernel"), *sides)
        self.bias = make.vector(sides[1], 0.0)
        self.multiplier = 1.0 / make.parametrization.width_ratio(make.width)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """The logits."""
        return hidden.astype(jnp.float32) @ self.kernel[...] * self.multiplier + self.bias[...]


class Pooler(nnx.Module):
    """BERT's pooler: tanh(dense(first token)), [B, S, E] -> [B, E]."""

    def __init__(self, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey):
        self.dense = Linear(make, (("embed", make.width),), ((None, make.width),), bias=True, dtype=dtype, key=key)

    def __call__(self, hidden: jax.Array, context: Context) -> jax.Array:
        """The summaries."""
        return jnp.tanh(self.dense(hidden[:, 0], context))
