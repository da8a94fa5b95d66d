"""Tokens to text as they come: whole characters only, and nothing that may still turn out to be a stop string."""

import codecs
import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.data.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """What each id of a vocabulary adds to a text that it is shown in.

    Attributes:
      text: bytes of each id, [size]; None for special ids.
      names: of special ids, as `Vocabulary.decode` shows them; empty for those that it hides.
      unknown: of ids that the vocabulary does not have.
      dropped_spaces: so many spaces at the beginning of a text are taken away: none, one (SentencePiece's dummy prefix)
        or all (its `remove_extra_whitespaces`).
    """

    text: tuple[bytes | None, ...]
    names: Mapping[int, bytes]
    unknown: bytes
    dropped_spaces: int


@functools.lru_cache(maxsize=8)
def pieces_of(vocabulary: "Vocabulary") -> Pieces:
    """The pieces of a vocabulary."""
    text = vocabulary.token_bytes()
    return Pieces(
        text=text,
        names={i: vocabulary.decode([i]).encode() for i, piece in enumerate(text) if piece is None},
        unknown=vocabulary.decode([len(text)]).encode(),
        dropped_spaces=_dropped_spaces(vocabulary, text),
    )


def _dropped_spaces(vocabulary: "Vocabulary", text: Sequence[bytes | None]) -> int:
    """Asks the vocabulary what it makes of spaces before a word."""
    word = next((i for i, piece in enumerate(text) if piece and piece[:1] == b" " and piece[1:].isalnum()), None)
    if word is None or vocabulary.decode([word]).startswith(" "):
        return 0
    space = next((i for i, piece in enumerate(text) if piece == b" "), None)
    return 1 if space is None or vocabulary.decode([space, space, word]).startswith(" ") else sys.maxsize


def spell(vocabulary: "Vocabulary", text: str) -> list[int]:
    """Ids whose bytes are those of a text that may stand anywhere; where none spell the rest, those before it.

    `Vocabulary.encode` speaks of whole texts, before which some vocabularies put a space.
    """
    pieces, data = vocabulary.token_bytes(), text.encode()
    ids = vocabulary.encode(text).tolist()
    if b"".join(pieces[i] or b"" for i in ids) == data:
        return ids
    by_bytes, longest = _by_bytes(vocabulary)
    ids, at = [], 0
    while at < len(data):
        piece = next((data[at:end] for end in range(at + longest, at, -1) if data[at:end] in by_bytes), None)
        if piece is None:
            break
        ids.append(by_bytes[piece])
        at += len(piece)
    return ids


@functools.lru_cache(maxsize=8)
def _by_bytes(vocabulary: "Vocabulary") -> tuple[dict[bytes, int], int]:
    """({bytes: id}, the most bytes of a piece)."""
    ids = {data: i for i, data in enumerate(vocabulary.token_bytes()) if data}
    return ids, max(map(len, ids))


class TextStream:
    """The text of one slot.

    Text is given out when it is final: a character when all its bytes are there, and what could be the beginning of a
    stop string when it turns out not to be. Joined, the parts are the text up to the stop string that is complete
    first, whatever tokens it came in.

    Attributes:
      stopped: the stop string that ended the text; None while there is none.
      count: tokens read, up to the one that completed the stop string.
    """

    def __init__(self, pieces: Pieces, *, stop: Sequence[str] = (), continues: bool = False):
        """Starts a text.

        Args:
          pieces: of the vocabulary.
          stop: the text ends before the first of these.
          continues: it follows a prompt, so that a space at its beginning is a space of the text.

        Raises:
          ValueError: a stop string is empty.
        """
        if not all(stop):
            raise ValueError(f"The stop strings {list(stop)} have an empty one, which would end every text; remove it.")
        self.stopped: str | None = None
        self.count = 0
        self._pieces = pieces
        self._stop = tuple(stop)
        self._drop = 0 if continues else pieces.dropped_spaces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, ids: Iterable[int]) -> str:
        """Reads tokens; returns the text that has become final. What follows a stop string is not read."""
        released = []
        for i in ids:
            if self.stopped is not None:
                break
            self.count += 1
            released.append(self._release(self._decoder.decode(self._data(i))))
        return "".join(released)

    def finish(self) -> str:
        """The text that was held back, where no more tokens come."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _data(self, i: int) -> bytes:
        text = self._pieces.text[i] if 0 <= i < len(self._pieces.text) else None
        if text is None:
            text, self._drop = self._pieces.names.get(i, self._pieces.unknown), 0
        while self._drop and text.startswith(b" "):
            text, self._drop = text[1:], self._drop - 1
        if text:
            self._drop = 0
        return text

    def _release(self, text: str) -> str:
        """Takes in `text`; returns what is final, up to a stop string if there is one."""
        held = self._held + text
        # The one that is complete first ends the text: that does not depend on how the text came in tokens.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return held[:at]
        keep = next((k for k in range(len(held), 0, -1) if self._begins_stop(held[-k:])), 0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)
