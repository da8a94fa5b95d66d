"""Tiny runs through the command line, for the tests of this folder."""

import jax
import numpy as np
import pytest

from benchmarks.tiny_runs import Workshop, metrics
from jaxlm.checkpoints import stored


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session", name="metrics")
def _metrics():
    return metrics


@pytest.fixture(scope="session", name="losses")
def _losses():
    """A function of a run's folder: {step: loss}."""
    return lambda folder: {step: values["train/loss"] for step, values in metrics(folder).items()}


@pytest.fixture(scope="session")
def same_arrays():
    """A function (checkpoint, checkpoint, names): whether they hold the same bits under these names."""

    def same(a, b, names):
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        layouts = {path: stored.Request((path,), None, x.shape, x.dtype, device) for path, x in a.leaves.items()}
        requests = {path: layouts[path] for path in names}
        first, second = a.read(requests), b.read(requests)
        return all(np.asarray(first[path]).tobytes() == np.asarray(second[path]).tobytes() for path in names)

    return same
