"""Cross-entropy over the tokens of a batch, and its accounting, as a whole and by data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.distillation import taught_sums

Terms = dict[str, jax.Array]
# A metric is a weighted sum and its weight; both are scalars, or vectors over data sets or objectives.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


def targets_of(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Targets and their weights, [B, T], from a decoder's batch or an encoder's."""
    stack = "decoder" if "decoder_target_tokens" in batch else "encoder"
    return batch[f"{stack}_target_tokens"], batch[f"{stack}_loss_weights"]


def token_weights(batch: Mapping[str, jax.Array]) -> Terms:
    """{"cross_entropy": sum of the loss weights}, f32."""
    return {"cross_entropy": targets_of(batch)[1].sum(dtype=jnp.float32)}


def cross_entropy_sums(
    model: Any, batch: Mapping[str, jax.Array], *, context: Any, config: LossConfig, num_objectives: int = 1
) -> tuple[Terms, Metrics, Any]:
    """Cross-entropy of `model` on a batch: the loss of every objective that has only this term.

    Args:
      model: has `hidden_states(batch, context=)`: [B, T, E] and side values, and `output` as for `token_sums`. With
        `config.distillation` a `Taught` of two of these.
      batch: features by seqio's names, see docs/architecture.md.
      context: handed to the model.
      config: z-loss, label smoothing, chunks, number of data sets.
      num_objectives: also sum the loss by `objective_ids`, for this many; 1 does not.

    Returns:
      {"cross_entropy": weighted sum of smoothed cross-entropy + z-loss}, the metrics of `token_sums`, the side
      values.
    """
    targets, weights = targets_of(batch)
    if config.distillation is not None:
        total, nll, metrics, side = taught_sums(model, batch, targets, weights, context=context, config=config)
    else:
        hidden, side = model.hidden_states(batch, context=context)
        total, nll, metrics = token_sums(model, hidden, targets, weights, context=context, config=config)
    metrics |= grouped_sums("cross_entropy", nll, weights, batch, config, num_objectives)
    return {"cross_entropy": total}, metrics, side


def token_sums(
    model: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array, *, context: Any, config: LossConfig
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The sum to minimise (see `pallas_kernels.cross_entropy.cross_entropy`), and what it is made of.

    Args:
      model: has `output(hidden, context=)`: features [B, T, F] and an `OutputProjection`.
      hidden: [B, T, E].
      targets, weights: [B, T].
      context: operations.
      config: z-loss, label smoothing, chunks.

    Returns:
      f32 scalar; -log p(target) in nats [B, T], 0 where the weight is; and {"cross_entropy": nats without smoothing and
      z-loss, "accuracy", and, if on, "z_loss"} as (sum, weight) pairs.
    """
    features, projection = model.output(hidden, context=context)
    weights = weights.astype(jnp.float32)
    total, scores = context.ops.cross_entropy(
        features,
        projection,
        targets,
        weights,
        z_loss=config.z_loss,
        label_smoothing=config.label_smoothing,
        recompute=config.recompute_logits,
        chunk=None if config.recompute_logits else config.token_chunk or None,
    )
    nll, weight = -scores.log_probability, weights.sum()
    metrics = {
        "cross_entropy": ((weights * nll).sum(), weight),
        "accuracy": ((weights * scores.correct).sum(), weight),
    }
    if config.z_loss:
        metrics["z_loss"] = (config.z_loss * (weights * scores.log_z**2).sum(), weight)
    return total, nll, metrics


def grouped_sums(
    name: str,
    values: jax.Array,
    weights: jax.Array,
    batch: Mapping[str, jax.Array],
    config: LossConfig,
    num_objectives: int = 1,
) -> Metrics:
    """Sums of `values` [B, T] by data set and by objective, where there are more than one of them.

    Returns:
      {"<name>_by_dataset": (sum [n], weight [n]), "<name>_by_objective": ...}, indexed as `loader.dataset_names` and
      `objective.parts`.
    """
    metrics = {}
    for group, count in (("dataset", config.num_datasets), ("objective", num_objectives)):
        if count > 1:
            ids, weights = batch[f"{group}_ids"].ravel(), weights.astype(jnp.float32)
            metrics[f"{name}_by_{group}"] = (
                jax.ops.segment_sum((weights * values).ravel(), ids, count),
                jax.ops.segment_sum(weights.ravel(), ids, count),
            )
    return metrics
