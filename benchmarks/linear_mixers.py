"""What linear attention and the selective scan cost: TPU cycles as compilers estimate them, processor time, and memory.

    python -m benchmarks.linear_mixers              # all; writes results/linear_mixers.json
    python -m benchmarks.linear_mixers --only cpu   # one part, the others stay as the results file has them

Cycles are estimates of the TPU compiler, with no TPU: good for comparing two programs on one chip. It counts the body
of a program's loop once; here each operation is multiplied by the turns of the loops around it. What a loop itself
costs is left out, in favour of the XLA forms. Where the estimator aborts, which is not the compiler's refusal, the row
has its words.
"""

import argparse
import functools
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.planning.hlo import parse
from jaxlm.planning.trips import executions
from jaxlm.training import machine
from pallas_kernels import ahead_of_time
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.selective_scan import selective_scan

RESULTS = pathlib.Path(__file__).parent / "results" / "linear_mixers.json"
BACKENDS = ("pallas_tpu", "xla")
TPUS = ("v6e:2x2", "v5e:2x2", "tpu7x:2x2x1")
LENGTH, HEADS, HEAD_SIZE = 2048, 4, 128  # of linear attention on TPUs
CHANNELS, ENTRIES = 512, 16  # of the selective scan there: as much state as one head has
CHUNKS = {"by head": 128, "by channel": 64}  # linear attention's own


def attention_case(decay: str, backend: str, length: int) -> tuple[Callable, tuple]:
    """Linear attention and all its gradients, in bfloat16, for `ahead_of_time.Case`."""
    heads = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_SIZE), jnp.bfloat16)
    log_decay = jax.ShapeDtypeStruct(heads.shape if decay == "by channel" else heads.shape[:3], jnp.float32)
    function = functools.partial(linear_attention, backend=backend, chunk=CHUNKS[decay])
    return with_gradients(function), ((heads, heads, heads, log_decay), heads)


def scan_case(backend: str, length: int) -> tuple[Callable, tuple]:
    """The selective scan and its gradients, x, dt, b and c in bfloat16, for `ahead_of_time.Case`."""
    x, b = (jax.ShapeDtypeStruct((1, length, size), jnp.bfloat16) for size in (CHANNELS, ENTRIES))
    a, d = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((CHANNELS, ENTRIES), (CHANNELS,)))
    return with_gradients(functools.partial(selective_scan, backend=backend)), ((x, x, a, b, b, d), x)


def with_gradients(function: Callable) -> Callable:
    """(arguments, gradient of the first result) -> (first result, gradients)."""

    def both(arguments, gradient):
        result, vjp, _ = jax.vjp(lambda *x: function(*x), *arguments, has_aux=True)
        return result, vjp(gradient)

    return both


def cycles(maker: str, topology: str, **arguments: Any) -> dict[str, int] | str:
    """Estimated cycles of each kernel and of everything, loops multiplied out; or why there is no estimate."""
    case = ahead_of_time.Case(f"benchmarks.linear_mixers:{maker}", arguments)
    try:
        found = ahead_of_time.tpu_cycles(case, topology, timeout=400)
    except ahead_of_time.CannotCompile as failure:
        words = " ".join([str(failure), *getattr(failure, "__notes__", [])])
        reason = re.search(r"LLO_CHECK failure.*?(?=Operands:|$)|longer than \d+ seconds", words, re.DOTALL)
        return f"no estimate: {reason[0].strip() if reason else failure}"
    function, shapes = globals()[maker](**arguments)
    times = executions(parse(ahead_of_time.compile_for(topology, function, *shapes).as_text()))
    kernels = {}
    for operation, count in found.items():
        if name := re.search(r"(?:linear_attention|selective_scan)_(forward|states|backward)", operation):
            kernels[name[1]] = count
    return kernels | {"all": sum(times[operation] * count for operation, count in found.items())}


def attention_rows(decay: str) -> Iterator[dict[str, Any]]:
    """The rows of linear attention with one kind of decay."""
    for topology in TPUS:
        kernel, xla = (cycles("attention_case", topology, decay=decay, backend=b, length=LENGTH) for b in BACKENDS)
        yield {"chip": topology, "mixer": f"linear attention, decay {decay}", "kernel": kernel, "xla": xla}


def tpu_rows() -> Iterator[dict[str, Any]]:
    """Kernel and XLA form, forward and backward, on each chip."""
    yield from attention_rows("by head")
    for topology in TPUS:
        kernel, xla = (cycles("scan_case", topology, backend=backend, length=LENGTH) for backend in BACKENDS)
        yield {"chip": topology, "mixer": "selective scan", "kernel": kernel, "xla": xla}
    yield from attention_rows("by channel")


def step_by_step(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Linear attention as its definition says, one step of the state after the other."""

    def step(state, at):
        q, k, v, g = at
        state = jnp.exp(g)[..., None, None] * state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    state = jnp.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1]))
    state, o = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (q, k, v, log_decay)))
    return o.swapaxes(0, 1), state


def quadratic(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> tuple[jax.Array, None]:
    """Linear attention as attention: the matrix of all pairs."""
    sums = jnp.cumsum(log_decay, axis=1).swapaxes(1, 2)
    length = q.shape[1]
    between = jnp.exp(jnp.where(np.tri(length, dtype=bool), sums[..., :, None] - sums[..., None, :], -jnp.inf))
    return jnp.einsum("bhij,bjhv->bihv", jnp.einsum("bihk,bjhk->bhij", q, k) * between, v), None


FORMS = {
    "chunked": functools.partial(linear_attention, backend="xla"),
    "step by step": step_by_step,
    "quadratic": quadratic,
}


def cpu_rows() -> Iterator[dict[str, Any]]:
    """Processor seconds and temporary bytes, forward and backward, float32, one decay a head."""
    for length in (512, 1024, 2048, 4096):
        rng = np.random.default_rng(0)
        q, k, v, do = (jnp.asarray(rng.normal(size=(1, length, 2, 64)), jnp.float32) for _ in range(4))
        log_decay = jnp.asarray(np.log(rng.uniform(0.9, 1.0, size=(1, length, 2))), jnp.float32)
        programs = {
            name: jax.jit(with_gradients(form)).lower((q, k, v, log_decay), do).compile()
            for name, form in FORMS.items()
        }
        seconds = {name: [] for name in programs}
        for _ in range(5):
            for name, program in programs.items():  # in turns, so that what else the machine does falls on all
                start = time.process_time()
                jax.block_until_ready(program((q, k, v, log_decay), do))
                seconds[name].append(time.process_time() - start)
        yield {
            "length": length,
            "cpu_seconds": {name: round(float(np.median(s)), 4) for name, s in seconds.items()},
            "temporary_bytes": {name: ahead_of_time.memory(p).temporaries for name, p in programs.items()},
        }


def main() -> None:
    """Measures, prints rows, writes the results file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"tpu": tpu_rows, "cpu": cpu_rows}
    parser.add_argument("--only", choices=parts, help="measure this part alone")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if args.only and RESULTS.is_file() else {}
    results["shapes"] = {
        "tpu": {"T": LENGTH, "H": HEADS, "Dk": HEAD_SIZE, "Dv": HEAD_SIZE, "C": CHANNELS, "N": ENTRIES},
        "cpu": {"H": 2, "Dk": 64, "Dv": 64},
    }
    results["machine"] = machine.facts()
    for name, measure in parts.items():
        if args.only in (None, name):
            results[name] = []
            for row in measure():
                print(row, flush=True)
                results[name].append(row)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
