"""Which tokens of a row each device holds, where rows are split along their length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RowOrder:
    """A row of `length` tokens over `devices` devices, in runs of neighbouring tokens.

    Plain: device i holds the i-th of n equal runs. Balanced: the row is cut into 2n runs and device i holds run i and
    run 2n - 1 - i, so that under a causal mask, where a token's work grows with its place, all have the same to do
    (Llama 3, arXiv 2407.21783, 3.3.2). The tokens of all devices, one device after the other, are the mesh's order.

    Attributes:
      length: tokens of a row, a multiple of the number of runs.
      devices: n.
      balanced: as above.
    """

    length: int
    devices: int
    balanced: bool

    @property
    def runs(self) -> int:
        """Runs that a device holds."""
        return 2 if self.balanced else 1

    @property
    def run_length(self) -> int:
        """Tokens of a run."""
        return self.length // (self.devices * self.runs)

    @property
    def order(self) -> np.ndarray:
        """int [devices * runs]: the runs of the row in the mesh's order."""
        first = np.arange(self.devices)
        return np.stack([first, 2 * self.devices - 1 - first], axis=1).ravel() if self.balanced else first

    def starts(self, device: jax.Array | int) -> jax.Array:
        """int32 [runs]: the first token of each run of a device."""
        return (jnp.asarray(self.order, jnp.int32) * self.run_length).reshape(-1, self.runs)[device]

    def arrange(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """`x` with its tokens in the mesh's order."""
        return self._take(x, self.order, axis)

    def restore(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The reverse of `arrange`."""
        return self._take(x, np.argsort(self.order), axis)

    def _take(self, x: jax.Array, runs: np.ndarray, axis: int) -> jax.Array:
        if not self.balanced:
            return x
        cut = x.reshape(*x.shape[:axis], len(runs), -1, *x.shape[axis + 1 :])
        return jnp.take(cut, runs, axis=axis).reshape(x.shape)
