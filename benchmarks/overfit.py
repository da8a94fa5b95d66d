"""Every legal pair of architecture and objective overfits one packed batch to that batch's irreducible entropy.

    python -m benchmarks.overfit                       # all pairs; writes results/overfit.json and prints a table
    python -m benchmarks.overfit encoder/masked_lm     # those whose names contain this

A model that has learnt a batch by heart reaches the entropy of the targets given what each position sees
(`jaxlm.evaluation.irreducible_entropy`), and no less. One that stays above it has a mask, a position, a target or a
gradient in the wrong place; one that falls below it sees what it must not. Models have two layers and no dropout;
z-loss and label smoothing are off; the draws of replaced-token detection are frozen.
"""

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import pathlib
import pkgutil
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import objectives
from jaxlm.architecture import Architecture
from jaxlm.configuration import resolve
from jaxlm.data.loader import DataConfig, Packing, build_loader
from jaxlm.data.sources import InMemory
from jaxlm.data.tasks import Task, pairs_task, text_task
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.evaluation.irreducible_entropy import irreducible_entropy
from jaxlm.layers.context import Context
from jaxlm.layers.parameters import Parametrization
from jaxlm.models import EmbeddingSharing, ModelConfig, build_model
from jaxlm.objectives.base import LossConfig, Objective
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.mixture import Mixture
from jaxlm.objectives.multi_token import MultiTokenPrediction
from jaxlm.objectives.prefix_lm import Pairing, PrefixLM
from jaxlm.objectives.replaced_token_detection import Draws, Generator, ReplacedTokenDetection
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.objectives.supervised import Supervised
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.training import machine
from jaxlm.training.optimizers import AdamW, OptimizerConfig, build_optimizer
from jaxlm.training.schedules import Cosine, Join, Linear
from jaxlm.training.state import abstract_model, initializer
from jaxlm.training.step import StepConfig, make_train_step

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARGIN = 0.01  # nats above the irreducible entropy, for each loss term
SLACK = 1e-4  # nats below it that rounding may explain
ROWS, LENGTHS = 4, {"inputs": 64, "targets": 64}
STEPS, CHECK_PERIOD, LEARNING_RATE = 1600, 25, 4e-3

