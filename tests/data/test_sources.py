"""Sources: every kind of file, splits that do not overlap, streaming, and one clear sentence for what is bad."""

import gzip
import json

import numpy as np
import pytest

from jaxlm.data import sources
from jaxlm.data.records import decode_record, encode_record
from jaxlm.data.sources import ArrayRecordSource, InMemory, LibraryText, StandardLibrary, TextFiles, TfdsSource
from tests.data.tfds_files import write_tfds


def read(source, split):
    return [record for shard in source.shards(split) for record in source.read(shard)]


def texts(source, split):
    return [record["text"] for record in read(source, split)]


# Standard library -----------------------------------------------------------------------------------------------


def test_the_standard_library_splits_by_module_and_keeps_english_from_code():
    source = StandardLibrary()
    train, validation = source.shards("train"), source.shards("validation")
    names = [{name for shard in shards for _, name in shard.parts} for shards in (train, validation)]
    assert not names[0] & names[1]
    assert {"collections.__init__", "json.decoder"} <= names[0] | names[1]
    assert not any(".test" in name or name.startswith(("test.", "encodings.")) for name in names[0] | names[1])
    # 5% of the modules, give or take four standard deviations of so few.
    count = len(names[0]) + len(names[1])
    assert abs(len(names[1]) / count - 0.05) < 4 * np.sqrt(0.05 * 0.95 / count)
    assert train == source.shards("train")
    shard = validation[0]
    english = [record["text"] for record in StandardLibrary(LibraryText.ENGLISH).read(shard)]
    code = [record["text"] for record in StandardLibrary(LibraryText.CODE).read(shard)]
    assert sum("import " in text for text in code) > 0.5 * len(code)
    assert sum("\ndef " in text for text in english) == 0
    assert len(list(source.read(shard))) == len(english) + len(code)


# Files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    """One folder with every kind of file, each with the documents of its name."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("text äöü\n")
    (tmp_path / "b.md").write_text("markdown")
    (tmp_path / "deep" / "c.py").write_text("print()\n")
    (tmp_path / "d.jsonl").write_text('{"text": "line 1"}\n\n{"text": "line 2", "n": 3}\n')
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"zipped text"))
    parquet.write_table(pyarrow.table({"text": ["row 1", "row 2"]}), tmp_path / "g.parquet")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    return tmp_path


def test_all_kinds_of_files_are_read_in_order(corpus):
    source = TextFiles(str(corpus), validation=str(corpus / "a.txt"))
    expected = ["text äöü\n", "markdown", "line 1", "line 2", "print()\n", "zipped", "zipped text", "row 1", "row 2"]
    assert texts(source, "train") == expected
    assert texts(source, "validation") == ["text äöü\n"]
    assert texts(TextFiles((str(corpus / "*.md"), str(corpus / "d.jsonl")), held_out=0.0), "train") == [
        "markdown",
        "line 1",
        "line 2",
    ]
    assert read(TextFiles(str(corpus / "d.jsonl"), held_out=0.0), "train")[1] == {"text": "line 2", "n": 3}


def test_a_glob_reads_folders_at_any_depth(tmp_path):
    """The README's pattern, books/**/*.txt, is all text in the folder."""
    folder = tmp_path
    for depth in range(3):
        (folder / "notes.pdf").write_bytes(b"%PDF")
        (folder / f"{depth}.txt").write_text(f"at depth {depth}")
        folder = folder / "deeper"
        folder.mkdir()
    found = [texts(TextFiles(str(path), held_out=0.0), "train") for path in (tmp_path / "**" / "*.txt", tmp_path)]
    assert found[0] == found[1] == [f"at depth {depth}" for depth in range(3)]


