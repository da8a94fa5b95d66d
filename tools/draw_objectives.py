"""Draws the pictures of docs/objectives.md and fills in its table of legal architectures.

python -m tools.draw_objectives

Every picture shows what `corrupt` returns for one sentence, so that pictures cannot say what the code does not.
"""

import enum
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxlm.architecture import Architecture  # noqa: E402
from jaxlm.objectives.base import Objective, VocabularyInfo  # noqa: E402
from jaxlm.objectives.codegen2 import CodeGen2  # noqa: E402
from jaxlm.objectives.full_lm import FullLM  # noqa: E402
from jaxlm.objectives.infilling import Infilling  # noqa: E402
from jaxlm.objectives.masked_lm import MaskedLM, Unit  # noqa: E402
from jaxlm.objectives.mixture import Mixture  # noqa: E402
from jaxlm.objectives.multi_token import MultiTokenPrediction  # noqa: E402
from jaxlm.objectives.prefix_lm import Pairing, PrefixLM  # noqa: E402
from jaxlm.objectives.replaced_token_detection import Generator, ReplacedTokenDetection  # noqa: E402
from jaxlm.objectives.span_corruption import SpanCorruption  # noqa: E402
from jaxlm.objectives.supervised import Supervised  # noqa: E402
from jaxlm.objectives.ul2 import UL2  # noqa: E402

DOCUMENT = ROOT / "docs" / "objectives.md"
FIGURES = ROOT / "docs" / "figures"
TABLE_START, TABLE_END = "<!-- table of legal architectures: tools/draw_objectives.py -->", "<!-- end of table -->"

WORDS = "the quick brown fox jump ing over a lazy dog".split()
SPARE = "cat red slow tree house runs sleep blue under one".split()  # what random substitutes may be
FIRST = 20
NAMES = dict(enumerate(WORDS + SPARE, FIRST)) | {1: "</s>", 4: "[M]", 5: "[R]", 6: "[S]", 7: "[X]"}
NAMES |= {8: "<PRE>", 9: "<SUF>", 10: "<MID>", 11: "<sep>", 12: "<eom>", 13: "<2>", 14: "<1>", 15: "<0>"}
VOCABULARY = VocabularyInfo(
    size=FIRST + len(WORDS) + len(SPARE),
    mask_id=4,
    sentinel_ids=(15, 14, 13),
    named_ids={
        "[R]": 5,
        "[S]": 6,
        "[X]": 7,
        "<fim_prefix>": 8,
        "<fim_suffix>": 9,
        "<fim_middle>": 10,
        "<sep>": 11,
        "<eom>": 12,
    }
    | {f"filler_{i}": i for i in (2, 3, 16, 17, 18, 19)},
    word_start=np.array([i != FIRST + WORDS.index("ing") for i in range(FIRST + len(WORDS) + len(SPARE))]),
)
TEXT = np.arange(FIRST, FIRST + len(WORDS), dtype=np.int32)
DOCUMENT_TEXT = np.append(TEXT, 1).astype(np.int32)


class Role(enum.Enum):
    """What a cell is to the model; the value is its colour."""

    TEXT = "#ffffff"
    SEEN = "#cfe2f3"
    PREDICTED = "#f9cb9c"
    SECOND = "#d9ead3"  # seen, of the second text in a row
    SECOND_PREDICTED = "#f6b26b"


Row = tuple[str, list[tuple[str, Role]]]


def cells(tokens: np.ndarray, role: Role) -> list[tuple[str, Role]]:
    """Cells of one role."""
    return [(NAMES[int(token)], role) for token in tokens]


def example(objective: Objective, seed: int, text: np.ndarray = TEXT):
    """What `objective` makes of the sentence."""
    return objective.corrupt({"targets": text}, VOCABULARY, np.random.default_rng(seed))


def sequence(objective: Objective, seed: int, prefix: str = "", text: np.ndarray = TEXT) -> list[Row]:
    """Rows of a sequence objective: inputs, if any, and targets."""
    made = example(objective, seed, text)
    rows = [(f"{prefix}inputs", cells(made.inputs, Role.SEEN))] if len(made.inputs) else []
    return [*rows, (f"{prefix}targets", cells(made.targets, Role.PREDICTED))]


def aligned(objective: Objective, seed: int, prefix: str = "") -> list[Row]:
    """Rows of an aligned objective: inputs, and the targets that count."""
    made = example(objective, seed)
    targets = [
        cell if weight else ("", Role.TEXT)
        for cell, weight in zip(cells(made.targets, Role.PREDICTED), made.weights, strict=True)
    ]
    return [(f"{prefix}inputs", cells(made.inputs, Role.SEEN)), (f"{prefix}targets", targets)]


