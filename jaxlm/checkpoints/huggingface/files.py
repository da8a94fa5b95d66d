"""Safetensors folders, read tensor by tensor and written tensor by tensor: no more than one is held in memory.

The format is a length, a JSON header with the type, shape and place of each tensor, and their bytes one after the other
(github.com/huggingface/safetensors). Reading is the library's; its writer wants all tensors of a file at once.
"""

import contextlib
import json
import pathlib
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlm.checkpoints.pending import Pending, put_in_order

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Constants that modules of old kept among their weights: masks, frequencies, position numbers.
BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq", "position_ids")
_ROWS = 64  # at least, of a transposed view: enough to use whole lines of the processor's cache
_PIECE_BYTES = 1 << 20  # of a transposed view, put in order and written at once
_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


class TensorFolder:
    """The tensors of a Hugging Face checkpoint, but for `BUFFERS`.

    Args:
      folder: with `model.safetensors`, or shards and their index.

    Raises:
      FileNotFoundError: no tensors there, or a shard is missing.
      ValueError: only pickled tensors (`.bin`), a damaged file, or an index that names other tensors than there are.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._file_of = self._files()
        self._open: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._file_of.values())):
            names = set(self._handle(file).keys())
            listed = {name for name, of in self._file_of.items() if of == file}
            if names != listed:
                raise ValueError(
                    f"{folder / INDEX} and {file} disagree about {sorted(names ^ listed)[:4]}; the folder is not "
                    f"whole, get it again."
                )
            for name in names:
                if name.endswith(BUFFERS):
                    continue
                self.shapes[name] = tuple(self._handle(file).get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._handle(self._file_of[name]).get_tensor(name)

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor, without reading it."""
        return _TYPES[self._handle(self._file_of[name]).get_slice(name).get_dtype()]

    def _files(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            return dict(json.loads((self.folder / INDEX).read_text())["weight_map"])
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._handle_of(SINGLE).keys(), SINGLE)
        if list(self.folder.glob("*.bin")):
            raise ValueError(
                f"{self.folder} holds pickled tensors (.bin), which can run code when they are read; save the model "
                f"again with transformers, which writes safetensors, or convert it with tools/convert_checkpoint.py "
                f"--allow_pickle, which reads weights only."
            )
        raise FileNotFoundError(f"{self.folder} has neither {SINGLE} nor {INDEX}; give a Hugging Face model's folder.")

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = self._handle_of(file)
        return self._open[file]

    def _handle_of(self, file: str) -> Any:
        path = self.folder / file
        if "/" in file or not path.exists():
            raise FileNotFoundError(f"{path}, which the index names, is not there; the folder is not whole.")
        try:
            return safe_open(path, framework="np")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); get it again.") from error


def write_tensors(folder: pathlib.Path, tensors: Mapping[str, Pending], *, shard_bytes: int = 5 << 30) -> None:
    """Writes safetensors into a folder: one file, or shards of at most about `shard_bytes` and their index."""
    shards: list[dict[str, Pending]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0])
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        _write_file(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path: pathlib.Path, tensors: Mapping[str, Pending]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        places = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            for numbers in _in_order(tensor.made(name)):
                file.write(numbers.view(np.uint8).data)


def _in_order(value: np.ndarray) -> Iterator[np.ndarray]:
    """A tensor's numbers in their order: at once where they lie so, else a few rows at a time, in memory used again."""
    if value.ndim < 2 or value.flags.c_contiguous:
        yield np.ascontiguousarray(value).reshape(-1)
        return
    if value.ndim > 2 and value[0].nbytes >= _PIECE_BYTES:
        for part in value:
            yield from _in_order(part)
        return
    rows = max(_ROWS, _PIECE_BYTES // max(1, value[0].nbytes))
    ordered = np.empty((min(rows, len(value)), *value.shape[1:]), value.dtype)
    for start in range(0, len(value), rows):
        part = value[start : start + rows]
        put_in_order(part, ordered[: len(part)])
        yield ordered[: len(part)].reshape(-1)


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into that takes its name only when all is written: a half-written one never looks complete.

    Raises:
      FileExistsError: it exists already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it, or give another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file.

    Raises:
      ValueError: it is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); get it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object; get it again.")
    return found


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes an object as a file that people can read."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
