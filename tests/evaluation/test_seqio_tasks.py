"""Our evaluation tasks run in seqio's evaluator, and have the numbers that they have here."""

import json

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="the seqio extra is not installed", exc_type=ImportError)

from jaxlm.architecture import Architecture  # noqa: E402
from jaxlm.data.prompts import Prompt  # noqa: E402
from jaxlm.data.vocabularies import ByteVocabulary  # noqa: E402
from jaxlm.evaluation.measures import Continuation, Generation, RankClassification, TextLikelihood  # noqa: E402
from jaxlm.evaluation.scoring import ScoringConfig  # noqa: E402
from jaxlm.evaluation.seqio_tasks import model_functions, register_with_seqio  # noqa: E402
from jaxlm.evaluation.tasks import EvaluationTask, TaskError, evaluate_task, rows_in  # noqa: E402
from jaxlm.evaluation.text_model import TextFormat, TextModel  # noqa: E402
from jaxlm.objectives.supervised import Eos  # noqa: E402
from tests.evaluation.models import T5_TABLE, as_pretrained, make_model  # noqa: E402

VOCABULARY = ByteVocabulary(extra_ids=0)
ROWS = [
    {"q": "The sky is", "options": ["blue", "made of cheese"], "label": 0},
    {"q": "Two and two are", "options": ["five", "four", "three"], "label": 1},
    {"q": "Water is", "options": ["wet", "dry"], "label": 0},
]
RANK = Prompt(context="{{ q }}", choices="options", gold="label")
FREE = Prompt(context="{{ q }}", answers="options")


@pytest.fixture(autouse=True)
def registries():
    """Leaves seqio's registries as they were."""
    before = [dict(registry._REGISTRY) for registry in (seqio.TaskRegistry, seqio.MixtureRegistry)]
    yield
    for registry, kept in zip((seqio.TaskRegistry, seqio.MixtureRegistry), before):
        registry._REGISTRY.clear()
        registry._REGISTRY.update(kept)


@pytest.fixture
def make_task(tmp_path):
    def make(measure, prompts=(RANK,), name="mine", rows=ROWS, **options):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return EvaluationTask(name, rows_in(str(tmp_path), f"{name}.jsonl"), prompts, measure, **options)

    return make


def evaluated(name, functions, converter=None, **options):
    converter = converter or seqio.EncDecFeatureConverter(pack=False)
    evaluator = seqio.Evaluator(name, converter, eval_split="validation", async_compute_metrics=False, **options)
    metrics, _ = evaluator.evaluate(compute_metrics=True, **functions)
    return metrics.result()


def rows_of(name):
    return list(seqio.get_mixture_or_task(name).get_dataset(None, "validation", shuffle=False).as_numpy_iterator())


def longer_is_likelier(dataset, shapes=None):
    """A stand-in for a model: a token is worth a nat, in an order of its own."""
    scores = [(int(i), float((f["decoder_target_tokens"] > 0).sum())) for i, f in dataset.as_numpy_iterator()]
    return scores[::-1]


def test_rank_classification_has_a_row_for_each_choice(make_task):
    """T5's names and numbers: idx (question, choice), is_correct; the accuracy is that of the best choice."""
    names = register_with_seqio([make_task(RankClassification())], VOCABULARY)
    assert names == {"mine": "mine"}
    rows = rows_of("mine")
    assert [row["idx"].tolist() for row in rows] == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1]]
    assert [bool(row["is_correct"]) for row in rows] == [True, False, False, True, False, True, False]
    assert rows[1]["inputs_pretokenized"] == b"The sky is" and rows[1]["targets_pretokenized"] == b"made of cheese"
    assert rows[1]["inputs"].tolist() == VOCABULARY.encode("The sky is").tolist()
    assert rows[1]["targets"].tolist() == [*VOCABULARY.encode("made of cheese").tolist(), 1]
    found = evaluated("mine", {"score_fn": longer_is_likelier})["mine"]
    # "made of cheese" (wrong), "three" before "five" as the longer, and of equals the first: "wet" (right).
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_per_token"] == pytest.approx(2 / 3)  # all are worth one nat a token: the first choice
    assert found["gold_nll"] == pytest.approx(-(5 + 5 + 4) / 3)


