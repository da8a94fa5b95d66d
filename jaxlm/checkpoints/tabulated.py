"""A foreign checkpoint seen through a table that says which tensor holds which parameter."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxlm.checkpoints import naming, stored
from jaxlm.checkpoints.huggingface.tensors import Entry, Shape, Table
from jaxlm.layers.stacking import StackLayout
from jaxlm.models.config import ModelConfig

_Split = dict[str, dict[str, np.ndarray]]  # {tensor: {parameter: what it holds of it}}


class Tensors(Protocol):
    """Named tensors on disk.

    Attributes:
      shapes: {name: shape}.
    """

    shapes: Mapping[str, Shape]

    def read(self, name: str) -> np.ndarray:
        """One tensor."""

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor, without reading it."""


@dataclasses.dataclass(frozen=True)
class TabulatedCheckpoint:
    """Another library's checkpoint, to be read like one of our own (`stored.StoredCheckpoint`).

    Attributes:
      folder: where it is.
      config: the model it holds, in float32, initialised anyhow.
      tensors: its tensors, by name.
      table: which of them holds which parameter.
      shapes: {path: shape} of the parameters, layers one by one.
    """

    folder: pathlib.Path
    config: ModelConfig
    tensors: Tensors
    table: Table
    shapes: Mapping[str, Shape]

    @property
    def leaves(self) -> dict[naming.Path, jax.ShapeDtypeStruct]:
        """{path: shape and type} as in a checkpoint: ("params", "decoder", "layers", "17", ...)."""
        return {
            ("params", *path.split("/")): jax.ShapeDtypeStruct(self.shapes[path], self.tensors.dtype(entry.name))
            for entry in self.table
            for path in entry.paths
        }

    def array(self, path: naming.Path) -> np.ndarray:
        """One array, whole, in this process's memory."""
        return self._parameter(naming.show(path[1:]), {})

    def read(self, requests: Mapping[naming.Path, stored.Request]) -> dict[naming.Path, jax.Array]:
        """The arrays asked for, tensor after tensor; see `stored.StoredCheckpoint.read`."""
        split: _Split = {}  # fused tensors come again for each of their parameters

        def parameter(path: naming.Path, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            value = self._parameter(naming.show(path[1:]), split)
            return jax.device_put(np.asarray(value, wanted.dtype), wanted.sharding)

        values = {}
        for name, request in requests.items():
            parts = [parameter(path, request.layer) for path in request.paths]
            values[name] = stored.stacker(request)(*parts) if request.stacked else parts[0]
        return values

    def load(self, params: Any, layouts: tuple[StackLayout, ...]) -> Any:
        """All parameters.

        Args:
          params: those of the model `config` as a tree of `jax.ShapeDtypeStruct` (or arrays): shapes, types, shardings.
          layouts: its scanned stacks.
        """
        values = self.read(stored.requests_for({"params": params}, layouts))
        paths = naming.flatten(params)
        return jax.tree.unflatten(jax.tree.structure(params), [values["params", *path] for path in paths])

    @functools.cached_property
    def _homes(self) -> dict[str, list[Entry]]:
        """{parameter: the entry of its tensor, or of those that hold its rows}."""
        homes: dict[str, list[Entry]] = {}
        for entry in self.table:
            for path in entry.paths:
                homes.setdefault(path, []).append(entry)
        return homes

    def _parameter(self, name: str, split: _Split) -> np.ndarray:
        first, *_ = homes = self._homes[name]
        if first.row is None:
            return self._held(first, name, split)
        value = np.empty(self.shapes[name], self.tensors.dtype(first.name))
        for entry in homes:
            value[entry.row] = self._held(entry, name, split)
        return value

    def _held(self, entry: Entry, path: str, split: _Split) -> np.ndarray:
        """What a tensor holds of a parameter; `split` is the tensor read last."""
        if entry.name not in split:
            split.clear()
            parts = entry.form.split(self.tensors.read(entry.name), entry.held(self.shapes))
            split[entry.name] = dict(zip(entry.paths, parts, strict=True))
        return split[entry.name][path]
