"""Knowledge distillation: cross-entropy against a frozen teacher's distribution, a chunk of tokens at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import LossConfig
from pallas_kernels.cross_entropy import OutputProjection

Batch = Mapping[str, jax.Array]

_CHUNK_LOGITS = 2**22
"""Logits of a chunk, of student and of teacher each."""


@dataclasses.dataclass(frozen=True, eq=False)
class Taught:
    """What a step with a teacher gives the loss in place of a model.

    Attributes:
      student: the model that is trained.
      teacher: a language model; nothing of it is.
      start_id: the id that a text begins with in the teacher's input, see `pretrained.Description.start_id`.
    """

    student: Any
    teacher: Any
    start_id: int


def refuses_teacher(student: Architecture, teacher: Architecture) -> str | None:
    """None if the one can teach the other from the student's batches, else a sentence."""
    able = {
        Architecture.CAUSAL_DECODER: (Architecture.CAUSAL_DECODER,),
        Architecture.PREFIX_DECODER: (Architecture.PREFIX_DECODER, Architecture.CAUSAL_DECODER),
        Architecture.ENCODER: (Architecture.ENCODER,),
        Architecture.ENCODER_DECODER: (
            Architecture.ENCODER_DECODER,
            Architecture.CAUSAL_DECODER,
            Architecture.PREFIX_DECODER,
        ),
    }[student]
    if teacher in able:
        return None
    return (
        f"A teacher of architecture {teacher.value} cannot read what a student of architecture {student.value} is "
        f"given; use a teacher that is one of {', '.join(architecture.value for architecture in able)}."
    )


def taught_sums(
    model: Taught, batch: Batch, targets: jax.Array, weights: jax.Array, *, context: Any, config: LossConfig
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]], Any]:
    """The sum to minimise (see `jaxlm.objectives.base.Distillation`), and what it is made of.

    The teacher's entropy is taken from its cross-entropy, which changes no gradient: the divergence of a student that
    equals its teacher is 0. Neither model's [tokens, vocabulary] logits exist whole; they are computed again in the
    backward pass.

    Args:
      model: student and teacher.
      batch: the student's.
      targets, weights: [B, T].
      context: operations and the student's dropout key; the teacher drops nothing out.
      config: z-loss, label smoothing, chunk, distillation.

    Returns:
      f32 scalar; -log p(target) [B, T], 0 where the weight is; {"cross_entropy", "accuracy", "teacher_divergence"
      (nats, at the temperature), "teacher_cross_entropy" (of the labels, at temperature 1), and, if on, "z_loss"} as
      (sum, weight) pairs; the student's side values.
    """
    hidden, side = model.student.hidden_states(batch, context=context)
    features, projection = model.student.output(hidden, context=context)
    silent = dataclasses.replace(context, dropout_key=None)
    known, _ = model.teacher.hidden_states(teacher_batch(batch, model), context=silent)
    known, teacher_projection = model.teacher.output(known[:, -targets.shape[1] :], context=silent)
    weights = weights.astype(jnp.float32)
    counts = (weights != 0.0)[..., None]
    # Whatever is in places that do not count, NaN included, must not reach a sum.
    features, known = jnp.where(counts, features, 0), jax.lax.stop_gradient(jnp.where(counts, known, 0))
    scores = _scores(
        features,
        _whole_width(projection, context),
        known,
        jax.lax.stop_gradient(_whole_width(teacher_projection, context)),
        targets,
        config,
    )
    scores = {name: jnp.where(weights != 0.0, x, 0.0) for name, x in scores.items()}
    share, temperature = config.distillation.share, config.distillation.temperature
    label = (1.0 - config.label_smoothing) * scores["nll"] + config.label_smoothing * scores["uniform"]
    loss = (1.0 - share) * label + share * temperature**2 * scores["divergence"] + config.z_loss * scores["log_z"] ** 2
    weight = weights.sum()
    metrics = {
        "cross_entropy": ((weights * scores["nll"]).sum(), weight),
        "accuracy": ((weights * scores["correct"]).sum(), weight),
        "teacher_divergence": ((weights * scores["divergence"]).sum(), weight),
        "teacher_cross_entropy": ((weights * scores["teacher_nll"]).sum(), weight),
    }
    if config.z_loss:
        metrics["z_loss"] = (config.z_loss * (weights * scores["log_z"] ** 2).sum(), weight)
    return (weights * loss).sum(), scores["nll"], metrics, side


def _whole_width(projection: OutputProjection, context: Any) -> OutputProjection:
    """The projection, gathered along the model's width once, before the loop over chunks would do it for each."""
    names = (None, "vocab") if projection.vocab_axis else ("vocab", None)
    return dataclasses.replace(projection, matrix=context.ops.constrain(projection.matrix, names))