def test_a_changed_file_changes_the_digest(corpus):
    source = TextFiles(str(corpus / "a.txt"), held_out=0.0)
    before = source.shards("train")
    assert source.shards("train") == before
    (corpus / "a.txt").write_text("other text")
    assert source.shards("train")[0].digest != before[0].digest


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("limit", [64 << 20, 1000])
def test_held_out_text_and_the_rest_are_the_whole(tmp_path, monkeypatch, suffix, limit):
    """Few plain files lose their end, lines are chosen by hash; ranges of large files leave no gaps."""
    monkeypatch.setattr(sources, "_RANGE", limit)
    lines = [f"line {i} " + "ä" * (i % 37) for i in range(400)]
    body = "\n".join(lines if "txt" in suffix else (json.dumps({"text": line}) for line in lines)).encode() + b"\n"
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(gzip.compress(body) if suffix.endswith("gz") else body)
    source = TextFiles(str(path), held_out=0.1, document_bytes=300)
    train, validation = texts(source, "train"), texts(source, "validation")
    if "txt" in suffix:
        assert "".join(train + validation).encode() == body
        assert all(len(text.encode()) <= 2 * 300 for text in train)
        assert abs(len("".join(validation).encode()) / len(body) - 0.1) < 0.02
    else:
        assert sorted(train + validation) == sorted(lines)
        assert not set(train) & set(validation)
        assert 10 <= len(validation) <= 80


def test_many_small_files_are_held_out_whole_and_share_shards(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03d}.txt").write_text(f"document {i}")
    source = TextFiles(str(tmp_path), held_out=0.1)
    train, validation = texts(source, "train"), texts(source, "validation")
    assert sorted(train + validation) == sorted(f"document {i}" for i in range(300))
    assert 10 <= len(validation) <= 60
    assert len(source.shards("train")) == 1


def test_a_long_file_is_read_in_pieces_with_one_warning(tmp_path, caplog):
    path = tmp_path / "long.txt"
    path.write_text("wörd " * 2000)  # no line end to cut at
    (tmp_path / "longer.txt").write_text("word\n" * 3000)
    source = TextFiles(str(tmp_path), held_out=0.0, document_bytes=1000)
    pieces = texts(source, "train")
    source.shards("train")
    assert "".join(pieces) == "wörd " * 2000 + "word\n" * 3000
    assert max(len(piece.encode()) for piece in pieces) <= 2000
    assert [r.message for r in caplog.records if "longer than a document may be" in r.message and "long" in r.message]
    assert len(caplog.records) == 1


# Data sets ------------------------------------------------------------------------------------------------------


def test_records_round_trip_through_array_record(tmp_path):
    from array_record.python import array_record_module

    example = {
        "inputs": np.arange(5, dtype=np.int32),
        "targets": np.zeros(0, np.int32),
        "text": "ünï",
        "x": np.ones((2, 3)),
    }
    again = decode_record(encode_record(example))
    assert again["text"] == "ünï" and again["x"].shape == (2, 3) and again["targets"].dtype == np.int32
    np.testing.assert_array_equal(again["inputs"], example["inputs"])
    for part in range(2):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / f"train-{part:05d}.array_record"), "group_size:1")
        for i in range(3):
            writer.write(encode_record({"targets": np.array([part, i], np.int32)}))
        writer.close()
    source = ArrayRecordSource(str(tmp_path))
    assert [r["targets"].tolist() for r in read(source, "train")] == [[p, i] for p in range(2) for i in range(3)]
    with pytest.raises(ValueError, match="has no split 'validation'"):
        source.shards("validation")
    (tmp_path / "test-00000.array_record").write_bytes(b"nonsense" * 100)
    with pytest.raises(ValueError, match="is not a readable ArrayRecord file"):
        read(source, "test")


DOCUMENTS = [{"text": f"document {i}"} for i in range(10)]


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_tfds_data_sets_are_read_by_name(tmp_path, kind):
    pytest.importorskip("tensorflow_datasets")
    path = write_tfds(tmp_path / "tiny" / "1.0.0", kind, DOCUMENTS)
    splits = (("train", "train[:70%]"), ("validation", "train[70%:]"))
    source = TfdsSource("tiny", str(tmp_path), splits)
    assert texts(source, "train") == [f"document {i}" for i in range(7)]
    assert texts(source, "validation") == [f"document {i}" for i in range(7, 10)]
    assert len(texts(TfdsSource(str(tmp_path / "tiny" / "1.0.0")), "train")) == 10
    with pytest.raises(ValueError, match="has no split 'validation'; it has train"):
        TfdsSource("tiny", str(tmp_path)).shards("validation")
    with pytest.raises(ValueError, match="TFDS knows no data set 'tinny'"):
        TfdsSource("tinny", str(tmp_path)).shards("train")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path.name}.*(inside a record|not a readable)"):
        texts(TfdsSource("tiny", str(tmp_path)), "train")


