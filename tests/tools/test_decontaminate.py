"""The command line: an account for people, one for programs, and files without what evaluation data have."""

import gzip
import json

import pytest

from tools import decontaminate

SHARED = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "eval" / "riddles").mkdir(parents=True)
    (tmp_path / "eval" / "riddles" / "test.jsonl").write_text(json.dumps({"q": SHARED}) + "\n" + json.dumps({"q": "x"}))
    book = "A quiet street. " * 40 + SHARED + " and so on. " * 40
    rows = [{"name": "Counting", "text": book}, {"name": "Other", "text": "nothing of the kind"}]
    (tmp_path / "books.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path, book


def run(folder, *flags):
    decontaminate.main([f"{folder}/books.jsonl", "--against", f"{folder}/eval/*/*.jsonl", "--title", "name", *flags])


def kept(folder):
    (path,) = folder.iterdir()
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_whole_records(files, capsys):
    folder, book = files
    run(folder, f"--out={folder / 'out'}", f"--account={folder / 'account.json'}")
    assert "1 of 2 records share an N-gram" in capsys.readouterr().out.replace("\n", " ")
    assert [record["name"] for record in kept(folder / "out")] == ["Other"]
    account = json.loads((folder / "account.json").read_text())
    assert (
        account["records_hit_by"] == account["ngrams_shared_with"] == account["evaluation_rows_hit"] == {"riddles": 1}
    )
    (hit,) = account["hits"]
    assert (hit["title"], hit["ngrams"], hit["kept"]) == ("Counting", [SHARED], 0)
    assert account["characters_gone"] == len(book) + len("Counting")


def test_windows(files):
    folder, book = files
    run(folder, "--windows", f"--out={folder / 'out'}")
    at = book.index(SHARED)
    pieces = [book[: at - 200], book[at + len(SHARED) + 200 :]]
    assert [r["text"] for r in kept(folder / "out")] == [*pieces, "nothing of the kind"]


def test_what_cannot_be_done_is_said(files):
    folder, _ = files
    with pytest.raises(SystemExit, match="decontaminate: No file of evaluation data is at 'nowhere/.'"):
        decontaminate.main([f"{folder}/books.jsonl", "--against", "nowhere/*"])
    run(folder, f"--out={folder / 'out'}")
    with pytest.raises(SystemExit, match="is there already; give --out an empty folder"):
        run(folder, f"--out={folder / 'out'}")
    with pytest.raises(SystemExit, match="Windows.field is 'body', but a record has the texts"):
        run(folder, "--windows", "--field=body")
