"""Run with 8 devices by test_cross_entropy.py: values on a mesh, and the largest array that collectives carry."""

import json
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.cross_entropy import OutputProjection, cross_entropy, token_scores

GROUPS, N, E, V, CHUNK = 4, 64, 32, 2048, 16
rng = np.random.default_rng(0)
hidden, matrix = rng.normal(size=(GROUPS, N, E)).astype(np.float32), rng.normal(size=(E, V)).astype(np.float32)
labels, weights = rng.integers(0, V, (GROUPS, N)).astype(np.int32), rng.random((GROUPS, N)).astype(np.float32)
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))


def summed(hidden, matrix):
    return cross_entropy(hidden, OutputProjection(matrix), labels, weights, z_loss=0.01, chunk=CHUNK)[0]


def by_scores(hidden, matrix):
    scores = token_scores(hidden, OutputProjection(matrix), labels, chunk=512)
    return (weights * (0.01 * scores.log_z**2 - scores.log_probability)).sum()


def largest_collectives(text):
    """Elements of the largest array that a collective carries, in the program's loops and outside of them."""
    largest, computation = {"loops": 0, "outside": 0}, ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line
        elif found := re.search(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(-start)?\(", line):
            place = "outside" if computation.startswith("ENTRY") else "loops"
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            sizes = [int(np.prod([int(d) for d in shape.split(",") if d])) for shape in shapes]
            largest[place] = max(largest[place], *sizes)
    return largest


answer = {}
for form in (summed, by_scores):
    expected = jax.device_get(jax.jit(jax.value_and_grad(form, (0, 1)))(hidden, matrix))
    for layout, of_matrix in {"replicated": P(), "fsdp": P("data"), "tensor": P(None, "tensor")}.items():
        shardings = NamedSharding(mesh, P("data")), NamedSharding(mesh, of_matrix)
        step = jax.jit(
            jax.value_and_grad(form, (0, 1)),
            in_shardings=shardings,
            out_shardings=(NamedSharding(mesh, P()), shardings),
        )
        arrays = jax.device_put(hidden, shardings[0]), jax.device_put(matrix, shardings[1])
        compiled = step.lower(*arrays).compile()
        found = jax.device_get(compiled(*arrays))
        errors = [
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected))
        ]
        answer[f"{form.__name__}, {layout}"] = {"error": max(errors), **largest_collectives(compiled.as_text())}
print(json.dumps(answer))
