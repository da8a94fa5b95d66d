"""Cross-entropy of hidden states against an output matrix, without the [tokens, vocabulary] logits.

Two ways. Gradients in the forward pass, while the logits of a chunk of tokens are at hand: three matrix products, as
for logits that are kept, but a sum only (`cross_entropy`). Or logits computed again in the backward pass, a chunk of
the vocabulary at a time: a fourth product, the least memory, and gradients token by token (`token_scores`, and
`cross_entropy` on demand).

On several devices both run inside `shard_map`, each device on its own tokens. The vocabulary may be split
too (Megatron's vocabulary-parallel loss, arXiv 1909.08053, section 3): a device has the logits of its own ids, and what
travels is four numbers a token.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.choice import Candidate, Choice

# Logits of a chunk of `cross_entropy`: on a CPU sizes from 2^20 to 2^25 take much the same time.
_CHUNK_LOGITS = 2**23
# Fewer tokens, and an accelerator waits for its memory: each chunk adds to the float32 gradient of the whole matrix,
# and reads the matrix twice, some 16 bytes an entry for 6 operations a token.
_FEWEST_TOKENS = {"cpu": 512, "gpu": 1024, "tpu": 2048}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("matrix", "bias"),
    meta_fields=("vocab_axis", "scale", "soft_cap"),
)
@dataclasses.dataclass(frozen=True)
class OutputProjection:
    """How hidden states become logits: soft cap of (scale * hidden . matrix + bias).

    Attributes:
      matrix: [E, V], or [V, E] with vocab_axis 0 (a token embedding). Products are taken in the hidden states' type,
        with float32 sums; the gradient has the matrix's own type.
      bias: [V], or None.
      vocab_axis: the axis of `matrix` that is the vocabulary.
      scale: multiplies the hidden states (1 / width ratio in muP, 1 / sqrt(E) in T5).
      soft_cap: logits become soft_cap * tanh(logit / soft_cap) (Gemma 2, arXiv 2408.00118, section 2), or None.
    """

    matrix: jax.Array
    bias: jax.Array | None = None
    vocab_axis: int = 1
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.matrix.shape[self.vocab_axis]

    @property
    def width(self) -> int:
        """E."""
        return self.matrix.shape[1 - self.vocab_axis]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] from [..., E]."""
        if self.scale != 1.0:
            hidden = hidden * jnp.asarray(self.scale, hidden.dtype)
        contracted = ((hidden.ndim - 1,), (1 - self.vocab_axis,))
        logits = jax.lax.dot_general(
            hidden, self.matrix.astype(hidden.dtype), (contracted, ((), ())), preferred_element_type=jnp.float32
        )
        if self.bias is not None:
            logits += self.bias.astype(jnp.float32)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def part(self, start: jax.Array | int, size: int) -> "OutputProjection":
        """The projection onto `size` ids from `start` on."""
        matrix = jax.lax.dynamic_slice_in_dim(self.matrix, start, size, self.vocab_axis)
        bias = None if self.bias is None else jax.lax.dynamic_slice_in_dim(self.bias, start, size)
        return dataclasses.replace(self, matrix=matrix, bias=bias)


class TokenScores(NamedTuple):
    """What the logits say of each label; f32, of the labels' shape, each.

    Attributes:
      log_probability: log p(label), nats.
      log_z: logarithm of the softmax's normaliser.
      mean_logit: mean of the logits over the vocabulary; zeros where it was not asked for.
      correct: 1 where no logit exceeds the label's (ties count as right), else 0. Has no gradient.
    """

    log_probability: jax.Array
    log_z: jax.Array
    mean_logit: jax.Array
    correct: jax.Array


@dataclasses.dataclass(frozen=True)
class Request:
    """What a call asks for, beside the arrays.

    Attributes:
      recompute: logits are computed again in the backward pass.
      z_loss, label_smoothing: coefficients of the sum.
      mean_logit: whether the scores hold it.
      chunk: tokens, or with `recompute` ids, at a time; None lets the backend choose.
      mesh_axes: over which the vocabulary is split, inside `shard_map`.
    """

    recompute: bool
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    mean_logit: bool = False
    chunk: int | None = None
    mesh_axes: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """How many ways the vocabulary is split."""
        return jax.lax.psum(1, self.mesh_axes) if self.mesh_axes else 1


