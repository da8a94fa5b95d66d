"""Run with 8 devices by test_sharded_ops.py: attention on meshes against attention on one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.parallel.sharded_ops import ShardedOps
from pallas_kernels import masks
from pallas_kernels.attention import attention
from pallas_kernels.biases import AlibiBias, DenseBias, RelativeBias

T, D = 256, 16
rng = np.random.default_rng(0)


def ids(batch):
    lengths = rng.integers(20, 40, size=(batch, 3))
    return jnp.asarray([np.r_[np.repeat([1, 2, 3], row), np.zeros(T - row.sum(), int)] for row in lengths], jnp.int32)


def block_sparse(batch, heads):
    return masks.BlockSparse.of_map(rng.random((batch, heads, 2, 2)) < 0.7, (128, 128)) & masks.Causal()


def relative(table):
    return RelativeBias(table, 20, False)


def differentiable(values):
    return DenseBias(values, differentiable=True)


def packed_prefix(batch, heads):
    row = ids(batch)
    return masks.PrefixLM(jnp.asarray(rng.integers(0, T, (batch, T)), jnp.int32)) & masks.Segments(row)


def packed_causal(batch, heads):
    return masks.Causal() & masks.Segments(ids(batch))


def lengths(batch, heads):
    return masks.KVLength(jnp.asarray(rng.integers(0, T, batch), jnp.int32))


DROPOUT = dict(dropout_rate=0.3, dropout_key=jax.random.key(5))
# name: (mesh, batch, heads, key heads, mask, (bias, its array's shape) or None, sinks, options)
RELATIVE, DENSE = (relative, (16, 4)), (differentiable, (1, 8, T, T))
BOTH = MeshConfig(fsdp=2, tensor=2)
CASES = {
    "relative, sinks, dropout": (BOTH, 4, 4, 2, packed_prefix, RELATIVE, True, dict(backend="xla_chunked", **DROPOUT)),
    "fewer key heads than devices": (MeshConfig(tensor=4), 2, 8, 2, block_sparse, DENSE, False, DROPOUT),
    "key heads across devices": (MeshConfig(tensor=2), 4, 12, 3, packed_causal, None, False, dict(soft_cap=3.0)),
    "a batch that does not divide": (MeshConfig(tensor=2), 3, 4, 2, lengths, None, True, {}),
    "our kernel": (BOTH, 4, 4, 2, block_sparse, RELATIVE, True, dict(backend="pallas_tpu", **DROPOUT)),
    "a kernel": (BOTH, 4, 4, 2, packed_causal, None, False, dict(backend="splash")),
}


def run(mesh_config, batch, heads, kv_heads, make_mask, bias, sinks, options):
    shapes = [(batch, T, n, D) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    learned = {"sinks": jnp.asarray(rng.normal(size=heads), jnp.float32)} if sinks else {}
    if bias is not None:
        learned["bias"] = jnp.asarray(rng.normal(size=bias[1]), jnp.float32)
    mask, weights = make_mask(batch, heads), jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    with_lse = options.get("backend") != "splash"

    def loss_by(function):
        def loss(q, k, v, learned):
            call = {**options, "mask": mask, "sinks": learned.get("sinks")}
            call["bias"] = bias and bias[0](learned["bias"])
            if not with_lse:
                return jnp.sum(function(q, k, v, **call) * weights)
            out, lse = function(q, k, v, return_lse=True, **call)
            return jnp.sum(out * weights) + jnp.sum(jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0.0))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))

    ops = ShardedOps(ParallelConfig(mesh_config).on())
    expected = loss_by(attention)(q, k, v, learned)
    sharded = loss_by(ops.attention).lower(q, k, v, learned).compile()
    errors = jax.tree.map(
        lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), sharded(q, k, v, learned), expected
    )
    return errors


def gathers():
    """The all-gathers in a program whose arguments lie as the model lays them out."""
    ops = ShardedOps(ParallelConfig(MeshConfig(fsdp=2, tensor=2)).on())
    names = [("batch", None, "heads", None), ("batch", None, "kv_heads", None), ("batch", None, "kv_heads", None)]

    def loss(q, k, v, ids):
        q, k, v = (ops.constrain(x, axes) for x, axes in zip((q, k, v), names))
        return jnp.sum(ops.attention(q, k, v, mask=masks.Causal() & masks.Segments(ids), backend="splash") ** 2)

    def placed(shape, axes, dtype=jnp.float32):
        x = jax.eval_shape(lambda: jnp.zeros(shape, dtype))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ops.parallel.sharding(axes, shape))

    arguments = [placed((8, T, n, D), axes) for n, axes in zip((4, 2, 2), names)]
    ids = placed((8, T), ("batch", None), jnp.int32)
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments, ids).compile()
    return program.as_text().count("all-gather(")


def alibi():
    """Slopes are split along heads; they have no gradient."""
    q = jnp.asarray(rng.normal(size=(4, T, 4, D)), jnp.float32)
    bias = AlibiBias(jnp.asarray([0.5, 0.25, 0.1, 0.0]))
    ops = ShardedOps(ParallelConfig(MeshConfig(tensor=4)).on())
    call = dict(mask=masks.Causal(), bias=bias)
    return float(jnp.abs(jax.jit(lambda q: ops.attention(q, q, q, **call))(q) - attention(q, q, q, **call)).max())


print(
    json.dumps(
        dict(
            errors={name: jax.tree.leaves(run(*case)) for name, case in CASES.items()},
            gathers=gathers(),
            alibi=alibi(),
        )
    )
)
