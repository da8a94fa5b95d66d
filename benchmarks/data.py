"""Our input pipelines against seqio's: same files, same 8k SentencePiece model, shuffled, batches of 32, one process.

    python -m benchmarks.data                                   # the standard library; pairs are cut from it
    python -m benchmarks.data --corpus '~/books/*.jsonl.gz' --pairs '~/t0.jsonl.gz'

Speeds are tokens that are not padding, per second of processor time of all threads, the best of each side's rounds,
which take turns. "From text" charges us with building the cache and one pass over it, where seqio tokenises in every
pass.
"""

import argparse
import collections
import gzip
import itertools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import seqio_pipelines
from jaxlm.architecture import Architecture
from jaxlm.data import cache, tasks
from jaxlm.data.config import DataConfig, Packing
from jaxlm.data.loader import build_loader
from jaxlm.data.sources import InMemory, Source, StandardLibrary, TextFiles
from jaxlm.data.vocabularies import ByteVocabulary, SentencePieceVocabulary
from jaxlm.data.vocabulary_training import VocabularyKind, VocabularySettings, train_vocabulary
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.objectives.supervised import Supervised
from jaxlm.training import machine

RESULTS = pathlib.Path(__file__).parent / "results"
BATCH = 32
LM = {"targets": 512}
SPANS = {"inputs": 512, "targets": 114}
PAIRS = {"inputs": 1024, "targets": 256}
LOOK_AHEAD = 1024
FILES = 8

# Least ratio to seqio, from the project's plan.
TARGETS = {"LM from ids": 3.5, "LM from text": 2.2, "spans from ids": 3.0, "spans from text": 2.2, "pairs": 2.5}


def plain(text: str) -> str:
    """The text in one line without what JSON escapes, so that seqio's pipeline need not parse JSON to read it."""
    text = " ".join(text.split()).replace("\\", "/").replace('"', "'")
    return "".join(c for c in text if c >= " " and c != "\x7f")


def write_text(source: Source, folder: str, limit: int) -> list[str]:
    """Up to `limit` bytes of the source's texts, dealt to jsonl files."""
    files, size = [os.path.join(folder, f"text-{i}.jsonl") for i in range(FILES)], 0
    with_texts = [open(path, "w", encoding="utf-8") for path in files]
    records = itertools.chain.from_iterable(source.read(shard) for shard in source.shards("train"))
    for i, record in enumerate(records):
        # Books are cut: tf.data would tokenise each on one thread, and its buffers would hold a library.
        text = plain(record["text"])
        for start in range(0, len(text), 20_000):
            line = json.dumps({"text": text[start : start + 20_000]}, ensure_ascii=False)
            with_texts[i % FILES].write(line + "\n")
            size += len(line)
        if size > limit:
            break
    for file in with_texts:
        file.close()
    return files


def texts_of(files: list[str]) -> Iterator[str]:
    """The texts in jsonl files."""
    for path in files:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def read_pairs(path: str | None, texts: Iterator[str], count: int = 15_000) -> list[dict[str, str]]:
    """Pairs of a jsonl(.gz) file; without one, cut from the texts with T0-like lengths (log-normal characters)."""
    if path:
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
            return [{name: row[name] for name in ("inputs", "targets")} for row in map(json.loads, file)]
    rng, pairs = np.random.default_rng(0), []
    for text in texts:
        at = 0
        while at + 5000 < len(text) and len(pairs) < count:
            inputs, targets = (int(n) for n in np.clip(rng.lognormal((6.6, 3.6), (0.8, 1.2)), 4, 4000))
            pairs.append({"inputs": text[at : at + inputs], "targets": text[at + inputs : at + inputs + targets]})
            at += inputs + targets
    return pairs


