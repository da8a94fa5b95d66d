"""The model card of an exported model: what it is, how it is used, what it was trained on, how well it did."""

import dataclasses
from collections.abc import Mapping

from jaxlm.architecture import Architecture
from jaxlm.models.config import LanguageModelConfig

FILE_NAME = "README.md"
_TASKS = {
    Architecture.CAUSAL_DECODER: "text-generation",
    Architecture.PREFIX_DECODER: "text-generation",
    Architecture.ENCODER: "fill-mask",
    Architecture.ENCODER_DECODER: "text2text-generation",
}
_CLASSES = {
    Architecture.CAUSAL_DECODER: "AutoModelForCausalLM",
    Architecture.PREFIX_DECODER: "AutoModelForCausalLM",
    Architecture.ENCODER: "AutoModelForMaskedLM",
    Architecture.ENCODER_DECODER: "AutoModelForSeq2SeqLM",
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
      name: of the model.
      config: what it is.
      parameters: how many numbers it has.
      class_name: transformers' class, or that of the modelling file beside it.
      own_code: whether the folder has a modelling file of its own.
      origin: where the parameters come from, one sentence.
      text: how a text becomes ids, sentences; () if there is no tokenizer.
      metrics: values at the checkpoint's step.
      resolved: the run's resolved configuration, "" if there was no run.
    """

    name: str
    config: LanguageModelConfig
    parameters: int
    class_name: str
    own_code: bool
    origin: str
    text: tuple[str, ...]
    metrics: Mapping[str, float]
    resolved: str

    def __str__(self) -> str:
        """The card as Markdown with its YAML header."""
        architecture = self.config.architecture
        task, auto = _TASKS[architecture], _CLASSES[architecture]
        depths = ", ".join(f"{stack.depth} {name} layers" for name, stack in self.config.stacks.items())
        trust = ", trust_remote_code=True" if self.own_code else ""
        facts = {
            "architecture": architecture.value.replace("_", "-"),
            "parameters": f"{self.parameters:,}",
            "layers": depths,
            "width": f"{self.config.width:,}",
            "vocabulary": f"{self.config.vocab_size:,}",
            "class": f"`{self.class_name}`" + (", in `modeling_jaxlm.py` beside this card" if self.own_code else ""),
        }
        parts = [
            f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- jaxlm\n---\n",
            f"# {self.name}\n",
            f"{self.origin}\n",
            "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in facts.items()),
            "## Use\n",
            f"```python\nfrom transformers import AutoTokenizer, {auto}\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("<this folder>"{trust})\n'
            f'model = {auto}.from_pretrained("<this folder>"{trust})\n```\n',
            "\n".join(self.text) + "\n" if self.text else "There is no tokenizer in this folder.\n",
        ]
        if self.metrics:
            rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in sorted(self.metrics.items()))
            parts += ["## Results\n", f"| metric | value |\n|---|---|\n{rows}"]
        if self.resolved:
            parts += [
                "## Configuration\n",
                "What the run was, data included:\n",
                f"```\n{self.resolved.rstrip()}\n```\n",
            ]
        return "\n".join(parts)
