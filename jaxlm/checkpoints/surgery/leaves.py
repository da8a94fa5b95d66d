"""Parameters on their way from checkpoints into a model: what each will be, before any is read."""

import dataclasses
import enum
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from jaxlm.checkpoints import naming
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.sources import Source
from jaxlm.checkpoints.stored import some

Shape = tuple[int, ...]


class Weights(enum.Enum):
    """Which of a checkpoint's parameters are taken."""

    PARAMS = "params"
    AVERAGED = "ema_params"


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """An array on disk.

    Attributes:
      source: the checkpoint it is in.
      path: its path there, ("params", "decoder", ...).
    """

    source: Source
    path: naming.Path

    @property
    def name(self) -> str:
        """The path as users see it, without "params"."""
        return naming.show(self.path[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter as it will be: read from disk as it is, or made of other leaves when it is needed.

    Attributes:
      shape: of the result.
      origins: the arrays on disk that go into it.
      how: what is done to them, a clause a step; () where it is the array on disk.
      parents: the leaves it is made of.
      make: makes it of `parents`; None where it is the array on disk. It asks parents for their arrays itself, so
        that a mean over many need not hold them all.
    """

    shape: Shape
    origins: tuple[Origin, ...]
    how: tuple[str, ...] = ()
    parents: tuple["Leaf", ...] = ()
    make: Callable[[tuple["Leaf", ...]], np.ndarray] | None = None

    @property
    def as_stored(self) -> bool:
        """Whether it is an array on disk, unchanged."""
        return self.make is None

    def array(self) -> np.ndarray:
        """The value, in this process's memory."""
        if self.make is None:
            (origin,) = self.origins
            return origin.source.array(origin.path)
        value = self.make(self.parents)
        if value.shape != self.shape:
            raise AssertionError(f"A leaf came as {value.shape}, not {self.shape}: {self.how}.")
        return value

    def changed(self, how: str, function: Callable[[np.ndarray], np.ndarray], shape: Shape | None = None) -> "Leaf":
        """The leaf that `function` makes of this one.

        Args:
          how: what it does, for the account.
          function: array -> array.
          shape: of the result, if it is another.
        """
        return dataclasses.replace(
            self,
            shape=self.shape if shape is None else shape,
            how=(*self.how, how),
            parents=(self,),
            make=lambda parents: function(parents[0].array()),
        )


def together(parents: tuple[Leaf, ...], how: str, make: Callable[[tuple[Leaf, ...]], np.ndarray], shape: Shape) -> Leaf:
    """The leaf that `make` makes of several."""
    origins = tuple(origin for parent in parents for origin in parent.origins)
    clauses = tuple(dict.fromkeys(clause for parent in parents for clause in parent.how))
    return Leaf(shape, origins, (*clauses, how), parents, make)


def leaves_of(source: Source, weights: Weights) -> dict[str, Leaf]:
    """{name: leaf} of a checkpoint's parameters.

    Raises:
      CheckpointError: it has no such parameters.
    """
    found = {path: leaf for path, leaf in source.leaves.items() if path[0] == weights.value}
    if not found:
        raise CheckpointError(f"{source.folder} holds no {weights.value}; take the other weights.")
    return {naming.show(path[1:]): Leaf(tuple(leaf.shape), (Origin(source, path),)) for path, leaf in found.items()}


class Draft:
    """What a model's parameters will be; the rules of a surgery change it one after the other.

    Attributes:
      leaves: {name: leaf} so far. Names are those on disk, "decoder/layers/17/attention/query/kernel".
      model: {name: shape and type} of the parameters to be filled.
      new: names of the model that may stay as they are initialised.
      initial: name -> the model's freshly initialised value.
      open_leaves: (path, step, weights) -> the leaves of another checkpoint.
    """

    def __init__(
        self,
        model: Mapping[str, jax.ShapeDtypeStruct],
        initial: Callable[[str], np.ndarray],
        open_leaves: Callable[[str, int | None, Weights], dict[str, Leaf]],
    ):
        self.leaves: dict[str, Leaf] = {}
        self.model = model
        self.new: set[str] = set()
        self.initial = initial
        self._open_leaves = open_leaves
        self.opened: list[Origin] = []

    def open_leaves(self, path: str, step: int | None, weights: Weights) -> dict[str, Leaf]:
        """The leaves of a checkpoint; what becomes of each of them will be accounted for."""
        found = self._open_leaves(path, step, weights)
        self.opened += [origin for leaf in found.values() for origin in leaf.origins]
        return found

    def beside(self) -> "Draft":
        """An empty draft for the same model."""
        other = Draft(self.model, self.initial, self._open_leaves)
        other.opened, other.new = self.opened, self.new
        return other

    def matching(self, rule: object, pattern: str) -> Iterator[tuple[str, re.Match[str]]]:
        """The names that match `pattern` as a whole, and how.

        Raises:
          CheckpointError: none does.
        """
        found = [(name, match) for name in self.leaves if (match := re.fullmatch(pattern, name))]
        if not found:
            raise CheckpointError(
                f"{type(rule).__name__} has the pattern {pattern!r}, which matches none of the leaves at that point; "
                f"correct it or leave the rule out (there are, for example, {some(list(self.leaves))})."
            )
        return iter(found)

    def wanted(self, rule: object, name: str) -> jax.ShapeDtypeStruct:
        """What the model has under this name.

        Raises:
          CheckpointError: nothing.
        """
        if name not in self.model:
            raise CheckpointError(
                f"{type(rule).__name__} asks for the model's {name}, which this model lacks; rename leaves before, or "
                f"say the size (the model has, for example, {some(list(self.model))})."
            )
        return self.model[name]

    def put(self, rule: object, leaves: Mapping[str, Leaf]) -> None:
        """Adds leaves.

        Raises:
          CheckpointError: a name is taken.
        """
        for name, leaf in leaves.items():
            if name in self.leaves:
                held, come = (", ".join(origin.name for origin in x.origins) for x in (self.leaves[name], leaf))
                raise CheckpointError(
                    f"{type(rule).__name__} gives {name} two values, {held} and {come}; drop or rename one of them."
                )
            self.leaves[name] = leaf
