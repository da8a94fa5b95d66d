"""LanguageModel: causal decoder, prefix decoder, encoder and encoder-decoder from one configuration."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.layers.block import BlockModule
from jaxlm.layers.cache import CacheConfig, Caches, PackedTexts
from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.embeddings import Embedding
from jaxlm.layers.parameters import ParameterMaker, PathKey
from jaxlm.layers.positions import LearnedPositions
from jaxlm.layers.side_values import SideValues
from jaxlm.layers.stack import Layers, Stack, remat
from jaxlm.layers.stacking import StackLayout, unstack
from jaxlm.models.config import LanguageModelConfig
from jaxlm.models.heads import Pooler, VocabularyHead
from jaxlm.parallel.stages import ONE_STAGE, Stages
from pallas_kernels.cross_entropy import OutputProjection
from pallas_kernels.masks import Causal, Intervals, Mask, PrefixLM, Segments

Batch = Mapping[str, jax.Array]


class LanguageModel(nnx.Module):
    """Embedding, one or two stacks, and a head over the vocabulary.

    Parameters lie under `embedding`, `encoder_embedding`, `encoder`, `decoder`, `vocabulary_head`, `future`, `pooler`.
    """

    def __init__(self, config: LanguageModelConfig, *, key: jax.Array, stages: Stages = ONE_STAGE):
        """Makes all parameters.

        Args:
          config: the model.
          key: jax key. Each parameter is a function of it and of its path.
          stages: pipeline stages that the layers of each stack are dealt to, `Parallelism.stages`. They say where
            layers are stored, and change no number.
        """
        dtype, root = config.compute.dtype, PathKey(key)
        make = ParameterMaker(config.init, config.scaling, config.width)
        self.embedding = Embedding(config.embedding, make, config.vocab_size, dtype=dtype, key=root.at("embedding"))
        makes = {
            "encoder": dataclasses.replace(make, width=config.width_of("encoder")),
            "decoder": dataclasses.replace(make, encoder_width=config.width_of("encoder")),
        }
        self.encoder_embedding = (
            Embedding(
                config.encoder_embedding,
                makes["encoder"],
                config.vocab_size,
                dtype=dtype,
                key=root.at("encoder_embedding"),
            )
            if config.encoder_embedding
            else None
        )
        stacks = {
            name: Stack(stack, makes[name], dtype=dtype, key=root.at(name), stages=stages)
            for name, stack in config.stacks.items()
        }
        self.encoder, self.decoder = stacks.get("encoder"), stacks.get("decoder")
        self.vocabulary_head = (
            VocabularyHead(
                config.head,
                make,
                config.vocab_size,
                config.embedding.width or config.width,
                dtype=dtype,
                key=root.at("vocabulary_head"),
            )
            if config.head
            else None
        )
        future = {}
        if config.future_tokens:
            depth = 1 + max(stack.depth for stack in config.stacks.values())
            branches = config.future_block.branches + max(stack.branches for stack in config.stacks.values())
            in_depth = dataclasses.replace(make, depth=depth, branches=branches)
            future = {
                str(i): config.future_block.build(in_depth, dtype=dtype, key=root.at("future").at(i))
                for i in range(config.future_tokens)
            }
        self.future = nnx.Dict(future) if future else None
        self.pooler = Pooler(make, dtype=dtype, key=root.at("pooler")) if config.pooler else None
        self.config = config

    @property
    def layouts(self) -> tuple[StackLayout, ...]:
        """The scanned stacks among the parameters."""
        stacks = {"encoder": self.encoder, "decoder": self.decoder}
        return tuple(layout for name, s in stacks.items() if s is not None for layout in s.layouts((name,)))

    def hidden_states(
        self, batch: Batch, *, context: Context = LOCAL, added_embeddings: jax.Array | None = None
    ) -> tuple[jax.Array, SideValues]:
        """Hidden states at the positions where the loss is, and what the layers give beside them.

        Args:
          batch: features by seqio's names, docs/architecture.md.
          context: operations and dropout key.
          added_embeddings: [B, T, embedding width], added to the embeddings of a single stack's tokens; in the mesh's
            order.

        Returns:
          [B, T, E] for decoders, [B, S, E] for encoders, after the final norm. With multi-token prediction, those
          that predict the next token. Tokens are in the mesh's order, see `jaxlm.layers.context.Ops`. And the side
          values of all layers that ran, added up.
        """
        if self.future is not None:
            (hidden,), side = self._future(batch, context, 1)
            return hidden, side
        return self._run(batch, context, added_embeddings, normalize=True)

    def future_hidden_states(
        self, batch: Batch, *, context: Context = LOCAL
    ) -> tuple[tuple[jax.Array, ...], SideValues]:
        """Hidden states that predict the next token, the one after it, and so on: `future_tokens` times [B, T, E].

        And the layers' side values, as for `hidden_states`.
        """
        if self.future is None:
            raise ValueError(
                "This model predicts one token ahead; set LanguageModelConfig.future_tokens and future_block."
            )
        return self._future(batch, context, len(self.future))

    def prefill(
        self,
        batch: Batch,
        texts: PackedTexts,
        sources: PackedTexts | None = None,
        *,
        caching: CacheConfig,
        context: Context = LOCAL,
    ) -> tuple[jax.Array, Caches]:
        """Hidden states of packed prompts, as `hidden_states`, and what the layers remember of them.

        Args:
          batch: features by seqio's names; rows of prompts.
          texts: where the N prompts lie in the decoder's rows.
          sources: where their N texts lie in the encoder's rows, for an encoder-decoder.
          caching: what is kept.
          context: operations.

        Returns:
          [R, T, E], and the caches of N slots with room for T tokens each.

        Raises:
          ValueError: the layers are scanned (see `unrolled`), or the model is an encoder.
        """
        architecture = self.config.architecture
        if architecture is Architecture.ENCODER:
            raise ValueError("An encoder continues no text; decoding needs a decoder or an encoder_decoder.")
        inner = self._in_stack(context, "stack")
        x, mask = self._embed(batch, "decoder", context, None), self_mask(batch, architecture)
        options = {"texts": texts, "caching": caching, "context": inner, **_tokens(batch, "decoder", context)}
        if architecture is not Architecture.ENCODER_DECODER:
            stack = self.encoder if self.decoder is None else self.decoder
            return stack.prefill(x, mask, more_blocks=self._next_token_block(context), **options)
        encoded, _ = self.encoder(
            self._embed(batch, "encoder", context, None),
            self_mask(batch, Architecture.ENCODER),
            **_tokens(batch, "encoder", context),
            context=self._in_stack(context, "encoder_stack"),
        )
        cross_mask = Segments(batch["decoder_segment_ids"], batch["encoder_segment_ids"])
        return self.decoder.prefill(x, mask, encoded=encoded, cross_mask=cross_mask, sources=sources, **options)

    def extend(
        self, tokens: jax.Array, caches: Caches, *, present: jax.Array | None = None, context: Context = LOCAL
    ) -> tuple[jax.Array, Caches]:
        """Hidden states of t new tokens of each slot, each of which sees its slot's text and the new ones before it.

        Args:
          tokens: int32 [B, t]. Those that count must not stand beyond learned positions.
          caches: what the slots hold, from `prefill`.
          present: bool [B, t], False on tokens that do not count, which come last in a slot; None: all do.
          context: operations.

        Returns:
          [B, t, E], and the caches, longer by the tokens that count.
        """
        positions = caches.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if isinstance(learned := self.config.embedding.positions, LearnedPositions):
            # What stands beyond the last one never counts: tokens of texts that have ended, drafts behind a text's end.
            # As NaN it would stay in the caches, where 0 times NaN spoils who reads past it.
            positions = jnp.minimum(positions, learned.max_length - 1)
        x = self.embedding(tokens, positions, context=context.fold("decoder_embedding"))
        stack = self.encoder if self.decoder is None else self.decoder
        inner = self._in_stack(context, "stack")
        return stack.extend(x, caches, context=inner, present=present, more_blocks=self._next_token_block(context))

    def _next_token_block(self, context: Context) -> tuple[tuple[BlockModule, Context], ...]:
        """With multi-token prediction, the block that predicts the next token; it follows the stack's own."""
        if self.future is None:
            return ()
        return ((self.future["0"], self._in_stack(context, "future").fold(0)),)

    def head(self, hidden: jax.Array, *, context: Context = LOCAL) -> jax.Array:
        """Logits: [..., E] -> float32 [..., V]."""
        features, projection = self.output(hidden, context=context)
        return projection.logits(features)

    def output(self, hidden: jax.Array, *, context: Context = LOCAL) -> tuple[jax.Array, OutputProjection]:
        """The head in two steps, for losses that never hold all logits.

        Args:
          hidden: [..., E].
          context: operations.

        Returns:
          Features [..., F] and the projection that takes them to the vocabulary: `head` is the second's logits of the
          first. The features are the hidden states unless the head has a transform.
        """
        if self.vocabulary_head is None:
            raise ValueError("This model has no logits over a vocabulary; set LanguageModelConfig.head.")
        return self.vocabulary_head(hidden, self.embedding.tokens[...], context)

    def pooled(self, hidden: jax.Array, *, context: Context = LOCAL) -> jax.Array:
        """BERT's summary of each row, from its first token: [B, S, E] -> [B, E]."""
        if self.pooler is None:
            raise ValueError("This model has no pooler; set LanguageModelConfig.pooler.")
        return self.pooler(hidden, context)

    def _run(
        self, batch: Batch, context: Context, added: jax.Array | None, *, normalize: bool
    ) -> tuple[jax.Array, SideValues]:
        architecture = self.config.architecture
        if architecture is not Architecture.ENCODER_DECODER:
            side = "decoder" if architecture.has_decoder_features else "encoder"
            stack = self.encoder if self.decoder is None else self.decoder
            x = self._embed(batch, side, context, added)
            return stack(
                x,
                self_mask(batch, architecture),
                **_tokens(batch, side, context),
                context=self._in_stack(context, "stack"),
                # Texts then share a beginning, or lie in two runs: columns do not say where tokens stand in them.
                by_positions="decoder_visible_keys" in batch,
                normalize=normalize,
            )
        encoded, encoder_side = self.encoder(
            self._embed(batch, "encoder", context, None),
            self_mask(batch, Architecture.ENCODER),
            **_tokens(batch, "encoder", context),
            context=self._in_stack(context, "encoder_stack"),
        )
        hidden, decoder_side = self.decoder(
            self._embed(batch, "decoder", context, None),
            self_mask(batch, architecture),
            **_tokens(batch, "decoder", context),
            context=self._in_stack(context, "stack"),
            encoded=encoded,
            cross_mask=cross_mask(batch),
            normalize=normalize,
        )
        return hidden, encoder_side + decoder_side

    def _future(self, batch: Batch, context: Context, count: int) -> tuple[tuple[jax.Array, ...], SideValues]:
        trunk, total = self._run(batch, context, None, normalize=False)
        # The blocks stand beside each other on the trunk and see what its own blocks see.
        stack = self.encoder if self.decoder is None else self.decoder
        mask = self_mask(batch, self.config.architecture)
        around = stack.surroundings(
            mask,
            **_tokens(batch, "decoder", context),
            by_positions="decoder_visible_keys" in batch,
            more_blocks=(self.config.future_block,),
        )
        run = remat(stack.config.remat, scanned=False)
        inner = self._in_stack(context, "future")
        hidden = []
        for i in range(count):
            x, side = run(self.future[str(i)], trunk, around, inner.fold(i))
            hidden.append(stack.finish(x, inner.fold(i)))
            total += side
        return tuple(hidden), total

    def _in_stack(self, context: Context, name: str) -> Context:
        return dataclasses.replace(context.fold(name), quantization=self.config.compute.quantization)

    def _embed(self, batch: Batch, side: str, context: Context, added: jax.Array | None) -> jax.Array:
        arrange, types = context.ops.arrange, batch.get(f"{side}_type_ids")
        own = self.encoder_embedding if side == "encoder" else None
        return (own or self.embedding)(
            arrange(batch[f"{side}_input_tokens"]),
            arrange(batch[f"{side}_positions"]),
            types=None if types is None else arrange(types),
            added=added,
            context=context.fold(f"{side}_embedding"),
        )


