"""Tables that say which tensor of a Hugging Face checkpoint holds which parameter, and in which form.

A family's table has an `Entry` a tensor: its name, the path of the parameter (or parameters) in it, and how one becomes
the other. It is read in both directions. Entries of parts that a model lacks (a bias, an output matrix of its own) are
left out by `resolve`, which also checks that what is left covers every parameter once.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Form(Protocol):
    """How the parameters in a tensor are laid out in it."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        """The tensor's shape, for parameters of these shapes."""

    def join(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        """The tensor that holds these parameters."""

    def split(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        """The parameters, of these shapes, in a tensor of the right shape."""


@dataclasses.dataclass(frozen=True)
class Same(Form):
    """The parameter as it is: tables."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        (shape,) = shapes
        return shape

    def join(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        (value,) = values
        return value

    def split(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        return (tensor,)


@dataclasses.dataclass(frozen=True)
class Vector(Form):
    """A scale or bias as one row, whatever axes it has with us: [heads, head_dim] -> [heads * head_dim].

    Several, one after the other, are the bias of fused projections.
    """

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return (sum(_size(shape) for shape in shapes),)

    def join(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.concatenate([value.reshape(-1) for value in values])

    def split(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        parts = np.split(tensor, _borders(shapes, 0))
        return tuple(part.reshape(shape) for part, shape in zip(parts, shapes))


@dataclasses.dataclass(frozen=True)
class Linear(Form):
    """A kernel [*inputs, *outputs] as PyTorch's Linear [outputs, inputs]; several are fused along their outputs.

    Attributes:
      inputs: number of the kernel's input axes.
      transposed: [inputs, outputs], as in GPT-2's Conv1D.
    """

    inputs: int = 1
    transposed: bool = False

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        rows, columns = self._matrix(shapes[0])[0], sum(self._matrix(shape)[1] for shape in shapes)
        return (rows, columns) if self.transposed else (columns, rows)

    def join(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        parts = [value.reshape(self._matrix(value.shape)) for value in values]
        whole = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]  # which is no copy
        return whole if self.transposed else whole.T

    def split(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        parts = np.split(tensor, _borders(shapes, self.inputs), axis=1 if self.transposed else 0)
        return tuple(self._kernel(part, shape) for part, shape in zip(parts, shapes))

    def _kernel(self, part: np.ndarray, shape: Shape) -> np.ndarray:
        if self.transposed:
            return part.reshape(shape)
        outputs = len(shape) - self.inputs
        turned = part.reshape(*shape[self.inputs :], *shape[: self.inputs])  # no copy, as that of `part.T` would be
        return turned.transpose(*range(outputs, len(shape)), *range(outputs))

    def _matrix(self, shape: Shape) -> Shape:
        return _size(shape[: self.inputs]), _size(shape[self.inputs :])


@dataclasses.dataclass(frozen=True)
class ByHead(Form):
    """Query, key and value of each head side by side (GPT-NeoX): [heads * 3 * head_dim, inputs], or the biases."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        *inputs, heads, dims = shapes[0]
        return (heads * len(shapes) * dims, *inputs)

    def join(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        stacked = np.stack(values, axis=-2)  # [*inputs, heads, 3, head_dim]
        return np.moveaxis(stacked.reshape(*values[0].shape[:-2], -1), -1, 0)

    def split(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        *inputs, heads, dims = shapes[0]
        stacked = np.moveaxis(tensor, 0, -1).reshape(*inputs, heads, len(shapes), dims)
        return tuple(stacked[..., i, :] for i in range(len(shapes)))


@dataclasses.dataclass(frozen=True)
class Taps(Form):
    """Kernels [taps, *channels] of depthwise convolutions as PyTorch's Conv1d [channels, 1, taps], side by side."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return (sum(_size(shape[1:]) for shape in shapes), 1, shapes[0][0])

    def join(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        whole = np.concatenate([value.reshape(len(value), -1) for value in values], axis=1)
        return whole.T[:, None]

    def split(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        parts = np.split(tensor[:, 0].T, _borders(shapes, 1), axis=1)
        return tuple(part.reshape(shape) for part, shape in zip(parts, shapes))


@dataclasses.dataclass(frozen=True)
class Experts(Form):
    """Kernels [experts, inputs, outputs] as [experts, outputs, inputs]; several are fused along their outputs."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        experts, inputs, _ = shapes[0]
        return experts, sum(outputs for *_, outputs in shapes), inputs

    def join(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.concatenate([value.swapaxes(1, 2) for value in values], axis=1)

    def split(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        parts = np.split(tensor, _borders(shapes, 2), axis=1)
        return tuple(part.swapaxes(1, 2) for part in parts)


@dataclasses.dataclass(frozen=True)
class Reversed(Form):
    """Axes in the reverse order: a kernel [taps, inputs, outputs] as PyTorch's Conv1d, or a transposed matrix."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        (shape,) = shapes
        return shape[::-1]

    def join(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        (value,) = values
        return value.T

    def split(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        return (tensor.T,)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
      name: the tensor's name in the Hugging Face checkpoint.
      paths: the parameters it holds, paths written with slashes, layers one by one.
      form: how.
      row: which row of them along their first axis it holds, such as one expert's; None: it holds them whole.
    """

    name: str
    paths: tuple[str, ...]
    form: Form
    row: int | None = None

    def held(self, shapes: Mapping[str, Shape]) -> tuple[Shape, ...]:
        """Shapes of what it holds of its parameters, given {path: shape} of these."""
        found = tuple(shapes[path] for path in self.paths)
        return found if self.row is None else tuple(shape[1:] for shape in found)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The tensor's shape, for parameters of these shapes."""
        return self.form.shape(self.held(shapes))


Table = tuple[Entry, ...]


def entry(name: str, *paths: str, form: Form) -> Entry:
    """An `Entry`; several paths are parameters in one tensor."""
    return Entry(name, paths, form)


def linear(name: str, *paths: str, inputs: int = 1, transposed: bool = False, fused: Form | None = None) -> Table:
    """Kernel and bias of a Linear (`name.weight`, `name.bias`), or of several fused into one.

    Args:
      name: the module's name.
      paths: of our modules, whose parameters are `kernel` and `bias`.
      inputs, transposed: see `Linear`.
      fused: the form of both, where it is another.
    """
    return (
        Entry(f"{name}.weight", tuple(f"{path}/kernel" for path in paths), fused or Linear(inputs, transposed)),
        Entry(f"{name}.bias", tuple(f"{path}/bias" for path in paths), fused or Vector()),
    )


def convolution(name: str, *paths: str) -> Table:
    """Kernel and bias of a ShortConvolution (`name.weight`, `name.bias`), or of several side by side."""
    return (
        Entry(f"{name}.weight", tuple(f"{path}/kernel" for path in paths), Taps()),
        Entry(f"{name}.bias", tuple(f"{path}/bias" for path in paths), Vector()),
    )


def by_expert(name: str, module: str, path: str, count: int) -> Table:
    """A kernel [experts, inputs, outputs] as a Linear for each expert: `<name>.<expert>.<module>.weight`."""
    return tuple(Entry(f"{name}.{i}.{module}.weight", (path,), Linear(), row=i) for i in range(count))


def norm(name: str, path: str) -> Table:
    """Scale and bias of a norm (`name.weight`, `name.bias`)."""
    return Entry(f"{name}.weight", (f"{path}/scale",), Vector()), Entry(f"{name}.bias", (f"{path}/bias",), Vector())


def within(table: Iterable[Entry], name: str, path: str) -> Table:
    """The table of a part, under a module's name and the path of our own."""
    return tuple(
        dataclasses.replace(e, name=f"{name}.{e.name}", paths=tuple(_under(path, p) for p in e.paths)) for e in table
    )


def layers(block: Iterable[Entry], count: int, name: str, path: str) -> Table:
    """A block's table for each layer: names `<name>.<i>.`, paths `<path>/<i>/`."""
    block = tuple(block)
    return tuple(e for i in range(count) for e in within(block, f"{name}.{i}", f"{path}/{i}"))


def resolve(table: Table, shapes: Mapping[str, Shape]) -> Table:
    """The entries whose parameters the model has.

    Args:
      table: a family's table.
      shapes: {path: shape} of all of the model's parameters, layers one by one.

    Raises:
      ValueError: a parameter has no entry, or two.
    """
    found = tuple(e for e in table if all(path in shapes for path in e.paths))
    covered = collections.Counter((path, e.row) for e in found for path in e.paths)
    wanted = {(path, row) for path, shape in shapes.items() for row in _rows(path, shape, covered)}
    if missing := sorted({path for path, _ in wanted - set(covered)}):
        raise ValueError(f"The family's table has no tensor for {_some(missing)}; the model has more than the family.")
    if twice := sorted({path for (path, row), count in covered.items() if count > 1 or (path, row) not in wanted}):
        raise ValueError(f"The family's table names {_some(twice)} twice.")
    return found


def _rows(path: str, shape: Shape, covered: collections.Counter) -> Iterable[int | None]:
    """What must be covered of a parameter: all of it at once, or each row if any entry holds a row."""
    return range(shape[0]) if shape and (path, 0) in covered else (None,)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _borders(shapes: tuple[Shape, ...], first: int) -> np.ndarray:
    """Where to cut an axis that holds the axes from `first` on of one parameter after the other."""
    return np.cumsum([_size(shape[first:]) for shape in shapes])[:-1]


def _under(path: str, part: str) -> str:
    return f"{path}/{part}" if path else part
