"""Tensors under the names that they have today."""

from collections.abc import Mapping

import numpy as np

from jaxlm.checkpoints.huggingface.tensors import Shape
from jaxlm.checkpoints.tabulated import Tensors


class RenamedTensors:
    """A folder's tensors, those with other names under today's.

    Args:
      tensors: under the names that they have in the folder.
      endings: {how a name may end: how it ends today}.

    Attributes:
      shapes: {name: shape}.
      again: {name: today's name} of tensors that are there under today's name as well, and keep theirs.
    """

    def __init__(self, tensors: Tensors, endings: Mapping[str, str]):
        def today(name: str) -> str:
            old = next((ending for ending in endings if name.endswith(ending)), "")
            return name.removesuffix(old) + endings.get(old, "")

        self._tensors = tensors
        self._found: dict[str, str] = {}  # {name: that in the folder}
        self.again: dict[str, str] = {}
        for name in sorted(tensors.shapes, key=lambda name: (today(name) != name, name)):
            if today(name) in self._found:
                self.again[name] = today(name)
            self._found[name if name in self.again else today(name)] = name
        self.shapes: dict[str, Shape] = {name: tensors.shapes[found] for name, found in self._found.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._tensors.read(self._found[name])

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor, without reading it."""
        return self._tensors.dtype(self._found[name])
