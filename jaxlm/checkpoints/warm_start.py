"""Starts a run from the parameters of others: which leaves are taken, how they are changed, and an account of each.

The data position and the step start afresh, and so does the optimizer unless asked to go on. Names are those on disk
(`naming`), without "params/", and layers are numbered one by one whether or not either model is scanned:
"decoder/layers/17/attention/query/kernel".
"""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.checkpoints import naming, stored
from jaxlm.checkpoints.manifest import CheckpointError, Verify
from jaxlm.checkpoints.schedule_free import evaluated
from jaxlm.checkpoints.sources import Source, open_source
from jaxlm.checkpoints.surgery.leaves import Draft, Leaf, Origin, Weights, leaves_of
from jaxlm.checkpoints.surgery.rules import Rule
from jaxlm.layers.stacking import StackLayout


class Missing(enum.Enum):
    """What becomes of the model's leaves that nothing fills, and that no `Fresh` rule names.

    ERROR: the run stops and names them.
    INITIALISE: they keep their fresh initialisation, and the account says so.
    """

    ERROR = "error"
    INITIALISE = "initialise"


class OptimizerState(enum.Enum):
    """What the optimizer begins with.

    RESET: zeros.
    KEEP: the checkpoint's moments of each parameter that is taken from it unchanged, under whatever name; zeros for
      others and for the spike guard. The algorithm must be the same.
    """

    RESET = "reset"
    KEEP = "keep"


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Where parameters come from and what is done to them.

    Attributes:
      path: a run's folder, its `checkpoints` folder, the folder of one step, or a folder of another library's
        (docs/interchange.md).
      step: the step to take, or None for the newest intact one.
      weights: the parameters, or their average (EMA). A schedule-free run's parameters are its average of iterates,
        unless its optimizer goes on, from where that took gradients.
      rules: what is done to the leaves, in order; see `jaxlm.checkpoints.surgery`. () takes them as they are.
      missing: what becomes of leaves that nothing fills.
      optimizer: what becomes of the optimizer's state.
    """

    path: str
    step: int | None = None
    weights: Weights = Weights.PARAMS
    rules: tuple[Rule, ...] = ()
    missing: Missing = Missing.ERROR
    optimizer: OptimizerState = OptimizerState.RESET

    def __post_init__(self):
        object.__setattr__(self, "weights", Weights(self.weights))
        object.__setattr__(self, "missing", Missing(self.missing))
        object.__setattr__(self, "optimizer", OptimizerState(self.optimizer))


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every leaf.

    Attributes:
      source: the folder of the first checkpoint.
      taken: names that are the same on disk and in the model, with what is there.
      mapped: {name in the model: what it was made of, and how}.
      new: names in the model that keep their initialisation.
      dropped: names on disk that are not used.
    """

    source: str
    taken: tuple[str, ...]
    mapped: Mapping[str, str]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        """One line a leaf, the layers of a stack folded into one."""
        mapped = [f"{name} <- {of}" for name, of in self.mapped.items()]
        lines = [f"Warm start from {self.source}:"]
        for word, entries in (("taken", self.taken), ("mapped", mapped), ("new", self.new), ("dropped", self.dropped)):
            lines += [f"  {word:8} {line}" for line in _fold(entries)]
        return "\n".join(lines)


def warm_start(
    params: Any,
    config: WarmStart,
    layouts: tuple[StackLayout, ...] = (),
    verify: Verify = Verify.DIGESTS,
    report: Callable[[str], None] = print,
) -> "Started":
    """Parameters filled from checkpoints.

    Args:
      params: freshly initialised parameters, with their shardings and types; values on disk are cast to these types.
      config: what to take, and what to do to it.
      layouts: the scanned stacks of `params`. Some layers of a stack may be taken and others new.
      verify: how much of a checkpoint is checked first.
      report: is told the account.

    Raises:
      CheckpointError: no intact checkpoint at a path, a rule that fits nothing, a leaf that the model lacks or has in
        another shape, two leaves for one name, or leaves missing; the message names them and the remedy.
    """
    requests = stored.requests_for(params, layouts)
    model = {naming.show(path): request.layer for request in requests.values() for path in request.paths}
    places = naming.sources(params, layouts)
    initial_leaves = naming.flatten(params)

    def initial(name: str) -> np.ndarray:
        place = places[tuple(name.split("/"))]
        leaf = initial_leaves[place.path]
        return _on_host(leaf if place.row is None else leaf[place.row])

    opened: list[Source] = []

    def open_leaves(path: str, step: int | None, weights: Weights) -> dict[str, Leaf]:
        source = open_source(path, step, verify, report)
        opened.append(source if config.optimizer is OptimizerState.KEEP else evaluated(source))
        return leaves_of(opened[-1], weights)

    draft = Draft(model, initial, open_leaves)
    draft.leaves = draft.open_leaves(config.path, config.step, config.weights)
    for rule in config.rules:
        rule.apply(draft)
    new = _check(draft, config, str(opened[0].folder))
    account = _account(draft, new, opened)
    filled = _filled(params, requests, _by_path(draft.leaves))
    unchanged = {name: leaf.origins[0] for name, leaf in draft.leaves.items() if leaf.as_stored}
    started = Started(filled, account, config, unchanged, frozenset(model), opened[0])
    report(str(account))
    return started


