"""A Hugging Face model's folder as a jaxlm model, and the way back."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx

from jaxlm.checkpoints import naming
from jaxlm.checkpoints.huggingface import families
from jaxlm.checkpoints.huggingface.family import Family, Json, differences, essence
from jaxlm.checkpoints.huggingface.files import TensorFolder, new_folder, read_json, write_json, write_tensors
from jaxlm.checkpoints.huggingface.pickled import PickledFolder
from jaxlm.checkpoints.huggingface.renamed import RenamedTensors
from jaxlm.checkpoints.huggingface.tensors import Entry, Shape, Table, resolve
from jaxlm.checkpoints.pending import Pending
from jaxlm.checkpoints.stored import some
from jaxlm.checkpoints.tabulated import TabulatedCheckpoint
from jaxlm.models import build_model
from jaxlm.models.config import ModelConfig

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder(TabulatedCheckpoint):
    """A folder as `save_pretrained` leaves it.

    Attributes:
      tensors: its tensors, under the names that they have today.
      family: its adapter.
      fields: the parsed `config.json`.
    """

    tensors: RenamedTensors
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


def open_folder(
    path: pathlib.Path | str, *, ignore: tuple[str, ...] = (), allow_pickle: bool = False
) -> HuggingFaceFolder:
    """Reads a folder's configuration.

    Args:
      path: the folder.
      ignore: fields of `config.json` to pass over although no adapter knows them.
      allow_pickle: read pickled tensors too, weights only.

    Raises:
      FileNotFoundError: no `config.json`, no tensors, or a file of them is missing.
      ValueError: a model that no adapter knows, or that differs from what its adapter knows; a tensor is missing, one
        too many or of another shape; a damaged file.
    """
    found = names_in(path, ignore=ignore, allow_pickle=allow_pickle)
    table = resolve(found.table, found.shapes)
    if faults := mismatches(found, table):
        raise ValueError(f"{path} {faults[0]}; its config.json describes another model.")
    return dataclasses.replace(found, table=table)


def names_in(
    path: pathlib.Path | str, *, ignore: tuple[str, ...] = (), allow_pickle: bool = False
) -> HuggingFaceFolder:
    """As `open_folder`, whether or not the tensors are those of the model; its table is not resolved."""
    path = pathlib.Path(path)
    if not (path / CONFIG).exists():
        raise FileNotFoundError(f"{path} has no {CONFIG}; give a Hugging Face model's folder.")
    values = read_json(path / CONFIG)
    family = families.by_config(values)
    pickled = not list(path.glob("*.safetensors")) and list(path.glob("*.bin"))
    stored = PickledFolder(path) if allow_pickle and pickled else TensorFolder(path)
    tensors = RenamedTensors(stored, family.endings)
    config = family.model_of(values, ignore=ignore, tensors=tensors.shapes)
    shapes = parameter_shapes(config)
    table = family.table_of(config, tensors.shapes)
    tensors = RenamedTensors(stored, {**family.endings, **_tied(table, shapes)})
    return HuggingFaceFolder(path, config, tensors, table, shapes, family, values)


def export(
    folder: pathlib.Path | str,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    value: Callable[[str], np.ndarray],
    *,
    family: str | None = None,
    dtype: np.dtype | None = None,
    special_ids: Json | None = None,
    shard_bytes: int = 5 << 30,
    beside: Callable[[pathlib.Path], None] = lambda folder: None,
) -> Family:
    """Writes a folder that `from_pretrained` loads.

    Args:
      folder: must not exist; it appears when everything is written.
      config: the model.
      shapes: {path: shape} of its parameters, layers one by one.
      value: path -> the parameter.
      family: a `model_type`; None takes the first that can express the model.
      dtype: of the tensors; None is float32.
      special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, and what else `config.json` is to say.
      shard_bytes: size of the files.
      beside: writes what else belongs into the folder (tokenizer, card), before it appears.

    Returns:
      the family it is of.

    Raises:
      ValueError: no family can express the model, or what is written would not be read back; the message says what
        stands in the way.
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
        make = lambda: entry.form.join(tuple(held(entry, path) for path in entry.paths)).astype(dtype, copy=False)  # noqa: E731
        return Pending(entry.shape(shapes), dtype, make)

    fields = {"architectures": [adapter.architecture], "model_type": adapter.model_type, "dtype": dtype.name}
    fields |= adapter.write(config) | dict(special_ids or {})
    _check_comes_back(adapter, fields, table, config)
    with new_folder(pathlib.Path(folder)) as unfinished:
        tensors = {entry.name: tensor(entry) for entry in table}
        tensors |= {again: tensors[name] for again, name in adapter.twice(config).items()}
        write_tensors(unfinished, tensors, shard_bytes=shard_bytes)
        write_json(unfinished / CONFIG, fields)
        if adapter.code is not None:
            shutil.copyfile(pathlib.Path(__file__).with_name(adapter.code), unfinished / adapter.code)
        beside(unfinished)
    return adapter


def _check_comes_back(adapter: Family, fields: Json, table: Table, config: ModelConfig) -> None:
    """Raises ValueError unless a `config.json` of these fields is read as the model."""
    try:
        again = adapter.model_of(fields, tensors=[entry.name for entry in table])
        reasons = differences(essence(config), essence(again), adapter.model_type)
    except ValueError as error:
        reasons = [str(error).partition("; ")[0].rstrip(".")]  # without the remedy, which is for readers
    if reasons:
        raise ValueError(f"The config.json of this {adapter.model_type} would not be read back: {reasons[0]}.")


def mismatches(folder: HuggingFaceFolder, table: Table) -> list[str]:
    """How a folder's tensors differ from those of its model's table, a clause a kind of difference; [] if they do not.

    A tensor may be there a second time under another name, such as an output matrix that is tied to the embedding; both
    are read to see that they are one. What released folders hold beyond the model's is passed over.

    Args:
      folder: as `names_in` gives it.
      table: its table, resolved.
    """
    wanted = {entry.name: entry.shape(folder.shapes) for entry in table}
    passed, faults = {*passed_over(folder, table), *folder.tensors.again}, []
    found = {name: shape for name, shape in folder.tensors.shapes.items() if name not in passed}
    for again, first in folder.tensors.again.items():
        if not np.array_equal(*map(folder.tensors.read, (again, first))):
            faults.append(f"has {again}, which is not the {first} that it stands for")
    for names, fault in ((set(wanted) - set(found), "lacks"), (set(found) - set(wanted), "has in excess")):
        if names:
            faults.append(f"{fault} {some(sorted(names))}")
    for name, shape in wanted.items():
        if found.get(name, shape) != shape:
            faults.append(f"has {name} of shape {list(found[name])}, not {list(shape)}")
    return faults


def passed_over(folder: HuggingFaceFolder, table: Table) -> list[str]:
    """The tensors of a folder that are not in its model's table and need not be: see `Family.beyond`."""
    names = set(folder.tensors.shapes) - {entry.name for entry in table}
    return sorted(name for name in names if name.startswith(folder.family.beyond))


def _tied(table: Table, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """{the output matrix's name: the embedding's} where the model has one for both."""
    names = {path: entry.name for entry in table for path in entry.paths}
    output, embedding = "vocabulary_head/kernel", "embedding/tokens"
    return {names[output]: names[embedding]} if output in names and output not in shapes else {}
