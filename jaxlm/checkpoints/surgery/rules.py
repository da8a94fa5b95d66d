"""What a surgery does to a checkpoint's parameters: rules, in order, as data.

A rule sees what the rules before it have left: names and shapes, of which nothing is read yet. Patterns are regular
expressions that must match a whole name, and a pattern that matches nothing is an error. In names that a rule gives,
"\\1" or "\\g<layer>" stand for groups of its pattern.

    rules = (
        Drop("vocabulary_head/kernel"),
        Rename("decoder/(.*)", r"encoder/\\1"),
        Resize("embedding/tokens", axis=0, fill=Fill.MEAN),
    )
"""

import abc
import dataclasses
import enum
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.surgery.leaves import Draft, Leaf, Weights, together


class Rule(abc.ABC):
    """A step of a surgery."""

    @abc.abstractmethod
    def apply(self, draft: Draft) -> None:
        """Changes the draft.

        Raises:
          CheckpointError: the rule does not fit what is there; one sentence.
        """


def _check_patterns(rule: Rule, *patterns: str) -> None:
    """Raises ValueError unless these are regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{type(rule).__name__} has the pattern {pattern!r}, which is no regular expression: {error}."
            ) from None


def _named(rule: Rule, match: re.Match[str], template: str) -> str:
    """A name from the groups of a match.

    Raises:
      CheckpointError: it has no such group.
    """
    try:
        return match.expand(template)
    except (re.error, IndexError) as error:
        raise CheckpointError(
            f"{type(rule).__name__} names {template!r}, which does not fit the groups of its pattern "
            f"{match.re.pattern!r}: {error}."
        ) from None


@dataclasses.dataclass(frozen=True)
class _Matching(Rule):
    """A rule about the leaves whose names match.

    Attributes:
      pattern: of their names.
    """

    pattern: str

    def __post_init__(self):
        _check_patterns(self, self.pattern)


@dataclasses.dataclass(frozen=True)
class Keep(_Matching):
    """Leaves out all leaves whose names do not match."""

    def apply(self, draft: Draft) -> None:
        draft.leaves = {name: draft.leaves[name] for name, _ in draft.matching(self, self.pattern)}


@dataclasses.dataclass(frozen=True)
class Drop(_Matching):
    """Leaves out the leaves whose names match."""

    def apply(self, draft: Draft) -> None:
        for name, _ in draft.matching(self, self.pattern):
            del draft.leaves[name]


@dataclasses.dataclass(frozen=True)
class Rename(_Matching):
    """Gives leaves other names, all at once.

    Attributes:
      name: the new name.
    """

    name: str

    def apply(self, draft: Draft) -> None:
        names = {old: _named(self, match, self.name) for old, match in draft.matching(self, self.pattern)}
        moved = [(new, draft.leaves.pop(old)) for old, new in names.items()]
        for new, leaf in moved:  # one at a time, so that two with one name are seen
            draft.put(self, {new: leaf})


@dataclasses.dataclass(frozen=True)
class Copy(_Matching):
    """Gives leaves a second name.

    Attributes:
      name: the second name.
    """

    name: str

    def apply(self, draft: Draft) -> None:
        for new, leaf in [
            (_named(self, match, self.name), draft.leaves[old]) for old, match in draft.matching(self, self.pattern)
        ]:
            draft.put(self, {new: leaf})


@dataclasses.dataclass(frozen=True)
class Fresh(_Matching):
    """Lets the model's leaves whose names match start as they are initialised, whatever the checkpoint holds.

    Attributes:
      pattern: of the model's names.
    """

    def apply(self, draft: Draft) -> None:
        for name in _of_model(self, draft, self.pattern):
            draft.new.add(name)
            draft.leaves.pop(name, None)


@dataclasses.dataclass(frozen=True)
class Constant(_Matching):
    """Lets the model's leaves whose names match start at one value: 0 closes a branch by its last matrix.

    Attributes:
      pattern: of the model's names.
      value: of every entry.
    """

    value: float = 0.0

    def apply(self, draft: Draft) -> None:
        for name in _of_model(self, draft, self.pattern):
            wanted = draft.model[name]
            # Broadcast, so that it takes no memory before it is placed.
            value = np.broadcast_to(np.asarray(self.value, wanted.dtype), wanted.shape)
            how = (f"{self.value:g} everywhere",)
            draft.leaves[name] = Leaf(wanted.shape, (), how, (), lambda _, value=value: value)


def _of_model(rule: Rule, draft: Draft, pattern: str) -> list[str]:
    found = [name for name in draft.model if re.fullmatch(pattern, name)]
    if not found:
        raise CheckpointError(
            f"{type(rule).__name__} has the pattern {pattern!r}, which matches none of this model's parameters; "
            f"correct it or leave the rule out."
        )
    return found


@dataclasses.dataclass(frozen=True)
class PickLayers(Rule):
    """Makes a stack of some of its layers, in any order and any number of times.

    Depth up-scaling (arXiv 2312.15166) has `order = ((0, 24), (8, 32))`, a student of every other layer has
    `((0, 24, 2),)`.

    Attributes:
      order: layer i of the new stack is layer order[i] of the old one; (start, stop) and (start, stop, step) stand for
        the layers of that `range`.
      stack: the name before the layers' numbers.
    """

    order: tuple[int | tuple[int, ...], ...]
    stack: str = "decoder/layers"

    def __post_init__(self):
        if not self.layers:
            raise ValueError("PickLayers.order names no layer; name at least one.")

    @property
    def layers(self) -> tuple[int, ...]:
        """`order`, layer by layer."""
        return tuple(i for part in self.order for i in ((part,) if isinstance(part, int) else range(*part)))

    def apply(self, draft: Draft) -> None:
        layers = _layers(self, draft, self.stack, self.layers)
        for new, old in enumerate(self.layers):
            draft.put(self, {f"{self.stack}/{new}/{rest}": leaf for rest, leaf in layers[old].items()})


@dataclasses.dataclass(frozen=True)
class AverageLayers(Rule):
    """Makes a stack of means of its layers.

    Attributes:
      groups: layer i of the new stack is the mean of the old layers groups[i].
      stack: the name before the layers' numbers.
    """

    groups: tuple[tuple[int, ...], ...]
    stack: str = "decoder/layers"

    def __post_init__(self):
        if not self.groups or not all(self.groups):
            raise ValueError("AverageLayers.groups has a group without layers; name at least one in each.")

    def apply(self, draft: Draft) -> None:
        layers = _layers(self, draft, self.stack, [i for group in self.groups for i in group])
        for new, group in enumerate(self.groups):
            for rest in layers[group[0]]:
                if any(rest not in layers[i] for i in group):
                    raise CheckpointError(
                        f"AverageLayers takes the mean of layers {list(group)} of {self.stack}, but not all of them "
                        f"have {rest}; average layers of one kind."
                    )
                parts = tuple(layers[i][rest] for i in group)
                draft.put(self, {f"{self.stack}/{new}/{rest}": _mean(self, parts, None)})


def _layers(rule: Rule, draft: Draft, stack: str, wanted: Any) -> dict[int, dict[str, Leaf]]:
    """Takes a stack's layers out of the draft: {layer: {rest of the name: leaf}}."""
    layers: dict[int, dict[str, Leaf]] = {}
    for name in [name for name in draft.leaves if re.match(rf"{re.escape(stack)}/\d+/", name)]:
        number, rest = name[len(stack) + 1 :].split("/", 1)
        layers.setdefault(int(number), {})[rest] = draft.leaves.pop(name)
    if not layers:
        raise CheckpointError(
            f"{type(rule).__name__} is for the layers of {stack}, of which there are none; set its stack."
        )
    if missing := sorted(set(wanted) - set(layers)):
        raise CheckpointError(
            f"{type(rule).__name__} asks for layer {missing[0]} of {stack}, which has layers {min(layers)} to "
            f"{max(layers)}; count from 0."
        )
    return layers