@dataclasses.dataclass(frozen=True, eq=False)
class Started:
    """What a warm start gives.

    Attributes:
      params: the parameters.
      account: what became of every leaf.
      config: by which it was made.
      unchanged: {name: where it was taken from} of parameters that are what they were on disk.
      names: of all of the model's parameters.
      source: the first checkpoint.
    """

    params: Any
    account: Account
    config: WarmStart
    unchanged: Mapping[str, Origin]
    names: frozenset[str]
    source: Source

    def optimizer_state(self, fresh: Any, layouts: tuple[StackLayout, ...], report: Callable[[str], None]) -> Any:
        """The optimizer's state that goes with the parameters: `fresh`, filled as `WarmStart.optimizer` says.

        Args:
          fresh: the optimizer's first state for the parameters.
          layouts: as for `warm_start`.
          report: is told in a sentence what was kept.

        Raises:
          CheckpointError: it is to be kept, but the checkpoint holds none, or one of another algorithm.
        """
        if self.config.optimizer is OptimizerState.RESET:
            return fresh
        requests = stored.requests_for(fresh, layouts)
        wanted = {path: request.layer for request in requests.values() for path in request.paths}
        kept: dict[naming.Path, Leaf] = {}
        moments, moments_kept = 0, 0
        for path, leaf in wanted.items():
            if path[0] == naming.GUARD:
                continue
            name = next((i for i in range(len(path)) if naming.show(path[i:]) in self.names), None)
            origin = Origin(self.source, ("opt_state", *path))  # of a counter
            if name is not None:
                moments += 1
                taken = self.unchanged.get(naming.show(path[name:]))
                if taken is None:
                    continue
                origin = Origin(taken.source, ("opt_state", *path[:name], *taken.path[1:]))
            found = origin.source.leaves.get(origin.path)
            if found is not None and found.shape == leaf.shape:
                kept[path] = Leaf(tuple(found.shape), (origin,))
                moments_kept += name is not None
        if moments and not moments_kept:
            raise CheckpointError(
                f"{self.source.folder} holds no optimizer state of this algorithm; use the algorithm it was trained "
                f"with, or set WarmStart.optimizer to {OptimizerState.RESET.value!r}."
            )
        report(f"The optimizer keeps {len(kept)} of {len(wanted)} arrays of its state; the others start from zero.")
        return _filled(fresh, requests, kept)


def _check(draft: Draft, config: WarmStart, source: str) -> tuple[str, ...]:
    """The names of the model that stay as they are initialised, once the draft has been found to fit the model."""
    for name, leaf in draft.leaves.items():
        made_of = ", ".join(origin.name for origin in leaf.origins[:3]) or "a constant"
        if name not in draft.model:
            raise CheckpointError(
                f"The warm start takes {made_of} of {source} as {name}, which this model lacks; drop or rename it (the "
                f"model has, for example, {stored.some(list(draft.model))})."
            )
        if leaf.shape != (wanted := draft.model[name].shape):
            path = tuple(name.split("/"))
            raise CheckpointError(
                f"{made_of} of {source} has shape {list(leaf.shape)}, but this model wants {name} of shape "
                f"{list(wanted)}{stored.likely_vocabulary(path, leaf.shape, wanted)}; drop it and let it be "
                f"initialised, resize it, or give the model the checkpoint's sizes."
            )
    new = tuple(name for name in draft.model if name not in draft.leaves)
    missing = [name for name in new if name not in draft.new]
    if missing and config.missing is Missing.ERROR:
        raise CheckpointError(
            f"The warm start from {source} leaves {stored.some(missing)} without values; take or rename leaves for "
            f"them, name them in a Fresh rule, or set missing to {Missing.INITIALISE.value!r}."
        )
    return new


