"""Attention over the visible blocks beside dense attention, and what choosing the blocks costs, on a CPU.

    python -m benchmarks.sparse_patterns        # writes results/sparse_patterns.json

Every ratio is between programs that take turns in one process, in processor seconds of all threads; the median of the
rounds counts. Dense attention is the backend xla. The share of work is counted as well, from the compiled programs'
matrix products, which no other load on the machine can move.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.planning.costs import matmul_flops
from jaxlm.training import machine
from pallas_kernels import masks
from pallas_kernels.attention import attention
from pallas_kernels.sparse.flex_prefill import flex_prefill
from pallas_kernels.sparse.native_sparse import NativeSparseConfig, nsa_per_block
from pallas_kernels.sparse.top_blocks import moba_per_block

RESULTS = pathlib.Path(__file__).parent / "results"
BLOCK, HEAD_SIZE = 128, 64
BACKENDS = ("xla", "xla_chunked", "xla_blocks")
DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)
TARGETS = {"sparse_over_dense": "density * 1.25 + 0.02", "selection_over_dense": 0.15}


def inputs(length: int, heads: int, rows: int = 1) -> list[jax.Array]:
    """q, k, v."""
    shape = (rows, length, heads, HEAD_SIZE)
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]


def random_lists(length: int, heads: int, density: float) -> masks.BlockSparse:
    """Lists by head in which each block of keys is with this probability, and at least one is."""
    blocks = length // BLOCK
    visible = np.random.default_rng(0).random((1, heads, blocks, blocks)) < density
    visible |= np.eye(blocks, dtype=bool)
    return masks.BlockSparse.of_map(visible, (BLOCK, BLOCK))


def forward(backend: str) -> Callable:
    """The call of attention."""
    return jax.jit(lambda q, k, v, mask: attention(q, k, v, mask=mask, backend=backend))


def with_gradients(backend: str) -> Callable:
    """The call and its gradients."""

    def loss(q, k, v, mask):
        return jnp.sum(attention(q, k, v, mask=mask, backend=backend) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def cpu_seconds(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median processor time of each, compiled beforehand, in turns."""
    for program in programs.values():
        jax.block_until_ready(program())
    spent = {name: [] for name in programs}
    for i in range(rounds):
        for name in programs if i % 2 else reversed(programs):
            start = time.process_time()
            jax.block_until_ready(programs[name]())
            spent[name].append(time.process_time() - start)
    return {name: float(np.median(times)) for name, times in spent.items()}


