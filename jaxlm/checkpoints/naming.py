"""How the leaves of a training state are named on disk: one path a leaf, layers always unstacked.

A path is what one would type to reach the leaf: `("params", "decoder", "layers", "17", "attention", "query")`,
`("opt_state", "0", "mu", "decoder", ...)`. Fields of named tuples and dataclasses go by name, positions of tuples by
number; nodes without leaves (optax's `EmptyState`, `MaskedNode`, None) leave no trace, and come back from the state
that is being restored into. So a path survives a change of the Python classes that held it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxlm.layers.stacking import StackLayout

Path = tuple[str, ...]

GUARD = "guard"  # of the optimizer's state, what the spike guard has seen: of one stretch of training alone


def flatten(tree: Any) -> dict[Path, Any]:
    """{path: leaf} of any pytree, in the pytree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {tuple(_name(key) for key in keys): leaf for keys, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("Two leaves of the state have the same name; use distinct dictionary keys.")
    return named


def nest(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dict with these leaves."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def show(path: Path) -> str:
    """A path as users see it: "params/decoder/layers/17/attention/query"."""
    return "/".join(path)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a leaf on disk comes from in the state.

    Attributes:
      path: the leaf of the state.
      row: its index along the leading axis of a stacked leaf, or None for the whole leaf.
    """

    path: Path
    row: int | None = None


def sources(tree: Any, layouts: tuple[StackLayout, ...]) -> dict[Path, Source]:
    """{path on disk: where it is in `tree`}, layers of scanned stacks one by one.

    The numbering is that of `jaxlm.layers.stacking.unstack`. Here it goes leaf by leaf, because an optimizer may hold
    only a part of a stack (some of its parameters are frozen).

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`.
      layouts: the scanned stacks in it.

    Raises:
      ValueError: a leaf of a stack has no leading axis of `repeats`.
    """
    found = {}
    for path, leaf in flatten(tree).items():
        layout, at = _position(path, layouts)
        if layout is None:
            found[path] = Source(path)
            continue
        if not leaf.shape or leaf.shape[0] != len(layout.rows):
            raise ValueError(
                f"{show(path)} has shape {leaf.shape}, but its first axis must count {len(layout.rows)} layers; give "
                f"the layouts of the model that made this state."
            )
        for repeat, row in enumerate(layout.places):
            layer = str(repeat * layout.pattern + int(path[at]))
            found[(*path[:at], layer, *path[at + 1 :])] = Source(path, row)
    return found


def _position(path: Path, layouts: tuple[StackLayout, ...]) -> tuple[StackLayout | None, int]:
    """The stack that a leaf belongs to, and where in its path its position in the pattern stands."""
    for layout in layouts:
        prefix = (*layout.path, "layers")
        for at in range(len(prefix), len(path)):
            if path[at - len(prefix) : at] == prefix:
                return layout, at
    return None, 0


def _name(key: Any) -> str:
    """One step of a jax key path as a name."""
    match key:
        case jax.tree_util.DictKey(key=name) | jax.tree_util.FlattenedIndexKey(key=name):
            return str(name)
        case jax.tree_util.GetAttrKey(name=name):
            return name
        case jax.tree_util.SequenceKey(idx=index):
            return str(index)
    raise TypeError(f"A pytree node of the state has keys of type {type(key).__name__}, which have no name on disk.")
