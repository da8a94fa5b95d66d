"""A block beside which a convolution reads the same input: the first layer of DeBERTa-v2's large models."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp

from jaxlm.layers.block import Block, BlockConfig, Surroundings
from jaxlm.layers.context import Context
from jaxlm.layers.feed_forward import Activation
from jaxlm.layers.norms import Norm
from jaxlm.layers.parameters import Linear, ParameterMaker, PathKey
from jaxlm.layers.side_values import SideValues
from pallas_kernels.masks import Full, Mask, Segments


@dataclasses.dataclass(frozen=True)
class ConvolvedBlockConfig(BlockConfig):
    """norm(block(x) + activation(dropout(convolution(x)))), for encoders.

    The convolution runs over the tokens of a text with all channels, and sees as far to either side (github.com/
    microsoft/DeBERTa, DeBERTa/deberta/bert.py, ConvLayer).

    Attributes:
      taps: tokens that it sees, an odd number.
      convolution_activation: of its result.
    """

    taps: int = 3
    convolution_activation: Activation = Activation.TANH

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "convolution_activation", Activation(self.convolution_activation))
        if self.taps < 1 or self.taps % 2 == 0:
            raise ValueError(f"ConvolvedBlockConfig.taps={self.taps} must be odd: a token and as many on either side.")

    @override
    def build(self, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey) -> "ConvolvedBlock":
        return ConvolvedBlock(self, make, dtype=dtype, key=key)


class ConvolvedBlock(Block):
    """[B, T, E] -> [B, T, E]."""

    def __init__(self, config: ConvolvedBlockConfig, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey):
        super().__init__(config, make, dtype=dtype, key=key)
        embed, same = (("embed", make.width),), ((None, make.width),)
        inputs = ((None, config.taps), *embed)
        self.convolution = Linear(make, inputs, same, bias=True, dtype=dtype, key=key.at("convolution"))
        self.convolution_norm = Norm(config.norm, make, embed)

    @override
    def __call__(self, x: jax.Array, around: Surroundings, context: Context) -> tuple[jax.Array, SideValues]:
        seen = _neighbours(x, self.config.taps, _texts(around.mask, context))
        beside = context.fold("convolution").dropout(self.convolution(seen, context), self.config.dropout)
        out, side = super().__call__(x, around, context)
        beside = self.config.convolution_activation(beside)
        return context.ops.constrain(self.convolution_norm(out + beside), ("batch", "length", "embed")), side

    @override
    def prefill(self, *args, **options):
        raise ValueError("A block with a convolution to both sides writes no text; it serves encoders.")


def _neighbours(x: jax.Array, taps: int, segment_ids: jax.Array | None) -> jax.Array:
    """[B, T, E] -> [B, T, taps, E]: the tokens around each one in its text, zeros beyond it."""
    reach, length = taps // 2, x.shape[1]
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    around = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    whose = jnp.pad(ids, ((0, 0), (reach, reach)), constant_values=-1)
    columns = [
        jnp.where((whose[:, tap : tap + length] == ids)[..., None], around[:, tap : tap + length], 0)
        for tap in range(taps)
    ]
    return jnp.stack(columns, axis=2)


def _texts(mask: Mask, context: Context) -> jax.Array | None:
    """Segment ids of an encoder's mask; None: each row is one text."""
    if context.ops.splits_length:
        raise ValueError(
            "A convolution needs its rows whole, but the mesh splits them along their length; set "
            "MeshConfig.sequence to 1."
        )
    if isinstance(mask, Full):
        return None
    if isinstance(mask, Segments) and mask.kv_ids is None:
        return mask.q_ids
    raise ValueError(f"A convolution to both sides serves encoders; it cannot do what the mask {mask} says.")
