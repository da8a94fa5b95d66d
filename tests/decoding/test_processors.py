"""Logits processors do what they say: against definitions written with loops, and transformers where it is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.vocabularies import ByteVocabulary, PythonVocabulary
from jaxlm.decoding.bad_words import BadWords
from jaxlm.decoding.forced import ForcedBegin, ForcedEnd, MinNewTokens
from jaxlm.decoding.logit_bias import LogitBias
from jaxlm.decoding.penalties import CountPenalty, RepetitionPenalty
from jaxlm.decoding.processors import Texts, process
from jaxlm.decoding.repeats import NoRepeatNGram
from jaxlm.decoding.requests import Request
from jaxlm.decoding.sampling import NEVER
from jaxlm.decoding.vocabulary_filters import (
    EndingWith,
    Lowercase,
    Matching,
    OfLength,
    OnlyCharacters,
    PartOfAnagram,
    StartingWith,
    VocabularyFilter,
    WithCharacters,
    WithoutAccents,
    WithoutCharacters,
)

V, END = 12, 1
BYTES = ByteVocabulary(extra_ids=0)


def build(config, vocabulary=BYTES, vocab_size=V, end_ids=(END,)):
    return config.build(vocabulary, vocab_size=vocab_size, end_ids=end_ids)


run = jax.jit(process, static_argnums=0)


def applied(processors, logits, texts, options=None):
    """Logits through processors, as the engine calls them; `options` of each slot's request."""
    requests = [Request([1], options=o) for o in options or [{}] * len(logits)]
    states = [jax.tree.map(lambda *x: np.stack(x), *map(p.slot_state, requests)) for p in processors]
    return run(tuple(processors), jnp.asarray(logits), texts, states)


