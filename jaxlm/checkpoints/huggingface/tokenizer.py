"""The tokenizer of a Hugging Face folder: as a vocabulary, and the way back."""

import dataclasses
import pathlib

from jaxlm.checkpoints.huggingface.family import Json
from jaxlm.checkpoints.huggingface.files import read_json, write_json
from jaxlm.data.huggingface_tokenizers import tokenizer_of
from jaxlm.data.vocabularies import ByteVocabulary, SentencePieceVocabulary, TokenizersVocabulary, Vocabulary

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Which vocabulary of ours the tokenizer was, and the SentencePiece model behind it: it comes back as itself.
DECLARATION = "jaxlm_vocabulary.json"
ORIGINAL = "sentencepiece.model"
_KINDS = {"bytes": ByteVocabulary, "sentencepiece": SentencePieceVocabulary, "tokenizers": TokenizersVocabulary}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A folder's tokenizer.

    Attributes:
      vocabulary: text to ids, without the ids that `transformers` puts around a text by itself.
      start_id: the id that it puts before every text (`bos` of Llama and Gemma), or None (GPT-2, Qwen).
      end_id: the id that it puts after every text (T5's `</s>`), or None.
    """

    vocabulary: Vocabulary
    start_id: int | None = None
    end_id: int | None = None


def read_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
      ValueError: there is none that can be read; the message says what there is and what to do.
    """
    config = read_json(folder / TOKENIZER_CONFIG)
    if (folder / TOKENIZER).is_file():
        vocabulary = _declared(folder) or TokenizersVocabulary(str(folder / TOKENIZER))
        vocabulary.info()
        return Tokenizer(vocabulary, *_around(folder / TOKENIZER))
    named = str(config.get("tokenizer_class"))
    for name in SENTENCEPIECE:
        if (folder / name).is_file():
            t5 = named.startswith(("T5", "MT5"))  # transformers adds T5's sentinels, and ends its texts
            vocabulary = SentencePieceVocabulary(str(folder / name), int(config.get("extra_ids", 100 if t5 else 0)))
            info = vocabulary.info()
            starts = config.get("add_bos_token", named.startswith("Llama"))
            return Tokenizer(vocabulary, info.bos_id if starts else None, info.eos_id if t5 else None)
    if named == "ByT5Tokenizer":
        # ByT5 was trained with the last bytes' ids as sentinels: it has none of its own.
        return Tokenizer(ByteVocabulary(extra_ids=0), end_id=ByteVocabulary().info().eos_id)
    raise ValueError(
        f"{folder} has no {TOKENIZER} and no {' or '.join(SENTENCEPIECE[:2])}; save its tokenizer there with "
        f"transformers (AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r}))."
    )


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, *, decoder: bool, context_length: int | None) -> None:
    """Writes what `AutoTokenizer.from_pretrained` reads, and what `read_tokenizer` makes the same vocabulary of.

    Args:
      folder: a folder.
      tokenizer: the vocabulary, and what is to stand around a text.
      decoder: of a model that continues texts: it is padded on the left, and its texts begin with `bos`.
      context_length: tokens the model was trained on, if known.

    Raises:
      ValueError: the vocabulary has no tokenizer.json; see `tokenizer_of`.
    """
    from tokenizers import processors

    vocabulary = tokenizer.vocabulary
    made, info = tokenizer_of(vocabulary), vocabulary.info()
    name = made.id_to_token
    before = [] if tokenizer.start_id is None else [name(tokenizer.start_id)]
    after = [] if tokenizer.end_id is None else [name(tokenizer.end_id)]
    around = {made.token_to_id(token): token for token in before + after}
    made.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, i) for i, token in around.items()],
    )
    made.save(str(folder / TOKENIZER))
    ids = {"pad": info.pad_id, "eos": info.eos_id, "unk": info.unk_id, "mask": info.mask_id}
    ids |= {"bos": tokenizer.start_id if decoder else info.bos_id}
    ids |= {"cls": info.named_ids.get("[CLS]"), "sep": info.named_ids.get("[SEP]")}
    roles = {f"{role}_token": name(i) for role, i in sorted(ids.items()) if i is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left" if decoder else "right",
        **({"model_max_length": context_length} if context_length else {}),
        **roles,
    }
    write_json(folder / TOKENIZER_CONFIG, config)
    write_json(folder / "special_tokens_map.json", roles)
    write_json(folder / DECLARATION, _declaration(folder, vocabulary))


def _declaration(folder: pathlib.Path, vocabulary: Vocabulary) -> Json:
    kind = next(kind for kind, class_ in _KINDS.items() if isinstance(vocabulary, class_))
    declared = {"kind": kind, "extra_ids": vocabulary.extra_ids, "named_tokens": list(vocabulary.named_tokens)}
    if isinstance(vocabulary, SentencePieceVocabulary):
        (folder / ORIGINAL).write_bytes(vocabulary.model_file())
    if isinstance(vocabulary, TokenizersVocabulary):
        info, name = vocabulary.info(), vocabulary.tokenizer().id_to_token
        own = {"eos": info.eos_id, "pad": info.pad_id, "bos": info.bos_id, "unk": info.unk_id}
        declared |= {f"{role}_token": name(i) for role, i in own.items() if i is not None}
    return declared


def _declared(folder: pathlib.Path) -> Vocabulary | None:
    """The vocabulary that a folder of ours says its tokenizer was."""
    declared = read_json(folder / DECLARATION)
    if not declared:
        return None
    kind = declared.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(
            f"{folder / DECLARATION} declares a vocabulary of the kind {kind!r}, this version knows {sorted(_KINDS)}; "
            f"use the version of jaxlm that wrote it."
        )
    declared["named_tokens"] = tuple(declared["named_tokens"])
    paths = {"sentencepiece": ORIGINAL, "tokenizers": TOKENIZER}
    return _KINDS[kind](**({"path": str(folder / paths[kind])} if kind in paths else {}), **declared)


def _around(path: pathlib.Path) -> tuple[int | None, int | None]:
    """The ids that a tokenizer.json's post-processor puts before and after a text.

    Raises:
      ValueError: there are several on a side.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    ids, plain = (tokenizer.encode("a", add_special_tokens=added).ids for added in (True, False))
    at = next(i for i in range(len(ids) + 1) if ids[i : i + len(plain)] == plain)
    before, after = ids[:at], ids[at + len(plain) :]
    if max(len(before), len(after)) > 1:
        raise ValueError(
            f"{path} puts {before} before every text and {after} after it; one id a side can be used here."
        )
    return (before or [None])[0], (after or [None])[0]
