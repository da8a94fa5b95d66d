"""Checkpoints of schedule-free runs (arXiv 2405.15682), whose trained model is not the parameters that they hold.

On disk are y, where gradients are taken ("params"), and z, the newest iterate ("opt_state/<algorithm>/z"). What one
evaluates and ships is the average x of the iterates: y = b1 x + (1 - b1) z.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import override

import jax
import numpy as np

from jaxlm.checkpoints import naming
from jaxlm.checkpoints.sources import Source
from jaxlm.checkpoints.stored import Request, StoredCheckpoint, groups, stacker


def evaluated(source: Source) -> Source:
    """The source as what it trained: its "params" are those that `Optimizer.evaluation_params` gives."""
    if not isinstance(source, StoredCheckpoint) or isinstance(source, Averaged):
        return source
    found = {path[1] for path in source.leaves if path[0] == "opt_state" and path[2:3] == ("z",)}
    found = {name for name in found if ("opt_state", name, "b1") in source.leaves}
    if not found:
        return source
    (algorithm,) = found
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    return Averaged(**fields, algorithm=algorithm)


@dataclasses.dataclass(frozen=True)
class Averaged(StoredCheckpoint):
    """A schedule-free run's checkpoint, its parameters the average of the iterates.

    Attributes:
      algorithm: its name in the optimizer's state.
    """

    algorithm: str

    @override
    def read(self, requests: Mapping[naming.Path, Request]) -> dict[naming.Path, jax.Array]:
        made = {name: request for name, request in requests.items() if any(map(self._newest, request.paths))}
        values = super().read({name: request for name, request in requests.items() if name not in made})
        for group in groups(made):
            layers = {path: made[name].layer for name in group for path in made[name].paths}
            on_disk = layers | {z: layer for path, layer in layers.items() if (z := self._newest(path)) is not None}
            arrays = super().read(
                {
                    path: Request((path,), None, layer.shape, self.leaves[path].dtype, layer.sharding)
                    for path, layer in on_disk.items()
                }
            )
            for name in group:
                parts = [self._value(path, arrays).astype(made[name].dtype) for path in made[name].paths]
                values[name] = stacker(made[name])(*parts) if made[name].stacked else parts[0]
        return values

    @override
    def array(self, path: naming.Path) -> np.ndarray:
        at = {path, self._newest(path)} - {None}
        return np.asarray(self._value(path, {path: super(Averaged, self).array(path) for path in at}))

    def _newest(self, path: naming.Path) -> naming.Path | None:
        """Where z of a parameter is; None for what was not trained, and for other arrays."""
        newest = ("opt_state", self.algorithm, "z", *path[1:])
        return newest if path[0] == "params" and newest in self.leaves else None

    def _value[T: (jax.Array, np.ndarray)](self, path: naming.Path, arrays: Mapping[naming.Path, T]) -> T:
        newest = self._newest(path)
        return arrays[path] if newest is None else (arrays[path] - (1 - self._b1) * arrays[newest]) / self._b1

    @functools.cached_property
    def _b1(self) -> np.float32:
        return np.float32(super().array(("opt_state", self.algorithm, "b1")))
