"""One checkpoint on disk: what it holds, and how its arrays come back, onto any mesh.

A step's folder:

    state/          arrays (Orbax, OCDBT), layers unstacked, named as in `naming`
    meta/           JSON: index of the leaves, data position, callbacks' state, resolved configuration, metrics
    manifest.json   files, sizes, digests; written last
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils

from jaxlm.checkpoints import naming
from jaxlm.checkpoints.manifest import CheckpointError, Verify, check_manifest
from jaxlm.layers.stacking import StackLayout

FORMAT = 1  # of meta; raised when an older reader could misread it
# Leaves are read in groups of about this many bytes, so that restoring needs little more than the state itself.
GROUP_BYTES = 1 << 30
_SHOWN = 4  # leaves of a kind named in an error


@dataclasses.dataclass(frozen=True)
class StoredCheckpoint:
    """A committed and verified step.

    Attributes:
      folder: the step's folder.
      step: number of training steps done.
      leaves: {path on disk: shape and type}; paths like ("params", "decoder", "layers", "17", ...).
      data: the loader's state, or None where none was given.
      callbacks: state of the callbacks and guards, by their names.
      config: the resolved configuration's text.
      metrics: metrics at this step, for choosing the best.
    """

    folder: epath.Path
    step: int
    leaves: Mapping[naming.Path, jax.ShapeDtypeStruct]
    data: Mapping[str, Any] | None
    callbacks: Mapping[str, Any]
    config: str
    metrics: Mapping[str, float]

    def restore(self, target: Any, layouts: tuple[StackLayout, ...] = ()) -> Any:
        """The whole state.

        Args:
          target: a pytree of `jax.ShapeDtypeStruct` (or arrays) of the state wanted, with shardings; a leaf without
            one goes to the first device. It need not be the sharding, mesh or device count of the run that saved.
          layouts: the model's scanned stacks (`LanguageModel.layouts`); () for an unrolled model.

        Raises:
          CheckpointError: the leaves on disk are not those of `target`; names them and the remedy.
        """
        requests = requests_for(target, layouts)
        self._compare(requests)
        values = self.read(requests)
        return jax.tree.unflatten(jax.tree.structure(target), [values[path] for path in naming.flatten(target)])

    def read(self, requests: Mapping[naming.Path, "Request"]) -> dict[naming.Path, jax.Array]:
        """Reads the arrays asked for, under the caller's names. Shapes must be right; types are cast."""
        values: dict[naming.Path, jax.Array] = {}
        for group in groups(requests):
            arrays = _read_arrays(
                self.folder / "state", {path: requests[name].layer for name in group for path in requests[name].paths}
            )
            for name in group:
                layers = [arrays[path] for path in requests[name].paths]
                for path in set(requests[name].paths):
                    del arrays[path]
                values[name] = stacker(requests[name])(*layers) if requests[name].stacked else layers[0]
        return values

    def array(self, path: naming.Path) -> np.ndarray:
        """One array, whole, in this process's memory."""
        # Not by Orbax's restore, which reads the whole index again for each array, and has it in memory twice.
        folder, name = self.folder / "state", ".".join(path)
        info = ocp.type_handlers.ParamInfo(name=name, path=folder / name, parent_dir=folder, ts_context=self._context)
        spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
        return tensorstore.open(spec, open=True, context=self._context).result().read().result()

    @functools.cached_property
    def _context(self) -> tensorstore.Context:
        """What arrays that are read one by one share: threads, and the index of this checkpoint."""
        return ocp.type_handlers.get_ts_context(use_ocdbt=True)

    def _compare(self, requests: Mapping[naming.Path, "Request"]) -> None:
        """Raises if the leaves on disk are not exactly those asked for; says which differ, a few of each kind."""
        wanted = {path: request.layer for request in requests.values() for path in request.paths}
        both = [(path, self.leaves[path], leaf) for path, leaf in wanted.items() if path in self.leaves]
        missing = [naming.show(path) for path in wanted if path not in self.leaves]
        extra = [naming.show(path) for path in self.leaves if path not in wanted]
        shapes = [
            f"{naming.show(path)} of shape {list(stored.shape)}, but this model wants {list(leaf.shape)}"
            f"{likely_vocabulary(path, stored.shape, leaf.shape)}"
            for path, stored, leaf in both
            if stored.shape != leaf.shape
        ]
        types = [
            f"{naming.show(path)} as {stored.dtype}, but this run wants {leaf.dtype}, which would change its values"
            for path, stored, leaf in both
            if stored.shape == leaf.shape and stored.dtype != leaf.dtype
        ]
        differences = [
            missing and f"lacks {some(missing)}, which this model and optimizer have",
            extra and f"has {some(extra)}, which this model and optimizer lack",
            shapes and f"has {some(shapes, '; ')}",
            types and f"has {some(types, '; ')}",
        ]
        if any(differences):
            raise CheckpointError(
                f"The checkpoint of step {self.step} in {self.folder.parent} {'; it '.join(filter(None, differences))}"
                f"; use the configuration saved with it, or start a new run with a warm start from it."
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """One array wanted from a checkpoint.

    Attributes:
      paths: its path on disk; for a stack, the paths of its layers in the order of `rows`.
      rows: for a stack, the row of each of `paths` along the leading axis, ascending; rows without a path are zeros
        (identity layers of a pipeline). Otherwise None.
      shape, dtype, sharding: of the array wanted.
    """

    paths: tuple[naming.Path, ...]
    rows: tuple[int, ...] | None
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: jax.sharding.Sharding

    @property
    def stacked(self) -> bool:
        """Whether the array has a leading axis over layers."""
        return self.rows is not None

    @property
    def layer(self) -> jax.ShapeDtypeStruct:
        """Shape, type and sharding of each of `paths`."""
        if not self.stacked:
            return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)
        return jax.ShapeDtypeStruct(self.shape[1:], self.dtype, sharding=layer_sharding(self.sharding))