class Statistics(NamedTuple):
    """Of each token's logits, f32 [N] each.

    Attributes:
      label: the label's logit; 0 if the label is not among these ids.
      log_z: logarithm of the sum of their exponentials.
      mean: their mean; zeros where it was not asked for.
      largest: the largest. Has no gradient.
    """

    label: jax.Array
    log_z: jax.Array
    mean: jax.Array
    largest: jax.Array


class UnsupportedCrossEntropy(ValueError):
    """The named backend cannot do what was asked for, or does not exist."""


class Backend(Protocol):
    """One implementation of the two forms.

    Hidden states are [N, E], and 0 where the weight is; labels and weights are [N]. The projection's scale is 1, its
    ids are this device's, and labels count from the first of them; a label elsewhere is -1.
    """

    name: str

    def refuses(self, hidden: jax.Array, projection: OutputProjection, request: Request) -> list[str]:
        """Reasons why this backend cannot serve the call; empty if it can. Looks at shapes and types only."""

    def summed(
        self,
        hidden: jax.Array,
        projection: OutputProjection,
        labels: jax.Array,
        weights: jax.Array,
        request: Request,
    ) -> tuple[jax.Array, TokenScores]:
        """The sum of a request without `recompute`, divided by `request.parts`; and the scores, -1 being no label."""

    def statistics(
        self, hidden: jax.Array, projection: OutputProjection, labels: jax.Array, request: Request
    ) -> Statistics:
        """Of the device's own ids, with gradients, for a request with `recompute`."""


