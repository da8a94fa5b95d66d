"""Vocabularies: ids are those of ByT5, T5 and Hugging Face, text stays text, byte lengths add up."""

import gzip
import json
import pathlib
import pickle

import numpy as np
import pytest

from jaxlm.data import vocabularies
from jaxlm.data.vocabularies import ByteVocabulary, SentencePieceVocabulary, TokenizersVocabulary

TEXT = "The cat sat; naïve café — 東京 🙂 x==y"
HOSTILE = "see <extra_id_0> and </s> and [R] and <pad>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{type: path} of small SentencePiece models with byte fallback, identity normaliser and no dummy prefix."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp")
    lines = [f"{TEXT} line {i} of the little corpus, {'ab' * (i % 7)} {i * i}" for i in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))
    paths = {}
    for kind, more in {"bpe": {}, "unigram": {"user_defined_symbols": ["<extra_id_1>", "<extra_id_0>", "[R]"]}}.items():
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"),
            model_prefix=str(folder / kind),
            model_type=kind,
            vocab_size=400,
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            character_coverage=0.99,
            hard_vocab_limit=False,
            minloglevel=2,
            **more,
        )
        paths[kind] = str(folder / f"{kind}.model")
    return paths


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """Path of a small byte-level BPE tokenizer.json."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<extra_id_0>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, HOSTILE] * 20, trainer)
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def all_of_them(trained, byte_level):
    names = ("[R]", "<fim_prefix>")
    return [
        ByteVocabulary(extra_ids=3, named_tokens=names),
        SentencePieceVocabulary(trained["bpe"], extra_ids=3, named_tokens=names),
        SentencePieceVocabulary(trained["unigram"], extra_ids=3, named_tokens=names),
        TokenizersVocabulary(byte_level, extra_ids=3, named_tokens=names),
    ]


def test_every_vocabulary_round_trips_and_accounts_for_every_byte(all_of_them):
    for vocabulary in all_of_them:
        for text in (TEXT, HOSTILE, "a", "", "  two  spaces \n\t lines\n"):
            ids = vocabulary.encode(text)
            assert ids.dtype == np.int32 and ids.ndim == 1
            assert vocabulary.decode(ids) == text, vocabulary
            assert vocabulary.byte_lengths()[ids].sum() == len(text.encode()), vocabulary
            assert b"".join(vocabulary.token_bytes()[i] for i in ids) == text.encode(), vocabulary
        batch = vocabulary.encode_batch([TEXT, HOSTILE])
        np.testing.assert_array_equal(batch[1], vocabulary.encode(HOSTILE))
        lengths = vocabulary.byte_lengths()
        assert lengths.shape == (vocabulary.size,) and lengths.dtype == np.int32
        assert not lengths[vocabulary.info().special_ids].any()


def test_special_tokens_spelt_in_a_text_stay_text_unless_asked(all_of_them):
    for vocabulary in all_of_them:
        info = vocabulary.info()
        assert not set(vocabulary.encode(HOSTILE)) & set(info.special_ids), vocabulary
        asked = vocabulary.encode_with_specials(HOSTILE)
        assert info.sentinel_ids[0] in asked and info.named("[R]", "test") in asked
        assert vocabulary.decode(asked) == HOSTILE


def test_named_tokens_precede_sentinels_and_sentinel_0_is_the_last_id(trained):
    for vocabulary in (ByteVocabulary(4, ("[R]",)), SentencePieceVocabulary(trained["bpe"], 4, ("[R]",))):
        info = vocabulary.info()
        assert info.sentinel_ids == tuple(info.size - 1 - i for i in range(4))
        assert info.named("[R]", "test") == info.size - 5
        assert (info.pad_id, info.eos_id, info.unk_id) == (0, 1, 2)
    assert ByteVocabulary(4, ("[R]",)).size == 259 + 5
    np.testing.assert_array_equal(ByteVocabulary().encode("Aé"), [68, 198, 172])


def test_sentinels_that_the_model_has_keep_their_ids(trained):
    plain = SentencePieceVocabulary(trained["unigram"], extra_ids=0).info()
    assert len(plain.sentinel_ids) == 2
    more = SentencePieceVocabulary(trained["unigram"], extra_ids=4).info()
    assert more.sentinel_ids[:2] == plain.sentinel_ids and more.size == plain.size + 2
    assert more.sentinel_ids[2:] == (more.size - 1, more.size - 2)
    assert more.named_ids == {"[R]": plain.named_ids["[R]"]}


def test_padding_eos_and_ids_beyond_the_vocabulary_decode_quietly(all_of_them):
    for vocabulary in all_of_them:
        info = vocabulary.info()
        ids = [info.pad_id, *vocabulary.encode("ab"), info.eos_id, info.pad_id]
        assert vocabulary.decode(ids) == "ab"
        assert vocabulary.decode([*vocabulary.encode("ab"), info.size + 5]).startswith("ab")


def test_word_starts(trained, byte_level):
    for vocabulary in (SentencePieceVocabulary(trained["bpe"]), TokenizersVocabulary(byte_level)):
        starts, ids = vocabulary.info().word_start, vocabulary.encode("one two three")
        assert starts.shape == (vocabulary.size,)
        assert starts[ids].sum() == 2  # no dummy prefix: the first word has no mark
    assert ByteVocabulary().info().word_start is None


def test_pickles_are_small_and_fingerprints_follow_contents_not_paths(trained, tmp_path):
    vocabulary = SentencePieceVocabulary(trained["bpe"])
    vocabulary.encode("loads the model")
    data = pickle.dumps(vocabulary)
    assert len(data) < 1000
    assert pickle.loads(data) == vocabulary
    copy = tmp_path / "copy.model"
    copy.write_bytes(pathlib.Path(trained["bpe"]).read_bytes())
    assert SentencePieceVocabulary(str(copy)).fingerprint() == vocabulary.fingerprint()
    others = [
        SentencePieceVocabulary(trained["bpe"], extra_ids=5),
        SentencePieceVocabulary(trained["bpe"], named_tokens=("[R]",)),
        SentencePieceVocabulary(trained["unigram"]),
        ByteVocabulary(),
    ]
    assert len({v.fingerprint() for v in [vocabulary, *others]}) == 5


def test_errors_name_the_thing_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_vocabulary"):
        SentencePieceVocabulary(str(tmp_path / "none.model")).encode("a")
    bad = tmp_path / "bad.model"
    bad.write_text("This is not a model at all.")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceVocabulary(str(bad)).info()
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        TokenizersVocabulary(str(bad)).info()
    with pytest.raises(ValueError, match="different"):
        ByteVocabulary(named_tokens=("[R]", "[R]"))
    with pytest.raises(ValueError, match="extra_ids"):
        ByteVocabulary(named_tokens=("<extra_id_0>",))
    with pytest.raises(ValueError, match=r"named_tokens"):
        ByteVocabulary().info().named("[R]", "UL2")


def test_gaps_in_a_tokenizers_sentinels_are_refused(tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<extra_id_1>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="set extra_ids to at least 2"):
        TokenizersVocabulary(str(tmp_path / "tokenizer.json")).info()
    assert TokenizersVocabulary(str(tmp_path / "tokenizer.json"), extra_ids=2).info().sentinel_ids == (3, 2)


def test_roles_come_from_fields_then_tokenizer_config_then_usual_names(byte_level, tmp_path):
    info = TokenizersVocabulary(byte_level).info()
    assert info.eos_id == info.pad_id == 0
    path = tmp_path / "tokenizer.json"
    path.write_text(pathlib.Path(byte_level).read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    pad = TokenizersVocabulary(str(path)).info().pad_id
    assert pad != 0
    assert TokenizersVocabulary(str(path), pad_token="<|endoftext|>").info().pad_id == 0
    with pytest.raises(ValueError, match="no token 'nope'"):
        TokenizersVocabulary(str(path), eos_token="nope").info()


def test_t5_ids_are_those_of_t5(shared_data):
    vocabulary = SentencePieceVocabulary(str(shared_data / "tokenizers/t5_base_32000.spm.model"))
    info = vocabulary.info()
    assert (info.size, info.pad_id, info.eos_id, info.unk_id, info.bos_id) == (32100, 0, 1, 2, None)
    assert info.sentinel_ids[:2] == (32099, 32098)
    # "translate English to German:" as in the T5 repository's README and every T5 tutorial.
    np.testing.assert_array_equal(vocabulary.encode("translate English to German:"), [13959, 1566, 12, 2968, 10])
    assert vocabulary.decode([32099, 8774, 1]) == "<extra_id_0> Hello"


def test_byte_lengths_of_real_text_with_byte_fallback(shared_data):
    vocabulary = SentencePieceVocabulary(str(shared_data / "tokenizers/bpe_32k_c4.spm.model"))
    with gzip.open(shared_data / "pretrain/c4_en_mini/validation.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file][:50]
    # This model puts a space before a text and has `<n>` for line ends.
    for text in (" ".join(text.split()) for text in texts):
        ids = vocabulary.encode(text)
        assert vocabulary.byte_lengths()[ids].sum() == len(text.encode()) + 1
        assert vocabulary.decode(ids) == text


def test_no_protobuf_or_tensorflow_is_imported(trained):
    import subprocess
    import sys

    code = (
        "import sys; from jaxlm.data.vocabularies import SentencePieceVocabulary as V; "
        f"V({trained['bpe']!r}).encode('a'); bad = {{'google.protobuf', 'tensorflow', 'jax'}} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(vocabularies.__file__).parents[2])