def requests_for(target: Any, layouts: tuple[StackLayout, ...]) -> dict[naming.Path, Request]:
    """{path in `target`: where and how its array is on disk}, for a pytree of shapes, types and shardings."""
    leaves = naming.flatten(target)
    found: dict[naming.Path, list[tuple[int, naming.Path]]] = {path: [] for path in leaves}
    stacked = dict.fromkeys(leaves, False)
    for on_disk, source in naming.sources(target, layouts).items():
        found[source.path].append((source.row or 0, on_disk))
        stacked[source.path] = source.row is not None
    requests = {}
    for path, leaf in leaves.items():
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        rows, paths = zip(*sorted(found[path]))
        rows = rows if stacked[path] else None
        requests[path] = Request(paths, rows, tuple(leaf.shape), np.dtype(leaf.dtype), sharding)
    return requests


def layer_sharding(sharding: jax.sharding.Sharding, memory_kind: str | None = None) -> jax.sharding.Sharding:
    """The sharding of one layer of a stack that has `sharding`: the same without the leading axis."""
    memory_kind = memory_kind or sharding.memory_kind
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
        return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=memory_kind)
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return sharding.with_memory_kind(memory_kind)
    raise CheckpointError(f"A stack of layers is laid out by a {type(sharding).__name__}; give it a NamedSharding.")


def open_checkpoint(folder: epath.PathLike, step: int, verify: Verify = Verify.DIGESTS) -> StoredCheckpoint:
    """The checkpoint of one step, verified.

    Args:
      folder: the run's `checkpoints` folder.
      step: number of training steps.
      verify: how much is checked. The first process reads for the digests, the others check sizes.

    Raises:
      CheckpointError: there is no such step, it was never finished, or a file is damaged.
    """
    path = epath.Path(folder) / str(step)
    problem = None
    if not path.is_dir():
        at_hand = ", ".join(map(str, committed_steps(folder))) or "none"
        problem = f"{folder} has no checkpoint of step {step} (it has: {at_hand})."
    else:
        try:
            check_manifest(path, verify if jax.process_index() == 0 else Verify.SIZES)
        except CheckpointError as error:
            problem = f"The checkpoint of step {step} in {folder} is damaged or unfinished: {error}"
    if not _all_agree(problem is None):
        raise CheckpointError(
            problem or f"The checkpoint of step {step} in {folder} is damaged (another host's check)."
        )
    meta = json.loads((path / "meta" / "metadata").read_text())
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"The checkpoint of step {step} in {folder} has format {meta['format']}, this version reads {FORMAT}; "
            f"use the version of jaxlm that wrote it."
        )
    leaves = {
        tuple(name.split("/")): jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
        for name, leaf in meta["leaves"].items()
    }
    return StoredCheckpoint(
        path,
        step,
        leaves,
        meta["data"],
        meta["callbacks"],
        meta["config"],
        {k: float(v) for k, v in meta["metrics"].items()},
    )


