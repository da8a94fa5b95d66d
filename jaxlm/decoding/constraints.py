"""Texts of a given form: a regular expression, one of some answers, JSON of a schema.

What may follow is worked out on the host by llguidance (MIT; an Earley parser over the tokens' bytes), which says for
each slot and step which tokens may come next, as bits. Other libraries were looked at: xgrammar needs torch and
transformers; outlines-core turns a schema into one regular expression, which recursive schemas do not have, and lists
every state of it ahead of time.
"""

import abc
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, override

import numpy as np

from jaxlm.decoding.processors import Constraint
from jaxlm.decoding.text_stream import pieces_of, spell

if TYPE_CHECKING:
    from jaxlm.data.vocabularies import Vocabulary


_FEW = 8  # tokens that are looked at one by one


def bit_words(vocab_size: int) -> int:
    """W, words of 32 tokens each that a mask over a vocabulary has."""
    return -(-vocab_size // 32)


class ConstraintConfig(abc.ABC):
    """A form that texts must have. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def start(
        self,
        vocabulary: "Vocabulary",
        *,
        vocab_size: int,
        end_ids: Sequence[int],
        max_new_tokens: int | None = None,
        continues: bool = False,
    ) -> "GrammarConstraint":
        """The constraint of a text that is about to be written.

        Args:
          vocabulary: of the model.
          vocab_size: of the model's logits, at least the vocabulary's size.
          end_ids: each of these tokens ends a text; at least one.
          max_new_tokens: how many tokens the text may have, its end not counted; None: as many as it takes.
          continues: the text follows a prompt, so that a space at its beginning is a space of the text.

        Raises:
          ValueError: no text has this form, or none of the vocabulary's, or surely none of so many tokens.
          ImportError: llguidance is not installed.
        """


@dataclasses.dataclass(frozen=True)
class RegularExpression(ConstraintConfig):
    """The whole text matches a regular expression.

    Attributes:
      pattern: in the syntax of Rust's `regex`: as Python's, without look-around and back references.
    """

    pattern: str

    @override
    def start(self, vocabulary, *, vocab_size, end_ids, max_new_tokens=None, continues=False):
        llguidance = _llguidance()
        space = "" if continues or not pieces_of(vocabulary).dropped_spaces else " ?"
        grammar = llguidance.LLMatcher.grammar_from_regex(f"{space}(?:{self.pattern})")
        name = f"The regular expression {self.pattern!r}"
        return _start(name, grammar, vocabulary, vocab_size, end_ids, max_new_tokens)


@dataclasses.dataclass(frozen=True)
class OneOf(ConstraintConfig):
    """The text is one of these.

    Attributes:
      texts: the answers, none empty.
    """

    texts: tuple[str, ...]

    def __post_init__(self):
        if not self.texts or not all(self.texts):
            raise ValueError(f"OneOf.texts needs texts, none of them empty, not {self.texts}.")

    @override
    def start(self, vocabulary, *, vocab_size, end_ids, max_new_tokens=None, continues=False):
        pattern = "|".join("".join(f"\\u{{{ord(c):x}}}" for c in text) for text in self.texts)
        space = "" if continues or not pieces_of(vocabulary).dropped_spaces else " ?"
        grammar = _llguidance().LLMatcher.grammar_from_regex(f"{space}(?:{pattern})")
        return _start(f"OneOf{self.texts}", grammar, vocabulary, vocab_size, end_ids, max_new_tokens)


@dataclasses.dataclass(frozen=True)
class JsonSchema(ConstraintConfig):
    """The text is JSON that a schema allows (json-schema.org, 2020-12).

    Attributes:
      schema: the schema, as JSON; "{}" allows any JSON.
      spaces: whether spaces and line ends may stand between tokens of JSON.
    """

    schema: str
    spaces: bool = False

    @override
    def start(self, vocabulary, *, vocab_size, end_ids, max_new_tokens=None, continues=False):
        try:
            schema: Any = json.loads(self.schema)
        except ValueError as error:
            raise ValueError(f"JsonSchema.schema is no JSON ({error}): {self.schema[:80]!r}.") from error
        if not isinstance(schema, Mapping):
            raise ValueError(f"JsonSchema.schema must be a JSON object, not {self.schema[:80]!r}.")
        options = {"whitespace_flexible": self.spaces, **schema.get("x-guidance", {})}
        space = "" if continues or not pieces_of(vocabulary).dropped_spaces else '" "? '
        grammar = f"start: {space}body\nbody: %json {json.dumps({**schema, 'x-guidance': options})}"
        grammar = _llguidance().LLMatcher.grammar_from_lark(grammar)
        name = f"The JSON schema {self.schema[:80]!r}"
        return _start(name, grammar, vocabulary, vocab_size, end_ids, max_new_tokens)


def _llguidance():
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            "Constraints need llguidance: python -m pip install -e '.[constraints]' in the clone."
        ) from error
    return llguidance


class _Tokens:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: "Vocabulary", end_ids: Sequence[int]):
        found = vocabulary.token_bytes()
        # The names of special tokens are never matched by text; they must only differ.
        self.tokens = [f"<|{i}|>".encode() if data is None else data for i, data in enumerate(found)]
        self.special_token_ids = [i for i, data in enumerate(found) if data is None]
        self.eos_token_id, self.bos_token_id = end_ids[0], None
        self._vocabulary = vocabulary

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that must come; where the rest cannot be spelt, llguidance goes on by the bytes."""
        return spell(self._vocabulary, text)


@functools.lru_cache(maxsize=4)
def _tokenizer(vocabulary: "Vocabulary", vocab_size: int, end_ids: tuple[int, ...]):
    """The vocabulary as llguidance's trie of bytes."""
    llguidance = _llguidance()
    wrapper = llguidance.TokenizerWrapper(_Tokens(vocabulary, end_ids))
    return llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(end_ids))


