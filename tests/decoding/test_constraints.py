"""Constrained texts have the form asked for, whatever the model wants, and a form that none can have is refused."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.vocabularies import ByteVocabulary, PythonVocabulary, SentencePieceVocabulary
from jaxlm.decoding.constraints import JsonSchema, OneOf, RegularExpression, bit_words
from jaxlm.decoding.processors import keep_allowed
from jaxlm.decoding.sampling import NEVER

pytest.importorskip("llguidance", reason="the extra `constraints` is not installed")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vocabularies(shared_data):
    t5 = SentencePieceVocabulary(str(shared_data / "tokenizers" / "t5_base_32000.spm.model"))
    return [ByteVocabulary(), PythonVocabulary(), t5]


def start(config, vocabulary, **options):
    options = {"end_ids": (vocabulary.info().eos_id,), **options}
    return config.start(vocabulary, vocab_size=vocabulary.size + 5, **options)


def write(constraint, vocabulary, seed, limit=200):
    """A text of random allowed tokens, ids; ended as soon as chance says so."""
    rng, ids, end = np.random.default_rng(seed), [], vocabulary.info().eos_id
    while len(ids) < limit:
        bits = constraint.allowed()
        assert bits.dtype == np.uint32 and bits.shape == (bit_words(vocabulary.size + 5),)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        assert constraint.satisfied == (end in allowed)
        token = end if end in allowed and rng.random() < 0.3 else int(rng.choice(allowed))
        constraint.advance(token)
        if token == end:
            return ids
        ids.append(token)
    raise AssertionError(f"no end in {limit} tokens")


def test_random_tokens_make_texts_of_the_form(vocabularies):
    for vocabulary in vocabularies:
        for seed in range(5):
            for continues in (False, True):
                for pattern in (r"[a-z]{3,5}-[0-9]+", r"(yes|no|maybe), because [aeiou]+\."):
                    ids = write(start(RegularExpression(pattern), vocabulary, continues=continues), vocabulary, seed)
                    if continues:
                        text = b"".join(vocabulary.token_bytes()[i] for i in ids).decode()
                    else:
                        text = vocabulary.decode(ids)
                    assert re.fullmatch(pattern, text), (vocabulary, text)
            answers = ("a+b", "a|b", "(")
            assert vocabulary.decode(write(start(OneOf(answers), vocabulary), vocabulary, seed)) in answers


def test_random_tokens_make_json_of_the_schema():
    vocabulary = PythonVocabulary()  # T5's pieces cannot write {
    for seed in range(8):
        config = JsonSchema(json.dumps(SCHEMA), spaces=seed % 2 == 1)
        text = vocabulary.decode(write(start(config, vocabulary), vocabulary, seed))
        found = json.loads(text)
        assert set(found) == {"name", "age"} and len(found["name"]) <= 6 and 0 <= found["age"] <= 120
        if not config.spaces:
            assert not re.search(r"[:,{]\s|\s[}]", re.sub(r'"(\\.|[^"\\])*"', '""', text))


def test_a_schema_may_be_recursive():
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    vocabulary = ByteVocabulary()
    constraint = start(JsonSchema(json.dumps(tree)), vocabulary)
    for token in vocabulary.encode('{"next":{"next":{'):
        assert not constraint.satisfied
        constraint.advance(int(token))
    for token in vocabulary.encode("}}}"):
        constraint.advance(int(token))
    assert constraint.satisfied


def test_a_space_that_decoding_drops_may_begin_a_text_and_only_then(vocabularies):
    t5 = vocabularies[-1]
    spaced = next(i for i, data in enumerate(t5.token_bytes()) if data == b" the")
    for continues in (False, True):
        bits = start(RegularExpression("the cat"), t5, continues=continues).allowed()
        assert bool(bits[spaced // 32] >> (spaced % 32) & 1) is not continues


def test_a_constraint_goes_back_and_splits():
    vocabulary = ByteVocabulary()
    a, b, end = (int(i) for i in (*vocabulary.encode("ab"), 1))
    constraint = start(RegularExpression("a(b|a)b"), vocabulary)
    constraint.advance(a)
    other = constraint.copy()
    constraint.advance(b)
    constraint.advance(b)
    assert constraint.satisfied and not other.satisfied
    constraint.rewind(2)
    np.testing.assert_array_equal(constraint.allowed(), other.allowed())
    other.advance(a)
    assert not other.finished
    other.advance(b)
    assert other.finished and other.satisfied
    other.advance(end)
    assert other.finished
    with pytest.raises(ValueError, match="does not allow the token"):
        constraint.advance(end)


def test_bits_hold_the_logits():
    rng = np.random.default_rng(0)
    allowed, logits = rng.random((3, 70)) < 0.5, rng.normal(size=(3, 70)).astype(np.float32)
    bits = np.packbits(np.pad(allowed, ((0, 0), (0, 26))), axis=1, bitorder="little").view(np.uint32)
    assert bits.shape == (3, bit_words(70))
    got = keep_allowed(jnp.asarray(logits), jnp.asarray(bits))
    np.testing.assert_array_equal(got, np.where(allowed, logits, NEVER))


@pytest.mark.parametrize(
    "config, message",
    [
        (RegularExpression("[a-z"), r"The regular expression '\[a-z' is not one that texts can be held to: .*invalid"),
        (RegularExpression(r"[^\s\S]"), "allows no token of the vocabulary here, and the text may not end"),
        (JsonSchema("{'a'"), "JsonSchema.schema is no JSON"),
        (JsonSchema("[1]"), "JsonSchema.schema must be a JSON object"),
        (JsonSchema('{"type": "objct"}'), "is not one that texts can be held to: .*objct"),
        (JsonSchema('{"type": "integer", "minimum": 5, "maximum": 3}'), "Unsatisfiable schema"),
        (RegularExpression("abcdefghi"), r"cannot be satisfied in max_new_tokens=8; raise it"),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else type(x).__name__,
)
def test_what_no_text_can_be_is_one_sentence(config, message):
    with pytest.raises(ValueError, match=message) as error:
        start(config, ByteVocabulary(), max_new_tokens=8)
    assert "\n" not in str(error.value)


def test_what_the_vocabulary_cannot_spell_is_refused(vocabularies):
    with pytest.raises(ValueError, match="choose one that the vocabulary can spell"):
        start(JsonSchema('{"type": "object"}'), vocabularies[-1])
    with pytest.raises(ValueError, match="name an end id"):
        start(OneOf(("a",)), vocabularies[0], end_ids=())
    with pytest.raises(ValueError, match="none of them empty"):
        OneOf(("a", ""))
    assert start(RegularExpression("abcdefgh"), vocabularies[0], max_new_tokens=8).satisfied is False
