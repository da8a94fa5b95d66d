"""Pickled PyTorch checkpoints (`pytorch_model.bin`), read weights-only where that was asked for. Needs torch."""

import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.checkpoints.huggingface.files import BUFFERS, read_json

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


class PickledFolder:
    """The tensors of a folder with pickles, with the methods of `files.TensorFolder`.

    torch's weights-only reader makes tensors and plain containers alone and refuses whatever would run code.

    Args:
      folder: with `pytorch_model.bin`, or shards and their index.

    Raises:
      FileNotFoundError: no such files.
      ValueError: torch is not installed, or a file is damaged or holds more than tensors.
    """

    def __init__(self, folder: pathlib.Path):
        index = read_json(folder / INDEX).get("weight_map", {})
        files = sorted(set(index.values())) or [SINGLE]
        self._tensors: dict[str, Any] = {}
        places = set()
        for file in files:
            for name, tensor in _load(folder / file).items():
                place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
                # safetensors has no two names for one array: tied weights are there once.
                if not name.endswith(BUFFERS) and place not in places:
                    places.add(place)
                    self._tensors[name] = tensor
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        tensor, dtype = self._tensors[name].contiguous(), self.dtype(name)
        if dtype == ml_dtypes.bfloat16:
            import torch

            return tensor.view(torch.uint16).numpy().view(dtype)
        return tensor.numpy()

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor."""
        return np.dtype(str(self._tensors[name].dtype).removeprefix("torch."))


def _load(path: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is pickled, and reading it needs torch ({error}): python -m pip install -e '.[torch]' in the "
            f"clone."
        ) from None
    if "/" in path.name or not path.is_file():
        raise FileNotFoundError(f"{path} is not there; the folder is not whole.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle raises whatever it meets
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is damaged or holds more than weights ({reason}); it was not read.") from None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} holds something else than named tensors; give a model's weights.")
    return found