@dataclasses.dataclass(frozen=True)
class Join(Rule):
    """Adds the leaves of another checkpoint.

    Attributes:
      path, step: the checkpoint, as for `WarmStart`.
      rules: what is done to its leaves first.
      weights: the parameters, or their average (EMA).
    """

    path: str
    step: int | None = None
    rules: tuple[Rule, ...] = ()
    weights: Weights = Weights.PARAMS

    def apply(self, draft: Draft) -> None:
        other = draft.beside()
        other.leaves = other.open_leaves(self.path, self.step, self.weights)
        for rule in self.rules:
            rule.apply(other)
        draft.put(self, other.leaves)


@dataclasses.dataclass(frozen=True)
class Soup(Rule):
    """The mean with other checkpoints, parameter by parameter (model soups, arXiv 2203.05482).

    Coefficients (1 - a, a) go a part of the way to a second checkpoint; (1, 1, -1) add what training changed from the
    third to the second (task arithmetic, arXiv 2212.04089).

    Attributes:
      paths: the other checkpoints.
      coefficients: of the leaves so far and of each other checkpoint; None takes the mean.
      weights: the parameters of the others, or their average (EMA).
    """

    paths: tuple[str, ...]
    coefficients: tuple[float, ...] | None = None
    weights: Weights = Weights.PARAMS

    def __post_init__(self):
        if self.coefficients is not None and len(self.coefficients) != 1 + len(self.paths):
            raise ValueError(
                f"Soup.coefficients has {len(self.coefficients)} numbers for {1 + len(self.paths)} checkpoints; give "
                f"the first one for the leaves that are there, and one for each of Soup.paths."
            )

    def apply(self, draft: Draft) -> None:
        others = [draft.open_leaves(path, None, self.weights) for path in self.paths]
        for path, other in zip(self.paths, others):
            if differing := sorted(set(other) ^ set(draft.leaves)):
                where = "lacks" if differing[0] in draft.leaves else "alone has"
                raise CheckpointError(
                    f"Soup mixes checkpoints of one model, but {path} {where} {differing[0]}; put Soup before rules "
                    f"that change names, or mix others."
                )
        for name, leaf in draft.leaves.items():
            draft.leaves[name] = _mean(self, (leaf, *(other[name] for other in others)), self.coefficients)


