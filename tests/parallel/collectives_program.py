"""Run with 8 devices by test_collectives.py: sums around a ring, and gradients of a gather, against numpy."""

import json

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm.parallel.collectives import gather, ring_sum, scatter_sum
from jaxlm.parallel.mesh import MeshConfig

mesh = MeshConfig(data=2, fsdp=4).make()
rng = np.random.default_rng(0)
answer = {}
for name, axes, count in (("one axis", "fsdp", 4), ("two axes", ("data", "fsdp"), 8)):
    for dimension, shape in ((0, (16, 6)), (1, (3, 24)), (0, (8, 5))):
        x = rng.standard_normal((count, *shape)).astype(np.float32)
        out = [None, None]
        out[dimension] = axes
        summed = jax.jit(
            jax.shard_map(
                lambda x, a=axes, d=dimension: ring_sum(x[0], a, d),
                mesh=mesh,
                in_specs=PartitionSpec(axes),
                out_specs=PartitionSpec(*out),
                check_vma=False,
            )
        )(x)
        answer[f"ring, {name}, {dimension}, {shape}"] = float(np.abs(np.asarray(summed) - x.sum(0)).max())

weights = rng.standard_normal((8, 16, 6)).astype(np.float32)


def loss(x, weights):  # every device weighs the whole array in its own way
    return (gather(x, "fsdp", 0) * weights[0]).sum()[None]


def total(x):
    split = PartitionSpec("fsdp"), PartitionSpec(("data", "fsdp"))
    return jax.shard_map(loss, mesh=mesh, in_specs=split, out_specs=split[1], check_vma=False)(x, weights).sum()


x = rng.standard_normal((16, 6)).astype(np.float32)
answer["gather"] = abs(float(jax.jit(total)(x)) - float((x * weights.sum(0)).sum())) / 100
answer["gradient"] = float(np.abs(np.asarray(jax.jit(jax.grad(total))(x)) - weights.sum(0)).max())


def scattered(x, weights):  # each device gives a sum another array, and weighs its own part
    split = PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp")
    return jax.shard_map(
        lambda x, w: (scatter_sum(x[0], "fsdp", 0) * w).sum()[None],
        mesh=mesh,
        in_specs=split,
        out_specs=split[0],
        check_vma=False,
    )(x, weights).sum()


gradient = np.asarray(jax.jit(jax.grad(scattered))(weights, x))
answer["scatter_sum"] = abs(float(jax.jit(scattered)(weights, x)) - float((x * weights.sum(0)).sum())) / 100
answer["gradient of scatter_sum"] = float(np.abs(gradient - x).max())
print(json.dumps(answer))
