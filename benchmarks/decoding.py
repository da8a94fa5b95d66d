"""Prefill and decoding: beside `transformers`, packed beside padded, and a thousand mixed requests without a compile.

    python -m benchmarks.decoding                  # all three; writes results/decoding.json
    python -m benchmarks.decoding speed            # or one of: speed packing requests
    python -m benchmarks.decoding speed --batches 16 --rounds 1    # one row of it, in less time

Speed needs torch and transformers: both sides read one exported Llama-shaped folder, run greedily in alternating
processes on one thread each, and must write the same tokens. Times are processor seconds, the least of several repeats
after a warm-up; prefill is the time to the first token, decoding what each further one adds.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, VOCAB = 8, 512, 1376, 8, 4, 8192
PROMPT, NEW, BATCHES, ROUNDS, REPEATS = 64, 64, (1, 16), 2, 3
TARGETS = {"decode": 1.5, "prefill": 1.0, "packing": 2.0}
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
}


def llama(layers: int = LAYERS, width: int = WIDTH, hidden: int = HIDDEN, vocab: int = VOCAB) -> Any:
    """A Llama-shaped model with random parameters, whose logits are spread enough to have no ties."""
    import jax

    from jaxlm.architecture import Architecture
    from jaxlm.layers import (
        AttentionConfig,
        BlockConfig,
        EmbeddingConfig,
        FeedForwardConfig,
        InitConfig,
        NormConfig,
        Rope,
        StackConfig,
    )
    from jaxlm.models import HeadConfig, LanguageModelConfig, build_model, unrolled

    attention = AttentionConfig(HEADS, width // HEADS, num_kv_heads=KV_HEADS, position=Rope())
    block = BlockConfig(attention, FeedForwardConfig(hidden), NormConfig())
    config = LanguageModelConfig(
        Architecture.CAUSAL_DECODER,
        vocab,
        width,
        EmbeddingConfig(),
        HeadConfig(),
        InitConfig(std=0.06),
        decoder=StackConfig((block,), layers, final_norm=NormConfig()),
    )
    return unrolled(build_model(config, key=jax.random.key(0)))


def export_llama(folder: pathlib.Path) -> None:
    """Writes `llama()` as a Hugging Face folder."""
    from flax import nnx

    from jaxlm.checkpoints import naming
    from jaxlm.checkpoints.huggingface.folder import export

    model = llama()
    flat = nnx.to_flat_state(nnx.state(model))
    values = {naming.show(tuple(map(str, path))): np.asarray(v.get_value()) for path, v in flat}
    shapes = {path: value.shape for path, value in values.items()}
    export(folder, model.config, shapes, values.__getitem__, family="llama")


def least(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Processor seconds of the quickest of several calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def measure_speed(side: str, folder: str, batch: int) -> dict[str, Any]:
    """In a process of its own: seconds to the first token, seconds for each further one, and the tokens."""
    prompts = np.random.default_rng(0).integers(3, VOCAB, (batch, PROMPT))
    write = (_transformers if side == "transformers" else _jaxlm)(folder, prompts)
    tokens = {count: write(count) for count in (1, NEW)}  # warm
    first, all_ = (least(lambda count=count: write(count)) for count in (1, NEW))
    return {"prefill": first, "decode": (all_ - first) / (NEW - 1), "tokens": tokens[NEW]}


def _transformers(folder: str, prompts: np.ndarray) -> Callable[[int], list[list[int]]]:
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def write(count: int) -> list[list[int]]:
        with torch.inference_mode():
            return model.generate(ids, max_new_tokens=count, **options)[:, PROMPT:].tolist()

    return write


def _jaxlm(folder: str, prompts: np.ndarray) -> Callable[[int], list[list[int]]]:
    from jaxlm.checkpoints import pretrained
    from jaxlm.decoding.cached_model import CachedModel
    from jaxlm.decoding.engine import Engine, EngineConfig
    from jaxlm.decoding.requests import Request
    from jaxlm.decoding.sampling import SamplingConfig

    cached = CachedModel(pretrained.load(folder).model, start_id=None)
    engine = Engine(cached, EngineConfig(slots=len(prompts), steps=32))

    def write(count: int) -> list[list[int]]:
        sampling = SamplingConfig(count, temperature=0.0)
        answers = engine.generate([Request(prompt.tolist(), sampling) for prompt in prompts])
        return [answer.tokens.tolist() for answer in answers]

    return write


def speed(batches: Sequence[int] = BATCHES, rounds: int = ROUNDS) -> dict[str, Any]:
    """Both sides in alternating processes: ratios of the least times."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(pathlib.Path(scratch) / "llama")
        export_llama(pathlib.Path(folder))
        for batch in batches:
            found: dict[str, list[dict[str, Any]]] = {"transformers": [], "jaxlm": []}
            for _ in range(rounds):
                for side, measured in found.items():
                    measured.append(in_process("measure_speed", side, folder, batch))
            written = {json.dumps(m["tokens"]) for measured in found.values() for m in measured}
            if len(written) != 1:
                raise RuntimeError(f"The two sides did not write the same tokens at batch {batch}.")
            row = {
                side: {name: min(m[name] for m in measured) for name in ("prefill", "decode")}
                for side, measured in found.items()
            }
            ratios = {name: row["transformers"][name] / row["jaxlm"][name] for name in ("prefill", "decode")}
            rows[f"batch {batch}"] = {**row, "ratio": ratios, "rounds": rounds}
            print(
                f"batch {batch:2}: transformers / jaxlm: prefill {ratios['prefill']:.2f} "
                f"(target {TARGETS['prefill']}), decoding {ratios['decode']:.2f} (target {TARGETS['decode']}); jaxlm "
                f"{batch * PROMPT / row['jaxlm']['prefill']:.0f} and {batch / row['jaxlm']['decode']:.0f} tokens/CPU-s"
            )
    return {
        "rows": rows,
        "model": f"{LAYERS} layers of {WIDTH}, {VOCAB} ids, float32; prompts of {PROMPT}, {NEW} new tokens, one thread",
    }