def _mean(rule: Rule, parts: tuple[Leaf, ...], coefficients: tuple[float, ...] | None) -> Leaf:
    """The mean of several leaves, or a sum with coefficients, taken in float32."""
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        raise CheckpointError(
            f"{type(rule).__name__} cannot add {parts[0].origins[0].name} of shapes "
            f"{' and '.join(str(list(shape)) for shape in sorted(shapes))}; resize before."
        )
    weights = coefficients or (1.0 / len(parts),) * len(parts)

    def make(parents: tuple[Leaf, ...]) -> np.ndarray:
        total = np.zeros(parents[0].shape, np.float32)
        for parent, weight in zip(parents, weights):
            total += np.float32(weight) * parent.array().astype(np.float32)
        return total

    how = f"the mean of {len(parts)}" if coefficients is None else f"summed with {coefficients}"
    return together(parts, how, make, parts[0].shape)


@dataclasses.dataclass(frozen=True)
class Scale(_Matching):
    """Multiplies.

    Attributes:
      factor: by what.
    """

    factor: float

    def apply(self, draft: Draft) -> None:
        for name, _ in draft.matching(self, self.pattern):
            leaf = draft.leaves[name]
            draft.leaves[name] = leaf.changed(f"times {self.factor:g}", lambda x: x * np.asarray(self.factor, x.dtype))


@dataclasses.dataclass(frozen=True)
class Transpose(_Matching):
    """Permutes axes.

    Attributes:
      axes: as numpy's; None reverses them.
    """

    axes: tuple[int, ...] | None = None

    def apply(self, draft: Draft) -> None:
        for name, _ in draft.matching(self, self.pattern):
            leaf = draft.leaves[name]
            axes = self.axes or tuple(reversed(range(len(leaf.shape))))
            if sorted(axes) != list(range(len(leaf.shape))):
                raise CheckpointError(
                    f"Transpose.axes = {axes} do not permute the axes of {name}, which has shape {list(leaf.shape)}."
                )
            shape = tuple(leaf.shape[axis] for axis in axes)
            draft.leaves[name] = leaf.changed("transposed", lambda x, a=axes: x.transpose(a), shape)


