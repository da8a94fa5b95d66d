"""Cross-entropy of hidden states against an output matrix, without the [tokens, vocabulary] logits.

Two ways. Gradients in the forward pass, while the logits of a chunk of tokens are at hand: three matrix products, as
for logits that are kept, but a sum only (`cross_entropy`). Or logits computed again in the backward pass, a chunk of
the vocabulary at a time: a fourth product, the least memory, and gradients token by token (`token_scores`, and
`cross_entropy` on demand).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, override

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.choice import Candidate, Choice

# Logits of a chunk of `cross_entropy`: on a CPU sizes from 2^20 to 2^25 take much the same time.
_CHUNK_LOGITS = 2**23
# Fewer tokens, and an accelerator waits for its memory: each chunk adds to the float32 gradient of the whole matrix, 8
# bytes an entry for 2 operations a token.
_FEWEST_TOKENS, _FEWEST_TOKENS_ON_CPU = 2048, 512
# Ids of a chunk where logits are computed twice.
_CHUNK_IDS = 2048


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
        return self.cap(self.product(hidden))

    def product(self, hidden: jax.Array) -> jax.Array:
        """Logits before the soft cap, float32 [..., V]."""
        if self.scale != 1.0:
            hidden = hidden * jnp.asarray(self.scale, hidden.dtype)
        logits = _dot(hidden, self.matrix.astype(hidden.dtype), ((hidden.ndim - 1,), (1 - self.vocab_axis,)))
        return logits if self.bias is None else logits + self.bias.astype(jnp.float32)

    def cap(self, logits: jax.Array) -> jax.Array:
        """The soft cap."""
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def part(self, start: jax.Array | int, size: int) -> "OutputProjection":
        """The projection onto `size` ids from `start` on."""
        matrix = jax.lax.dynamic_slice_in_dim(self.matrix, start, size, self.vocab_axis)
        bias = None if self.bias is None else jax.lax.dynamic_slice_in_dim(self.bias, start, size)
        return dataclasses.replace(self, matrix=matrix, bias=bias)


class TokenScores(NamedTuple):
    """What the logits say of each label; f32 [*groups, tokens] each.

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
    """

    recompute: bool
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    mean_logit: bool = False
    chunk: int | None = None


class UnsupportedCrossEntropy(ValueError):
    """The named backend cannot do what was asked for, or does not exist."""


class Backend(Protocol):
    """One implementation of the two forms. The projection's scale is 1; hidden states are 0 where the weight is."""

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
        """The sum of a request without `recompute`."""

    def scores(
        self, hidden: jax.Array, projection: OutputProjection, labels: jax.Array, request: Request
    ) -> TokenScores:
        """The scores of a request with `recompute`."""


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
    backend: str = "auto",
) -> tuple[jax.Array, TokenScores]:
    """Weighted sum over tokens of smoothed cross-entropy and z-loss.

    With label smoothing e the target distribution is (1 - e) on the label plus e / V on each of the V ids (Szegedy et
    al. 2016, arXiv 1512.00567, section 7); its entropy is not subtracted. The z-loss is z_loss * log(Z)^2.

    Gradients are computed on the way forward, where one asks for them. Logits of `chunk` tokens of each group exist at
    a time. The gradient of the matrix is added up in float32 over the chunks, on each group apart, and over the groups
    once at the end: where tokens lie on several devices, give the devices an axis of their own, and nothing of the size
    of the matrix travels before the end. With `recompute` logits are computed again in the backward pass, see
    `token_scores`: worth it where the vocabulary is large and memory scarce.

    Args:
      hidden: [*groups, tokens, E].
      projection: to the vocabulary. Gradients go to hidden, matrix and bias.
      labels: int [*groups, tokens]. A token that counts with a label outside [0, V) makes the sum NaN.
      weights: [*groups, tokens], constants: no gradient passes to them. A token of weight 0 passes no gradient and adds
        nothing, whatever its hidden state and label are.
      z_loss, label_smoothing: coefficients.
      recompute: compute logits twice.
      chunk: tokens of each group, with `recompute` ids, at a time; None chooses, see `chunk_tokens`.
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
    if weights.shape != labels.shape:
        raise ValueError(f"weights {weights.shape} must have the shape of labels {labels.shape}; give one a token.")
    request = Request(recompute, z_loss, label_smoothing, label_smoothing > 0.0, chunk)
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    counts = weights != 0.0
    hidden, projection = _scaled(jnp.where(counts[..., None], hidden, 0), projection)
    backend = CROSS_ENTROPY.choose(backend, hidden, projection, request)
    if recompute:
        scores = backend.scores(hidden, projection, labels, request)
        total = weighted_sum(scores, weights, request)
    else:
        total, scores = backend.summed(hidden, projection, labels, weights, request)
    # The labels of tokens that count for nothing may be anything.
    return total, TokenScores(*(jnp.where(counts, x, 0.0) for x in jax.lax.stop_gradient(scores)))


def token_scores(
    hidden: jax.Array,
    projection: OutputProjection,
    labels: jax.Array,
    *,
    mean_logit: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> TokenScores:
    """Log-probability of each label and log Z, each with its gradient; logits are computed again in the backward pass.

    The vocabulary is cut into chunks, forwards with a running maximum and sum, so that each part of the matrix's
    gradient is written once. No more of the logits exists than [*groups, tokens, chunk].

    Args:
      hidden: [*groups, tokens, E].
      projection: to the vocabulary. Gradients go to hidden, matrix and bias.
      labels: int [*groups, tokens]. A label outside [0, V) has log-probability NaN.
      mean_logit: also compute the mean of the logits, which label smoothing needs.
      chunk: ids at a time; None chooses.
      backend: a name from `backends`, or "auto": the best that can.

    Returns:
      The scores. A token whose scores have no cotangent passes no gradient, whatever its hidden state is.

    Raises:
      UnsupportedCrossEntropy: the named backend does not exist or refuses.
      ValueError: shapes do not fit.
    """
    _check(hidden, projection, labels, chunk)
    request = Request(True, mean_logit=mean_logit, chunk=chunk)
    hidden, projection = _scaled(hidden, projection)
    return CROSS_ENTROPY.choose(backend, hidden, projection, request).scores(hidden, projection, labels, request)


def chunk_tokens(tokens: int, vocab_size: int) -> int:
    """Tokens whose logits `cross_entropy` holds at a time if not told: about 2^23 logits, but not too few tokens."""
    fewest = _FEWEST_TOKENS_ON_CPU if platforms.current().kind == "cpu" else _FEWEST_TOKENS
    return min(tokens, max(fewest, _CHUNK_LOGITS // vocab_size))


class XlaBackend(Backend):
    """Chunks in plain jax, on any device; under GSPMD it partitions by itself. Refuses nothing."""

    name = "xla"

    @override
    def refuses(self, hidden: jax.Array, projection: OutputProjection, request: Request) -> list[str]:
        return []

    @override
    def summed(
        self,
        hidden: jax.Array,
        projection: OutputProjection,
        labels: jax.Array,
        weights: jax.Array,
        request: Request,
    ) -> tuple[jax.Array, TokenScores]:
        return _summed(request, hidden, projection, labels, weights)

    @override
    def scores(
        self, hidden: jax.Array, projection: OutputProjection, labels: jax.Array, request: Request
    ) -> TokenScores:
        label, log_z, mean, largest = _statistics(request, hidden, projection, labels)
        return assembled(label, log_z, mean, largest, labels, projection.vocab_size)


def assembled(
    label_logit: jax.Array,
    log_z: jax.Array,
    mean_logit: jax.Array,
    largest: jax.Array,
    labels: jax.Array,
    vocab_size: int,
) -> TokenScores:
    """`TokenScores` from the statistics of the logits; the log-probability of a label outside the vocabulary is NaN."""
    known = (labels >= 0) & (labels < vocab_size)
    return TokenScores(
        log_probability=jnp.where(known, label_logit - log_z, jnp.nan),
        log_z=log_z,
        mean_logit=mean_logit,
        correct=jax.lax.stop_gradient((known & (label_logit >= largest)).astype(jnp.float32)),
    )


def weighted_sum(scores: TokenScores, weights: jax.Array, request: Request) -> jax.Array:
    """The sum that `cross_entropy` returns; tokens of weight 0 count for nothing."""
    losses = -scores.log_probability + request.z_loss * scores.log_z**2
    if request.label_smoothing:
        # (1 - e) nll + e (log Z - mean logit), with nll = log Z - label's logit.
        losses += request.label_smoothing * (scores.log_probability + scores.log_z - scores.mean_logit)
    return jnp.where(weights != 0.0, weights * losses, 0.0).sum()


def sum_cotangents(
    log_z: jax.Array, weights: jax.Array, request: Request, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Derivatives of `weighted_sum` by a token's label logit, by log Z and, if smoothed, by each logit of the mean."""
    return (
        (request.label_smoothing - 1.0) * weights,
        weights * (1.0 + 2.0 * request.z_loss * log_z),
        -request.label_smoothing / vocab_size * weights if request.label_smoothing else None,
    )


