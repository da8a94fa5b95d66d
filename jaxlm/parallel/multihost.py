"""Several processes as one job: how they find each other, and what they agree on before they train.

A job of one process needs nothing of this. Otherwise every process runs the same command, and learns who it is from

1. --coordinator_address=HOST:PORT --process_count=N --process_index=I (T5X's flags), or the environment variables
   JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT and JAX_PROCESS_INDEX; or
2. jax's own detection: Cloud TPU slices and multislice, GKE, Slurm (one task a GPU), Open MPI.

--distributed=auto (the default) does so and is one process where neither says anything; `on` makes that an error, so
that hosts that fail to find each other do not each train alone; `off` is one process whatever the environment says.
"""

import contextlib
import dataclasses
import enum
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MESSAGE_BYTES = 4096
_NOTHING_FOUND = "should be defined"  # jax's words for: no cluster detected
_IN_USE = "must be called before"  # for: this process computes already, so it is too late to join others


class Distributed(enum.Enum):
    """Whether this process is one of several.

    AUTO: if it is told so, or jax detects a cluster.
    ON: yes; anything else is an error.
    OFF: no.
    """

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class JobError(ValueError):
    """The processes of a job do not come together, or one of them cannot go on; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """Which process of which job this is; each field is a flag of the command line.

    Attributes:
      distributed: auto, on or off.
      coordinator_address: HOST:PORT, a free port of the first process's host, the same for all processes.
      process_count: of the job.
      process_index: of this process, from 0.
      start_timeout: seconds that processes wait for each other at the start.
    """

    distributed: Distributed = Distributed.AUTO
    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    start_timeout: int = 300

    @classmethod
    def of(cls, flags: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> "JobConfig":
        """From flags by name, and from the environment where a flag is not given.

        Raises:
          JobError: a value cannot be what it is meant for, or only a part of what names a process is there.
        """
        named = {"coordinator_address": "JAX_COORDINATOR_ADDRESS"}
        named |= {"process_count": "JAX_PROCESS_COUNT", "process_index": "JAX_PROCESS_INDEX"}
        given = {field: environment[name] for field, name in named.items() if environment.get(name)} | dict(flags)
        mode = given.get("distributed", Distributed.AUTO.value)
        if mode not in [value.value for value in Distributed]:
            raise JobError(f"--distributed is {mode!r}; it is one of auto, on and off.")
        numbers = {}
        for name, least in (("process_count", 1), ("process_index", 0), ("start_timeout", 1)):
            if (text := given.get(name)) is not None:
                if not text.isdecimal() or int(text) < least:
                    raise JobError(f"--{name} is {text!r}; it is a number of at least {least}.")
                numbers[name] = int(text)
        address = given.get("coordinator_address")
        if address is not None and not address.rpartition(":")[2].isdecimal():
            raise JobError(f"--coordinator_address is {address!r}; it is HOST:PORT, such as 10.0.0.1:8476.")
        config = cls(Distributed(mode), address, **numbers)
        if config.process_count is not None and (config.process_index or 0) >= config.process_count:
            raise JobError(
                f"--process_index is {config.process_index} of --process_count={config.process_count}; indices go from "
                f"0 to {config.process_count - 1}."
            )
        missing = [name for name in named if getattr(config, name) is None]
        if ("process_count" in given or "process_index" in given) and missing and mode != "off":
            raise JobError(f"A process of several needs {' and '.join(f'--{name}' for name in missing)} too.")
        return config


FLAGS = tuple(field.name for field in dataclasses.fields(JobConfig))
"""Of the command line; see `JobConfig`."""


def start(config: JobConfig) -> None:
    """Joins this process to its job; to be called before anything touches a device.

    Ends the process with a sentence and status 1 if the others do not come within the time: jax itself would abort.

    Raises:
      JobError: nothing says where the others are.
    """
    if config.distributed is Distributed.OFF or in_job():
        return
    told = config.process_count is not None
    alone = config.process_count == 1 if told else _only_task()
    if alone and config.distributed is Distributed.AUTO:
        return
    if not told:
        _check_slurm()
    waiting = threading.Timer(config.start_timeout, _give_up, (config,))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.process_count,
            config.process_index,
            cluster_detection_method="deactivate" if told else None,
            initialization_timeout=config.start_timeout + 60,
        )
    except ValueError as error:
        if _NOTHING_FOUND not in str(error):
            raise JobError(f"The job's other processes cannot be found: {_sentence(error)}") from error
        if config.distributed is Distributed.ON or config.coordinator_address is not None:
            raise JobError(
                "This process is told that it is one of several, but not which, and jax detects no cluster; give "
                "--coordinator_address, --process_count and --process_index, or --distributed=off."
            ) from None
    except RuntimeError as error:
        if _IN_USE in str(error) and not told and config.distributed is Distributed.AUTO:
            return  # called from a program that uses its devices, such as a notebook
        raise JobError(f"The job's other processes cannot be reached: {_sentence(error)}.") from error
    finally:
        waiting.cancel()


def in_job() -> bool:
    """Whether this process has joined a job; touches no device."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that writes what the job writes once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Either all processes leave the block, or all raise: what one finds wrong alone must not leave the others waiting.

    Raises:
      JobError: another process cannot go on; the message says which and what it said.
    """
    if jax.process_count() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    said = _gather("" if failure is None else f"{failure}" or type(failure).__name__)
    if failure is not None:
        raise failure
    for index, text in enumerate(said):
        if text:
            raise JobError(f"Process {index} of {len(said)} cannot go on: {text}")


def from_first(function: Callable[[], Any]) -> Any:
    """What `function` gives in the first process, in all of them; the others do not call it.

    Args:
      function: gives something that JSON has, and short: a status, a number.

    Raises:
      what `function` raises, in the first process; JobError in the others.
    """
    if jax.process_count() == 1:
        return function()
    result = None
    with together():
        if is_first():
            result = function()
    return json.loads(_gather(json.dumps(result))[0])


def leave(status: int, seconds: float = 10.0) -> None:
    """Before a process ends after an error: parts from the others, if they come to an end too.

    A process that ends alone would wait at its exit for minutes for others, which wait for it in the next step. It
    ends at once instead, with this exit status; they notice that it is gone, and end.
    """
    if not in_job():
        return
    parting = threading.Thread(target=_shut_down, daemon=True)
    parting.start()
    parting.join(seconds)
    if parting.is_alive():
        _end_now(status)


def _give_up(config: JobConfig) -> None:
    place = f" at {config.coordinator_address}" if config.coordinator_address else ""
    process = "" if config.process_index is None else f" (this is process {config.process_index})"
    print(
        f"jaxlm: the job's processes did not come together{place} within {config.start_timeout} seconds{process}; "
        f"check that all were started and reach the first one's port, or wait longer with --start_timeout.",
        file=sys.stderr,
    )
    _end_now(1)


def _end_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _shut_down() -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


def _gather(text: str) -> list[str]:
    """The texts of all processes; long ones are cut."""
    data = np.frombuffer(text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(data)).reshape(jax.process_count(), _MESSAGE_BYTES)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def _only_task() -> bool:
    """Whether a scheduler says that this process has no others. (jax would give such a Slurm task one GPU.)"""
    return "1" in (os.environ.get("SLURM_NTASKS"), os.environ.get("OMPI_COMM_WORLD_SIZE"))


def _check_slurm() -> None:
    """jax gives each Slurm task one GPU; with fewer tasks than GPUs the others would stay idle without a word."""
    gpus, tasks = os.environ.get("SLURM_GPUS_ON_NODE", ""), os.environ.get("SLURM_NTASKS_PER_NODE", "")
    if gpus.isdecimal() and tasks.isdecimal() and int(tasks) < int(gpus) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        raise JobError(
            f"Slurm gives each node {gpus} GPUs and {tasks} tasks, but a task uses one GPU; start as many tasks as "
            f"GPUs (--ntasks-per-node={gpus})."
        )


def _sentence(error: Exception) -> str:
    """The first line of a library's message."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
