"""Opens a trained model, from a run's folder or a Hugging Face folder: the module, and what one must know to use it.

    model = pretrained.load("runs/mine")
    ids = model.vocabulary.encode("Once upon a time")

Layers are unrolled, which decoding wants, and parameters have the type the model computes in.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import naming, stored
from jaxlm.checkpoints.huggingface.files import read_json
from jaxlm.checkpoints.huggingface.folder import GENERATION_CONFIG, HuggingFaceFolder
from jaxlm.checkpoints.huggingface.tokenizer import read_tokenizer
from jaxlm.checkpoints.manifest import CheckpointError, Verify
from jaxlm.checkpoints.schedule_free import evaluated
from jaxlm.checkpoints.sources import Source, open_source
from jaxlm.checkpoints.t5.layout import T5Checkpoint
from jaxlm.configuration import resolve_text
from jaxlm.data import tasks
from jaxlm.data.vocabularies import Vocabulary
from jaxlm.layers.stack import Layers
from jaxlm.models import build_model
from jaxlm.models.config import ComputeType, LanguageModelConfig
from jaxlm.models.language_model import LanguageModel
from jaxlm.parallel.parallelism import Parallelism


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Description:
    """What is known of a trained model without reading its parameters.

    Attributes:
      config: the model, in the architecture of its last steps.
      vocabulary: text to ids and back; None where there is none to be had, see `no_vocabulary`.
      no_vocabulary: one sentence why `vocabulary` is None, else None.
      start_id: the id that a decoder's input begins with, before the first token of a prompt or answer: pad_id for
        runs, whose inputs are targets shifted by one; of a Hugging Face folder, what its tokenizer puts before every
        text (a decoder) or its decoder_start_token_id (an encoder-decoder). None: inputs begin with the text, as in
        GPT-2; or the model is an encoder.
      input_end_id: the id that ends a prompt, or the text that an encoder reads; None: nothing ends it.
      eos_ids: ids that end what a decoder writes; () where none is known.
      context_length: tokens of the longest row that it was trained on, or says it was; None where nothing says. Learned
        positions go no further; others may, and one of two stacks may be shorter.
    """

    config: LanguageModelConfig
    vocabulary: Vocabulary | None
    no_vocabulary: str | None
    start_id: int | None
    input_end_id: int | None
    eos_ids: tuple[int, ...]
    context_length: int | None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Pretrained(Description):
    """A trained model. Its `config` has unrolled layers.

    Attributes:
      model: the module, its parameters read.
      source: the folder it was read from, for people.
    """

    model: LanguageModel
    source: str


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """The configuration in a checkpoint that was converted, not trained. The tokenizer lies in the run's folder.

    Attributes:
      model: what it is.
      origin: what it was converted from, for people.
      start_id, input_end_id, eos_ids, context_length: see `Description`.
    """

    model: LanguageModelConfig
    origin: str
    start_id: int | None = None
    input_end_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    context_length: int | None = None


def load(
    path: str | pathlib.Path,
    *,
    step: int | None = None,
    averaged: bool = False,
    compute: ComputeType | str | None = None,
    parallel: Parallelism | None = None,
) -> Pretrained:
    """Opens a trained model.

    Args:
      path: a run's folder (or its `checkpoints`, or one step of these), a Hugging Face model's folder, or a checkpoint
        of T5X or Mesh TensorFlow.
      step: of a run; None is the newest intact one.
      averaged: take the moving average of the parameters.
      compute: type of activations and products; None is the run's own, and float32 for a Hugging Face folder.
      parallel: the mesh to put the parameters on; None is the first device.

    Raises:
      CheckpointError: no such checkpoint, or it is damaged.
      ValueError: the model is of no known kind, or its configuration cannot be read.
      FileNotFoundError: a file of a Hugging Face folder is missing.
    """
    source = open_source(path, step, Verify.DIGESTS, report=lambda line: print(line, file=sys.stderr))
    about = describe(source)
    config = unrolled(about.config)
    if compute is not None:
        config = dataclasses.replace(config, compute=ComputeType(compute))
    model = read_model(source, config, "ema_params" if averaged else "params", parallel)
    said = {field.name: getattr(about, field.name) for field in dataclasses.fields(about)}
    return Pretrained(**said | {"config": config}, model=model, source=str(source.folder))


def describe(source: Source) -> Description:
    """What is known of a trained model.

    Raises:
      ValueError: a run's configuration cannot be read, or it trained a replaced-token detector.
    """
    if isinstance(source, HuggingFaceFolder):
        return _describe_folder(source)
    if isinstance(source, T5Checkpoint):
        return _describe_t5(source)
    run = resolve_text(source.config)
    if isinstance(run, ImportedModel):
        return _describe_imported(run, source)
    return _describe_run(run, source)


def unrolled(config: LanguageModelConfig) -> LanguageModelConfig:
    """The same model with a program for each layer instead of a scan."""
    stacks = {name: dataclasses.replace(stack, layers=Layers.UNROLL) for name, stack in config.stacks.items()}
    return dataclasses.replace(config, **stacks)


def read_model(
    source: Source, config: LanguageModelConfig, weights: str = "params", parallel: Parallelism | None = None
) -> LanguageModel:
    """A module with the parameters of a source, read tensor by tensor to where they are to lie.

    Args:
      source: what to read.
      config: the model, its layers unrolled.
      weights: "params" (of a schedule-free run its average of iterates), or "ema_params" for their moving average.
      parallel: the mesh; None is the first device.

    Raises:
      CheckpointError: the source has no such weights, or those of another model.
      ValueError: the mesh has pipeline stages.
    """
    if parallel is not None and parallel.stages.count > 1:
        raise ValueError(
            f"A trained model is opened with all layers on every device, but the mesh has {parallel.stages.count} "
            f"pipeline stages; set MeshConfig.stage to 1."
        )
    source = evaluated(source)
    abstract = nnx.eval_shape(lambda: build_model(config, key=jax.random.key(0)))
    graph, state = nnx.split(abstract)
    variables = dict(nnx.to_flat_state(state))
    requests = {key: _request(key, variable, weights, parallel) for key, variable in variables.items()}
    _check(source, {request.paths[0]: request.shape for request in requests.values()}, weights)
    order = {path: i for i, path in enumerate(source.leaves)}  # fused tensors are then read once
    requests = dict(sorted(requests.items(), key=lambda item: order[item[1].paths[0]]))
    values = source.read(requests)
    filled = [(key, variable.replace(values[key])) for key, variable in variables.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _request(key: tuple, variable: nnx.Variable, weights: str, parallel: Parallelism | None) -> stored.Request:
    """Where a parameter is on disk, and how it is wanted."""
    value, metadata = variable.get_value(), variable.get_metadata()
    shape, axes = tuple(value.shape), tuple(metadata["axes"])
    if parallel is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    else:
        sharding = parallel.sharding(axes, shape)
    # What a model casts before any use need not be kept wider.
    dtype = np.dtype(metadata.get("used_as") or value.dtype)
    return stored.Request(((weights, *map(str, key)),), None, shape, dtype, sharding)


def _check(source: Source, wanted: Mapping[naming.Path, tuple[int, ...]], weights: str) -> None:
    """Raises CheckpointError unless the source holds exactly the parameters wanted."""
    leaves = {path: leaf.shape for path, leaf in source.leaves.items() if path[0] == weights}
    if not leaves:
        raise CheckpointError(f"{source.folder} holds no {weights}: the run kept no average; take its parameters.")
    missing = [naming.show(path[1:]) for path in wanted if path not in leaves]
    extra = [naming.show(path[1:]) for path in leaves if path not in wanted]
    other = [naming.show(path[1:]) for path, shape in wanted.items() if leaves.get(path, shape) != shape]
    for names, fault in ((missing, "lacks"), (extra, "has in excess"), (other, "has in another shape")):
        if names:
            raise CheckpointError(
                f"{source.folder} {fault} {stored.some(names)}, by the configuration saved with it; it was written by "
                f"another version of jaxlm or changed since, so read it with that version."
            )


def _describe_run(run: Any, checkpoint: stored.StoredCheckpoint) -> Description:
    """Of a `jaxlm.run.RunConfig`, in the phase that the checkpoint's step ended or continued."""
    phase = next((phase for phase in run.phases if phase.start < checkpoint.step <= phase.end), run.phases[0])
    model, data = run.model_of(phase), run.data_of(phase)
    if not isinstance(model, LanguageModelConfig):
        raise ValueError(
            f"{checkpoint.folder} holds a {type(model).__name__}, not a language model; start a run from its "
            f"discriminator (a Rename among WarmStart.rules)."
        )
    vocabulary, problem = _tried(lambda: _vocabulary_of(data.mixture))
    info = None if vocabulary is None else vocabulary.info()
    lengths = tuple(dict(data.feature_lengths).values())
    trained = {Architecture.ENCODER_DECODER: None, Architecture.ENCODER: max(lengths)}
    starts = info is not None and model.architecture is not Architecture.ENCODER
    return Description(
        config=model,
        vocabulary=vocabulary,
        no_vocabulary=problem,
        start_id=info.pad_id if starts else None,
        input_end_id=info.eos_id if starts and phase.stage.objective.ends_inputs else None,
        eos_ids=() if info is None else (info.eos_id,),
        context_length=_learned(model) or trained.get(model.architecture, sum(lengths)),
    )