_DETECTION = ReplacedTokenDetection(draws=Draws.FROZEN)
# Instances of the objectives that have several forms or cannot do without arguments; others are tried as they come.
FORMS: Mapping[type[Objective], dict[str, Objective]] = {
    PrefixLM: {"prefix_lm": PrefixLM(), "prefix_lm_complementary": PrefixLM(pairing=Pairing.COMPLEMENTARY)},
    Mixture: {
        "mixture": Mixture((PrefixLM(), SpanCorruption()), (0.5, 0.5)),
        "mixture_of_rows": Mixture((FullLM(), PrefixLM()), (0.5, 0.5)),
    },
    MultiTokenPrediction: {"multi_token": MultiTokenPrediction(num_future=2)},
    ReplacedTokenDetection: {
        "replaced_token_detection": _DETECTION,
        "replaced_token_detection_uniform": dataclasses.replace(_DETECTION, generator=Generator.UNIFORM),
    },
}
MODELS = (*(architecture.value for architecture in Architecture), "multi_token", "replaced_token_detector")
"""Files of gin_configs/models/tiny."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """An architecture and an objective that trains it."""

    architecture: Architecture
    objective_name: str

    def __str__(self) -> str:
        return f"{self.architecture.value}/{self.objective_name}"

    @property
    def objective(self) -> Objective:
        """The objective itself."""
        return all_objectives()[self.objective_name]


@functools.cache
def all_objectives() -> dict[str, Objective]:
    """An instance of every objective of the library, in all forms that `FORMS` lists."""
    found: dict[str, Objective] = {}
    for module in pkgutil.iter_modules(objectives.__path__, f"{objectives.__name__}."):
        for thing in vars(importlib.import_module(module.name)).values():
            own = inspect.isclass(thing) and issubclass(thing, Objective) and thing.__module__ == module.name
            if own and not inspect.isabstract(thing):
                found |= FORMS[thing] if thing in FORMS else {thing.name: thing()}
    return found


def all_pairs() -> list[Pair]:
    """Every pair that the objective does not refuse."""
    return [
        Pair(architecture, name)
        for architecture in Architecture
        for name, objective in all_objectives().items()
        if objective.refuses(architecture) is None
    ]


@functools.cache
def _models() -> tuple[ModelConfig, ...]:
    found = [resolve("%MODEL", [f"--gin_file=gin_configs/models/tiny/{name}.gin"]) for name in MODELS]
    # For replacements that are drawn uniformly.
    return *found, dataclasses.replace(found[-1], generator=None, sharing=EmbeddingSharing.UNTIED)


def model_for(pair: Pair) -> ModelConfig:
    """The first tiny model of that architecture that the objective does not refuse."""
    for model in _models():
        if model.architecture is pair.architecture and pair.objective.refuses_model(model) is None:
            return model
    raise ValueError(f"There is no tiny model for {pair}; add one to MODELS.")


def task_for(objective: Objective) -> Task:
    """Pieces of the project's licence, some 30 bytes each: the same text everywhere, with words that come again."""
    words = (ROOT / "LICENSE").read_text().split()[:1200]
    pieces = tuple(" ".join(words[i : i + 5]) for i in range(0, len(words), 5))
    vocabulary = ByteVocabulary(
        named_tokens=("[MASK]", "[R]", "[S]", "[X]", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<sep>", "<eom>")
    )
    if isinstance(objective, Supervised):
        pairs = tuple({"inputs": a, "targets": b} for a, b in zip(pieces[::2], pieces[1::2]))
        return pairs_task("pairs", InMemory(pairs), vocabulary)
    return text_task("pieces", InMemory(pieces), vocabulary)


def batch_for(pair: Pair) -> dict[str, np.ndarray]:
    """One packed batch, several pieces a row."""
    loader = build_loader(
        DataConfig(task_for(pair.objective), LENGTHS, Packing.FIRST_FIT, virtual_shards=1, look_ahead=64),
        objective=pair.objective,
        architecture=pair.architecture,
        batch_size=ROWS,
    )
    batch = next(loader)
    loader.close()
    side = "decoder" if pair.architecture.has_decoder_features else "encoder"
    if batch[f"{side}_segment_ids"].max() < 2:
        raise ValueError(f"The batch of {pair} is not packed; make LENGTHS longer.")
    return batch


def floors(pair: Pair, batch: Mapping[str, np.ndarray], shown: np.ndarray | None) -> dict[str, float]:
    """The irreducible entropy of each loss term, nats.

    Args:
      pair: what is trained.
      batch: on what.
      shown: what a discriminator is shown, [B, S].
    """
    objective, found = pair.objective, {}
    for term in objective.coefficients:
        if term == "discriminator":
            present = batch["encoder_segment_ids"] > 0
            replaced = (shown != batch["encoder_target_tokens"]) & present
            seen = {"encoder_input_tokens": shown, "encoder_target_tokens": replaced, "encoder_loss_weights": present}
            found[term] = irreducible_entropy({**batch, **seen}, pair.architecture)
        else:
            ahead = objective.terms.index(term) if isinstance(objective, MultiTokenPrediction) else 0
            found[term] = irreducible_entropy(batch, pair.architecture, ahead=ahead)
    return found


@dataclasses.dataclass(frozen=True)
class Overfit:
    """How far a pair came.

    Attributes:
      pair: its name.
      steps: training steps made.
      losses, floors: nats of each loss term, and its irreducible entropy.
      seconds: of processor time, compilation included.
    """

    pair: str
    steps: int
    losses: dict[str, float]
    floors: dict[str, float]
    seconds: float

    @property
    def gap(self) -> float:
        """The largest distance of a loss term from its floor, nats; negative only where all are below."""
        return max(self.losses[term] - self.floors[term] for term in self.losses)

    @property
    def below(self) -> float:
        """How far a loss term is below its floor, nats; a model that cannot see its targets has at most rounding."""
        return max(self.floors[term] - self.losses[term] for term in self.losses)


def overfit(
    pair: Pair, *, model: ModelConfig | None = None, steps: int = STEPS, learning_rate: float = LEARNING_RATE
) -> Overfit:
    """Trains on one batch until every loss term is within MARGIN of its floor, or `steps` are over.

    It must be so at two checks in a row: a model that sees too much goes on falling in between. `model` is `model_for`
    the pair unless given.
    """
    start = time.process_time()
    model, objective, batch = model or model_for(pair), pair.objective, batch_for(pair)
    parallel = ParallelConfig(MeshConfig()).on()

    def make(key: jax.Array):
        return build_model(model, key=key)

    definition, _, infos = abstract_model(make)
    schedule = Join((Linear(0.0, learning_rate), Cosine(learning_rate, learning_rate / 20)), lengths=(20,))
    # No momentum of the squares over a thousand steps: the loss falls by three orders of magnitude.
    config = OptimizerConfig(AdamW(b2=0.95), schedule)
    optimizer = build_optimizer(config, infos, total_steps=steps, parametrization=Parametrization())
    loss = LossConfig()
    step = make_train_step(definition, objective, optimizer, parallel, config=StepConfig(), loss=loss)
    context = Context(ops=ShardedOps(parallel))

    @jax.jit
    def measure(params, batch):
        model = definition.merge(params)
        _, metrics, _ = objective.loss_sums(model, batch, context=context, config=loss)
        shown = None
        if isinstance(objective, ReplacedTokenDetection):
            shown = objective.shown_tokens(model, batch, context=context, config=loss)
        return {term: metrics[term][0] / metrics[term][1] for term in objective.coefficients}, shown

    state = initializer(make, optimizer, parallel)(0)
    on_device = {name: jnp.asarray(x) for name, x in batch.items()}
    reached = False
    for done in range(1, steps + 1):
        state, _ = step(state, on_device)
        if done % CHECK_PERIOD and done < steps:
            continue
        losses, shown = measure(state.params, on_device)
        found = Overfit(
            str(pair),
            done,
            {term: float(x) for term, x in losses.items()},
            floors(pair, batch, None if shown is None else np.asarray(shown)),
            time.process_time() - start,
        )
        if reached and found.gap <= MARGIN:
            break
        reached = found.gap <= MARGIN
    return found


def main() -> None:
    """Runs the pairs, prints a table, writes the results if these are all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="", help="a part of the names of the pairs to run")
    args = parser.parse_args()
    rows = []
    print(f"{'pair':58} {'term':14} {'loss':>8} {'floor':>8} {'gap':>8} {'steps':>6} {'CPU-s':>6}")
    for pair in all_pairs():
        if args.only not in str(pair):
            continue
        found = overfit(pair)
        rows.append({**dataclasses.asdict(found), "gap": found.gap, "below": found.below})
        for term, value in found.losses.items():
            floor = found.floors[term]
            print(
                f"{found.pair:58} {term:14} {value:8.4f} {floor:8.4f} {value - floor:8.4f} {found.steps:6} "
                f"{found.seconds:6.1f}",
                flush=True,
            )
    if not rows:
        parser.error(f"no pair has {args.only!r} in its name; there are {', '.join(map(str, all_pairs()))}")
    worst, lowest = max(row["gap"] for row in rows), max(row["below"] for row in rows)
    print(
        f"{len(rows)} pairs: at most {worst:.4f} nats above the floor (wanted: {MARGIN}) and {max(lowest, 0.0):.1e} "
        f"below it (wanted: {SLACK:.0e})"
    )
    if not args.only:
        targets = {"largest_gap": MARGIN, "furthest_below": SLACK}
        result = {"targets": targets, "largest_gap": worst, "furthest_below": lowest, "pairs": rows}
        result["machine"] = machine.facts()
        (RESULTS / "overfit.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
