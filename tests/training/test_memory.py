"""What is stored between steps: ZeRO-1, moments in fewer bits and on the host. The numbers stay those without."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import Memory, ParallelConfig, check_host_memory
from jaxlm.training.moments import MomentStorage, Rounding, _round_stochastically


def test_levers_of_memory_change_no_gradient(run_python, tmp_path):
    """Of a packed decoder on fsdp 2 x data 4: state in eighths, moments on the host in bfloat16, two microbatches."""
    output = run_python(["tests/training/memory_program.py", str(tmp_path)], devices=8).stdout
    found = json.loads(output.strip().splitlines()[-1])
    assert found["loss"] <= 1e-6, found
    assert found["gradients"] <= 1e-5, found  # law 3
    assert found["compiles"] == 1
    assert found["moments"] == [["pinned_host", "bfloat16"]]
    assert found["others"] == [["device", "float32"]]
    assert found["whole"] == [], "each device stores an eighth of every parameter"
    assert found["restored"] and found["restored_where"]


def test_stochastic_rounding_is_right_on_average_and_exact_on_bfloat16():
    """A second moment that loses a thousandth a step sinks as it should; rounded to nearest it stands still."""
    x = jnp.full(20_000, 1.0, jnp.float32)
    stochastic, nearest = x.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    for step in range(20):
        stochastic = _round_stochastically(0.999 * stochastic.astype(jnp.float32), jnp.uint32(step))
        nearest = (0.999 * nearest.astype(jnp.float32)).astype(jnp.bfloat16)
    assert nearest[0] == 1.0
    # Each rounding errs by at most 2^-8, independently: the mean of 20,000 after 20 roundings is known to 1.2e-4.
    assert abs(float(stochastic.astype(jnp.float32).mean()) - 0.999**20) < 5 * 2**-8 * (20 / 20_000) ** 0.5
    exact = jnp.asarray([0.0, -1.5, 3e38, jnp.inf, -jnp.inf], jnp.bfloat16)
    got = _round_stochastically(exact.astype(jnp.float32), jnp.uint32(0))
    np.testing.assert_array_equal(np.float32(got), np.float32(exact))
    assert jnp.isnan(_round_stochastically(jnp.asarray([jnp.nan]), jnp.uint32(0)))[0]


def test_layers_of_a_stacked_array_round_by_their_own_seeds():
    """As the same layers do one by one."""
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    seeds = jnp.asarray([5, 6, 7], jnp.uint32)
    together = _round_stochastically(x, seeds.reshape(3, 1, 1))
    for layer in range(3):
        np.testing.assert_array_equal(together[layer], _round_stochastically(x[layer], seeds[layer]))


def test_what_cannot_be_stored_so_is_refused():
    with pytest.raises(ValueError, match=r"state_rules has rules for \['width'\], which are not among"):
        ParallelConfig(MeshConfig(), state_rules=(("width", ("data",)),))
    with pytest.raises(ValueError, match="MomentStorage.second is 'int8'; moments are stored as"):
        MomentStorage(second="int8")
    with pytest.raises(ValueError, match="'randomly' is not a valid Rounding"):
        MomentStorage(rounding="randomly")
    assert MomentStorage(rounding="nearest").rounding is Rounding.NEAREST


def test_devices_without_memory_of_their_host_are_refused():
    class Kind:
        kind = "device"

    class Device:
        device_kind = "toaster"

        def addressable_memories(self):
            return [Kind()]

    class Mesh:
        devices = np.array([Device()], object)

    with pytest.raises(ValueError, match="'pinned_host' needs .* but a toaster has only device"):
        check_host_memory(Mesh(), f"ParallelConfig.moments = {Memory.HOST.value!r}")