def _start(name, grammar, vocabulary, vocab_size, end_ids, max_new_tokens) -> "GrammarConstraint":
    """The constraint of an llguidance grammar, once it is known that a text can begin."""
    if not end_ids:
        raise ValueError(f"{name} needs to know which token ends a text, and there is none; name an end id.")
    llguidance = _llguidance()
    matcher = llguidance.LLMatcher(_tokenizer(vocabulary, vocab_size, tuple(end_ids)), grammar, log_level=0)
    if matcher.is_error():
        raise ValueError(f"{name} is not one that texts can be held to: {_first_line(matcher.get_error())}.")
    constraint = GrammarConstraint(name, matcher, vocab_size, end_ids)
    _check_begin(constraint, end_ids)
    if max_new_tokens is not None:
        _check_length(constraint.copy(), max_new_tokens, end_ids)
    return constraint


def _first_line(message: str) -> str:
    return message.strip().split("\n")[0].rstrip(".:")


def _ids(bits: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))


def _check_begin(constraint: "GrammarConstraint", end_ids: Sequence[int]) -> None:
    """Raises if no token can begin a text; where only few can, also if none of them can be followed."""
    ids = _ids(constraint.allowed())
    dead = None
    for token in ids:
        if len(ids) > _FEW or token in end_ids:
            return
        following = constraint.copy()
        following.advance(int(token))
        try:
            following.allowed()
            return
        except ValueError as error:
            dead = error
    raise dead


def _check_length(constraint: "GrammarConstraint", max_new_tokens: int, end_ids: Sequence[int]) -> None:
    """Raises if a text is longer than `max_new_tokens` for certain, as all of its tokens up to there are forced."""
    for _ in range(max_new_tokens + 1):
        if constraint.satisfied:
            return
        ids = _ids(constraint.allowed())
        if len(ids) != 1 or ids[0] in end_ids:
            return
        constraint.advance(int(ids[0]))
    raise ValueError(f"{constraint.name} cannot be satisfied in max_new_tokens={max_new_tokens}; raise it.")


class GrammarConstraint(Constraint):
    """A text under a grammar of llguidance, and the tokens of it that were read so far.

    Attributes:
      name: of the constraint, as errors call it.
    """

    def __init__(self, name: str, matcher: Any, vocab_size: int, end_ids: Sequence[int]):
        self.name = name
        self._end_ids = frozenset(end_ids)
        self._matcher = matcher
        self._vocab_size = vocab_size

    @override
    def allowed(self) -> np.ndarray:
        """As the base class; an end of text is among them where one may be.

        Raises:
          ValueError: no token can follow, and the text may not end either.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: bit_words(self._vocab_size)]
        if np.bitwise_count(bits).sum() <= _FEW:
            # Where bytes are forced, llguidance names the tokens of what it can spell of them, and they may not follow.
            bits = bits.copy()
            for token in _ids(bits):
                if token not in self._end_ids and not self._matcher.validate_tokens([int(token)]):
                    bits[token // 32] &= ~np.uint32(1 << token % 32)
        if self._matcher.is_error() or not bits.any():
            raise ValueError(
                f"{self.name} allows no token of the vocabulary here, and the text may not end; choose one that the "
                f"vocabulary can spell."
            )
        return bits

    @override
    def advance(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ValueError(f"{self.name} does not allow the token {token} here: draw from `allowed` only.")

    def rewind(self, count: int) -> None:
        """Forgets the last `count` tokens."""
        if count and not self._matcher.rollback(count):
            raise ValueError(f"{self.name} has read fewer than {count} tokens and cannot forget so many.")

    def copy(self) -> "GrammarConstraint":
        """Another text with the same tokens so far."""
        return GrammarConstraint(self.name, self._matcher.deep_copy(), self._vocab_size, tuple(self._end_ids))

    @property
    def satisfied(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    @override
    def finished(self) -> bool:
        """As the base class: the text can only end here."""
        return self._matcher.is_stopped() and not self._matcher.is_error()
