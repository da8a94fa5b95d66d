"""What expert parallelism sends: the layer as it is, beside other ways to bring tokens to experts that drop none.

    python -m benchmarks.expert_exchange       # writes results/expert_exchange.json after each row

A mixture of experts, forward and backward, bfloat16, compiled for chips that are not here: 8,192 tokens of width 4096
a chip, 8 experts of which a token goes through 2, hidden width 14336 (Mixtral 8x7B), over the mesh axis `expert`. What
travels is counted from the program, loops multiplied out (`benchmarks.sequence_parallel.moved`): "layer" is all of it,
on the most chips. The others are exchanges alone, there and back, with their gradients:

- "gather": what the layer does. Every chip has all tokens, each gives back its experts' summand.
- "all_to_all": each chip sends each other what it may need. Shapes are static and any token may want any expert, so
  that a message has room for every choice that could fall on a chip: min(experts a token, experts a chip) a token.
- "ragged_all_to_all": only what was chosen travels. Its bytes are those of balanced choices, by arithmetic: they are
  known when it runs, not when it is compiled. Where rows arrive it needs the room of "all_to_all" all the same.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.sequence_parallel import moved
from jaxlm.layers.context import Context
from jaxlm.layers.mixture_of_experts import MixtureOfExpertsConfig
from jaxlm.layers.parameters import InitConfig, ParameterMaker, Parametrization, PathKey
from jaxlm.parallel.collectives import gather, scatter_sum
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.training import machine
from pallas_kernels import ahead_of_time

RESULTS = pathlib.Path(__file__).parent / "results" / "expert_exchange.json"
TOKENS, WIDTH, HIDDEN, EXPERTS, CHOICES = 8192, 4096, 14336, 8, 2
TOPOLOGY, DEGREES = "v5p:2x2x2", (2, 4, 8)
MIB = 2**20


def main() -> None:
    """Compiles everything and writes the table."""
    if reason := ahead_of_time.why_not(TOPOLOGY):
        raise SystemExit(f"Nothing can be measured here: {reason}.")
    table: list[dict[str, Any]] = []
    shape = dict(tokens=TOKENS, width=WIDTH, hidden=HIDDEN, experts=EXPERTS, experts_per_token=CHOICES)
    results = {"topology": TOPOLOGY, "shape": shape, "table": table, "machine": machine.facts()}
    for degree in sorted(DEGREES, reverse=True):
        parallel = ParallelConfig(MeshConfig(expert=degree)).on(ahead_of_time.devices(TOPOLOGY)[:degree])
        # There and back, and their gradients: four times what a chip has of others' choices.
        ragged = 4 * TOKENS * CHOICES * (degree - 1) / degree * WIDTH * 2
        row: dict[str, Any] = {
            "expert": degree,
            "gather": figures(exchange(parallel, by_gather), parallel),
            "all_to_all": figures(exchange(parallel, by_all_to_all), parallel),
            "ragged_all_to_all": {"sent_mib": round(ragged / MIB)},
        }
        if degree == max(DEGREES):
            row["layer"] = figures(*layer(parallel))
        table.append(row)
        print(row, flush=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def figures(function: Any, parallel: Parallelism, *more: Any) -> dict[str, Any]:
    """MiB that a chip sends and MiB of temporaries of the gradient of `function` by tokens and `more`."""
    x = struct(parallel, (parallel.mesh.size * 4, TOKENS // 4, WIDTH), ("batch", "length", None), jnp.bfloat16)
    gradient = jax.grad(lambda *a: function(*a).astype(jnp.float32).sum(), tuple(range(1 + len(more))))
    with ahead_of_time.writing_no_cache():
        compiled = jax.jit(gradient).lower(x, *more).compile()
    text = compiled.as_text()
    kinds = {kind: round(n / MIB) for kind, n in moved(text).items()}
    return {
        "sent_mib": sum(kinds.values()),
        "by_kind_mib": kinds,
        "temporaries_mib": round(ahead_of_time.memory(compiled).temporaries / MIB),
    }


def struct(parallel: Parallelism, shape: tuple[int, ...], axes: tuple, dtype: Any) -> jax.ShapeDtypeStruct:
    """An array as it lies on the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(parallel.mesh, parallel.spec(axes, shape)))


def exchange(parallel: Parallelism, way: Any) -> Any:
    """Tokens to the experts' chips and back, with a square in place of experts."""
    rows = PartitionSpec("expert")

    def there_and_back(x):
        with jax.sharding.use_abstract_mesh(parallel.mesh.abstract_mesh):
            return jax.shard_map(way, mesh=parallel.mesh, in_specs=rows, out_specs=rows, check_vma=False)(x)

    return there_and_back


def by_gather(x):
    """All tokens everywhere; summands back."""
    return scatter_sum(jnp.square(gather(x, "expert", 0, x.dtype)), "expert", 0, x.dtype)


def by_all_to_all(x):
    """A message for each chip, with room for all that it may be sent."""
    degree = jax.lax.axis_size("expert")
    room = min(CHOICES, EXPERTS // degree)
    messages = jnp.broadcast_to(x.reshape(-1, 1, WIDTH), (degree, TOKENS, room, WIDTH)) * (
        1 + jnp.arange(degree * room, dtype=x.dtype).reshape(degree, 1, room, 1)
    )
    there = jax.lax.all_to_all(messages, "expert", 0, 0)
    back = jax.lax.all_to_all(jnp.square(there), "expert", 0, 0)
    return back.sum((0, 2)).reshape(x.shape)


def layer(parallel: Parallelism) -> tuple:
    """The layer, and what `figures` wants besides."""
    config = MixtureOfExpertsConfig(HIDDEN, num_experts=EXPERTS, experts_per_token=CHOICES)
    make = ParameterMaker(InitConfig(), Parametrization(), width=WIDTH)
    context = Context(ops=ShardedOps(parallel))

    def made():
        key = PathKey(jax.random.key(0))
        return config.build(make, residual_gain=1.0, dtype=jnp.dtype("bfloat16"), key=key)

    graph, state = nnx.split(nnx.eval_shape(made))
    state = jax.tree.map(
        lambda p: p.replace(struct(parallel, p.shape, p.axes, p.dtype)), state, is_leaf=lambda p: hasattr(p, "axes")
    )

    def run(x, state):
        out, side = nnx.merge(graph, state)(x, context)
        return out.astype(jnp.float32).sum() + sum(side.losses.values())

    return run, parallel, state


if __name__ == "__main__":
    main()
