"""A block of Mamba: norm, mixer, residual. There is no feed-forward layer; the mixer has the width of one."""

import dataclasses
from typing import ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.block import BlockKind, Surroundings, TokenSizes, Ways
from jaxlm.layers.cache import CacheConfig, Extension, PackedTexts, RecurrentCache
from jaxlm.layers.context import Context
from jaxlm.layers.mamba import MambaConfig
from jaxlm.layers.mamba2 import Mamba2Config
from jaxlm.layers.norms import Norm, NormConfig
from jaxlm.layers.parameters import ParameterMaker, PathKey
from jaxlm.layers.side_values import NO_SIDE_VALUES, SideValues
from pallas_kernels.masks import running_segments


@dataclasses.dataclass(frozen=True)
class MambaBlockConfig(BlockKind):
    """x + mixer(norm(x)). In `StackConfig.blocks` it may stand beside others, for a hybrid.

    Attributes:
      mixer: of Mamba or Mamba-2.
      norm: before it.
      dropout: rate on its output.
    """

    mixer: MambaConfig | Mamba2Config
    norm: NormConfig
    dropout: float = 0.0

    branches: ClassVar[int] = 1

    @property
    @override
    def running_state(self) -> str | None:
        return type(self.mixer).__name__

    @override
    def mixing_flops(self, length: int, encoder_length: int, *, both_sides: bool) -> float:
        return self.mixer.mixing_flops(length)

    @override
    def token_sizes(self, width: int, ways: Ways) -> TokenSizes:
        mixed, products, everything = self.mixer.token_sizes(ways)
        named = {"up": mixed, "gate": mixed}  # a number for each inner channel, as there
        return TokenSizes(mixed, products + width, everything + 2 * width, named)

    @override
    def build(self, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey) -> "MambaBlock":
        return MambaBlock(self, make, dtype=dtype, key=key)


class MambaBlock(nnx.Module):
    """[B, T, E] -> [B, T, E]."""

    def __init__(self, config: MambaBlockConfig, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey):
        self.norm = Norm(config.norm, make, (("embed", make.width),))
        self.mixer = config.mixer.build(make, residual_gain=make.residual_gain, dtype=dtype, key=key.at("mixer"))
        self.config = config

    def __call__(self, x: jax.Array, around: Surroundings, context: Context) -> tuple[jax.Array, SideValues]:
        """x after the block, and its side values; `around` is what the stack's blocks share."""
        inner = context.fold("mixer")
        y = self.mixer(self.norm(x), running_segments(around.mask), inner)
        return self._joined(x, y, inner), NO_SIDE_VALUES

    def prefill(
        self,
        x: jax.Array,
        around: Surroundings,
        texts: PackedTexts,
        sources: PackedTexts | None,
        caching: CacheConfig,
        context: Context,
    ) -> tuple[jax.Array, RecurrentCache]:
        """x [R, T, E] after the block, and what it remembers of the N texts in these rows; see `Block.prefill`."""
        del sources, caching  # a state is float32
        inner = context.fold("mixer")
        y, cache = self.mixer.prefill(self.norm(x), running_segments(around.mask), texts, inner)
        return self._joined(x, y, inner), cache

    def extend(
        self, x: jax.Array, new: Extension, cache: RecurrentCache, context: Context
    ) -> tuple[jax.Array, RecurrentCache]:
        """x [B, t, E] after the block, t new tokens of each slot, and the cache with them in it."""
        inner = context.fold("mixer")
        y, cache = self.mixer.extend(self.norm(x), cache, new.present, inner)
        return self._joined(x, y, inner), cache

    def _joined(self, x: jax.Array, y: jax.Array, context: Context) -> jax.Array:
        x = x + context.fold("out").dropout(y, self.config.dropout)
        return context.ops.constrain(x, ("batch", "length", "embed"))