@dataclasses.dataclass(frozen=True)
class Reshape(_Matching):
    """Gives another shape to the same numbers in the same order.

    Attributes:
      shape: the new shape, where -1 is what is left; None takes the model's.
    """

    shape: tuple[int, ...] | None = None

    def apply(self, draft: Draft) -> None:
        for name, _ in draft.matching(self, self.pattern):
            leaf = draft.leaves[name]
            shape = draft.wanted(self, name).shape if self.shape is None else self.shape
            size, known = math.prod(leaf.shape), math.prod(n for n in shape if n != -1)
            free = shape.count(-1)
            if free > 1 or (size != known if free == 0 else size % max(known, 1)):
                raise CheckpointError(
                    f"Reshape cannot make {list(shape)} of {name}, which has shape {list(leaf.shape)}; give one of as "
                    f"many entries."
                )
            whole = tuple(size // known if n == -1 else n for n in shape)
            draft.leaves[name] = leaf.changed("reshaped", lambda x, s=whole: x.reshape(s), whole)


@dataclasses.dataclass(frozen=True)
class Slice(_Matching):
    """A part of an axis.

    Attributes:
      axis: which.
      start, stop: as of a Python slice.
    """

    axis: int
    start: int = 0
    stop: int | None = None

    def apply(self, draft: Draft) -> None:
        for name, _ in draft.matching(self, self.pattern):
            leaf = draft.leaves[name]
            axis = _axis(self, name, leaf, self.axis)
            kept = range(*slice(self.start, self.stop).indices(leaf.shape[axis]))
            if not kept:
                raise CheckpointError(
                    f"Slice leaves nothing of axis {axis} of {name}, which has shape {list(leaf.shape)}; correct start "
                    f"and stop."
                )
            draft.leaves[name] = leaf.changed(
                f"{kept.start} to {kept.stop} of axis {axis}",
                lambda x, i=(slice(None),) * axis + (slice(kept.start, kept.stop),): x[i],
                _with(leaf.shape, axis, len(kept)),
            )


class Fill(enum.Enum):
    """What stands where an axis is longer than it was.

    ZEROS: zeros. MEAN: the mean of the old entries (for new ids: Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"). DRAWN: numbers drawn with the
    mean and standard deviation of the old entries. INITIAL: what the model was initialised with. REPEATED: the old
    entries again, from the first on. SHARED: the same, each divided by the number of times that it now stands there, so
    that a sum over the axis stays (Net2Net, arXiv 1511.05641).
    """

    ZEROS = "zeros"
    MEAN = "mean"
    DRAWN = "drawn"
    INITIAL = "initial"
    REPEATED = "repeated"
    SHARED = "shared"


@dataclasses.dataclass(frozen=True)
class Resize(_Matching):
    """Cuts an axis at its end, or makes it longer: another vocabulary, a wider layer.

    Attributes:
      axis: which; -1 is the last.
      size: its new length; None takes the model's.
      fill: what stands beyond the old entries.
      seed: of what is drawn.
    """

    axis: int
    size: int | None = None
    fill: Fill = Fill.MEAN
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "fill", Fill(self.fill))

    def apply(self, draft: Draft) -> None:
        for name, _ in draft.matching(self, self.pattern):
            leaf = draft.leaves[name]
            axis = _axis(self, name, leaf, self.axis)
            size = draft.wanted(self, name).shape[axis] if self.size is None else self.size
            old = leaf.shape[axis]
            shape = _with(leaf.shape, axis, size)
            if size == old:
                continue
            if size < old:
                first = (slice(None),) * axis + (slice(size),)
                draft.leaves[name] = leaf.changed(f"the first {size} of {old}", lambda x, i=first: x[i], shape)
                continue
            more = f"{old} -> {size} by {self.fill.value}"
            if self.fill is not Fill.INITIAL:
                grow = lambda x, n=name, a=axis, m=size: self._grown(x, n, a, m)  # noqa: E731
                draft.leaves[name] = leaf.changed(more, grow, shape)
                continue
            wanted = draft.wanted(self, name)
            if wanted.shape != shape:
                raise CheckpointError(
                    f"Resize fills {name} from the model's initial values, which have shape {list(wanted.shape)}, not "
                    f"{list(shape)}; resize the other axes before."
                )

            def join(x, n=name, a=axis):
                rest = (slice(None),) * a + (slice(x.shape[a], None),)
                return np.concatenate([x, draft.initial(n)[rest].astype(x.dtype)], axis=a)

            draft.leaves[name] = leaf.changed(more, join, shape)

    def _grown(self, x: np.ndarray, name: str, axis: int, size: int) -> np.ndarray:
        old = x.shape[axis]
        if self.fill in (Fill.REPEATED, Fill.SHARED):
            index = np.arange(size) % old
            grown = np.take(x, index, axis)
            if self.fill is Fill.REPEATED:
                return grown
            counts = np.bincount(index)[index].astype(np.float32)
            return (grown / counts.reshape(-1, *(1,) * (x.ndim - 1 - axis))).astype(x.dtype)
        shape = _with(x.shape, axis, size - old)
        if self.fill is Fill.ZEROS:
            return np.concatenate([x, np.zeros(shape, x.dtype)], axis)
        values = x.astype(np.float32)
        more = np.broadcast_to(values.mean(axis, keepdims=True), shape)
        if self.fill is Fill.DRAWN:
            noise = np.random.default_rng((self.seed, zlib.crc32(name.encode()))).standard_normal(shape, np.float32)
            more = more + noise * values.std(axis, keepdims=True)
        return np.concatenate([x, more.astype(x.dtype)], axis)