def some_texts(seed=0, slots=6, length=14):
    """Ragged rows over few ids, so that n-grams come again; what lies beyond a row's length must not matter."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, slots)
    prompts = np.array([rng.integers(0, n + 1) for n in lengths])
    rows = [rng.integers(2, 6, n).tolist() for n in lengths]
    tokens = rng.integers(2, V, (slots, length))
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    texts = Texts(*(jnp.asarray(x, jnp.int32) for x in (tokens, lengths, prompts)))
    logits = rng.normal(size=(slots, V)).astype(np.float32)
    return texts, rows, prompts.tolist(), logits


def repetition(ids, prompt, logits):
    return [x if i not in ids else x * 1.3 if x < 0 else x / 1.3 for i, x in enumerate(logits)]


def presence_frequency(ids, prompt, logits):
    new = ids[prompt:]
    return [x - 0.5 * (i in new) - 0.25 * new.count(i) for i, x in enumerate(logits)]


def no_ngram(n):
    def define(ids, prompt, logits):
        seen = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
        begun = ids[len(ids) - n + 1 :]
        return [NEVER if len(begun) == n - 1 and (*begun, i) in seen else x for i, x in enumerate(logits)]

    return define


WORDS = ((3,), (2, 4), (4, 2, 5), (2, 2, 2, 3))


def bad_words(ids, prompt, logits):
    return [
        NEVER if any(word == (*ids, i)[-len(word) :] for word in WORDS) else x  # a word longer than the text never is
        for i, x in enumerate(logits)
    ]


def begin(ids, prompt, logits):
    n = len(ids) - prompt
    return logits if n >= 3 else [0 if i == (7, 8, 9)[n] else NEVER for i in range(V)]


def end(ids, prompt, logits):
    return logits if len(ids) - prompt < 4 else [x if i == END else NEVER for i, x in enumerate(logits)]


def minimum(ids, prompt, logits):
    return [NEVER if i == END and len(ids) - prompt < 3 else x for i, x in enumerate(logits)]


def bias(ids, prompt, logits):
    return [x + {2: 1.5, 7: -2.0}.get(i, 0) for i, x in enumerate(logits)]


DEFINITIONS = {
    RepetitionPenalty(1.3): repetition,
    CountPenalty(presence=0.5, frequency=0.25): presence_frequency,
    NoRepeatNGram(1): no_ngram(1),
    NoRepeatNGram(2): no_ngram(2),
    NoRepeatNGram(3): no_ngram(3),
    BadWords(sequences=WORDS): bad_words,
    ForcedBegin(ids=(7, 8, 9)): begin,
    ForcedEnd(5): end,
    MinNewTokens(3): minimum,
    LogitBias(((2, 1.5), (7, -2.0))): bias,
}


@pytest.mark.parametrize("config", DEFINITIONS, ids=lambda config: type(config).__name__)
def test_a_processor_is_its_definition_with_loops(config):
    changed = False
    for seed in range(3):
        texts, rows, prompts, logits = some_texts(seed)
        got = applied([build(config)], logits, texts)
        wanted = [DEFINITIONS[config](ids, prompt, row) for ids, prompt, row in zip(rows, prompts, logits.tolist())]
        np.testing.assert_allclose(got, np.float32(wanted), rtol=1e-6)
        changed |= not np.array_equal(got, logits)
    assert changed, "these texts show nothing of the processor"


def test_processors_agree_with_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    pairs = (
        (RepetitionPenalty(1.3), theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        (NoRepeatNGram(2), theirs.NoRepeatNGramLogitsProcessor(2)),
        (NoRepeatNGram(3), theirs.NoRepeatNGramLogitsProcessor(3)),
        (BadWords(sequences=WORDS), theirs.NoBadWordsLogitsProcessor([list(word) for word in WORDS], END)),
        (MinNewTokens(3), theirs.MinNewTokensLengthLogitsProcessor(6, 3, END)),
        (LogitBias(((2, 1.5), (7, -2.0))), theirs.SequenceBiasLogitsProcessor([[[2], 1.5], [[7], -2.0]])),
        (ForcedEnd(5), theirs.ForcedEOSTokenLogitsProcessor(11, END)),
    )
    rng = np.random.default_rng(0)
    for length in (7, 10):
        tokens = rng.integers(2, 6, (16, length))
        logits = rng.normal(size=(16, V)).astype(np.float32)
        texts = Texts(jnp.asarray(tokens, jnp.int32), jnp.full(16, length), jnp.full(16, 6))
        for config, reference in pairs:
            got = np.asarray(applied([build(config)], logits, texts))
            wanted = reference(torch.tensor(tokens), torch.tensor(logits)).numpy()
            never = np.isneginf(wanted)
            np.testing.assert_array_equal(got == NEVER, never, err_msg=str(config))
            if isinstance(config, ForcedEnd) and length == 10:  # theirs sets the one token that is left to 0
                wanted[:, END] = logits[:, END]
            np.testing.assert_allclose(got[~never], wanted[~never], rtol=1e-6, err_msg=str(config))


def test_processors_compose_in_their_order_and_share_a_program():
    texts, _, _, logits = some_texts()
    before = run._cache_size()
    for strength in (1.1, 1.4):
        parts = [
            build(RepetitionPenalty(strength)),
            build(CountPenalty(strength)),
            build(MinNewTokens(int(strength * 3))),
        ]
        wanted = jnp.asarray(logits)
        for part in parts:
            states = jax.tree.map(lambda x: np.stack([x] * len(logits)), part.slot_state(Request([1])))
            wanted = part(wanted, texts, states)
        np.testing.assert_allclose(applied(parts, logits, texts), wanted, rtol=1e-6)
    assert run._cache_size() == before + 1
    assert not np.allclose(applied(parts[::-1], logits, texts), wanted, atol=1e-3)


def test_a_forced_end_and_a_forced_begin_win_over_what_forbids_them():
    texts, *_ = some_texts()
    forbidden = jnp.full((6, V), NEVER)
    ending = applied([build(ForcedEnd(1))], forbidden, texts)
    assert (jnp.argmax(ending, 1) == END).all()
    assert (jnp.argmax(applied([build(ForcedBegin(ids=(7,) * 20))], forbidden, texts), 1) == 7).all()


def test_a_request_may_bring_its_own_numbers():
    texts, rows, prompts, logits = some_texts()
    parts = [build(RepetitionPenalty(1.0)), build(CountPenalty()), build(MinNewTokens(1))]
    options = [{"repetition_penalty": 1.3}, {"frequency_penalty": 0.5}, {"min_new_tokens": 50}, {}, {}, {}]
    before = run._cache_size()
    got = applied(parts, logits, texts, options)
    np.testing.assert_array_equal(applied(parts, logits, texts)[3:], got[3:])
    assert run._cache_size() <= before + 1
    np.testing.assert_allclose(
        got[0, 2:], np.float32(repetition(rows[0], prompts[0], logits[0].tolist()))[2:], rtol=1e-6
    )
    np.testing.assert_allclose(got[1, 2:], [logits[1, i] - 0.5 * rows[1][prompts[1] :].count(i) for i in range(2, V)])
    assert got[2, END] == NEVER


def test_texts_tell_their_last_tokens():
    texts, rows, *_ = some_texts(slots=3, length=6)
    assert texts.last(8).tolist() == [[-1] * (8 - len(ids)) + ids for ids in rows]


# Vocabulary filters ---------------------------------------------------------------------------------------------

FILTERS = {
    (WithoutCharacters("e"), Lowercase(), WithoutAccents()): lambda text: not set("eEéÉ") & set(text),
    (WithoutCharacters("\n\t"), OnlyCharacters("abcdefghijklmnopqrstuvwxyz \n")): lambda text: all(
        c == " " or "a" <= c <= "z" for c in text
    ),
    (WithCharacters("o"),): lambda text: "o" in text,
    (Matching(r" ?[a-z]+"), OfLength(2, 4)): lambda text: text.strip().isalpha() and 2 <= len(text.strip()) <= 4,
    (StartingWith("re"), Lowercase()): lambda text: text.strip().lower().startswith("re"),
    (EndingWith("ing"),): lambda text: text.endswith("ing"),
    (PartOfAnagram("listen"),): lambda text: all(text.strip().count(c) <= "listen".count(c) for c in text.strip()),
}


@pytest.mark.parametrize("parts", FILTERS, ids=lambda parts: type(parts[0]).__name__)
def test_ten_thousand_drawn_tokens_violate_no_filter(parts):
    vocabulary = PythonVocabulary()
    config = VocabularyFilter(
        tuple(p for p in parts if hasattr(p, "allows")), tuple(p for p in parts if not hasattr(p, "allows"))
    )
    size, end = vocabulary.size + 5, vocabulary.info().eos_id
    processor = build(config, vocabulary, size, (end,))
    logits = 4 * jax.random.normal(jax.random.key(0), (10, size))
    texts = Texts(jnp.zeros((10, 1), jnp.int32), jnp.zeros(10, jnp.int32), jnp.zeros(10, jnp.int32))
    masked = applied([processor], logits, texts)
    below = np.cumsum(np.float64(jax.nn.softmax(masked)), axis=1)
    draws = np.random.default_rng(1).random((10, 1000)) * below[:, -1:]
    drawn = np.unique([np.searchsorted(row, points, side="right") for row, points in zip(below, draws, strict=True)])
    assert len(drawn) > 2
    pieces = vocabulary.token_bytes()
    assert all(FILTERS[parts](pieces[i].decode()) for i in drawn if i != end)
    # The masked distribution is the model's own, divided by the mass of what is allowed.
    allowed = np.asarray(masked[0] > NEVER)
    mass = jax.nn.logsumexp(jnp.where(allowed, logits, -jnp.inf), axis=1) - jax.nn.logsumexp(logits, axis=1)
    np.testing.assert_allclose(
        jax.nn.log_softmax(masked)[:, allowed], (jax.nn.log_softmax(logits) - mass[:, None])[:, allowed], atol=1e-4
    )


def test_parts_of_characters_are_not_drawn_under_a_filter():
    allowed = VocabularyFilter((WithoutCharacters("é"),)).allowed(BYTES.token_bytes())
    assert [i - 3 for i in np.flatnonzero(allowed)] == list(range(128))


def test_what_cannot_be_built_says_so():
    for config, message in (
        (
            VocabularyFilter((WithCharacters("ab"), WithoutCharacters("b"))),
            "No piece of the vocabulary passes WithChar.* and",
        ),
        (BadWords(sequences=((END,),)), "ends a text; use MinNewTokens"),
        (BadWords(sequences=((3, 99),)), "has the id 99, but the model's ids are 0 to 11"),
        (ForcedBegin(ids=(99,)), "ForcedBegin has the id 99"),
        (LogitBias(((-1, 1.0),)), "has the id -1"),
    ):
        with pytest.raises(ValueError, match=message):
            build(config, ByteVocabulary(extra_ids=0))
    with pytest.raises(ValueError, match="name an end id"):
        build(MinNewTokens(3), end_ids=())
    for make in (
        lambda: RepetitionPenalty(0.0),
        lambda: NoRepeatNGram(0),
        lambda: BadWords(),
        lambda: BadWords(words=("",)),
        lambda: ForcedBegin("a", (1,)),
        lambda: MinNewTokens(0),
        lambda: ForcedEnd(0),
        lambda: VocabularyFilter(()),
        lambda: Matching("("),
    ):
        with pytest.raises(ValueError):
            make()


def test_bad_words_are_those_of_the_text_with_and_without_a_space():
    processor = build(BadWords(words=("ab",)), BYTES, BYTES.size)
    python = PythonVocabulary()  # puts a space before every text, which a word has not
    before, last = build(BadWords(words=("return",)), python, python.size).arguments
    forbidden = [[i for i in (*row, end) if i >= 0] for row, end in zip(before.tolist(), last.tolist(), strict=True)]
    assert [b"".join(python.token_bytes()[i] for i in ids) for ids in forbidden] == [b"return", b" return"]
    a, b, space = (int(BYTES.encode(c)[0]) for c in "ab ")
    texts = Texts(jnp.array([[space, a], [a, a], [a, b]]), jnp.full(3, 2), jnp.zeros(3, jnp.int32))
    never = np.asarray(applied([processor], jnp.zeros((3, BYTES.size)), texts) == NEVER)
    assert never.sum() == 2 and never[0, b] and never[1, b]
