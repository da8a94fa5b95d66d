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
    """{collective: largest result in elements} of a compiled program, and of those that run in a loop."""
    largest = {}
    for shapes, name in re.findall(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text):
        sizes = [int(np.prod([int(d) for d in s.split(",") if d])) for s in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        largest[name] = max(largest.get(name, 0), *sizes)
    return largest


answer = {}
for form in (summed, by_scores):
    expected = jax.device_get(jax.jit(jax.value_and_grad(form, (0, 1)))(hidden, matrix))
    for layout, of_matrix in {"replicated": P(), "fsdp": P("data"), "tensor": P(None, "tensor")}.items():
        shardings = NamedSharding(mesh, P("data")), NamedSharding(mesh, of_matrix)
        step = jax.jit(
            jax.value_and_grad(form, (0, 1)), in_shardings=shardings, out_shardings=(NamedSharding(mesh, P()), shardings)
        )
        arrays = jax.device_put(hidden, shardings[0]), jax.device_put(matrix, shardings[1])
        compiled = step.lower(*arrays).compile()
        found = jax.device_get(compiled(*arrays))
        errors = [
            float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected))
        ]
        body = compiled.as_text()
        answer[f"{form.__name__}, {layout}"] = {"error": max(errors), "collectives": largest_collectives(body)}
print(json.dumps(answer, indent=1))