def _scores(
    features: jax.Array,
    projection: OutputProjection,
    known: jax.Array,
    teacher: OutputProjection,
    targets: jax.Array,
    config: LossConfig,
) -> dict[str, jax.Array]:
    """Of each token [B, T], f32: "nll", "uniform" (mean -log p over the vocabulary), "log_z", "divergence", "correct",
    "teacher_nll".

    Cut along the rows, so that each chunk lies on all devices that share the batch out.
    """
    temperature = config.distillation.temperature
    rows, length = targets.shape
    most = config.token_chunk or max(_CHUNK_LOGITS // projection.vocab_size, 128)
    size = max(n for n in range(1, length + 1) if length % n == 0 and (n == 1 or n * rows <= most))

    @jax.checkpoint
    def chunk(features: jax.Array, known: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        logits, taught = projection.logits(features), teacher.logits(known)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        label = jnp.take_along_axis(logits, targets[..., None], -1, mode="fill")[..., 0]  # NaN beyond the vocabulary
        told = jnp.take_along_axis(taught, targets[..., None], -1, mode="fill")[..., 0]
        log_p = jax.nn.log_softmax(logits / temperature, axis=-1)
        log_q = jax.nn.log_softmax(taught / temperature, axis=-1)
        return {
            "nll": log_z - label,
            "uniform": log_z - logits.mean(-1),
            "log_z": log_z,
            "divergence": (jnp.exp(log_q) * (log_q - log_p)).sum(-1),
            "correct": jax.lax.stop_gradient((label >= logits.max(-1)).astype(jnp.float32)),
            "teacher_nll": jax.nn.logsumexp(taught, axis=-1) - told,
        }

    def pieces(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [T / size, B, size, ...]
        return jnp.moveaxis(x.reshape(rows, length // size, size, *x.shape[2:]), 1, 0)

    found = jax.lax.map(lambda piece: chunk(*piece), (pieces(features), pieces(known), pieces(targets)))
    return {name: jnp.moveaxis(x, 0, 1).reshape(rows, length) for name, x in found.items()}


def teacher_batch(batch: Batch, model: Taught) -> dict[str, jax.Array]:
    """The student's batch as the teacher reads it: its own first token, and one text where it has one stack."""
    batch = dict(batch)
    architecture = model.teacher.config.architecture
    if architecture is Architecture.ENCODER:
        return batch
    if "encoder_input_tokens" in batch and architecture is not Architecture.ENCODER_DECODER:
        return _as_one_text(batch, model.start_id, both_ways=architecture is Architecture.PREFIX_DECODER)
    begins = batch["decoder_positions"] == 0
    return batch | {"decoder_input_tokens": jnp.where(begins, model.start_id, batch["decoder_input_tokens"])}


def _as_one_text(batch: Batch, start_id: int, *, both_ways: bool) -> dict[str, jax.Array]:
    """An encoder-decoder's batch as a decoder's, of rows of S + T tokens: what the encoder reads, then the targets.

    The texts of packed rows lie in two runs each, the encoder's and the decoder's, so that what a token sees is said by
    `decoder_visible_keys`.

    Args:
      batch: features by seqio's names.
      start_id: what the text begins with in a decoder's input.
      both_ways: whether tokens of the encoder's text see all of it, and the column where its last token is read (a
        prefix decoder).
    """
    tokens, ids, places = (batch[f"encoder_{name}"] for name in ("input_tokens", "segment_ids", "positions"))
    own_ids, own_places = batch["decoder_segment_ids"], batch["decoder_positions"]
    same = (ids[:, None, :] == own_ids[:, :, None]) & (own_ids > 0)[:, :, None]  # [B, T, S], reduced where it arises
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)
    length = same.sum(-1, dtype=jnp.int32)
    end = jnp.where(same, index + 1, 0).max(-1)  # one past the encoder text's last token

    def run(start: jax.Array, stop: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(ids > 0, start, 0), jnp.where(ids > 0, stop, 0)

    own = jnp.arange(own_ids.shape[1], dtype=jnp.int32) + ids.shape[1]
    if both_ways:
        theirs = (ids[:, :, None] == ids[:, None, :]).sum(-1, dtype=jnp.int32)
        first = run(index - places, index - places + theirs, ids)
        # A prefix is one column longer than its inputs: their last token is read in the decoder's first column.
        reads_it = same & (own_places == 0)[:, :, None]
        after = jnp.where(reads_it, own[:, None] + 1, 0).max(1)  # [B, S]: one past that column, 0 where there is none
        second = jnp.maximum(after - 1, 0), after
    else:
        first = run(index - places, index + 1, ids)
        second = jnp.zeros_like(ids), jnp.zeros_like(ids)
    inputs, written = run(end - length, end, own_ids), run(own - own_places, own + 1, own_ids)
    # (start or end) x (run) x [B, S + T]
    visible = [
        [jnp.concatenate([first[bound], inputs[bound]], 1), jnp.concatenate([second[bound], written[bound]], 1)]
        for bound in (0, 1)
    ]
    # The first target is predicted from the last input.
    last = jnp.take_along_axis(tokens, jnp.maximum(end - 1, 0), axis=1)
    begins = jnp.where(length > 0, last, start_id)
    read = jnp.where(places == 0, start_id, jnp.roll(tokens, 1, axis=1))
    return {
        "decoder_input_tokens": jnp.concatenate(
            [read, jnp.where(own_places == 0, begins, batch["decoder_input_tokens"])], axis=1
        ),
        "decoder_segment_ids": jnp.concatenate([ids, own_ids], axis=1),
        "decoder_positions": jnp.concatenate([places, own_places + length], axis=1),
        "decoder_visible_keys": jnp.stack([jnp.stack(runs, axis=1) for runs in visible], axis=1),  # [B, 2, 2, S + T]
    }
