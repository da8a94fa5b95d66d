"""Tasks ask what they say, judge it right, and a bad row, prompt or split is told in a sentence."""

import dataclasses
import datetime
import gzip
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jaxlm.architecture import Architecture
from jaxlm.data.prompts import Prompt, PromptsourceTemplates
from jaxlm.data.sources import TextFiles
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.evaluate import main
from jaxlm.evaluation.intervals import estimate
from jaxlm.evaluation.measures import Continuation, Generation, RankClassification, TextLikelihood, exact_match, f1
from jaxlm.evaluation.scoring import ScoringConfig
from jaxlm.evaluation.suite import EvaluationConfig, SuiteResult, evaluate, failures_in, results_in, try_again
from jaxlm.evaluation.tasks import EvaluationTask, FewShot, TaskError, evaluate_task, rows_in
from jaxlm.evaluation.text_model import TextFormat, TextModel
from jaxlm.exit_status import ExitStatus
from jaxlm.training.progress import make_console
from tests.evaluation.models import as_pretrained, make_model

VOCABULARY = ByteVocabulary(extra_ids=0)
SCORING = ScoringConfig(row_length=64, batch_tokens=256)
ROWS = [
    {"q": "The sky is", "options": ["blue", "made of cheese"], "label": 0, "kind": "sky"},
    {"q": "Two and two are", "options": ["five", "four"], "label": 1, "kind": "sum"},
    {"q": "Water is", "options": ["wet", "dry"], "label": 0, "kind": "sky"},
    {"q": "One and one are", "options": ["two", "nine"], "label": 0, "kind": "sum"},
]
RANKED = RankClassification()
RANK = Prompt(context="{{ q }}", choices="options", gold="label")


@pytest.fixture(scope="module")
def trained():
    module = make_model(Architecture.CAUSAL_DECODER, vocab_size=VOCABULARY.size)
    return as_pretrained(module, VOCABULARY)


@pytest.fixture(scope="module")
def model(trained):
    return TextModel(trained, scoring=SCORING)


@pytest.fixture
def make_task(tmp_path):
    def make(rows=ROWS, prompts=(RANK,), measure=RANKED, train=None, **options):
        for name, lines in (("rows.jsonl", rows), ("train.jsonl", train)):
            if lines is not None:
                (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
        source = rows_in(str(tmp_path), "rows.jsonl", None if train is None else "train.jsonl")
        return EvaluationTask("mine", source, prompts, measure, **options)

    return make


def run(task, model, **options):
    lines = []
    result, records = evaluate_task(task, model, report=lines.append, **{"samples": 50, **options})
    return result, list(records), lines


def likelihood(model, context, text):
    """By one request alone."""
    (score,) = model.score([(context, text)])
    return score.total


def test_rank_classification(model, make_task):
    """Each way to rank takes the choice it should; a task is grouped by a field, and says what chance is."""
    measure = RankClassification(primary="accuracy_calibrated", unconditional="Answer:")
    result, records, _ = run(make_task(measure=measure, group="kind"), model)
    expected = {name: [] for name in ("accuracy", "accuracy_per_token", "accuracy_per_byte", "accuracy_calibrated")}
    bits, size = 0.0, 0
    for row, record in zip(ROWS, records, strict=True):
        totals = [likelihood(model, row["q"], option) for option in row["options"]]
        alone = [likelihood(model, "Answer:", option) for option in row["options"]]
        np.testing.assert_allclose(record["log_likelihoods"], totals, atol=1e-4)
        np.testing.assert_allclose(record["unconditional"], alone, atol=1e-4)
        sizes = [len(option) for option in row["options"]]
        bits, size = bits - totals[row["label"]] / np.log(2), size + sizes[row["label"]]
        tokens = [1 + length for length in sizes]  # bytes, and the space before them
        for name, values in (
            ("accuracy", totals),
            ("accuracy_per_token", np.divide(totals, tokens)),
            ("accuracy_per_byte", np.divide(totals, sizes)),
            ("accuracy_calibrated", np.subtract(totals, alone)),
        ):
            expected[name].append(int(np.argmax(values)) == row["label"])
    for name, right in expected.items():
        assert result.metrics[name].value == np.mean(right)
    assert result.metrics["gold_bits_per_byte"].value == pytest.approx(bits / size, rel=1e-4)
    chosen = "accuracy_calibrated"
    assert result.groups["sky"][chosen].value == np.mean([expected[chosen][0], expected[chosen][2]])
    assert (result.chance, result.rows, result.questions) == (0.5, 4, 4)
    assert len({tuple(np.argsort(v)) for v in expected.values()}) > 1, "the ways to rank agree everywhere; change a row"


def test_several_prompts_have_a_median_and_a_spread(model, make_task):
    prompts = tuple(dataclasses.replace(RANK, name=str(i), context=f"{'x' * i} {{{{ q }}}}") for i in range(3))
    result, records, _ = run(make_task(prompts=prompts), model)
    values = [metrics["accuracy"] for metrics in result.prompts.values()]
    assert result.metrics["accuracy"].value == np.median(values) and len(values) == 3 and len(records) == 12


def test_continuation_and_texts(model, make_task):
    """Likelihoods by token, byte and word are those of the texts."""
    words = Prompt(context="{{ q }}", answers="[options[label]]")
    result, records, _ = run(make_task(prompts=(words,), measure=Continuation()), model)
    totals = [likelihood(model, row["q"], row["options"][row["label"]]) for row in ROWS]
    count = sum(len(row["options"][row["label"]]) for row in ROWS)
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(-sum(totals) / (count + 4)), rel=1e-4)
    assert result.metrics["bits_per_byte"].value == pytest.approx(-sum(totals) / math.log(2) / count, rel=1e-4)
    assert result.metrics["accuracy"].value == np.mean([record["greedy"] for record in records])
    long = [{"text": "abc " * 40}, {"text": "x"}]  # longer than the 64 tokens that the model reads
    result, _, _ = run(make_task(long, (Prompt(answers="text"),), TextLikelihood()), model)
    scores = model.rolling([row["text"] for row in long])
    assert sum(len(score.log_probabilities) for score in scores) == 161
    nats = -sum(score.total for score in scores)
    assert result.metrics["bits_per_byte"].value == pytest.approx(nats / math.log(2) / 161, rel=1e-6)
    wordless = [{"text": "x" * 2000}]  # e to the power of thousands a "word"
    result, _, _ = run(make_task(wordless, (Prompt(answers="text"),), TextLikelihood()), model)
    assert result.metrics["word_perplexity"].value == math.inf and result.metrics["perplexity"].value < 1e6


