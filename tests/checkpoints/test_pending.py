"""Conversion into a checkpoint: one array at a time, and what comes of it is a checkpoint like any other."""

import time
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxlm.checkpoints import conversion, naming, pending, stored
from jaxlm.checkpoints.huggingface.folder import HuggingFaceFolder, open_folder
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.sources import open_source
from tests.checkpoints.huggingface.test_folder import written

ARRAYS = {
    ("params", "layers", str(i), name): np.random.default_rng(i).normal(size=shape).astype(dtype)
    for i in range(3)
    for name, shape, dtype in (
        ("kernel", (24, 16), np.float32),
        ("scale", (16,), ml_dtypes.bfloat16),
        ("gate", (), np.float32),
    )
}


def save(folder, arrays):
    with CheckpointManager(folder, CheckpointConfig(), handler=pending.handler()) as manager:
        manager.save(0, naming.nest(arrays), config="text", metrics={"loss": 1.0})


def of(value, make=None):
    return pending.Pending(value.shape, value.dtype, make or (lambda: value))


def test_what_is_written_is_what_training_would_write(tmp_path):
    """Leaves, bytes, what stands beside them; read one by one, as a tree, and by the manager that saved it."""
    save(tmp_path / "pending", {path: of(value) for path, value in ARRAYS.items()})
    with CheckpointManager(tmp_path / "arrays", CheckpointConfig()) as manager:
        manager.save(0, naming.nest(ARRAYS), config="text", metrics={"loss": 1.0})
    ours, theirs = (stored.open_latest(tmp_path / name) for name in ("pending", "arrays"))
    assert ours.leaves == theirs.leaves and ours.config == theirs.config and ours.metrics == theirs.metrics
    target = naming.nest({path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in ARRAYS.items()})
    restored = naming.flatten(ours.restore(target))
    for path, value in ARRAYS.items():
        for found in (ours.array(path), theirs.array(path), np.asarray(restored[path])):
            assert found.dtype == value.dtype and found.shape == value.shape and found.tobytes() == value.tobytes()


def test_restores_onto_a_mesh(tmp_path, run_python):
    value = ARRAYS["params", "layers", "0", "kernel"]
    save(tmp_path, {("params", "kernel"): of(value)})
    program = f"""
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxlm.checkpoints import stored
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
leaf = jax.ShapeDtypeStruct((24, 16), np.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor")))
found = stored.open_latest({str(tmp_path)!r}).restore({{"params": {{"kernel": leaf}}}})["params"]["kernel"]
assert found.sharding == leaf.sharding and found.addressable_shards[0].data.shape == (6, 8)
print(np.asarray(found).tobytes().hex())
"""
    assert run_python(program, devices=8).stdout.strip() == value.tobytes().hex()


def test_one_array_at_a_time(tmp_path):
    """Before one is made, all that were made before are let go, by themselves: TensorStore's threads take a moment."""
    alive = []

    def make(value):
        end = time.monotonic() + 30
        while any(reference() is not None for reference in alive):
            assert time.monotonic() < end, "an array that is written is still in memory"
            time.sleep(0.01)
        made = value.copy()
        alive.append(weakref.ref(made))
        return made

    save(tmp_path, {path: of(value, lambda value=value: make(value)) for path, value in ARRAYS.items()})
    assert len(alive) == len(ARRAYS)
    checkpoint = stored.open_latest(tmp_path)
    assert all(checkpoint.array(path).tobytes() == value.tobytes() for path, value in ARRAYS.items())


def test_what_cannot_be_made_leaves_no_checkpoint(tmp_path):
    value = ARRAYS["params", "layers", "0", "kernel"]
    for wrong in (value[1:], value.astype(np.float64)):
        with pytest.raises(CheckpointError, match="params.b came as"):
            save(tmp_path, {("params", "a"): of(value), ("params", "b"): of(value, lambda wrong=wrong: wrong)})
        assert stored.committed_steps(tmp_path) == ()


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    written(tmp_path / "model")
    read = HuggingFaceFolder.array

    def damaged(self, path):
        if path[-2:] == ("norm", "scale"):
            raise ValueError("model.safetensors is damaged")
        return read(self, path)

    monkeypatch.setattr(HuggingFaceFolder, "array", damaged)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        conversion.to_jaxlm(open_folder(tmp_path / "model"), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_becomes_a_run(tmp_path):
    """Its manifest holds, and every parameter is what it was, bit for bit."""
    _, values = written(tmp_path / "model")
    conversion.to_jaxlm(open_folder(tmp_path / "model"), tmp_path / "run")
    found = open_source(tmp_path / "run")
    assert found.step == 0 and {naming.show(path[1:]) for path in found.leaves} == set(values)
    for path in found.leaves:
        assert found.array(path).tobytes() == values[naming.show(path[1:])].tobytes()
