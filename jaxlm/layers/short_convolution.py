"""A causal convolution over a few tokens, each channel by itself: what recurrent layers look at before their state."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.cache import PackedTexts
from jaxlm.layers.parameters import Dims, ParameterMaker, PathKey


class ShortConvolution(nnx.Module):
    """[B, T, *channels] -> [B, T, *channels]; a token sees itself and the `taps` - 1 before it in its text.

    Values start as PyTorch's Conv1d has them, but normal and not uniform: of variance 1 / (3 taps).
    """

    def __init__(self, make: ParameterMaker, channels: Dims, taps: int, *, bias: bool, dtype: jnp.dtype, key: PathKey):
        std = 1.0 / math.sqrt(3 * taps)
        self.kernel = make.table(key.at("kernel"), ((None, taps), *channels), std)  # the last is the token's own
        self.bias = make.vector(channels, 0.0) if bias else None
        self.taps, self.dtype = taps, dtype

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Of whole rows; a text of a packed row sees nothing of the one before it, not even its NaNs.

        Args:
          x: [B, T, *channels].
          segment_ids: int32 [B, T]; None: each row is one text.
        """
        shifted = [x]
        for back in range(1, self.taps):
            earlier = _delayed(x, back, 0)
            if segment_ids is not None:
                same = segment_ids == _delayed(segment_ids, back, -1)
                earlier = jnp.where(same.reshape(same.shape + (1,) * (x.ndim - 2)), earlier, 0)
            shifted.insert(0, earlier)
        return self._weighted(shifted)

    def window(self, x: jax.Array, texts: PackedTexts) -> jax.Array:
        """What the token after each of N texts sees of it, [N, taps - 1, *channels], from packed rows x."""
        return texts.before_end(x, self.taps - 1)

    def extend(self, x: jax.Array, window: jax.Array, present: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Of t new tokens.

        Args:
          x: [B, t, *channels].
          window: [B, taps - 1, *channels], what came before them; zeros before a text.
          present: bool [B, t], False on tokens that do not count, which come last; None: all do.

        Returns:
          [B, t, *channels], and the window after the tokens that count.
        """
        count, whole = x.shape[1], jnp.concatenate([window.astype(x.dtype), x], axis=1)
        out = self._weighted([whole[:, tap : tap + count] for tap in range(self.taps)])
        ends = jnp.full(len(x), count) if present is None else jnp.sum(present, axis=1)
        places = ends[:, None] + jnp.arange(self.taps - 1)
        return out, whole[jnp.arange(len(x))[:, None], places].astype(window.dtype)

    def _weighted(self, shifted: list[jax.Array]) -> jax.Array:
        """The sum over taps, taken in float32."""
        kernel = self.kernel[...]
        out = sum(x.astype(jnp.float32) * kernel[tap] for tap, x in enumerate(shifted))
        return (out if self.bias is None else out + self.bias[...]).astype(self.dtype)


def _delayed(x: jax.Array, steps: int, fill: int) -> jax.Array:
    """x [B, T, ...] that many steps later, `fill` before a row's first."""
    length = x.shape[1]
    return jnp.pad(x, [(0, 0), (steps, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)[:, :length]
