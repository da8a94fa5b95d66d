"""A Hugging Face model's folder as a jaxlm model, and the way back."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.checkpoints import naming, stored
from jaxlm.checkpoints.huggingface import families
from jaxlm.checkpoints.huggingface.family import Family, Json
from jaxlm.checkpoints.huggingface.files import Pending, TensorFolder, new_folder, read_json, write_tensors
from jaxlm.checkpoints.huggingface.tensors import Entry, Shape, Table, resolve
from jaxlm.layers.stacking import StackLayout
from jaxlm.models import build_model
from jaxlm.models.config import ModelConfig

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder:
    """A folder as `save_pretrained` leaves it, to be read like one of our own checkpoints (`stored.StoredCheckpoint`).

    Attributes:
      folder: where it is.
      family: its adapter.
      fields: the parsed `config.json`.
      config: the model it describes, in float32, initialised anyhow.
      tensors: its tensors, by name.
      table: which of them holds which parameter.
      shapes: {path: shape} of the parameters, layers one by one.
    """

    folder: pathlib.Path
    family: Family
    fields: Json
    config: ModelConfig
    tensors: TensorFolder
    table: Table
    shapes: Mapping[str, Shape]

    @property
    def leaves(self) -> dict[naming.Path, jax.ShapeDtypeStruct]:
        """{path: shape and type} as in a checkpoint: ("params", "decoder", "layers", "17", ...)."""
        return {
            ("params", *path.split("/")): jax.ShapeDtypeStruct(self.shapes[path], self.tensors.dtype(entry.name))
            for entry in self.table
            for path in entry.paths
        }

    def read(self, requests: Mapping[naming.Path, stored.Request]) -> dict[naming.Path, jax.Array]:
        """The arrays asked for, tensor after tensor; see `stored.StoredCheckpoint.read`."""
        homes: dict[str, list[Entry]] = {}
        for entry in self.table:
            for path in entry.paths:
                homes.setdefault(path, []).append(entry)
        split: dict[str, tuple[np.ndarray, ...]] = {}  # fused tensors come again for each of their parameters

        def part(entry: Entry, path: str) -> np.ndarray:
            if entry.name not in split:
                split.clear()
                split[entry.name] = entry.form.split(self.tensors.read(entry.name), entry.held(self.shapes))
            return split[entry.name][entry.paths.index(path)]

        def parameter(path: naming.Path, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            name = naming.show(path[1:])
            home, *others = homes[name]
            if home.row is None:
                value = np.asarray(part(home, name), wanted.dtype)
            else:
                value = np.empty(self.shapes[name], wanted.dtype)
                for entry in (home, *others):
                    value[entry.row] = part(entry, name)
            return jax.device_put(value, wanted.sharding)

        values = {}
        for name, request in requests.items():
            parts = [parameter(path, request.layer) for path in request.paths]
            values[name] = stored.stacker(request)(*parts) if request.stacked else parts[0]
        return values

    def load(self, params: Any, layouts: tuple[StackLayout, ...]) -> Any:
        """All parameters.

        Args:
          params: those of the model `config` as a tree of `jax.ShapeDtypeStruct` (or arrays): shapes, types, shardings.
          layouts: its scanned stacks.
        """
        values = self.read(stored.requests_for({"params": params}, layouts))
        paths = naming.flatten(params)
        return jax.tree.unflatten(jax.tree.structure(params), [values["params", *path] for path in paths])


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """{path: shape} of a model's parameters, layers one by one."""
    model = nnx.eval_shape(lambda: build_model(config, key=jax.random.key(0)))
    tree, shapes = nnx.to_pure_dict(nnx.state(model)), {}
    leaves = naming.flatten(tree)
    for path, source in naming.sources(tree, model.layouts).items():
        shape = tuple(leaves[source.path].shape)
        shapes[naming.show(path)] = shape if source.row is None else shape[1:]
    return shapes


def open_folder(path: pathlib.Path | str, *, ignore: tuple[str, ...] = ()) -> HuggingFaceFolder:
    """Reads a folder's configuration.

    Args:
      path: the folder.
      ignore: fields of `config.json` to pass over although no adapter knows them.

    Raises:
      FileNotFoundError: no `config.json`, no tensors, or a file of them is missing.
      ValueError: a model that no adapter knows, or that differs from what its adapter knows; a tensor is missing, one
        too many or of another shape; a damaged file.
    """
    path = pathlib.Path(path)
    if not (path / CONFIG).exists():
        raise FileNotFoundError(f"{path} has no {CONFIG}; give a Hugging Face model's folder.")
    values = read_json(path / CONFIG)
    family = families.by_config(values)
    tensors = TensorFolder(path)
    config = family.model_of(values, ignore=ignore, tensors=tensors.shapes)
    shapes = parameter_shapes(config)
    table = resolve(family.table_of(config, tensors.shapes), shapes)
    check(table, shapes, tensors.shapes, str(path))
    return HuggingFaceFolder(path, family, values, config, tensors, table, shapes)


def export(
    folder: pathlib.Path | str,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    value: Callable[[str], np.ndarray],
    *,
    family: str | None = None,
    dtype: np.dtype | None = None,
    special_ids: Mapping[str, int] | None = None,
    shard_bytes: int = 5 << 30,
) -> Family:
    """Writes a folder that `from_pretrained` loads.

    Args:
      folder: must not exist; it appears when everything is written.
      config: the model.
      shapes: {path: shape} of its parameters, layers one by one.
      value: path -> the parameter.
      family: a `model_type`; None takes the first that can express the model.
      dtype: of the tensors; None is float32.
      special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
      shard_bytes: size of the files.

    Returns:
      the family it is of.

    Raises:
      ValueError: no family can express the model; the message says what stands in the way.
      FileExistsError: the folder exists.
    """
    adapter = families.by_model(config, family)
    table = resolve(adapter.table(config), shapes)
    dtype = np.dtype(np.float32 if dtype is None else dtype)

    whole: dict[str, np.ndarray] = {}  # a parameter that lies in a tensor a row comes again for each

    def held(entry: Entry, path: str) -> np.ndarray:
        if entry.row is None:
            return np.asarray(value(path))
        if path not in whole:
            whole.clear()
            whole[path] = np.asarray(value(path))
        return whole[path][entry.row]

    def tensor(entry: Entry) -> Pending:
        make = lambda: entry.form.join(tuple(held(entry, path) for path in entry.paths)).astype(dtype)  # noqa: E731
        return Pending(entry.shape(shapes), dtype, make)

    fields = {"architectures": [adapter.architecture], "model_type": adapter.model_type, "dtype": dtype.name}
    with new_folder(pathlib.Path(folder)) as unfinished:
        write_tensors(unfinished, {entry.name: tensor(entry) for entry in table}, shard_bytes=shard_bytes)
        text = json.dumps(fields | adapter.write(config) | dict(special_ids or {}), indent=2, sort_keys=True)
        (unfinished / CONFIG).write_text(text + "\n")
    return adapter


def check(table: Table, shapes: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Raises ValueError unless the tensors are those of the table, in the right shapes."""
    wanted = {entry.name: entry.shape(shapes) for entry in table}
    for names, fault in ((set(wanted) - set(found), "lacks"), (set(found) - set(wanted), "has in excess")):
        if names:
            some, more = sorted(names)[:4], len(names) - 4
            rest = f" and {more} more" if more > 0 else ""
            raise ValueError(f"{where} {fault} {', '.join(some)}{rest}; its config.json describes another model.")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(
                f"{where}: {name} has shape {list(found[name])}, but config.json describes {list(shape)}; one of "
                f"the two is of another model."
            )