def by_density(length: int, heads: int, rounds: int) -> list[dict[str, Any]]:
    """Forward, and forward with gradients: time at each density over the time of dense attention and of density 1."""
    arrays, rows = inputs(length, heads), []
    lists = {p: random_lists(length, heads, p) for p in DENSITIES}
    for name, make in (("forward", forward), ("forward and gradients", with_gradients)):
        dense, sparse = make("xla"), make("xla_blocks")
        programs = {"dense": functools.partial(dense, *arrays, masks.Full())}
        programs |= {str(p): functools.partial(sparse, *arrays, mask) for p, mask in lists.items()}
        seconds = cpu_seconds(programs, rounds)
        for p, mask in lists.items():
            density = float(np.asarray(mask.count).sum() / (heads * (length // BLOCK) ** 2))
            rows.append(
                {
                    "pass": name,
                    "density": round(density, 4),
                    "cpu_seconds": round(seconds[str(p)], 4),
                    "over_dense": round(seconds[str(p)] / seconds["dense"], 4),
                    "over_own_full": round(seconds[str(p)] / seconds["1.0"], 4),
                    "allowed": round(density * 1.25 + 0.02, 4),
                }
            )
    return rows


def by_length(tokens: int, heads: int, rounds: int) -> list[dict[str, Any]]:
    """Causal attention with gradients over `tokens` tokens in rows of several lengths, by backend."""
    rows = []
    for length in (tokens // 2**n for n in range(5)):
        arrays = inputs(length, heads, tokens // length)
        programs = {name: functools.partial(with_gradients(name), *arrays, masks.Causal()) for name in BACKENDS}
        seconds = cpu_seconds(programs, rounds)
        rows.append(
            {"length": length, "rows": tokens // length}
            | {f"cpu_seconds_{name}": round(seconds[name], 4) for name in BACKENDS}
            | {f"{name}_over_xla": round(seconds[name] / seconds["xla"], 4) for name in BACKENDS[1:]}
        )
    return rows


def selection(length: int, heads: int, rounds: int, with_xla: bool) -> list[dict[str, Any]]:
    """Time of choosing the blocks over that of dense causal attention: of xla_blocks, and of xla where asked for.

    The share of matrix products is over those of all scores and values, T^2 of each.
    """
    q, k, v = inputs(length, heads)
    config = NativeSparseConfig()
    compressed = k[:, : config.count(length)]
    choices = {
        "flex_prefill": (lambda q, k: flex_prefill(q, k, block=BLOCK).mask, (q, k)),
        "moba_per_block": (functools.partial(moba_per_block, block=BLOCK, top=8), (q, k)),
        "nsa_per_block": (functools.partial(nsa_per_block, config=config), (q, compressed)),
    }
    choices = {name: (jax.jit(choose), given) for name, (choose, given) in choices.items()}
    programs = {name: functools.partial(choose, *given) for name, (choose, given) in choices.items()}
    for backend in ("xla_blocks", "xla") if with_xla else ("xla_blocks",):
        programs[backend] = functools.partial(forward(backend), q, k, v, masks.Causal())
    seconds = cpu_seconds(programs, rounds)
    rows = []
    for name, (choose, given) in choices.items():
        flops = matmul_flops(choose.lower(*given).compile().as_text())
        row = {
            "selection": name,
            "length": length,
            "cpu_seconds": round(seconds[name], 5),
            "over_causal_xla_blocks": round(seconds[name] / seconds["xla_blocks"], 4),
            "matmul_flops_over_dense": round(flops / (4 * heads * length**2 * HEAD_SIZE), 5),
        }
        rows.append(row | ({"over_causal_xla": round(seconds[name] / seconds["xla"], 4)} if with_xla else {}))
    return rows


def main() -> None:
    """Measures, prints a table, writes results/sparse_patterns.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "sparse_patterns.json")
    args = parser.parse_args()
    densities = by_density(args.length, args.heads, args.rounds)
    for row in densities:
        print(
            f"{row['pass']:22} density {row['density']:.3f}: {row['cpu_seconds']:.3f} CPU-s, {row['over_dense']:.3f} "
            f"of dense (allowed {row['allowed']:.3f}), {row['over_own_full']:.3f} of its own at density 1"
        )
    lengths = by_length(args.length, args.heads, args.rounds)
    for row in lengths:
        print(
            f"causal, {row['rows']:3} rows of {row['length']:5}, forward and gradients: xla "
            f"{row['cpu_seconds_xla']:.3f} CPU-s, xla_chunked {row['xla_chunked_over_xla']:.3f} of that, xla_blocks "
            f"{row['xla_blocks_over_xla']:.3f}"
        )
    selections = selection(args.length, args.heads, args.rounds, with_xla=True)
    selections += selection(4 * args.length, args.heads, args.rounds, with_xla=False)
    for row in selections:
        xla = f"{row['over_causal_xla']:.4f} of xla's, " if "over_causal_xla" in row else ""
        print(
            f"{row['selection']:15} {row['length']:5} tokens: {row['cpu_seconds']:.4f} CPU-s; of causal attention's "
            f"time {xla}{row['over_causal_xla_blocks']:.4f} of xla_blocks'; of the matrix products of all scores "
            f"{row['matmul_flops_over_dense']:.5f}"
        )
    result = {
        "length": args.length,
        "heads": args.heads,
        "head_size": HEAD_SIZE,
        "block": BLOCK,
        "dtype": "float32",
        "by_density": densities,
        "causal_by_length": lengths,
        "selection": selections,
        "targets": TARGETS,
        "machine": machine.facts(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
