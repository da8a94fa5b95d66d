"""Replaced-token detection: a small generator fills masked positions, the model tells which tokens are not original."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, override

import numpy as np

from jaxlm.objectives.base import Example, LossConfig, VocabularyInfo
from jaxlm.objectives.masked_lm import MaskedLM

if TYPE_CHECKING:
    import jax


class Generator(enum.Enum):
    """Where replacements come from.

    MODEL: a masked LM trained beside the detector (`model.generator`).
    UNIFORM: ids of text drawn uniformly, on the host; the model has no generator (ELECTRA's ablation; RTS of
      arXiv 2309.08272 but for its labels, which call a draw equal to the original replaced).
    """

    MODEL = "model"
    UNIFORM = "uniform"


class Draws(enum.Enum):
    """How the generator's draws change.

    FRESH: with every step (by the step's key); in evaluation, which has no key, by the batch's contents.
    FROZEN: never for the same batch and the same generator: the noise is a function of the batch's contents. For
      tests that overfit one batch.
    """

    FRESH = "fresh"
    FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class ReplacedTokenDetection(MaskedLM):
    """ELECTRA (Clark et al. 2020, arXiv 2003.10555, section 2): loss = MLM(generator) + 50 * BCE(discriminator).

    The generator sees the masked text and predicts the masked tokens; tokens drawn from its softmax at temperature
    1 take their places, and the discriminator labels every token that is not padding. No gradient flows through
    the draws. A drawn token that equals the original counts as original. How the two share embeddings (untied,
    tied, or disentangled as in DeBERTaV3, arXiv 2111.09543) is the model's matter.

    The model gives `generator.hidden_states(batch, context=)`, `generator.output(hidden, context=)` and
    `discriminator_logits(batch, context=)`: [B, S] and side values; `generator` is None for `Generator.UNIFORM`.

    Of the positions to predict the released code shows 85% to the generator as the mask id and leaves the rest; so
    do the defaults here (the paper says that all are masked). `mask_rate` is 0.15, for its large model 0.25.

    Attributes:
      generator: a model's draws or uniform ones.
      discriminator_weight: the paper's lambda.
      temperature: of the generator's softmax when drawing.
      disallow_correct: never draw the original.
      draws: whether they change from step to step.

    Example, with uniform draws, which happen here:
      >>> vocabulary = VocabularyInfo(size=20)
      >>> text = np.arange(10, 16, dtype=np.int32)
      >>> objective = ReplacedTokenDetection(mask_rate=0.34, generator=Generator.UNIFORM)
      >>> example = objective.corrupt({"targets": text}, vocabulary, np.random.default_rng(0))
      >>> example.inputs.tolist(), example.targets.tolist()
      ([10, 11, 2, 5, 14, 15], [10, 11, 12, 13, 14, 15])
    """

    name: ClassVar[str] = "replaced_token_detection"

    mask_share: float = 0.85
    random_share: float = 0.0
    generator: Generator = Generator.MODEL
    discriminator_weight: float = 50.0
    temperature: float = 1.0
    disallow_correct: bool = False
    draws: Draws = Draws.FRESH

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"ReplacedTokenDetection.temperature must be positive, got {self.temperature}.")

    @override
    def corrupt(
        self, example: Mapping[str, np.ndarray], vocabulary: VocabularyInfo, rng: np.random.Generator, *, step: int = 0
    ) -> Example:
        if self.generator is Generator.MODEL:
            return super().corrupt(example, vocabulary, rng, step=step)
        text, ordinary = example["targets"], vocabulary.ordinary_ids
        masked = self.draw_mask(text, vocabulary, rng, step)
        inputs = text.copy()
        if self.disallow_correct:  # a step of 1..n-1 along the circle of ids never comes back
            steps = rng.integers(1, len(ordinary), masked.sum())
            inputs[masked] = ordinary[(np.searchsorted(ordinary, text[masked]) + steps) % len(ordinary)]
        else:
            inputs[masked] = ordinary[rng.integers(0, len(ordinary), masked.sum())]
        return Example(inputs, text, masked.astype(np.float32), segments=example.get("segments"))

    @override
    def refuses_model(self, model: Any) -> str | None:
        if not hasattr(model, "discriminator"):
            return f"{self.name} wants a generator and a discriminator; give it a ReplacedTokenDetectorConfig."
        return self._other_generator(model.generator)

    def _other_generator(self, generator: Any) -> str | None:
        if (generator is None) == (self.generator is Generator.UNIFORM):
            return None
        return (
            f"{self.name} has generator {self.generator.name} but the model has "
            f"{'no generator' if generator is None else 'one'}; make the two agree."
        )

    @property
    @override
    def coefficients(self) -> Mapping[str, float]:
        detection = {"discriminator": self.discriminator_weight}
        return detection if self.generator is Generator.UNIFORM else {"cross_entropy": 1.0} | detection

    @override
    def loss_weights(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        from jaxlm.objectives import losses

        weights = losses.token_weights(batch) | {"discriminator": _present(batch).sum()}
        return {term: weights[term] for term in self.coefficients}

    @override
    def loss_sums(
        self, model: Any, batch: Mapping[str, jax.Array], *, context: Any, config: LossConfig
    ) -> tuple[dict[str, jax.Array], dict[str, tuple[jax.Array, jax.Array]], Any]:
        import jax
        import jax.numpy as jnp

        from jaxlm.objectives import losses

        if reason := self._other_generator(model.generator):
            raise ValueError(reason)
        originals, weights = losses.targets_of(batch)
        sums, metrics = {}, {}
        if self.generator is Generator.UNIFORM:
            shown = batch["encoder_input_tokens"]
        else:
            hidden, generator_side = model.generator.hidden_states(batch, context=context.fold(0))
            sums["cross_entropy"], nll, metrics = losses.token_sums(
                model.generator, hidden, originals, weights, context=context.fold(0), config=config
            )
            metrics |= losses.grouped_sums("cross_entropy", nll, weights, batch, config)
            shown = jnp.where(weights > 0, self._draw(model.generator, hidden, batch, context, config), originals)

        replaced = (shown != originals).astype(jnp.float32)
        logits, side = model.discriminator_logits({**batch, "encoder_input_tokens": shown}, context=context.fold(1))
        logits = logits.astype(jnp.float32)
        present = _present(batch)
        surprise = jax.nn.softplus(logits) - replaced * logits  # binary cross-entropy, nats
        sums["discriminator"] = (present * surprise).sum()
        metrics["discriminator"] = (sums["discriminator"], present.sum())
        metrics["detection_accuracy"] = ((present * ((logits > 0) == (replaced > 0))).sum(), present.sum())
        metrics["replaced"] = ((present * replaced).sum(), present.sum())
        metrics |= losses.grouped_sums("discriminator", surprise, present, batch, config)
        return sums, metrics, side if self.generator is Generator.UNIFORM else generator_side + side

    def shown_tokens(
        self, model: Any, batch: Mapping[str, jax.Array], *, context: Any, config: LossConfig
    ) -> jax.Array:
        """What `loss_sums` of the same arguments shows to the discriminator, int32 [B, S]."""
        import jax.numpy as jnp

        from jaxlm.objectives import losses

        if self.generator is Generator.UNIFORM:
            return batch["encoder_input_tokens"]
        hidden, _ = model.generator.hidden_states(batch, context=context.fold(0))
        originals, weights = losses.targets_of(batch)
        return jnp.where(weights > 0, self._draw(model.generator, hidden, batch, context, config), originals)

    def _draw(self, generator, hidden, batch, context, config):
        """A token drawn at each position, int32 [B, S]; the logits of a chunk of positions exist at a time."""
        import jax
        import jax.numpy as jnp

        from jaxlm.objectives import losses
        from pallas_kernels.cross_entropy import chunk_tokens

        originals, _ = losses.targets_of(batch)
        if self.draws is Draws.FROZEN or context.dropout_key is None:
            key = jax.random.fold_in(jax.random.key(0), _digest(batch["encoder_input_tokens"]))
        else:
            key = context.fold(2).dropout_key

        hidden = context.ops.restore(jax.lax.stop_gradient(hidden))  # draws are numbered in the rows' own order
        features, projection = generator.output(hidden, context=context.fold(0))
        batch_size, length = originals.shape
        tokens = config.token_chunk or chunk_tokens(originals.size, projection.vocab_size)
        width = min(max(tokens // batch_size, 1), length)  # positions of each row in a chunk
        chunks = -(-length // width)

        def cut(x):  # [B, S, ...] -> [chunks, B, width, ...]; a chunk is spread over the devices as the batch is
            x = jnp.pad(x, [(0, 0), (0, chunks * width - length)] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(batch_size, chunks, width, *x.shape[2:]).swapaxes(0, 1)

        def draw(chunk):
            index, features, originals = chunk
            scores = projection.logits(features) / self.temperature
            if self.disallow_correct:
                vocabulary = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
                scores = jnp.where(vocabulary == originals[..., None], -jnp.inf, scores)
            # Categorical draws are the argmax of scores + Gumbel noise; each chunk has a key of its own.
            return jax.random.categorical(jax.random.fold_in(key, index * width), scores)

        drawn = jax.lax.map(draw, (jnp.arange(chunks), cut(features), cut(originals)))
        return drawn.swapaxes(0, 1).reshape(batch_size, -1)[:, :length]


def _present(batch: Mapping[str, jax.Array]) -> jax.Array:
    """f32 [B, S]: 1 where there is a token, 0 on padding."""
    return (batch["encoder_segment_ids"] > 0).astype("float32")


def _digest(tokens: jax.Array) -> jax.Array:
    """uint32: a hash of the batch's tokens and their places."""
    import jax
    import jax.numpy as jnp

    places = jax.lax.iota(jnp.uint32, tokens.size).reshape(tokens.shape)
    mixed = (tokens.astype(jnp.uint32) + 1) * (places * jnp.uint32(2654435761) | 1)
    return (mixed ^ (mixed >> 15)).sum(dtype=jnp.uint32)
