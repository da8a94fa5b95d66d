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
    """A record as a line."""
    return json.dumps(record, ensure_ascii=False) + "\n"


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
    with (
        open(partial, "wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as file,
    ):
        yield file
    os.replace(partial, path)
