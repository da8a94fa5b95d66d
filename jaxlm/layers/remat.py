"""Rematerialisation: what a block keeps for its backward pass, on the device or the host, and what it computes again.

A block's activations have names (`ACTIVATIONS`). A policy lists which are kept; everything else is computed again from
the block's input, which is always there.
"""

import dataclasses
import difflib
import enum
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.residuals import ATTENTION_LSE, ATTENTION_OUT

ACTIVATIONS = {
    "block_input": "[B, T, E], a block's input; on the device anyway, so it is named to move it to the host",
    "query": "[B, T, H, D], as attention takes them: normalised and rotated",
    "key": "[B, S, G, D], likewise",
    "value": "[B, S, G, D]",
    ATTENTION_OUT: "[B, T, H, D], before the output projection; of a recurrent layer, what it reads of its state",
    ATTENTION_LSE: "[B, H, T] float32, log-sum-exp of the scores: with attention_out, all that a kernel's backward "
    "pass needs of its forward pass",
    "gate": "[B, T, F], the feed-forward layer's product before its activation; of experts [rows, F], as is up",
    "up": "[B, T, F], the feed-forward layer's other product, or its only one",
    "product": "the result of a product in 8 bits, in the type of activations",
}
"""Names of what can be kept, and what it is."""


class Remat(enum.Enum):
    """What the backward pass computes again, from the least to the most.

    NONE: nothing.
    DOTS: all but the results of matrix products and of attention.
    DOTS_NO_BATCH: all but products with parameters (attention is computed again): T5X's and MaxText's "minimal".
    BLOCK: all but attention, whose output and log-sum-exp are kept: two passes through every matrix, one through the
      attention kernel.
    FULL: everything, from the block's input.
    OFFLOAD: as BLOCK, but what is kept, with the block's input, lies in the host's memory meanwhile: the device holds
      nothing of a layer until its backward pass.
    """

    NONE = "none"
    DOTS = "dots"
    DOTS_NO_BATCH = "dots_no_batch"
    BLOCK = "block"
    FULL = "full"
    OFFLOAD = "offload"


@dataclasses.dataclass(frozen=True)
class SaveNamed:
    """Keeps the activations of these names (`ACTIVATIONS`), computes all others again.

    Attributes:
      on_device: what stays on the device.
      on_host: what is moved to the host's memory until the backward pass asks for it.
    """

    on_device: tuple[str, ...] = ()
    on_host: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("on_device", "on_host"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for name in self.on_device + self.on_host:
            if name not in ACTIVATIONS:
                close = difflib.get_close_matches(name, ACTIVATIONS, n=1)
                raise ValueError(
                    f"SaveNamed names the activation {name!r}, which does not exist"
                    f"{f'; did you mean {close[0]!r}?' if close else f': there are {list(ACTIVATIONS)}.'}"
                )
        if both := sorted(set(self.on_device) & set(self.on_host)):
            raise ValueError(f"SaveNamed keeps {both} on the device and on the host; choose one.")


RematPolicy = Remat | SaveNamed

_ATTENTION = (ATTENTION_OUT, ATTENTION_LSE)
_NAMED = {
    Remat.BLOCK: SaveNamed(on_device=_ATTENTION),
    Remat.FULL: SaveNamed(),
    Remat.OFFLOAD: SaveNamed(on_host=("block_input", *_ATTENTION)),
}


def as_names(policy: RematPolicy) -> SaveNamed | None:
    """The policy as the names that it keeps; None where it goes by kinds of operations."""
    found = _NAMED.get(policy, policy)
    return found if isinstance(found, SaveNamed) else None


def offloads(policy: RematPolicy) -> bool:
    """Whether something is kept in the host's memory."""
    found = as_names(policy)
    return found is not None and bool(found.on_host)


def name_activation(x: jax.Array, name: str) -> jax.Array:
    """`x` under one of the names of `ACTIVATIONS`, by which a policy may keep it."""
    if name not in ACTIVATIONS:
        raise ValueError(f"There is no activation {name!r}; add it to jaxlm.layers.remat.ACTIVATIONS.")
    return checkpoint_name(x, name)


def rematerialized(function: Callable, policy: RematPolicy, *, scanned: bool) -> Callable:
    """`function`, of arrays, so that its backward pass computes again what `policy` says.

    Args:
      function: takes and gives pytrees of arrays.
      policy: see `Remat` and `SaveNamed`.
      scanned: it is the body of a scan. Its forward and backward passes are then loops of their own, which XLA cannot
        merge back into one; elsewhere that is prevented, at some cost.
    """
    if policy is Remat.NONE:
        return function
    return jax.checkpoint(function, policy=_saveable(policy), prevent_cse=not scanned)


def _saveable(policy: RematPolicy) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    match policy:
        case Remat.DOTS:
            return policies.save_from_both_policies(_products(policies.dots_saveable), _names(*_ATTENTION))
        case Remat.DOTS_NO_BATCH:
            return _products(policies.dots_with_no_batch_dims_saveable)
    kept = as_names(policy)
    if not kept.on_host:
        return _names(*kept.on_device)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(kept.on_device),
        names_which_can_be_offloaded=list(kept.on_host),
        offload_src="device",
        offload_dst="pinned_host",
    )


def _names(*names: str) -> Callable[..., Any]:
    return jax.checkpoint_policies.save_only_these_names(*names)


def _products(saveable: Callable[..., Any]) -> Callable[..., Any]:
    """`saveable`, but of a product in 8 bits its scaled result and not its accumulator, which is twice as large."""

    def policy(primitive, *operands, **parameters):
        if operands and any(operand.dtype.itemsize == 1 for operand in operands):
            return False
        return saveable(primitive, *operands, **parameters)

    return jax.checkpoint_policies.save_from_both_policies(policy, _names("product"))
