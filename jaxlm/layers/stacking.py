"""Stacked and unstacked layers: the two forms in which a tree may hold a scanned stack."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.parallel.stages import ONE_STAGE, Stages


@dataclasses.dataclass(frozen=True)
class StackLayout:
    """Where a scanned stack lies in a parameter tree, and its shape.

    Attributes:
      path: keys from the root of the parameters to the stack, e.g. ("decoder",); its blocks lie under
        `<path>/layers/<0..pattern-1>`, each leaf with a leading axis of `rows`.
      pattern: number of different blocks that repeat (P).
      repeats: how often they repeat (R); the stack has P * R layers, layer i = repeat * P + position.
      stages: the pipeline stages they are dealt to, which is the order in which a leaf holds them.
    """

    path: tuple[str, ...]
    pattern: int
    repeats: int
    stages: Stages = ONE_STAGE

    @property
    def rows(self) -> tuple[int | None, ...]:
        """Which repeat each row of a leaf holds; None: an identity layer, whose parameters are zeros."""
        return tuple(int(r) if r < self.repeats else None for r in self.stages.order(self.repeats))

    @property
    def places(self) -> tuple[int, ...]:
        """In which row of a leaf each repeat is."""
        return tuple(self.rows.index(repeat) for repeat in range(self.repeats))


def unstack(tree: Any, layouts: tuple[StackLayout, ...]) -> Any:
    """`tree` with every stack as one entry a layer, `<path>/layers/<0..L-1>`, without the leading axis.

    Args:
      tree: any pytree that has the stacks' nested dicts somewhere inside: parameters, optimizer states
        with their moments, averages. Leaves may be jax or numpy arrays or `jax.ShapeDtypeStruct`.
      layouts: the stacks, `LanguageModel.layouts`.

    Raises:
      ValueError: a leaf of a stack has no leading axis of `repeats`.
    """
    for layout in layouts:
        tree = _convert(tree, layout, layout.pattern, _unstack_layers)
    return tree


def stack(tree: Any, layouts: tuple[StackLayout, ...]) -> Any:
    """The inverse of `unstack`: layers i, i + P, i + 2P, ... become one entry with a leading axis."""
    for layout in layouts:
        tree = _convert(tree, layout, layout.pattern * layout.repeats, _stack_layers)
    return tree


def _convert(tree: Any, layout: StackLayout, entries: int, change: Callable) -> Any:
    """Applies `change` to the layers of each stack `layout` in `tree` that has `entries` entries."""
    wanted = {str(i) for i in range(entries)}

    def layers_of(node: Any) -> Any:
        for key in (*layout.path, "layers"):
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    def is_holder(node: Any) -> bool:
        layers = layers_of(node)
        return isinstance(layers, Mapping) and set(layers) == wanted

    def replace(node: Any, path: tuple[str, ...]) -> Any:
        if not path:
            return change(node, layout)
        return {k: replace(v, path[1:]) if k == path[0] else walk(v) for k, v in node.items()}

    def walk(node: Any) -> Any:
        return jax.tree.map(
            lambda n: replace(n, (*layout.path, "layers")) if is_holder(n) else n, node, is_leaf=is_holder
        )

    return walk(tree)


def _unstack_layers(layers: Mapping[str, Any], layout: StackLayout) -> dict[str, Any]:
    def take(leaf: Any, row: int) -> Any:
        if leaf.ndim == 0 or leaf.shape[0] != len(layout.rows):
            raise ValueError(
                f"A leaf of the stack {'/'.join(layout.path)} has shape {leaf.shape}, but its first axis must count "
                f"{len(layout.rows)} repeats; give the layouts of the model that made this tree."
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[row]

    return {
        str(r * layout.pattern + p): jax.tree.map(functools.partial(take, row=row), layers[str(p)])
        for r, row in enumerate(layout.places)
        for p in range(layout.pattern)
    }


def _stack_layers(layers: Mapping[str, Any], layout: StackLayout) -> dict[str, Any]:
    def join(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(layout.rows), *leaves[0].shape), leaves[0].dtype)
        numpy = np if isinstance(leaves[0], np.ndarray) else jnp
        zeros = numpy.zeros_like(leaves[0])
        return numpy.stack([zeros if repeat is None else leaves[repeat] for repeat in layout.rows])

    return {
        str(p): jax.tree.map(join, *(layers[str(r * layout.pattern + p)] for r in range(layout.repeats)))
        for p in range(layout.pattern)
    }
