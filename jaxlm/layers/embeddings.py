"""Embeddings: tokens, positions, types; scaled, normalised, projected."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.context import Context
from jaxlm.layers.norms import Norm, NormConfig
from jaxlm.layers.parameters import Linear, ParameterMaker, PathKey
from jaxlm.layers.positions import LearnedPositions, SinusoidalPositions


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """How ids become vectors.

    Attributes:
      width: width of the tables where it differs from the model's; a matrix then projects to the model's width
        (factorised embeddings, ALBERT, ELECTRA's narrow generator).
      positions: positions added to the embeddings; None where attention knows the positions, or nothing does.
      types: number of token types with a vector each (BERT's sentence A and B); 0 is none. Batches without
        `*_type_ids` are all of type 0.
      scale_by_width: multiply by sqrt(model width) (the first Transformer, Gemma); under muP and CompleteP by
        sqrt(base width).
      norm: norm after the sum (BERT), or None.
      dropout: rate at the end (T5, BERT).
    """

    width: int | None = None
    positions: LearnedPositions | SinusoidalPositions | None = None
    types: int = 0
    scale_by_width: bool = False
    norm: NormConfig | None = None
    dropout: float = 0.0


class Embedding(nnx.Module):
    """int32 [B, T] -> [B, T, E]."""

    def __init__(
        self, config: EmbeddingConfig, make: ParameterMaker, vocab_size: int, *, dtype: jnp.dtype, key: PathKey
    ):
        width = make.width if config.width is None else config.width
        embed = (("embed", width),)
        self.tokens = make.embedding(key.at("tokens"), (("vocab", vocab_size), *embed))
        learned = isinstance(config.positions, LearnedPositions)
        self.positions = (
            make.embedding(
                key.at("positions"),
                (("length", config.positions.max_length + config.positions.unused), *embed),
                make.init.position_std,
            )
            if learned
            else None
        )
        self.types = make.embedding(key.at("types"), ((None, config.types), *embed)) if config.types else None
        self.norm = Norm(config.norm, make, embed) if config.norm else None
        model = (("embed", make.width),)
        self.projection = (
            Linear(make, ((None, width),), model, bias=True, dtype=dtype, key=key.at("projection"))
            if width != make.width
            else None
        )
        self.config = config
        self.dtype = dtype
        self.multiplier = make.parametrization.scaled_width(make.width) ** 0.5 if config.scale_by_width else 1.0

    def __call__(
        self,
        ids: jax.Array,
        positions: jax.Array,
        *,
        types: jax.Array | None = None,
        added: jax.Array | None = None,
        context: Context,
    ) -> jax.Array:
        """Embeds a batch.

        Args:
          ids: int32 [B, T] tokens.
          positions: int32 [B, T] positions inside each segment.
          types: int32 [B, T] token types; None is 0 everywhere.
          added: [B, T, embedding width], added to the tokens' vectors.
          context: operations and dropout key.

        Returns:
          [B, T, E].
        """
        x = _look_up(self.tokens, ids).astype(self.dtype)
        # Under FSDP the table's columns lie apart. Laid out so, vectors (and their gradients on the way back) travel to
        # the rows' devices in the activations' type, not in the table's, which is wider.
        x = jnp.moveaxis(context.ops.constrain(jnp.moveaxis(x, -1, 0), ("embed", "batch", "length")), 0, -1)
        if added is not None:
            x = x + added.astype(self.dtype)
        if self.multiplier != 1.0:
            x = x * jnp.asarray(self.multiplier, self.dtype)
        if self.positions is not None:
            x = x + _look_up(self.positions, positions + self.config.positions.unused).astype(self.dtype)
        elif self.config.positions is not None:
            x = x + self.config.positions(positions, x.shape[-1]).astype(self.dtype)
        if self.types is not None:
            x = x + (self.types[...][0] if types is None else self.types[...][types]).astype(self.dtype)
        if self.norm is not None:
            x = self.norm(x)
        x = context.dropout(x, self.config.dropout)
        if self.projection is not None:
            x = self.projection(x, context)
        return context.ops.constrain(x, ("batch", "length", "embed"))


def _look_up(table: nnx.Param, ids: jax.Array) -> jax.Array:
    """Rows of the table; an id beyond it gives NaN, which stops a run, where clamping would train on nonsense."""
    return table[...].at[ids].get(mode="fill", fill_value=jnp.nan)
