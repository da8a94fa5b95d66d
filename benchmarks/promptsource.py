"""Do promptsource's templates parse, and do those of the bundled data sets render on real rows?

    JAXLM_SHARED_DATA=... python -m benchmarks.promptsource

All 2,085 templates are parsed. Those of data sets whose rows are bundled are rendered on the first rows of each,
whether they are for the original task or not, and counted: rows that became a question, with a known answer; rows that
a template does not apply to; rows on which it fails, with the first reason.
"""

import argparse
import collections
import gzip
import itertools
import json
import os
import pathlib
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any

from jaxlm.data.prompts import PromptsourceTemplates, Row, TemplateError, row_name
from jaxlm.training import machine

RESULTS = pathlib.Path(__file__).parent / "results"
# {promptsource's name: bundled rows}
ROWS = {
    "super_glue/copa": "eval/copa/validation",
    "super_glue/boolq": "eval/boolq/validation",
    "super_glue/wsc.fixed": "eval/wsc_fixed/validation",
    "hellaswag": "eval/hellaswag/validation",
    "winogrande/winogrande_xl": "eval/winogrande/validation",
    "piqa": "eval/piqa/validation",
    "ai2_arc/ARC-Easy": "eval/arc_easy/test",
    "ai2_arc/ARC-Challenge": "eval/arc_challenge/test",
    "openbookqa/main": "eval/openbookqa/test",
    "commonsense_qa": "finetune/commonsense_qa/train",
    "rotten_tomatoes": "finetune/rotten_tomatoes/validation",
    "banking77": "finetune/banking77/test",
    "xquad/xquad.en": "eval/xquad/en.validation",
}
# As Hugging Face has them, and templates expect, in ARC, OpenBookQA and CommonsenseQA.
NESTED_CHOICES = {"choices": "{'label': choices_labels, 'text': choices}"}


def unpack(data: pathlib.Path, folder: str) -> pathlib.Path:
    """The bundled templates in a folder; the one that holds data sets."""
    with tarfile.open(data / "finetune" / "promptsource_templates" / "templates.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return pathlib.Path(folder) / "templates"


def parse(templates: pathlib.Path) -> dict[str, int]:
    """{data set: number of its templates}, all parsed.

    Raises:
      ValueError: one does not parse.
    """
    counts = {}
    for path in sorted(templates.rglob("templates.yaml")):
        name = str(path.parent.relative_to(templates))
        counts[name] = len(PromptsourceTemplates(str(templates), name, all_of(templates, name)).templates())
    return counts


def all_of(templates: pathlib.Path, dataset: str) -> tuple[str, ...]:
    """Names of all templates of a data set, for other tasks than its own too."""
    return PromptsourceTemplates(str(templates), dataset).all_names()


def rows(data: pathlib.Path, dataset: str, count: int) -> Iterator[Row]:
    """The first rows."""
    with gzip.open(data / f"{ROWS[dataset]}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, itertools.islice(file, count))


def render(data: pathlib.Path, templates: pathlib.Path, dataset: str, count: int) -> list[dict[str, Any]]:
    """An account of each template of a data set on its first rows."""
    accounts = []
    some = list(rows(data, dataset, count))
    fields = NESTED_CHOICES if "choices_labels" in some[0] else {}
    for template in PromptsourceTemplates(str(templates), dataset, all_of(templates, dataset), fields).templates():
        found, reason = collections.Counter(), None
        for number, row in enumerate(some):
            try:
                question = template.question(row)
            except TemplateError as error:
                found["failed"] += 1
                reason = reason or f"{row_name(number, row)}: {error}"
                continue
            if question is None:
                found["not applicable"] += 1
            else:
                found["questions"] += 1
                found["answered"] += question.right_answer is not None
        accounts.append(
            {"template": template.name, "rows": len(some), **found, **({"reason": reason} if reason else {})}
        )
    return accounts


def main() -> None:
    """Prints the account and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("JAXLM_SHARED_DATA"), help="folder of the data bundle")
    parser.add_argument("--rows", type=int, default=500, help="of each data set")
    args = parser.parse_args()
    if not args.data:
        parser.error("give --data=FOLDER or JAXLM_SHARED_DATA: the folder with finetune/promptsource_templates")
    data = pathlib.Path(args.data)
    with tempfile.TemporaryDirectory() as folder:
        templates = unpack(data, folder)
        counts = parse(templates)
        print(f"{sum(counts.values())} templates in {len(counts)} files parse.")
        rendered = {}
        for dataset in ROWS:
            rendered[dataset] = render(data, templates, dataset, args.rows)
            total = collections.Counter()
            for account in rendered[dataset]:
                total.update({k: v for k, v in account.items() if isinstance(v, int)})
            print(f"{dataset:<26} {len(rendered[dataset]):>3} templates {dict(total)}", flush=True)
            for account in rendered[dataset]:
                if "reason" in account:
                    print(f"    {account['template']}: {account['failed']} fail, {account['reason'][:150]}")
    results = {"parsed": {"templates": sum(counts.values()), "files": len(counts)}, "rendered": rendered}
    path = RESULTS / "promptsource.json"
    path.write_text(json.dumps(results | {"machine": machine.facts()}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