def tokens_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Tokens that are not padding and columns there are, of [encoder, decoder] (no text here has the id 0 in it)."""
    stacks = [batch.get(name, np.zeros(0)) for name in ("encoder_input_tokens", "decoder_target_tokens")]
    return np.array([[np.count_nonzero(stack), stack.size] for stack in stacks])


def rate(batches: Iterator[dict[str, np.ndarray]], tokens: int) -> tuple[float, list[float]]:
    """(million tokens per CPU-second, densities of all, encoder, decoder) over about `tokens`, after a first batch."""
    next(batches)
    start, seen = time.process_time(), np.zeros((2, 2))
    while seen[:, 0].sum() < tokens:
        seen += tokens_of(next(batches))
    seconds = time.process_time() - start
    filled = [seen.sum(0), *seen]
    return float(seen[:, 0].sum()) / seconds / 1e6, [round(float(n / max(room, 1)), 3) for n, room in filled]


class Ours:
    """Our side: tasks over the same files, and their loaders."""

    def __init__(self, files: list[str], pairs: list[dict[str, str]], model: str, folder: str):
        self._vocabulary, self._folder = SentencePieceVocabulary(model), folder
        self.text = tasks.text_task("text", TextFiles(tuple(files), validation=tuple(files)), self._vocabulary)
        self.pairs = tasks.pairs_task("pairs", InMemory(tuple(pairs)), self._vocabulary)

    def loader(self, kind: str, directory: str = "cache", **options: Any):
        """A loader of "lm", "spans" or "pairs"."""
        objective, architecture, lengths, packing = {
            "lm": (FullLM(), Architecture.CAUSAL_DECODER, LM, Packing.CONCAT_AND_SPLIT),
            "spans": (SpanCorruption(), Architecture.ENCODER_DECODER, SPANS, Packing.CONCAT_AND_SPLIT),
            "pairs": (Supervised(), Architecture.ENCODER_DECODER, PAIRS, Packing.PLAN),
        }[kind]
        config = DataConfig(
            self.pairs if kind == "pairs" else self.text,
            lengths,
            packing=options.pop("packing", packing),
            plan_look_ahead=LOOK_AHEAD,
            cache_directory=os.path.join(self._folder, directory),
        )
        return build_loader(config, objective=objective, architecture=architecture, batch_size=BATCH, **options)

    def rate(self, kind: str, tokens: int) -> tuple[float, list[float]]:
        """From a built cache."""
        loader = self.loader(kind)
        result = rate(loader, tokens)
        loader.close()
        return result

    def rate_from_text(self, kind: str, round_: int) -> tuple[float, list[float]]:
        """One pass over all the text, the building of the cache included."""
        start, seen = time.process_time(), 0
        loader = self.loader(kind, f"cold-{kind}-{round_}")
        raw = sum(
            cache.open_cache(
                self.text, "train", os.path.join(self._folder, f"cold-{kind}-{round_}")
            ).num_tokens.values()
        )
        while seen < raw:
            seen += tokens_of(next(loader))[:, 0].sum()
        result = float(seen) / (time.process_time() - start) / 1e6
        loader.close()
        return result, []


def first_batch(make: Callable[[], Iterator]) -> dict[str, float]:
    """Wall and processor seconds from nothing to the first batch."""
    wall, cpu = time.perf_counter(), time.process_time()
    next(iter(make()))
    return {"wall": round(time.perf_counter() - wall, 3), "cpu": round(time.process_time() - cpu, 3)}


def position(ours: Ours, kind: str, **options: Any) -> dict[str, float]:
    """Bytes of a saved position, and seconds to restore it and get the next batch, here and on two hosts."""
    loader = ours.loader(kind, **options)
    for _ in range(20):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    loader.close()
    result = {"bytes": len(json.dumps(state))}
    for hosts in (1, 2):
        again = ours.loader(kind, rows=range(BATCH // hosts), **options)
        start = time.perf_counter()
        again.restore(state)
        result[f"restore_{hosts}_hosts"] = round(time.perf_counter() - start, 4)
        next(again)
        result[f"first_batch_after_{hosts}_hosts"] = round(time.perf_counter() - start, 3)
        again.close()
    return result


def mixture_of(count: int, folder: str) -> dict[str, float]:
    """Opening a mixture of many small tasks whose caches are built."""
    members = tuple(
        (tasks.text_task(f"task_{i}", InMemory((f"text {i} " * 200,)), ByteVocabulary()), 1.0 + i % 7)
        for i in range(count)
    )
    config = DataConfig(tasks.Mixture("many", members), LM, cache_directory=os.path.join(folder, "many"))

    def make():
        return build_loader(config, objective=FullLM(), architecture=Architecture.CAUSAL_DECODER, batch_size=BATCH)

    next(make())
    return first_batch(make)


def main() -> None:
    """Measures, prints a table, writes results/data.json and results/data.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", help="folders, files or globs of text; default: the standard library")
    parser.add_argument("--pairs", help="jsonl(.gz) of inputs and targets; default: cut from the corpus")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens a measurement (default %(default)s)")
    parser.add_argument("--text_bytes", type=int, default=12_000_000, help="text used (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixture", type=int, default=1000, help="tasks of the large mixture (default %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "data.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, folder)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """All figures, as JSON."""
    source = TextFiles(tuple(args.corpus)) if args.corpus else StandardLibrary()
    files = write_text(source, folder, args.text_bytes)
    model = os.path.join(folder, "8k.model")
    size = sum(map(os.path.getsize, files))
    settings = VocabularySettings(VocabularyKind.UNIGRAM, 8192, sample_bytes=4 << 20)
    vocabulary = train_vocabulary(texts_of(files), model, settings, total_bytes=size)
    pairs = read_pairs(args.pairs, texts_of(files))
    records = collections.defaultdict(list)
    for kind, examples in (
        ("ids", [{"targets": np.append(vocabulary.encode(text), 1)} for text in texts_of(files)]),
        ("pairs", [{name: vocabulary.encode(text) for name, text in pair.items()} for pair in pairs]),
    ):
        for i in range(FILES):
            path = os.path.join(folder, f"{kind}-{i}.tfrecord")
            seqio_pipelines.write_records(path, examples[i::FILES])
            records[kind].append(path)
    raw_length = SpanCorruption().raw_length(SPANS, Architecture.ENCODER_DECODER)
    seqio_pipelines.register({"text": files, **records}, model, raw_length, LM["targets"])
    ours = Ours(files, pairs, model, folder)
    for kind in ("lm", "spans", "pairs"):
        ours.loader(kind).close()  # builds the caches and the plan

    def theirs(task: str, lengths: dict[str, int]) -> Callable[[int], tuple[float, list[float]]]:
        return lambda _: rate(seqio_pipelines.batches(task, lengths, BATCH), args.tokens)

    contests = {
        "LM from ids": (lambda _: ours.rate("lm", args.tokens), theirs("lm_ids", LM)),
        "LM from text": (lambda i: ours.rate_from_text("lm", i), theirs("lm_text", LM)),
        "spans from ids": (lambda _: ours.rate("spans", args.tokens), theirs("spans_ids", SPANS)),
        "spans from text": (lambda i: ours.rate_from_text("spans", i), theirs("spans_text", SPANS)),
        "pairs": (lambda _: ours.rate("pairs", args.tokens), theirs("pairs", PAIRS)),
    }
    rows = {}
    for name, sides in contests.items():
        rounds = [[side(i) for side in sides] for i in range(args.rounds)]
        best = [max(pair[side][0] for pair in rounds) for side in range(2)]
        rows[name] = {
            "jaxlm": round(best[0], 2),
            "seqio": round(best[1], 2),
            "ratio": round(best[0] / best[1], 2),
            "target": TARGETS[name],
        }
        print(name, rows[name], flush=True)
    # All columns, the encoder's, the decoder's. Where targets are rare, the whole cannot be dense.
    density = dict(zip(("jaxlm", "seqio"), (side[1] for side in rounds[-1])))
    return {
        "unit": "million tokens per CPU-second",
        "rows": rows,
        "pairs": {"count": len(pairs), "lengths": PAIRS, "plan_look_ahead": LOOK_AHEAD, "density": density},
        "first_batch_seconds": {
            "jaxlm": first_batch(lambda: ours.loader("lm")),
            "seqio": first_batch(lambda: seqio_pipelines.batches("lm_ids", LM, BATCH)),
        },
        "position": {
            "indexed": position(ours, "lm"),
            "packed stream": position(ours, "pairs", packing=Packing.FIRST_FIT),
            "seqio": {"bytes": seqio_pipelines.state_bytes("lm_ids", LM, BATCH, folder)},
        },
        "mixture": {"tasks": args.mixture, **mixture_of(args.mixture, folder)},
        "corpus": {"name": "given" if args.corpus else "standard library", "bytes": size},
        "machine": machine.facts(),
    }


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table for the documentation."""
    lines = [f"| {result['unit']} | jaxlm | seqio | ratio | target |", "|---" * 5 + "|"]
    for name, row in result["rows"].items():
        cells = (name, row["jaxlm"], row["seqio"], f"{row['ratio']}x", f"{row['target']}x")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    first, where, mixture = result["first_batch_seconds"], result["position"], result["mixture"]
    indexed, stream = where["indexed"], where["packed stream"]
    density = result["pairs"]["density"]

    def dense(side: str) -> str:
        whole, encoder, decoder = density[side]
        return f"{whole} (encoder {encoder}, decoder {decoder})"

    # With the scarcer stack full: more no packing can do.
    possible = density["jaxlm"][0] / max(density["jaxlm"][1:])
    facts = {
        f"density of pairs, {PAIRS['inputs']}/{PAIRS['targets']}": f"{dense('jaxlm')}; seqio {dense('seqio')}",
        "density if the fuller stack were full": f"{possible:.3f}",
        "look-ahead of the plan": f"{result['pairs']['plan_look_ahead']} pairs",
        "first batch from a built cache": f"{first['jaxlm']['wall']} s; seqio {first['seqio']['wall']} s",
        "position, indexed": f"{indexed['bytes']} bytes; restored in {indexed['restore_1_hosts']} s, next batch after "
        f"{indexed['first_batch_after_1_hosts']} s, on two hosts {indexed['first_batch_after_2_hosts']} s",
        "position, packed stream": f"{stream['bytes']} bytes; next batch after "
        f"{stream['first_batch_after_1_hosts']} s, on two hosts {stream['first_batch_after_2_hosts']} s",
        "position, seqio": f"{where['seqio']['bytes']} bytes",
        f"first batch of a mixture of {mixture['tasks']} tasks": f"{mixture['wall']} s",
        "text": f"{result['corpus']['name']}, {result['corpus']['bytes'] / 1e6:.1f} MB",
        "machine": f"{result['machine']['devices']}; {result['machine']['versions']}",
    }
    lines += ["", "| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