def _account(draft: Draft, new: tuple[str, ...], opened: list[Source]) -> Account:
    several = len(opened) > 1

    def show(origin: Origin) -> str:
        return f"{origin.name} of {origin.source.folder}" if several else origin.name

    taken, mapped, used = [], {}, set()
    for name in draft.model:
        if name not in draft.leaves:
            continue
        leaf = draft.leaves[name]
        used |= {(id(origin.source), origin.path) for origin in leaf.origins}
        if leaf.as_stored and leaf.origins[0].name == name and leaf.origins[0].source is opened[0]:
            taken.append(name)
        else:
            clauses = [", ".join(map(show, leaf.origins)), *leaf.how]
            mapped[name] = ", ".join(filter(None, clauses))
    dropped = [show(origin) for origin in draft.opened if (id(origin.source), origin.path) not in used]
    return Account(str(opened[0].folder), tuple(taken), mapped, new, tuple(dict.fromkeys(dropped)))


def _by_path(leaves: Mapping[str, Leaf]) -> dict[naming.Path, Leaf]:
    return {tuple(name.split("/")): leaf for name, leaf in leaves.items()}


def _filled(tree: Any, requests: Mapping[naming.Path, stored.Request], leaves: Mapping[naming.Path, Leaf]) -> Any:
    """`tree` with what is in `leaves`, by path on disk; what is not changed on the way is read where it belongs."""
    old = naming.flatten(tree)
    values: dict[naming.Path, jax.Array] = {}
    whole: dict[int, tuple[Source, dict[naming.Path, stored.Request]]] = {}
    for name, request in requests.items():
        found = [leaves.get(path) for path in request.paths]
        if not all(leaf is not None and leaf.as_stored for leaf in found):
            continue
        source, *others = {id(leaf.origins[0].source): leaf.origins[0].source for leaf in found}.values()
        if not others:
            paths = tuple(leaf.origins[0].path for leaf in found)
            whole.setdefault(id(source), (source, {}))[1][name] = dataclasses.replace(request, paths=paths)
    for source, group in whole.values():
        values |= source.read(group)
    for name, request in requests.items():
        found = [leaves.get(path) for path in request.paths]
        if name in values or not any(found):
            continue
        rows = request.rows or (None,)
        layers = [
            _placed(leaf, request.layer) if leaf else (old[name] if row is None else old[name][row])
            for leaf, row in zip(found, rows, strict=True)
        ]
        values[name] = stored.stacker(request)(*layers) if request.stacked else layers[0]
    return jax.tree.unflatten(jax.tree.structure(tree), [values.get(name, value) for name, value in old.items()])


def _placed(leaf: Leaf, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf on the devices where it belongs."""
    if leaf.as_stored:
        (origin,) = leaf.origins
        request = stored.Request((origin.path,), None, wanted.shape, wanted.dtype, wanted.sharding)
        return origin.source.read({origin.path: request})[origin.path]
    value = leaf.array().astype(wanted.dtype)
    return jax.make_array_from_callback(value.shape, wanted.sharding, lambda index: value[index])


def _on_host(array: jax.Array) -> np.ndarray:
    """An array of all processes' devices, whole, in this process's memory."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _fold(lines: tuple[str, ...] | list[str]) -> list[str]:
    """Lines, those that differ only in numbers of layers as one: "decoder/layers/0-11/norm/scale (12 layers)"."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for line in lines:
        numbers = tuple(map(int, re.findall(r"(?<=layers/)\d+", line)))
        groups.setdefault(re.sub(r"(?<=layers/)\d+", "{}", line), []).append(numbers)
    folded = []
    for line, layers in groups.items():
        places = [_ranges([numbers[i] for numbers in layers]) for i in range(len(layers[0]))]
        for place in places:
            line = line.replace("{}", place, 1)
        folded.append(f"{line} ({len(layers)} layers)" if len(layers) > 1 else line)
    return folded


def _ranges(numbers: list[int]) -> str:
    """ "0-23,8-31" for the numbers of two ranges one after the other."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
