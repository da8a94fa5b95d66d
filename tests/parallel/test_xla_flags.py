"""Presets of compiler flags: the installed compilers take every one, and what the user set wins."""

import os
import subprocess
import sys

import pytest

from jaxlm.parallel.xla_flags import PRESETS, Flag, Numerics, Preset, Variable, find, merged, use
from pallas_kernels.ahead_of_time import why_not

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
COMPILE = """
import sys, jax, jax.numpy as jnp
from pallas_kernels.ahead_of_time import compile_for
compile_for(sys.argv[1], lambda x, y: jax.nn.relu(x @ y).sum(), *[jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)] * 2)
print("compiled")
"""


def run(code: str, *arguments: str, repository, **environment: str) -> subprocess.CompletedProcess:
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": str(repository), **environment}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_libtpu_takes_every_flag(name, repository):
    """Also the values: it refuses some at the first program, as fused all-gathers on other chips than v5e."""
    if reason := why_not(TOPOLOGIES[name]):
        pytest.skip(reason)
    assert all(flag.variable is Variable.LIBTPU for flag in find(name).flags)
    flags = merged(find(name), {})
    result = run(COMPILE, TOPOLOGIES[name], repository=repository, **flags)
    assert result.stdout == "compiled\n", result.stderr


def test_libtpu_refuses_what_it_does_not_know(repository):
    """Without this the test above could not fail."""
    if reason := why_not("v5e:2x2"):
        pytest.skip(reason)
    unknown = run(COMPILE, "v5e:2x2", repository=repository, LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true")
    assert unknown.returncode and "Unknown command line flag 'xla_tpu_no_such_flag'" in unknown.stdout + unknown.stderr


def test_xla_takes_every_gpu_flag(repository):
    """jaxlib knows the GPU compiler's flags on every machine, and ends the process at one that it does not know."""
    (hopper,) = {merged(find(name), {})["XLA_FLAGS"] for name in ("h100", "h200")}
    code = "import jax; print(len(jax.devices()))"
    assert run(code, repository=repository, XLA_FLAGS=hopper).stdout == "1\n"
    unknown = run(code, repository=repository, XLA_FLAGS=f"{hopper} --xla_gpu_no_such_flag=true")
    assert unknown.returncode and "xla_gpu_no_such_flag" in unknown.stderr


def test_every_flag_says_why():
    for preset in PRESETS.values():
        names = [flag.name for flag in preset.flags]
        assert len(names) == len(set(names))
        for flag in preset.flags:
            assert len(flag.reason) > 20 and flag.source and not flag.name.startswith("-")
    assert {"v5e", "v5p", "v6e", "tpu7x", "h100", "h200", "cpu"} == set(PRESETS)


def test_what_the_environment_has_wins():
    flags = tuple(Flag(name, "1", "", "", Variable.LIBTPU) for name in ("a", "ab"))
    environment = {"LIBTPU_INIT_ARGS": "--a=2 --c=3", "XLA_FLAGS": "--d=4"}
    use_merged = merged(Preset("mine", "", flags), environment)
    assert use_merged == {"LIBTPU_INIT_ARGS": "--ab=1 --a=2 --c=3"}
    environment = {}
    use("v6e", environment)
    assert environment["LIBTPU_INIT_ARGS"].startswith("--xla_tpu_scoped_vmem_limit_kib=98304 ")
    use("cpu", environment), use(None, environment)
    assert set(environment) == {"LIBTPU_INIT_ARGS"}
    with pytest.raises(ValueError, match="no XLA preset 'v7'; there are v5e, v5p, v6e"):
        use("v7", environment)


def test_presets_need_neither_jax_nor_the_library(repository):
    code = "import sys; from jaxlm.parallel import xla_flags; print({'jax', 'numpy'} & set(sys.modules))"
    assert run(code, repository=repository).stdout == "set()\n"
    command = [sys.executable, "-m", "jaxlm.parallel.xla_flags"]
    shown = subprocess.run([*command, "v5p"], cwd=repository, capture_output=True, text=True).stdout
    assert (
        "--xla_tpu_scoped_vmem_limit_kib=65472\n  on-chip memory" in shown
        and f"numbers: {Numerics.ORDER.value}" in shown
    )
    exported = subprocess.run([*command, "--export", "h200"], cwd=repository, capture_output=True, text=True).stdout
    assert exported.startswith("export XLA_FLAGS='--xla_gpu_enable_latency_hiding_scheduler=true ")
    wrong = subprocess.run([*command, "v7"], cwd=repository, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
