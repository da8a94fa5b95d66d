"""Leaves out of training files what shares 13 words in a row with evaluation data, and prints the account.

python -m tools.decontaminate 'books/*.jsonl.gz' --against 'eval/*/*.jsonl.gz'
python -m tools.decontaminate 'books/*.jsonl.gz' --against 'eval/*/*.jsonl.gz' --windows --out clean --account hits.json
python -m tools.decontaminate pairs.jsonl --against copa=eval/copa/validation.jsonl piqa=eval/piqa/*.jsonl --out clean

Without --out nothing is written but the account. A record that is hit goes as a whole; with --windows it loses 200
characters either side of each hit, and its pieces become records (GPT-3's way, arXiv 2005.14165, appendix C). In
training `jaxlm.data.decontamination.Decontaminate` does the same as a preprocessor.
"""

import argparse
import collections
import contextlib
import dataclasses
import glob
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxlm.data.decontamination import Decontaminate, Overlap, Windows, summary
from jaxlm.data.sources import TextFiles
from tools.json_lines import line_of, written


def evaluation_data(patterns: list[str]) -> dict[str, TextFiles]:
    """{name: files}; without a name, that of the folder that a file lies in."""
    files: dict[str, list[str]] = collections.defaultdict(list)
    for pattern in patterns:
        name, named, pattern = pattern.rpartition("=")
        found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not found:
            raise ValueError(f"No file of evaluation data is at {pattern!r}; give their paths or globs to --against.")
        for path in found:
            files[name if named else pathlib.Path(path).resolve().parent.name].append(path)
    return {name: TextFiles(tuple(paths), held_out=0.0) for name, paths in files.items()}


def decontaminate(data: TextFiles, step: Decontaminate, out: pathlib.Path | None, title: str | None) -> dict[str, Any]:
    """Goes through the data, writes what remains, and returns the account as JSON has it.

    Args:
      data: training data.
      step: what is compared with.
      out: folder for files of JSON lines; None writes nothing.
      title: field that names a record in the account; None numbers them.
    """
    overlaps: list[Overlap] = []
    hits, records, characters = [], 0, 0
    for number, shard in enumerate(data.shards("train")):
        with contextlib.ExitStack() as stack:
            file = None if out is None else stack.enter_context(written(out, number))
            for record, kept, overlap in step.examine(data.read(shard)):
                records += 1
                characters += sum(len(value) for value in record.values() if isinstance(value, str))
                if file is not None:
                    file.writelines(map(line_of, kept))
                if overlap is not None:
                    overlaps.append(overlap)
                    name = record.get(title) if title else None
                    hits.append({"title": name or f"record {records - 1}", **dataclasses.asdict(overlap)})
    shared = collections.Counter()
    for overlap in overlaps:
        shared.update(overlap.shared)
    return {
        "n": step.n,
        "windows": step.windows and dataclasses.asdict(step.windows),
        "records": records,
        "characters": characters,
        "summary": summary(overlaps, records) if overlaps else f"None of {records} records shares an N-gram.",
        "records_hit_by": dict(collections.Counter(n for o in overlaps for n in o.shared).most_common()),
        "ngrams_shared_with": dict(shared.most_common()),
        "evaluation_rows_hit": step.rows_of(overlaps) if overlaps else {},
        "characters_gone": sum(o.characters - o.kept for o in overlaps),
        "hits": hits,
    }


def print_account(account: Mapping[str, Any], shown: int) -> None:
    """The account for people."""
    console = Console(markup=False)  # texts may have brackets
    table = Table(title=account["summary"], title_justify="left")
    for name in ("record", "shares with", "characters", "kept", "pieces", "first N-gram"):
        table.add_column(name, justify="right" if name in ("characters", "kept", "pieces") else "left")
    for hit in account["hits"][:shown]:
        shared = ", ".join(f"{name} {count}" for name, count in hit["shared"].items())
        numbers = (f"{hit[name]:,}" for name in ("characters", "kept", "pieces"))
        table.add_row(str(hit["title"]), shared, *numbers, hit["ngrams"][0])
    console.print(table)
    if (more := len(account["hits"]) - shown) > 0:
        console.print(f"and {more} more; --account=FILE has them all.")


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="training data: files, folders or globs")
    parser.add_argument("--against", nargs="+", required=True, help="evaluation data: globs, each NAME=GLOB or GLOB")
    parser.add_argument("--n", type=int, default=13, help="words")
    parser.add_argument("--windows", action="store_true", help="cut the text around hits out, keep the rest")
    parser.add_argument("--field", default="text", help="with --windows, the field that holds the text")
    parser.add_argument("--around", type=int, default=200, help="with --windows, characters either side of a hit")
    parser.add_argument(
        "--most_pieces", type=int, default=10, help="with --windows, a record of more pieces goes whole"
    )
    parser.add_argument("--title", help="field that names a record in the account")
    parser.add_argument("--out", type=pathlib.Path, help="folder for what remains")
    parser.add_argument("--account", type=pathlib.Path, help="file for the account as JSON")
    parser.add_argument("--shown", type=int, default=20, help="records hit that are printed")
    args = parser.parse_args(arguments)
    try:
        if args.account:
            args.account.parent.mkdir(parents=True, exist_ok=True)
        windows = Windows(args.field, args.around, args.around, args.most_pieces) if args.windows else None
        step = Decontaminate(evaluation_data(args.against), split="train", n=args.n, windows=windows)
        account = decontaminate(TextFiles(tuple(args.data), held_out=0.0), step, args.out, args.title)
    except (ValueError, OSError) as error:
        sys.exit(f"decontaminate: {error}")
    if args.account:
        args.account.write_text(json.dumps(account, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print_account(account, args.shown)


if __name__ == "__main__":
    main()
