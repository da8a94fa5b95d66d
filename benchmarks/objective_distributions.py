"""Do our objectives hide what t5's do? Distributions on real text, and ids under the same masks.

    pip install --no-deps --target=t5 t5 babel
    JAXLM_SHARED_DATA=... python -m benchmarks.objective_distributions --reference=t5

10,000 rows of books (568 ids of T5's vocabulary, cut as T5 cuts) and 10,000 paragraphs of 2 to 512 ids go through
t5.data.preprocessors and through our objectives. Of what comes out, histograms are taken for each text: lengths of
noise spans and of text spans, in which tenth of the text noise lies, share and number of spans, places of splits.

The test is a paired permutation test. Both sides had the same texts, so that under the hypothesis that they draw from
the same distribution either may be called ours: swapping the two within random pairs gives the statistic's
distribution, whatever dependence there is among the spans of one text. The statistic is chi-squared over the pooled
histogram. Beside its p-value stand the largest distance of two shares and the 95% bound of that distance in the swapped
samples.

Infilling (FIM) is in neither t5 nor seqio. It is held against a transcription of the paper (Bavarian et al. 2022, arXiv
2207.14255, section 3) below, and against the distribution that follows from it by arithmetic.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import scipy.stats

from jaxlm.objectives.base import VocabularyInfo
from jaxlm.objectives.infilling import Infilling
from jaxlm.objectives.prefix_lm import PrefixLM
from jaxlm.objectives.span_corruption import SpanCorruption, draw_spans, noise_counts
from jaxlm.objectives.ul2 import UL2

RESULTS = pathlib.Path(__file__).parent / "results"
ROW = 568  # ids that fill 512 inputs and 114 targets
PARAGRAPH = 512
LONGEST = 64  # lengths of spans from here on share a bin
TENTHS = 10
SWAPS = 2000

Pair = tuple[np.ndarray, np.ndarray]


# Statistics -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compared:
    """Two sets of histograms of the same texts.

    Attributes:
      p: of the permutation test; 1 where all histograms agree, text by text.
      distance: the largest distance of two shares in the pooled histogram.
      bound: 95% of swapped samples have a smaller one.
      equal: whether each text has the same histogram on both sides.
    """

    p: float
    distance: float
    bound: float
    equal: bool


def compare(ours: np.ndarray, theirs: np.ndarray, seed: int = 0, swaps: int = SWAPS) -> Compared:
    """The paired permutation test of histograms, counts [N, K] on either side."""
    difference, total = (ours - theirs).astype(np.float64), (ours + theirs).sum(0)
    if not difference.any():
        return Compared(1.0, 0.0, 0.0, True)
    # Bins in which there is next to nothing join their left neighbour.
    groups = np.cumsum(total >= 20) - (total[0] >= 20)
    difference = np.stack([difference[:, groups == g].sum(1) for g in range(groups[-1] + 1)], axis=1)
    total = np.array([total[groups == g].sum() for g in range(groups[-1] + 1)])
    shares = total.sum() / 2

    def statistics(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [..., K] -> [...], [...]
        return (sums**2 / np.maximum(total, 1)).sum(-1), np.abs(sums).max(-1) / shares

    rng = np.random.default_rng(seed)
    chi, distance = statistics(difference.sum(0))
    swapped = [statistics(rng.choice((-1.0, 1.0), (100, len(difference))) @ difference) for _ in range(swaps // 100)]
    chis, distances = (np.concatenate(part) for part in zip(*swapped))
    p = (1 + np.sum(chis >= chi * (1 - 1e-12))) / (1 + len(chis))
    return Compared(float(p), float(distance), float(np.quantile(distances, 0.95)), False)


def histogram(values: Iterable[np.ndarray], bins: int) -> np.ndarray:
    """Counts [N, bins] of small whole numbers; those beyond the last bin fall into it."""
    return np.stack([np.bincount(np.minimum(v, bins - 1), minlength=bins) for v in values])


def expected(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of a chi-squared test of counts against probabilities; scarce bins are joined."""
    order, wanted = np.argsort(-probabilities, kind="stable"), probabilities * counts.sum()
    keep = order[wanted[order] >= 10]
    rest = np.setdiff1d(order, keep)
    observed = np.append(counts[keep], counts[rest].sum())
    wanted = np.append(wanted[keep], wanted[rest].sum())
    if len(keep) < 2:
        raise ValueError(f"{counts.sum()} draws are too few for a chi-squared test over {len(counts)} bins.")
    if wanted[-1] < 1e-9:
        if observed[-1]:
            return 0.0
        observed, wanted = observed[:-1], wanted[:-1]
    return float(scipy.stats.chisquare(observed, wanted).pvalue)


# What is measured -----------------------------------------------------------------------------------------------


