"""A model ready to continue texts: prompts into caches, a few tokens more, and the logits after them.

What engine, beam search and speculative decoding are made of. Programs are compiled once for each shape, and shapes are
of few sizes; they are shared by all `CachedModel`s of one definition, so that changed parameters compile nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxlm.architecture import Architecture
from jaxlm.data.packing import pack_window
from jaxlm.layers.cache import CacheConfig, Caches, PackedTexts
from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.positions import NtkScaling
from jaxlm.models.config import LanguageModelConfig
from jaxlm.models.language_model import LanguageModel, unrolled
from jaxlm.parallel.sharded_ops import ShardedOps

LEAST = 16
"""Tokens of the shortest row, and of the smallest cache."""


def bucket(count: int, most: int | None = None, least: int = LEAST) -> int:
    """The size, a power of two or `most`, that `count` things are given room for."""
    size = max(least, 1 << max(count - 1, 0).bit_length())
    return size if most is None else min(size, most)


def _row_bucket(count: int, parts: int) -> int:
    """What `count` rows become: 1, 2, ..., 16, 18, 20, ..., 32, 36, ... rows, an eighth too many at most.

    An empty row costs as much as a full one, and for every number of rows a program is compiled. Where the mesh splits
    rows into `parts`, they are a multiple of these: others would lie whole on every device.
    """
    step = math.lcm(max(1, bucket(count, least=1) // 16), parts)
    return -(-count // step) * step


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions of one model definition. `params` is the model's state, as nested dicts.

    Attributes:
      prefill: (params, batch, texts, sources) -> (caches of N slots, float32 logits [N, V] after each text).
      extend: (params, caches, tokens [B, t], present [B, t] or None) -> (logits [B, t, V], caches).
    """

    prefill: Callable[..., tuple[Caches, jax.Array]]
    extend: Callable[..., tuple[jax.Array, Caches]]


@functools.cache
def programs(graphdef: Any, caching: CacheConfig, context: Context) -> Programs:
    """The programs of a definition; asked for again, the same with what they have compiled."""

    def prefill(params, batch, texts, sources):
        model = nnx.merge(graphdef, params)
        hidden, caches = model.prefill(batch, texts, sources, caching=caching, context=context)
        logits = model.head(texts.last(hidden), context=context)
        return caches.laid_out(context.ops.constrain), context.ops.constrain(logits, ("batch", "vocab"))

    def extend(params, caches, tokens, present):
        logits, caches = extend_slots(nnx.merge(graphdef, params), caches, tokens, present, context)
        return logits, caches.laid_out(context.ops.constrain)

    return Programs(jax.jit(prefill), jax.jit(extend, donate_argnums=1))


def extend_slots(
    model: LanguageModel, caches: Caches, tokens: jax.Array, present: jax.Array | None, context: Context
) -> tuple[jax.Array, Caches]:
    """Inside jit: float32 logits [B, t, V] after each of t new tokens [B, t], and the caches with them."""
    hidden, caches = model.extend(tokens, caches, present=present, context=context)
    logits = model.head(hidden, context=context)
    return context.ops.constrain(logits, ("batch", None, "vocab")), caches


