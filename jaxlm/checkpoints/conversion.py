"""Conversion of trained models: into a Hugging Face folder, and into a checkpoint of ours; tensor by tensor."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import naming, pending, stored
from jaxlm.checkpoints.huggingface import card, families
from jaxlm.checkpoints.huggingface.family import Family, Json
from jaxlm.checkpoints.huggingface.files import new_folder, write_json
from jaxlm.checkpoints.huggingface.folder import GENERATION_CONFIG, export
from jaxlm.checkpoints.huggingface.tensors import Shape
from jaxlm.checkpoints.huggingface.tokenizer import Tokenizer, write_tokenizer
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager, Writing
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.pretrained import Description, ImportedModel, describe
from jaxlm.checkpoints.schedule_free import evaluated
from jaxlm.checkpoints.sources import Source
from jaxlm.configuration import resolved_text
from jaxlm.layers.positions import Rope
from jaxlm.models.config import LanguageModelConfig


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of a source: their shapes, and each of them when it is asked for.

    Attributes:
      shapes: {path: shape}, paths written with slashes, layers one by one.
      value: path -> the parameter.
    """

    shapes: Mapping[str, Shape]
    value: Callable[[str], np.ndarray]

    @property
    def count(self) -> int:
        """How many numbers they are."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def parameters_of(source: Source, weights: str = "params") -> Parameters:
    """The parameters of a run's checkpoint or a folder; nothing is read yet.

    Args:
      source: where they are.
      weights: "params" (of a schedule-free run its average of iterates), or "ema_params" for their moving average.

    Raises:
      CheckpointError: it has no such weights.
    """
    source = evaluated(source)
    leaves = {path: leaf for path, leaf in source.leaves.items() if path[0] == weights}
    if not leaves:
        raise CheckpointError(f"{source.folder} holds no {weights}; leave out --averaged.")
    shapes = {naming.show(path[1:]): leaf.shape for path, leaf in leaves.items()}
    return Parameters(shapes, lambda name: source.array((weights, *name.split("/"))))


def to_hugging_face(
    source: Source,
    out: pathlib.Path,
    *,
    weights: str = "params",
    family: str | None = None,
    dtype: np.dtype | None = None,
    shard_bytes: int = 5 << 30,
    name: str | None = None,
) -> Family:
    """Writes a folder with model, tokenizer, generation settings and card; what the model is for, it says itself.

    Args:
      source: a run's checkpoint (or a Hugging Face folder, to write it in another type or class).
      out: must not exist; it appears when everything is written.
      weights: "params", or "ema_params" for their average.
      family: a `model_type`; None takes the first that can express the model.
      dtype, shard_bytes: see `folder.export`.
      name: of the model, for its card; None is the folder's.

    Returns:
      the family it is of.

    Raises:
      ValueError: no family can express the model, what is written would not be read back, or the vocabulary has no
        tokenizer.json.
      FileExistsError: `out` exists.
    """
    about, parameters = describe(source), parameters_of(source, weights)
    adapter = families.by_model(about.config, family)
    ids = special_ids(about)
    adapter.check_ids(about.config, ids)
    if about.context_length and adapter.length_field not in adapter.write(about.config) and _rotates(about.config):
        ids[adapter.length_field] = about.context_length

    def beside(folder: pathlib.Path) -> None:
        if about.config.architecture is not Architecture.ENCODER:
            write_json(folder / GENERATION_CONFIG, generation_config(about) | adapter.generation)
        write_tokenizer_beside(folder, about)
        (folder / card.FILE_NAME).write_text(str(_card(source, about, parameters, adapter, name or out.name)))

    return export(
        out,
        about.config,
        parameters.shapes,
        parameters.value,
        family=adapter.model_type,
        dtype=dtype,
        special_ids=ids,
        shard_bytes=shard_bytes,
        beside=beside,
    )


def to_jaxlm(source: Source, out: pathlib.Path, *, origin: str | None = None) -> None:
    """Writes a folder like a run's, with one checkpoint, step 0: `WarmStart.path`, `load` and `generate` take it.

    Args:
      source: what to convert.
      out: must not exist; it appears when everything is written.
      origin: where the model is from, for people; None is the source's folder.

    Raises:
      ValueError: the source is of no known kind.
      FileExistsError: `out` exists.
    """
    about, source = describe(source), evaluated(source)
    imported = ImportedModel(
        model=about.config,
        origin=origin or str(source.folder),
        start_id=about.start_id,
        input_end_id=about.input_end_id,
        eos_ids=about.eos_ids,
        context_length=about.context_length,
    )
    with new_folder(out) as folder:
        write_tokenizer_beside(folder, about)
        params = {path: _pending(source, path) for path in source.leaves if path[0] == "params"}
        config = CheckpointConfig(writing=Writing.SYNCHRONOUS)
        with CheckpointManager(folder / "checkpoints", config, handler=pending.handler()) as manager:
            manager.save(0, naming.nest(params), config=resolved_text(imported))


def _pending(source: Source, path: naming.Path) -> pending.Pending:
    leaf = source.leaves[path]
    return pending.Pending(leaf.shape, leaf.dtype, lambda: source.array(path))


def write_tokenizer_beside(folder: pathlib.Path, about: Description) -> None:
    """Writes a model's tokenizer into its folder, if there is one."""
    if about.vocabulary is not None:
        tokenizer = Tokenizer(about.vocabulary, _text_start(about), about.input_end_id)
        decoder = not about.config.architecture.has_encoder_features
        write_tokenizer(folder, tokenizer, decoder=decoder, context_length=about.context_length)


