"""Multi-token prediction: predict several future tokens at each position."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, override

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.full_lm import FullLM

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class MultiTokenPrediction(FullLM):
    """Full LM with n heads over one trunk (Gloeckle et al. 2024, arXiv 2404.19737, section 2, equation 2).

    Head k (1..n) predicts the token k places on. The loss is the sum of the heads' mean losses, each with its
    weight; the paper's are all 1. A head has no target where the token it would predict lies in another segment
    or beyond the row. The model gives `future_hidden_states(batch, context=)`, n arrays [B, T, E] and side values, and
    one `output`.

    Attributes:
      num_future: n; the paper's best for code is 4, for bytes 8.
      weights: of the heads' losses, n numbers; None weighs all 1. The first is next-token prediction.

    Example (targets 5 6 7 8 of one segment, n = 3):

      position          0  1  2  3
      cross_entropy     5  6  7  8
      future_2          6  7  8  .
      future_3          7  8  .  .
    """

    name: ClassVar[str] = "multi_token"

    num_future: int = 4
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.num_future < 1:
            raise ValueError(f"MultiTokenPrediction.num_future must be at least 1, got {self.num_future}.")
        if self.weights is not None and len(self.weights) != self.num_future:
            raise ValueError(
                f"MultiTokenPrediction.weights must have one weight for each of {self.num_future} heads, got "
                f"{self.weights}."
            )

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the heads' loss terms: "cross_entropy" for the next token, then "future_2", ..."""
        return ("cross_entropy", *(f"future_{k}" for k in range(2, self.num_future + 1)))

    @property
    @override
    def coefficients(self) -> Mapping[str, float]:
        return dict(zip(self.terms, self.weights or (1.0,) * self.num_future))

    @override
    def loss_weights(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {term: ahead(batch, k)[1].sum() for k, term in enumerate(self.terms)}

    @override
    def loss_sums(
        self, model: Any, batch: Mapping[str, jax.Array], *, context: Any, config: LossConfig
    ) -> tuple[dict[str, jax.Array], dict[str, tuple[jax.Array, jax.Array]], Any]:
        from jaxlm.objectives import losses

        hidden, side = model.future_hidden_states(batch, context=context)
        if len(hidden) != self.num_future:
            raise ValueError(self._other_heads(len(hidden)))
        sums, metrics = {}, {}
        for k, (term, states) in enumerate(zip(self.terms, hidden)):
            targets, weights = ahead(batch, k)
            sums[term], nll, head_metrics = losses.token_sums(
                model, states, targets, weights, context=context, config=config
            )
            if k == 0:
                metrics |= head_metrics
                metrics |= losses.grouped_sums(term, nll, weights, batch, config)
            else:
                metrics[term] = head_metrics["cross_entropy"]
        return sums, metrics, side

    @override
    def refuses(self, architecture: Architecture) -> str | None:
        if architecture is Architecture.PREFIX_DECODER:
            return (
                f"{self.name} predicts tokens that a prefix_decoder sees inside a prefix; use causal_decoder, which a "
                "prefix decoder without a prefix equals."
            )
        return super().refuses(architecture)

    @override
    def refuses_model(self, model: Any) -> str | None:
        if reason := super().refuses_model(model):
            return reason
        return None if model.future_tokens == self.num_future else self._other_heads(model.future_tokens)

    def _other_heads(self, heads: int) -> str:
        return (
            f"{self.name} predicts {self.num_future} tokens but the model has {heads} heads; make num_future and "
            f"LanguageModelConfig.future_tokens (with its future_block) equal."
        )


def ahead(batch: Mapping[str, jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
    """The targets k places further on and their weights, [B, T]; weight 0 where they are in another segment."""
    import jax.numpy as jnp

    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"].astype(jnp.float32)
    if k == 0:
        return targets, weights
    segments = batch["decoder_segment_ids"]

    def shift(x):
        return jnp.pad(x[:, k:], ((0, 0), (0, k)))

    # Segment 0 is padding, whose weights are 0.
    return shift(targets), shift(weights) * (shift(segments) == segments)
