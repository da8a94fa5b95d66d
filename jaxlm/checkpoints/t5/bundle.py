"""TensorFlow's checkpoint files (`model.ckpt-1000.index`, `.data-00000-of-00002`), read without TensorFlow.

The index is a table of LevelDB's format: blocks of sorted keys, each key without the beginning that it shares with the
one before, a block of where the blocks are, and a footer (TensorFlow's tensorflow/core/lib/io/format.h). Its values are
protocol buffers: type and shape of a tensor, and where its bytes are in the data files (tensor_bundle.proto).
"""

import dataclasses
import pathlib
import struct
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from jaxlm.checkpoints.huggingface.tensors import Shape

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_TRAILER = 5  # of a block: how it is compressed, and its checksum
_TYPES = {
    1: np.dtype(np.float32),
    2: np.dtype(np.float64),
    3: np.dtype(np.int32),
    9: np.dtype(np.int64),
    14: np.dtype(ml_dtypes.bfloat16),
    19: np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: Shape
    shard: int
    offset: int
    size: int


class Bundle:
    """The tensors of a checkpoint.

    Args:
      prefix: path of its files without `.index`.

    Raises:
      FileNotFoundError: a file of it is missing.
      ValueError: a damaged file, or one in a form that is not read here.
    """

    def __init__(self, prefix: pathlib.Path):
        self.prefix = prefix
        self._index = prefix.with_name(prefix.name + ".index")
        if not self._index.exists():
            raise FileNotFoundError(f"{self._index} is not there; give a TensorFlow checkpoint's folder or prefix.")
        try:
            values = dict(_table(self._index.read_bytes()))
            header = _fields(values.pop(b""))
            self._shards = header.get(1, [1])[0]
            if header.get(2, [0])[0]:
                raise ValueError("it was written by a big-endian machine")
            self._entries = {name.decode(): entry for name, raw in values.items() if (entry := _entry(raw))}
        except (ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{self._index} is no whole TensorFlow checkpoint ({error}); get it again.") from error
        self.shapes: Mapping[str, Shape] = {name: entry.shape for name, entry in self._entries.items()}
        for shard in {entry.shard for entry in self._entries.values()}:
            end = max(e.offset + e.size for e in self._entries.values() if e.shard == shard)
            path = self._file(shard)
            if not path.exists() or path.stat().st_size < end:
                fault = "is cut short" if path.exists() else "is not there"
                raise ValueError(f"{path} {fault}; the checkpoint is not whole, get it again.")

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor, without reading it."""
        return self._entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        entry = self._entries[name]
        with self._file(entry.shard).open("rb") as file:
            file.seek(entry.offset)
            return np.frombuffer(file.read(entry.size), entry.dtype).reshape(entry.shape)

    def _file(self, shard: int) -> pathlib.Path:
        return self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self._shards:05d}")


def _entry(raw: bytes) -> _Entry | None:
    """A tensor's entry; None for what is no array of numbers (strings that Keras writes)."""
    fields = _fields(raw)
    dtype = _TYPES.get(fields.get(1, [0])[0])
    if dtype is None:
        return None
    if 7 in fields:
        raise ValueError("a tensor is stored in slices, which are not read here")
    dims = _fields(fields[2][0]).get(2, []) if 2 in fields else []
    shape = tuple(_fields(dim).get(1, [0])[0] for dim in dims)
    shard, offset, size = (fields.get(number, [0])[0] for number in (3, 4, 5))
    if size != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {list(shape)} has {size} bytes")
    return _Entry(dtype, shape, shard, offset, size)


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a table."""
    footer = data[-_FOOTER:]
    if len(footer) < _FOOTER or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise ValueError("its footer is not a table's")
    at = 0
    for _ in range(2):  # the handle of the meta index, which is not needed
        _, at = _varint(footer, at)
    (offset, at), (size, _) = (first := _varint(footer, at)), _varint(footer, first[1])
    for _, handle in _block(data, offset, size):
        start, at = _varint(handle, 0)
        yield from _block(data, start, _varint(handle, at)[0])


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block."""
    block = data[offset : offset + size]
    if len(block) < size or data[offset + size : offset + size + _TRAILER][:1] != b"\0":
        raise ValueError("a block of its index is cut short or compressed")
    restarts = struct.unpack("<I", block[-4:])[0]
    end, at, key = size - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _fields(message: bytes) -> dict[int, list]:
    """{number: values} of a protocol buffer: integers, and bytes for what has a length."""
    found: dict[int, list] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            value, at = int.from_bytes(message[at : at + width], "little"), at + width
        else:
            raise ValueError(f"a field has the wire type {kind}")
        found.setdefault(number, []).append(value)
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
