"""The tokenizer of a Hugging Face folder as a vocabulary."""

import dataclasses
import pathlib

from jaxlm.checkpoints.huggingface.family import Json
from jaxlm.checkpoints.huggingface.files import read_json
from jaxlm.data.vocabularies import ByteVocabulary, SentencePieceVocabulary, TokenizersVocabulary, Vocabulary

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A folder's tokenizer.

    Attributes:
      vocabulary: text to ids, without the ids that `transformers` puts around a text by itself.
      start_id: the id that it puts before every text (`bos` of Llama and Gemma), or None (GPT-2, Qwen).
    """

    vocabulary: Vocabulary
    start_id: int | None


def read_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
      ValueError: there is none that can be read; the message says what there is and what to do.
    """
    config = read_json(folder / TOKENIZER_CONFIG)
    if (folder / TOKENIZER).is_file():
        vocabulary = TokenizersVocabulary(str(folder / TOKENIZER))
        vocabulary.info()
        return Tokenizer(vocabulary, _start_of(folder / TOKENIZER))
    for name in SENTENCEPIECE:
        if (folder / name).is_file():
            vocabulary = SentencePieceVocabulary(str(folder / name), extra_ids=_extra_ids(config))
            starts = config.get("add_bos_token", config.get("tokenizer_class", "").startswith("Llama"))
            return Tokenizer(vocabulary, vocabulary.info().bos_id if starts else None)
    if config.get("tokenizer_class") == "ByT5Tokenizer":
        # ByT5 was trained with the last bytes' ids as sentinels: it has none of its own.
        return Tokenizer(ByteVocabulary(extra_ids=0), None)
    raise ValueError(
        f"{folder} has no {TOKENIZER} and no {' or '.join(SENTENCEPIECE[:2])}; save its tokenizer there with "
        f"transformers (AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r}))."
    )


def _start_of(path: pathlib.Path) -> int | None:
    """The id that a tokenizer.json's post-processor puts before a text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    ids, plain = (tokenizer.encode("a", add_special_tokens=added).ids for added in (True, False))
    added = ids[: next(i for i in range(len(ids) + 1) if ids[i : i + len(plain)] == plain)]
    if len(added) > 1:
        raise ValueError(f"{path} puts {len(added)} ids before every text ({added}); only one can be used here.")
    return added[0] if added else None


def _extra_ids(config: Json) -> int:
    """Number of T5's sentinels beside the model's own pieces: those that transformers adds to a T5 tokenizer."""
    t5 = config.get("tokenizer_class", "").startswith(("T5", "MT5"))
    return int(config.get("extra_ids", 100 if t5 else 0))
