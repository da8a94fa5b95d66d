"""The dense reference against float64, and itself the measure of narrower types."""

import jax.numpy as jnp
import pytest

from pallas_kernels import conformance


@pytest.mark.parametrize("name", conformance.CASES)
def test_float32(name):
    conformance.check("xla", name, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_leaks(dtype):
    conformance.check_nothing_leaks("xla", dtype)
