"""Rank classification by decoders with several kinds of positions: contexts read once, and once for each choice.

    python -m benchmarks.shared_contexts        # writes results/shared_contexts.json; one core

Random requests to a random decoder of 6 layers of 256. Times are processor seconds, the least of several repeats after
a warm-up; scores of both ways must agree.
"""

import argparse
import json
import os
import pathlib
import time
from typing import Any

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
REQUESTS, REPEATS, VOCAB = 64, 3, 1024
# name: (choices, tokens of a context, tokens of a choice), the numbers of tokens from ... to
SHAPES = {"4 long choices": (4, (60, 200), (4, 20)), "2 short choices": (2, (40, 120), (1, 4))}


def make_model(positions: str) -> Any:
    """A decoder with rotary positions, T5's table for all layers, or ALiBi."""
    import jax

    from jaxlm.architecture import Architecture
    from jaxlm.layers import (
        Alibi,
        AttentionConfig,
        BlockConfig,
        EmbeddingConfig,
        FeedForwardConfig,
        InitConfig,
        NormConfig,
        RelativePositions,
        Rope,
        StackConfig,
    )
    from jaxlm.models import HeadConfig, LanguageModelConfig, build_model

    own = {"rotary": Rope(), "alibi": Alibi(), "t5_table": None}[positions]
    block = BlockConfig(AttentionConfig(8, 32, position=own), FeedForwardConfig(1024), NormConfig())
    shared = RelativePositions() if positions == "t5_table" else None
    stack = StackConfig((block,), 6, final_norm=NormConfig(), relative_positions=shared)
    architecture, embedding, head, init = Architecture.CAUSAL_DECODER, EmbeddingConfig(), HeadConfig(), InitConfig()
    config = LanguageModelConfig(architecture, VOCAB, 256, embedding, head, init, decoder=stack)
    return build_model(config, key=jax.random.key(0))


def measure(positions: str, shape: str) -> dict[str, Any]:
    """CPU-seconds of both ways, their ratio, and how far apart their scores are at most."""
    from jaxlm.evaluation.scoring import Request, Scorer, ScoringConfig

    rng = np.random.default_rng(0)
    count, context, choice = SHAPES[shape]

    def ids(between: tuple[int, int]) -> np.ndarray:
        return rng.integers(1, VOCAB, rng.integers(*between))

    requests = [Request(ids(context), [ids(choice) for _ in range(count)]) for _ in range(REQUESTS)]
    model, seconds, scores = make_model(positions), {}, {}
    for way in ("shared", "apart"):
        scorer = Scorer(model, start_id=0, config=ScoringConfig(share_context=way == "shared"))
        assert scorer.shares_context == (way == "shared")
        found = scorer.score(requests)
        scores[way] = np.concatenate([score.log_probabilities for row in found for score in row])
        times = []
        for _ in range(REPEATS):
            start = time.process_time()
            scorer.score(requests)
            times.append(time.process_time() - start)
        seconds[way] = min(times)
    error = float(np.abs(scores["shared"] - scores["apart"]).max())
    if error > 1e-4:
        raise RuntimeError(f"Scores of {positions} differ by {error} between contexts shared and apart.")
    return {**seconds, "ratio": seconds["apart"] / seconds["shared"], "largest_difference": error}


def main() -> None:
    """Measures, prints, writes results/shared_contexts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "shared_contexts.json")
    args = parser.parse_args()
    # One core: threads that wait for work on a busy machine count as processor time.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from jaxlm.training import machine

    rows = {}
    for shape in SHAPES:
        for positions in ("rotary", "t5_table", "alibi"):
            row = rows.setdefault(shape, {})[positions] = measure(positions, shape)
            print(f"{shape}, {positions}: apart / shared {row['ratio']:.2f}", flush=True)
    args.out.write_text(json.dumps({"rows": rows, "machine": machine.facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