def spans(pairs: Iterable[Pair], texts: Sequence[np.ndarray], sentinels: np.ndarray) -> dict[str, np.ndarray]:
    """Histograms of span corruption's (inputs, targets), both ended by EOS, text by text."""
    found = collections.defaultdict(list)
    for (inputs, targets), text in zip(pairs, texts, strict=True):
        at = np.flatnonzero(np.isin(inputs, sentinels))
        starts = np.flatnonzero(np.isin(targets, sentinels))
        noise = np.diff(np.append(starts, len(targets) - 1)) - 1
        text_spans = np.diff(np.concatenate([[-1], at])) - 1
        # The end of a text is noise; one that had a tail of text would show it here.
        found["tail"].append(np.array([len(inputs) - 2 - at[-1]]))
        found["noise span lengths"].append(noise)
        found["text span lengths"].append(text_spans)
        ends = np.cumsum(text_spans + noise)
        is_noise = np.zeros(len(text) + 1, np.int64)
        np.add.at(is_noise, ends - noise, 1)
        np.add.at(is_noise, ends, -1)
        places = np.flatnonzero(np.cumsum(is_noise[:-1]))
        found["place of noise"].append(places * TENTHS // len(text))
        found["noise density"].append(np.array([round(1000 * noise.sum() / len(text))]))
        found["span count"].append(np.array([len(noise)]))
    bins = {"place of noise": TENTHS, "noise density": 1001, "span count": 128, "tail": 2}
    return {name: histogram(values, bins.get(name, LONGEST + 1)) for name, values in found.items()}


def splits(pairs: Iterable[Pair]) -> dict[str, np.ndarray]:
    """Histograms of (inputs, targets) of prefix LM, the targets alone ended by EOS."""
    place = [np.array([20 * (len(i) - 1) // max(len(i) + len(t) - 2, 1)]) for i, t in pairs]
    return {"place of the split": histogram(place, 20)}


def fills(rows: Iterable[np.ndarray], marks: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Histograms of infilling: what a document looks like, and the shares of its parts."""
    found = collections.defaultdict(list)
    for row in rows:
        prefix, suffix, middle = marks
        if row[0] != prefix:
            found["form"].append(np.array([0]))
            found["suffix"].append(np.zeros(0, np.int64))
            found["prefix where it stands first"].append(np.zeros(0, np.int64))
            continue
        at_suffix, at_middle = np.argmax(row == suffix), np.argmax(row == middle)
        length = len(row) - 4
        found["form"].append(np.array([1 + (at_suffix == 1)]))
        found["suffix"].append(np.array([20 * (at_middle - at_suffix - 1) // (length + 1)]))
        first = np.array([20 * (at_suffix - 1) // (length + 1)])
        found["prefix where it stands first"].append(first[: int(at_suffix > 1)])
    bins = {"form": 3}
    return {name: histogram(values, bins.get(name, 20)) for name, values in found.items()}


def transcribed_fim(text: np.ndarray, marks: tuple[int, int, int], eos: int, rng: np.random.Generator) -> np.ndarray:
    """FIM of one document as section 3 of the paper describes it, at rate 0.9, PSM and SPM half and half."""
    if rng.uniform() >= 0.9:
        return text
    pre, suf, mid = ([mark] for mark in marks)
    ids = text[:-1].tolist()  # without its end
    cuts = [int(rng.integers(len(ids) + 1)) for _ in range(2)]
    a, b = min(cuts), max(cuts)
    if rng.uniform() < 0.5:
        return np.array(pre + suf + ids[b:] + mid + ids[:b] + [eos])
    return np.array(pre + ids[:a] + suf + ids[b:] + mid + ids[a:b] + [eos])


# The benchmark --------------------------------------------------------------------------------------------------


def books(data: pathlib.Path) -> Iterator[str]:
    """The texts of the bundled books."""
    for path in sorted((data / "pretrain" / "books_pd").glob("train-*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def read_texts(data: pathlib.Path, vocabulary, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows of `ROW` ids cut from books one after the other, and paragraphs."""
    rows, paragraphs, left = [], [], np.zeros(0, np.int32)
    for text in books(data):
        parts = vocabulary.encode_batch([part for part in text.split("\n\n") if part.strip()])
        paragraphs += [part for part in parts if 2 <= len(part) <= PARAGRAPH]
        stream = np.concatenate([left, *parts])
        cut = len(stream) // ROW * ROW
        rows += np.split(stream[:cut], cut // ROW)
        left = stream[cut:]
        if len(rows) >= count and len(paragraphs) >= count:
            return rows[:count], paragraphs[:count]
    raise ValueError(f"The books have {len(rows)} rows and {len(paragraphs)} paragraphs; ask for fewer.")


class Tables:
    """Collects comparisons and prints them."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(self, case: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
        """Compares the histograms of a case."""
        for name in ours:
            compared = compare(ours[name], theirs[name])
            self.rows.append({"case": case, "histogram": name, **dataclasses.asdict(compared)})
            verdict = "equal text by text" if compared.equal else f"p {compared.p:.4f}"
            print(f"{case:<34} {name:<30} {verdict:<20} {compared.distance:.5f} <= {compared.bound:.5f}", flush=True)

    def lowest(self) -> tuple[float, int]:
        """The lowest p-value and the number of tests, those with nothing to test left out."""
        tested = [row["p"] for row in self.rows if not row["equal"]]
        return min(tested, default=1.0), len(tested)


def same_pairs(ours: Iterable[Pair], theirs: Iterable[Pair]) -> int:
    """How many pairs have different ids."""
    return sum(not (np.array_equal(a, c) and np.array_equal(b, d)) for (a, b), (c, d) in zip(ours, theirs, strict=True))


def generators(seed: int, count: int) -> Iterator[np.random.Generator]:
    """One for each text, as the loader has."""
    return (np.random.Generator(np.random.Philox(key=[seed, i])) for i in range(count))


def measure(data: pathlib.Path, count: int) -> dict:
    """Everything."""
    import seqio

    from benchmarks import t5_objectives
    from jaxlm.data.vocabularies import STANDARD_TOKENS, SentencePieceVocabulary

    path = str(data / "tokenizers" / "t5_base_32000.spm.model")
    vocabulary = SentencePieceVocabulary(path, extra_ids=100)
    info = vocabulary.info()
    theirs = seqio.SentencePieceVocabulary(path, extra_ids=100)
    assert theirs.vocab_size == vocabulary.size, (theirs.vocab_size, vocabulary.size)
    preprocessors = t5_objectives.load()
    t5 = t5_objectives.T5Objectives(preprocessors, theirs)
    rows, paragraphs = read_texts(data, vocabulary, count)
    tables, different = Tables(), {}

    def corrupted(objective, texts: Sequence[np.ndarray], seed: int, drop: int = 0) -> list[Pair]:
        examples = [objective.corrupt({"targets": t}, info, g) for t, g in zip(texts, generators(seed, len(texts)))]
        return [(example.inputs[drop:], example.targets) for example in examples]

    def span_case(case: str, objective: SpanCorruption, texts: Sequence[np.ndarray], seed: int) -> None:
        density, mean = objective.noise_density, objective.mean_span_length
        ours = corrupted(objective, texts, seed)
        tables.add(
            case,
            spans(ours, texts, info.sentinels),
            spans(t5.span_corruption(texts, density, mean, seed), texts, info.sentinels),
        )
        masks = [
            draw_spans(len(t), *noise_counts(len(t), density, mean), g)[0]
            for t, g in zip(texts, generators(seed, len(texts)))
        ]
        different[case] = same_pairs(ours, t5.spans_hidden(texts, masks))

    span_case("span corruption, rows", SpanCorruption(), rows, 1)
    span_case("span corruption, paragraphs", SpanCorruption(), paragraphs, 2)
    ul2 = UL2()
    for i, (mean, density) in enumerate((*ul2.regular[1:], *ul2.extreme)):
        objective = SpanCorruption(noise_density=density, mean_span_length=mean)
        span_case(f"UL2, mu {mean:g}, r {density:g}, rows", objective, rows, 3 + i)
    # The sequential denoiser: T5's spans with mu = r N are one span, the end (arXiv 2205.05131, 3.1.2).
    end = np.array([info.eos_id], np.int32)
    cut = [(i, np.append(t, end)) for i, t in corrupted(PrefixLM(suffix_share=ul2.suffix_share), rows, 10)]
    theirs_cut = [(i[:-2], t[1:]) for i, t in t5.span_corruption(rows, ul2.suffix_share, ul2.suffix_share * ROW, 10)]
    different["UL2, the sequential denoiser, rows"] = same_pairs(cut, theirs_cut)

    for texts, name, seed in ((rows, "rows", 11), (paragraphs, "paragraphs", 12)):
        ours = [(np.append(i, end), np.append(t, end)) for i, t in corrupted(PrefixLM(), texts, seed)]
        case = f"prefix LM, {name}"
        tables.add(case, splits(ours), splits(t5.prefix_lm(texts, seed)))
        masks = [np.arange(len(t)) < len(i) - 1 for t, (i, _) in zip(texts, ours)]
        different[case] = same_pairs(ours, t5.prefix_cut(texts, masks))

    rates = np.zeros(len(ul2.parts), np.int64)
    own = SentencePieceVocabulary(path, extra_ids=128, named_tokens=STANDARD_TOKENS).info()
    for text, rng in zip(rows, generators(13, count)):
        rates[ul2.corrupt({"targets": text}, own, rng).objective] += 1
    uniform = expected(rates, np.full(len(rates), 1 / len(rates)))

    fill = infilling(rows, own, tables)
    shapes = lengths(preprocessors)
    p, tests = tables.lowest()
    return {
        "reference": f"t5 {t5_objectives.version()}, seqio {seqio.__version__}",
        "texts": {"rows": [count, ROW], "paragraphs": [count, float(np.mean([len(t) for t in paragraphs]))]},
        "swaps": SWAPS,
        "tables": tables.rows,
        "lowest_p": p,
        "tests": tests,
        # With so many tests the lowest p-value is below this once in twenty times where nothing differs.
        "lowest_p_expected_above": 1 - 0.95 ** (1 / tests),
        "texts_with_different_ids_under_the_same_masks": different,
        "ul2_rates": {"counts": dict(zip(ul2.parts, rates.tolist())), "p_of_uniform": uniform},
        "infilling_against_arithmetic": fill,
        "text_lengths": shapes,
    }


def infilling(rows: Sequence[np.ndarray], info: VocabularyInfo, tables: Tables) -> dict[str, float]:
    """Infilling beside the paper's transcription, and beside arithmetic (p-values)."""
    objective = Infilling()
    marks = tuple(info.named_ids[f"<fim_{part}>"] for part in ("prefix", "suffix", "middle"))
    # The end-of-text id divides documents; each row is one, of 20 tokens and more.
    documents = [np.append(row[: 20 + i % (ROW - 20)], np.int32(info.eos_id)) for i, row in enumerate(rows)]
    ours = [
        objective.corrupt({"targets": d}, info, g).targets for d, g in zip(documents, generators(14, len(documents)))
    ]
    theirs = [transcribed_fim(d, marks, info.eos_id, g) for d, g in zip(documents, generators(15, len(documents)))]
    tables.add("infilling, documents", fills(ours, marks), fills(theirs, marks))
    # Of documents of one length n the suffix has s tokens with probability ((n-s+1)^2 - (n-s)^2) / (n+1)^2.
    n = 60
    short = [np.append(row[:n], np.int32(info.eos_id)) for row in rows]
    found = [objective.corrupt({"targets": d}, info, g).targets for d, g in zip(short, generators(16, len(short)))]
    moved = [row for row in found if row[0] == marks[0]]
    suffixes = [int(np.argmax(row == marks[2]) - np.argmax(row == marks[1]) - 1) for row in moved]
    k = np.arange(n + 1)
    # SPM shows <PRE> <SUF>; so does PSM whose prefix is empty, which the lower of two draws is (2n + 1) / (n + 1)^2.
    empty = (2 * n + 1) / (n + 1) ** 2
    spm = objective.spm_rate + (1 - objective.spm_rate) * empty
    looks = sum(row[1] == marks[1] for row in moved)
    return {
        "rate": float(scipy.stats.binomtest(len(moved), len(found), objective.fim_rate).pvalue),
        "spm": float(scipy.stats.binomtest(int(looks), len(moved), spm).pvalue),
        "suffix": expected(np.bincount(suffixes, minlength=n + 1), ((n - k + 1) ** 2 - (n - k) ** 2) / (n + 1) ** 2),
    }


def lengths(preprocessors) -> dict:
    """How much text fills a row: `raw_length` beside t5's `random_spans_helper`."""
    from jaxlm.architecture import Architecture

    same, other = 0, []
    for inputs in (128, 512, 1024, 2048):
        for density in (0.15, 0.3, 0.5):
            for mean in (3.0, 8.0, 64.0):
                text, targets = preprocessors.random_spans_helper(inputs, density, mean, 1, 1)
                objective = SpanCorruption(noise_density=density, mean_span_length=mean)
                row = {"inputs": inputs, "targets": targets}
                ours = objective.raw_length(row, Architecture.ENCODER_DECODER)
                same += ours == text
                if ours != text:
                    other.append({"inputs": inputs, "density": density, "mean": mean, "t5": text, "ours": ours})
    return {"equal": same, "different": other}


def main() -> None:
    """Prints the tables and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("JAXLM_SHARED_DATA"), help="folder of the data bundle")
    parser.add_argument("--reference", help="folder that t5 and babel are installed in, if not beside jaxlm")
    parser.add_argument("--count", type=int, default=10_000, help="rows, and as many paragraphs")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "objective_distributions.json")
    args = parser.parse_args()
    if not args.data:
        parser.error("give --data=FOLDER or JAXLM_SHARED_DATA: the folder with pretrain/books_pd and tokenizers")
    if args.reference:
        sys.path.append(args.reference)
    from jaxlm.training import machine

    results = measure(pathlib.Path(args.data), args.count) | {"machine": machine.facts()}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({k: v for k, v in results.items() if k != "tables"}, indent=1))


if __name__ == "__main__":
    main()
