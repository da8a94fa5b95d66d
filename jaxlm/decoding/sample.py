"""Plain sampling, for the samples that training shows: the whole row again for each token, in one compiled loop.

Shapes are fixed by the longest prompt and the number of new tokens, so a run that draws samples from the same prompts
now and then compiles once. There is no cache of keys and values.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxlm.architecture import Architecture
from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.positions import LearnedPositions
from jaxlm.models.language_model import LanguageModel

NEVER = -1e30  # logit of a token that must not be drawn


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn.

    Attributes:
      max_new_tokens: at most so many for each prompt; an end-of-text token ends it earlier.
      temperature: logits are divided by it; 0 always takes the likeliest token.
      top_k: draw from the k likeliest only (arXiv 1805.04833, 5.4); 0 draws from all.
      top_p: draw from the fewest tokens that together have this probability (nucleus, arXiv 1904.09751); 1 from all.
        Applied after `top_k`.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"SamplingConfig.max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"SamplingConfig needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, not {self.temperature}, "
                f"{self.top_k} and {self.top_p}."
            )


def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    config: SamplingConfig,
    vocab_size: int | None = None,
    pad_id: int = 0,
    eos_id: int = 1,
    context: Context = LOCAL,
) -> list[np.ndarray]:
    """Continues each prompt; for an encoder-decoder, answers it. All processes of a job call it alike.

    A decoder sees the prompt at the beginning of its row, a prefix decoder with both directions open in it; an
    encoder-decoder sees it in the encoder. Use `fill_masks` for an encoder.

    Args:
      model: its architecture says how prompts are laid out.
      prompts: token ids, as the vocabulary gives them (an encoder-decoder trained with an end-of-text token on its
        inputs wants one here too). May be empty for decoders.
      key: jax key. Draws depend on it, the prompt's index and the position, not on the other prompts.
      config: how tokens are drawn.
      vocab_size: ids from here on are never drawn (rows that only pad the embedding table); None draws from all.
      pad_id: fills rows, starts a decoder's input, and is never drawn.
      eos_id: ends a text.
      context: operations of the mesh that the model lies on.

    Returns:
      for each prompt the new tokens, int32, without prompt and end-of-text token.

    Raises:
      ValueError: the model is an encoder, or rows would be longer than its learned positions.
    """
    architecture = model.config.architecture
    if architecture is Architecture.ENCODER:
        raise ValueError("An encoder writes no text: give fill_masks a text with masked positions instead.")
    rows, lengths = _rows(prompts, pad_id)
    inputs = None
    if architecture is Architecture.ENCODER_DECODER:
        if not lengths.all():
            raise ValueError("A prompt of an encoder-decoder is empty; its encoder needs at least one token.")
        inputs, input_lengths = rows, lengths
        rows, lengths = np.full((len(rows), 0), pad_id, np.int32), np.zeros_like(lengths)
    tokens = np.pad(rows, ((0, 0), (0, config.max_new_tokens)), constant_values=pad_id)
    _check_length(model, max(tokens.shape[1], 0 if inputs is None else inputs.shape[1]))
    batch = {
        "decoder_segment_ids": jnp.ones(tokens.shape, jnp.int32),
        "decoder_positions": _positions(tokens.shape),
    }
    if architecture is Architecture.PREFIX_DECODER:
        # One position more than the prompt has: the model's input is shifted by one (docs/architecture.md).
        batch["decoder_causal_attention"] = (_positions(tokens.shape) <= lengths[:, None]).astype(jnp.int32)
    if inputs is not None:
        batch |= _encoder_features(inputs, input_lengths)
    graphdef, state = nnx.split(model)
    drawn, ends = _generate(
        graphdef,
        state,
        batch,
        tokens,
        lengths,
        key,
        config,
        _drawable(model, vocab_size, pad_id),
        pad_id,
        eos_id,
        context,
    )
    drawn, ends = _to_host(drawn), _to_host(ends)
    return [row[start:end] for row, start, end in zip(drawn, lengths, ends, strict=True)]


def fill_masks(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    *,
    mask_id: int,
    key: jax.Array,
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
      key, config, vocab_size, pad_id, context: as for `sample`; `config.max_new_tokens` has no meaning here.

    Returns:
      for each text its tokens, int32 [N].
    """
    if model.config.architecture is not Architecture.ENCODER:
        raise ValueError(
            f"fill_masks needs an encoder; sample continues texts with a {model.config.architecture.value}."
        )
    rows, lengths = _rows(texts, pad_id)
    if not lengths.all():
        raise ValueError("A text to fill is empty; give each at least one token.")
    _check_length(model, rows.shape[1])
    drawable = _drawable(model, vocab_size, pad_id) & (np.arange(model.config.vocab_size) != mask_id)
    graphdef, state = nnx.split(model)
    filled = _to_host(_fill(graphdef, state, _encoder_features(rows, lengths), key, config, drawable, mask_id, context))
    return [row[:length] for row, length in zip(filled, lengths, strict=True)]


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "pad_id", "eos_id", "context"))
def _generate(graphdef, state, batch, tokens, lengths, key, config, drawable, pad_id, eos_id, context):
    """The compiled loop: (tokens [B, T], end of each row's text [B])."""
    model = nnx.merge(graphdef, state)
    index = jnp.arange(tokens.shape[0])

    def unfinished(carry):
        count, _, _, done = carry
        return (count < config.max_new_tokens) & ~jnp.all(done)

    def draw_one(carry):
        count, tokens, ends, done = carry
        at = lengths + count  # [B], each row goes on at its own place
        shifted = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=pad_id)[:, :-1]
        hidden, _ = model.hidden_states({**batch, "decoder_input_tokens": shifted}, context=context)
        hidden = context.ops.restore(hidden)  # [B, T, E]
        logits = model.head(hidden[index, at], context=context)  # [B, V]
        keys = jax.vmap(lambda row, place: jax.random.fold_in(jax.random.fold_in(key, row), place))(index, at)
        drawn = draw(keys, jnp.where(drawable, logits, NEVER), config)
        done = done | (drawn == eos_id)
        tokens = tokens.at[index, at].set(jnp.where(done, tokens[index, at], drawn))
        return count + 1, tokens, jnp.where(done, ends, at + 1), done

    start = (jnp.int32(0), jnp.asarray(tokens), jnp.asarray(lengths), jnp.zeros(len(lengths), bool))
    _, tokens, ends, _ = jax.lax.while_loop(unfinished, draw_one, start)
    return tokens, ends


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "mask_id", "context"))
def _fill(graphdef, state, batch, key, config, drawable, mask_id, context):
    """Tokens [B, S] with masks filled."""
    model = nnx.merge(graphdef, state)
    tokens = batch["encoder_input_tokens"]
    hidden, _ = model.hidden_states(batch, context=context)
    hidden = context.ops.restore(hidden)
    logits = model.head(hidden, context=context)  # [B, S, V]
    row, place = jnp.indices(tokens.shape)
    keys = jax.vmap(lambda r, p: jax.random.fold_in(jax.random.fold_in(key, r), p))(row.ravel(), place.ravel())
    flat = jnp.where(drawable, logits, NEVER).reshape(tokens.size, -1)
    return jnp.where(tokens == mask_id, draw(keys, flat, config).reshape(tokens.shape), tokens)


