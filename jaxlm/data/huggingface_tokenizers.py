"""A vocabulary as a tokenizer of Hugging Face's `tokenizers` library, with the same ids: what `tokenizer.json` holds.

Special tokens spelt out in a text are parsed there, as `Vocabulary.encode_with_specials` does. A SentencePiece model
becomes the library's own Unigram or BPE model, with normaliser and decoder beside it.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any

from jaxlm.data.protocol_buffers import fields
from jaxlm.data.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    Vocabulary,
    byte_stand_ins,
)

if TYPE_CHECKING:
    import tokenizers

_SPACE = "▁"
_NORMAL, _, _CONTROL, _USER_DEFINED = range(1, 5)  # kinds of SentencePiece pieces
_UNIGRAM, _BPE = 1, 2


@functools.singledispatch
def tokenizer_of(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The tokenizer with the ids of a vocabulary; it adds nothing to a text.

    Raises:
      ValueError: there is none for this kind of vocabulary, or for what a SentencePiece model does.
    """
    raise ValueError(
        f"A {type(vocabulary).__name__} has no tokenizer.json; train with a SentencePieceVocabulary, a "
        f"TokenizersVocabulary or a ByteVocabulary, or write the model without its tokenizer."
    )


@tokenizer_of.register(TokenizersVocabulary)
def _(vocabulary: TokenizersVocabulary) -> tokenizers.Tokenizer:
    return vocabulary.tokenizer()


@tokenizer_of.register(ByteVocabulary)
def _(vocabulary: ByteVocabulary) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    specials = ["<pad>", "</s>", "<unk>"]
    pieces = specials + [character for _, character in sorted(byte_stand_ins().items())]
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    info = vocabulary.info()
    by_id = {i: name for name, i in info.named_ids.items()}
    by_id |= {i: f"<extra_id_{n}>" for n, i in enumerate(info.sentinel_ids)}
    _add(tokenizer, specials + [by_id[i] for i in sorted(by_id)])
    return tokenizer


@tokenizer_of.register(SentencePieceVocabulary)
def _(vocabulary: SentencePieceVocabulary) -> tokenizers.Tokenizer:
    """After `sentencepiece_model.proto` (github.com/google/sentencepiece)."""
    import tokenizers

    pieces, trainer, normalizer = _read_model(vocabulary.model_proto())
    if trainer.get(24):
        raise ValueError(
            f"The SentencePiece model {vocabulary.path!r} has spaces at the end of words "
            f"(treat_whitespace_as_suffix), which tokenizer.json cannot express."
        )
    special = set(vocabulary.info().special_ids.tolist())
    tokenizer = tokenizers.Tokenizer(_model(vocabulary, pieces, trainer, special))
    _normalize(tokenizer, normalizer)
    tokenizer.decoder = _decoder(normalizer)
    _add(tokenizer, [piece for i, (piece, _, kind) in enumerate(pieces) if i in special or kind == _CONTROL])
    own = [piece for i, (piece, _, kind) in enumerate(pieces) if kind == _USER_DEFINED and i not in special]
    tokenizer.add_tokens([tokenizers.AddedToken(piece, normalized=_SPACE in piece) for piece in own])
    return tokenizer


def _read_model(proto: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """([(piece, score, kind)], trainer's settings, normaliser's settings), settings by their field's number."""
    pieces, specs = [], {2: {}, 3: {}}
    for number, body in fields(proto):
        if number == 1:
            piece = dict(fields(body))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode(), score, piece.get(3, _NORMAL)))
        elif number in specs:
            specs[number] = dict(fields(body))
    return pieces, specs[2], specs[3]


def _model(
    vocabulary: SentencePieceVocabulary,
    pieces: list[tuple[str, float, int]],
    trainer: dict[int, Any],
    special: set[int],
) -> tokenizers.models.Model:
    """The library's model of a SentencePiece model."""
    from tokenizers import models

    falls_back, unk = bool(trainer.get(35)), vocabulary.info().unk_id
    kind = trainer.get(3, _UNIGRAM)
    if kind == _UNIGRAM:
        # Pieces that are not text must not be found in one. The library searches for all of them: these lose.
        least = min(score for _, score, kind in pieces if kind == _NORMAL) - 1000.0
        scores = [
            (piece, score if kind == _NORMAL and i not in special else least)
            for i, (piece, score, kind) in enumerate(pieces)
        ]
        return models.Unigram(scores, unk, falls_back)
    if kind != _BPE:
        raise ValueError(
            f"The SentencePiece model {vocabulary.path!r} is neither a unigram nor a BPE model; tokenizer.json cannot "
            f"express others."
        )
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for i, (piece, score, kind) in enumerate(pieces) if kind == _NORMAL and i not in special}
    merges = []
    # SentencePiece joins the neighbours that make the likeliest piece, whichever they are.
    for piece, score in scores.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(-score, ids[a], ids[b], a, b) for a, b in pairs if a in scores and b in scores]
    return models.BPE(
        ids,
        [(a, b) for *_, a, b in sorted(merges)],
        unk_token=None if unk is None else pieces[unk][0],
        fuse_unk=True,
        byte_fallback=falls_back,
    )


def _normalize(tokenizer: tokenizers.Tokenizer, settings: dict[int, Any]) -> None:
    """Gives the tokenizer the steps from a text to what the model reads."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers

    prefix, collapses, escapes = (bool(settings.get(number, 1)) for number in (3, 4, 5))
    steps = [normalizers.Precompiled(settings[2])] if settings.get(2) else []
    if collapses:
        steps.append(normalizers.Replace(tokenizers.Regex(r" +\z"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    steps += [normalizers.Replace(" ", _SPACE)] if escapes else []
    if prefix:
        # Only here is it known which of the pieces around special tokens is the text's first. It is given a space: one
        # more than its own, which have another form already; or, where there is to be but one, if it has none.
        first = pre_tokenizers.Metaspace(_SPACE if collapses else " ", "first", split=False)
        escape = pre_tokenizers.Metaspace(_SPACE, "never", split=False)
        tokenizer.pre_tokenizer = first if collapses else pre_tokenizers.Sequence([first, escape])
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)


def _decoder(settings: dict[int, Any]) -> tokenizers.decoders.Decoder:
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = bool(settings.get(3, 1))
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))


def _add(tokenizer: tokenizers.Tokenizer, names: list[str]) -> None:
    """Makes these tokens special, in the order of their ids; what the model lacks gets the next id."""
    import tokenizers

    for name in names:  # one by one: the ids of tokens added in one call need not follow their order
        tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