def special_ids(about: Description) -> Json:
    """The ids that a `config.json` names.

    A decoder of ours has seen pad_id at the beginning of every text, so that is its `bos`, and not its padding too:
    transformers hides what it takes for padding.
    """
    ids: Json = {"eos_token_id": _eos(about), "pad_token_id": None, "bos_token_id": None}
    if about.config.architecture is Architecture.ENCODER_DECODER:
        ids["decoder_start_token_id"] = about.start_id
    else:
        ids["bos_token_id"] = about.start_id
    if about.config.architecture.has_encoder_features and about.vocabulary is not None:
        ids["pad_token_id"] = about.vocabulary.info().pad_id
    return {name: value for name, value in ids.items() if value is not None}


def generation_config(about: Description) -> Json:
    """`generation_config.json`: where a text begins and ends, and what fills a row after its end."""
    ids = special_ids(about)
    if "pad_token_id" not in ids and about.eos_ids:
        ids["pad_token_id"] = about.eos_ids[0]
    return ids


def _rotates(config: LanguageModelConfig) -> bool:
    blocks = [block for stack in config.stacks.values() for block in stack.all_blocks]
    positions = [getattr(getattr(block, "attention", None), "position", None) for block in blocks]
    return any(isinstance(position, Rope) for position in positions)


def _eos(about: Description) -> int | list[int] | None:
    return about.eos_ids[0] if len(about.eos_ids) == 1 else list(about.eos_ids) or None


def _text_start(about: Description) -> int | None:
    """What stands before every text that the tokenizer makes ids of."""
    return None if about.config.architecture.has_encoder_features else about.start_id


def _card(source: Source, about: Description, parameters: Parameters, adapter: Family, name: str) -> card.Card:
    trained = isinstance(source, stored.StoredCheckpoint)
    return card.Card(
        name=name,
        config=about.config,
        parameters=parameters.count,
        class_name=adapter.architecture,
        own_code=adapter.code is not None,
        origin=f"Trained with jaxlm for {source.step:,} steps." if trained else "Converted with jaxlm.",
        text=_about_text(about),
        metrics=source.metrics if trained else {},
        resolved=source.config if trained else "",
    )


def _about_text(about: Description) -> tuple[str, ...]:
    if about.vocabulary is None:
        return ()
    info, architecture = about.vocabulary.info(), about.config.architecture
    sentences = [f"The tokenizer has {info.size:,} ids."]
    if architecture is Architecture.ENCODER_DECODER:
        sentences.append(f"The decoder starts with id {about.start_id}.")
    elif about.start_id is not None:
        sentences.append(
            f"Every text began with id {about.start_id} in training; the tokenizer puts it there (`bos_token`), and "
            f"ids made otherwise must begin with it too."
        )
    if about.input_end_id is not None:
        sentences.append(f"Inputs end with id {about.input_end_id}, which the tokenizer adds.")
    if about.eos_ids:
        sentences.append(f"Texts end with id {', '.join(map(str, about.eos_ids))}.")
    if architecture is Architecture.PREFIX_DECODER:
        sentences.append(
            "A prompt is seen in both directions: `generate` arranges that, and `forward` takes `prefix_length`, the "
            "number of tokens of a row that see each other."
        )
    return tuple(sentences)