def cross_entropy(
    hidden: jax.Array,
    projection: OutputProjection,
    labels: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    recompute: bool = False,
    chunk: int | None = None,
    mesh_axes: tuple[str, ...] = (),
    backend: str = "auto",
) -> tuple[jax.Array, TokenScores]:
    """Weighted sum over tokens of smoothed cross-entropy and z-loss.

    With label smoothing e the target distribution is (1 - e) on the label plus e / V on each of the V ids (Szegedy et
    al. 2016, arXiv 1512.00567, section 7); its entropy is not subtracted. The z-loss is z_loss * log(Z)^2.

    Gradients are computed on the way forward, where one asks for them. Logits of `chunk` tokens exist at a time, and
    the gradient of the matrix is added up over them in float32, so a float32 matrix needs little memory besides, a
    bfloat16 one twice its own. With `recompute` logits are computed again in the backward pass, see `token_scores`:
    worth it where the vocabulary is large and memory scarce. The TPU kernels always do, and hold no logits.

    Args:
      hidden: [..., tokens, E].
      projection: to the vocabulary. Gradients go to hidden, matrix and bias.
      labels: int [..., tokens]. A token that counts with a label outside [0, V) makes the sum NaN.
      weights: [..., tokens], constants: no gradient passes to them. A token of weight 0 passes no gradient and adds
        nothing, whatever its hidden state and label are.
      z_loss, label_smoothing: coefficients.
      recompute: compute logits twice.
      chunk: tokens, with `recompute` ids, at a time; None chooses, see `chunk_tokens`.
      mesh_axes: inside `shard_map` (with check_vma=False), the mesh axes over which the vocabulary is split evenly: the
        projection holds this device's ids, V / devices from the device's index on, while labels count from the whole
        vocabulary's first. All devices of these axes are given the same tokens and return the same.
      backend: a name from `backends`, or "auto": the best that can.

    Returns:
      f32 scalar, and the scores of the tokens without gradient; they are 0 where the weight is, and mean_logit is 0
      without label smoothing.

    Raises:
      UnsupportedCrossEntropy: the named backend does not exist or refuses.
      ValueError: shapes or options do not fit.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, a share of the probability; give one in [0, 1].")
    _check(hidden, projection, labels, chunk)
    shape = labels.shape
    if weights.shape != labels.shape:
        raise ValueError(f"weights {weights.shape} must have the shape of labels {labels.shape}; give one a token.")
    request = Request(recompute, z_loss, label_smoothing, label_smoothing > 0.0, chunk, mesh_axes)
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32).ravel()
    counts = weights != 0.0
    hidden, labels, projection = _prepared(hidden, labels, projection, request)
    hidden = jnp.where(counts[:, None], hidden, 0)
    chosen = CROSS_ENTROPY.choose(backend, hidden, projection, request)
    if recompute:
        scores = scores_by(chosen, hidden, projection, labels, request)
        total = weighted_sum(scores, weights, request)
    else:
        share, scores = chosen.summed(hidden, projection, labels, weights, request)
        total = jax.lax.psum(share, mesh_axes) if mesh_axes else share
    # The labels of tokens that count for nothing may be anything.
    scores = jax.tree.map(lambda x: jnp.where(counts, x, 0.0).reshape(shape), jax.lax.stop_gradient(scores))
    return total, scores


def token_scores(
    hidden: jax.Array,
    projection: OutputProjection,
    labels: jax.Array,
    *,
    mean_logit: bool = False,
    chunk: int | None = None,
    mesh_axes: tuple[str, ...] = (),
    backend: str = "auto",
) -> TokenScores:
    """Log-probability of each label and log Z, each with its gradient; logits are computed again in the backward pass.

    The vocabulary is cut into chunks, forwards with a running maximum and sum, so that each part of the matrix's
    gradient is written once. No more of the logits exists than [tokens, chunk].

    Args:
      hidden: [..., tokens, E].
      projection: to the vocabulary. Gradients go to hidden, matrix and bias.
      labels: int [..., tokens]. A label outside [0, V) has log-probability NaN.
      mean_logit: also compute the mean of the logits, which label smoothing needs.
      chunk: ids at a time; None chooses.
      mesh_axes: over which the vocabulary is split, see `cross_entropy`.
      backend: a name from `backends`, or "auto": the best that can.

    Returns:
      The scores. A token whose scores have no cotangent passes no gradient, whatever its hidden state is.

    Raises:
      UnsupportedCrossEntropy: the named backend does not exist or refuses.
      ValueError: shapes do not fit.
    """
    _check(hidden, projection, labels, chunk)
    request = Request(True, mean_logit=mean_logit, chunk=chunk, mesh_axes=mesh_axes)
    shape = labels.shape
    hidden, labels, projection = _prepared(hidden, labels, projection, request)
    chosen = CROSS_ENTROPY.choose(backend, hidden, projection, request)
    return jax.tree.map(lambda x: x.reshape(shape), scores_by(chosen, hidden, projection, labels, request))


def chunk_tokens(tokens: int, vocab_size: int) -> int:
    """Tokens whose logits `cross_entropy` holds at a time if not told: about 2^23 logits, but not too few tokens."""
    return min(tokens, max(_FEWEST_TOKENS[platforms.current().kind], _CHUNK_LOGITS // vocab_size))


# For backends.


def merged(found: Statistics, request: Request) -> Statistics:
    """The statistics of the whole vocabulary from those of this device's ids."""
    axes = request.mesh_axes
    if not axes:
        return found
    above = jax.lax.pmax(jax.lax.stop_gradient(found.log_z), axes)
    return Statistics(
        label=jax.lax.psum(found.label, axes),
        log_z=above + jnp.log(jax.lax.psum(jnp.exp(found.log_z - above), axes)),
        mean=jax.lax.pmean(found.mean, axes) if request.mean_logit else found.mean,
        largest=jax.lax.pmax(jax.lax.stop_gradient(found.largest), axes),
    )


def assembled(found: Statistics, labels: jax.Array, request: Request) -> TokenScores:
    """`TokenScores` from `merged` statistics; the log-probability of a label outside the vocabulary is NaN."""
    known = labels >= 0
    if request.mesh_axes:  # by some device
        known = jax.lax.pmax(known.astype(jnp.int32), request.mesh_axes) > 0
    return TokenScores(
        log_probability=jnp.where(known, found.label - found.log_z, jnp.nan),
        log_z=found.log_z,
        mean_logit=found.mean,
        correct=jax.lax.stop_gradient((known & (found.label >= found.largest)).astype(jnp.float32)),
    )


def scores_by(
    backend: Backend, hidden: jax.Array, projection: OutputProjection, labels: jax.Array, request: Request
) -> TokenScores:
    """Scores of the whole vocabulary from a backend's statistics, with gradients."""
    found = backend.statistics(hidden, projection, labels, request)
    return assembled(merged(found, request), labels, request)


