"""Vocabularies: text to ids and back. Bytes (ByT5), SentencePiece (T5), `tokenizer.json` (Hugging Face).

A vocabulary is a frozen dataclass of plain fields: gin binds it, it pickles small, and data workers load
the tokenizer the first time they use it. Ids are laid out as

    base ids | named_tokens, in order | <extra_id_{n-1}> ... <extra_id_1> <extra_id_0>

so that T5's sentinel 0 is the last id (Raffel et al. 2020, arXiv 1910.10683, 3.1.4). A named token or a
sentinel that the tokenizer already has keeps its own id and is not added again.

Text is only ever text: a document that spells out "<extra_id_0>" or "</s>" is encoded by its characters.
`encode_with_specials` is the one place where such names are parsed, for prompts written by hand.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, override

import numpy as np

from jaxlm.data.protocol_buffers import field, fields
from jaxlm.objectives.base import VocabularyInfo

if TYPE_CHECKING:
    import tokenizers

# Names looked for in a tokenizer that has them already; `named_tokens` adds those (or others) that it lacks.
KNOWN_NAMES = (
    *("[MASK]", "<mask>", "[CLS]", "[SEP]", "[R]", "[S]", "[X]", "[NLU]", "[NLG]", "[S2S]"),
    *("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<sep>", "<eom>"),
)
MASK_NAMES = ("[MASK]", "<mask>")
# Vocabularies are compared by value, so that this caches a method for all equal ones and keeps pickles small.
_once = functools.lru_cache(maxsize=32)
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


@dataclasses.dataclass(frozen=True)
class Vocabulary(abc.ABC):
    """Text to ids and back. Subclasses say how; this class holds what they share."""

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [N], without EOS; special tokens spelt out in the text are plain text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def encode_with_specials(self, text: str) -> np.ndarray:
        """As `encode`, but "<extra_id_0>" and the names of special tokens become their ids."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (any integers, [N]).

        Padding, EOS and BOS vanish, sentinels and named tokens appear by name, and ids that the vocabulary
        does not have (a model's table may be rounded up) decode as unknown.
        """

    @abc.abstractmethod
    def info(self) -> VocabularyInfo:
        """What an objective may know of this vocabulary: its size and its special ids."""

    @abc.abstractmethod
    def token_bytes(self) -> tuple[bytes | None, ...]:
        """The bytes that each id adds to a text, [size]; None for special ids and unknown, which are no text.

        They may be a part of a UTF-8 character. Joined, the bytes of a text's ids are the text; where a model puts a
        space before every text (SentencePiece's dummy prefix), that space is there too and `decode` takes it away.
        """

    @_once
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 [size]; 0 for special ids and unknown."""
        lengths = np.array([len(data or b"") for data in self.token_bytes()], np.int32)
        lengths.flags.writeable = False
        return lengths

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A digest of everything that decides ids (contents, not paths), 16 hex digits."""

    def copied(self, folder: str) -> Vocabulary:
        """The same vocabulary (by its fingerprint) that needs no files but those it is given in `folder`."""
        del folder
        return self

    @property
    def size(self) -> int:
        """Number of ids; every id is in [0, size)."""
        return self.info().size


STANDARD_TOKENS = (
    *("[MASK]", "[CLS]", "[SEP]"),
    *("[R]", "[S]", "[X]"),
    *("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    *("<sep>", "<eom>"),
)
"""Named tokens for every objective: masked LM, UL2's modes, infilling, CodeGen2."""

_ASSETS = os.path.join(os.path.dirname(__file__), "assets")


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _read(path: str, what: str) -> bytes:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"No {what} at {path!r}; give the path of one, or train one with tools/train_vocabulary.py."
        )
    with open(path, "rb") as file:
        return file.read()


def _write(data: bytes, folder: str, name: str) -> str:
    """Puts a file into a folder, whole or not at all; returns its path."""
    path = os.path.join(folder, name)
    with open(f"{path}.partial", "wb") as file:
        file.write(data)
    os.replace(f"{path}.partial", path)
    return path


def _sentinel_names(extra_ids: int) -> list[str]:
    """Names of the sentinels in the order of their ids: the last id is <extra_id_0>."""
    return [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]


def _check_added(named_tokens: tuple[str, ...], extra_ids: int) -> None:
    if extra_ids < 0:
        raise ValueError(f"extra_ids must be 0 or more, got {extra_ids}.")
    names = collections.Counter(named_tokens)
    if "" in names or any(count > 1 or _SENTINEL.fullmatch(name) for name, count in names.items()):
        raise ValueError(
            f"named_tokens must be different, non-empty and not sentinels (those come from extra_ids), "
            f"got {named_tokens}."
        )


def _special_info(
    ids: Mapping[str, int],
    *,
    size: int,
    pad: int,
    eos: int,
    unk: int | None,
    bos: int | None,
    word_start: np.ndarray | None,
) -> VocabularyInfo:
    """VocabularyInfo from {name: id} of sentinels and named tokens."""
    sentinels = sorted((int(m[1]), i) for name, i in ids.items() if (m := _SENTINEL.fullmatch(name)))
    if [n for n, _ in sentinels] != list(range(len(sentinels))):
        raise ValueError(
            f"The vocabulary's sentinels must be <extra_id_0> ... <extra_id_n> without gaps, got {len(sentinels)} of "
            f"which the last is <extra_id_{sentinels[-1][0]}>; set extra_ids to at least {sentinels[-1][0] + 1}."
        )
    named = {name: i for name, i in ids.items() if not _SENTINEL.fullmatch(name)}
    mask = next((named[name] for name in MASK_NAMES if name in named), None)
    return VocabularyInfo(size, pad, eos, unk, bos, mask, tuple(i for _, i in sentinels), named, word_start)


# Bytes ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ByteVocabulary(Vocabulary):
    """UTF-8 bytes: pad 0, eos 1, unk 2, byte b is id b + 3 (ByT5, Xue et al. 2022, arXiv 2105.13626).

    Attributes:
      extra_ids: number of sentinels, at the end.
      named_tokens: further special tokens, between the bytes and the sentinels.
    """

    extra_ids: int = 100
    named_tokens: tuple[str, ...] = ()

    def __post_init__(self):
        _check_added(self.named_tokens, self.extra_ids)

    @property
    def _names(self) -> list[str]:
        return [*self.named_tokens, *_sentinel_names(self.extra_ids)]

    @override
    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3

    @override
    def encode_with_specials(self, text: str) -> np.ndarray:
        ids = {name: 259 + i for i, name in enumerate(self._names)}
        if not ids:
            return self.encode(text)
        # Longest name first, so that no name hides another that it begins.
        pattern = "|".join(re.escape(name) for name in sorted(ids, key=len, reverse=True))
        parts = re.split(f"({pattern})", text)
        return np.concatenate([np.array([ids[p]], np.int32) if p in ids else self.encode(p) for p in parts])

    @override
    def decode(self, ids: Iterable[int]) -> str:
        names, text = self._names, b""
        for i in ids:
            if 3 <= i < 259:
                text += bytes([i - 3])
            elif 259 <= i < 259 + len(names):
                text += names[i - 259].encode()
            elif i == 2 or i >= 259:
                text += "\ufffd".encode()
        return text.decode(errors="replace")

    @override
    def info(self) -> VocabularyInfo:
        ids = {name: 259 + i for i, name in enumerate(self._names)}
        return _special_info(ids, size=259 + len(ids), pad=0, eos=1, unk=2, bos=None, word_start=None)

    @override
    def token_bytes(self) -> tuple[bytes | None, ...]:
        return (None, None, None, *(bytes([b]) for b in range(256)), *(None for _ in self._names))

    @override
    def fingerprint(self) -> str:
        return _digest("bytes", self.extra_ids, self.named_tokens)


# SentencePiece --------------------------------------------------------------------------------------------------

# Types of a piece in sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True, eq=False)
class _Model:
    """A SentencePiece model with our special pieces: one processor that knows them as text, one that does not."""

    file: bytes
    digest: str
    pieces: tuple[tuple[str, int], ...]
    special_ids: Mapping[str, int]
    text: object
    with_specials: object


@functools.lru_cache(maxsize=8)
def _load_sentencepiece(path: str, named_tokens: tuple[str, ...], extra_ids: int) -> _Model:
    """Loads a model file and gives it the wanted special pieces.

    The model is edited as bytes rather than through sentencepiece_model_pb2: that module is tied to one major
    version of protobuf and costs an import, and a protocol buffer makes both edits easy, as appending to a message
    adds to a repeated field and overrides a scalar one.
    """
    import sentencepiece

    data = _read(path, "SentencePiece model")
    wanted = [*named_tokens, *_sentinel_names(extra_ids)]
    pieces, piece_bodies, rest = [], [], b""
    try:
        for number, body in fields(data):
            if number == 1:
                piece = dict(fields(body))
                pieces.append((piece[1].decode(), piece.get(3, _NORMAL)))
                piece_bodies.append(body)
            else:
                rest += field(number, body)
        if not pieces:
            raise ValueError("no pieces")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path!r} is not a SentencePiece model ({error}); give a .model file.") from error

    special_ids = {}
    for i, (piece, kind) in enumerate(pieces):
        # A normal piece may happen to read "[S]"; it is special only if the model or the caller says so.
        known = piece in KNOWN_NAMES or _SENTINEL.fullmatch(piece)
        if (known and kind in (_CONTROL, _USER_DEFINED)) or piece in wanted:
            special_ids[piece] = i
    for name in wanted:
        if name not in special_ids:
            special_ids[name] = len(pieces)
            pieces.append((name, _USER_DEFINED))
            piece_bodies.append(field(1, name.encode()))

    def processor(kind: int):
        special = set(special_ids.values())
        bodies = (body + bytes([3 << 3, kind]) if i in special else body for i, body in enumerate(piece_bodies))
        model = b"".join(field(1, body) for body in bodies) + rest
        return sentencepiece.SentencePieceProcessor(model_proto=model)

    return _Model(
        file=data,
        digest=_digest(data),
        pieces=tuple(pieces),
        special_ids=special_ids,
        # Control pieces are never produced from text; user-defined ones always are.
        text=processor(_CONTROL),
        with_specials=processor(_USER_DEFINED),
    )


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226), with T5's sentinels.

    Padding is the model's own pad id, or 0 where it has none (T5's and seqio's habit; id 0 is then the model's
    unknown piece, which a model with byte fallback never produces).

    Attributes:
      path: the .model file.
      extra_ids: number of sentinels; those that the model has already are used, the others are added at the end.
      named_tokens: further special tokens, likewise.
    """

    path: str
    extra_ids: int = 100
    named_tokens: tuple[str, ...] = ()

    def __post_init__(self):
        _check_added(self.named_tokens, self.extra_ids)

    @property
    def _model(self) -> _Model:
        return _load_sentencepiece(self.path, self.named_tokens, self.extra_ids)

    @override
    def encode(self, text: str) -> np.ndarray:
        return self._model.text.EncodeAsNumpy(text)  # a quarter faster than through a list

    @override
    def encode_with_specials(self, text: str) -> np.ndarray:
        return self._model.with_specials.EncodeAsNumpy(text)

    @override
    def decode(self, ids: Iterable[int]) -> str:
        processor = self._model.with_specials
        size, unk = processor.GetPieceSize(), processor.unk_id()
        return processor.DecodeIds([int(i) if i < size else unk for i in ids])

    @override
    @_once
    def info(self) -> VocabularyInfo:
        model = self._model
        pad, eos, unk, bos = (getattr(model.text, f"{name}_id")() for name in ("pad", "eos", "unk", "bos"))
        if eos < 0:
            raise ValueError(f"The SentencePiece model {self.path!r} has no eos piece; train it with eos_id set.")
        if pad < 0:
            pad = 0
            if model.pieces[0][1] not in (_UNKNOWN, _CONTROL, _UNUSED):
                raise ValueError(
                    f"The SentencePiece model {self.path!r} has no pad piece and its id 0 is the text "
                    f"{model.pieces[0][0]!r}; train it with pad_id=0."
                )
        starts = np.array([piece.startswith("▁") and kind == _NORMAL for piece, kind in model.pieces])
        return _special_info(
            model.special_ids,
            size=len(model.pieces),
            pad=pad,
            eos=eos,
            unk=unk,
            bos=bos if bos >= 0 else None,
            word_start=starts,
        )

    @override
    @_once
    def token_bytes(self) -> tuple[bytes | None, ...]:
        """As the base class; "▁" is the one space it stands for.

        Text that the model's normaliser rewrites differs by what that changes.
        """
        special = set(self._model.special_ids.values())

        def data(i: int, piece: str, kind: int) -> bytes | None:
            if i in special or kind not in (_NORMAL, _USER_DEFINED, _BYTE):
                return None
            return bytes([int(piece[3:5], 16)]) if kind == _BYTE else piece.replace("▁", " ").encode()

        return tuple(data(i, piece, kind) for i, (piece, kind) in enumerate(self._model.pieces))

    def model_file(self) -> bytes:
        """The contents of the .model file."""
        return self._model.file

    def model_proto(self) -> bytes:
        """The same with all special pieces in it, as user-defined ones."""
        return self._model.with_specials.serialized_model_proto()

    @override
    def copied(self, folder: str) -> SentencePieceVocabulary:
        path = _write(self.model_file(), folder, f"{self.fingerprint()}.model")
        return SentencePieceVocabulary(path, self.extra_ids, self.named_tokens)

    @override
    def fingerprint(self) -> str:
        return _digest("sentencepiece", self._model.digest, self.extra_ids, self.named_tokens)


# tokenizer.json -------------------------------------------------------------------------------------------------

# Where neither the caller nor a tokenizer_config.json beside the file names a token for a role.
_USUAL = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "[SEP]"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>"),
    "unk": ("<unk>", "[UNK]"),
}


@functools.lru_cache(maxsize=8)
def _load_tokenizer(path: str, named_tokens: tuple[str, ...], extra_ids: int):
    """(tokenizer that reads text only, tokenizer that parses specials, its JSON, {special name: id})."""
    import tokenizers

    data = _read(path, "tokenizer.json").decode()
    try:
        # The tokenizers library raises a bare Exception.
        text, with_specials = tokenizers.Tokenizer.from_str(data), tokenizers.Tokenizer.from_str(data)
    except Exception as error:
        raise ValueError(f"{path!r} is not a tokenizer.json ({error}).") from error
    present = {token.content for token in text.get_added_tokens_decoder().values()}
    known = [name for name in sorted(present) if name in KNOWN_NAMES or _SENTINEL.fullmatch(name)]
    names = list(dict.fromkeys([*known, *named_tokens, *_sentinel_names(extra_ids)]))
    for tokenizer in (text, with_specials):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # One by one: the ids of tokens added in one call follow their order only if none is there already.
        for name in names:
            tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
    text.encode_special_tokens = True
    return text, with_specials, json.loads(data), {name: text.token_to_id(name) for name in names}


def byte_stand_ins() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes: {byte: character} (Radford et al. 2019, byte-level BPE)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@dataclasses.dataclass(frozen=True)
class PythonVocabulary(SentencePieceVocabulary):
    """The vocabulary that is in the repository: 4,096 byte-pair pieces trained on Python's standard library.

    Its card, `assets/python_4k.model.card.json`, says how it was made. It has the special tokens of all objectives.

    Attributes:
      path: file name among the package's assets.
    """

    path: str = "python_4k.model"
    named_tokens: tuple[str, ...] = STANDARD_TOKENS

    @property
    def _model(self) -> _Model:
        return _load_sentencepiece(os.path.join(_ASSETS, self.path), self.named_tokens, self.extra_ids)


@dataclasses.dataclass(frozen=True)
class TokenizersVocabulary(Vocabulary):
    """A Hugging Face `tokenizer.json`.

    Roles (pad, eos, bos, unk) are taken from the fields below, else from a `tokenizer_config.json` beside the file,
    else from the usual names. Without a pad token EOS pads, as GPT-2's users do: rows are told from padding by
    segment ids and weights, never by the id.

    Attributes:
      path: the tokenizer.json file.
      extra_ids: number of T5 sentinels wanted; those that the file has are used, others are added.
      named_tokens: further special tokens, likewise.
      eos_token, pad_token, bos_token, unk_token: the tokens of these roles, where the file's own are not wanted.
    """

    path: str
    extra_ids: int = 0
    named_tokens: tuple[str, ...] = ()
    eos_token: str | None = None
    pad_token: str | None = None
    bos_token: str | None = None
    unk_token: str | None = None

    def __post_init__(self):
        _check_added(self.named_tokens, self.extra_ids)

    @property
    def _loaded(self):
        return _load_tokenizer(self.path, self.named_tokens, self.extra_ids)

    @override
    def encode(self, text: str) -> np.ndarray:
        return np.array(self._loaded[0].encode(text, add_special_tokens=False).ids, np.int32)

    @override
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._loaded[0].encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    @override
    def encode_with_specials(self, text: str) -> np.ndarray:
        return np.array(self._loaded[1].encode(text, add_special_tokens=False).ids, np.int32)

    @override
    def decode(self, ids: Iterable[int]) -> str:
        info = self.info()
        unk = [] if info.unk_id is None else [info.unk_id]
        hidden = {info.pad_id, info.eos_id, info.bos_id}
        known = ([int(i)] if i < info.size else unk for i in ids if i not in hidden)
        return self._loaded[0].decode([i for part in known for i in part], skip_special_tokens=False)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """A tokenizer of its own that parses special tokens."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._loaded[1].to_str())

    @_once
    def _roles(self) -> dict[str, int | None]:
        tokenizer = self._loaded[0]
        beside = os.path.join(os.path.dirname(os.path.expanduser(self.path)), "tokenizer_config.json")
        config = {}
        if os.path.isfile(beside):
            with open(beside, encoding="utf-8") as file:
                config = json.load(file)
        roles: dict[str, int | None] = {}
        for role, usual in _USUAL.items():
            said = getattr(self, f"{role}_token") or config.get(f"{role}_token")
            said = said["content"] if isinstance(said, dict) else said
            roles[role] = tokenizer.token_to_id(said) if said else None
            if said and roles[role] is None:
                raise ValueError(f"The tokenizer {self.path!r} has no token {said!r}, which is to be its {role} token.")
            if not said:
                roles[role] = next((i for name in usual if (i := tokenizer.token_to_id(name)) is not None), None)
        if roles["eos"] is None:
            raise ValueError(f"No end-of-text token is known in {self.path!r}; name it with eos_token.")
        if roles["pad"] is None:
            roles["pad"] = roles["eos"]
        return roles

    def _pieces(self) -> list[str | None]:
        tokenizer = self._loaded[0]
        ids = tokenizer.get_vocab(with_added_tokens=True)
        pieces: list[str | None] = [None] * (max(ids.values()) + 1)
        for piece, i in ids.items():
            pieces[i] = piece
        return pieces

    @property
    def _decoders(self) -> set[str]:
        decoder = self._loaded[2].get("decoder") or {}
        return {part["type"] for part in decoder.get("decoders", [decoder]) if part}

    @override
    @_once
    def info(self) -> VocabularyInfo:
        *_, special_ids = self._loaded
        pieces, roles, decoders = self._pieces(), self._roles(), self._decoders
        if "WordPiece" in decoders:
            starts = np.array([bool(piece) and not piece.startswith("##") for piece in pieces])
        else:
            starts = np.array([bool(piece) and piece[0] in "Ġ▁" for piece in pieces])
        return _special_info(special_ids, size=len(pieces), word_start=starts, **roles)

    @override
    @_once
    def token_bytes(self) -> tuple[bytes | None, ...]:
        """As the base class; exact for byte-level BPE. WordPiece has no spaces, so none are there."""
        special = set(self.info().special_ids.tolist()) | {i for i in self._roles().values() if i is not None}
        added = self._loaded[0].get_added_tokens_decoder()
        decoders, stand_ins = self._decoders, {character: byte for byte, character in byte_stand_ins().items()}

        def data(i: int, piece: str | None) -> bytes | None:
            if piece is None or i in special or (i in added and added[i].special):
                return None
            if i in added:
                return piece.encode()
            if "ByteLevel" in decoders:
                return b"".join(bytes([stand_ins[c]]) if c in stand_ins else c.encode() for c in piece)
            if "ByteFallback" in decoders and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
                return bytes([int(piece[3:5], 16)])
            if "WordPiece" in decoders:
                return piece.removeprefix("##").encode()
            return piece.replace("▁", " ").encode()

        return tuple(data(i, piece) for i, piece in enumerate(self._pieces()))

    @override
    def copied(self, folder: str) -> TokenizersVocabulary:
        path = _write(_read(self.path, "tokenizer.json"), folder, f"{self.fingerprint()}.json")
        # By name, since a tokenizer_config.json that gave them does not come with it.
        roles = {f"{role}_token": self._loaded[0].id_to_token(i) for role, i in self._roles().items() if i is not None}
        return dataclasses.replace(self, path=path, **roles)

    @override
    def fingerprint(self) -> str:
        roles = sorted(self._roles().items())
        return _digest("tokenizers", _read(self.path, "tokenizer.json"), self.extra_ids, self.named_tokens, roles)
