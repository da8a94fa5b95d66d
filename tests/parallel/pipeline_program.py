"""Run with 8 devices by test_pipeline.py: toy layers in stages against the same layers in sequence.

The layer gives NaN, and NaN derivatives, for rows that are zeros, and so do identity layers' parameters: what stages
compute while they have no microbatch must not be seen anywhere.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.parallel.pipeline import StackedLayers
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.parallel.stages import Pipeline

T, E = 2, 4
rng = np.random.default_rng(0)


def layer(strength, ops, x, index, w, rows, shared):
    scale, ids = rows
    numbers = ops.row_numbers(len(x))
    place = jnp.sin(1.0 + index + 3 * numbers)[:, None, None]  # each repeat and row does something of its own
    y = jnp.tanh(x @ w) * strength(scale)[..., None] * place + shared[ids] * jnp.cos(index)
    return x + y, {"size": jnp.sum(scale * (1 + index)), "tokens": jnp.sum(ids, dtype=jnp.float32)}


def value_and_gradients(parallel, repeats, batch, arrays):
    """Output, side values, and gradients of parameters (in order of the repeats), x, scale and shared."""
    # Rows that are added to fill microbatches are zeros too, and seen: layers must be finite for them.
    strength = jnp.log if batch % 2 == 0 else jnp.sin
    stages = parallel.stages
    rows = stages.order(repeats)
    w = np.full((len(rows), E, E), np.nan, np.float32)
    w[rows < repeats] = arrays["w"][rows[rows < repeats]]

    @jax.jit
    def run(w, x, scale, shared):
        def loss(w, x, scale, shared):
            layers = StackedLayers(w, repeats, stages)
            y, side = ShardedOps(parallel).run_layers(
                functools.partial(layer, strength), layers, x, (scale, arrays["ids"]), shared
            )
            return jnp.sum(y * jnp.cos(jnp.arange(E))) + side["size"] / 10, (y, side)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(w, x, scale, shared)

    w = jax.device_put(w, parallel.sharding(("layers", None, None), w.shape))
    (_, aux), grads = run(w, arrays["x"], arrays["scale"], arrays["shared"])
    aux, (dw, *others) = jax.device_get((aux, grads))
    return aux, (dw[np.argsort(rows)[:repeats]], *others)


answer = {}
for name, mesh, pipeline, repeats, batch in (
    ("gpipe, identity layer", MeshConfig(stage=2, data=4), Pipeline(6), 3, 24),
    ("circular, identity layers", MeshConfig(stage=4, fsdp=2), Pipeline(8, 2, "stage"), 13, 16),
    ("three rounds, rows added", MeshConfig(stage=2, data=1), Pipeline(4, 3, "stage"), 6, 5),
):
    arrays = {
        "w": rng.normal(size=(repeats, E, E)).astype(np.float32),
        "x": rng.normal(size=(batch, T, E)).astype(np.float32),
        "scale": rng.uniform(1.1, 2, size=(batch, T)).astype(np.float32),
        "ids": rng.integers(0, 3, size=(batch, T)).astype(np.int32),
        "shared": rng.normal(size=(3, E)).astype(np.float32),
    }
    devices = jax.devices()[: mesh.stage * mesh.fsdp * mesh.data if mesh.data > 0 else 8]
    expected = value_and_gradients(ParallelConfig(MeshConfig()).on(devices[:1]), repeats, batch, arrays)
    found = value_and_gradients(ParallelConfig(mesh, pipeline=pipeline).on(devices), repeats, batch, arrays)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(a).max()), expected, found)
    answer[name] = max(jax.tree.leaves(differences))  # NaN is larger than nothing: the test compares with <=
    answer[name] = answer[name] if all(np.isfinite(x).all() for x in jax.tree.leaves(found)) else "NaN"
print(json.dumps(answer))
