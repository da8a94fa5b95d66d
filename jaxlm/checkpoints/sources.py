"""Where parameters on disk come from: our own checkpoints and those of others, opened by the folder they lie in."""

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import numpy as np
from etils import epath

from jaxlm.checkpoints import naming, stored
from jaxlm.checkpoints.huggingface import folder as huggingface
from jaxlm.checkpoints.manifest import FILE_NAME, CheckpointError, Verify


class Source(Protocol):
    """A checkpoint of any origin, under our names, layers one by one.

    Attributes:
      folder: where it is.
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
    *,
    step: int | None = None,
    verify: Verify = Verify.DIGESTS,
    report: Callable[[str], None] = print,
) -> Source:
    """The checkpoint that a folder holds.

    Args:
      path: a run's folder, its `checkpoints` folder, the folder of one step, or a Hugging Face model's folder.
      step: the step to take, or None for the newest intact one.
      verify: how much of a checkpoint of our own is checked first.
      report: is told of damaged steps that were skipped.

    Raises:
      CheckpointError: there is no intact checkpoint.
      ValueError, FileNotFoundError: a foreign folder that cannot be read, see its reader.
    """
    path = epath.Path(path).resolve()
    if (path / huggingface.CONFIG).exists():
        return huggingface.open_folder(path)
    if (path / FILE_NAME).exists() and path.name.isdecimal():
        return stored.open_checkpoint(path.parent, int(path.name), verify)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if step is not None:
        return stored.open_checkpoint(folder, step, verify)
    checkpoint = stored.open_latest(folder, verify, report)
    if checkpoint is None:
        raise CheckpointError(
            f"There is no checkpoint to start from in {path}; give a run's folder or one of its steps."
        )
    return checkpoint