def unrolled(model: LanguageModel) -> LanguageModel:
    """The same model with its layers one by one, as decoding needs them; the same object if they already are.

    Parameters of scanned stacks are copied. Inside jit the copies are the program's.
    """
    if not model.layouts:
        return model
    stacks = {name: dataclasses.replace(s, layers=Layers.UNROLL) for name, s in model.config.stacks.items()}
    config = dataclasses.replace(model.config, **stacks)
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, key=jax.random.key(0))))
    return nnx.merge(graph, unstack(nnx.to_pure_dict(nnx.state(model)), model.layouts))


def _tokens(batch: Batch, side: str, context: Context) -> dict[str, jax.Array]:
    """What a stack knows of its tokens, [B, T] each in the mesh's order: positions, and which are not padding."""
    arrange = context.ops.arrange
    return {
        "positions": arrange(batch[f"{side}_positions"]),
        "present": arrange(batch[f"{side}_segment_ids"] > 0),
    }


def self_mask(batch: Batch, architecture: Architecture) -> Mask:
    """The self-attention mask of a packed batch; for an encoder-decoder, its decoder's."""
    if architecture is Architecture.ENCODER:
        return Segments(batch["encoder_segment_ids"])
    if "decoder_visible_keys" in batch:
        return Intervals(*batch["decoder_visible_keys"].swapaxes(0, 1))
    ids = batch["decoder_segment_ids"]
    if architecture is Architecture.PREFIX_DECODER:
        return PrefixLM(prefix_ends(batch["decoder_causal_attention"], ids)) & Segments(ids)
    return Causal() & Segments(ids)


def cross_mask(batch: Batch) -> Mask:
    """Which encoder positions a decoder position sees: its own segment's, unless the batch names another."""
    ids = batch.get("decoder_encoder_segment_ids", batch["decoder_segment_ids"])
    return Segments(ids, batch["encoder_segment_ids"])


def prefix_ends(marked: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Where each token's prefix ends, as `PrefixLM` wants it.

    Args:
      marked: int [B, T], seqio's `decoder_causal_attention`: 1 on the first positions of each segment, those that see
        each other in both directions.
      segment_ids: int32 [B, T].

    Returns:
      int32 [B, T]: for a marked token, one past the last marked position of its segment; 0 for others, which see
      what came before them anyway.
    """
    length = marked.shape[-1]
    index = jnp.arange(length, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(marked[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    stops = jnp.where((marked == 0) | starts, index, length)  # the positions at which a run of marks before them ends
    following = jnp.concatenate([stops[:, 1:], jnp.full_like(stops[:, :1], length)], axis=1)
    return jnp.where(marked > 0, jax.lax.cummin(following, axis=1, reverse=True), 0)
