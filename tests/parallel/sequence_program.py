"""Run with 8 devices by test_sequence_parallel.py: rows split along their length against rows on one device."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, SequenceParallel
from jaxlm.parallel.sharded_ops import ShardedOps
from pallas_kernels import masks
from pallas_kernels.attention import UnsupportedAttention, attention
from pallas_kernels.biases import AlibiBias, RelativeBias

B, T, D = 4, 32, 8
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def ids(length):
    """Segments that cross the borders of devices, then padding."""
    rows = [np.repeat([1, 2, 3], rng.multinomial(length - 3, [0.4, 0.3, 0.3])) for _ in range(B)]
    return jnp.asarray([np.r_[row, np.zeros(length - len(row), int)] for row in rows], jnp.int32)


def ops_of(mesh, **sequence):
    return ShardedOps(ParallelConfig(mesh, sequence=SequenceParallel(**sequence)).on())


PACKED = masks.Segments(ids(T))
PREFIX = masks.PrefixLM(jnp.asarray(rng.integers(0, T, (B, T)), jnp.int32))
CROSS = masks.Segments(ids(T), ids(24))  # 24 keys on 4 devices: runs of another length
BLOCKS = masks.BlockSparse.of_map(rng.random((B, 4, T // 4, T // 4)) < 0.5, (4, 4))
DROPOUT = dict(dropout_rate=0.3, dropout_key=jax.random.key(5))


def relative(table):
    return RelativeBias(table, 20, True)


def alibi(table):
    return AlibiBias(np.asarray([0.5, 0.25, 0.1, 0.0], np.float32))


FOUR, TWO = MeshConfig(fsdp=2, sequence=4), MeshConfig(fsdp=2, sequence=2, tensor=2)
# name: (mesh, how keys move, balanced, mask, keys, key heads, bias, options)
CASES = {
    "decoder, ring": (FOUR, "ring", True, masks.Causal() & PACKED, T, 2, relative, DROPOUT),
    "decoder, gathered": (FOUR, "all_gather", True, masks.Causal() & PACKED, T, 1, relative, DROPOUT),
    "prefix, heads split": (TWO, "ring", True, PREFIX & PACKED, T, 2, alibi, DROPOUT),
    "encoder, fewer key heads than devices": (TWO, "ring", True, PACKED, T, 1, None, {}),
    "encoder-decoder": (FOUR, "ring", True, CROSS, 24, 4, None, DROPOUT),
    "encoder-decoder, keys that do not divide": (FOUR, "auto", True, masks.KVLength(9), 10, 4, None, DROPOUT),
    "window, both ways": (FOUR, "ring", True, masks.Causal() & masks.Window(5, 0) & PACKED, T, 2, None, DROPOUT),
    "longformer": (
        FOUR,
        "ring",
        False,
        (masks.Window(3, 3) | masks.GlobalTokens(2)) & PACKED,
        T,
        2,
        None,
        dict(soft_cap=3.0),
    ),
    "block sparse": (FOUR, "ring", True, BLOCKS & masks.Causal(), T, 2, None, {}),
    "our kernel": (TWO, "ring", True, masks.Causal() & PACKED, T, 2, relative, dict(backend="xla_blocks", **DROPOUT)),
}


def run(mesh, keys, balanced, mask, length, kv_heads, bias, options):
    ops = ops_of(mesh, keys=keys, balanced=balanced)
    q, weights = normal(B, T, 4, D), normal(B, T, 4, D)
    k, v, table, sinks = normal(B, length, kv_heads, D), normal(B, length, kv_heads, D), normal(16, 4), normal(4)

    def loss_by(function, arrange, restore):
        def loss(q, k, v, table, sinks):
            call = dict(mask=mask, bias=bias and bias(table), sinks=sinks, return_lse=True, **options)
            out, lse = function(arrange(q), arrange(k), arrange(v), **call)
            out, lse = restore(out), restore(lse.swapaxes(1, 2))
            return jnp.sum(out * weights) + jnp.sum(jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0.0))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4)))

    def same(x):
        return x

    expected = loss_by(attention, same, same)(q, k, v, table, sinks)
    found = loss_by(ops.attention, ops.arrange, ops.restore)(q, k, v, table, sinks)
    return jax.tree.leaves(
        jax.tree.map(
            lambda a, b: float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-6)), found, expected
        )
    )


def traffic(keys):
    """Collectives by kind of a forward and backward pass with little to do but attention, and whether [T, T] occurs."""
    ops, length = ops_of(MeshConfig(sequence=4, tensor=2), keys=keys), 1024
    names = [("batch", "length", "heads", None), *[("batch", "length", "kv_heads", None)] * 2]

    def loss(q, k, v, ids):
        mask = masks.Causal() & masks.Segments(ids)
        return jnp.sum(ops.attention(q, k, v, mask=mask, backend="xla_blocks") ** 2)

    def placed(shape, axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=ops.parallel.sharding(axes, shape))

    arguments = [placed((2, length, heads, D), axes) for heads, axes in zip((8, 2, 2), names)]
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments, placed((2, length), (None, None), jnp.int32))
    text = program.compile().as_text()
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}
    gathered = re.findall(r"= (\w+)\[([\d,]+)\][^=]* all-gather", text)
    runs = length // 8
    scores = [shape for shape in re.findall(r"f32\[([\d,]+)\]", text) if shape.split(",").count(str(length)) > 1]
    return dict(counts, gathered=gathered, scores=scores, run=runs)


def chosen():
    """What "auto" does with 4 query heads, by the program as it is traced."""
    ops, q = ops_of(FOUR), normal(B, T, 4, D)
    window = masks.Causal() & masks.Window(2, 0)
    found = {}
    for name, mask, kv_heads in (("few", PACKED, 1), ("many", PACKED, 2), ("few, window", window & PACKED, 1)):
        k = normal(B, T, kv_heads, D)
        program = str(jax.make_jaxpr(lambda q, k, mask=mask: ops.attention(q, k, k, mask=mask))(q, k))
        found[name] = [kind for kind in ("all_gather", "ppermute") if f"{kind}[" in program]
    return found


def refusals():
    """What cannot be taken apart, each in a sentence."""
    ops, x = ops_of(MeshConfig(sequence=2)), jnp.zeros((B, T, 2, D))
    calls = {
        "dense mask": dict(mask=masks.Dense(jnp.ones((1, 1, T, T), bool))),
        "dense bias": dict(mask=masks.Causal(), bias=jnp.zeros((1, 2, T, T))),
        "blocks": dict(mask=masks.BlockSparse.of_map(np.ones((1, 1, 2, 2), bool), (16, 16))),
        "no log-sum-exp": dict(mask=masks.Causal(), backend="splash"),
    }
    found = {}
    for name, call in calls.items():
        try:
            ops.attention(x, x, x, **call)
        except UnsupportedAttention as error:
            found[name] = str(error)
    return found


print(
    json.dumps(
        dict(
            errors={name: run(*case) for name, case in CASES.items()},
            traffic={keys: traffic(keys) for keys in ("ring", "all_gather")},
            chosen=chosen(),
            refusals=refusals(),
        )
    )
)
