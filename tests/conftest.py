"""Shared by all tests: the `--full` option, the compilation cache, real data, and Python in a subprocess."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAPPINGS, MOST_MAPPINGS = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/sys/vm/max_map_count")  # of Linux

# Set before anything imports jax, and inherited by subprocesses.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxlm" / "xla"
for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(_CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    # Threads of XLA's pool. The GPU interpreter blocks one for each warpgroup that waits at a barrier: with the two of
    # a small machine it can wait for ever.
    "NPROC": "8",
    # libtpu compiles for TPUs that are not there: two processes may load it, and it must not ask for metadata.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}.items():
    os.environ.setdefault(_name, _value)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked `full` (the complete sets)")
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what is resolved now")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    for item in items:
        if item.get_closest_marker("full"):  # not `in item.keywords`, which holds names of parameters too
            item.add_marker(pytest.mark.skip(reason="part of the complete set: run with --full"))


@pytest.fixture(scope="module", autouse=True)
def programs_forgotten():
    """Forgets compiled programs after a module, once they take half of the memory mappings that a process may have.

    Each takes several; where XLA gets no more it ends with a segmentation fault.
    """
    yield
    if MAPPINGS.exists() and sum(1 for _ in MAPPINGS.open()) > int(MOST_MAPPINGS.read_text()) // 2:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether the complete sets were asked for, for tests that do more of the same under `--full`."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder with real corpora and tokenizers; skips where it is absent."""
    folder = pathlib.Path(os.environ.get("JAXLM_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set JAXLM_SHARED_DATA to a folder that has it")
    return folder


@pytest.fixture(scope="session")
def run_python():
    """A function that runs Python in a subprocess, from the repository's root, with N CPU devices."""

    def run(
        code: str | list[str],
        *,
        devices: int = 1,
        timeout: float = 300,
        check: bool = True,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess:
        """Runs `code` (or `python *code`, if a list); fails the test on a non-zero exit unless check=False."""
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        result = subprocess.run(
            [sys.executable, *(["-c", code] if isinstance(code, str) else code)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and result.returncode:
            pytest.fail(f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    return run
