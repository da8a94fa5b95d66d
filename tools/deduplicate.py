"""Leaves out of files what stands there twice, exactly or nearly, and what breaks rules of quality; prints the account.

python -m tools.deduplicate 'web/*.jsonl.gz'
python -m tools.deduplicate 'web/*.jsonl.gz' --filters --out clean --account removed.json --title url
python -m tools.deduplicate 'books/*.jsonl.gz' --filters length symbols repeated_lines --out clean

Rules are asked first, in their order (Gopher's, `jaxlm.data.quality`), then texts are compared, exactly and by MinHash
(`jaxlm.data.deduplication`). Of what is alike the first record stays. What remains is in the order of the files, and a
second time nothing of it goes. The files are read twice. A record takes about 250 bytes of memory, and a kilobyte in
the folder for temporary files (TMPDIR). Without --out nothing is written but the account.
"""

import argparse
import array
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxlm.data.deduplication import NearDuplicates, exact_key
from jaxlm.data.ngrams import Words
from jaxlm.data.quality import RULES, Quality
from jaxlm.data.sources import Record, TextFiles
from jaxlm.data.vocabularies import SentencePieceVocabulary, TokenizersVocabulary, Vocabulary
from tools.json_lines import line_of, written

EXACT, NEAR = "exact duplicate", "near duplicate"
_SHOWN = 200  # characters of an example


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files and what is known of their records.

    Attributes:
      files: the data.
      field: of a record that holds its text.
      title: field that names a record in the account; None numbers them.
      vocabulary: what tokens are counted by; None counts none.
    """

    files: TextFiles
    field: str = "text"
    title: str | None = None
    vocabulary: Vocabulary | None = None

    def records(self) -> Iterator[tuple[int, Record, str]]:
        """(number of the shard, record, its text).

        Raises:
          ValueError: a record has no text.
        """
        for number, shard in enumerate(self.files.shards("train")):
            for record in self.files.read(shard):
                text = record.get(self.field)
                if not isinstance(text, str):
                    raise ValueError(
                        f"{shard.name} has a record without a text {self.field!r}; it has {sorted(record)}: name one "
                        f"with --field."
                    )
                yield number, record, text

    def sizes(self, text: str) -> dict[str, int]:
        """What the account counts of a record."""
        sizes = {"records": 1, "words": len(text.split()), "characters": len(text)}
        return sizes | ({} if self.vocabulary is None else {"tokens": len(self.vocabulary.encode(text))})

    def example(self, number: int, record: Record, text: str) -> dict[str, Any]:
        """A record as the account shows it."""
        name = record.get(self.title) if self.title else None
        return {"title": name or f"record {number}", "text": text[:_SHOWN]}


@dataclasses.dataclass
class Fates:
    """What becomes of the records.

    Attributes:
      stages: names of the ways to go, in their order.
      stage: by record, 0 if it stays, i if it goes at stages[i - 1].
      of: by record, the one that it duplicates, or itself.
      similarity: {record: share of its signature that agrees with that of the one it nearly duplicates}.
    """

    stages: tuple[str, ...]
    stage: array.array
    of: array.array
    similarity: dict[int, float]

    def examples(self, name: str, count: int) -> list[int]:
        """Numbers of the first records that a stage removes."""
        stages = np.frombuffer(self.stage, np.int8)
        return np.flatnonzero(stages == self.stages.index(name) + 1)[:count].tolist()


def judge(corpus: Corpus, quality: Quality | None, near: NearDuplicates | None) -> Fates:
    """Reads the files once and says which records go, by which rule or as whose duplicate."""
    stages = (*(quality.asked if quality else ()), EXACT, *((NEAR,) if near else ()))
    fates = Fates(stages, array.array("b"), array.array("q"), {})
    exact: dict[bytes, int] = {}
    signed = array.array("q")
    with tempfile.TemporaryFile() as file:
        for number, (_, record, text) in enumerate(corpus.records()):
            if number == 0:
                line_of(record)  # what cannot be written is said before hours are spent
            reason, of = quality.broken(text) if quality else None, number
            if reason is None and (of := exact.setdefault(exact_key(text), number)) != number:
                reason = EXACT
            fates.stage.append(0 if reason is None else stages.index(reason) + 1)
            fates.of.append(of)
            if near and reason is None and (signature := near.signature(Words.of(text))) is not None:
                file.write(signature.tobytes())
                signed.append(number)
        if signed:
            file.flush()
            signatures = np.memmap(file, np.uint32, "r", shape=(len(signed), near.size))
            firsts = near.firsts(signatures)
            for i in np.flatnonzero(firsts != np.arange(len(firsts))):
                number, first = signed[i], firsts[i]
                fates.stage[number], fates.of[number] = stages.index(NEAR) + 1, signed[first]
                fates.similarity[number] = float((signatures[i] == signatures[first]).mean())
    return fates


def deduplicate(
    corpus: Corpus,
    quality: Quality | None = None,
    near: NearDuplicates | None = None,
    *,
    out: pathlib.Path | None = None,
    shown: int = 20,
) -> dict[str, Any]:
    """Goes through the data, writes what remains, and returns the account as JSON has it.

    Args:
      corpus: the data.
      quality: rules that are asked first; None asks none.
      near: what nearly the same is; None removes only what is exactly so.
      out: folder for files of JSON lines, one for each shard; None writes nothing.
      shown: examples of each stage that are kept for the account.
    """
    if out is not None and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} has files in it; give --out an empty folder.")
    fates = judge(corpus, quality, near)
    examples = {name: fates.examples(name, shown) for name in fates.stages}
    wanted = {number for numbers in examples.values() for number in numbers}
    wanted |= {fates.of[number] for number in wanted}
    found: dict[int, dict[str, Any]] = {}
    totals = [dict.fromkeys(corpus.sizes(""), 0) for _ in range(len(fates.stages) + 1)]
    with contextlib.ExitStack() as stack:
        file, opened = None, -1
        for number, (shard, record, text) in enumerate(corpus.records()):
            stage = fates.stage[number]
            for unit, size in corpus.sizes(text).items():
                totals[stage][unit] += size
            if number in wanted:
                found[number] = corpus.example(number, record, text)
            if out is not None and shard > opened:
                stack.close()
                file, opened = stack.enter_context(written(out, shard)), shard
            if file is not None and not stage:
                file.write(line_of(record))

    def example(number: int) -> dict[str, Any]:
        if (of := fates.of[number]) == number:
            return found[number]
        alike = {"similarity": fates.similarity[number]} if number in fates.similarity else {}
        return found[number] | {"duplicate_of": found[of], **alike}

    stages, left = [], {unit: sum(total[unit] for total in totals) for unit in totals[0]}
    for name, gone in zip(fates.stages, totals[1:], strict=True):
        after = {unit: left[unit] - gone[unit] for unit in left}
        stages.append({"stage": name, "in": left, "removed": gone, "out": after})
        left = after
    return {
        "settings": {"quality": quality and dataclasses.asdict(quality), "near": near and dataclasses.asdict(near)},
        "stages": stages,
        "kept": totals[0],
        "examples": {name: [example(number) for number in numbers] for name, numbers in examples.items() if numbers},
    }


def print_account(account: Mapping[str, Any], shown: int) -> None:
    """The account for people."""
    console = Console(markup=False)  # texts may have brackets
    stages, kept = account["stages"], account["kept"]
    title = f"{kept['records']:,} of {stages[0]['in']['records']:,} records remain."
    table = Table(title=title, title_justify="left")
    table.add_column("goes at", no_wrap=True)
    units = ("records", "tokens" if "tokens" in kept else "words")
    for name in (name for unit in units for name in (f"{unit} in", "removed")):
        table.add_column(name, justify="right")
    for row in stages:
        table.add_row(row["stage"], *(f"{row[side][unit]:,}" for unit in units for side in ("in", "removed")))
    table.add_row("nothing", *(text for unit in units for text in (f"{kept[unit]:,}", "")))
    console.print(table)
    for name, examples in account["examples"].items():
        table = Table(title=name, title_justify="left")
        for column in ("record", "text", "duplicate of", "alike"):
            table.add_column(column)
        for one in examples[:shown]:
            of = one.get("duplicate_of", {}).get("title", "")
            alike = f"{one['similarity']:.2f}" if "similarity" in one else ""
            table.add_row(str(one["title"]), " ".join(one["text"].split())[:60], str(of), alike)
        console.print(table)


def _vocabulary(path: str) -> Vocabulary:
    return TokenizersVocabulary(path) if path.endswith(".json") else SentencePieceVocabulary(path)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs."""
    near = NearDuplicates()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="files, folders or globs")
    parser.add_argument("--filters", nargs="*", choices=list(RULES), metavar="RULE", help=f"{', '.join(RULES)}; or all")
    parser.add_argument("--exact_only", action="store_true", help="leave near duplicates in")
    parser.add_argument("--n", type=int, default=near.n, help="words of an N-gram (%(default)s)")
    parser.add_argument("--bands", type=int, default=near.bands, help="of a signature (%(default)s)")
    parser.add_argument("--rows", type=int, default=near.rows, help="hashes in a band (%(default)s)")
    parser.add_argument(
        "--similarity", type=float, default=near.similarity, help="from which on texts are duplicates (%(default)s)"
    )
    parser.add_argument("--field", default="text", help="field that holds the text")
    parser.add_argument("--title", help="field that names a record in the account")
    parser.add_argument("--vocabulary", help="a .model or tokenizer.json, to count tokens too")
    parser.add_argument("--out", type=pathlib.Path, help="folder for what remains")
    parser.add_argument("--account", type=pathlib.Path, help="file for the account as JSON")
    parser.add_argument("--shown", type=int, default=5, help="examples of each stage that are printed")
    parser.add_argument("--examples", type=int, default=20, help="examples of each stage in the account's file")
    args = parser.parse_args(arguments)
    try:
        quality = None if args.filters is None else Quality(rules=tuple(args.filters) or None)
        near = None if args.exact_only else NearDuplicates(args.n, args.bands, args.rows, args.similarity)
        vocabulary = _vocabulary(args.vocabulary) if args.vocabulary else None
        if args.account:
            args.account.parent.mkdir(parents=True, exist_ok=True)
        corpus = Corpus(TextFiles(tuple(args.data), held_out=0.0), args.field, args.title, vocabulary)
        account = deduplicate(corpus, quality, near, out=args.out, shown=max(args.shown, args.examples))
    except (ValueError, OSError) as error:
        sys.exit(f"deduplicate: {error}")
    if args.account:
        args.account.write_text(json.dumps(account, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print_account(account, args.shown)


if __name__ == "__main__":
    main()
