"""How tokens are drawn: temperature, top-k, top-p, min-p, typical; each slot in its own way, reproducible by seed."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

NEVER = -1e30
"""Logit of a token that must not be drawn: finite, so that a softmax over such tokens alone is no NaN."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. Filters apply in the order of the fields, each to what the one before has left.

    Attributes:
      max_new_tokens: at most so many for each prompt; an end-of-text token ends it earlier.
      temperature: logits are divided by it; 0 always takes the likeliest token.
      top_k: draw from the k likeliest only (arXiv 1805.04833, 5.4); 0 draws from all.
      top_p: draw from the fewest tokens that together have this probability (nucleus, arXiv 1904.09751); 1 from all.
      min_p: draw from tokens at least this likely relative to the likeliest (arXiv 2407.01082); 0 from all.
      typical_p: draw from the tokens whose surprise is nearest to the expected one, the fewest that together have this
        probability (locally typical, arXiv 2202.00666, 3); 1 from all.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"SamplingConfig.max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        allowed = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "typical_p": 0 < self.typical_p <= 1,
        }
        if wrong := [f"{name}={getattr(self, name)}" for name, right in allowed.items() if not right]:
            raise ValueError(
                f"SamplingConfig needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1 and 0 < typical_p "
                f"<= 1; got {', '.join(wrong)}."
            )


GREEDY = SamplingConfig(temperature=0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """How each of B slots draws, as arrays, so that all ways share one program.

    Attributes:
      temperature, top_p, min_p, typical_p: float32 [B].
      top_k: int32 [B].
      seeds: uint32 [B, 2], the request's seed, and which of its samples this is.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    seeds: jax.Array

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], seeds: Sequence[tuple[int, int]]) -> "Sampling":
        """Of one configuration and one (seed, sample) a slot, as numpy arrays."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(config, name) for config in configs], dtype)

        names = ("temperature", "top_p", "min_p", "typical_p")
        return cls(
            **{name: column(name, np.float32) for name in names},
            top_k=column("top_k", np.int32),
            seeds=np.array(seeds, np.uint32).reshape(-1, 2),
        )


def draw(logits: jax.Array, sampling: Sampling, index: jax.Array) -> jax.Array:
    """Draws a token a slot.

    A draw is a function of its slot's logits, its seeds and `index`: whatever stands in the other slots.

    Args:
      logits: float32 [B, V].
      sampling: how.
      index: int32 [B], the number of the token among its text's new ones.

    Returns:
      int32 [B].
    """
    greedy = sampling.temperature == 0.0

    def by_chance() -> jax.Array:
        drawn = jax.vmap(jax.random.categorical)(keys(sampling.seeds, index), filtered(logits, sampling))
        return drawn.astype(jnp.int32)

    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(jnp.all(greedy), lambda: best, lambda: jnp.where(greedy, best, by_chance()))


def keys(seeds: jax.Array, index: jax.Array) -> jax.Array:
    """jax keys [B] for the new tokens number `index` [B] of texts with these seeds [B, 2]."""

    def key(seed: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), index)

    return jax.vmap(key)(seeds, index)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] whose softmax is what a slot draws from: NEVER for what it does not, all but one if greedy."""
    greedy = (sampling.temperature == 0.0)[:, None]
    best = jnp.argmax(logits, axis=-1)[:, None] == jnp.arange(logits.shape[-1])
    logits = jnp.where(greedy, jnp.where(best, logits, NEVER), logits)
    logits = logits / jnp.where(greedy, 1.0, sampling.temperature[:, None])
    # Sorting the vocabulary takes longer than all else here: only where some slot asks for it.
    sorts = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1.0))
    logits = jax.lax.cond(sorts, _likeliest, lambda x, _: x, logits, sampling)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.where(logits < highest + jnp.log(sampling.min_p)[:, None], NEVER, logits)
    return jax.lax.cond(jnp.any(sampling.typical_p < 1.0), _typical, lambda x, _: x, logits, sampling)


def _likeliest(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits filtered by top-k, then top-p."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    vocabulary = logits.shape[-1]
    last = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary) - 1
    among_k = ordered >= jnp.take_along_axis(ordered, last[:, None], axis=-1)
    probabilities = jax.nn.softmax(jnp.where(among_k, ordered, NEVER), axis=-1)
    # A token is kept where those likelier than it have not reached top_p yet; so the likeliest always is.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = sampling.top_p[:, None]
    kept = among_k & ((before < top_p) | (top_p >= 1.0))
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, NEVER, logits)


def _typical(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits filtered by how near each token's surprise is to the distribution's entropy."""
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    probabilities = jnp.exp(log_probabilities)
    entropy = -jnp.sum(probabilities * log_probabilities, axis=-1, keepdims=True)
    away = jnp.abs(-log_probabilities - entropy)
    order = jnp.argsort(away, axis=-1)
    ordered = jnp.take_along_axis(probabilities, order, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    farthest = jnp.max(
        jnp.where(before < sampling.typical_p[:, None], jnp.take_along_axis(away, order, axis=-1), 0.0),
        axis=-1,
        keepdims=True,
    )
    return jnp.where((away > farthest) & (sampling.typical_p[:, None] < 1.0), NEVER, logits)


def drawable_ids(rows: int, vocab_size: int | None = None, never: Sequence[int] = ()) -> np.ndarray:
    """bool [V]: the ids that may be drawn.

    Args:
      rows: V, rows of the model's embedding table.
      vocab_size: ids from here on only pad the table; None: none do.
      never: other ids that are never drawn, such as that of padding.
    """
    ids = np.arange(rows)
    return (ids < (rows if vocab_size is None else vocab_size)) & ~np.isin(ids, never)
