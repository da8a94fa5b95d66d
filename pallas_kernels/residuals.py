"""Names of what attention keeps for its backward pass, so that a `jax.checkpoint` around it may keep it too.

Inside `jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT, ATTENTION_LSE))` a
kernel's forward pass runs once: its backward pass needs no more than q, k, v and these.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION_OUT = "attention_out"
ATTENTION_LSE = "attention_lse"


def named(out: jax.Array, lse: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """The result of a backend under these names.

    A kernel names them in its rule for the forward pass, where they are what the backward pass gets: an array named
    again further out would be kept twice.
    """
    return checkpoint_name(out, ATTENTION_OUT), None if lse is None else checkpoint_name(lse, ATTENTION_LSE)
