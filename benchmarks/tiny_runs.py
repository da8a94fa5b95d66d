"""Tiny runs through the command line: a corpus, gin files for them, and what they leave in their folders.

Shared by the tests of whole runs and by the benchmark that kills them.
"""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence

from jaxlm import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
OBSERVED = pathlib.Path(__file__).with_name("observed.py")
# Of processes that are started here; what is set already stays.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path.home() / ".cache" / "jaxlm" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    **os.environ,
    "PYTHONPATH": str(ROOT),
}

_TIMES = ("train/seconds_per_step", "train/tokens_per_second", "train/data_wait", "train/mfu")


class Workshop:
    """Where tiny runs are made.

    Attributes:
      folder: run folders lie in it.
      corpus: three text files of random words, 27 kB in all.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.corpus = folder / "corpus"
        self.corpus.mkdir()
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(60)]
        for n in range(3):
            lines = (" ".join(rng.choices(words, k=12)) + "." for _ in range(180))
            (self.corpus / f"{n}.txt").write_text("\n".join(lines))

    def gin(
        self,
        name: str,
        text: str = "",
        *,
        model: str = "causal_decoder",
        objective: str = "full_lm",
        data: str = "files",
        imports: Sequence[str] = (),
    ) -> pathlib.Path:
        """A gin file for a tiny run: shipped files and `text`. `imports` are modules of jaxlm that `text` names."""
        path = self.folder / f"{name}.gin"
        modules = dict.fromkeys(("data.config", "training.loop", *imports))
        files = "" if data == "mixture" else f"FILES = '{self.corpus}'\n"
        path.write_text(
            "from __gin__ import dynamic_registration\n"
            + "".join(f"from {'.'.join(['jaxlm', *m.split('.')[:-1]])} import {m.split('.')[-1]}\n" for m in modules)
            + f"include 'gin_configs/models/tiny/{model}.gin'\n"
            + f"include 'gin_configs/objectives/{objective}.gin'\n"
            + f"include 'gin_configs/data/{data}.gin'\n"
            + "include 'gin_configs/runs/pretrain.gin'\n"
            + files
            + f"config.DataConfig.cache_directory = '{self.folder / 'cache'}'\n"
            + "TASK_FEATURE_LENGTHS = {'targets': 32}\n"
            + "WIDTH = 32\nHIDDEN = 64\nBATCH_SIZE = 8\nTRAIN_STEPS = 12\n"
            + "EVAL_PERIOD = 6\nEVAL_STEPS = 2\nCHECKPOINT_PERIOD = 4\nloop.LoopConfig.log_period = 1\n"
            + text
        )
        return path

    def arguments(self, run: str | pathlib.Path, gin: pathlib.Path, *bindings: str) -> list[str]:
        """The command line of a run in the folder `run`; a binding is "NAME=value"."""
        return [
            f"--gin_file={gin}",
            f"--gin.MODEL_DIR='{self.folder / run}'",
            *(f"--gin.{binding}" for binding in bindings),
        ]

    def train(self, run: str | pathlib.Path, gin: pathlib.Path, *bindings: str) -> pathlib.Path:
        """A run in this process, to its end; returns its folder."""
        assert train.main(self.arguments(run, gin, *bindings)) == 0
        return self.folder / run

    def observe(self, run: str | pathlib.Path, gin: pathlib.Path, *bindings: str, devices: int = 1) -> dict:
        """A run in a process of its own with so many devices; returns what `observed.py` saw, and its output."""
        out = self.folder / "observed.json"
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        result = subprocess.run(
            [sys.executable, OBSERVED, out, *self.arguments(run, gin, *bindings)],
            env={**ENVIRONMENT, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(out.read_text()) | {"output": result.stdout, "errors": result.stderr}

    def rewound(self, run: str | pathlib.Path, step: int, to: str) -> pathlib.Path:
        """A copy of a run's folder as a kill leaves it, when `step` was its newest checkpoint."""
        copy = self.folder / to
        shutil.copytree(self.folder / run, copy, ignore=shutil.ignore_patterns("run.lock"))
        for checkpoint in (copy / "checkpoints").iterdir():
            if int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)
        assert (copy / "checkpoints" / str(step)).is_dir(), f"{run} keeps no checkpoint of step {step}"
        record = json.loads((copy / "run.json").read_text())
        (copy / "run.json").write_text(json.dumps(record | {"finished_at_step": None}))
        return copy


def metrics(folder: pathlib.Path) -> dict[int, dict[str, float]]:
    """{step: training metrics} of a run, without times; each step must be there once."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        values = {name: x for name, x in values.items() if name.startswith("train/") and name not in _TIMES}
        if values:
            assert step not in found, f"step {step} is there twice"
            found[step] = values
    return found
