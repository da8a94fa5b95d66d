"""Who is evaluated: a trained model, made ready for questions when the first one is asked."""

import dataclasses
import functools

from jaxlm.checkpoints.pretrained import Pretrained
from jaxlm.evaluation.scoring import ScoringConfig
from jaxlm.evaluation.text_model import TextFormat, TextModel
from jaxlm.parallel.parallelism import Parallelism


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A trained model as tasks see it.

    Attributes:
      pretrained: the model; tasks that are learnt begin with it.
      format, scoring, context_length: of questions, see `TextModel`.
      parallel: the mesh that it lies on; None is one device.
    """

    pretrained: Pretrained
    format: TextFormat = TextFormat()
    scoring: ScoringConfig = ScoringConfig()
    context_length: int | None = None
    parallel: Parallelism | None = None

    @functools.cached_property
    def text_model(self) -> TextModel:
        """The model as one that answers.

        Raises:
          ValueError: it has no vocabulary, or cannot be scored.
        """
        return TextModel(
            self.pretrained,
            format=self.format,
            scoring=self.scoring,
            context_length=self.context_length,
            parallel=self.parallel,
        )