class CachedModel:
    """A decoder or encoder-decoder whose layers are unrolled and whose parameters have the types they are used in.

    Attributes:
      config: of the unrolled model.
      params: its state, nested dicts.
      start_id: the token before the first of each text in the decoder's input. Models trained here begin with the
        padding id, since their inputs are the targets shifted by one; None: the prompt begins by itself.
      context_length: most tokens of a text, the start among them; None: any number.
      source_length: most tokens of a prompt that an encoder reads; None: any number.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        start_id: int | None,
        caching: CacheConfig | None = None,
        context_length: int | None = None,
        context: Context = LOCAL,
    ):
        """Makes a model ready.

        Args:
          model: scanned layers are unrolled, which copies them.
          start_id: see above.
          context_length: most tokens of a text, and of what an encoder reads; positions that the model has not learned
            are refused in any case.
          caching: what is kept; None is `CacheConfig()`.
          context: operations of the mesh that the model lies on.

        Raises:
          ValueError: the model is an encoder, or an encoder-decoder without a start_id; or the mesh has an axis that
            decoding has no use for.
        """
        architecture = model.config.architecture
        if architecture is Architecture.ENCODER:
            raise ValueError("An encoder writes no text: give fill_masks a text with masked positions instead.")
        if architecture is Architecture.ENCODER_DECODER and start_id is None:
            raise ValueError("An encoder_decoder needs a start_id, the first token of its decoder's input.")
        if start_id is not None and not 0 <= start_id < model.config.vocab_size:
            raise ValueError(f"start_id is {start_id}, but the model's ids end at {model.config.vocab_size - 1}.")
        _check_mesh(context)
        self.caching = caching or CacheConfig()
        self.context = context
        self.start_id = start_id
        *sources, texts = (
            _least(context_length, *_known_lengths(model.config, stack)) for stack in model.config.stacks
        )
        self.context_length, self.source_length = texts, next(iter(sources), None)
        self.update(model)

    def update(self, model: LanguageModel) -> None:
        """Takes the parameters of `model`, of the same configuration; nothing is compiled again."""
        graphdef, state = nnx.split(model)
        definition = _definition(graphdef, model.config)
        self.graphdef, self.config = definition.graphdef, definition.config
        self.params = definition.prepare(nnx.to_pure_dict(state))
        self._programs = programs(self.graphdef, self.caching, self.context)

    @property
    def crosses(self) -> bool:
        """Whether prompts are an encoder's."""
        return self.config.architecture is Architecture.ENCODER_DECODER

    def text_length(self, prompt: Sequence[int]) -> int:
        """Tokens in the decoder of a text that has written nothing yet."""
        return (self.start_id is not None) + (0 if self.crosses else len(prompt))

    def prompt_columns(self, prompt: Sequence[int]) -> int:
        """Columns that a prompt takes in a packed row."""
        return len(prompt) if self.crosses else self.text_length(prompt)

    def check(self, prompt: Sequence[int], new_tokens: int = 0) -> None:
        """Refuses a prompt that cannot be continued by so many tokens.

        Raises:
          ValueError: it is empty and nothing stands before it, has ids that the model has not, or is too long.
        """
        if not len(prompt) and (self.crosses or self.start_id is None):
            raise ValueError("A prompt is empty, and nothing stands before it; it needs at least one token.")
        ids = np.asarray(prompt, np.int64)
        if len(ids) and not (0 <= ids.min() and ids.max() < self.config.vocab_size):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(f"A prompt has the id {wrong}, but the model's ids are 0 to {self.config.vocab_size - 1}.")
        if self.crosses and self.source_length is not None and len(prompt) > self.source_length:
            raise ValueError(
                f"A prompt of {len(prompt)} tokens is longer than the {self.source_length} that the model's encoder "
                f"reads; shorten it."
            )
        if self.context_length is None:
            return
        length = self.text_length(prompt)
        # The last token is drawn, and stands nowhere.
        if length + new_tokens - 1 > self.context_length:
            started = "the token that starts it, " if self.start_id is not None else ""
            raise ValueError(
                f"A text of {started}{length - bool(started)} tokens of prompt and {new_tokens} new ones is longer "
                f"than the model's context of {self.context_length} tokens; shorten the prompt or max_new_tokens."
            )

    def prefill(self, prompts: Sequence[Sequence[int]], *, slots: int | None = None) -> tuple[Caches, jax.Array]:
        """Caches of the prompts, packed into shared rows, and the logits of what follows each.

        Args:
          prompts: token ids.
          slots: how many the caches are to have, at least one a prompt; None is a power of two of them. Those beyond
            the prompts hold nothing.

        Returns:
          Caches of N slots, with room for no more than the prompts (`Caches.grown` makes more), and float32 [N, V].

        Raises:
          ValueError: see `check`.
        """
        for prompt in prompts:
            self.check(prompt)
        slots = slots or bucket(len(prompts), least=1)
        start = [] if self.start_id is None else [self.start_id]
        parts = self.context.ops.parallel.batch_parts if isinstance(self.context.ops, ShardedOps) else 1
        if self.crosses:
            sources, encoder = pack([list(prompt) for prompt in prompts], slots, self.source_length, parts)
            # Each row of the decoder belongs to the encoder's row of that number; its texts are one token each as yet.
            segments = encoder["segment_ids"][sources.rows, sources.starts] * (sources.lengths > 0)
            texts = PackedTexts(sources.rows, np.maximum(segments - 1, 0), np.minimum(sources.lengths, 1))
            shape = (len(encoder["input_tokens"]), slots)
            decoder = {
                "input_tokens": np.full(shape, self.start_id, np.int32),
                "segment_ids": np.zeros(shape, np.int32),
                "positions": np.zeros(shape, np.int32),
            }
            decoder["segment_ids"][texts.rows[: len(prompts)], texts.starts[: len(prompts)]] = segments[: len(prompts)]
            batch = _named("encoder", encoder) | _named("decoder", decoder)
        else:
            texts, decoder = pack([start + list(prompt) for prompt in prompts], slots, self.context_length, parts)
            sources, batch = None, _named("decoder", decoder)
            if self.config.architecture is Architecture.PREFIX_DECODER:
                # Every token of a prompt is visible in both directions, the one that starts it too.
                batch["decoder_causal_attention"] = (decoder["segment_ids"] > 0).astype(np.int32)
        return self._programs.prefill(self.params, batch, texts, sources)

    def extend(
        self, caches: Caches, tokens: jax.Array, *, present: jax.Array | None = None
    ) -> tuple[jax.Array, Caches]:
        """t new tokens a slot.

        Args:
          caches: with room for them (`Caches.grown`); they are used up.
          tokens: int32 [B, t]; t is at most `CacheConfig.extension` where a layer has a window.
          present: bool [B, t], False on tokens that do not count, which come last in a slot; None: all do.

        Returns:
          float32 [B, t, V], the logits of what follows each, and the caches with the tokens that count.
        """
        return self._programs.extend(self.params, caches, tokens, present)


