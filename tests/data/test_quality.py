"""Rules of quality: each finds the text that breaks it and no rule before it, and lets plain prose through."""

import pytest

from jaxlm.data.quality import RULES, Quality

LINES = [
    "The harbour lay quiet when our ship came in, and nobody stood on the long pier to greet us.",
    "A thin rain was falling over roofs that have seen better days, and over gardens full of weeds.",
    "We carried two heavy chests up a narrow lane with the help of a boy who asked for nothing.",
    "Behind every shutter someone seemed to listen, though no voice could be heard from within.",
    "At last my brother knocked at a green door; it opened slowly, as if it had waited for years.",
]
PROSE = " ".join(LINES)
PHRASE = "nothing ever changes here except perhaps the colour of those old boats"

BREAKING = {
    "length": "Far too short to be of any use.",
    "token_length": f"{PROSE} " + "incomprehensibilities " * 90,
    "symbols": f"{PROSE} " + "#harbour #quiet " * 6,
    "bullets": "\n".join(f"- {line}" for line in LINES),
    "ellipses": "\n".join([*LINES[:3], *(f"{line[:-1]}..." for line in LINES[3:])]),
    "letters": f"{PROSE} " + " ".join(str(1000 + 7 * i) for i in range(30)),
    "stop_words": " ".join(f"solitary noun{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(40)),
    "repeated_lines": "\n".join([*LINES, *[LINES[0]] * 3]),
    "repeated_paragraphs": "\n\nSo it was.\n\n".join(["\n".join(LINES[:2]), "\n".join(LINES[2:4]), LINES[4], ""]),
    "frequent_ngrams": PROSE.replace("the ", "the glittering chandelier ").replace(" a ", " a glittering chandelier "),
    "repeated_ngrams": f"{PROSE} {PHRASE}, yes, {PHRASE}, indeed, {PHRASE}.",
}


def test_prose_keeps_all_rules():
    assert Quality().broken(PROSE) is None and Quality().broken("\n\n".join(LINES)) is None
    assert Quality(rules=()).broken("") is None
    assert BREAKING.keys() == RULES.keys() == set(Quality().asked)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_finds_what_breaks_it(rule):
    """Alone, and as the first of all that are asked."""
    text = BREAKING[rule]
    assert Quality().broken(text) == rule == Quality(rules=(rule,)).broken(text)
    assert Quality(rules=(rule,)).broken(PROSE) is None


def test_limits_are_within():
    """50 tokens are enough, half the lines may be half the limit's; what is there once is not frequent."""
    fifty = " ".join(["word"] * 50)
    length = Quality(rules=("length",))
    assert length.broken(fifty) is None and length.broken(fifty[:-5]) == "length"
    symbols = Quality(rules=("symbols",))
    assert symbols.broken("# " + "a " * 9) is None and symbols.broken("# " + "a " * 8) == "symbols"
    lines = Quality(rules=("repeated_lines",), repeated_lines=(0.5, 1.0))
    assert lines.broken("a\na\nb\nb") is None and lines.broken("a\na\na\nb\nb") == "repeated_lines"
    by_size = Quality(rules=("repeated_lines",), repeated_lines=(1.0, 0.4))
    assert by_size.broken("aaa\naaa\nb") == "repeated_lines" and by_size.broken("aaaa\nb\nb") is None
    assert Quality(rules=("frequent_ngrams",)).broken("a b c") is None


def test_characters_of_ngrams_count_once():
    """Of "ab ab ab cdef" the N-gram "ab ab" has 6 of 10 letters, and "ab ab" is there again with 4 of them."""
    text = "ab ab ab cdef"
    for limit, rule in ((0.59, "frequent_ngrams"), (0.6, None)):
        assert Quality(rules=("frequent_ngrams",), frequent_ngrams=((2, limit),)).broken(text) == rule
    for limit, rule in ((0.39, "repeated_ngrams"), (0.4, None)):
        assert Quality(rules=("repeated_ngrams",), repeated_ngrams=((2, limit),)).broken(text) == rule


def test_an_unknown_rule_is_said():
    with pytest.raises(ValueError, match="Quality.rules has 'spelling'; there are length, token_length"):
        Quality(rules=("spelling",))