# The sum, over chunks of tokens.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    request: Request, hidden: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, TokenScores]:
    def chunk(carry: None, tokens: tuple[jax.Array, ...]) -> tuple[None, TokenScores]:
        hidden, labels, _ = tokens
        return carry, _scores_of(projection.logits(hidden), labels, request)

    _, scores = _over_token_chunks(chunk, None, (hidden, labels, weights), projection, request)
    return weighted_sum(scores, weights, request), scores


def _summed_forward(request, hidden, projection, labels, weights):
    groups = hidden.shape[:-2]
    gradients = jnp.zeros((*groups, *projection.matrix.shape), jnp.float32)
    bias_gradients = None if projection.bias is None else jnp.zeros((*groups, projection.vocab_size), jnp.float32)

    def chunk(carry, tokens):
        hidden, labels, weights = tokens
        raw = projection.product(hidden)
        scores = _scores_of(projection.cap(raw), labels, request)
        cotangents = sum_cotangents(scores.log_z, weights, request, projection.vocab_size)
        d_logits = _logit_cotangents(projection, raw, labels, scores.log_z, *cotangents)
        of_matrix, of_bias = carry
        if of_bias is not None:
            of_bias += d_logits.sum(-2)
        d_logits = d_logits.astype(hidden.dtype)
        of_matrix += _matrix_gradient(hidden, d_logits, projection.vocab_axis)
        return (of_matrix, of_bias), (scores, _hidden_gradient(d_logits, projection))

    (of_matrix, of_bias), (scores, of_hidden) = _over_token_chunks(
        chunk, (gradients, bias_gradients), (hidden, labels, weights), projection, request
    )
    over_groups = tuple(range(len(groups)))
    of_projection = dataclasses.replace(
        projection,
        matrix=of_matrix.sum(over_groups).astype(projection.matrix.dtype),
        bias=None if of_bias is None else of_bias.sum(over_groups).astype(projection.bias.dtype),
    )
    return (weighted_sum(scores, weights, request), scores), (of_hidden, of_projection)


