"""The families there are."""

from collections.abc import Mapping
from typing import Any

from jaxlm.checkpoints.huggingface import (
    bert,
    deberta,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    mamba,
    mixture_of_experts,
    modernbert,
    olmo,
    openelm,
    own,
    t5,
    t5gemma,
)
from jaxlm.checkpoints.huggingface.family import FOREIGN, Family
from jaxlm.models.config import ModelConfig

FAMILIES: tuple[Family, ...] = (
    llama.Llama(),
    llama.Mistral(),
    llama.Qwen2(),
    llama.Qwen3(),
    gemma.Gemma(),
    gemma.Gemma2(),
    gemma.Gemma3(),
    olmo.Olmo2(),
    mixture_of_experts.Mixtral(),
    mixture_of_experts.Qwen2Moe(),
    mixture_of_experts.Qwen3Moe(),
    openelm.OpenElm(),
    gpt2.GPT2(),
    gpt_neox.GPTNeoX(),
    mamba.Mamba(),
    mamba.Mamba2(),
    t5.T5(),
    t5.MT5(),
    t5gemma.T5Gemma(),
    bert.Bert(),
    bert.Roberta(),
    bert.ElectraGenerator(),
    bert.ElectraDiscriminator(),
    deberta.DebertaV2(),
    modernbert.ModernBert(),
    own.OwnDecoder(),
    own.OwnEncoder(),
    own.OwnEncoderDecoder(),
)
"""In the order in which a model is offered to them for export."""


def by_config(values: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
      ValueError: no adapter for it.
    """
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    of_kind = [family for family in FAMILIES if family.model_type == kind]
    asked = [family for family in of_kind if {family.architecture, *family.formerly} & set(architectures)]
    found = asked if architectures else of_kind
    if not found:
        known = ", ".join(sorted(family.architecture for family in FAMILIES))
        raise ValueError(f"There is no adapter for {architectures or kind}; there are {known}.")
    return found[0]


def by_model(config: ModelConfig, name: str | None = None) -> Family:
    """The first family that can express a model.

    Args:
      config: the model.
      name: of a `model_type`, to ask that one alone.

    Raises:
      ValueError: none can, or not the one named; the message has the nearest family's reasons.
    """
    asked = [family for family in FAMILIES if name in (None, family.model_type)]
    reasons = {family: family.refusals(config) for family in asked}
    for family, refusals in reasons.items():
        if not refusals:
            return family
    if not reasons:
        raise ValueError(f"There is no family {name!r}; there are {sorted({f.model_type for f in FAMILIES})}.")
    # Ours computes whatever it covers: what it does not is the better reason, unless a class was asked for.
    ours = [family for family in reasons if family.code and config.architecture in family.computes]
    nearest = min(ours or reasons, key=lambda family: (FOREIGN in reasons[family], len(reasons[family])))
    raise ValueError(
        f"No Hugging Face class computes this model; the nearest is {nearest.architecture}, but "
        f"{'; '.join(reasons[nearest][:3])}."
    )