def test_generation(model, make_task):
    """The answer ends at a stop text, and the most similar right answer counts."""
    (first,) = model.generate(["The sky is"], max_new_tokens=6)
    assert first and model.generate(["The sky is"], max_new_tokens=6, stop=[first[2]]) == [
        first[: first.index(first[2])]
    ]
    rows = [{"q": "The sky is", "right": ["nothing", first]}]
    prompt = Prompt(context="{{ q }}", answers="right")
    result, records, _ = run(make_task(rows, (prompt,), Generation(max_new_tokens=6, stop=())), model)
    assert records[0]["generated"] == first and result.metrics["exact_match"].value == 1.0
    assert exact_match("The  Cat!", "cat") == 1.0 and exact_match("cats", "cat") == 0.0
    assert f1("a big cat", "the cat") == pytest.approx(2 / 3) and f1("", "") == 1.0 and f1("", "x") == 0.0


def test_few_shot_examples_are_fixed_and_never_the_row_itself(make_task):
    """The same seed gives the same examples, whatever is evaluated beside; another gives others."""

    class Seen:
        def score(self, pairs):
            self.contexts = [context for context, _ in pairs]
            return SCORED * len(pairs)

    class Score:
        total, log_probabilities, dropped = 0.0, np.zeros(1), 0

    SCORED = [Score()]

    def contexts(seed=0, split="train", limit=None, train=ROWS):
        seen = Seen()
        run(make_task(train=train, few_shot=FewShot(2, split=split, seed=seed), limit=limit), seen)
        return seen.contexts[::2]

    solved = [f"{row['q']} {row['options'][row['label']]}\n\n" for row in ROWS]
    first = contexts()
    assert all(text.endswith(row["q"]) and text.count("\n\n") == 2 for text, row in zip(first, ROWS))
    assert all(sum(text.count(example) for example in solved) == 2 for text in first)
    assert contexts() == first and contexts(limit=2) == first[:2] and contexts(seed=1) != first
    assert all(example not in text for text, example in zip(contexts(split="validation"), solved))
    # Another split may have the same rows, by its own file or the same one.
    assert all(example not in text for text, example in zip(contexts(train=None), solved))
    assert any(text.count(solved[0]) for text in contexts(train=[*ROWS, ROWS[1]])[1:])
    assert all(example not in text for text, example in zip(contexts(train=[*ROWS, ROWS[1]]), solved))


def test_rows_that_fail(model, make_task):
    """One row in a hundred is left out, named and counted; more stop the task."""
    rows = [dict(ROWS[i % 4]) for i in range(100)]
    del rows[7]["options"]
    result, records, lines = run(make_task(rows), model)
    assert result.failed == 1 and result.questions == len(records) == 99 and 7 not in {r["row"] for r in records}
    assert len(lines) == 1 and "row 7 left out" in lines[0] and "'options' is not defined" in lines[0]
    del rows[8]["options"]
    with pytest.raises(TaskError, match="stopped: prompt 'default' fails on 2 of 100 rows, more than 1%"):
        run(make_task(rows), model)