def open_latest(
    folder: epath.PathLike, verify: Verify = Verify.DIGESTS, report: Callable[[str], None] = print
) -> StoredCheckpoint | None:
    """The newest intact checkpoint, or None where `folder` has no committed step at all.

    Args:
      report: is told, in one sentence each, of newer steps that were skipped because they are damaged.

    Raises:
      CheckpointError: there are steps, but all are damaged; a run must not silently start from the beginning.
    """
    steps = committed_steps(folder)
    for step in reversed(steps):
        try:
            return open_checkpoint(folder, step, verify)
        except CheckpointError as error:
            report(f"Skipped a checkpoint. {error}")
    if steps:
        raise CheckpointError(
            f"All checkpoints in {folder} are damaged (steps {', '.join(map(str, steps))}); restore the folder from a "
            f"copy, or start a new run in another folder."
        )
    return None


def committed_steps(folder: epath.PathLike) -> tuple[int, ...]:
    """Steps whose folder was committed, in order; says nothing on whether they are intact."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        return ()
    return tuple(sorted(int(child.name) for child in folder.iterdir() if child.name.isdecimal() and child.is_dir()))


def _read_arrays(
    folder: epath.Path, leaves: Mapping[naming.Path, jax.ShapeDtypeStruct]
) -> dict[naming.Path, jax.Array]:
    """Reads some arrays of an Orbax folder, each with its sharding."""
    item = naming.nest(leaves)
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype), item
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(
            folder, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        )
    return naming.flatten(tree)


def groups(requests: Mapping[naming.Path, Request]) -> Iterator[list[naming.Path]]:
    """Splits the names into groups of about `GROUP_BYTES`, in which no array on disk is asked for under two names.

    So each name has an array of its own, which may be donated.
    """
    group, paths, size = [], set(), 0
    for name, request in requests.items():
        if group and (size >= GROUP_BYTES or not paths.isdisjoint(request.paths)):
            yield group
            group, paths, size = [], set(), 0
        group.append(name)
        paths.update(request.paths)
        size += math.prod(request.shape) * request.dtype.itemsize
    if group:
        yield group


def stacker(request: Request) -> Callable[..., jax.Array]:
    """Stacks layers on device, each device its own shards."""
    return _stacker(request.shape[0], request.rows, request.sharding)


@functools.cache
def _stacker(count: int, rows: tuple[int, ...], sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    def stack(*layers: jax.Array) -> jax.Array:
        by_row = dict(zip(rows, layers, strict=True))
        return jnp.stack([by_row.get(row, jnp.zeros_like(layers[0])) for row in range(count)])

    return jax.jit(stack, out_shardings=sharding)


def _all_agree(ok: bool) -> bool:
    """Whether every process says so."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def some(names: list[str], separator: str = ", ") -> str:
    """A few of the names, and how many more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def likely_vocabulary(path: naming.Path, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """A hint where an embedding or a head differs in one dimension only: its vocabulary."""
    if len(stored) != len(wanted):
        return ""
    differing = [(a, b) for a, b in zip(stored, wanted, strict=True) if a != b]
    named = any(word in name for name in path for word in ("embed", "head", "logits"))
    if len(differing) != 1 or not named:
        return ""
    return f" (its vocabulary may have {differing[0][0]} ids and yours {differing[0][1]}: use the same tokenizer)"