def pack(
    texts: Sequence[Sequence[int]], slots: int, longest: int | None, parts: int = 1
) -> tuple[PackedTexts, dict[str, np.ndarray]]:
    """Texts in as few rows as may be (Prepacking, arXiv 2404.09529), their lengths and number of a few sizes.

    Args:
      texts: token ids, none empty.
      slots: N, at least as many.
      longest: no row is longer; None: no limit.
      parts: into how many the mesh splits the rows.

    Returns:
      Where they lie, [N], and the rows' features, int32 [R, T] each: input_tokens, segment_ids, positions.
    """
    sizes = np.array([len(text) for text in texts], np.int64)
    length = bucket(int(sizes.max()), longest)
    bins = pack_window(sizes[:, None], (length,))
    where = np.zeros((3, slots), np.int32)
    features = {
        name: np.zeros((_row_bucket(len(bins), parts), length), np.int32)
        for name in ("input_tokens", "segment_ids", "positions")
    }
    for row, members in enumerate(bins):
        start = 0
        for number, index in enumerate(members, start=1):
            size = int(sizes[index])
            where[:, index] = row, start, size
            place = (row, slice(start, start + size))
            features["input_tokens"][place] = texts[index]
            features["segment_ids"][place] = number
            features["positions"][place] = np.arange(size)
            start += size
    return PackedTexts(*where), features


def _named(side: str, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{side}_{name}": x for name, x in features.items()}


@dataclasses.dataclass(frozen=True)
class _Definition:
    """An unrolled model without its values.

    Attributes:
      graphdef, config: of the unrolled model.
      prepare: the given model's state, nested dicts -> the unrolled model's.
    """

    graphdef: Any
    config: LanguageModelConfig
    prepare: Callable[[Any], Any]


@functools.cache
def _definition(graphdef: Any, config: LanguageModelConfig) -> _Definition:
    """What decoding makes of a model with this definition: its layers one by one, cast once and not for every token."""
    given = nnx.eval_shape(lambda: LanguageModel(config, key=jax.random.key(0)))
    graph, state = nnx.split(unrolled(given))
    used_as = {
        path: variable.get_metadata().get("used_as") or variable.dtype for path, variable in nnx.to_flat_state(state)
    }

    def prepare(params):
        flat = nnx.to_flat_state(nnx.state(unrolled(nnx.merge(graphdef, params))))
        cast = {path: variable.get_value().astype(used_as[path]) for path, variable in flat}
        return nnx.to_pure_dict(nnx.from_flat_state(cast))

    same = not given.layouts and all(used_as[path] == v.dtype for path, v in nnx.to_flat_state(state))
    return _Definition(graph, unrolled(given).config, (lambda params: params) if same else jax.jit(prepare))


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every process of the job."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _check_mesh(context: Context) -> None:
    """Refuses meshes that split what decoding keeps whole."""
    if context.ops.splits_length:
        raise ValueError(
            "Decoding keeps the rows of a text whole, but the mesh splits them along their length; set "
            "MeshConfig.sequence to 1 (tensor and fsdp make caches smaller)."
        )
    if isinstance(context.ops, ShardedOps) and (count := context.ops.parallel.stages.count) > 1:
        raise ValueError(
            f"Decoding needs all layers on every device, but the mesh deals them to {count} pipeline stages; set "
            f"MeshConfig.stage to 1."
        )


def _known_lengths(config: LanguageModelConfig, stack: str) -> list[int | None]:
    """The longest texts that the positions of the stack of this name allow."""
    found = [config.learned_length(stack)]
    for block in config.stacks[stack].all_blocks:
        # Dynamic NTK turns all keys anew when a text grows beyond its original length; those remembered are turned.
        for rope, _ in block.rotations:
            if isinstance(rope.scaling, NtkScaling) and rope.scaling.original_length:
                found.append(rope.scaling.original_length)
    return found


def _least(*lengths: int | None) -> int | None:
    return min((length for length in lengths if length is not None), default=None)
