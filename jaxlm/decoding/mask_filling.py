"""Filling masks: an encoder draws a token for each masked position, all at once."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.decoding.cached_model import to_host
from jaxlm.decoding.sampling import NEVER, Sampling, SamplingConfig, draw, drawable_ids
from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.positions import LearnedPositions
from jaxlm.models.language_model import LanguageModel


def fill_masks(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    *,
    mask_id: int,
    seed: int,
    config: SamplingConfig,
    vocab_size: int | None = None,
    pad_id: int = 0,
    context: Context = LOCAL,
) -> list[np.ndarray]:
    """The texts with each masked position filled by an encoder, all at once and independently of each other.

    Args:
      model: an encoder.
      texts: token ids with `mask_id` at the positions to fill; none empty.
      mask_id: the id of [MASK]; never drawn.
      seed: of the draws. They depend on it, the text's index and the position, not on the other texts.
      config: how tokens are drawn; `config.max_new_tokens` has no meaning here.
      vocab_size: ids from here on are never drawn (rows that only pad the embedding table); None draws from all.
      pad_id: fills rows, and is never drawn.
      context: operations of the mesh that the model lies on.

    Returns:
      for each text its tokens, int32 [N].
    """
    if model.config.architecture is not Architecture.ENCODER:
        raise ValueError(
            f"fill_masks needs an encoder; a {model.config.architecture.value} continues texts, see "
            f"jaxlm.decoding.engine."
        )
    rows, lengths = _rows(texts, pad_id)
    if not lengths.all():
        raise ValueError("A text to fill is empty; give each at least one token.")
    _check_length(model, rows.shape[1])
    drawable = drawable_ids(model.config.vocab_size, vocab_size, (pad_id, mask_id))
    sampling = Sampling.of([config], [(seed, 0)])
    graphdef, state = nnx.split(model)
    filled = to_host(_fill(graphdef, state, _encoder_features(rows, lengths), sampling, drawable, mask_id, context))
    return [row[:length] for row, length in zip(filled, lengths, strict=True)]


@functools.partial(jax.jit, static_argnames=("graphdef", "mask_id", "context"))
def _fill(graphdef, state, batch, sampling, drawable, mask_id, context):
    """Tokens [B, S] with masks filled."""
    model = nnx.merge(graphdef, state)
    tokens = batch["encoder_input_tokens"]
    hidden, _ = model.hidden_states(batch, context=context)
    hidden = context.ops.restore(hidden)
    logits = model.head(hidden, context=context)  # [B, S, V]
    row, place = (x.ravel() for x in jnp.indices(tokens.shape))
    # Each position draws as a slot would, with its row as the number of the sample.
    each = jax.tree.map(lambda x: jnp.broadcast_to(x, (tokens.size, *x.shape[1:])), sampling)
    each = dataclasses.replace(each, seeds=each.seeds.at[:, 1].set(row.astype(jnp.uint32)))
    flat = jnp.where(drawable, logits, NEVER).reshape(tokens.size, -1)
    return jnp.where(tokens == mask_id, draw(flat, each, place).reshape(tokens.shape), tokens)


def _rows(texts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [B, longest] rows, int32 [B] lengths)."""
    if not texts:
        raise ValueError("There is nothing to fill: give at least one text.")
    lengths = np.array([len(text) for text in texts], np.int32)
    rows = np.full((len(texts), int(lengths.max())), pad_id, np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return rows, lengths


def _encoder_features(rows: np.ndarray, lengths: np.ndarray) -> dict[str, jax.Array]:
    """The encoder's features of one text a row."""
    positions = _positions(rows.shape)
    return {
        "encoder_input_tokens": jnp.asarray(rows),
        "encoder_segment_ids": (positions < lengths[:, None]).astype(jnp.int32),
        "encoder_positions": positions,
    }


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """int32 [B, T]: 0, 1, 2, ... in each row."""
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)


def _check_length(model: LanguageModel, length: int) -> None:
    """Raises if a row has positions that the model has not learned."""
    positions = model.config.embedding.positions
    if isinstance(positions, LearnedPositions) and length > positions.max_length:
        raise ValueError(
            f"A text to fill has {length} tokens, but the model has learned {positions.max_length} positions; shorten "
            f"it."
        )
