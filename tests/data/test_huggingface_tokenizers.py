"""A vocabulary as tokenizer.json: the same ids of any text, the same special tokens, and the text again."""

import gzip
import json
import pathlib
import unicodedata

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxlm.data.huggingface_tokenizers import tokenizer_of
from jaxlm.data.vocabularies import (
    STANDARD_TOKENS,
    ByteVocabulary,
    PythonVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
)

CASES = {
    "bytes": lambda folder: ByteVocabulary(),
    "bytes_named": lambda folder: ByteVocabulary(extra_ids=7, named_tokens=STANDARD_TOKENS),
    "python": lambda folder: PythonVocabulary(),
    "t5": lambda folder: SentencePieceVocabulary(str(folder / "t5_base_32000.spm.model")),
    "c4_bpe": lambda folder: SentencePieceVocabulary(str(folder / "bpe_32k_c4.spm.model"), 3, ("[MASK]", "<sep>")),
    "speech": lambda folder: SentencePieceVocabulary(str(folder / "librispeech_unigram_1024.spm.model"), extra_ids=10),
}
_OPENED = {}


def opened(name, shared_data):
    """A vocabulary and its tokenizer."""
    if name not in _OPENED:
        vocabulary = CASES[name](shared_data / "tokenizers")
        _OPENED[name] = vocabulary, tokenizer_of(vocabulary)
    return _OPENED[name]


@pytest.fixture(params=CASES)
def pair(request, shared_data):
    return opened(request.param, shared_data)


def assert_same(vocabulary, tokenizer, text):
    ids = vocabulary.encode(text).tolist()
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    if vocabulary.info().unk_id not in ids:  # which has another name in each
        assert tokenizer.decode(ids, skip_special_tokens=False) == vocabulary.decode(ids), text


def test_real_text(pair, shared_data):
    for corpus in ("c4_en_mini", "multilingual_ud"):
        file = next(iter(sorted((shared_data / "pretrain" / corpus).glob("*.jsonl.gz"))))
        with gzip.open(file, "rt") as lines:
            for _, line in zip(range(40), lines):
                assert_same(*pair, json.loads(line)["text"][:2000])
    assert_same(*pair, pathlib.Path(gzip.__file__).read_text())


def plain(text: str) -> bool:
    """Whether no character is joined to the one before it.

    The library normalises such clusters as one, and drops what is joined to a character that has a replacement: this is
    how every T5 tokenizer of transformers reads them.
    """
    return not any(unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") for c in text)


LIKELY = st.text(st.sampled_from("  \n\tabcAB<>/_.,01▁éﬁ東京🙂\u3000\u00a0½ßİ가\x00"), max_size=40)


@hypothesis.settings(max_examples=100, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(text=st.one_of(LIKELY, st.text(max_size=30)).filter(plain))
def test_any_text(pair, text):
    spelt = {token.content for token in pair[1].get_added_tokens_decoder().values()}
    hypothesis.assume(not any(name in text for name in spelt))  # parsed there, text here
    assert_same(*pair, text)


def test_special_tokens_have_their_ids(pair):
    vocabulary, tokenizer = pair
    info = vocabulary.info()
    assert tokenizer.get_vocab_size() == info.size
    names = {f"<extra_id_{n}>": i for n, i in enumerate(info.sentinel_ids)} | dict(info.named_ids)
    for name, i in names.items():
        assert tokenizer.token_to_id(name) == i
        assert tokenizer.encode(name).ids == [i]


@pytest.mark.parametrize("name", ["bytes", "python", "c4_bpe"])  # the others drop the space before a special token
def test_special_tokens_inside_a_text(name, shared_data):
    vocabulary, tokenizer = opened(name, shared_data)
    for text in ("one <extra_id_0><extra_id_1> two", "one<extra_id_2>two  <extra_id_0>"):
        assert tokenizer.encode(text).ids == vocabulary.encode_with_specials(text).tolist()


def test_a_tokenizer_json_keeps_its_ids(tmp_path):
    import tokenizers

    tokenizer_of(ByteVocabulary(extra_ids=0)).save(str(tmp_path / "tokenizer.json"))
    vocabulary = TokenizersVocabulary(str(tmp_path / "tokenizer.json"), extra_ids=2, named_tokens=("[MASK]",))
    tokenizer = tokenizer_of(vocabulary)
    assert (
        tokenizer.encode("é[MASK]<extra_id_0>").ids == vocabulary.encode_with_specials("é[MASK]<extra_id_0>").tolist()
    )
    tokenizer.add_tokens([tokenizers.AddedToken("東")])
    assert vocabulary.tokenizer().token_to_id("東") is None, "it is a copy"


def test_what_cannot_be_expressed_is_said(tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("some words and some more words\n" * 20)
    options = dict(vocab_size=20, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    for name, more in {"char": {"model_type": "char"}, "suffix": {"treat_whitespace_as_suffix": True}}.items():
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / name), **options | more
        )
    with pytest.raises(ValueError, match="char.model' is neither a unigram nor a BPE model"):
        tokenizer_of(SentencePieceVocabulary(str(tmp_path / "char.model")))
    with pytest.raises(ValueError, match="has spaces at the end of words"):
        tokenizer_of(SentencePieceVocabulary(str(tmp_path / "suffix.model")))