def weighted_sum(scores: TokenScores, weights: jax.Array, request: Request) -> jax.Array:
    """The sum that `cross_entropy` returns; tokens of weight 0 count for nothing."""
    losses = -scores.log_probability + request.z_loss * scores.log_z**2
    if request.label_smoothing:
        # (1 - e) nll + e (log Z - mean logit), with nll = log Z - label's logit.
        losses += request.label_smoothing * (scores.log_probability + scores.log_z - scores.mean_logit)
    return jnp.where(weights != 0.0, weights * losses, 0.0).sum()


def sum_cotangents(
    log_z: jax.Array, weights: jax.Array, request: Request, projection: OutputProjection
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Derivatives of `weighted_sum` by a token's label logit, by log Z and, if smoothed, by each logit of the mean."""
    return (
        (request.label_smoothing - 1.0) * weights,
        weights * (1.0 + 2.0 * request.z_loss * log_z),
        -request.label_smoothing / (projection.vocab_size * request.parts) * weights
        if request.label_smoothing
        else None,
    )


# The choice of a backend.


_PLAIN = Candidate("xla", "In chunks, on any device; refuses nothing.")

CROSS_ENTROPY: Choice[Backend] = Choice(
    "cross_entropy",
    backends={
        "xla": "pallas_kernels.cross_entropy_chunks:XlaBackend",
        "pallas_tpu": "pallas_kernels.tpu.cross_entropy:TpuBackend",
    },
    order={
        "cpu": (_PLAIN,),
        "gpu": (_PLAIN,),
        "tpu": (
            Candidate(
                "pallas_tpu",
                "Logits stay on the chip: least memory. For the sum alone plain jax, which holds a chunk of them, is "
                "estimated at 0.71 of its cycles (benchmarks/results/cross_entropy.json).",
                better_not=lambda hidden, projection, request: (
                    None if request.recompute else "the sum takes three products in plain jax and five in the kernels"
                ),
            ),
            _PLAIN,
        ),
    },
    error=UnsupportedCrossEntropy,
)


def _prepared(
    hidden: jax.Array, labels: jax.Array, projection: OutputProjection, request: Request
) -> tuple[jax.Array, jax.Array, OutputProjection]:
    """Hidden states, labels and projection as a `Backend` takes them."""
    if projection.scale != 1.0:
        hidden, projection = (
            hidden * jnp.asarray(projection.scale, hidden.dtype),
            dataclasses.replace(projection, scale=1.0),
        )
    labels = labels.ravel()
    if request.mesh_axes:
        labels = labels - jax.lax.axis_index(request.mesh_axes) * projection.vocab_size
    labels = jnp.where((labels >= 0) & (labels < projection.vocab_size), labels, -1)
    return hidden.reshape(-1, hidden.shape[-1]), labels, projection


def _check(hidden: jax.Array, projection: OutputProjection, labels: jax.Array, chunk: int | None) -> None:
    matrix, bias = projection.matrix, projection.bias
    if projection.vocab_axis not in (0, 1) or matrix.ndim != 2:
        raise ValueError(
            f"OutputProjection.matrix must be [E, V] (vocab_axis 1) or [V, E] (vocab_axis 0); got shape {matrix.shape} "
            f"and vocab_axis {projection.vocab_axis}."
        )
    if hidden.ndim < 2 or hidden.shape[-1] != projection.width:
        raise ValueError(
            f"hidden {hidden.shape} must be [..., tokens, E] with E {projection.width}, as in the matrix "
            f"{matrix.shape} with vocab_axis {projection.vocab_axis}; set vocab_axis to the matrix's axis of ids."
        )
    if labels.shape != hidden.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {hidden.shape[:-1]}, one a token of hidden {hidden.shape}; got "
            f"{labels.dtype} {labels.shape}."
        )
    if bias is not None and bias.shape != (projection.vocab_size,):
        raise ValueError(
            f"OutputProjection.bias {bias.shape} must be ({projection.vocab_size},), one number an id of the matrix "
            f"{matrix.shape}."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; give at least 1, or None to have it chosen.")
