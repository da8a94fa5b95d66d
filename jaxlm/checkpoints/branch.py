"""Goes on from a step of another run with its whole state: parameters, optimizer, position in the data, step.

So that what several runs have in common is trained once: the constant part of a warm-up-stable-decay schedule, from
which a decay branches off at each budget (arXiv 2405.18392), or a base of several experiments. What starts afresh is a
`WarmStart`.
"""

import dataclasses
from collections.abc import Callable

from etils import epath

from jaxlm.checkpoints import stored
from jaxlm.checkpoints.manifest import CheckpointError, Verify


@dataclasses.dataclass(frozen=True)
class Branch:
    """Where a run branches off.

    Model, data and objective are the other run's; schedules, lengths and periods may differ.

    Attributes:
      path: the other run's folder.
      step: the step after which this run goes on by itself; None is the newest intact checkpoint.
    """

    path: str
    step: int | None = None

    def open(self, verify: Verify = Verify.DIGESTS, report: Callable[[str], None] = print) -> stored.StoredCheckpoint:
        """The checkpoint there.

        Raises:
          CheckpointError: there is none, or none that is intact.
        """
        folder = epath.Path(self.path).resolve() / "checkpoints"
        if self.step is not None:
            return stored.open_checkpoint(folder, self.step, verify)
        found = stored.open_latest(folder, verify, report)
        if found is None:
            raise CheckpointError(f"{self.path} has no checkpoint to branch off from; give a run's folder.")
        return found
