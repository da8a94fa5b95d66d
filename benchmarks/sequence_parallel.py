"""What it costs to split rows along their length: memory, what travels, and how evenly the work is shared.

    python -m benchmarks.sequence_parallel       # writes results/sequence_parallel.json

One packed causal row of 32,768 tokens over 8 chips, forward and backward, bfloat16, 16 query heads and 4 key heads of
128: compiled for chips that are not here. "gspmd" is what a program has that only says where arrays lie: the scores of
dense attention, split over their queries. "ring, jax's gradient" is the same ring without a backward pass of its own.

What travels is counted from the program, loops multiplied out: the larger of a collective's operands and results, of
one chip. "critical" is the work on the longest way through the ring, where each hop waits for its slowest device, over
a perfect share; in visible blocks of 128 x 128. On this machine's 8 virtual devices all work is done one after the
other, so that its processor seconds tell what the parts cost beside one piece, not how well they are balanced.
"""

import collections
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.parallel import ring_attention, sharded_attention
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism, SequenceParallel
from jaxlm.parallel.ring_attention import Route
from jaxlm.parallel.row_order import RowOrder
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.training import machine
from pallas_kernels import ahead_of_time, masks
from pallas_kernels.attention import attention
from pallas_kernels.plans import HIDDEN

RESULTS = pathlib.Path(__file__).parent / "results"
DEVICES, LENGTH, HEADS, KEY_HEADS, SIZE = 8, 32768, 16, 4, 128
TOPOLOGY = "v5e:2x4"
WAYS = {
    "ring": SequenceParallel("ring", balanced=True),
    "ring, plain order": SequenceParallel("ring", balanced=False),
    "ring, jax's gradient": SequenceParallel("ring", balanced=True),
    "all_gather": SequenceParallel("all_gather", balanced=True),
    "gspmd": SequenceParallel(),
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def gradient(way: str, parallel: Parallelism, backend: str) -> Callable:
    """Of the sum of the results, by q, k and v."""
    ops, queries = ShardedOps(parallel), ("batch", "length", "heads", None)

    def attend(q, k, v, mask):
        if way != "gspmd":
            return ops.attention(q, k, v, mask=mask, backend=backend)
        q, k, v = (ops.constrain(q, queries), *(ops.constrain(x, ("batch", None, "kv_heads", None)) for x in (k, v)))
        return ops.constrain(attention(q, k, v, mask=mask, backend="xla"), queries)

    def loss(q, k, v, ids):
        with jax.sharding.use_abstract_mesh(parallel.mesh.abstract_mesh):
            return attend(q, k, v, masks.Causal() & masks.Segments(ids)).astype(jnp.float32).sum()

    function = jax.grad(loss, (0, 1, 2))
    if way != "ring, jax's gradient":
        return function

    def without(*arguments):
        with mock.patch.object(sharded_attention, "split_attention", ring_attention.attend):
            return function(*arguments)

    return without


def arguments(
    parallel: Parallelism, batch: int, length: int, heads: int, key_heads: int, size: int, dtype: Any
) -> list:
    """q, k, v and segment ids, as the model lays them out."""

    def struct(shape, axes, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.sharding(axes, shape))

    arrays = [struct((batch, length, n, size), ("batch", "length", "heads", None), dtype) for n in (heads, key_heads)]
    return [arrays[0], arrays[1], arrays[1], struct((batch, length), ("batch", None), jnp.int32)]


def ahead() -> list[dict[str, Any]]:
    """A row a way: MiB of temporaries and MiB that travel by kind, or why it cannot be compiled."""
    if reason := ahead_of_time.why_not(TOPOLOGY):
        return [{"not_measured": reason}]
    table = []
    for way, sequence in WAYS.items():
        config = ParallelConfig(MeshConfig(sequence=DEVICES), sequence=sequence)
        parallel = config.on(ahead_of_time.devices(TOPOLOGY))
        shapes = arguments(parallel, 1, LENGTH, HEADS, KEY_HEADS, SIZE, jnp.bfloat16)
        row = {"way": way}
        try:
            with ahead_of_time.writing_no_cache():
                compiled = jax.jit(gradient(way, parallel, "auto")).lower(*shapes).compile()
        except jax.errors.JaxRuntimeError as error:
            row["does_not_compile"] = re.sub(r"\s+", " ", str(error))[:200]
        else:
            row["temporaries_mib"] = round(ahead_of_time.memory(compiled).temporaries / 2**20, 1)
            row["moved_mib"] = {kind: round(n / 2**20, 1) for kind, n in moved(compiled.as_text()).items()}
        table.append(row)
        print(row, flush=True)
    return table


def moved(hlo: str) -> dict[str, int]:
    """Bytes that a device gives to or has from each kind of collective in one run of the program."""
    computations: dict[str, list[str]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            current.append(line)

    @functools.cache
    def inside(name: str) -> collections.Counter:
        total = collections.Counter()
        for line in computations[name]:
            if found := re.search(rf"= (.*) ({'|'.join(KINDS)})(-start)?\(", line):
                arrays = [_bytes(array) for array in re.findall(r"([a-z]+\d+)\[([\d,]+)\]", found[1])]
                if found[3]:  # operands and results
                    half = len(arrays) // 2
                    arrays = max(arrays[:half], arrays[half:], key=sum)
                total[found[2]] += sum(arrays) * (DEVICES if found[2] == "reduce-scatter" else 1)
            loop = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
            # jax's loops over a fixed number of steps count from 0 and compare with one constant.
            trips = int(re.search(r"constant\((\d+)\)", "".join(computations[loop[1]]))[1]) if loop else 1
            for called in re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line):
                for kind, n in inside(called).items():
                    total[kind] += n * trips
        return total

    return dict(inside(entry))


def _bytes(array: tuple[str, str]) -> int:
    dtype, dims = array
    return int(np.prod([int(n) for n in dims.split(",") if n])) * int(re.sub(r"\D", "", dtype)) // 8


def critical() -> dict[str, float]:
    """Visible blocks on the longest way through the ring over a perfect share, of a causal row."""
    block, mask = 128, masks.Causal()
    state = np.asarray(mask.plan(LENGTH, LENGTH, block, block).state)[0, 0] != HIDDEN
    found = {}
    for name, balanced in (("balanced", True), ("plain", False)):
        order = RowOrder(LENGTH, DEVICES, balanced)
        blocks = np.asarray(order.arrange(np.arange(LENGTH // block)[None]))[0].reshape(DEVICES, -1)
        route = Route.ring("sequence", order, order, mask)
        hops = [
            max(state[np.ix_(blocks[device], blocks[(device - place) % DEVICES])].sum() for device in range(DEVICES))
            for place in range(-route.backward, route.forward + 1)
        ]
        found[name] = round(float(sum(hops) / (state.sum() / DEVICES)), 3)
    return found


def on_this_machine() -> dict[str, Any]:
    """Processor seconds of the gradient on 8 virtual devices over those on one, the least of several runs."""
    batch, length, heads, key_heads, size = 1, 4096, 4, 2, 64
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(batch, length, n, size)), jnp.float32) for n in (heads, key_heads, key_heads)
    )
    ids = jnp.ones((batch, length), jnp.int32)

    def seconds(way, devices, backend):
        config = ParallelConfig(MeshConfig(sequence=devices), sequence=WAYS[way])
        parallel = config.on(jax.devices()[:devices])
        shapes = arguments(parallel, batch, length, heads, key_heads, size, jnp.float32)
        placed = [jax.device_put(x, struct.sharding) for x, struct in zip((q, k, v, ids), shapes)]
        program = jax.jit(gradient(way, parallel, backend)).lower(*placed).compile()
        jax.block_until_ready(program(*placed))
        least = float("inf")
        for _ in range(5):
            start = time.process_time()
            jax.block_until_ready(program(*placed))
            least = min(least, time.process_time() - start)
        return least

    one = seconds("ring", 1, "xla_blocks")
    ways = ("ring", "ring, plain order", "all_gather")
    over = {way: round(seconds(way, DEVICES, "xla_blocks") / one, 2) for way in ways}
    over["gspmd"] = round(seconds("gspmd", DEVICES, "xla") / one, 2)
    return {
        "shape": dict(batch=batch, length=length, heads=heads, key_heads=key_heads, head_size=size, dtype="float32"),
        "one_device_cpu_seconds": round(one, 3),
        "over_one_device": over,
    }


def main() -> None:
    """Measures and writes the results."""
    if sys.argv[1:] == ["on_this_machine"]:
        print(json.dumps(on_this_machine()))
        return
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
    command = [sys.executable, "-m", "benchmarks.sequence_parallel", "on_this_machine"]
    apart = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True
    )
    result = {
        "machine": machine.facts(),
        "shape": dict(length=LENGTH, heads=HEADS, key_heads=KEY_HEADS, head_size=SIZE, dtype="bfloat16"),
        "devices": DEVICES,
        "topology": TOPOLOGY,
        "critical_over_perfect_share": critical(),
        "cpu": json.loads(apart.stdout),
    }
    print(result, flush=True)
    result["ahead_of_time"] = ahead()
    path = RESULTS / "sequence_parallel.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path.name} is written")


if __name__ == "__main__":
    main()