@dataclasses.dataclass(frozen=True)
class Split(_Matching):
    """Cuts leaves into several along an axis: fused projections into their parts.

    Attributes:
      names: of the parts, in order.
      axis: along which; -1 is the last.
      sizes: of the parts; None makes them equal.
      unstack: whether the parts lose the axis (then each is 1 long): experts or layers in one array.
    """

    names: tuple[str, ...]
    axis: int = -1
    sizes: tuple[int, ...] | None = None
    unstack: bool = False

    def apply(self, draft: Draft) -> None:
        for name, match in draft.matching(self, self.pattern):
            leaf = draft.leaves.pop(name)
            axis = _axis(self, name, leaf, self.axis)
            whole, count = leaf.shape[axis], len(self.names)
            sizes = self.sizes or ((whole // count,) * count if whole % count == 0 else ())
            if len(sizes) != count or sum(sizes) != whole or (self.unstack and set(sizes) != {1}):
                raise CheckpointError(
                    f"Split cannot cut axis {axis} of {name}, of shape {list(leaf.shape)}, into {count} parts"
                    f"{f' of {list(self.sizes)}' if self.sizes else ''}"
                    f"{' of 1 each' if self.unstack else ''}; give sizes that add up to {whole}."
                )
            stops = np.cumsum(sizes)
            for part, size, stop in zip(self.names, sizes, stops):
                shape = _with(leaf.shape, axis, size)
                index: tuple = (slice(None),) * axis
                if self.unstack:
                    index, shape = (*index, int(stop) - 1), (*shape[:axis], *shape[axis + 1 :])
                else:
                    index = (*index, slice(int(stop) - size, int(stop)))
                cut = leaf.changed(f"{stop - size} to {stop} of axis {axis}", lambda x, i=index: x[i], shape)
                draft.put(self, {_named(self, match, part): cut})


@dataclasses.dataclass(frozen=True)
class Merge(Rule):
    """Joins leaves along an axis: projections into a fused one, experts into one array.

    Attributes:
      patterns: of the parts, in order; parts belong together where the groups of all patterns are the same.
      name: of the whole.
      axis: along which; -1 is the last.
      stack: whether the axis is a new one, on which each part is 1 long.
    """

    patterns: tuple[str, ...]
    name: str
    axis: int = -1
    stack: bool = False

    def __post_init__(self):
        _check_patterns(self, *self.patterns)

    def apply(self, draft: Draft) -> None:
        found: list[Mapping[tuple, tuple[str, re.Match]]] = [
            {match.groups(): (name, match) for name, match in draft.matching(self, pattern)}
            for pattern in self.patterns
        ]
        for groups, (first, match) in found[0].items():
            if any(groups not in part for part in found) or any(len(part) != len(found[0]) for part in found):
                raise CheckpointError(
                    f"Merge finds {first} without all of its other parts; its patterns {self.patterns} must match as "
                    f"many leaves each, with the same groups."
                )
            names = [part[groups][0] for part in found]
            if len(set(names)) < len(names):
                raise CheckpointError(
                    f"Merge finds {first} by two of its patterns {self.patterns}; a leaf is one part. To repeat it, "
                    f"resize the merged axis."
                )
            parts = tuple(draft.leaves.pop(name) for name in names)
            whole = self._merged(first, parts)
            draft.put(self, {_named(self, match, self.name): whole})

    def _merged(self, first: str, parts: tuple[Leaf, ...]) -> Leaf:
        shape = parts[0].shape
        if self.stack:
            axis = self.axis % (len(shape) + 1)
            fits = all(part.shape == shape for part in parts)
            whole = (*shape[:axis], len(parts), *shape[axis:])
            join = np.stack
        else:
            axis = _axis(self, first, parts[0], self.axis)
            fits = all(_with(part.shape, axis, 0) == _with(shape, axis, 0) for part in parts)
            whole = _with(shape, axis, sum(part.shape[axis] for part in parts)) if fits else ()
            join = np.concatenate
        if not fits:
            shapes = " and ".join(str(list(part.shape)) for part in parts)
            raise CheckpointError(f"Merge cannot join {first} and its other parts, of shapes {shapes}, on axis {axis}.")
        make = lambda parents: join([parent.array() for parent in parents], axis=axis)  # noqa: E731
        return together(parts, f"joined on axis {axis}", make, whole)


def _axis(rule: Rule, name: str, leaf: Leaf, axis: int) -> int:
    """The axis, counted from 0."""
    if not -len(leaf.shape) <= axis < len(leaf.shape):
        raise CheckpointError(
            f"{type(rule).__name__}.axis = {axis} does not exist in {name}, which has shape {list(leaf.shape)}."
        )
    return axis % len(leaf.shape)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """The shape with another length of one axis."""
    return (*shape[:axis], size, *shape[axis + 1 :])