def _summed_backward(request, gradients, cotangents):
    by = cotangents[0]  # the scores are given without gradient
    return *jax.tree.map(lambda x: (by * x).astype(x.dtype), gradients), None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _over_token_chunks(
    function: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    arrays: tuple[jax.Array, ...],
    projection: OutputProjection,
    request: Request,
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `function` over chunks of the token axis of `arrays` [*groups, tokens, ...].

    Tokens are filled up to whole chunks with zeros, so with weight 0; a single chunk runs without a loop.
    """
    axis = arrays[-1].ndim - 1
    tokens = arrays[-1].shape[axis]
    chunks = -(-tokens // (request.chunk or chunk_tokens(tokens, projection.vocab_size)))
    if chunks <= 1:
        return function(carry, arrays)
    size = -(-tokens // chunks)

    def cut(x):  # [*groups, tokens, ...] -> [chunks, *groups, size, ...]
        x = jnp.pad(x, [(0, chunks * size - tokens if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, axis)
        return jax.lax.slice_in_dim(
            x.reshape(*x.shape[:axis], chunks * size, *x.shape[axis + 2 :]), 0, tokens, axis=axis
        )

    carry, results = jax.lax.scan(function, carry, tuple(map(cut, arrays)))
    return carry, jax.tree.map(join, results)


def _scores_of(logits: jax.Array, labels: jax.Array, request: Request) -> TokenScores:
    """`TokenScores` from whole rows of logits [..., V]."""
    largest = logits.max(-1)
    log_z = largest + jnp.log(jnp.exp(logits - largest[..., None]).sum(-1))
    mean = logits.mean(-1) if request.mean_logit else jnp.zeros_like(log_z)
    return assembled(_logit_at(logits, labels), log_z, mean, largest, labels, logits.shape[-1])


# Scores with a gradient, over chunks of the vocabulary.

Statistics = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # of the logits: label's, log Z, mean, largest


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(request: Request, hidden: jax.Array, projection: OutputProjection, labels: jax.Array) -> Statistics:
    zeros = jnp.zeros(labels.shape, jnp.float32)

    def chunk(carry, start, size):
        largest, total, label, sum_of_logits = carry
        logits = projection.part(start, size).logits(hidden)
        new = jnp.maximum(largest, logits.max(-1))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[..., None]).sum(-1)
        local = labels - start
        label = jnp.where((local >= 0) & (local < size), _logit_at(logits, local), label)
        if request.mean_logit:
            sum_of_logits += logits.sum(-1)
        return new, total, label, sum_of_logits

    start = (jnp.full_like(zeros, -jnp.inf), zeros, zeros, zeros)
    largest, total, label, sum_of_logits = _over_vocabulary(chunk, start, projection, request)
    return label, largest + jnp.log(total), sum_of_logits / projection.vocab_size, largest


def _statistics_forward(request, hidden, projection, labels):
    statistics = _statistics(request, hidden, projection, labels)
    return statistics, (hidden, projection, labels, statistics[1])


def _statistics_backward(request, saved, cotangents):
    hidden, projection, labels, log_z = saved
    of_label, of_log_z, of_mean, _ = cotangents  # the largest logit only tells what is correct
    counts = (of_label != 0.0) | (of_log_z != 0.0) | (of_mean != 0.0)
    of_each = of_mean / projection.vocab_size if request.mean_logit else None
    hidden = jnp.where(counts[..., None], hidden, 0)
    log_z = jnp.where(counts, log_z, jnp.inf)

    def chunk(carry, start, size):
        of_hidden, of_projection = carry
        part = projection.part(start, size)
        d_logits = _logit_cotangents(
            part,
            part.product(hidden),
            labels - start,
            log_z,
            of_label,
            of_log_z,
            of_each,
        )
        groups = tuple(range(hidden.ndim - 2))
        of_bias = of_projection.bias
        if of_bias is not None:
            of_bias = _write(of_bias, d_logits.sum((*groups, -2)), start, 0)
        d_logits = d_logits.astype(hidden.dtype)
        of_matrix = _matrix_gradient(hidden, d_logits, projection.vocab_axis).sum(groups)
        of_matrix = _write(of_projection.matrix, of_matrix, start, projection.vocab_axis)
        of_hidden += _hidden_gradient(d_logits, part, jnp.float32)
        return of_hidden, dataclasses.replace(of_projection, matrix=of_matrix, bias=of_bias)

    start = (jnp.zeros(hidden.shape, jnp.float32), jax.tree.map(jnp.zeros_like, projection))
    of_hidden, of_projection = _over_vocabulary(chunk, start, projection, request)
    return of_hidden.astype(hidden.dtype), of_projection, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _over_vocabulary(
    function: Callable[[Any, jax.Array | int, int], Any], carry: Any, projection: OutputProjection, request: Request
) -> Any:
    """carry = function(carry, first id, number of ids) for each chunk of the vocabulary; the last may be smaller."""
    size = min(request.chunk or _CHUNK_IDS, projection.vocab_size)
    whole = projection.vocab_size // size
    if whole > 1:
        starts = jnp.arange(whole, dtype=jnp.int32) * size
        carry, _ = jax.lax.scan(lambda carry, start: (function(carry, start, size), None), carry, starts)
    else:
        carry = function(carry, 0, size)
    rest = projection.vocab_size - whole * size
    return function(carry, whole * size, rest) if rest else carry


# Both forms.


def _logit_cotangents(
    projection: OutputProjection,
    raw: jax.Array,
    labels: jax.Array,
    log_z: jax.Array,
    of_label: jax.Array,
    of_log_z: jax.Array,
    of_each: jax.Array | None,
) -> jax.Array:
    """Cotangents of the logits before the soft cap, f32 [..., V], from those of the statistics of the logits.

    Args:
      projection: whose logits they are.
      raw: [..., V] logits before the soft cap.
      labels: [...] ids, counted from the projection's first; those outside of it have no logit here.
      log_z: [...]. Infinity stands for a row without gradient.
      of_label, of_log_z: [...] cotangents of the label's logit and of log Z.
      of_each: [...], added to every logit's (the mean's share), or None.
    """
    logits = projection.cap(raw)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    found = jnp.exp(logits - log_z[..., None]) * of_log_z[..., None]
    found += jnp.where(ids == labels[..., None], of_label[..., None], 0.0)
    if of_each is not None:
        found += of_each[..., None]
    return found if projection.soft_cap is None else found * (1.0 - jnp.square(logits / projection.soft_cap))


def _logit_at(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """logits[..., labels]; where the label is outside of them, any number."""
    if platforms.current().kind == "tpu":  # where a gather takes longer than a matrix product
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return jnp.where(ids == labels[..., None], logits, 0.0).sum(-1)
    # On a CPU a gather takes less time than such a sum.
    labels = jnp.clip(labels, 0, logits.shape[-1] - 1)
    return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def _hidden_gradient(d_logits: jax.Array, projection: OutputProjection, result: Any = None) -> jax.Array:
    contracted = ((d_logits.ndim - 1,), (projection.vocab_axis,))
    return _dot(d_logits, projection.matrix.astype(d_logits.dtype), contracted).astype(result or d_logits.dtype)


def _matrix_gradient(hidden: jax.Array, d_logits: jax.Array, vocab_axis: int) -> jax.Array:
    """f32 [*groups, E, V] or [*groups, V, E]: summed over the tokens of each group."""
    groups = tuple(range(hidden.ndim - 2))
    pair = (hidden, d_logits) if vocab_axis == 1 else (d_logits, hidden)
    tokens = (hidden.ndim - 2,)
    return _dot(*pair, (tokens, tokens), (groups, groups))


def _dot(a: jax.Array, b: jax.Array, contracted: tuple, batch: tuple = ((), ())) -> jax.Array:
    return jax.lax.dot_general(a, b, (contracted, batch), preferred_element_type=jnp.float32)


def _write(target: jax.Array, value: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(target, value.astype(target.dtype), start, axis)


# The choice of a backend.


_PLAIN = Candidate("xla", "In chunks, on any device; refuses nothing.")

CROSS_ENTROPY: Choice[Backend] = Choice(
    "cross_entropy",
    backends={"xla": XlaBackend(), "pallas_tpu": "pallas_kernels.tpu.cross_entropy:TpuBackend"},
    order={
        "cpu": (_PLAIN,),
        "gpu": (_PLAIN,),
        "tpu": (Candidate("pallas_tpu", "Logits stay on the chip (benchmarks/results/cross_entropy.json)."), _PLAIN),
    },
    error=UnsupportedCrossEntropy,
)


def _scaled(hidden: jax.Array, projection: OutputProjection) -> tuple[jax.Array, OutputProjection]:
    """The same logits from a projection whose scale is 1."""
    if projection.scale == 1.0:
        return hidden, projection
    return hidden * jnp.asarray(projection.scale, hidden.dtype), dataclasses.replace(projection, scale=1.0)


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