def measure_packing(spread: str) -> dict[str, Any]:
    """In a process of its own: prefill of 32 prompts of 8 to 512 tokens, packed and with a row for each."""
    import jax

    from jaxlm.decoding import cached_model
    from jaxlm.layers.cache import PackedTexts

    rng = np.random.default_rng(1)
    uniform = rng.uniform(size=32)
    sizes = (8 + 504 * uniform if spread == "uniform" else 8 * 64**uniform).astype(int)
    prompts = [rng.integers(3, 1024, size).tolist() for size in sizes]
    model = cached_model.CachedModel(llama(4, 256, 688, 1024), start_id=None)
    _, packed_features = cached_model.pack(prompts, 32, None)
    rows = {name: np.zeros((32, 512), np.int32) for name in ("input_tokens", "segment_ids", "positions")}
    for row, prompt in enumerate(prompts):
        rows["input_tokens"][row, : len(prompt)] = prompt
        rows["segment_ids"][row, : len(prompt)] = 1
        rows["positions"][row, : len(prompt)] = np.arange(len(prompt))
    batch = {f"decoder_{name}": x for name, x in rows.items()}
    texts = PackedTexts(np.arange(32, dtype=np.int32), np.zeros(32, np.int32), sizes.astype(np.int32))

    def packed() -> jax.Array:
        return jax.block_until_ready(model.prefill(prompts, slots=32)[1])

    def padded() -> jax.Array:
        return jax.block_until_ready(model._programs.prefill(model.params, batch, texts, None)[1])

    error = float(np.abs(np.asarray(packed()) - np.asarray(padded())).max())
    times = {"packed": least(packed), "padded": least(padded)}
    return {
        **times,
        "ratio": times["padded"] / times["packed"],
        "columns": {"tokens": int(sizes.sum()), "packed": packed_features["input_tokens"].size, "padded": 32 * 512},
        "largest_difference_of_logits": error,
    }


