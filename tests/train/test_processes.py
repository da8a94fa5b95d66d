"""Law 3 and 4 across processes: `python -m jaxlm.train` as 1, 2 and 4 processes is one run, whoever continues it.

All runs have the same mesh, 2 x 2 of fsdp and tensor: two processes hold half of a batch each, and of four each two
that share a tensor group hold the same rows.
"""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm.checkpoints import stored
from jaxlm.exit_status import ExitStatus
from jaxlm.training.loop import Outcome

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(__file__).with_name("process_program.py")
STEPS = 12
# What is compared is the same program on each number of processes; unoptimised it compiles in half the time.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def job(
    workshop, count: int, arguments: list[str], *, environments=None, extra=None, expected: int = 0
) -> tuple[list[dict], list[str]]:
    """Runs the program in `count` processes of 4 / count devices.

    Args:
      environments, extra: {process: environment variables}, {process: arguments} of some processes.
      expected: exit status of all.

    Returns:
      What each process observed, and its standard output and error.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(count):
        flags = [f"--coordinator_address=localhost:{port}", f"--process_count={count}", f"--process_index={index}"]
        flags_of_xla = f"{XLA_FLAGS} --xla_force_host_platform_device_count={4 // count}"
        processes.append(
            subprocess.Popen(
                [sys.executable, PROGRAM, workshop.folder / f"observed.{index}", *arguments]
                + (flags if count > 1 else [])
                + (extra or {}).get(index, []),
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "XLA_FLAGS": flags_of_xla,
                    **(environments or {}).get(index, {}),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [expected] * count, "\n---\n".join(said)
    return [json.loads((workshop.folder / f"observed.{index}").read_text()) for index in range(count)], said


@pytest.fixture(scope="module")
def runs(workshop):
    """{name: what its processes observed}: "two" is preempted on the way; "four" and "back" go on from there."""
    gin = workshop.gin("processes")

    def arguments(name: str) -> list[str]:
        sizes = ("NUM_LAYERS=1", "MeshConfig.data=1", "MeshConfig.fsdp=2", "MeshConfig.tensor=2")
        periods = ("EVAL_PERIOD=12", "CHECKPOINT_PERIOD=20")
        samples = () if name == "four" else ("RunConfig.samples=None",)
        return workshop.arguments(name, gin, *sizes, *periods, *samples)

    found = {"one": job(workshop, 1, arguments("one"))[0]}
    found["two"], said = job(
        workshop, 2, arguments("two"), environments={1: {"SIGTERM_AT": "2"}}, expected=ExitStatus.PREEMPTED
    )
    assert f"Ended early ({Outcome.PREEMPTED.value}); the same command continues." in said[0]
    for name, count in (("four", 4), ("back", 1)):
        shutil.copytree(workshop.folder / "two", workshop.folder / name, ignore=shutil.ignore_patterns("run.lock"))
        found[name], said = job(workshop, count, arguments(name))
        assert "Continues from the checkpoint of step" in said[0]
        assert "Plan" in said[0] and "| loss" in said[0]
        for text in said[1:]:
            assert not re.search(r"Plan|\| loss|Continues|Finished", text), text
    return found


def stopped_at(runs) -> int:
    return max(map(int, runs["two"][0]["values"]))


def test_one_asked_to_end_ends_all_with_a_checkpoint(runs, workshop):
    step = stopped_at(runs)
    assert 2 <= step < STEPS
    assert stored.committed_steps(workshop.folder / "two" / "checkpoints") == (step,)
    assert [max(map(int, seen["values"])) for seen in runs["two"]] == [step, step]


def test_every_process_reads_the_same_values(runs):
    times = re.compile("train/(seconds_per_step|tokens_per_second|data_wait)")
    for name in ("two", "four"):
        first, *others = (
            {step: {k: v for k, v in values.items() if not times.match(k)} for step, values in seen["values"].items()}
            for seen in runs[name]
        )
        assert first and all(other == first for other in others)


def test_losses_are_those_of_one_process(runs):
    step = stopped_at(runs)
    expected = runs["one"][0]["values"]
    for name, steps in (
        ("two", range(1, step + 1)),
        ("four", range(step + 1, STEPS + 1)),
        ("back", range(step + 1, STEPS)),
    ):
        for k in map(str, steps):
            for metric in ("train/loss", "train/grad_norm", "validation/cross_entropy"):
                if metric in expected[k]:
                    assert runs[name][0]["values"][k][metric] == pytest.approx(expected[k][metric], rel=1e-5)
    assert "validation/cross_entropy" in expected[str(STEPS)] and "train/grad_norm" in expected["1"]


def test_the_token_stream_is_that_of_one_process(runs):
    """Each step's rows are shared out between two processes; of four, each pair reads the same half."""
    whole = runs["one"][0]["rows"]
    for name, shared in (("two", 1), ("four", 2)):
        first = 1 if name == "two" else stopped_at(runs) + 1
        last = stopped_at(runs) if name == "two" else STEPS
        for k in map(str, range(first, last + 1)):
            held = [seen["rows"][k] for seen in runs[name]]
            assert sum(map(len, held)) == shared * len(whole[k]) == shared * 8
            assert {row: digest for rows in held for row, digest in rows.items()} == whole[k]


def test_parameters_are_those_of_one_process(runs, workshop):
    """A checkpoint written by two processes is read by four and by one, which end where one process ends."""

    def params(name):
        checkpoint = stored.open_checkpoint(workshop.folder / name / "checkpoints", STEPS)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        paths = {path: x for path, x in checkpoint.leaves.items() if path[0] == "params"}
        read = {p: stored.Request((p,), None, x.shape, x.dtype, device) for p, x in paths.items()}
        return {path: np.asarray(x) for path, x in checkpoint.read(read).items()}

    expected = params("one")
    assert len(expected) > 5
    for name in ("four", "back"):
        for path, found in params(name).items():
            assert np.linalg.norm(found - expected[path]) <= 1e-5 * np.linalg.norm(expected[path]), (name, path)


def test_the_first_process_alone_writes(runs, workshop):
    folder = workshop.folder / "four"
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, STEPS + 1))
    record = json.loads((folder / "run.json").read_text())
    assert [start["processes"] for start in record["starts"]] == ["2", "4"]
    assert record["finished_at_step"] == STEPS and (folder / "report.md").exists()
    assert (folder / "samples" / f"step_{STEPS:08d}.txt").read_text().count("model:") == 2
    assert len(list((folder / "tensorboard").iterdir())) == 2


def test_what_one_process_finds_wrong_ends_all_with_its_sentence(workshop):
    """Law 8: nobody waits for a process that has given up, and nothing is written."""
    arguments = workshop.arguments("refused", workshop.gin("refused"))
    missing = [f"--gin.FILES='{workshop.folder / 'nowhere'}'"]
    _, said = job(workshop, 2, arguments, extra={1: missing}, expected=1)
    assert "jaxlm.train: No text at" in said[1]
    assert "jaxlm.train: Process 1 of 2 cannot go on: No text at" in said[0]
    assert not (workshop.folder / "refused").exists()
