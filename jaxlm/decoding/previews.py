"""What a model writes during training: a few held-out examples as it sees them, its answer, and the true one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.engine import Engine, EngineConfig
from jaxlm.decoding.mask_filling import fill_masks
from jaxlm.decoding.requests import Request
from jaxlm.decoding.sampling import SamplingConfig, drawable_ids
from jaxlm.layers.context import LOCAL, Context
from jaxlm.parallel.sharded_ops import ShardedOps


class Decoder(Protocol):
    """What is needed of a `jaxlm.data.vocabularies.Vocabulary`."""

    @property
    def size(self) -> int: ...

    def decode(self, ids: Any) -> str: ...

    def info(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Samples during training.

    Attributes:
      period: every so many training steps, and at the end.
      sampling: how tokens are drawn, and how many.
      count: examples shown, always the same ones.
      prompt_tokens: of a text that has no inputs of its own (language modelling), the model is given so many.
      seed: of the draws.
    """

    period: int
    sampling: SamplingConfig
    count: int = 2
    prompt_tokens: int = 32
    seed: int = 0

    def __post_init__(self):
        for name in ("period", "count", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"SampleConfig.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An example to preview: int32 ids of what the model is given, and of what it should answer."""

    given: np.ndarray
    answer: np.ndarray


def prompts_of(batch: Mapping[str, np.ndarray], architecture: Architecture, config: SampleConfig) -> list[Prompt]:
    """The first example of each of the first rows of a batch.

    Args:
      batch: features by seqio's names, docs/architecture.md.
      architecture: what the batch is laid out for.
      config: how many, and how long prompts of plain text are.
    """
    prompts = []
    side = "decoder" if architecture.has_decoder_features else "encoder"
    for row in range(len(batch[f"{side}_segment_ids"])):
        first = batch[f"{side}_segment_ids"][row] == 1
        targets = batch[f"{side}_target_tokens"][row][first]
        if architecture is Architecture.ENCODER:
            prompts.append(Prompt(batch["encoder_input_tokens"][row][first], targets))
        elif architecture is Architecture.ENCODER_DECODER:
            given = batch["encoder_input_tokens"][row][batch["encoder_segment_ids"][row] == 1]
            prompts.append(Prompt(given, targets))
        else:
            weighted = np.flatnonzero(batch["decoder_loss_weights"][row][first])
            start = int(weighted[0]) if len(weighted) else 0
            # Text without inputs of its own: its beginning is the prompt.
            start = start or min(config.prompt_tokens, len(targets) // 2)
            prompts.append(Prompt(targets[:start], targets[start:]))
    return [prompt for prompt in prompts if len(prompt.given)][: config.count]


def preview(
    model: Any,
    prompts: Sequence[Prompt],
    vocabulary: Decoder,
    config: SampleConfig,
    *,
    context: Context = LOCAL,
) -> str:
    """The model's answers to `prompts`, as a text for people.

    Args:
      model: a `LanguageModel`, or a replaced-token detector, whose generator answers.
      prompts: from `prompts_of`; the same number each time, so that sampling compiles once.
      vocabulary: turns ids into text.
      config: how tokens are drawn.
      context: operations of the mesh the model lies on.
    """
    info = vocabulary.info()
    model = getattr(model, "generator", model)
    if model is None:
        return "(a detector without a generator writes nothing)"
    given = [prompt.given.tolist() for prompt in prompts]
    if model.config.architecture is Architecture.ENCODER:
        if info.mask_id is None:
            return "(the vocabulary has no [MASK] to fill)"
        answers = fill_masks(
            model,
            given,
            mask_id=info.mask_id,
            seed=config.seed,
            config=config.sampling,
            vocab_size=vocabulary.size,
            pad_id=info.pad_id,
            context=context,
        )
    else:
        ops = context.ops
        if isinstance(ops, ShardedOps) and ops.parallel.stages.count > 1:
            return "(no samples: decoding needs all layers on every device, and this mesh deals them to stages)"
        cached = CachedModel(model, start_id=info.pad_id, context=_with_whole_rows(context))
        drawable = drawable_ids(model.config.vocab_size, vocabulary.size, (info.pad_id,))
        # No more slots than prompts and one call for all tokens: nobody waits, and nothing is streamed.
        engine = Engine(cached, EngineConfig(len(given), config.sampling.max_new_tokens), drawable=drawable)
        stop = () if info.eos_id is None else (info.eos_id,)
        requests = [Request(ids, config.sampling, config.seed, i, stop) for i, ids in enumerate(given)]
        answers = [answer.tokens for answer in engine.generate(requests)]
    blocks = []
    for prompt, answer in zip(prompts, answers, strict=True):
        truth = prompt.answer[: max(len(answer), config.sampling.max_new_tokens)]
        lines = (("given", prompt.given), ("model", answer), ("truth", truth))
        blocks.append("\n".join(f"{label}: {_shown(vocabulary.decode(ids))}" for label, ids in lines))
    return "\n\n".join(blocks)


def _with_whole_rows(context: Context) -> Context:
    """The same mesh, of which the devices along `sequence` all do the same: a token at a time cannot be split."""
    if not context.ops.splits_length:
        return context
    parallel = context.ops.parallel
    rules = tuple(rule for rule in parallel.rules if rule[0] != "length")
    whole = dataclasses.replace(parallel, config=dataclasses.replace(parallel.config, rules=rules))
    return dataclasses.replace(context, ops=ShardedOps(whole))


def _shown(text: str) -> str:
    """Text on one line."""
    return text.replace("\n", "⏎")