def packing() -> dict[str, Any]:
    """Lengths spread evenly on a logarithmic scale, and evenly."""
    rows = {spread: in_process("measure_packing", spread) for spread in ("logarithmic", "uniform")}
    for spread, row in rows.items():
        columns = row["columns"]
        print(
            f"{spread:11}: padded / packed {row['ratio']:.2f} (target {TARGETS['packing']} on skewed lengths); "
            f"{columns['tokens']} tokens in {columns['packed']} and {columns['padded']} columns"
        )
    return rows


def measure_requests(count: int) -> dict[str, Any]:
    """In a process of its own: mixed requests through 8 slots, twice; compiles of each pass, and of what."""
    import collections
    import dataclasses

    from jaxlm.decoding.cached_model import CachedModel
    from jaxlm.decoding.engine import Engine, EngineConfig
    from jaxlm.decoding.requests import Request
    from jaxlm.decoding.sampling import SamplingConfig
    from jaxlm.training.compiles import CompileCounter

    rng = np.random.default_rng(2)
    ways = [
        SamplingConfig(temperature=0.0),
        SamplingConfig(),
        SamplingConfig(temperature=0.7, top_k=40),
        SamplingConfig(top_p=0.9, min_p=0.02),
        SamplingConfig(typical_p=0.9),
    ]
    requests = [
        Request(
            rng.integers(3, 512, int(8 * 16 ** rng.uniform())).tolist(),
            dataclasses.replace(ways[i % len(ways)], max_new_tokens=int(rng.integers(1, 48))),
            seed=i,
            stop_ids=(2,),
        )
        for i in range(count)
    ]
    model = CachedModel(llama(2, 128, 256, 512), start_id=None)
    passes, answers = [], []
    for _ in range(2):
        with CompileCounter() as compiles:
            start = time.process_time()
            engine = Engine(model, EngineConfig(slots=8, steps=16))
            answers.append([answer.tokens.tolist() for answer in engine.generate(requests)])
            seconds = time.process_time() - start
        by_name = dict(collections.Counter(compiles.names).most_common())
        passes.append({"compiles": compiles.count, "of": by_name, "cpu_seconds": seconds})
    return {
        "requests": count,
        "tokens": sum(map(len, answers[0])),
        "passes": passes,
        "step_programs": engine._programs.run._cache_size(),
        "same_tokens": answers[0] == answers[1],
    }


def requests() -> dict[str, Any]:
    """A thousand requests of all ways to draw."""
    row = in_process("measure_requests", 1000)
    first, second = row["passes"]
    print(
        f"{row['requests']} requests, {row['tokens']} tokens: {first['compiles']} compiles in the first pass "
        f"({row['step_programs']} of the decoding step), {second['compiles']} in the second"
    )
    return row


def in_process(name: str, *arguments: Any) -> dict[str, Any]:
    """What a function of this module gives in a process of its own, on one thread, with no compilation cache."""
    code = f"import json, benchmarks.decoding as b; print(json.dumps(b.{name}(*{arguments!r})))"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | ONE_THREAD
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


PARTS = {"speed": speed, "packing": packing, "requests": requests}


def main() -> None:
    """Measures, prints, writes results/decoding.json; parts that are not measured keep what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=list(PARTS), default=[], help="default: all")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES, help="of speed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of speed: processes of each side")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "decoding.json")
    args = parser.parse_args()
    from jaxlm.training import machine

    for name in args.parts or PARTS:
        options = {"batches": args.batches, "rounds": args.rounds} if name == "speed" else {}
        found = PARTS[name](**options) | {"machine": machine.facts()}
        result = json.loads(args.out.read_text()) if args.out.exists() else {}
        if name == "speed":  # rows that were not measured now stay
            found["rows"] = result.get(name, {}).get("rows", {}) | found["rows"]
        result[name] = found
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
