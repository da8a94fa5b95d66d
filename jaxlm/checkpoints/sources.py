"""Where parameters can come from: what a path means, a run's checkpoints or a Hugging Face model's folder."""

from collections.abc import Callable

from etils import epath

from jaxlm.checkpoints import stored
from jaxlm.checkpoints.huggingface import folder as huggingface
from jaxlm.checkpoints.manifest import FILE_NAME, CheckpointError, Verify

Source = stored.StoredCheckpoint | huggingface.HuggingFaceFolder
"""Parameters on disk: both have `folder`, `leaves` and `read`."""


def open_source(
    path: epath.PathLike,
    step: int | None = None,
    verify: Verify = Verify.DIGESTS,
    report: Callable[[str], None] = print,
    *,
    allow_pickle: bool = False,
) -> Source:
    """Opens what lies at a path; no array is read but to verify it.

    Args:
      path: a run's folder, its `checkpoints` folder, the folder of one step, or a Hugging Face model's folder.
      step: of a run, the step to take; None is the newest intact one.
      verify: how much of a checkpoint is checked.
      report: is told, in one sentence each, of damaged steps that were passed over.
      allow_pickle: read a Hugging Face folder's pickled tensors too, weights only.

    Raises:
      CheckpointError: there is nothing to open, or it is damaged.
      ValueError: a Hugging Face model that no adapter knows; see `huggingface.folder.open_folder`.
    """
    path = epath.Path(path).expanduser().resolve()
    if (path / huggingface.CONFIG).exists():
        if step is not None:
            raise CheckpointError(
                f"{path} is a Hugging Face model's folder, which has no steps; leave out step {step}."
            )
        return huggingface.open_folder(path, allow_pickle=allow_pickle)
    if (path / FILE_NAME).exists() and path.name.isdecimal():
        if step not in (None, int(path.name)):
            raise CheckpointError(f"{path} is the checkpoint of step {path.name}, not {step}; give the run's folder.")
        return stored.open_checkpoint(path.parent, int(path.name), verify)
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
