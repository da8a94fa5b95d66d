"""Run with 8 devices by test_sharded_cross_entropy.py: losses on meshes against one device, and what travels."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.layers.context import LocalOps
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import DEFAULT_RULES, ParallelConfig
from jaxlm.parallel.sharded_ops import ShardedOps
from pallas_kernels.cross_entropy import OutputProjection

B, T, E, V = 4, 32, 128, 1200  # a quarter of the ids is 300: a whole block of a kernel and a ragged one
rng = np.random.default_rng(0)
features = rng.normal(size=(B, T, E)).astype(np.float32)
matrix, bias = (rng.normal(size=(E, V)) * E**-0.5).astype(np.float32), rng.normal(size=V).astype(np.float32)
weights = ((rng.random((B, T)) < 0.8) * rng.random((B, T))).astype(np.float32)
labels = rng.integers(0, V, (B, T)).astype(np.int32)
labels[0, :8] = [0, 299, 300, 301, 599, 600, 899, V - 1]  # first and last ids of parts
labels[1] = (features[1] @ matrix + bias).argmax(-1)  # so that some are correct
labels[weights == 0] = -100
coefficients = rng.normal(size=(3, B, T)).astype(np.float32)

VOCAB_OVER_ALL = tuple((n, ("fsdp", "tensor") if n == "vocab" else () if n == "embed" else a) for n, a in DEFAULT_RULES)
TENSOR, FSDP = MeshConfig(tensor=8), MeshConfig(data=1, fsdp=2, tensor=4)
# name: (mesh, rules, axis of the vocabulary, form, options)
CASES = {
    "sum, tensor": (TENSOR, DEFAULT_RULES, 1, "sum", {}),
    "sum, fsdp and tensor": (FSDP, DEFAULT_RULES, 0, "sum", {}),
    "sum, rows and length": (MeshConfig(data=2, sequence=2, tensor=2), DEFAULT_RULES, 1, "sum", dict(chunk=16)),
    "sum, vocabulary over the tokens' axes": (FSDP, VOCAB_OVER_ALL, 1, "sum", {}),
    "sum, ids that do not divide": (MeshConfig(data=1, tensor=7), DEFAULT_RULES, 1, "sum", {}),
    "sum, kernel": (FSDP, DEFAULT_RULES, 1, "sum", dict(backend="pallas_tpu")),
    "recompute, tensor": (TENSOR, DEFAULT_RULES, 0, "sum", dict(recompute=True)),
    "scores, tensor": (TENSOR, DEFAULT_RULES, 1, "scores", dict(chunk=64)),
    "scores, kernel": (FSDP, DEFAULT_RULES, 0, "scores", dict(backend="pallas_tpu", chunk=128)),
}


def loss_of(ops, form, vocab_axis, options):
    """A function of features, matrix and bias: everything that has a gradient, and the scores."""

    def summed(features, matrix, bias):
        projection = OutputProjection(matrix, bias, vocab_axis, soft_cap=5.0)
        return ops.cross_entropy(
            ops.arrange(features), projection, labels, weights, z_loss=0.01, label_smoothing=0.1, **options
        )

    def scored(features, matrix, bias):
        projection = OutputProjection(matrix, bias, vocab_axis, scale=0.5)
        scores = ops.token_scores(ops.arrange(features), projection, jnp.maximum(labels, 0), mean_logit=True, **options)
        return sum((c * x).sum() for c, x in zip(coefficients, scores[:3])), scores

    return jax.value_and_grad({"sum": summed, "scores": scored}[form], (0, 1, 2), has_aux=True)


def group_size(line):
    """Devices of a collective's group: the compiler writes axes of the mesh, a grid or lists."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return int(np.prod([int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2])]))
    if grid := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(grid[1])
    return len(re.search(r"replica_groups=\{\{([\d,]*)\}", line)[1].split(","))


def collectives(text):
    """{operation: elements of the largest array that it carries from one device to another}."""
    largest = {}
    for line in text.splitlines():
        found = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", line)
        if found and group_size(line) > 1:
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            sizes = [int(np.prod([int(d) for d in shape.split(",") if d])) for shape in shapes]
            largest[found[2]] = max(largest.get(found[2], 0), *sizes)
    return largest


def relative(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


answer = {}
for name, (mesh, rules, vocab_axis, form, options) in CASES.items():
    count = 7 if name.endswith("divide") else 8
    parallel = ParallelConfig(mesh, rules).on(jax.devices()[:count])
    inputs = features, matrix if vocab_axis else matrix.T, bias
    axes = ("batch", "length", None), ("embed", "vocab") if vocab_axis else ("vocab", "embed"), ("vocab",)
    places = tuple(parallel.sharding(a, x.shape) for a, x in zip(axes, inputs))
    step = jax.jit(
        loss_of(ShardedOps(parallel), form, vocab_axis, options), in_shardings=places, out_shardings=(None, places)
    )
    compiled = step.lower(*inputs).compile()
    found = compiled(*map(jax.device_put, inputs, places))
    expected = jax.jit(loss_of(LocalOps(), form, vocab_axis, {}))(*inputs)
    errors = [relative(a, b) for a, b in zip(*map(jax.tree.leaves, jax.device_get((found, expected))))]
    answer[name] = {"errors": errors, "collectives": collectives(compiled.as_text())}
print(json.dumps(answer))
