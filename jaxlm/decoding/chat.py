"""A conversation with a model: in its tokenizer's chat template where it has one, else as one text that goes on."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np

from jaxlm.decoding.generation import Generator

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}, as chat templates take them."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes a text, as `transformers` writes it beside a tokenizer.

    Attributes:
      source: Jinja; it comes with the model, and is run in Jinja's sandbox.
      names: what it may use besides the messages: bos_token, eos_token, ...
    """

    source: str
    names: dict[str, str]

    @classmethod
    def of(cls, folder: pathlib.Path) -> "ChatTemplate | None":
        """Of a Hugging Face folder: chat_template.jinja, or as tokenizer_config.json says; None if it has none."""
        said: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").is_file():
            said = json.loads((folder / "tokenizer_config.json").read_text())
        source = said.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        if (folder / "chat_template.jinja").is_file():
            source = (folder / "chat_template.jinja").read_text()
        if source is None:
            return None
        tokens = {name: value for name, value in said.items() if name.endswith("_token") and value is not None}
        return cls(source, {name: v["content"] if isinstance(v, dict) else v for name, v in tokens.items()})

    def text(self, messages: list[Message]) -> str:
        """The conversation, up to where the model is to answer.

        Raises:
          ValueError: the template is no template, or refuses these messages.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # What `transformers` gives templates besides.
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            template = environment.from_string(self.source)
            return template.render(messages=messages, add_generation_prompt=True, **self.names)
        except jinja2.TemplateError as error:
            raise ValueError(f"The model's chat template cannot be used: {error}.") from error


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


class Chat:
    """A conversation that is being had.

    Attributes:
      messages: what was said so far.
    """

    def __init__(self, generator: Generator, template: ChatTemplate | None, *, seed: int = 0):
        """Begins one.

        Args:
          generator: writes the answers; its method draws tokens.
          template: None: no roles, the model goes on with all that was said.
          seed: of the draws; each answer has a seed of its own.
        """
        self.messages: list[Message] = []
        self._generator, self._template, self._seed = generator, template, seed

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, as it is written. What cannot be answered is not kept.

        Raises:
          ValueError: the conversation is longer than the model's context, or the template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, answer = self._prompt(messages), ""
        for _, part, _ in self._generator.stream([prompt], seed=self._seed + len(self.messages)):
            answer += part
            yield part
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _prompt(self, messages: list[Message]) -> np.ndarray:
        vocabulary = self._generator.vocabulary
        if self._template is None:
            return vocabulary.encode("".join(message["content"] for message in messages))
        ids = vocabulary.encode_with_specials(self._template.text(messages))
        # Templates spell out the token that the model's inputs begin with anyway.
        start = self._generator.model.start_id
        return ids[1:] if start is not None and len(ids) and ids[0] == start else ids