def pictures() -> dict[str, list[Row]]:
    """Rows of each picture, by the name of its file."""
    text = [("text", cells(TEXT, Role.TEXT))]
    document = [("text", cells(DOCUMENT_TEXT, Role.TEXT))]
    pairs = example(PrefixLM(pairing=Pairing.COMPLEMENTARY), 4)
    supervised = Supervised().corrupt({"inputs": TEXT[:7], "targets": TEXT[7:]}, VOCABULARY, np.random.default_rng(0))
    detection = example(ReplacedTokenDetection(mask_rate=0.3, generator=Generator.UNIFORM), 3)
    masked = np.where(detection.weights > 0, 4, detection.targets)
    labels = [("replaced" if a != b else "original") for a, b in zip(detection.inputs, detection.targets, strict=True)]

    def paired(tokens, segments, first, second):
        cut = int((segments == 1).sum())
        return cells(tokens[:cut], first) + cells(tokens[cut:], second)

    def future(k):  # the k-th head's targets
        return cells(TEXT[k:], Role.PREDICTED) + [("", Role.TEXT)] * k

    return {
        "full_lm": text + sequence(FullLM(), 0),
        "prefix_lm": text
        + sequence(PrefixLM(), 6)
        + [
            ("pair: inputs", paired(pairs.inputs, pairs.input_segments, Role.SEEN, Role.SECOND)),
            ("pair: targets", paired(pairs.targets, pairs.segments, Role.PREDICTED, Role.SECOND_PREDICTED)),
        ],
        "span_corruption": text + sequence(SpanCorruption(noise_density=0.4, mean_span_length=2.0), 6),
        "masked_lm": text
        + aligned(MaskedLM(mask_rate=0.4, mask_share=0.5, random_share=0.25), 6, "token: ")
        + aligned(MaskedLM(mask_rate=0.3, mask_share=1.0, random_share=0.0, unit=Unit.WORD), 0, "word: ")
        + aligned(
            MaskedLM(mask_rate=0.4, mask_share=1.0, random_share=0.0, unit=Unit.WORD, span_lengths=(0.0, 0.5, 0.5)),
            0,
            "span: ",
        ),
        "ul2": text
        + sequence(SpanCorruption(0.2, 1.0, "[R]"), 1, "R: ")
        + sequence(PrefixLM(0.25, "[S]"), 0, "S: ")
        + sequence(SpanCorruption(0.5, 3.0, "[X]"), 4, "X: "),
        "infilling": document
        + [
            ("PSM", sequence(Infilling(1.0, 0.0), 6, text=DOCUMENT_TEXT)[0][1]),
            ("SPM", sequence(Infilling(1.0, 1.0), 6, text=DOCUMENT_TEXT)[0][1]),
        ],
        "codegen2": document
        + [
            ("left as it is", sequence(CodeGen2(infill_rate=0.0), 0, text=DOCUMENT_TEXT)[0][1]),
            ("spans moved", sequence(CodeGen2(1.0, 0.3, 2.0), 6, text=DOCUMENT_TEXT)[0][1]),
        ],
        "replaced_token_detection": text
        + [
            ("generator: inputs", cells(masked, Role.SEEN)),
            (
                "generator: targets",
                [
                    c if w else ("", Role.TEXT)
                    for c, w in zip(cells(detection.targets, Role.PREDICTED), detection.weights, strict=True)
                ],
            ),
            ("detector: inputs", cells(detection.inputs, Role.SEEN)),
            ("detector: labels", [(label, Role.PREDICTED) for label in labels]),
        ],
        "multi_token": [("decoder sees", [("", Role.SEEN)] + cells(TEXT[:-1], Role.SEEN))]
        + [(f"head {k + 1}", future(k)) for k in range(4)],
        "supervised": [
            ("inputs", cells(supervised.inputs, Role.SEEN)),
            ("targets", cells(supervised.targets, Role.PREDICTED)),
        ],
    }


def figure_of_rows(rows: list[Row]):
    """A figure of rows of cells; special tokens are bold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    width, label_width = max(len(row) for _, row in rows), 2.4
    figure = Figure(figsize=(0.62 * (width + label_width), 0.42 * len(rows) + 0.1), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    special = {NAMES[i] for i in NAMES if i < FIRST}
    for y, (label, row) in enumerate(rows):
        axes.text(-0.15, y + 0.5, label, ha="right", va="center", fontsize=9, color="#444444")
        for x, (word, role) in enumerate(row):
            if not word and role is Role.TEXT:
                continue
            axes.add_patch(
                Rectangle((x + 0.03, y + 0.08), 0.94, 0.84, facecolor=role.value, edgecolor="#777777", linewidth=0.7)
            )
            weight = "bold" if word in special else "normal"
            axes.text(x + 0.5, y + 0.5, word, ha="center", va="center", fontsize=8.5, weight=weight)
    axes.set_xlim(-label_width, width)
    axes.set_ylim(len(rows), 0)
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


def table() -> str:
    """The table of legal architectures, as Markdown, from `refuses`."""
    objectives = {
        "full_lm": FullLM(),
        "prefix_lm": PrefixLM(),
        "prefix_lm, COMPLEMENTARY": PrefixLM(pairing=Pairing.COMPLEMENTARY),
        "span_corruption": SpanCorruption(),
        "ul2": UL2(),
        "masked_lm": MaskedLM(),
        "replaced_token_detection": ReplacedTokenDetection(),
        "infilling": Infilling(),
        "codegen2": CodeGen2(),
        "multi_token": MultiTokenPrediction(),
        "supervised": Supervised(),
        "mixture of span_corruption and prefix_lm": Mixture((SpanCorruption(), PrefixLM()), (1.0, 1.0)),
    }
    lines = ["| objective | " + " | ".join(a.value.replace("_", " ") for a in Architecture) + " |"]
    lines += ["|---|" + ":-:|" * len(Architecture)]
    for name, objective in objectives.items():
        marks = ["yes" if objective.refuses(a) is None else "·" for a in Architecture]
        lines += [f"| {name} | " + " | ".join(marks) + " |"]
    return "\n".join(lines)


def with_table(document: str) -> str:
    """`document` with its table made anew."""
    before, rest = document.split(TABLE_START)
    return f"{before}{TABLE_START}\n{table()}\n{TABLE_END}{rest.split(TABLE_END)[1]}"


if __name__ == "__main__":
    for name, rows in pictures().items():
        figure_of_rows(rows).savefig(FIGURES / f"objective_{name}.png", metadata={"Software": None})
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
