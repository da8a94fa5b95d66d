"""The teacher of a run that distils: a trained model whose parameters the step reads and leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import pretrained
from jaxlm.checkpoints.manifest import Verify
from jaxlm.checkpoints.sources import open_source
from jaxlm.data.vocabularies import Vocabulary
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.models import ModelConfig, build_model
from jaxlm.models.config import LanguageModelConfig
from jaxlm.objectives.base import Distillation, Objective
from jaxlm.objectives.distillation import refuses_teacher
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.training.parameters import ModelDefinition, Tree, flatten, split_model, unflatten
from jaxlm.training.state import abstract_model


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A trained model, known but for its parameters.

    Attributes:
      config: the model, its layers unrolled.
      definition: its structure.
      abstract: shapes, types and shardings of its parameters.
      start_id: the id that a text begins with in its input.
      source: the folder, for people.
      vocabulary: of its text, or None where none is known.
    """

    config: LanguageModelConfig
    definition: ModelDefinition
    abstract: Tree
    start_id: int
    source: str
    vocabulary: Vocabulary | None

    def params(self, distillation: Distillation, parallel: Parallelism) -> Tree:
        """Its parameters, read to where they belong on the mesh.

        Raises:
          CheckpointError: they cannot be read.
        """
        found = pretrained.load(distillation.teacher, step=distillation.step, parallel=parallel)
        return split_model(found.model)[1]


def find_teacher(distillation: Distillation, parallel: Parallelism) -> Teacher:
    """Looks at a teacher; reads no parameters.

    Raises:
      CheckpointError: there is no such model.
      ValueError: it is of no known kind, or writes no text.
    """
    source = open_source(distillation.teacher, distillation.step, Verify.SIZES)
    about = pretrained.describe(source)
    config = pretrained.unrolled(about.config)
    definition, shapes, infos = abstract_model(lambda key: build_model(config, key=key))
    kinds = flatten(infos)

    def placed(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        info = kinds[path]
        dtype = jnp.dtype(info.used_as or leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=parallel.sharding(info.axes, leaf.shape))

    abstract = unflatten({path: placed(path, leaf) for path, leaf in flatten(shapes).items()})
    start = about.start_id
    if start is None:  # its inputs begin with the text; what ends a text then stands between texts
        start = about.eos_ids[0] if about.eos_ids else 0
    return Teacher(config, definition, abstract, start, str(source.folder), about.vocabulary)


def check_teacher(
    teacher: Teacher,
    student: ModelConfig,
    objective: Objective,
    parallel: Parallelism,
    *,
    vocabulary: str | None,
    row_length: int,
) -> None:
    """Whether a teacher can teach.

    Args:
      student: the model that is trained.
      objective: what it is trained on.
      parallel: how both lie on devices.
      vocabulary: the fingerprint of the student's, or None where it is not known.
      row_length: tokens that the teacher reads, see `row_length_of`.

    Raises:
      ValueError: it cannot; the message says why and what could.
    """
    if type(objective).loss_sums is not Objective.loss_sums:
        raise ValueError(
            f"Distillation changes the cross-entropy of the labels, but {objective.name} has the loss terms "
            f"{sorted(objective.coefficients)}; use an objective of cross-entropy alone, or set "
            f"LossConfig.distillation to None."
        )
    if refusal := refuses_teacher(student.architecture, teacher.config.architecture):
        raise ValueError(f"{refusal} ({teacher.source})")
    if teacher.config.vocab_size != student.vocab_size:
        raise ValueError(
            f"The teacher {teacher.source} has {teacher.config.vocab_size} ids and the student {student.vocab_size}, "
            f"but they must have the same; set VOCAB_SIZE to {teacher.config.vocab_size}."
        )
    if vocabulary is not None and teacher.vocabulary is not None and teacher.vocabulary.fingerprint() != vocabulary:
        raise ValueError(
            f"The teacher {teacher.source} was trained with another vocabulary than this run's, so that its ids mean "
            f"other text; give the run the teacher's vocabulary."
        )
    architectures = student.architecture, teacher.config.architecture
    joins = architectures[0] is Architecture.ENCODER_DECODER and architectures[1] is not Architecture.ENCODER_DECODER
    if joins and (layer := _by_columns(teacher.config)):
        raise ValueError(
            f"The teacher {teacher.source} has a layer of {layer}, which cannot read an encoder-decoder's inputs and "
            f"targets as one text, since they are apart in a row; use a teacher whose layers are all AttentionConfig, "
            f"or train a student that is a {teacher.config.architecture.value} too."
        )
    learned = min(filter(None, map(teacher.config.learned_length, teacher.config.stacks)), default=row_length)
    if row_length > learned:
        raise ValueError(
            f"The teacher {teacher.source} has learned positions for {learned} tokens, but is to read {row_length}; "
            f"shorten TASK_FEATURE_LENGTHS."
        )
    if parallel.spec(("length",)):
        raise ValueError(
            "Distillation compares whole rows and cannot split them over devices; set MeshConfig.sequence to 1."
        )


def _by_columns(model: LanguageModelConfig) -> str | None:
    """The configuration of a layer that goes by the columns of a row, whatever the positions in its texts; or None."""
    blocks = [block for stack in model.stacks.values() for block in stack.all_blocks]
    for block in (*blocks, *([model.future_block] if model.future_block else [])):
        if block.running_state is not None:
            return block.running_state
        if type(block) is not BlockConfig:
            return type(block).__name__
        if type(block.attention) is not AttentionConfig:
            return type(block.attention).__name__
    return None
