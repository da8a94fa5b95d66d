"""From a row of data to a question: Jinja templates of our own, and promptsource's as they are.

    Prompt(context="{{ query }}", choices="endings", gold="label")
    PromptsourceTemplates("templates", "super_glue/copa")

Templates are data: they run in Jinja's sandbox, and whatever randomness they have is a function of the row alone.
"""

import abc
import collections
import dataclasses
import functools
import pathlib
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, override

import jinja2
import jinja2.sandbox

from jaxlm.data.fingerprint import fingerprint

Row = Mapping[str, Any]


class TemplateError(ValueError):
    """A template does not render on a row, or renders what no measure can use."""


def row_name(number: int, row: Row) -> str:
    """What messages call a row: its number, and its own id where it has one."""
    own = next((row[name] for name in ("id", "idx", "ind") if isinstance(row.get(name), str | int)), None)
    return f"row {number}" if own is None else f"row {number} (id {own!r:.40})"


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked about one row.

    Attributes:
      contexts: what stands before each choice: one text for all, or one a choice.
      choices: texts to choose from; () where the answer is free.
      gold: index of the right choice; None where the row does not tell.
      answers: right answers of a free question, or the text to score; () where the row does not tell.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...] = ()
    gold: int | None = None
    answers: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(context, choice) of every choice."""
        contexts = self.contexts * len(self.choices) if len(self.contexts) == 1 else self.contexts
        return tuple(zip(contexts, self.choices, strict=True))

    @property
    def right_answer(self) -> tuple[str, str] | None:
        """(context, text) as they stand where the answer is known, for examples in a prompt; None if it is not."""
        if self.gold is not None:
            return self.pairs[self.gold]
        return (self.contexts[0], self.answers[0]) if self.answers else None


class QuestionTemplate(abc.ABC):
    """One way to put a row as a question."""

    name: str

    @abc.abstractmethod
    def question(self, row: Row) -> Question | None:
        """The question, or None where the template does not apply to this row.

        Raises:
          TemplateError: it does not render.
        """


class Prompts(abc.ABC):
    """One or several templates for the same rows."""

    @abc.abstractmethod
    def templates(self) -> tuple[QuestionTemplate, ...]:
        """The templates, read and parsed.

        Raises:
          ValueError: a template is not Jinja, or there are none.
        """


@dataclasses.dataclass(frozen=True)
class Prompt(QuestionTemplate, Prompts):
    """A template whose parts are given one by one.

    Attributes:
      name: distinguishes the prompts of a task.
      context: Jinja template of the text before the answer; may be empty.
      contexts: Jinja expression for a list of such texts, one a choice, in place of `context`.
      choices: Jinja expression for the list of texts to choose from, such as "endings" or "[choice1, choice2]".
      gold: Jinja expression for the index of the right one.
      answers: Jinja expression for the list of right answers, where there are no choices; or the text to score.
    """

    name: str = "default"
    context: str = ""
    contexts: str | None = None
    choices: str | None = None
    gold: str | None = None
    answers: str | None = None

    def __post_init__(self):
        if (self.choices is None) == (self.answers is None):
            raise ValueError(f"Prompt {self.name!r} needs either choices or answers.")
        if self.contexts is not None and self.context:
            raise ValueError(f"Prompt {self.name!r} has both context and contexts; give one of them.")

    @override
    def templates(self) -> tuple[QuestionTemplate, ...]:
        self._parsed  # noqa: B018 - finds mistakes before any row is read
        return (self,)

    @functools.cached_property
    def _parsed(self) -> dict[str, Any]:
        environment = _environment(jinja2.StrictUndefined)
        expressions = {n: getattr(self, n) for n in ("contexts", "choices", "gold", "answers")}
        try:
            parsed = {n: environment.compile_expression(e, False) for n, e in expressions.items() if e is not None}
            return parsed | {"context": environment.from_string(self.context)}
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"Prompt {self.name!r} is not Jinja: {error.message}.") from error

    @override
    def question(self, row: Row) -> Question | None:
        def value(name: str) -> Any:
            found = _rendered(self.name, lambda: self._parsed[name](**row))
            if isinstance(found, jinja2.Undefined):
                raise TemplateError(f"{getattr(self, name)!r} is not defined by the row, which has {sorted(row)}")
            return found

        def texts(name: str) -> tuple[str, ...]:
            found = value(name) if name in self._parsed else []
            found = [found] if isinstance(found, str) else found
            if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
                raise TemplateError(f"{getattr(self, name)!r} is {found!r:.80}, not a list of texts")
            return tuple(found)

        context = _rendered(self.name, lambda: self._parsed["context"].render(**row))
        contexts, choices = texts("contexts") or (context,), texts("choices")
        if self.contexts is not None and len(contexts) != len(choices):
            raise TemplateError(f"there are {len(contexts)} contexts for {len(choices)} choices")
        gold = value("gold") if self.gold is not None else None
        return Question(contexts, choices, _index(gold, len(choices)), texts("answers"))


@dataclasses.dataclass(frozen=True)
class PromptsourceTemplates(Prompts):
    """Templates of promptsource (Bach et al. 2022, arXiv 2202.01279), read from its YAML files as they are.

    A template renders "prompt ||| answer"; `answer_choices` are the choices, and the answer tells which is right. One
    that renders nothing for a row does not apply to it. Fields are not cut, which promptsource does after 2,048
    characters.

    Attributes:
      folder: that holds `<dataset>/<subset>/templates.yaml`.
      dataset: data set and subset, such as "super_glue/copa".
      names: of the templates wanted; () takes all that have choices, for the original task.
      fields: {field as the templates know it: Jinja expression}, where the rows have others, say
        {"choices": "{'text': choices, 'label': choices_labels}"} for ARC's with the choices not nested; None: nowhere.
    """

    folder: str
    dataset: str
    names: tuple[str, ...] = ()
    fields: Mapping[str, str] | None = None

    @override
    def templates(self) -> tuple[QuestionTemplate, ...]:
        found, fields = self._found(), {name: value_of(expression) for name, expression in (self.fields or {}).items()}
        if missing := [name for name in self.names if name not in found]:
            raise ValueError(f"{self._path} has no template {missing[0]!r}; it has {sorted(found)}.")
        wanted = self.names or [
            name
            for name, template in found.items()
            if template.get("answer_choices") and template.get("metadata", {}).get("original_task")
        ]
        if not wanted:
            raise ValueError(
                f"{self._path} has no template with choices for the original task; name some of {sorted(found)}."
            )
        return tuple(
            _Promptsource(name, found[name]["jinja"], found[name].get("answer_choices"), fields) for name in wanted
        )

    def fingerprint(self) -> str:
        """A digest of the templates themselves, for caches: it changes when they are edited, not when they move."""
        found = self._found()
        texts = [(t.name, found[t.name]["jinja"], found[t.name].get("answer_choices")) for t in self.templates()]
        return fingerprint(texts, dict(self.fields or {}))

    def all_names(self) -> tuple[str, ...]:
        """Names of all templates of the data set, for other tasks than its own too.

        Raises:
          ValueError: there are none.
        """
        return tuple(self._found())

    @property
    def _path(self) -> pathlib.Path:
        return pathlib.Path(self.folder).expanduser() / self.dataset / "templates.yaml"

    def _found(self) -> dict[str, dict[str, Any]]:
        """{name: template}."""
        if not self._path.is_file():
            raise ValueError(
                f"There are no promptsource templates at {self._path}; give the folder that holds the data sets'."
            )
        return {template["name"]: template for template in _read_yaml(self._path)["templates"].values()}


def text_of(template: str) -> Callable[[Row], str]:
    """A Jinja template as a function of a row, which raises `TemplateError` where it does not render.

    Raises:
      ValueError: it is not Jinja.
    """
    try:
        parsed = _environment(jinja2.StrictUndefined).from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The template {template!r} is not Jinja: {error.message}.") from error
    return lambda row: _rendered(template, lambda: parsed.render(**row))


def value_of(expression: str) -> Callable[[Row], Any]:
    """A Jinja expression as a function of a row, which raises `TemplateError` where it has no value.

    Raises:
      ValueError: it is not Jinja.
    """
    try:
        parsed = _environment(jinja2.StrictUndefined).compile_expression(expression, undefined_to_none=False)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The expression {expression!r} is not Jinja: {error.message}.") from error

    def value(row: Row) -> Any:
        found = _rendered(expression, lambda: parsed(**row))
        if isinstance(found, jinja2.Undefined):
            raise TemplateError(f"{expression!r} is not defined by the row, which has {sorted(row)}")
        return found

    return value


_SEPARATOR = "|||"
_PROTECTED = "\ue000\ue001\ue000"  # stands for a separator in a row's own text


class _Promptsource(QuestionTemplate):
    def __init__(self, name: str, jinja: str, choices: str | None, fields: Mapping[str, Callable[[Row], Any]]):
        self.name, self._fields = name, fields
        environment = _environment(jinja2.Undefined)
        try:
            self._jinja = environment.from_string(jinja)
            self._choices = None if choices is None else environment.from_string(choices)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"The promptsource template {name!r} is not Jinja: {error.message}.") from error

    @override
    def question(self, row: Row) -> Question | None:
        row = dict(row) | {name: value(row) for name, value in self._fields.items()}
        row = {k: v.replace(_SEPARATOR, _PROTECTED) if isinstance(v, str) else v for k, v in row.items()}
        chance = {"_random": random.Random(zlib.crc32(repr(sorted(row.items())).encode()))}
        given = None
        if self._choices is not None:
            given = _rendered(self.name, lambda: self._choices.render(**row, **chance)).split(_SEPARATOR)
            given = [choice.strip() for choice in given]
        text = _rendered(self.name, lambda: self._jinja.render(**row, answer_choices=given, **chance))
        if not text.strip():
            return None
        choices = None if given is None else [choice.replace(_PROTECTED, _SEPARATOR) for choice in given]
        context, *targets = (part.replace(_PROTECTED, _SEPARATOR).strip() for part in text.split(_SEPARATOR))
        targets = tuple(target for target in targets if target)
        if choices is None:
            return Question((context,), answers=targets)
        if not targets:
            return Question((context,), tuple(choices))
        if targets[0] not in choices:
            raise TemplateError(f"the answer {targets[0]!r} is none of the choices {choices}")
        return Question((context,), tuple(choices), choices.index(targets[0]))


def _rendered(name: str, render: Any) -> Any:
    try:
        return render()
    except TemplateError:
        raise
    except Exception as error:  # a template may do anything with a row
        raise TemplateError(f"template {name!r}: {type(error).__name__}: {error}") from error


def _index(gold: Any, count: int) -> int | None:
    """The index that `gold` stands for; None if it is none of `count` choices (hidden labels are -1 or empty)."""
    if isinstance(gold, str) and gold.strip().lstrip("-").isdigit():
        gold = int(gold)
    return int(gold) if isinstance(gold, int) and 0 <= gold < count else None


def _environment(undefined: type[jinja2.Undefined]) -> jinja2.Environment:
    """Jinja as promptsource sets it up, in a sandbox."""
    environment = jinja2.sandbox.SandboxedEnvironment(undefined=undefined)
    environment.globals["zip"] = zip
    environment.filters |= {"choice": _choice, "random": _choice, "most_frequent": _most_frequent}
    return environment


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: Sequence) -> Any:
    """One of the items, at random but always the same for a row."""
    chance = context.get("_random")
    return chance.choice(list(items)) if chance is not None else random.Random(len(items)).choice(list(items))


def _most_frequent(items: Sequence) -> list | None:
    """All items that occur most often."""
    counts = collections.Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())] or None


@functools.cache
def _read_yaml(path: pathlib.Path) -> dict[str, Any]:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        """Reads promptsource's two tags as plain mappings; nothing is constructed."""

    for tag in ("!Template", "!TemplateMetadata"):
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    try:
        return yaml.load(path.read_text(), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a YAML file of promptsource: {error}.") from error
