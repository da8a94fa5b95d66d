"""How an optimizer's moments are stored between steps: in fewer bits, rounded without bias."""

import dataclasses
import enum
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.training.parameters import ParameterInfo, Tree, flatten, info_of
from pallas_kernels import dropout

_ORDER = {"mu": 1, "trace": 1, "nu": 2, "v": 2}
"""Which moment a field of an optimizer's state holds: names of optax, and of `AdafactorState`."""


class Rounding(enum.Enum):
    """From float32 to fewer bits. NEAREST: to the nearest number. STOCHASTIC: up or down, so that the mean is right.

    A second moment with decay 0.999 changes by at most a thousandth a step, less than half the distance of two bfloat16
    numbers (2^-9 relative): rounded to nearest, it would never sink.
    """

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


@dataclasses.dataclass(frozen=True)
class MomentStorage:
    """Types in which moments wait for the next step. Updates are computed in float32 from moments not yet rounded.

    Adafactor's factored second moments, which are small, stay in float32.

    Attributes:
      first: of running means of gradients (AdamW, Lion, Muon, SGD's momentum).
      second: of running means of squared gradients (AdamW, Adafactor).
      rounding: see `Rounding`. What is rounded up is a hash of step, parameter and place: the same on every mesh, after
        a restart, and with scanned or unrolled layers.
    """

    first: Literal["float32", "bfloat16"] = "bfloat16"
    second: Literal["float32", "bfloat16"] = "bfloat16"
    rounding: Rounding = Rounding.STOCHASTIC

    def __post_init__(self):
        object.__setattr__(self, "rounding", Rounding(self.rounding))
        for field in ("first", "second"):
            if getattr(self, field) not in ("float32", "bfloat16"):
                raise ValueError(
                    f"MomentStorage.{field} is {getattr(self, field)!r}; moments are stored as 'float32' or 'bfloat16'."
                )

    def dtype(self, order: int) -> jnp.dtype:
        """Of first (1) or second (2) moments."""
        return jnp.dtype(self.first if order == 1 else self.second)


def moment_order(path: tuple) -> int | None:
    """1 or 2 if the leaf at this path (jax's keys) of an optimizer's state is a first or second moment, else None."""
    return next((_ORDER[key.name] for key in path if getattr(key, "name", None) in _ORDER), None)


def stored(
    transform: optax.GradientTransformation, storage: MomentStorage, infos: Tree
) -> optax.GradientTransformationExtraArgs:
    """`transform` with its moments stored as `storage` says; its `update` needs the argument `step`.

    Args:
      transform: its state holds moments under the names of `_ORDER`, each a tree like that of the parameters.
      storage: how.
      infos: a `ParameterInfo` for each parameter.
    """
    inner = optax.with_extra_args_support(transform)
    by_path = flatten(infos)

    def init(params: Tree) -> Any:
        return narrowed(inner.init(params), step=None)

    def update(updates: Tree, state: Any, params: Tree | None = None, *, step: jax.Array, **extra: Any):
        wide = jax.tree_util.tree_map_with_path(
            lambda path, x: x if moment_order(path) is None else x.astype(jnp.float32), state
        )
        updates, new = inner.update(updates, wide, params, step=step, **extra)
        return updates, narrowed(new, step)

    def narrowed(state: Any, step: jax.Array | None) -> Any:
        def narrow(path: tuple, x: jax.Array) -> jax.Array:
            order = moment_order(path)
            if order is None or x.dtype == storage.dtype(order):
                return x
            info = info_of(path, by_path)
            if step is None or info is None or storage.rounding is Rounding.NEAREST:
                return x.astype(storage.dtype(order))
            return _round_stochastically(x, _seeds(info, step, order))

        return jax.tree_util.tree_map_with_path(narrow, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _seeds(info: ParameterInfo, step: jax.Array, order: int) -> jax.Array:
    """uint32 of this step: a scalar, or [layers, 1, ...] with one for each layer of a stacked array."""
    names = np.array([zlib.crc32(name.encode()) for name in info.names], np.uint32)
    of_step = dropout.seed_of(jax.random.fold_in(jax.random.key(order), step))
    return of_step ^ (names.reshape(-1, *(1,) * (len(info.shape) - 1)) if info.stacked else names[0])


def _round_stochastically(x: jax.Array, seeds: jax.Array) -> jax.Array:
    """float32 to bfloat16, up with the probability with which it must for the mean to be x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # The 16 bits that bfloat16 lacks are what is left over; a random number of as many bits carries at that rate.
    indices = jnp.indices(x.shape[seeds.ndim and 1 :], sparse=True)
    noise = dropout.entry_bits(seeds, indices) >> 16
    rounded = jax.lax.bitcast_convert_type((bits + noise) & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
