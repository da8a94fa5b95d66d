"""Does the loss follow bfloat16's when products are in 8 bits, or moments are stored in 16?

    python -m benchmarks.precision      # writes results/precision.json

A causal decoder of 2 layers, width 64, learns rows of numbers that count up in threes, 128 tokens a step, AdamW, from
the same start on the same batches. What differs is `LanguageModelConfig.compute`, or `OptimizerConfig.moments`.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from benchmarks.guides import fill
from jaxlm.architecture import Architecture
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, Parametrization
from jaxlm.layers.positions import Rope
from jaxlm.layers.stack import StackConfig
from jaxlm.models import LanguageModel
from jaxlm.models.config import ComputeType, HeadConfig, LanguageModelConfig
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.full_lm import FullLM
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.training import machine
from jaxlm.training.moments import MomentStorage
from jaxlm.training.optimizers import AdamW, OptimizerConfig, build_optimizer
from jaxlm.training.schedules import Constant
from jaxlm.training.state import abstract_model, initializer
from jaxlm.training.step import StepConfig, make_train_step

RESULTS = pathlib.Path(__file__).parent / "results" / "precision.json"
VOCABULARY, ROWS, LENGTH = 61, 8, 16
MODEL = LanguageModelConfig(
    Architecture.CAUSAL_DECODER,
    vocab_size=VOCABULARY,
    width=64,
    embedding=EmbeddingConfig(),
    head=HeadConfig(tied=False),
    init=InitConfig(),
    decoder=StackConfig(
        (BlockConfig(AttentionConfig(4, 16, 2, position=Rope()), FeedForwardConfig(128), NormConfig()),),
        num_layers=2,
        final_norm=NormConfig(),
    ),
)


def batch(seed: int) -> dict[str, np.ndarray]:
    """Rows of one document each; a token is three more than the one before."""
    start = np.random.default_rng(seed).integers(1, VOCABULARY, (ROWS, 1))
    place = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))
    targets = (start + 3 * place) % (VOCABULARY - 1) + 1
    return {
        "decoder_input_tokens": np.where(place == 0, 0, np.roll(targets, 1, 1)).astype(np.int32),
        "decoder_target_tokens": targets.astype(np.int32),
        "decoder_loss_weights": np.ones((ROWS, LENGTH), np.float32),
        "decoder_segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "decoder_positions": place.astype(np.int32),
    }


def losses(compute: ComputeType, moments: MomentStorage | None = None, *, steps: int) -> np.ndarray:
    """The loss of each step, [steps]."""
    model = dataclasses.replace(MODEL, compute=compute)

    def make(key: jax.Array) -> LanguageModel:
        return LanguageModel(model, key=key)

    definition, _, infos = abstract_model(make)
    optimizer = build_optimizer(
        OptimizerConfig(AdamW(), Constant(3e-3), moments=moments),
        infos,
        total_steps=steps,
        parametrization=Parametrization(),
    )
    parallel = ParallelConfig(MeshConfig()).on(jax.devices()[:1])
    state = initializer(make, optimizer, parallel)(0)
    step = make_train_step(definition, FullLM(), optimizer, parallel, config=StepConfig(), loss=LossConfig())
    found = []
    for i in range(steps):
        state, metrics = step(state, batch(i))
        found.append(metrics["loss"][0])
    return np.array(jax.device_get(found))


def main(steps: int = 300, last: int = 100) -> None:
    """Prints and writes mean losses of the last steps, and their distance from bfloat16's."""
    runs = {compute.value: (compute, None) for compute in ComputeType}
    runs["bfloat16, moments in bfloat16"] = (ComputeType.BFLOAT16, MomentStorage())
    means = {name: float(losses(*run, steps=steps)[-last:].mean()) for name, run in runs.items()}
    rows = {name: {"loss": mean, "from bfloat16": mean - means["bfloat16"]} for name, mean in means.items()}
    RESULTS.write_text(
        json.dumps({"steps": steps, "last": last, "machine": machine.facts(), "runs": rows}, indent=1) + "\n"
    )
    print(committed("runs"))
    fill("memory_and_precision.md", "precision", committed)


def committed(name: str) -> str:
    """The table of the committed results, for docs/memory_and_precision.md."""
    found = json.loads(RESULTS.read_text())
    lines = [
        f"| | nats, mean of the last {found['last']} of {found['steps']} steps | from bfloat16 |",
        "|---|---:|---:|",
    ]
    lines += [f"| {of} | {row['loss']:.4f} | {row['from bfloat16']:+.4f} |" for of, row in found[name].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
