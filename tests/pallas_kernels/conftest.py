"""Shared by kernel tests: a clean interpreter for each test, and races as failures on every jax."""

import contextlib
import sys
from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def clean_tpu_interpreter():
    """Forgets a TPU kernel that a failing test left half interpreted: jax asks for it, so that only that test fails."""
    yield
    if pltpu := sys.modules.get("jax.experimental.pallas.tpu"):
        pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def no_races(capfd) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with no_races(): ...` fails if `detect_races=True`, of the TPU or the GPU interpreter, finds one inside.

    Wait for the kernels' results inside. From jax 0.12 on a race is an exception; before, it is only printed.
    """

    @contextlib.contextmanager
    def watch():
        yield
        said = capfd.readouterr().out
        assert "RACE DETECTED" not in said, said

    return watch
