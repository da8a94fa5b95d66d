"""Our attention kernels on a Hopper GPU: what compiles into how many registers, and on an H200 how long it takes.

python -m benchmarks.attention_gpu            # registers and spills, by compiling for an H200 that need not be there
python -m benchmarks.attention_gpu --device   # correctness, then times beside cuDNN, FlashAttention-2, FlexAttention

Times are medians on random data in bfloat16, 16k tokens in all, H * D = 2048; a gradient's is that of its pullback.
TFLOP/s count the visible pairs of queries and keys, and 2.5 times the forward's products for a gradient. Whoever is not
installed or refuses is recorded with the reason. FlashAttention-2 and FlexAttention are torch's.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.training import machine
from pallas_kernels import ahead_of_time, masks
from pallas_kernels.attention import attention
from pallas_kernels.biases import AlibiBias, DenseBias, RelativeBias

RESULTS = pathlib.Path(__file__).parent / "results" / "attention_gpu.json"
TOKENS, WIDTH = 16 * 1024, 2048
SIZES, LENGTHS = (64, 128, 256), (2048, 4096, 8192, 16384)
WINDOW = 1024
SCORES = ("soft cap", "alibi", "relative", "dense bias", "dropout")
TARGETS = {
    "spill loads": 0,
    "forward / cudnn": {64: 0.8, 128: 0.85},
    "forward / FlashAttention-2": {128: 1.4},
    "backward / cudnn": {128: 0.75},
    "structured mask: time / (visible share * own full time)": 1.2,
    "structured mask: cudnn with a dense mask / time": 2.0,
    "structured mask: FlexAttention / time": 1.3,
}


def segment_ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """[B, T]: rows packed with documents of about an eighth of the row, no padding."""
    rng = np.random.default_rng(seed)
    starts = np.sort(np.stack([rng.choice(np.arange(1, length), 7, replace=False) for _ in range(batch)]), axis=1)
    return (np.arange(length)[None, :, None] >= starts[:, None]).sum(-1).astype(np.int32) + 1


def prefix_ends(ids: np.ndarray) -> np.ndarray:
    """[B, T]: of each position the end of its document's prefix, half of the document."""
    ends = np.zeros_like(ids)
    for row, out in zip(ids, ends):
        for number in np.unique(row):
            (at,) = np.nonzero(row == number)
            out[at] = at[0] + len(at) // 2
    return ends


def mask_of(name: str, batch: int, length: int) -> masks.Mask:
    """The mask of this name, its arrays in numpy."""
    ids = segment_ids(batch, length)
    return {
        "full": masks.Full(),
        "causal": masks.Causal(),
        "window": masks.Causal() & masks.Window(WINDOW - 1, 0),
        "documents": masks.Causal() & masks.Segments(ids),
        "packed prefix": masks.PrefixLM(prefix_ends(ids)) & masks.Segments(ids),
    }[name]


