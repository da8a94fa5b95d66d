"""Run with 8 devices by test_meshes.py: a mixture of experts on several meshes, and one that must not drop tokens."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from mesh_agreement import agreement
from small_models import decoder, packed_batch

from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.mixture_of_experts import MixtureOfExpertsConfig
from jaxlm.layers.parameters import InitConfig, ParameterMaker, Parametrization, PathKey
from jaxlm.layers.stack import Remat
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.parallel.sharded_ops import ShardedOps

EXPERTS = MixtureOfExpertsConfig(
    32, num_experts=4, experts_per_token=2, shared=FeedForwardConfig(16), balance_loss=0.1, z_loss=0.01
)
dense = decoder(remat=Remat.NONE)
block = dataclasses.replace(dense.decoder.blocks[0], feed_forward=EXPERTS)
config = dataclasses.replace(dense, decoder=dataclasses.replace(dense.decoder, blocks=(block,)))
meshes = {
    "expert": (MeshConfig(expert=2), 2),
    "expert x sequence": (MeshConfig(expert=4, sequence=2), 8),
    "expert x fsdp x tensor": (MeshConfig(expert=2, fsdp=2, tensor=2), 8),
}
answer = agreement(config, packed_batch(0), meshes)

# All tokens choose experts 3 and 1: of four devices with one expert each, two have all the work.
layer = dataclasses.replace(EXPERTS, shared=None).build(
    ParameterMaker(InitConfig(std=0.5), Parametrization(), width=16),
    residual_gain=1.0,
    dtype=jnp.dtype("float32"),
    key=PathKey(jax.random.key(0)),
)
layer.router[...] = jnp.zeros((16, 4)).at[:, 3].set(1.0).at[:, 1].set(0.9)
x = jnp.asarray(np.abs(np.random.default_rng(0).normal(size=(8, 4, 16))), jnp.float32)


def run(context):
    def loss(x):
        out, side = layer(x, context)
        return jnp.sum(jnp.sin(out)), (out, side.metrics["router/load"][0])

    (_, (out, load)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    return np.asarray(out), np.asarray(gradient), float(load)


local = run(LOCAL)
assert np.abs(local[0]).sum(-1).min() > 0.0
found = run(Context(ops=ShardedOps(ParallelConfig(MeshConfig(expert=4)).on(jax.devices()[:4]))))
error = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(local[:2], found[:2], strict=True))
answer["crowded"] = {"load": local[2], "error": error}
print(json.dumps(answer))
