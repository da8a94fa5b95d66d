"""Where parameters can come from: what a path means, a run's checkpoints or a folder of another library's."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import numpy as np
from etils import epath

from jaxlm.checkpoints import naming, stored
from jaxlm.checkpoints.huggingface import folder as huggingface
from jaxlm.checkpoints.manifest import FILE_NAME, CheckpointError, Verify
from jaxlm.checkpoints.t5 import layout as t5


class Source(Protocol):
    """Parameters on disk, under our names, layers one by one.

    Attributes:
      folder: where they are.
      leaves: {path: shape and type}; paths like ("params", "decoder", "layers", "17", ...).
    """

    folder: epath.PathLike
    leaves: Mapping[naming.Path, jax.ShapeDtypeStruct]

    def read(self, requests: Mapping[naming.Path, stored.Request]) -> dict[naming.Path, jax.Array]:
        """The arrays asked for, on the devices that the requests name; see `stored.StoredCheckpoint.read`."""

    def array(self, path: naming.Path) -> np.ndarray:
        """One array, whole, in this process's memory."""


def open_source(
    path: epath.PathLike,
    step: int | None = None,
    verify: Verify = Verify.DIGESTS,
    report: Callable[[str], None] = print,
    *,
    ignore: tuple[str, ...] = (),
    allow_pickle: bool = False,
) -> Source:
    """Opens what lies at a path; no array is read but to verify it.

    Args:
      path: a run's folder, its `checkpoints` folder, the folder of one step, a Hugging Face model's folder, or a
        checkpoint of T5X or Mesh TensorFlow (`jaxlm.checkpoints.t5`).
      step: of a run, the step to take; None is the newest intact one.
      verify: how much of a checkpoint is checked.
      report: is told, in one sentence each, of damaged steps that were passed over.
      ignore: fields of a Hugging Face folder's `config.json` to pass over although no adapter knows them.
      allow_pickle: read a Hugging Face folder's pickled tensors too, weights only.

    Raises:
      CheckpointError: there is nothing to open, or it is damaged.
      ValueError: a Hugging Face model that no adapter knows (see `huggingface.folder.open_folder`), or a T5 that is
        damaged or none.
    """
    path = epath.Path(path).expanduser().resolve()
    if (path / huggingface.CONFIG).exists():
        if step is not None:
            raise CheckpointError(
                f"{path} is a Hugging Face model's folder, which has no steps; leave out step {step}."
            )
        return huggingface.open_folder(path, ignore=ignore, allow_pickle=allow_pickle)
    if (path / FILE_NAME).exists() and path.name.isdecimal():
        if step not in (None, int(path.name)):
            raise CheckpointError(f"{path} is the checkpoint of step {path.name}, not {step}; give the run's folder.")
        return stored.open_checkpoint(path.parent, int(path.name), verify)
    if (of_t5 := t5.find(pathlib.Path(path), step)) is not None:
        return t5.open_t5(of_t5)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if step is not None:
        return stored.open_checkpoint(folder, step, verify)
    checkpoint = stored.open_latest(folder, verify, report)
    if checkpoint is None:
        raise CheckpointError(
            f"There is no checkpoint to start from in {path}; give a run's folder, one of its steps, or a Hugging Face "
            f"model's folder."
        )
    return checkpoint
