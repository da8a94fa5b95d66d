"""What an objective is: `corrupt` (numpy, on the host) and `loss` (jax, inside the jitted step).

This module and the `corrupt` half of every objective import no jax: data workers unpickle an objective
and run it without paying for an accelerator runtime. The loss half imports jax inside its methods.

To add an objective: one file here with a frozen dataclass that derives from `Objective`, one gin file in
`gin_configs/objectives/`, one test in `tests/objectives/`.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.piecewise import varies

if TYPE_CHECKING:
    import jax


class Layout(enum.Enum):
    """How targets lie beside inputs.

    SEQUENCE: targets are a text of their own that follows the inputs (a decoder writes them).
    ALIGNED: one target at each input position (an encoder labels them); weights say which count.
    """

    SEQUENCE = "sequence"
    ALIGNED = "aligned"


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyInfo:
    """What an objective may know of a vocabulary. Built by `jaxlm.data.vocabularies.Vocabulary.info`.

    Attributes:
      size: number of ids; all ids are in [0, size).
      pad_id: fills rows and starts the decoder's input (T5 and seqio convention: 0).
      eos_id: ends a document or a target text.
      unk_id: unknown piece, or None where every text has pieces (bytes).
      bos_id: starts a text, or None where the vocabulary has none.
      mask_id: BERT's [MASK], or None.
      sentinel_ids: T5's <extra_id_0>, <extra_id_1>, ... in the order they are used. T5 counts down from
        the end of the vocabulary: sentinel 0 is the highest id.
      named_ids: ids of further special tokens by name: the UL2 modes "[R]", "[S]", "[X]" (under these names),
        "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<sep>", "<eom>", "[CLS]", "[SEP]".
      word_start: [size] bool, True where a piece begins a word (for whole-word masking), or None where the
        vocabulary cannot tell.
    """

    size: int
    pad_id: int = 0
    eos_id: int = 1
    unk_id: int | None = None
    bos_id: int | None = None
    mask_id: int | None = None
    sentinel_ids: tuple[int, ...] = ()
    named_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    word_start: np.ndarray | None = None

    # Cached: data workers ask for these once an example.
    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        """int32 [n], sorted: every id that stands for no text and is never masked or substituted."""
        ids = {self.pad_id, self.eos_id, *self.sentinel_ids, *self.named_ids.values()}
        ids |= {i for i in (self.bos_id, self.mask_id, self.unk_id) if i is not None}
        return np.array(sorted(ids), np.int32)

    @functools.cached_property
    def is_special(self) -> np.ndarray:
        """[size] bool: True for `special_ids`."""
        table = np.zeros(self.size, np.bool_)
        table[self.special_ids] = True
        return table

    @functools.cached_property
    def ordinary_ids(self) -> np.ndarray:
        """int32 [size - n]: the ids of text, from which random substitutes are drawn."""
        return np.flatnonzero(~self.is_special).astype(np.int32)

    @functools.cached_property
    def sentinels(self) -> np.ndarray:
        """int32: `sentinel_ids` as an array."""
        return np.array(self.sentinel_ids, np.int32)

    def named(self, name: str, wanted_by: str) -> int:
        """The id of a named special token, or an error that says how to add it."""
        if name not in self.named_ids:
            raise ValueError(
                f"{wanted_by} needs the special token {name!r}, which this vocabulary lacks; "
                f"add it with `named_tokens` of the vocabulary (it has {sorted(self.named_ids)})."
            )
        return self.named_ids[name]


@dataclasses.dataclass
class Example:
    """One training example, before an architecture lays it out.

    Attributes:
      inputs: int32 [N], the visible text; may be empty. For aligned objectives, the corrupted text.
      targets: int32 [M], the text to predict. For aligned objectives M == N.
      weights: float32 [M], weight of each target in the loss; None means 1 everywhere.
      segments: int32 [M], only where one example holds several texts that must not see each other (rows of
        concatenated documents with document masks, or two prefix LM rows that share one row of an
        encoder-decoder); counts from 1. None means one text.
      input_segments: int32 [N], the same for `inputs`; given only where a sequence objective gives `segments`
        and has inputs. Positions restart in each segment.
      dataset: index of the data set in the mixture, for per-data-set accounting.
      objective: index of the objective within a mixture of objectives, for accounting.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None
    segments: np.ndarray | None = None
    input_segments: np.ndarray | None = None
    dataset: int = 0
    objective: int = 0


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A trained model's distribution as the target, beside the labels or in their place (arXiv 1503.02531).

    The loss of a token is (1 - share) * cross-entropy of the label + share * temperature^2 * cross-entropy of the
    teacher's distribution, both softmaxes of the latter at `temperature`. With the defaults it is that of Well-Read
    Students (arXiv 1908.08962, section 3.1). The square keeps the size of gradients (arXiv 1503.02531, section 2.1).

    Attributes:
      teacher: a run's folder or another that `jaxlm.checkpoints.pretrained` opens; of the student's vocabulary. A
        decoder can teach an encoder-decoder: it reads inputs and targets as one text (T5Gemma, arXiv 2504.06225).
      temperature: divides the logits of both.
      share: of the teacher's distribution in the loss, 0 to 1.
      step: of the teacher's checkpoint; None is its newest.
    """

    teacher: str
    temperature: float = 1.0
    share: float = 1.0
    step: int | None = None

    def __post_init__(self):
        if not 0.0 <= self.share <= 1.0 or self.temperature <= 0:
            raise ValueError(
                f"Distillation needs a share in 0..1 and a temperature above 0, got {self.share}, {self.temperature}."
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How cross-entropy is taken; shared by all objectives.

    Attributes:
      z_loss: coefficient of log(Z)^2, which keeps logits near 0 (1e-4 in T5X and PaLM, arXiv 2204.02311, 5).
      label_smoothing: share of the target probability spread over the vocabulary.
      token_chunk: compute logits, loss and their gradients for this many tokens of each device at a time, so that the
        [tokens, vocabulary] logits never exist whole; 0 chooses (`pallas_kernels.cross_entropy.chunk_tokens`).
      recompute_logits: compute logits a part of the vocabulary at a time, and again in the backward pass: a third more
        work for the least memory, for large vocabularies (`token_chunk` is then of no use). TPU kernels always do.
      distillation: a teacher; None learns from labels alone.
      num_datasets: also sum the loss per data set, for this many (`len(loader.dataset_names)`); 0 or 1 does not.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    token_chunk: int = 0
    recompute_logits: bool = False
    num_datasets: int = 0
    distillation: Distillation | None = None


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """How text becomes a prediction problem, and how the prediction is scored."""

    # Short name used in metrics and error messages.
    name: ClassVar[str]
    layout: ClassVar[Layout] = Layout.SEQUENCE
    # Whether `corrupt` accepts a row of several documents with "segments" that keep them apart.
    takes_segments: ClassVar[bool] = False
    # Whether inputs end with EOS, so that a prompt must too.
    ends_inputs: ClassVar[bool] = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Names that `Example.objective` indexes; more than one only for mixtures of objectives."""
        return (self.name,)

    @property
    def drawn(self) -> tuple[Objective, ...]:
        """The objectives that `corrupt` draws among: this one; of a mixture, the members that ever have a weight."""
        return (self,)

    @property
    def scheduled(self) -> bool:
        """Whether `corrupt` depends on the step. Override it where that is not by a `Piecewise` among the fields."""
        return varies(self)

    def refuses(self, architecture: Architecture) -> str | None:
        """None if this objective can train `architecture`, else one sentence why not and what could."""
        if self.layout is Layout.ALIGNED and architecture is not Architecture.ENCODER:
            return (
                f"{self.name} labels each input position, which needs the encoder architecture, not "
                f"{architecture.value}; use span_corruption to train a decoder by denoising."
            )
        if self.layout is Layout.SEQUENCE and architecture is Architecture.ENCODER:
            return (
                f"{self.name} writes its targets as a text of their own, which an encoder cannot; use masked_lm, "
                f"or a decoder or encoder_decoder architecture."
            )
        return None

    def refuses_model(self, model: Any) -> str | None:
        """As `refuses`, for what a model is made of beyond its architecture.

        Args:
          model: a model's configuration, see `jaxlm.models.config`.
        """
        if hasattr(model, "discriminator"):
            return (
                f"{self.name} trains one language model, but this model is a replaced-token detector; use "
                f"replaced_token_detection, or a LanguageModelConfig."
            )
        return None

    @abc.abstractmethod
    def raw_length(self, lengths: Mapping[str, int], architecture: Architecture) -> int:
        """Number of raw tokens of text whose corruption fills, and never exceeds, a row of `lengths`.

        Args:
          lengths: row lengths in tokens, seqio's task feature lengths: {"inputs": N, "targets": M}. A decoder's
            row has inputs + targets tokens. Language modelling and aligned objectives need only "targets".

        Raises:
          ValueError: the objective cannot fill such a row; the message names the smallest that it can.
        """

    def fit(self, lengths: Mapping[str, int], architecture: Architecture) -> Objective:
        """This objective for rows of `lengths`; the loader calls it once and uses the result.

        Most objectives return themselves. A mixture returns a copy that reads text for its longest member and
        cuts it for the others.
        """
        del lengths, architecture
        return self

    @abc.abstractmethod
    def corrupt(
        self, example: Mapping[str, np.ndarray], vocabulary: VocabularyInfo, rng: np.random.Generator, *, step: int = 0
    ) -> Example:
        """Turns tokenised text into an `Example`.

        Args:
          example: {"targets": int32 [N]} for text, N at most `raw_length`; supervised pairs also have "inputs".
            Objectives with `takes_segments` also accept "segments", int32 [N], which the `Example` carries on, and
            with them "columns", int64 [], the length of a row that inputs and targets share; without it each has
            what the whole text without segments would take.
          vocabulary: special ids.
          rng: derived by the caller from (seed, global example index), never from a host's stream.
          step: training step at which the example will be used, for parameters that change over training.
        """

    def restore(self, example: Example, vocabulary: VocabularyInfo) -> np.ndarray:
        """The text `corrupt` was given, int32 [N], for objectives that claim to be invertible."""
        raise NotImplementedError(f"{self.name} is not invertible.")

    def loss_weights(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Sum of the weights of each loss term over `batch`: the terms' denominators.

        They depend on the batch only, so that gradient accumulation can divide each microbatch's sums by
        the weights of the whole batch and equal the full batch exactly.
        """
        from jaxlm.objectives import losses

        return losses.token_weights(batch)

    def loss_sums(
        self, model: Any, batch: Mapping[str, jax.Array], *, context: Any, config: LossConfig
    ) -> tuple[dict[str, jax.Array], dict[str, tuple[jax.Array, jax.Array]], Any]:
        """Weighted sums of each loss term, metrics as (sum, weight) pairs, and the side values of the model's layers.

        The step minimises sum over terms of coefficient * sum / weight, with weights from `loss_weights`, and adds the
        losses among the side values.

        Args:
          model: a `jaxlm.models.LanguageModel` (or what the objective asks for).
          batch: features by seqio's names, see docs/architecture.md.
          context: `jaxlm.layers.context.Context`, holding the dropout key and the sharded operations.
          config: z-loss, label smoothing, chunks.

        Returns:
          ({term: scalar f32}, {metric: (sum, weight)}, `jaxlm.layers.side_values.SideValues`); terms are the keys of
          `loss_weights`; side values come with the hidden states and are handed on.
        """
        from jaxlm.objectives import losses

        return losses.cross_entropy_sums(model, batch, context=context, config=config, num_objectives=len(self.parts))

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Coefficient of each loss term in the total."""
        return {"cross_entropy": 1.0}
