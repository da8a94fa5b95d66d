"""Several processes of one job save and restore together, and agree on what is damaged."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
import sys, time
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.checkpoints.surgery import Fill, PickLayers, Resize, Scale
from jaxlm.checkpoints.warm_start import WarmStart, warm_start
from jaxlm.layers.stacking import StackLayout

process, count, port, folder, action = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.distributed.initialize(f"localhost:{port}", count, process)
mesh = Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(AxisType.Auto,))
values = {"decoder": {"layers": {"0": {"kernel": np.sin(np.arange(3 * 8 * 4, dtype=np.float32)).reshape(3, 8, 4)}}},
          "embedding": np.arange(16 * 4, dtype=np.float32).reshape(16, 4)}
specs = {"decoder": {"layers": {"0": {"kernel": P(None, "fsdp")}}}, "embedding": P("fsdp")}

def place(value, spec):
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])

state = {"params": jax.tree.map(place, values, specs)}
with CheckpointManager(folder, CheckpointConfig(), (StackLayout(("decoder",), pattern=1, repeats=3),)) as manager:
    if action == "save":
        for step in (1, 2):
            manager.save(step, state, data={"batch": step})
        manager.wait()
        time.sleep(process)  # the second step again, as after going back; processes come to it one after the other
        manager.save(2, state, data={"batch": 2})
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = manager.restore(target)
for found, value in zip(jax.tree.leaves(restored.state["params"]), jax.tree.leaves(values), strict=True):
    for shard in found.addressable_shards:
        assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes()
if action == "save":  # a larger model, filled by surgery: made whole on each host, placed shard by shard
    larger = {"decoder": {"layers": {"0": {"kernel": np.zeros((4, 8, 4), np.float32)}}},
              "embedding": np.full((24, 4), 7, np.float32)}
    rules = (PickLayers((0, 1, 2, 0)), Scale("decoder/layers/3/kernel", 0.5), Resize("embedding", 0, fill=Fill.INITIAL))
    layouts = (StackLayout(("decoder",), pattern=1, repeats=4),)
    params = jax.tree.map(place, larger, specs)
    params = warm_start(params, WarmStart(folder, rules=rules), layouts, report=lambda _: None).params
    kernel = values["decoder"]["layers"]["0"]["kernel"]
    expected = {"decoder": {"layers": {"0": {"kernel": np.concatenate([kernel, kernel[:1] / 2])}}},
                "embedding": np.concatenate([values["embedding"], np.full((8, 4), 7, np.float32)])}
    for found, value in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert len(found.addressable_shards) < len(found.global_shards)
        for shard in found.addressable_shards:
            assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes()
print("restored", restored.checkpoint.step, restored.checkpoint.data)
"""


def run(count, folder, action):
    """Runs the program in `count` processes; returns what each printed last."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), str(count), str(port), str(folder), action],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        for i in range(count)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    if any(process.returncode for process in processes):
        pytest.fail("\n---\n".join(said))
    return [text.strip().splitlines()[-1] for text in said]


def test_two_processes_save_one_restores(tmp_path):
    """Each process writes its shards; what only the first one looks for, damage and later steps, both know of."""
    assert run(2, tmp_path, "save") == ["restored 2 {'batch': 2}"] * 2
    assert (tmp_path / "2.set_aside").is_dir()
    assert run(1, tmp_path, "restore") == ["restored 2 {'batch': 2}"]
    path = max((tmp_path / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run(2, tmp_path, "restore") == ["restored 1 {'batch': 1}"] * 2