def test_tfds_needs_neither_tensorflow_nor_jax(run_python, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    write_tfds(tmp_path / "tiny" / "1.0.0", "tfrecord", DOCUMENTS)
    run_python(
        "import sys\n"
        "from jaxlm.data.sources import TfdsSource\n"
        f"source = TfdsSource('tiny', {str(tmp_path)!r})\n"
        "assert len([r for s in source.shards('train') for r in source.read(s)]) == 10\n"
        "assert not {'tensorflow', 'jax'} & set(sys.modules)\n"
    )


def test_real_c4_in_tfds_layout(shared_data):
    source = TfdsSource(str(shared_data / "pretrain" / "c4_en_mini" / "tfds" / "en" / "3.1.0"))
    assert len(texts(source, "train")) == 1000
    assert len(texts(source, "validation")) == 200


# Bad input (law 8): one sentence that names the thing and the remedy ----------------------------------------------


def bad_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin1") * 3)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": oops}\n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a long enough line"}\n' * 9)[:-12])
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latin.txt", r"latin.txt is not UTF-8 \(.*b'\\xe9.*iconv"),
        ("bad.jsonl", r"bad.jsonl has a line at byte 17 that is not JSON .*one object a line"),
        ("list.jsonl", r"list.jsonl has a line at byte 0 that is not an object but list"),
        ("torn.jsonl.gz", r"torn.jsonl.gz cannot be read .*repair it or leave it out"),
        ("bad.parquet", r"bad.parquet is not a readable parquet file"),
        ("notes.pdf", r"No text at .*notes.pdf': none of the 1 files there is of a known kind; give a folder"),
        ("missing*.txt", r"No text at .*nothing is there; give a folder, file or glob of .txt"),
    ],
)
def test_bad_files_give_one_sentence(tmp_path, name, message):
    bad_files(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        read(TextFiles(str(tmp_path / name), held_out=0.0), "train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_halves_of_characters_are_replaced_and_said(tmp_path, caplog, suffix):
    """A text cut inside an emoji: escaped, or as bytes that are not quite UTF-8, in fields, lists and names."""
    lines = [
        rb'{"text": "whole \ud83d\ude42, \\ud83d as text"}',
        rb'{"text": "cut \ud83d", "more": ["\uDE42 cut"], "\ud83d": {"a": "\ude42\ud83d"}}',
        b'{"text": "bytes \xed\xa0\xbd."}',
    ]
    path = tmp_path / f"web{suffix}"
    path.write_bytes(gzip.compress(b"\n".join(lines)) if suffix.endswith("gz") else b"\n".join(lines))
    found = read(TextFiles(str(path), held_out=0.0), "train")
    assert found[0] == {"text": "whole 🙂, \\ud83d as text"}
    assert found[1] == {"text": "cut �", "more": ["� cut"], "�": {"a": "��"}}
    assert found[2]["text"].startswith("bytes �") and found[2]["text"].endswith(".")
    json.dumps(found, ensure_ascii=False).encode()
    (said,) = caplog.messages
    assert f"{path} has halves of characters" in said and "2 lines" in said and f"byte {len(lines[0]) + 1}" in said


def test_a_line_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LINE_LIMIT", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 2000 + '"}\n')
    with pytest.raises(ValueError, match="a.jsonl has a line longer than"):
        read(TextFiles(str(tmp_path / "a.jsonl"), held_out=0.0), "train")


def test_unknown_and_empty_splits_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for source in (StandardLibrary(), TextFiles(str(tmp_path)), InMemory(("a",))):
        with pytest.raises(ValueError, match=f"{type(source).__name__} has no split 'test'; it has train, validation"):
            source.shards("test")
    with pytest.raises(ValueError, match="InMemory has nothing in its validation split"):
        InMemory(("a",)).shards("validation")
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text("text")
    with pytest.raises(ValueError, match="The validation split of .* is empty.*TextFiles.validation"):
        TextFiles(str(tmp_path), held_out=1e-9).shards("validation")
