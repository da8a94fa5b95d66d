"""What do the bundled corpora share with the bundled evaluation sets, and what does leaving it out cost?

    JAXLM_SHARED_DATA=... python -m benchmarks.decontamination

Books, record by record and with windows cut out, and T0's training pairs, against every file of eval/, by 13-grams: the
account of `tools/decontaminate.py`.
"""

import argparse
import json
import os
import pathlib
import time

from benchmarks import guides
from jaxlm.data.decontamination import Decontaminate, Windows
from jaxlm.data.sources import TextFiles
from jaxlm.training import machine
from tools.decontaminate import decontaminate, evaluation_data, print_account

RESULTS = pathlib.Path(__file__).parent / "results"
# {name: (files, what is cut, the field that names a record)}
CORPORA = {
    "books, whole": ("pretrain/books_pd/train-*.jsonl.gz", None, "title"),
    "books, windows": ("pretrain/books_pd/train-*.jsonl.gz", Windows(), "title"),
    "t0 pairs": ("finetune/t0_50k/train.jsonl.gz", None, "dataset"),
}


def committed(name: str) -> str:
    """The table of the committed results, for docs/data.md."""
    del name
    rows = [
        "| corpus | records | hit | characters gone | shares with (records) | rows of these |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for corpus, account in json.loads((RESULTS / "decontamination.json").read_text())["accounts"].items():
        gone = account["characters_gone"] / account["characters"]
        by = ", ".join(f"{name} ({count})" for name, count in account["records_hit_by"].items())
        hit = ", ".join(str(account["evaluation_rows_hit"][name]) for name in account["records_hit_by"])
        lost = f"{account['characters_gone']:,} ({gone:.3%})"
        rows.append(f"| {corpus} | {account['records']:,} | {len(account['hits'])} | {lost} | {by} | {hit} |")
    return "\n".join(rows)


def main() -> None:
    """Prints the accounts and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("JAXLM_SHARED_DATA"), help="folder of the data bundle")
    args = parser.parse_args()
    if not args.data:
        parser.error("give --data=FOLDER or JAXLM_SHARED_DATA: the folder with pretrain, finetune and eval")
    data = pathlib.Path(args.data)
    against = evaluation_data([str(data / "eval" / "*" / "*.jsonl.gz")])
    results = {"against": sorted(against), "accounts": {}, "machine": machine.facts()}
    for name, (files, windows, title) in CORPORA.items():
        before = time.process_time()
        account = decontaminate(
            TextFiles(str(data / files), held_out=0.0),
            Decontaminate(against, split="train", windows=windows),
            out=None,
            title=title,
        )
        print(name)
        print_account(account, shown=5)
        results["accounts"][name] = account | {"cpu_seconds": round(time.process_time() - before, 1)}
    path = RESULTS / "decontamination.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    guides.fill("data.md", "decontamination", committed)


if __name__ == "__main__":
    main()
