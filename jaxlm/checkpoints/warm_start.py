"""Starts a run from the parameters of another: which leaves are taken, under which names, and an account of each.

The optimizer, the data position and the step start afresh. Names are those on disk (`naming`), without "params/", and
layers are numbered one by one whether or not either model is scanned: "decoder/layers/17/attention/query".
"""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlm.checkpoints import naming, stored
from jaxlm.checkpoints.manifest import CheckpointError, Verify
from jaxlm.checkpoints.sources import Source, open_source
from jaxlm.layers.stacking import StackLayout


class Missing(enum.Enum):
    """What becomes of the model's leaves that the checkpoint does not fill.

    ERROR: the run stops and names them.
    INITIALISE: they keep their fresh initialisation, and the account says so.
    """

    ERROR = "error"
    INITIALISE = "initialise"


class Weights(enum.Enum):
    """Which of a checkpoint's parameters are taken."""

    PARAMS = "params"
    AVERAGED = "ema_params"


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Where parameters come from and how they are matched.

    All patterns are regular expressions that must match a whole name on disk.

    Attributes:
      path: a run's folder, its `checkpoints` folder, the folder of one step, or a Hugging Face model's folder.
      step: the step to take, or None for the newest intact one.
      take: leaves to take: those that match any of these patterns.
      drop: leaves to leave out, though `take` matches them.
      rename: (pattern, replacement) pairs, in order; each replaces within names (`re.sub`, so "\\1" refers to a group)
        and gives the name in the new model.
      missing: what becomes of leaves that nothing fills.
      weights: the parameters, or their average (EMA).
    """

    path: str
    step: int | None = None
    take: tuple[str, ...] = (".*",)
    drop: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    missing: Missing = Missing.ERROR
    weights: Weights = Weights.PARAMS

    def __post_init__(self):
        for pattern in (*self.take, *self.drop, *(pattern for pattern, _ in self.rename)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"WarmStart has the pattern {pattern!r}, which is no regular expression: {error}."
                ) from None


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every leaf.

    Attributes:
      source: the step's folder.
      taken: {name in the model: name on disk}.
      new: names in the model that keep their initialisation.
      dropped: names on disk that are not used.
    """

    source: str
    taken: Mapping[str, str]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        """One line a leaf, the layers of a stack folded into one."""
        same = [name for name, old in self.taken.items() if name == old]
        renamed = [f"{old} -> {name}" for name, old in self.taken.items() if name != old]
        lines = [f"Warm start from {self.source}:"]
        for word, names in (("taken", same), ("renamed", renamed), ("new", self.new), ("dropped", self.dropped)):
            lines += [f"  {word:8} {line}" for line in _fold(names)]
        return "\n".join(lines)