def draw(keys: jax.Array, logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Draws a token a row: keys [B], float32 logits [B, V] -> int32 [B]."""
    if config.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    if config.top_k and config.top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, config.top_k)[0][:, -1:], NEVER, logits)
    if config.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token is kept where those likelier than it have not reached top_p yet; so the likeliest always is.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < config.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, NEVER, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _rows(texts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [B, longest] rows, int32 [B] lengths)."""
    if not texts:
        raise ValueError("There is nothing to sample from: give at least one prompt.")
    lengths = np.array([len(text) for text in texts], np.int32)
    rows = np.full((len(texts), int(lengths.max())), pad_id, np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return rows, lengths


def _to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every process of the job."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


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


def _drawable(model: LanguageModel, vocab_size: int | None, pad_id: int) -> np.ndarray:
    """bool [V]: the ids that may be drawn."""
    ids = np.arange(model.config.vocab_size)
    return (ids < (vocab_size or len(ids))) & (ids != pad_id)


def _check_length(model: LanguageModel, length: int) -> None:
    """Raises if a row has positions that the model has not learned."""
    positions = model.config.embedding.positions
    if isinstance(positions, LearnedPositions) and length > positions.max_length:
        raise ValueError(
            f"Prompt and new tokens make rows of {length} tokens, but the model has learned {positions.max_length} "
            f"positions; shorten the prompts or max_new_tokens."
        )
