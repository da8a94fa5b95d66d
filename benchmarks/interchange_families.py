"""How close each family is to transformers: random models with every feature on, of tests/checkpoints/huggingface.

    python -m benchmarks.interchange families                  # all, and the table in docs/interchange.md
    python -m benchmarks.interchange families --only=deberta_v3 --only=mixtral
    python -m benchmarks.interchange families --missing        # goes on where it was stopped

Needs the torch extra. Differences are the largest over the largest number expected, in float32. OpenELM, which
transformers has not, is compared with its definition in numpy.
"""

import argparse
import json
import os
import pathlib
import re
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from jaxlm.checkpoints.huggingface.folder import open_folder
from tests.checkpoints.huggingface import openelm_reference
from tests.checkpoints.huggingface.family_cases import CASES, GENERATIVE, Case
from tests.checkpoints.huggingface.side_by_side import SideBySide

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "interchange_families.json"
GUIDE = ROOT / "docs" / "interchange.md"
_TABLE = re.compile(r"(<!-- families -->\n).*?(<!-- end -->)", re.DOTALL)


def measure(case: Case, folder: pathlib.Path) -> dict:
    """What came out of a case."""
    pair = SideBySide(case, folder)
    found = {"class": case.model} | pair.differences() | {"gradient": pair.gradient_difference()}
    moved = {feature: pair.mutated(feature) for feature in case.features}
    tensors = pair.send_back(folder / f"{case.name}_back").values()
    found |= {"features": moved, "bit_identical": all(np.array_equal(before, after) for before, after in tensors)}
    if case in GENERATIVE:
        clear, same = pair.greedy()
        found["greedy"] = {"clear": clear, "same": same}
    return found


def guide_with_results(text: str) -> str:
    """docs/interchange.md with the measured differences."""
    rows = json.loads(RESULTS.read_text())["cases"]
    lines = [
        "| model | logits, largest | mean | hidden states | packed beside padded | gradients | least moved by a "
        "feature | back bit for bit | greedy tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        texts = row.get("greedy")
        cells = [
            name,
            *(_shown(row.get(key)) for key in ("logits", "logits_mean", "hidden", "beginnings", "gradient")),
            _shown(min(row.get("features", {}).values(), default=None)),
            "yes" if row["bit_identical"] else "no",
            f"{texts['same']} of {texts['clear']}" if texts else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return _TABLE.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text)


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:.0e}"


def main() -> None:
    """Measures, prints, writes results and the guide's table."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*(case.name for case in CASES), "openelm"]
    parser.add_argument("--only", action="append", choices=names)
    parser.add_argument("--missing", action="store_true", help="only those without results")
    args = parser.parse_args()
    versions = {module.__name__: module.__version__ for module in (jax, torch, transformers)}
    found = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}
    for name in args.only or names:
        if args.missing and name in found:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch)
            if name == "openelm":
                found[name] = measure_openelm(folder)
            else:
                found[name] = measure(next(case for case in CASES if case.name == name), folder)
        print(name, json.dumps(found[name]), flush=True)
        ordered = {name: found[name] for name in names if name in found}
        RESULTS.write_text(json.dumps({"versions": versions, "cases": ordered}, indent=2) + "\n")
        GUIDE.write_text(guide_with_results(GUIDE.read_text()))
        jax.clear_caches()


def measure_openelm(folder: pathlib.Path) -> dict:
    """Beside numpy."""
    found = open_folder(openelm_reference.written(folder / "openelm"))
    same = openelm_reference.comes_back(found, folder / "back")
    return {"class": "OpenELMForCausalLM", "logits": openelm_reference.difference(found), "bit_identical": same}


if __name__ == "__main__":
    main()