def test_what_cannot_be_evaluated_is_said(model, make_task, tmp_path):
    with pytest.raises(TaskError, match="row 1 by prompt 'default' .* does not say which choice is right; use a split"):
        run(make_task([ROWS[0], ROWS[1] | {"label": -1}]), model)
    with pytest.raises(TaskError, match="Task mine: .*missing"):
        run(dataclasses.replace(make_task(), source=rows_in(str(tmp_path), "missing.jsonl")), model)
    with pytest.raises(TaskError, match="two prompts of the name 'default'"):
        run(make_task(prompts=(RANK, RANK)), model)
    with pytest.raises(TaskError, match="row 0 has no 'domain', the field to group by"):
        run(make_task(group="domain"), model)
    with pytest.raises(TaskError, match="FewShot.count is 9"):
        run(make_task(few_shot=FewShot(9, split="validation")), model)
    with pytest.raises(ValueError, match="is none of"):
        RankClassification(primary="accuracy_calibrated")
    with pytest.raises(ValueError, match="there are"):
        Generation(metrics=("exact_match", "meteor"))


def test_one_tasks_failure_does_not_stop_the_others(trained, make_task, tmp_path):
    """Files hold every question, and are written when all is done."""
    good = make_task()
    bad = dataclasses.replace(good, name="bad", source=rows_in(str(tmp_path), "missing.jsonl"))
    config = EvaluationConfig((bad, good), scoring=SCORING, samples=20, limit=3)
    result = evaluate(config, trained, folder=tmp_path / "out", report=lambda line: None)
    assert [r.task for r in result.results] == ["mine"] and "missing" in result.failures["bad"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["tasks"]["mine"]["metrics"]["accuracy"]["value"] == result.results[0].metrics["accuracy"].value
    lines = (tmp_path / "out" / "examples.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 2]
    with pytest.raises(ValueError, match="no task 'other'"):
        config.only(["other"])


def test_an_error_of_any_kind_costs_its_task_alone_if_asked(trained, make_task, tmp_path):
    class Broken(RankClassification):
        def judge(self, model, questions):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    good = make_task()
    config = EvaluationConfig(
        (dataclasses.replace(good, name="bad", measure=Broken()), good), scoring=SCORING, samples=0
    )
    lines = []
    result = evaluate(config, trained, folder=tmp_path / "out", report=lines.append, tolerant=True)
    assert result.failures == {"bad": "Task bad: RuntimeError: RESOURCE_EXHAUSTED: out of memory"}
    assert [r.task for r in result.results] == ["mine"] and "Traceback" in lines[0]
    with pytest.raises(RuntimeError, match="RESOURCE"):
        evaluate(config, trained, report=lines.append)


def test_rows_with_what_json_lacks(trained, tmp_path):
    """The text of a date, as rows of parquet files have them, stands in the examples."""
    dated = [row | {"on": datetime.date(2020, 1, 1 + i)} for i, row in enumerate(ROWS)]
    pq.write_table(pa.Table.from_pylist(dated), tmp_path / "rows.parquet")
    task = EvaluationTask("dated", rows_in(str(tmp_path), "rows.parquet"), (RANK,), RANKED, group="on")
    result = evaluate(
        EvaluationConfig((task,), scoring=SCORING, samples=0),
        trained,
        folder=tmp_path / "out",
        report=lambda line: None,
    )
    examples = [json.loads(line) for line in (tmp_path / "out" / "examples.jsonl").read_text().splitlines()]
    assert not result.failures and [example["group"] for example in examples][:2] == ["2020-01-01", "2020-01-02"]


def test_what_is_to_be_asked_again_and_what_others_read(trained, make_task, tmp_path):
    """Tasks that write for others are done again with those that failed: their file may be another model's by then."""

    @dataclasses.dataclass(frozen=True)
    class Writing(EvaluationTask):
        @property
        def writes(self):
            return (str(tmp_path / "shared"),)

        def evaluate(self, subject, **options):
            asked.append(self.name)
            return super().evaluate(subject, **options)

    class Broken(RankClassification):
        def judge(self, model, questions):
            raise ValueError("not now")

    asked, good = [], make_task()
    writes = Writing("writes", good.source, good.prompts, good.measure)
    folder = tmp_path / "out"

    def ask(measure):
        config = EvaluationConfig(
            (writes, good, dataclasses.replace(good, name="reads", measure=measure)), scoring=SCORING, samples=0
        )
        return evaluate(config, trained, folder=folder, report=lambda line: None)

    assert list(ask(Broken()).failures) == ["reads"]
    try_again(folder)
    assert [result.task for result in ask(RANKED).results] == ["writes", "reads"] and asked == ["writes", "writes"]
    assert list(results_in(folder)["tasks"]) == ["writes", "mine", "reads"] and not failures_in(folder)


def test_brackets_in_what_went_wrong_are_shown(capsys):
    """They are no markup, in nobody's console."""
    for console in (make_console(), Console(width=200)):
        console.print(SuiteResult("m", (), {"a": "pip install -e '.[evaluation]' [/x]"}).table())
        assert "pip install -e '.[evaluation]' [/x]" in capsys.readouterr().out


def test_what_a_task_reads_is_looked_for_before_there_is_a_model(make_task, tmp_path):
    task = make_task(train=ROWS, few_shot=FewShot(2))
    task.check()
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(TaskError, match=r"Task mine: No text at '.*/train.jsonl': nothing is there"):
        task.check()
    task.check(written=[str(tmp_path / "train.jsonl")])
    for pattern in ("made", "made/**/*.jsonl", "made/*.jsonl"):
        reading = dataclasses.replace(task, source=TextFiles(str(tmp_path / pattern), held_out=0.0), few_shot=None)
        reading.check(written=[str(tmp_path / "made" / "rows.jsonl")])
        with pytest.raises(TaskError, match="nothing is there"):
            reading.check(written=[str(tmp_path / "elsewhere" / "rows.jsonl")])
    templates = dataclasses.replace(make_task(), prompts=(PromptsourceTemplates(str(tmp_path), "copa"),))
    with pytest.raises(TaskError, match="Task mine: There are no promptsource templates at .*copa/templates.yaml"):
        templates.check()


def test_how_texts_are_put_to_a_model(trained):
    """Together as lm-evaluation-harness splits them, apart as pairs of finetuning, with their ends."""

    def encoded(format, context, text):
        ((before, after),) = TextModel(trained, format=format, scoring=SCORING).encode([(context, text)])
        return VOCABULARY.decode(before), VOCABULARY.decode(after), before[-1:].tolist(), after[-1:].tolist()

    assert encoded(TextFormat(), "ab ", "cd")[:2] == ("ab", "  cd")
    assert encoded(TextFormat(delimiter=""), "ab", "cd")[:2] == ("ab", "cd")
    assert encoded(TextFormat(), "", "cd")[:2] == ("", "cd")
    apart = TextFormat(tokenize="apart", eos="both")
    assert encoded(apart, "ab", "cd") == ("ab", "cd", [1], [1])
    assert encoded(dataclasses.replace(apart, eos="targets"), "ab", "cd")[2:] == ([ord("b") + 3], [1])


def test_intervals_cover_what_they_should():
    """A 95% interval holds the true share in about 95 of 100 samples, here between 88 and 100."""
    chance = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        right = (chance.random((1, 200)) < 0.3).astype(float)
        found = estimate(np.stack([right, np.ones_like(right)]), samples=200, seed=seed)
        assert found.low <= found.value <= found.high and found.value == right.mean()
        hits += found.low <= 0.3 <= found.high
    assert 88 <= hits <= 100
    assert estimate(np.array([[[2.0, 4.0]], [[1.0, 2.0]]]), samples=0, seed=0).value == 2.0


def test_the_command_line(trained, tmp_path, monkeypatch, capsys):
    """A shipped suite is asked by name; what cannot be done is one sentence and a status."""
    monkeypatch.setattr("jaxlm.checkpoints.pretrained.load", lambda path, **options: trained)
    (tmp_path / "copa").mkdir()
    row = {"query": "It rained, so", "choices": ["it was wet.", "it was dry."], "gold": 0}
    for name in ("train", "validation"):
        with gzip.open(tmp_path / "copa" / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n")
    asked = ["--model=mine", "--gin_file=gin_configs/evaluation/zero_shot.gin", f"--gin.EVALUATION_DATA='{tmp_path}'"]
    out = f"--output={tmp_path / 'out'}"
    assert main([*asked, out, "--tasks=copa"]) == ExitStatus.FINISHED
    assert "copa" in capsys.readouterr().out and (tmp_path / "out" / "results.json").is_file()
    assert main([*asked, out, "--tasks=copa,piqa"]) == ExitStatus.FAILED  # piqa's rows are not there
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["failures"]) == {"piqa"}
    assert main([*asked, "--tasks=capo"]) == ExitStatus.FAILED
    assert "There is no task 'capo' among" in capsys.readouterr().err
    assert main(asked[1:]) == ExitStatus.CONFIGURATION
    assert "Give --model=PATH" in capsys.readouterr().err