def score_options(scores: str | None, heads: int, length: int) -> dict[str, Any]:
    """Keyword arguments of `attention` that change the scores in one of the ways `SCORES` names."""
    if scores == "dropout":
        return {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
    if scores == "soft cap":
        return {"soft_cap": 30.0}
    bias = {
        None: lambda: None,
        "alibi": lambda: AlibiBias(2.0 ** -np.linspace(1, 8, heads, dtype=np.float32)),
        "relative": lambda: RelativeBias(np.zeros((32, heads), np.float32)),
        "dense bias": lambda: DenseBias(np.zeros((1, 1, length, length), jnp.bfloat16), differentiable=True),
    }[scores]()
    return {"bias": bias}


def program(
    mask: str, size: int, dtype: str, tokens: int = TOKENS, length: int = 2048, scores: str | None = None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Forward and all gradients by our kernels, and the shapes of the arguments; an `ahead_of_time.Case`."""
    length = min(tokens, length)
    batch, heads = tokens // length, WIDTH // size
    shown, options = mask_of(mask, batch, length), score_options(scores, heads, length)
    learned = {"bias": options.pop("bias")} if scores in ("relative", "dense bias") else {}

    def run(q, k, v, mask, learned):
        def loss(q, k, v, learned):
            out = attention(q, k, v, mask=mask, backend="pallas_gpu", **options, **learned)
            return out.astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1, 2, 3))(q, k, v, learned)

    array = jax.ShapeDtypeStruct((batch, length, heads, size), jnp.dtype(dtype))
    return run, (array, array, array, *jax.tree.map(_shape_of, (shown, learned)))


def _shape_of(x: np.ndarray | int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), jnp.int32 if isinstance(x, int) else x.dtype)


def registers_table() -> list[dict[str, Any]]:
    """Registers and spills of the kernels of each head size and type, and of each kind of scores; printed."""
    cases = [dict(mask="packed prefix", size=size, dtype=dtype) for size in SIZES for dtype in ("bfloat16", "float16")]
    cases += [dict(mask="causal", size=64, dtype="bfloat16", scores=scores) for scores in SCORES]
    cases += [dict(mask="causal", size=128, dtype="bfloat16", scores=scores) for scores in SCORES]
    rows = []
    for case in cases:
        kernels = ahead_of_time.gpu_registers(ahead_of_time.Case("benchmarks.attention_gpu:program", case))
        rows.append(case | {"kernels": [dataclasses.asdict(kernel) for kernel in kernels]})
        spills = {kernel.kernel.removesuffix("_mosaic_gpu_kernel"): kernel.spill_loads for kernel in kernels}
        print(*case.values(), "- bytes of spill loads:", spills, flush=True)
    return rows


def correctness_table() -> dict[str, dict[str, float]]:
    """Of every conformance case the errors against float64, over those of plain XLA in bfloat16; printed."""
    from pallas_kernels import conformance

    table = {}
    for name, case in conformance.CASES.items():
        ours, plain = (conformance.errors(backend, case, jnp.bfloat16) for backend in ("pallas_gpu", "xla"))
        table[name] = {result: round(ours[result] / plain[result], 3) for result in ours}
        print(f"{name}: errors over plain XLA's {table[name]}", flush=True)
    return table


def time_table(names: tuple[str, ...], rivals: tuple[str, ...], lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Milliseconds and TFLOP/s, forward and backward, of our kernels and `rivals` under the masks `names`; printed."""
    rows = []
    for size in SIZES:
        for length in lengths:
            for name in names:
                times, reasons = {}, {}
                for who in ("pallas_gpu", *rivals):
                    try:
                        times[who] = (torch_seconds if who in TORCH else jax_seconds)(who, name, size, length)
                    except Exception as error:  # a rival that is absent or refuses is a result
                        reasons[who] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                share = visible_share(name, length)
                products = 4 * TOKENS * length * WIDTH * share
                rows.append(row := {"mask": name, "size": size, "length": length, "visible share": round(share, 4)})
                for way, factor in (("forward", 1.0), ("backward", 2.5)):
                    seconds = {who: found[way] for who, found in times.items()}
                    row[way + " ms"] = {who: round(1e3 * spent, 4) for who, spent in seconds.items()}
                    row[way + " TFLOP/s"] = {
                        who: round(factor * products / spent / 1e12, 1) for who, spent in seconds.items()
                    }
                row["not measured"] = reasons
                print(json.dumps(row), flush=True)
    return rows


def visible_share(name: str, length: int) -> float:
    """The part of all pairs of queries and keys that a mask shows."""
    rows = mask_of(name, TOKENS // length, length).rows(length, length)
    return float(jnp.maximum(rows.hi - rows.lo, 0).sum(1).mean() / length)


def jax_seconds(who: str, name: str, size: int, length: int) -> dict[str, float]:
    """Seconds of forward and backward by one of our backends, or by "cudnn with a dense mask"."""
    batch, heads = TOKENS // length, WIDTH // size
    q, k, v, gradient = jax.random.normal(jax.random.key(0), (4, batch, length, heads, size), jnp.bfloat16)
    mask, dense = mask_of(name, batch, length), None
    if who == "cudnn with a dense mask":
        dense = jnp.broadcast_to(mask.dense(length, length), (batch, 1, length, length))

    @jax.jit
    def forward(q, k, v, dense):
        if dense is not None:
            return jax.nn.dot_product_attention(q, k, v, mask=dense, implementation="cudnn")
        return attention(q, k, v, mask=mask, backend=who)

    _, pullback = jax.jit(lambda q, k, v, dense: jax.vjp(lambda *x: forward(*x, dense), q, k, v))(q, k, v, dense)
    backward = jax.jit(lambda pullback, gradient: pullback(gradient))
    return {
        "forward": seconds_a_call(lambda: forward(q, k, v, dense), jax.block_until_ready),
        "backward": seconds_a_call(lambda: backward(pullback, gradient), jax.block_until_ready),
    }


TORCH = ("FlashAttention-2", "FlexAttention")


def torch_seconds(who: str, name: str, size: int, length: int) -> dict[str, float]:
    """The same by torch: FlashAttention-2 (full and causal masks), or compiled FlexAttention."""
    import torch
    from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

    batch, shape = TOKENS // length, (TOKENS // length, WIDTH // size, length, size)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    gradient = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    if who == "FlashAttention-2":
        attend = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=name == "causal"
        )
    else:
        rows = mask_of(name, batch, length).rows(length, length)
        lo, hi = (
            torch.tensor(np.broadcast_to(np.asarray(x)[:, 0], (batch, length)).copy(), device="cuda")
            for x in (rows.lo, rows.hi)
        )
        blocks = flex_attention.create_block_mask(
            lambda b, h, i, j: (j >= lo[b, i]) & (j < hi[b, i]), batch, None, length, length, _compile=True
        )
        attend = functools.partial(torch.compile(flex_attention.flex_attention), q, k, v, block_mask=blocks)

    def wait(_):
        torch.cuda.synchronize()

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = attend()
        return {
            "forward": seconds_a_call(attend, wait),
            "backward": seconds_a_call(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), wait),
        }


def seconds_a_call(call: Callable[[], Any], wait: Callable[[Any], Any], rounds: int = 7) -> float:
    """Median over rounds of calls in a row, of which the last is waited for: what starting one takes is hidden."""
    for _ in range(3):
        wait(call())
    start = time.perf_counter()
    wait(call())
    calls = max(3, round(0.05 / (time.perf_counter() - start)))
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        spent.append((time.perf_counter() - start) / calls)
    return float(np.median(spent))


DEVICE_PARTS: dict[str, Callable[[], Any]] = {
    "correctness": correctness_table,
    "dense masks": lambda: time_table(("full", "causal"), ("cudnn", "FlashAttention-2", "tokamax"), LENGTHS),
    "structured masks": lambda: time_table(
        ("window", "documents", "packed prefix"), ("cudnn with a dense mask", "FlexAttention", "tokamax"), LENGTHS[1:]
    ),
}


def main() -> None:
    """Measures, prints, and replaces the measured parts of results/attention_gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", action="store_true", help="on an H200: correctness and times")
    parser.add_argument("--only", nargs="+", choices=DEVICE_PARTS, default=list(DEVICE_PARTS), help="parts of --device")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the memory
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"targets": TARGETS} | {part: results.get(part, "not yet measured") for part in DEVICE_PARTS}
    parts = {part: DEVICE_PARTS[part] for part in args.only} if args.device else {"registers": registers_table}
    for part, measure in parts.items():
        results[part] = {"machine": machine.facts(), "results": measure()}
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
