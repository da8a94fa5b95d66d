"""Rank classification of HellaSwag on the CPU: ours beside lm-evaluation-harness over transformers, same weights.

    python -m benchmarks.evaluation --data DATA  # eval/hellaswag, pretrain/books_pd; writes results/evaluation.json

A Llama of random parameters is made once and scored by both, each in a process of its own on one core, in processor
seconds from texts to scores; loading and our compilation (reported beside) are not counted. The harness' best batch
size of 1, 8, 32 and auto is found on the first rows, and all rows are then scored with it. Where the gain comes from is
measured on ours: without contexts shared, and with logits of every token. Needs transformers, torch and lm-eval.
"""

import argparse
import gzip
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
TARGET = 2.0
VOCABULARY = 8192
BATCHES = ("1", "8", "32", "auto")
MODEL = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 4}


def make_model(folder: str, books: pathlib.Path) -> None:
    """A Hugging Face folder: random Llama, byte-pair tokenizer of 8,192 pieces trained on the books."""
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    with gzip.open(books, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        **MODEL,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)


def read_rows(data: pathlib.Path, count: int) -> list[dict]:
    """The first rows of HellaSwag."""
    with gzip.open(data / "eval" / "hellaswag" / "validation.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][:count]


def harness(folder: str, rows: list[dict], batch: str) -> dict:
    """lm-evaluation-harness' own model for transformers."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=batch if batch == "auto" else int(batch))
    requests = [
        Instance("loglikelihood", {}, (row["query"], " " + choice), i)
        for i, row in enumerate(rows)
        for choice in row["choices"]
    ]
    model.loglikelihood(requests[:4], disable_tqdm=True)  # warm
    start, wall = time.process_time(), time.perf_counter()
    found = model.loglikelihood(requests, disable_tqdm=True)
    return {
        "cpu_seconds": time.process_time() - start,
        "seconds": time.perf_counter() - wall,
        "scores": [score for score, _ in found],
    }


def ours(folder: str, rows: list[dict], variant: str) -> dict:
    """The same through `TextModel`; variants: shared, apart (contexts read for each choice), all_logits."""
    from jaxlm.checkpoints import pretrained
    from jaxlm.evaluation.scoring import ScoringConfig
    from jaxlm.evaluation.text_model import TextModel

    model = TextModel(pretrained.load(folder), scoring=ScoringConfig(share_context=variant == "shared"))
    pairs = [(row["query"], choice) for row in rows for choice in row["choices"]]

    def score() -> list[float]:
        if variant != "all_logits":
            return [score.total for score in model.score(pairs)]
        encoded = model.encode(pairs)
        whole = model.score_ids([(c[:1], np.concatenate([c[1:], t])) for c, t in encoded])
        return [float(s.log_probabilities[-len(t) :].sum(dtype=np.float64)) for s, (_, t) in zip(whole, encoded)]

    start = time.process_time()
    score()
    first = time.process_time() - start
    start, wall = time.process_time(), time.perf_counter()
    scores = score()
    spent = time.process_time() - start
    return {
        "cpu_seconds": spent,
        "seconds": time.perf_counter() - wall,
        "compile_cpu_seconds": first - spent,
        "scores": scores,
    }


def in_process(kind: str, folder: str, data: pathlib.Path, rows: int, variant: str) -> dict:
    """Runs one measurement in a process of its own."""
    arguments = [sys.executable, "-m", "benchmarks.evaluation", "--data", str(data)]
    arguments += ["--worker", kind, folder, str(rows), variant]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{kind} {variant} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def chosen(scores: list[float]) -> np.ndarray:
    """The index of each row's best choice, of four."""
    return np.array(scores).reshape(-1, 4).argmax(1)


def main() -> None:
    """Measures, prints, writes results/evaluation.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with eval/ and pretrain/")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--trial_rows", type=int, default=50, help="on which the harness' batch size is chosen")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "evaluation.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        # One core for each: threads that wait for work on a busy machine count as processor time.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        kind, folder, count, variant = args.worker
        measure = {"harness": harness, "ours": ours}[kind]
        print(json.dumps(measure(folder, read_rows(args.data, int(count)), variant)))
        return
    from jaxlm.training import machine

    rows = read_rows(args.data, args.rows)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, args.data / "pretrain" / "books_pd" / "validation.jsonl.gz")

        def run(kind: str, variant: str, count: int = len(rows)) -> dict:
            found = in_process(kind, folder, args.data, count, variant)
            print(kind, variant, count, "rows:", round(found["cpu_seconds"], 1), "CPU-s", flush=True)
            return found

        trials = {batch: run("harness", batch, args.trial_rows) for batch in BATCHES}
        best = min(trials, key=lambda batch: trials[batch]["cpu_seconds"])
        shared = run("ours", "shared")
        theirs = run("harness", best)
        apart, all_logits = run("ours", "apart"), run("ours", "all_logits")
    gold = np.array([row["gold"] for row in rows])
    same = chosen(shared["scores"]) == chosen(theirs["scores"])
    seconds = {"ours": shared, "harness": theirs, "ours_apart": apart, "ours_apart_all_logits": all_logits}
    report = {
        "model": {**MODEL, "family": "llama", "vocab_size": VOCABULARY, "parameters": "random"},
        "rows": len(rows),
        "trial_cpu_seconds_by_batch_size": {b: round(t["cpu_seconds"], 2) for b, t in trials.items()},
        "trial_rows": args.trial_rows,
        "harness_batch_size": best,
        "cpu_seconds": {name: round(found["cpu_seconds"], 2) for name, found in seconds.items()},
        "compile_cpu_seconds": round(shared["compile_cpu_seconds"], 2),
        "ratio": round(theirs["cpu_seconds"] / shared["cpu_seconds"], 2),
        "target_ratio": TARGET,
        "gain_of_shared_contexts": round(apart["cpu_seconds"] / shared["cpu_seconds"], 2),
        "gain_of_logits_where_scored": round(all_logits["cpu_seconds"] / apart["cpu_seconds"], 2),
        "rows_with_the_same_choice": int(same.sum()),
        "largest_difference_of_scores": float(np.abs(np.subtract(shared["scores"], theirs["scores"])).max()),
        "accuracy": {
            "ours": float((chosen(shared["scores"]) == gold).mean()),
            "harness": float((chosen(theirs["scores"]) == gold).mean()),
        },
        "machine": machine.facts(),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