def warm_start(
    params: Any,
    config: WarmStart,
    layouts: tuple[StackLayout, ...] = (),
    verify: Verify = Verify.DIGESTS,
    report: Callable[[str], None] = print,
) -> tuple[Any, Account]:
    """Parameters filled from a checkpoint.

    Args:
      params: freshly initialised parameters, with their shardings and types; values on disk are cast to these types.
      config: what to take.
      layouts: the scanned stacks of `params`. Some layers of a stack may be taken and others new.
      verify: how much of the checkpoint is checked first.
      report: is told the account.

    Returns:
      (parameters, account).

    Raises:
      CheckpointError: no intact checkpoint at the path, a leaf taken that the model lacks or has in another shape,
        two leaves for one name, or leaves missing; the message names them and the remedy.
    """
    checkpoint = open_source(config.path, config.step, verify, report)
    found, dropped = _matched(checkpoint, config)
    requests = stored.requests_for(params, layouts)
    known = {path: request for request in requests.values() for path in request.paths}
    for path, source in found.items():
        if path not in known:
            names = list(map(naming.show, known))
            raise CheckpointError(
                f"The warm start takes {naming.show(source)} of {checkpoint.folder} as {naming.show(path)}, which this "
                f"model lacks; drop or rename it (the model has, for example, {stored.some(names)})."
            )
        shape, wanted = checkpoint.leaves[(config.weights.value, *source)].shape, known[path].layer.shape
        if shape != wanted:
            raise CheckpointError(
                f"{naming.show(source)} of {checkpoint.folder} has shape {list(shape)}, but this model wants "
                f"{naming.show(path)} of shape {list(wanted)}{stored.likely_vocabulary(path, shape, wanted)}; drop it "
                f"and let it be initialised, or give the model the checkpoint's sizes."
            )
    new = [path for path in known if path not in found]
    if new and config.missing is Missing.ERROR:
        names = list(map(naming.show, new))
        raise CheckpointError(
            f"The warm start from {checkpoint.folder} leaves {stored.some(names)} without values; take or rename "
            f"leaves for them, or set missing to {Missing.INITIALISE.value!r}."
        )
    filled = _filled(checkpoint, config.weights, naming.flatten(params), requests, found)
    account = Account(
        source=str(checkpoint.folder),
        taken={naming.show(path): naming.show(source) for path, source in found.items()},
        new=tuple(map(naming.show, new)),
        dropped=tuple(map(naming.show, dropped)),
    )
    report(str(account))
    return jax.tree.unflatten(jax.tree.structure(params), filled), account


def _matched(checkpoint: Source, config: WarmStart) -> tuple[dict[naming.Path, naming.Path], list[naming.Path]]:
    """({name in the model: name on disk}, dropped names), by the patterns alone."""
    found: dict[naming.Path, naming.Path] = {}
    dropped = []
    names = [path[1:] for path in checkpoint.leaves if path[0] == config.weights.value]
    if not names:
        raise CheckpointError(f"{checkpoint.folder} holds no {config.weights.value}; take the other weights.")
    for source in names:
        name = naming.show(source)
        taken = any(re.fullmatch(pattern, name) for pattern in config.take)
        if not taken or any(re.fullmatch(pattern, name) for pattern in config.drop):
            dropped.append(source)
            continue
        for pattern, replacement in config.rename:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, replacement, name, count=1)
        path = tuple(name.split("/"))
        if path in found:
            raise CheckpointError(
                f"The warm start gives {name} two values, {naming.show(found[path])} and {naming.show(source)} of "
                f"{checkpoint.folder}; drop or rename one of them."
            )
        found[path] = source
    return found, dropped


def _filled(
    checkpoint: Source,
    weights: Weights,
    params: Mapping[naming.Path, jax.Array],
    requests: Mapping[naming.Path, stored.Request],
    found: Mapping[naming.Path, naming.Path],
) -> list[jax.Array]:
    """The parameters in order, with what was found read from disk."""
    whole, single = {}, {}
    for name, request in requests.items():
        sources = {path: (weights.value, *found[path]) for path in request.paths if path in found}
        if len(sources) == len(request.paths):
            whole[name] = dataclasses.replace(request, paths=tuple(sources.values()))
        else:  # some layers of a stack: read by themselves, stacked below with the new ones
            layer = request.layer
            for path, source in sources.items():
                single[path] = stored.Request((source,), None, layer.shape, layer.dtype, layer.sharding)
    values = checkpoint.read(whole)
    layers = checkpoint.read(single)
    for name, request in requests.items():
        if any(path in layers for path in request.paths):
            stack = [layers.get(path, params[name][row]) for row, path in zip(request.rows, request.paths)]
            values[name] = stored.stacker(request)(*stack)
    return [values.get(name, value) for name, value in params.items()]


def _fold(names: list[str] | tuple[str, ...]) -> list[str]:
    """Names, those that differ only in the number of a layer as one: "decoder/layers/*/norm/scale (12 layers)"."""
    counts: dict[str, int] = {}
    for name in names:
        folded = re.sub(r"(?<=layers/)\d+", "*", name)
        counts[folded] = counts.get(folded, 0) + 1
    return [f"{name} ({count} layers)" if "*" in name else name for name, count in counts.items()]
