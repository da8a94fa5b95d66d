"""The tables in docs/scaling.md are those of the committed plans."""

from benchmarks.plan import GUIDE, guide_with_results


def test_the_guide_shows_the_committed_plans():
    text = GUIDE.read_text()
    assert "<!-- plan: decoder_1b -->" in text
    assert guide_with_results(text) == text, (
        "docs/scaling.md is out of date; run python -m benchmarks.plan --only floor"
    )
