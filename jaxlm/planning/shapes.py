"""What a step needs by its shapes alone, without compiling: enough to leave out what cannot fit, and to give advice."""

import dataclasses
import functools
import math

from jaxlm.layers.block import TokenSizes
from jaxlm.layers.remat import Remat, RematPolicy, as_names
from jaxlm.models.config import LanguageModelConfig, ModelConfig, ReplacedTokenDetectorConfig
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.rules import degree
from jaxlm.parallel.stages import Recompute
from jaxlm.planning.memory import bytes_on_a_device
from jaxlm.run import BatchLayout, Program, RunConfig
from jaxlm.training.state import abstract_state
from pallas_kernels.residuals import ATTENTION_OUT


@dataclasses.dataclass(frozen=True)
class Expected:
    """Bytes on one device, to be taken as a rough guess; the compiler knows better.

    Attributes:
      state: parameters, their average, the optimizer's state.
      gradients: of all parameters.
      saved: activations kept for the backward pass, of one microbatch.
      working: the largest block's activations and the loss's logits.
    """

    state: int
    gradients: int
    saved: int
    working: int

    @property
    def total(self) -> int:
        """All together."""
        return self.state + self.gradients + self.saved + self.working


def expected(run: RunConfig, program: Program, layout: BatchLayout, parallel: Parallelism) -> Expected:
    """What a step of `run` is expected to take of a device in this mesh."""
    state = abstract_state(program.abstract, program.optimizer, parallel)
    saved = working = 0
    rows = layout.features["dataset_ids"][0][0]
    ways = functools.partial(_split, parallel)
    for model in _models(program.model):
        for name, stack in model.stacks.items():
            length = layout.features.get(f"{name}_segment_ids", layout.features["dataset_ids"])[0][1]
            tokens = _tokens(rows, length, run.step.microbatches, parallel)
            width = model.width_of(name)
            blocks = [block.token_sizes(width, ways) for block in stack.all_blocks]
            size = model.compute.dtype.itemsize
            in_8_bits = model.compute.quantization is not None
            inside = tokens * size * sum(_kept(stack.remat, block, width, in_8_bits) for block in blocks)
            at_once = tokens
            if (stages := parallel.mesh.shape["stage"]) > 1:
                # Outside the pipeline a stage has its share of the tokens and inside all of them, but of the layers a
                # share: `inside` is right as it is. All go through it one microbatch at a time.
                pipeline = run.parallel.pipeline
                at_once = tokens * stages // pipeline.microbatches
                if pipeline.recompute is Recompute.STAGE:
                    inputs = tokens * stages * size * width * pipeline.rounds
                    inside = inputs + inside // pipeline.microbatches
            saved += inside
            working = max(working, at_once * size * max(block.everything for block in blocks))
        logits = min(tokens, 2048) * model.vocab_size * 4
        working += 2 * logits + 2 * model.vocab_size * model.width * 4 // _split(parallel, "vocab", model.vocab_size)
    return Expected(
        state=bytes_on_a_device(state),
        gradients=bytes_on_a_device(state.params),
        saved=saved,
        working=working,
    )


def _models(model: ModelConfig) -> list[LanguageModelConfig]:
    if isinstance(model, ReplacedTokenDetectorConfig):
        return [m for m in (model.generator, model.discriminator) if m is not None]
    return [model]


def _tokens(rows: int, length: int, microbatches: int, parallel: Parallelism) -> int:
    """Of one microbatch, on one device."""
    places = parallel.spec(("batch", "length"), (rows, length))
    ways = math.prod(degree(parallel.mesh, places, axis) for axis in (0, 1))
    return -(-rows * length // (microbatches * ways))


def _split(parallel: Parallelism, name: str, size: int) -> int:
    """How many ways the mesh splits a dimension of that logical name, where nothing else of the array is split."""
    return degree(parallel.mesh, parallel.spec((name,), (size,)), 0)


def _kept(policy: RematPolicy, block: TokenSizes, width: int, in_8_bits: bool) -> int:
    """Numbers of a token that a device keeps of a block for its backward pass."""
    if policy is Remat.NONE:
        return block.everything
    if (names := as_names(policy)) is None:
        return width + block.products
    sizes = {ATTENTION_OUT: block.mixed, **block.named}
    kept = sum(sizes.get(name, 0) for name in names.on_device)
    if in_8_bits and "product" in names.on_device:
        kept = max(kept, block.products - block.mixed)
    return kept + (0 if "block_input" in names.on_host else width)
