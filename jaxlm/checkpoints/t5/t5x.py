"""T5X's checkpoints: `checkpoint`, a msgpack tree, beside a zarr array for each large parameter.

In the place of such a parameter the tree has the array's TensorStore specification (T5X's own writer), or its name
(Orbax). Parameters lie under "target", here left out of their names. Where the layers were scanned,
"encoder/layers/..." has all of them in one array; each is shown here by itself, as "encoder/layers_0/...".
"""

import dataclasses
import itertools
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore
from flax import serialization, traverse_util

from jaxlm.checkpoints.huggingface.tensors import Shape
from jaxlm.checkpoints.stored import some

FILE = "checkpoint"
_PLACEHOLDER = "PLACEHOLDER://"
_EMBEDDING = re.compile(r"(?:decoder/)?token_embedder/embedding")


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array of the folder: in the tree, or in a zarr folder of its own.

    Attributes:
      value: the array, or the folder's path.
      shape, dtype: of the array.
    """

    value: np.ndarray | pathlib.Path
    shape: Shape
    dtype: np.dtype

    def read(self, index: tuple) -> np.ndarray:
        """A part of it."""
        if not isinstance(self.value, pathlib.Path):
            return self.value[index]
        found = tensorstore.open(_spec(self.value), open=True).result()[index].read().result()
        return found.view(self.dtype) if found.dtype == np.uint16 else found


class T5XTensors:
    """The parameters in a T5X checkpoint's folder.

    Args:
      folder: with a file `checkpoint`.

    Raises:
      ValueError: it is no such folder, or a parameter's array is missing or damaged.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        try:
            tree = serialization.msgpack_restore((folder / FILE).read_bytes())
            state = tree.get("optimizer", tree)
            target = traverse_util.flatten_dict(state["target"], sep="/", is_leaf=lambda _, x: _is_spec(x))
        except Exception as error:  # msgpack's own errors have no common class
            raise ValueError(f"{folder / FILE} is no T5X checkpoint ({type(error).__name__}: {error}).") from error
        arrays = {name: self._stored(name, value) for name, value in target.items()}
        self._parts = _unscanned(arrays)
        self.shapes: Mapping[str, Shape] = {
            name: tuple(n for n, i in zip(stored.shape, index) if i == slice(None))
            for name, (stored, index) in self._parts.items()
        }

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor, without reading it."""
        return self._parts[name][0].dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        stored, index = self._parts[name]
        return stored.read(index)

    def _stored(self, name: str, value: Any) -> _Stored:
        if isinstance(value, np.ndarray):
            return _Stored(value, value.shape, value.dtype)
        if isinstance(value, str) and value.startswith(_PLACEHOLDER):
            path = self.folder / value.removeprefix(_PLACEHOLDER)
        elif _is_spec(value):
            path = self.folder / pathlib.PurePosixPath(value["kvstore"].get("path") or value["path"]).name
        else:
            raise ValueError(f"{self.folder / FILE} has a {type(value).__name__} for {name}, not an array.")
        try:
            about = json.loads((path / ".zarray").read_text())
            named = about["dtype"]
            # Before its version 3, T5X wrote bfloat16 as the bits it has.
            brain = named == "bfloat16" or np.dtype(named) == np.uint16
            dtype = np.dtype(ml_dtypes.bfloat16 if brain else named)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, the array of {name}, cannot be read ({error}); get the folder again.") from error
        separator = about.get("dimension_separator", ".")
        parts = itertools.product(*(range(math.ceil(n / c)) for n, c in zip(about["shape"], about["chunks"])))
        names = (separator.join(map(str, part)) or "0" for part in parts)
        # Where the array has a fill value, parts that hold nothing else are left out.
        if about.get("fill_value") is None and (lost := [part for part in names if not (path / part).exists()]):
            raise ValueError(f"{path}, the array of {name}, lacks {some(lost)}; the folder is not whole, get it again.")
        return _Stored(path, tuple(about["shape"]), dtype)


def find_step(folder: pathlib.Path, step: int | None) -> pathlib.Path | None:
    """The folder of one of the checkpoints in a model's folder, the newest if `step` is None; None if there is none.

    Raises:
      ValueError: there are some, but none of this step.
    """
    names = {path: re.fullmatch(r"checkpoint_(\d+)", path.name) for path in folder.glob("checkpoint_*")}
    steps = {int(match[1]): path for path, match in names.items() if match and is_checkpoint(path)}
    if not steps:
        return None
    if step is not None and step not in steps:
        raise ValueError(
            f"{folder} has no T5X checkpoint of step {step} (it has: {', '.join(map(str, sorted(steps)))})."
        )
    return steps[max(steps) if step is None else step]


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether this is the folder of one of T5X's checkpoints."""
    file = folder / FILE
    if not file.is_file():
        return False
    with file.open("rb") as opened:  # TensorFlow keeps a text of that name beside its own checkpoints
        return not opened.read(21).startswith(b"model_checkpoint_path")


def _is_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and {"driver", "kvstore"} <= set(value)


def _spec(path: pathlib.Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}


def _unscanned(arrays: Mapping[str, _Stored]) -> dict[str, tuple[_Stored, tuple]]:
    """{name: (array, what of it)}, with a name for each layer of a scanned stack."""
    widths = [stored.shape[1] for name, stored in arrays.items() if _EMBEDDING.fullmatch(name)]
    found: dict[str, tuple[_Stored, tuple]] = {}
    for name, stored in arrays.items():
        match = re.fullmatch(r"(encoder|decoder)/layers/(.*)", name)
        if match is None:
            found[name] = stored, (slice(None),) * len(stored.shape)
            continue
        scale = arrays.get(f"{match[1]}/layers/pre_mlp_layer_norm/scale")
        if scale is None or len(scale.shape) != 2 or not widths:
            raise ValueError(f"{name} seems to hold all layers, but no norm beside it says how many.")
        # A norm's scale is [width, layers], or the other way round: T5X's `param_scan_axis` is 1 unless set.
        axis = 0 if scale.shape[1] == widths[0] != scale.shape[0] else 1
        for i in range(scale.shape[axis]):
            index = tuple(i if a == axis else slice(None) for a in range(len(stored.shape)))
            found[f"{match[1]}/layers_{i}/{match[2]}"] = stored, index
    return found
