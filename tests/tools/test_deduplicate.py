"""The command line: planted duplicates go, the rest stays as it is, and the account adds up."""

import datetime
import gzip
import json
import pathlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm.data.vocabularies import SentencePieceVocabulary
from tools import deduplicate

ROOT = pathlib.Path(__file__).resolve().parents[2]

WORDS = (
    "the of and to that with have be harbour garden winter letter stone river morning voice window journey answer "
    "silver mountain question summer paper bridge forest evening captain market village shadow music corner "
    "distant careful narrow empty gentle sudden hidden broken ancient golden carry follow remember listen gather"
).split()


def text(seed, count=120):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def rows():
    """Twenty texts of their own; of the first five a copy in capitals, of the next five one with an end of its own."""
    made = [{"name": f"own {i}", "text": text(i), "kept": i} for i in range(20)]
    made += [{"name": f"copy {i}", "text": text(i).upper().replace(" ", "\t ")} for i in range(5)]
    made += [{"name": f"near {i}", "text": f"{text(i)} and so it ends {text(100 + i, 6)}"} for i in range(5, 10)]
    return [*made, {"name": "short", "text": "the end of it"}, {"name": "short too", "text": "and the end"}]


@pytest.fixture
def folder(tmp_path):
    """The rows in two files."""
    lines = [json.dumps(row) + "\n" for row in rows()]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(lines[:22]))
    (tmp_path / "in" / "b.jsonl").write_text("".join(lines[22:]))
    return tmp_path


def run(folder, *flags, data="in/*.jsonl", out="out"):
    """What remains, and the account."""
    account = folder / "account.json"
    paths = [f"--out={folder / out}", f"--account={account}"]
    deduplicate.main([str(folder / data), "--title=name", *paths, *flags])
    kept = [json.loads(line) for path in sorted((folder / out).iterdir()) for line in gzip.open(path, "rt")]
    return kept, json.loads(account.read_text())


def test_brackets_are_text(tmp_path, capsys):
    """Of forums and of markup; nothing of them is lost in print, and the account is there."""
    (tmp_path / "a.jsonl").write_text(2 * (json.dumps({"name": "a [/b]", "text": "x [/quote] [bold]kept y"}) + "\n"))
    kept, account = run(tmp_path, data="*.jsonl")
    assert len(kept) == 1 and account["kept"]["records"] == 1
    assert "[bold]kept" in capsys.readouterr().out


def test_what_json_lacks_is_said_before_the_work(tmp_path):
    rows = [{"text": "some words", "at": datetime.date(2020, 1, 1)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(SystemExit, match="deduplicate: The record .* cannot be a line of JSON: Object of type date"):
        deduplicate.main([str(tmp_path / "a.parquet"), f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_planted_duplicates_go_and_nothing_else(folder, capsys):
    kept, account = run(folder, "--filters")
    assert kept == rows()[:20]
    removed = {row["stage"]: row["removed"]["records"] for row in account["stages"] if row["removed"]["records"]}
    assert removed == {"length": 2, "exact duplicate": 5, "near duplicate": 5}
    printed = capsys.readouterr().out
    assert "20 of 32 records remain." in printed and "near 5" in printed and "own 5" in printed
    near = account["examples"]["near duplicate"]
    assert [(one["title"], one["duplicate_of"]["title"]) for one in near] == [
        (f"near {i}", f"own {i}") for i in range(5, 10)
    ]
    assert all(0.75 <= one["similarity"] < 1.0 for one in near)
    assert account["examples"]["exact duplicate"][0]["duplicate_of"]["title"] == "own 0"
    assert account["examples"]["length"][0]["text"] == "the end of it"


def test_the_account_adds_up(folder):
    """Each stage gets what the one before it left, in records, words and characters."""
    kept, account = run(folder, "--filters", "length", "letters")
    stages = account["stages"]
    assert [row["stage"] for row in stages] == ["length", "letters", "exact duplicate", "near duplicate"]

    def sizes(records):
        texts = [record["text"] for record in records]
        words = sum(len(text.split()) for text in texts)
        return {"records": len(texts), "words": words, "characters": sum(map(len, texts))}

    assert stages[0]["in"] == sizes(rows()) and stages[-1]["out"] == account["kept"] == sizes(kept)
    for row, after in zip(stages, [*stages[1:], {"in": account["kept"]}], strict=True):
        assert row["out"] == after["in"] == {unit: row["in"][unit] - row["removed"][unit] for unit in row["in"]}


def test_the_same_again_and_nothing_more(folder):
    """The same files give the same bytes; what remains goes through unchanged."""
    kept, account = run(folder, "--filters")
    again, same = run(folder, "--filters", out="again")
    assert again == kept and same == account
    for path in (folder / "out").iterdir():
        assert path.read_bytes() == (folder / "again" / path.name).read_bytes()
    twice, account = run(folder, "--filters", data="out", out="twice")
    assert twice == kept and not any(row["removed"]["records"] for row in account["stages"])


def test_stages_can_be_left_out(folder):
    kept, account = run(folder, "--exact_only")
    assert [row["stage"] for row in account["stages"]] == ["exact duplicate"]
    assert [row["name"].split()[0] for row in kept] == ["own"] * 20 + ["near"] * 5 + ["short"] * 2
    kept, _ = run(folder, "--similarity=0.99", out="close")
    assert len(kept) == 27


def test_tokens_are_counted_by_a_vocabulary(folder):
    path = str(ROOT / "jaxlm" / "data" / "assets" / "python_4k.model")
    _, account = run(folder, f"--vocabulary={path}")
    tokens = sum(len(SentencePieceVocabulary(path).encode(row["text"])) for row in rows())
    assert account["stages"][0]["in"]["tokens"] == tokens > account["kept"]["tokens"] > 0


def test_what_cannot_be_done_is_said(folder):
    with pytest.raises(SystemExit, match="deduplicate: .* has a record without a text 'body'; it has .*with --field"):
        run(folder, "--field=body")
    run(folder)
    with pytest.raises(SystemExit, match="deduplicate: .* has files in it; give --out an empty folder"):
        run(folder)
    with pytest.raises(SystemExit, match="deduplicate: No text at"):
        run(folder, data="nowhere/*", out="other")
