"""The exit statuses of the entry points: all there are, and what a scheduler should do about each."""

import contextlib
import enum
import os
import pathlib


class ExitStatus(enum.IntEnum):
    """What a run says when its process ends. From 75 on: start the same command again, nobody needs to look.

    FINISHED: all steps are done, now or before.
    FAILED: bad input, no usable checkpoint, or a save that failed; one sentence on standard error says which.
    CONFIGURATION: the gin files or flags do not make a configuration; nothing was touched.
    ENDED_EARLY: the data ended, or a callback wanted to stop, before the last step.
    DIVERGED: the loss is not finite, or the spike guard stopped the run. Started again it would do the same.
    DOES_NOT_FIT: of `python -m jaxlm.plan` alone: the run needs more memory than the machine has.
    PREEMPTED: asked to end (SIGTERM, Ctrl-C), and saved; the same command continues. 75 is EX_TEMPFAIL of sysexits.h.
    HUNG: the watchdog saw no progress, wrote the stacks of all threads and ended the process.
    """

    FINISHED = 0
    FAILED = 1
    CONFIGURATION = 2
    ENDED_EARLY = 3
    DIVERGED = 4
    DOES_NOT_FIT = 5
    PREEMPTED = 75
    HUNG = 76


AGAIN = "JAXLM_AGAIN"
"""The environment variable that names the file of `ended`."""


def ended(status: ExitStatus) -> ExitStatus:
    """The status of a process that is about to end.

    If the same command is to be started again, the file that JAXLM_AGAIN names is made: a launcher of several
    processes, such as srun, may report the status of another one.
    """
    if status >= ExitStatus.PREEMPTED and (note := os.environ.get(AGAIN)):
        with contextlib.suppress(OSError):  # perhaps the file system is what hangs
            pathlib.Path(note).touch()
    return status
