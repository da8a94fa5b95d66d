"""What a call of attention asks for, and what a backend answers."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels.biases import Bias


class UnsupportedAttention(ValueError):
    """The named backend cannot do what was asked for, or does not exist."""


class Origin(NamedTuple):
    """Where a device's part of the scores lies in the whole: the global index of its first entry along each axis.

    Attention dropout is a function of global indices, so that a mesh drops what one device would. Traced int32 scalars
    or ints.
    """

    batch: jax.Array | int = 0
    head: jax.Array | int = 0
    query: jax.Array | int = 0
    key: jax.Array | int = 0


WHOLE = Origin()


@dataclasses.dataclass(frozen=True)
class Request:
    """What a call asks for, beside the arrays.

    Attributes:
      mask: which query sees which key.
      bias: added to the scores, or None.
      scale: the scores are scale * q . k.
      soft_cap: scores become soft_cap * tanh(score / soft_cap), or None. Applied before bias and mask.
      dropout_rate: share of the attention weights to drop.
      dropout_seed: uint32 scalar, or None without dropout.
      origin: global indices of the first entry, for dropout.
      needs_lse: the caller uses the log-sum-exp of the scores.
      q_shape: [B, Tq, Hq, D].
      k_shape: [B, Tk, Hkv, D].
      v_shape: [B, Tk, Hkv, Dv].
      dtype: of q, k and v.
    """

    mask: masks.Mask
    bias: Bias | None
    scale: float
    soft_cap: float | None
    dropout_rate: float
    dropout_seed: jax.Array | None
    origin: Origin
    needs_lse: bool
    q_shape: tuple[int, int, int, int]
    k_shape: tuple[int, int, int, int]
    v_shape: tuple[int, int, int, int]
    dtype: jnp.dtype


class Backend(Protocol):
    """One implementation of attention."""

    name: str

    def refuses(self, request: Request) -> list[str]:
        """Reasons why this backend cannot serve the call; empty if it can.

        Looks at static facts (shapes, types, kinds of mask and bias) and at `platforms.current()` only, so that it also
        answers while a program is compiled ahead of time.
        """

    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, jax.Array | None]:
        """The result [B, Tq, Hq, Dv] in v's type, and the log-sum-exp of the scores.

        The log-sum-exp is float32 [B, Hq, Tq] in natural logarithms, -inf for a query that sees nothing, and
        differentiable; it may be None if not `request.needs_lse`.
        """

    def gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        request: Request,
        lse: jax.Array,
        delta: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Bias | None]:
        """See `pallas_kernels.attention.attention_gradients`; this form computes the part's result again."""

        def run(q, k, v, bias):
            return self.run(q, k, v, dataclasses.replace(request, bias=bias))

        (part, part_lse), pull = jax.vjp(run, q, k, v, request.bias)
        # The whole is the sum over the parts of exp(part_lse - lse) times their results.
        finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
        share = jnp.where(jnp.isneginf(part_lse), 0.0, jnp.exp(part_lse - finite))
        part_delta = jnp.einsum("bqhd,bqhd->bhq", gradient, part, preferred_element_type=jnp.float32)
        pulled = gradient * share.swapaxes(1, 2)[..., None]
        return pull((pulled.astype(part.dtype), share * (part_delta - delta)))
