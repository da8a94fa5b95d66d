"""How a process learns whether it is one of several; several real processes are in tests/train/test_processes.py."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxlm.parallel.multihost import Distributed, JobConfig, JobError, from_first, start, together
from jaxlm.parallel.parallelism import Parallelism

FLAGS = {"coordinator_address": "10.0.0.1:8476", "process_count": "4", "process_index": "3"}
ENVIRONMENT = {f"JAX_{name.upper()}": value for name, value in FLAGS.items()}


def test_flags_win_over_the_environment():
    assert JobConfig.of({}, {}) == JobConfig()
    told = JobConfig(Distributed.AUTO, "10.0.0.1:8476", 4, 3)
    assert JobConfig.of(FLAGS, {}) == JobConfig.of({}, ENVIRONMENT) == told
    assert JobConfig.of({"process_index": "0"}, ENVIRONMENT).process_index == 0
    assert JobConfig.of({"distributed": "off"}, {"JAX_PROCESS_COUNT": "4"}).distributed is Distributed.OFF


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"distributed": "yes"}, "--distributed is 'yes'; it is one of auto, on and off"),
        (FLAGS | {"process_count": "four"}, "--process_count is 'four'; it is a number of at least 1"),
        (FLAGS | {"process_count": "0"}, "--process_count is '0'"),
        (FLAGS | {"process_index": "4"}, "--process_index is 4 of --process_count=4; indices go from 0 to 3"),
        (FLAGS | {"process_index": "-1"}, "--process_index is '-1'"),
        (FLAGS | {"coordinator_address": "10.0.0.1"}, "it is HOST:PORT, such as"),
        ({"process_count": "2"}, "needs --coordinator_address and --process_index too"),
        ({"process_index": "1", "coordinator_address": "a:1"}, "needs --process_count too"),
        ({"start_timeout": "0"}, "--start_timeout is '0'"),
    ],
)
def test_what_cannot_be_a_job_is_one_sentence(flags, message):
    with pytest.raises(JobError, match=message) as raised:
        JobConfig.of(flags, {})
    assert "\n" not in str(raised.value)


def test_on_without_a_cluster_is_an_error(run_python, monkeypatch):
    """Hosts that do not find each other must not each train alone; without `on`, one process is the usual case."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    code = """
import jax
from jaxlm.parallel.multihost import *

def refusal(config):
    try:
        start(config)
    except JobError as error:
        return str(error)

told = JobConfig(Distributed.AUTO, "10.0.0.1:8476", 2, 0)
assert "jax detects no cluster; give --coordinator_address, --process_count" in refusal(JobConfig(Distributed.ON))
start(JobConfig(Distributed.AUTO))
start(JobConfig(Distributed.OFF, "10.0.0.1:8476", 4, 3))
start(JobConfig(Distributed.AUTO, "10.0.0.1:8476", 1, 0))
assert not in_job()
jax.devices()  # as in a notebook
start(JobConfig(Distributed.AUTO))
assert "must be called before" in refusal(told) and "must be called before" in refusal(JobConfig(Distributed.ON))
"""
    run_python(code)


def test_slurm_with_fewer_tasks_than_gpus(monkeypatch):
    """jax would give each task one GPU, and leave the others idle without a word."""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(JobError, match="8 GPUs and 1 tasks.*--ntasks-per-node=8"):
        start(JobConfig())


def test_a_task_that_slurm_calls_the_only_one_is_alone(monkeypatch):
    for name, value in {
        "JOB_ID": "1",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "STEP_NODELIST": "no-host",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    start(JobConfig())  # would wait for a host that does not exist


def test_processes_that_do_not_come_together_say_so(repository):
    """jax would abort with a page of C++."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = (
        "from jaxlm.parallel.multihost import *\n"
        f"start(JobConfig(coordinator_address='{address}', process_count=2, process_index=1, start_timeout=2))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("jaxlm:")]
    assert f"did not come together at {address} within 2 seconds (this is process 1); check that all" in sentence
    assert "Check failure" not in result.stderr


def test_one_process_agrees_with_itself():
    assert from_first(lambda: {"step": 3}) == {"step": 3}
    with pytest.raises(OSError, match="mine"), together():
        raise OSError("mine")


class FakeSharding:
    """The part of a sharding that `host_rows` reads: which device has which rows."""

    def __init__(self, owners):
        self.owners = owners

    def devices_indices_map(self, shape):
        size = shape[0] // len(self.owners)
        return {
            FakeDevice(part, device, process): (slice(part * size, (part + 1) * size),)
            for part, processes in enumerate(self.owners)
            for device, process in enumerate(processes)
        }


class FakeDevice:
    def __init__(self, part, device, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("owners", "rows"),
    [
        ([[0], [0], [1], [1]], [0, 1, 2, 3]),  # data parallel, two devices each
        ([[1], [0], [1], [0]], [2, 3, 6, 7]),  # a torus that goes through both hosts
        ([[0, 1], [0, 1]], list(range(8))),  # a tensor group over both hosts
        ([[0, 0], [1, 1]], [0, 1, 2, 3]),  # inside each host
    ],
)
def test_a_host_reads_the_rows_that_its_devices_hold(owners, rows, monkeypatch):
    monkeypatch.setattr(Parallelism, "batch_sharding", lambda self, size: FakeSharding(owners))
    np.testing.assert_array_equal(Parallelism(None, None).host_rows(8), rows)