def _describe_imported(imported: ImportedModel, checkpoint: stored.StoredCheckpoint) -> Description:
    folder = pathlib.Path(checkpoint.folder).parent.parent
    tokenizer, problem = _tried(lambda: read_tokenizer(folder))
    said = {field.name: getattr(imported, field.name) for field in dataclasses.fields(imported)}
    del said["origin"]
    vocabulary = None if tokenizer is None else tokenizer.vocabulary
    return Description(**said | {"config": said.pop("model")}, vocabulary=vocabulary, no_vocabulary=problem)


def _vocabulary_of(mixture: Any) -> Vocabulary:
    """The vocabulary of a task or mixture, or of the one registered under that name."""
    found = tasks.resolve(mixture)
    task = found.tasks()[0] if isinstance(found, tasks.Mixture) else found
    vocabulary = task.output_features["targets"].vocabulary
    vocabulary.info()  # opens its files
    return vocabulary


def _describe_folder(folder: HuggingFaceFolder) -> Description:
    if not isinstance(folder.config, LanguageModelConfig):
        raise ValueError(
            f"{folder.folder} holds a {folder.family.architecture}, which has no logits over a vocabulary; start a run "
            f"from it (WarmStart.path)."
        )
    generation = read_json(folder.folder / GENERATION_CONFIG)
    fields = {**folder.fields, **{name: value for name, value in generation.items() if value is not None}}
    tokenizer, problem = _tried(lambda: read_tokenizer(folder.folder))
    architecture, start, end, said = folder.config.architecture, None, None, None
    if architecture is Architecture.ENCODER_DECODER:
        start = fields.get("decoder_start_token_id", fields.get("pad_token_id", 0))
        end = None if tokenizer is None else tokenizer.end_id
    elif tokenizer is not None and architecture is not Architecture.ENCODER:
        start, end = tokenizer.start_id, tokenizer.end_id
    if architecture is not Architecture.ENCODER_DECODER:  # T5's n_positions is of no consequence
        lengths = (folder.fields.get(name) for name in (folder.family.length_field, "n_positions"))
        said = next(filter(None, lengths), None)
    ends = fields.get("eos_token_id")
    if ends is None and tokenizer is not None:
        ends = tokenizer.vocabulary.info().eos_id
    return Description(
        config=folder.config,
        vocabulary=None if tokenizer is None else tokenizer.vocabulary,
        no_vocabulary=problem,
        start_id=start,
        input_end_id=end,
        eos_ids=tuple(ends) if isinstance(ends, list) else (() if ends is None else (ends,)),
        context_length=_learned(folder.config) or said,
    )


def _describe_t5(checkpoint: T5Checkpoint) -> Description:
    """Of a model of T5's own trainers: their conventions, since the checkpoint says nothing."""
    return Description(
        config=checkpoint.config,
        vocabulary=None,
        no_vocabulary=f"{checkpoint.folder} is a checkpoint of T5's trainers, which hold no vocabulary.",
        start_id=0,
        input_end_id=1,
        eos_ids=(1,),
        context_length=None,
    )


def _learned(config: LanguageModelConfig) -> int | None:
    """Tokens of the longest row that learned positions allow; None where a stack of the model has none."""
    lengths = [config.learned_length(stack) for stack in config.stacks]
    return None if None in lengths else max(lengths)


def _tried(make: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what is made, None), or (None, why not)."""
    try:
        return make(), None
    except (ValueError, OSError, ImportError) as error:
        return None, str(error)
