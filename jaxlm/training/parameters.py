"""What the trainer knows of each parameter: its path, shape, logical axes and role; and models as pure dicts.

A model crosses the jit boundary as `(definition, params)`: the graph without values, and a nested dict of arrays
`{"decoder": {"layers": {"0": {...}}}}`. Beside the arrays lies a dict of the same form with a `ParameterInfo` at each
leaf. In a scanned stack one array holds the same parameter of several layers; whatever depends on a layer's name or
is taken over a whole parameter (a norm, a factored moment) treats those layers one by one.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.layers.stacking import StackLayout

Tree = dict[str, Any]
"""A nested dict with string keys."""

LAYER = re.compile(r"(?P<layer>(?P<stack>.*?)\b(?:layers|prologue)/\d+)/")
"""Matches the names of parameters inside a stack, at their beginning."""

BATCH_AXES = ("layers", "experts")
"""Logical axes along which an array is a collection of separate parameters."""


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """One parameter array.

    Attributes:
      path: keys in the nested dict, layers of a scanned stack by position in the pattern.
      shape: the array's shape.
      dtype: its type.
      axes: logical name of each dimension; a scanned stack's arrays begin with "layers".
      role: how width enters: "input", "hidden", "output" or "vector".
      names: the path written with slashes for each layer in the array, in order of its leading dimension; one name
        where the array is not stacked. Layers are counted as in an unrolled stack. An identity layer, which fills a
        pipeline's stages, has the name of the stack's last layer.
      width: model width around this parameter: its own "embed" dimension, or the model's largest where it has none.
      depth: number of layers of its stack; None outside stacks.
      identities: which rows of the leading dimension are identity layers: zeros, and no parameters of the model.
      used_as: the type to which the model casts it before any use, where there is one.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    role: str
    names: tuple[str, ...]
    width: int = 1
    depth: int | None = None
    identities: tuple[int, ...] = ()
    used_as: Any = None

    @property
    def size(self) -> int:
        """Number of parameters of the model in the array."""
        whole = math.prod(self.shape)
        return whole - len(self.identities) * (whole // self.shape[0]) if self.identities else whole

    @property
    def stacked(self) -> bool:
        """Whether the leading dimension counts layers."""
        return bool(self.axes) and self.axes[0] == "layers"

    @property
    def batch_dims(self) -> tuple[int, ...]:
        """Dimensions that count separate parameters (layers, experts)."""
        return tuple(i for i, axis in enumerate(self.axes) if axis in BATCH_AXES)

    @property
    def weight_dims(self) -> tuple[int, ...]:
        """The other dimensions: those of one parameter."""
        return tuple(i for i in range(len(self.shape)) if i not in self.batch_dims)

    @property
    def matrix_dims(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(input dimensions, output dimensions) of a parameter that is a matrix, however many dimensions it has.

        Kernels are [inputs..., outputs...] and the model's width is one side of each: [embed, heads, head_dim] is
        a matrix from `embed` to `heads x head_dim`. None for vectors and small tables.
        """
        dims = self.weight_dims
        if self.role == "vector" or len(dims) < 2:
            return None
        split = len(dims) - 1 if self.axes[dims[-1]] == "embed" else 1
        if len(dims) > 2 and "embed" not in (self.axes[dims[0]], self.axes[dims[-1]]):
            raise ValueError(
                f"{'/'.join(self.path)} has axes {self.axes}, of which neither the first nor the last is 'embed', so "
                f"it cannot be read as a matrix; name its axes as docs/architecture.md says."
            )
        return dims[:split], dims[split:]

    def per_layer(self, value_of: Callable[[str], float]) -> float | np.ndarray:
        """`value_of(name)` as one number, or as [layers, 1, ...] where the layers of a stack differ."""
        values = [float(value_of(name)) for name in self.names]
        if len(set(values)) == 1:
            return values[0]
        return np.array(values, np.float32).reshape(-1, *(1,) * (len(self.shape) - 1))


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """A model without its values: hashable, and the other half of `params`.

    Attributes:
      graphdef: the structure, from `nnx.split`.
      keys: for each parameter, its path with string keys and the path under which NNX knows it.
      layouts: the scanned stacks among the parameters.
    """

    graphdef: Hashable
    keys: tuple[tuple[tuple[str, ...], tuple[Hashable, ...]], ...]
    layouts: tuple[StackLayout, ...] = ()

    def merge(self, params: Tree) -> nnx.Module:
        """The model with these parameters."""
        state: dict = {}
        for path, key in self.keys:
            leaf = params
            for name in path:
                leaf = leaf[name]
            _insert(state, key, leaf)
        return nnx.merge(self.graphdef, state)


def split_model(model: nnx.Module) -> tuple[ModelDefinition, Tree, Tree]:
    """A model, real or abstract, as its definition, its parameters and a `ParameterInfo` for each.

    Raises:
      ValueError: a parameter has no `axes` or no `role`, or the model holds state that is no parameter.
    """
    graphdef, state = nnx.split(model)
    stacks = {(*layout.path, "layers"): layout for layout in model.layouts}
    params: Tree = {}
    infos: dict[tuple[str, ...], ParameterInfo] = {}
    keys = []
    for key, variable in nnx.to_flat_state(state):
        path = tuple(str(part) for part in key)
        where = "/".join(path)
        if not isinstance(variable, nnx.Param):
            raise ValueError(f"{where} is a {type(variable).__name__}; a model's only state may be its nnx.Param.")
        metadata = variable.get_metadata()
        value = variable.get_value()
        axes, role = metadata.get("axes"), metadata.get("role")
        if axes is None or role is None or len(axes) != len(value.shape):
            raise ValueError(
                f"{where} has axes {axes} and role {role} for shape {value.shape}; give nnx.Param an axes= name for "
                f"each dimension and a role=."
            )
        info = ParameterInfo(
            path, tuple(value.shape), value.dtype, tuple(axes), str(role), (where,), used_as=metadata.get("used_as")
        )
        if info.stacked:
            names, identities = _layer_names(path, info.shape[0], stacks)
            info = dataclasses.replace(info, names=names, identities=identities)
        keys.append((path, key))
        infos[path] = info
        _insert(params, path, value)
    return ModelDefinition(graphdef, tuple(keys), tuple(model.layouts)), params, unflatten(_with_sizes(infos))


def _with_sizes(infos: dict[tuple[str, ...], ParameterInfo]) -> dict[tuple[str, ...], ParameterInfo]:
    """Fills in `width` and `depth`."""
    widths = {path: info.shape[info.axes.index("embed")] for path, info in infos.items() if "embed" in info.axes}
    layers: dict[str, set[str]] = {}
    for info in infos.values():
        for name in info.names:
            if found := LAYER.match(name):
                layers.setdefault(found["stack"], set()).add(found["layer"])

    def depth(info: ParameterInfo) -> int | None:
        found = LAYER.match(info.names[0])
        return len(layers[found["stack"]]) if found else None

    widest = max(widths.values(), default=1)
    return {
        path: dataclasses.replace(info, width=widths.get(path, widest), depth=depth(info))
        for path, info in infos.items()
    }


def flatten(tree: Tree) -> dict[tuple[str, ...], Any]:
    """A nested dict as {path: leaf}."""
    flat = {}

    def visit(node, path):
        if isinstance(node, dict):
            for name, child in node.items():
                visit(child, (*path, name))
        else:
            flat[path] = node

    visit(tree, ())
    return flat


def unflatten(flat: dict[tuple[str, ...], Any]) -> Tree:
    """The nested dict that `flatten` made flat."""
    tree: Tree = {}
    for path, leaf in flat.items():
        _insert(tree, path, leaf)
    return tree


def select(tree: Tree, like: Tree) -> Tree:
    """The leaves of `tree` at the paths of `like`."""
    flat = flatten(tree)
    return unflatten({path: flat[path] for path in flatten(like)})


def update(tree: Tree, changed: Tree) -> Tree:
    """`tree` with the leaves of `changed` in place of its own."""
    return unflatten({**flatten(tree), **flatten(changed)})


def info_of(path: tuple, by_path: dict[tuple[str, ...], ParameterInfo]) -> ParameterInfo | None:
    """The parameter that a leaf belongs to, if it lies at that parameter's path inside a larger tree.

    Args:
      path: of the leaf, jax's keys: those of a training state, an optimizer's state, or the parameters themselves.
      by_path: a `ParameterInfo` for each path, `flatten(infos)`.
    """
    names = tuple(entry.key if isinstance(entry, jax.tree_util.DictKey) else "" for entry in path)
    return next((by_path[names[start:]] for start in range(len(names)) if names[start:] in by_path), None)


def map_infos(function: Callable[..., Any], infos: Tree, *trees: Any) -> Tree:
    """`function(info, leaf, ...)` for each parameter."""
    return jax.tree.map(function, infos, *trees, is_leaf=lambda node: isinstance(node, ParameterInfo))


def _insert(tree: dict, path: tuple, leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def _layer_names(path: tuple[str, ...], rows: int, layouts: dict) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of the layers in one array of a scanned stack, layer = repeat * pattern + position, and its identities."""
    for depth in range(len(path), 0, -1):
        layout = layouts.get(path[:depth])
        if layout is None:
            continue
        prefix, position, rest = path[:depth], int(path[depth]), path[depth + 1 :]
        if len(layout.rows) != rows:
            raise ValueError(f"{'/'.join(path)} holds {rows} layers, but its layout says {len(layout.rows)}.")
        repeats = (layout.repeats - 1 if repeat is None else repeat for repeat in layout.rows)
        names = tuple("/".join((*prefix, str(r * layout.pattern + position), *rest)) for r in repeats)
        return names, tuple(row for row, repeat in enumerate(layout.rows) if repeat is None)
    raise ValueError(f"{'/'.join(path)} has a 'layers' axis, but the model's `layouts` name no stack that holds it.")
