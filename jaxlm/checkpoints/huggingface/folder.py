"""A Hugging Face model's folder as a jaxlm model, and the way back."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx

from jaxlm.checkpoints import naming
from jaxlm.checkpoints.huggingface import families
from jaxlm.checkpoints.huggingface.family import Family, Json
from jaxlm.checkpoints.huggingface.files import Pending, TensorFolder, new_folder, read_json, write_tensors
from jaxlm.checkpoints.huggingface.tensors import Entry, Shape, Table, resolve
from jaxlm.checkpoints.tabulated import TabulatedCheckpoint
from jaxlm.models import build_model
from jaxlm.models.config import ModelConfig

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder(TabulatedCheckpoint):
    """A folder as `save_pretrained` leaves it.

    Attributes:
      family: its adapter.
      fields: the parsed `config.json`.
    """

    family: Family
    fields: Json


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
    return HuggingFaceFolder(path, config, tensors, table, shapes, family, values)


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
