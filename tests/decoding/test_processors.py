"""Logits processors do what they say: against definitions written with loops, and transformers where it is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.vocabularies import ByteVocabulary, PythonVocabulary
from jaxlm.decoding.bad_words import BadWords
from jaxlm.decoding.forced import ForcedBegin, ForcedEnd, MinNewTokens
from jaxlm.decoding.history import History, process
from jaxlm.decoding.logit_bias import LogitBias
from jaxlm.decoding.penalties import CountPenalty, RepetitionPenalty
from jaxlm.decoding.repeats import NoRepeatNGram
from jaxlm.decoding.sample import NEVER
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


def histories(seed=0, slots=6, length=14):
    """Ragged rows over few ids, so that n-grams come again; what lies beyond a row's length must not matter."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, slots)
    prompts = np.array([rng.integers(0, n + 1) for n in lengths])
    rows = [rng.integers(2, 6, n).tolist() for n in lengths]
    tokens = rng.integers(2, V, (slots, length))
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    history = History(*(jnp.asarray(x, jnp.int32) for x in (tokens, lengths, prompts)))
    logits = rng.normal(size=(slots, V)).astype(np.float32)
    return history, rows, prompts.tolist(), logits


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
        history, rows, prompts, logits = histories(seed)
        got = jax.jit(process)([build(config)], jnp.asarray(logits), history)
        wanted = [DEFINITIONS[config](ids, prompt, row) for ids, prompt, row in zip(rows, prompts, logits.tolist())]
        np.testing.assert_allclose(got, np.float32(wanted), rtol=1e-6)
        changed |= not np.array_equal(got, logits)
    assert changed, "these histories show nothing of the processor"


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
        history = History(jnp.asarray(tokens, jnp.int32), jnp.full(16, length), jnp.full(16, 6))
        for config, reference in pairs:
            got = np.asarray(build(config)(jnp.asarray(logits), history))
            wanted = reference(torch.tensor(tokens), torch.tensor(logits)).numpy()
            never = np.isneginf(wanted)
            np.testing.assert_array_equal(got == NEVER, never, err_msg=str(config))
            if isinstance(config, ForcedEnd) and length == 10:  # theirs sets the one token that is left to 0
                wanted[:, END] = logits[:, END]
            np.testing.assert_allclose(got[~never], wanted[~never], rtol=1e-6, err_msg=str(config))


def test_processors_compose_in_their_order_and_share_a_program():
    history, _, _, logits = histories()
    run = jax.jit(lambda *args: process(*args))  # with a cache of its own
    for strength in (1.1, 1.4):
        parts = [
            build(RepetitionPenalty(strength)),
            build(CountPenalty(strength)),
            build(MinNewTokens(int(strength * 3))),
        ]
        wanted = jnp.asarray(logits)
        for part in parts:
            wanted = part(wanted, history)
        np.testing.assert_allclose(run(parts, jnp.asarray(logits), history), wanted, rtol=1e-6)
    assert run._cache_size() == 1
    assert not np.allclose(run(parts[::-1], jnp.asarray(logits), history), wanted, atol=1e-3)


def test_a_forced_end_and_a_forced_begin_win_over_what_forbids_them():
    history, *_ = histories()
    forbidden = jnp.full((6, V), NEVER)
    ending = build(ForcedEnd(1))(forbidden, history)
    assert (jnp.argmax(ending, 1) == END).all()
    assert (jnp.argmax(build(ForcedBegin(ids=(7,) * 20))(forbidden, history), 1) == 7).all()


def test_a_history_grows_is_taken_and_tells_its_last_tokens():
    history, rows, *_ = histories(slots=3, length=6)
    room = History(jnp.pad(history.tokens, ((0, 0), (0, 2))), history.lengths, history.prompt_lengths)
    grown = room.push(jnp.array([9, 10, 11]), keep=jnp.array([True, False, True]))
    wanted = [rows[0] + [9], rows[1], rows[2] + [11]]
    for row, length, ids in zip(grown.tokens, grown.lengths, wanted, strict=True):
        assert row[:length].tolist() == ids
    assert grown.take(jnp.array([2, 2])).lengths.tolist() == [len(wanted[2])] * 2
    assert grown.last(8).tolist() == [[-1] * (8 - len(ids)) + ids for ids in wanted]


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
    history = History(jnp.zeros((10, 1), jnp.int32), jnp.zeros(10, jnp.int32), jnp.zeros(10, jnp.int32))
    masked = processor(logits, history)
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
    a, b, space = (int(BYTES.encode(c)[0]) for c in "ab ")
    history = History(jnp.array([[space, a], [a, a], [a, b]]), jnp.full(3, 2), jnp.zeros(3, jnp.int32))
    never = np.asarray(processor(jnp.zeros((3, BYTES.size)), history) == NEVER)
    assert never.sum() == 2 and never[0, b] and never[1, b]
