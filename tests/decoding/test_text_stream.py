"""Text comes out of a stream as the vocabulary would decode it, and ends before a stop string however it is cut."""

import itertools

import numpy as np
import pytest

from jaxlm.data.vocabularies import ByteVocabulary, PythonVocabulary, SentencePieceVocabulary
from jaxlm.decoding.text_stream import TextStream, pieces_of

TEXT = "def naïve(x):\n    return '東京 🙂'  # END of  it\n"


def streamed(vocabulary, ids, **options):
    """(the parts that came out, one a token and the last; the stream)."""
    stream = TextStream(pieces_of(vocabulary), **options)
    return [*(stream.push([i]) for i in ids), stream.finish()], stream


def characters(text, stop):
    """The definition: letter by letter, the text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.fixture(scope="module")
def vocabularies(shared_data):
    t5 = SentencePieceVocabulary(str(shared_data / "tokenizers" / "t5_base_32000.spm.model"))
    return [ByteVocabulary(), PythonVocabulary(), t5]


def test_a_stream_is_what_the_vocabulary_decodes(vocabularies):
    for vocabulary in vocabularies:
        info = vocabulary.info()
        ids = [*vocabulary.encode(TEXT), info.sentinel_ids[0], *vocabulary.encode("x y"), info.eos_id]
        parts, stream = streamed(vocabulary, ids)
        assert "".join(parts) == vocabulary.decode(ids), vocabulary
        assert stream.count == len(ids) and stream.stopped is None
        assert "\ufffd" not in "".join(parts)  # no character came out in halves
        whole = vocabulary.decode([*vocabulary.encode("a"), *ids])
        continued, _ = streamed(vocabulary, ids, continues=True)
        assert vocabulary.decode(vocabulary.encode("a")) + "".join(continued) == whole
        for spaces in (" ", "  ", "    "):
            ids = vocabulary.encode(spaces + "x y")
            assert "".join(streamed(vocabulary, ids)[0]) == vocabulary.decode(ids), vocabulary
        # A table may have more rows than the vocabulary has ids.
        assert "".join(streamed(vocabulary, [vocabulary.size + 3])[0]) == vocabulary.decode([vocabulary.size + 3])


def test_bytes_that_are_no_text_are_replaced_as_they_are_when_decoded():
    vocabulary = ByteVocabulary()
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, vocabulary.size, 60)
        assert "".join(streamed(vocabulary, ids)[0]) == vocabulary.decode(ids)


def test_a_stop_string_ends_the_text_however_it_is_cut_into_tokens():
    """All texts of seven letters, as letters and in every grouping: nothing comes out that has to be taken back."""
    stop = ("aab", "ba", "bbb", "aaaaa")
    pieces = pieces_of(ByteVocabulary())
    for letters in itertools.product("ab", repeat=7):
        text = "".join(letters)
        wanted, why = characters(text, stop)
        for cuts in range(0, 64, 5):
            stream, ids = TextStream(pieces, stop=stop), ByteVocabulary().encode(text)
            groups = np.split(ids, [i + 1 for i in range(6) if cuts >> i & 1])
            parts = [stream.push(group) for group in groups]
            for i in range(len(parts)):
                assert wanted.startswith("".join(parts[: i + 1]))
            assert ("".join(parts) + stream.finish(), stream.stopped) == (wanted, why), (text, cuts)
            assert stream.count == (len(text) if why is None else len(wanted) + len(why))


def test_stop_strings_cross_tokens_and_characters(vocabularies):
    for vocabulary in vocabularies:
        ids = vocabulary.encode(TEXT)
        shown = vocabulary.decode(ids)
        for stop in ("京 🙂", "naïve(", "END of", "<extra_id_0>"):
            if "⁇" in shown and stop not in shown:
                continue  # T5's pieces have neither Japanese nor line ends
            parts, stream = streamed(vocabulary, [*ids, vocabulary.info().sentinel_ids[0]], stop=("nowhere", stop))
            assert "".join(parts) == (shown + "<extra_id_0>").split(stop)[0] and stream.stopped == stop
        parts, stream = streamed(vocabulary, ids, stop=("it\n\n", "of  it!"))
        assert "".join(parts) == shown and stream.stopped is None


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="an empty one, which would end every text; remove it"):
        TextStream(pieces_of(ByteVocabulary()), stop=("a", ""))
