"""Models: typed configurations, and the modules built from them."""

import jax

from jaxlm.models.config import (
    ComputeType,
    EmbeddingSharing,
    HeadConfig,
    LanguageModelConfig,
    ModelConfig,
    ReplacedTokenDetectorConfig,
)
from jaxlm.models.language_model import LanguageModel, unrolled
from jaxlm.models.openelm import layerwise_scaling
from jaxlm.models.replaced_token_detector import ReplacedTokenDetector
from jaxlm.parallel.stages import ONE_STAGE, Stages


def build_model(
    config: ModelConfig, *, key: jax.Array, stages: Stages = ONE_STAGE
) -> LanguageModel | ReplacedTokenDetector:
    """The module that `config` describes, with parameters drawn from `key`, its layers dealt to pipeline `stages`."""
    if isinstance(config, ReplacedTokenDetectorConfig):
        return ReplacedTokenDetector(config, key=key, stages=stages)
    return LanguageModel(config, key=key, stages=stages)


__all__ = [
    "ComputeType",
    "EmbeddingSharing",
    "HeadConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "ModelConfig",
    "ReplacedTokenDetector",
    "ReplacedTokenDetectorConfig",
    "build_model",
    "layerwise_scaling",
    "unrolled",
]