def test_t5s_own_metric_reads_the_same_rows(make_task):
    """The best choice of each idx, as t5.evaluation.metrics.rank_classification takes it."""
    register_with_seqio([make_task(RankClassification())], VOCABULARY, eos=Eos.BOTH)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=7)
    rows = rows_of("mine")
    assert all(row["inputs"][-1] == 1 == row["targets"][-1] for row in rows)
    best = {}
    for row, score in zip(rows, scores):
        question = int(row["idx"][0])
        best[question] = max(best.get(question, (-np.inf, False)), (score, bool(row["is_correct"])))
    found = evaluated("mine", {"score_fn": lambda dataset, shapes=None: list(enumerate(scores))})["mine"]
    assert found["accuracy"] == pytest.approx(np.mean([right for _, right in best.values()]))


def test_several_prompts_are_a_mixture(make_task):
    prompts = (RANK, Prompt(name="asked, again?", context="{{ q }} ...", choices="options", gold="label"))
    assert register_with_seqio([make_task(RankClassification(), prompts)], VOCABULARY) == {"mine": "mine"}
    found = evaluated("mine", {"score_fn": longer_is_likelier}, num_examples=4)
    assert set(found) == {"mine_default", "mine_asked_again_"}
    # Of the first four rows only the first question is whole.
    assert found["mine_default"]["accuracy"] == 0.0


def test_generation_is_judged_by_its_predictions(make_task):
    """Answers end at a stop text, as they do here."""
    register_with_seqio([make_task(Generation(stop=("\n",)), (FREE,))], VOCABULARY)
    written = ["the blue!\nThe sky is", "six", "very wet"]

    def predict(dataset, shapes=None):
        ids = [VOCABULARY.encode(text).tolist() for text in written]
        return [(i, [*ids[i], *[0] * (40 - len(ids[i]))]) for i, _ in dataset.as_numpy_iterator()]

    found = evaluated("mine", {"predict_fn": predict})["mine"]
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)


@pytest.fixture(
    scope="module", params=[Architecture.ENCODER_DECODER, Architecture.PREFIX_DECODER], ids=lambda a: a.value
)
def model(request):
    """A small model with random parameters, asked as supervised finetuning had its texts."""
    module = make_model(request.param, vocab_size=VOCABULARY.size, position=T5_TABLE)
    trained = as_pretrained(module, VOCABULARY)
    scoring = ScoringConfig(row_length=64, batch_tokens=256)
    return TextModel(trained, format=TextFormat(tokenize="apart", eos="targets"), scoring=scoring)


def test_a_model_of_ours_has_the_same_numbers_in_seqios_evaluator(model, make_task):
    """Of every measure that rows can express: both ways go through other code from the text to the ids."""
    tasks = [
        make_task(RankClassification("accuracy_calibrated", unconditional="Answer:"), name="ranked"),
        make_task(Continuation(), (Prompt(context="{{ q }}", answers="[options[label]]"),), name="continued"),
        make_task(Generation(max_new_tokens=6), (FREE,), name="written"),
    ]
    names = register_with_seqio(tasks, VOCABULARY)
    if model.architecture is Architecture.ENCODER_DECODER:
        converter = seqio.EncDecFeatureConverter(pack=False)
    else:
        converter = seqio.PrefixLMFeatureConverter(pack=False)
    for task in tasks:
        found = evaluated(names[task.name], model_functions(model, max_new_tokens=6), converter)[task.name]
        result, _ = evaluate_task(task, model, samples=0)
        here = {name: value.value for name, value in result.metrics.items()}
        if task.name == "continued":
            del here["accuracy"]  # a score does not tell
        assert found == pytest.approx(here, rel=1e-5) and len(found) > 1


def test_what_seqio_cannot_have_is_said(make_task):
    with pytest.raises(TaskError, match="judged by TextLikelihood, which seqio's rows .* evaluate it with jaxlm"):
        register_with_seqio([make_task(TextLikelihood(), (Prompt(answers="q"),))], VOCABULARY)
    register_with_seqio([make_task(RankClassification())], VOCABULARY)
    with pytest.raises(TaskError, match="seqio has a task or mixture named 'mine' already; give this one another"):
        register_with_seqio([make_task(RankClassification())], VOCABULARY)
    two = tuple(Prompt(name=name, choices="options", gold="label") for name in ("a b", "a-b"))
    with pytest.raises(TaskError, match="'other/a b' and 'other/a-b' have the same name in seqio, 'other_a_b'"):
        register_with_seqio([make_task(RankClassification(), two, name="other")], VOCABULARY)


def test_rows_without_gold_answers_stop_when_seqio_reads_them(make_task):
    task = make_task(RankClassification(), rows=[ROWS[0], ROWS[1] | {"label": -1}])
    register_with_seqio([task], VOCABULARY)
    with pytest.raises(TaskError, match="row 1 by prompt 'default' .* does not say which choice is right"):
        rows_of("mine")
