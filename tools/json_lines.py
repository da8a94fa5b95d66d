"""What command lines write records to: a folder of gzipped JSON lines, the same bytes for the same records."""

import contextlib
import gzip
import io
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO

from jaxlm.data.sources import Record


def line_of(record: Record) -> str:
    """A record as a line.

    Raises:
      ValueError: it has a value that JSON lacks, say a date of a parquet file.
    """
    try:
        return json.dumps(record, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise ValueError(f"The record {str(record)[:80]!r} cannot be a line of JSON: {error}.") from error


@contextlib.contextmanager
def written(folder: pathlib.Path, number: int) -> Iterator[IO[str]]:
    """The file `part-<number>.jsonl.gz` of a folder, to be written; it has its name when it is complete.

    Raises:
      ValueError: it is there already.
    """
    path = folder / f"part-{number:05}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise ValueError(f"{path} is there already; give --out an empty folder.")
    partial = path.with_name(path.name + ".partial")
    try:
        with (
            open(partial, "wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8") as file,
        ):
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
