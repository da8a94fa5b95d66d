"""What may change the logits before a token is drawn: processors on the device, constraints on the host.

A `Processor` is a pure function of logits and of what a slot has written, compiled into the decoding step. A
`Constraint` lives on the host, sees each token as it is drawn, and gives the next step a bit mask of the tokens that
are allowed; while a slot has one, the engine takes one step at a time.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.requests import Request
from jaxlm.decoding.sampling import NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """What the slots hold, as tokens.

    Attributes:
      tokens: int32 [B, C], the prompt and what was drawn since, without the token that starts a decoder's input (for an
        encoder-decoder without its prompt, which the decoder does not see). Columns from `lengths` on mean nothing.
      lengths: int32 [B], tokens of each slot.
      prompt_lengths: int32 [B], how many of them are the prompt's.
    """

    tokens: jax.Array
    lengths: jax.Array
    prompt_lengths: jax.Array

    @property
    def new_tokens(self) -> jax.Array:
        """int32 [B], how many tokens were drawn."""
        return self.lengths - self.prompt_lengths

    def written(self, *, prompt: bool = True) -> jax.Array:
        """bool [B, C]: the columns that hold a token; without the prompt's if `prompt` is False."""
        column = jnp.arange(self.tokens.shape[1])
        inside = column < self.lengths[:, None]
        return inside if prompt else inside & (column >= self.prompt_lengths[:, None])

    def append(self, tokens: jax.Array, writes: jax.Array) -> "Texts":
        """With `tokens`, int32 [B], at the end of each slot where `writes`, bool [B]; a full slot loses its token."""
        places = jnp.where(writes, self.lengths, self.tokens.shape[1])  # beyond the last column: dropped
        written = self.tokens.at[jnp.arange(len(tokens)), places].set(tokens, mode="drop")
        return dataclasses.replace(self, tokens=written, lengths=self.lengths + writes)

    def last(self, count: int) -> jax.Array:
        """int32 [B, count]: the last tokens of each slot in order; -1 where a slot has fewer."""
        at = self.lengths[:, None] - count + jnp.arange(count)
        return jnp.where(at >= 0, jnp.take_along_axis(self.tokens, jnp.maximum(at, 0), axis=1), -1)


class Processor:
    """Changes logits. Subclasses are frozen dataclasses: they are hashed, and compiled into the step.

    What differs between requests is a slot's state, arrays whose shapes do not differ; so one program serves all.
    """

    def check(self, options: Mapping[str, Any]) -> Collection[str]:
        """On the host, when a request is made: the names among its options that this processor reads.

        Raises:
          ValueError: one of them has a value that it cannot take.
        """
        del options
        return ()

    def slot_state(self, request: Request) -> Any:
        """On the host, when a request gets a slot: its state, a pytree of numpy arrays or numbers; () is none."""
        del request
        return ()

    def __call__(self, logits: jax.Array, texts: Texts, state: Any) -> jax.Array:
        """The changed logits.

        Args:
          logits: float32 [B, V], before temperature.
          texts: what the slots hold.
          state: of all slots: each leaf of `slot_state` with a leading axis B.
        """
        raise NotImplementedError

    def advance(self, state: Any, texts: Texts, tokens: jax.Array, active: jax.Array) -> Any:
        """The state after `tokens` [B] were drawn, not yet in `texts`; where not `active` [B] nothing was."""
        del texts, tokens, active
        return state


class Constraint(Protocol):
    """What one text must look like; made for one request, see `Request.constraint`."""

    def allowed(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 says whether token i may come next.

        Raises:
          ValueError: no token may, in a sentence that says why.
        """

    def advance(self, token: int) -> None:
        """`token` was drawn."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete, so that nothing more is to be drawn."""


def check_options(processors: Sequence[Processor], options: Mapping[str, Any]) -> None:
    """Raises ValueError unless some processor reads each of a request's options and can take its value."""
    read = sorted({name for processor in processors for name in processor.check(options)})
    if strange := [name for name in options if name not in read]:
        there = f"they take {', '.join(read)}" if read else "there is none"
        raise ValueError(f"A request has the option {strange[0]!r}, which none of the processors reads; {there}.")


def process(processors: Sequence[Processor], logits: jax.Array, texts: Texts, states: Sequence[Any]) -> jax.Array:
    """Logits through all processors, one after the other."""
    for processor, state in zip(processors, states, strict=True):
        logits = processor(logits, texts, state)
    return logits


def advance(
    processors: Sequence[Processor], states: Sequence[Any], texts: Texts, tokens: jax.Array, active: jax.Array
) -> tuple[Any, ...]:
    """The states of all processors after `tokens` [B] were drawn where `active` [B]."""
    return tuple(p.advance(state, texts, tokens, active) for p, state in zip(processors, states, strict=True))


def keep_allowed(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Logits [B, V] with NEVER where the bit of `allowed`, uint32 [B, ceil(V / 32)], is 0; see `Constraint.allowed`."""
    bits = (allowed[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.reshape(*allowed.shape[:-1], -1)[..., : logits.shape[-1]]
    return jnp.where(bits > 0, logits, NEVER)


def states_of(processors: Sequence[Processor], requests: Sequence[Request], slots: int) -> tuple[Any, ...]:
    """The state of each processor for `slots` slots, of which the first have these requests and others the last's."""
    padded = [*requests, *[requests[-1]] * (slots - len(requests))]
    return tuple(jax.tree.map(lambda *x: np.stack(x), *map(p.slot_state, padded)) for p in processors)


def prompts_as_texts(prompts: Sequence[Sequence[int]], slots: int, columns: int) -> Texts:
    """Texts of `slots` slots that hold these prompts, or nothing, in so many columns (numpy)."""
    lengths = np.zeros(slots, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens = np.zeros((slots, columns), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    return Texts(tokens, lengths, lengths)
