"""Finetuning sweeps and linear probes: what is read, what is learnt, and that the test split chooses nothing."""

import dataclasses
import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.pretrained import Pretrained
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.evaluate import main
from jaxlm.evaluation import finetuning, label_metrics, probing
from jaxlm.evaluation.annotation import Annotation
from jaxlm.evaluation.finetuning import FinetuningSweep, order
from jaxlm.evaluation.labelled import LabelledRows, SentenceSimilarity, SequenceClassification, TokenClassification
from jaxlm.evaluation.learned import Trial, features_program, labeller_of, outputs_program
from jaxlm.evaluation.probing import LinearProbe, fit
from jaxlm.evaluation.subject import Subject
from jaxlm.evaluation.tasks import TaskError
from jaxlm.exit_status import ExitStatus
from jaxlm.layers.context import LOCAL
from jaxlm.models.labeller import Pooling, body_config, body_of, pooled
from jaxlm.training.optimizers import build_optimizer
from jaxlm.training.schedules import Join, Linear
from jaxlm.training.state import seed_data
from pallas_kernels.masks import Segments
from tests.evaluation.models import make_model

VOCABULARY = ByteVocabulary(extra_ids=0)
SIZES = {"train": 96, "validation": 32, "test": 40}
ARCHITECTURES = tuple(Architecture)


def opened_model(architecture, seed=0):
    module = make_model(architecture, vocab_size=VOCABULARY.size, seed=seed)
    starts = None if architecture is Architecture.ENCODER else 0
    return Pretrained(
        model=module,
        config=module.config,
        vocabulary=VOCABULARY,
        no_vocabulary=None,
        start_id=starts,
        input_end_id=1 if architecture is Architecture.ENCODER_DECODER else None,
        eos_ids=(1,),
        context_length=48,
        source="a model",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows whose class is a letter that they repeat: what a model can learn in a few steps."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)

    def row():
        label = int(rng.integers(3))
        words = ["".join(rng.choice(list("abc"[label] * 3 + "defgh"), 4)) for _ in range(4)]
        return {
            "text": " ".join(words),
            "label": "xyz"[label],
            "words": words,
            "tags": ["V" if word[-1] > "d" else "C" for word in words],
            "residues": "".join(words[:2]),
            "states": "".join("H" if c > "d" else "E" for c in "".join(words[:2])),
            "other": "abc"[int(rng.integers(3))] * 6,
            "score": 5.0 * float(label == 0),
        }

    for split, count in SIZES.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row()) for _ in range(count)) + "\n")
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return LabelledRows(str(folder), train="train.jsonl", validation="validation.jsonl", test="test.jsonl")


@pytest.fixture(scope="module")
def kinds(rows):
    return {
        "sequence": SequenceClassification(rows),
        "words": TokenClassification(rows, words="words", labels="tags"),
        "pair": SentenceSimilarity(rows, first="{{ text }}", second="{{ other }}", high=5.0),
    }


def test_words_are_labelled_at_their_last_piece(rows):
    kind = TokenClassification(rows, words="words", labels="tags")
    examples, classes = kind.read(VOCABULARY, None)
    task, model = LinearProbe("t", kind, batch_size=4), opened_model(Architecture.CAUSAL_DECODER)
    opened = task.opened(model, None)
    assert classes == ("C", "V") and opened.rows.first == 1 and opened.rows.length == 24  # 19 bytes and the start
    batch = {name: np.asarray(x) for name, x in opened.batch("train", [3, 5]).items()}
    for row, i in enumerate((3, 5)):
        text = VOCABULARY.decode(examples["train"].texts[i][0])
        columns = np.flatnonzero(batch["labels"][row] >= 0)
        assert batch["decoder_input_tokens"][row, 0] == 0 and batch["decoder_segment_ids"][row].sum() == 20
        read = [VOCABULARY.decode([batch["decoder_input_tokens"][row, column]]) for column in columns]
        assert read == [word[-1] for word in text.split(" ")], "a causal model has read the whole word there"
        assert [classes[k] for k in batch["labels"][row, columns]] == ["V" if c > "d" else "C" for c in read]
    assert not batch["weights"][2:].any() and not batch["text"][2:].any(), "the batch is filled up with nothing"
    short = dataclasses.replace(task, max_length=8).opened(model, None)
    gold, texts = short.gold("test")
    assert len(gold) == 40 and np.array_equal(texts, np.arange(40)), "of four words only one ends within seven bytes"


def test_characters_of_a_text_are_words(rows):
    kind = TokenClassification(rows, words="residues", labels="states", separator="")
    examples, classes = kind.read(VOCABULARY, 10)
    assert classes == ("E", "H") and len(examples["train"]) == 10
    (ids,), labels, places = examples["test"].texts[0], examples["test"].labels[0], examples["test"].places[0]
    assert len(ids) == len(labels) == 8 and np.array_equal(places, np.arange(8))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.value)
def test_features_are_the_models_own_states(architecture, kinds):
    """In a batch, padded, they equal those of the text alone; of an encoder-decoder they are the encoder's."""
    model = opened_model(architecture)
    opened = LinearProbe("t", kinds["sequence"], batch_size=4).opened(model, None)
    read = features_program(dataclasses.replace(opened.form, head_size=None))
    found = np.asarray(read({"body": opened.body}, opened.batch("test", [7, 2, 9])))
    (ids,) = opened.examples["test"].texts[2]
    start = [0] if architecture.has_decoder_features and architecture is not Architecture.ENCODER_DECODER else []
    end = [1] if architecture is Architecture.ENCODER_DECODER else []
    tokens = jnp.asarray([[*start, *ids.tolist(), *end]])
    ones, positions = jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None]
    if architecture is Architecture.ENCODER_DECODER:
        embedded = model.model.embedding(tokens, positions, context=LOCAL)
        present = {"positions": positions, "present": ones > 0}
        hidden, _ = model.model.encoder(embedded, Segments(ones), **present, context=LOCAL)
    else:
        stack = "decoder" if start else "encoder"
        batch = {f"{stack}_input_tokens": tokens, f"{stack}_segment_ids": ones, f"{stack}_positions": positions}
        if architecture is Architecture.PREFIX_DECODER:
            batch["decoder_causal_attention"] = ones
        hidden, _ = model.model.hidden_states(batch)
    own = hidden[0, len(start) : tokens.shape[1] - len(end)]
    np.testing.assert_allclose(found[1], own.mean(0), atol=1e-5)
    last = pooled(hidden, (jnp.arange(tokens.shape[1]) < tokens.shape[1] - len(end))[None], Pooling.LAST)
    np.testing.assert_allclose(last[0], own[-1], atol=1e-6)


def test_a_rate_is_the_optimizers(kinds):
    """The step's argument scales a schedule of peak 1: the parameters are those of an optimizer at that rate."""
    task = FinetuningSweep("t", kinds["sequence"], batch_size=8, rates=(3e-3,), epochs=0.5, weight_decay=0.1)
    opened = task.opened(opened_model(Architecture.ENCODER), None)
    recipe = finetuning.Recipe(task.warmup, task.weight_decay, 6)
    params, moments = finetuning._begin(opened.form, recipe)({"body": opened.body}, seed_data(1))
    unit = finetuning._optimizer(opened.form, recipe)
    schedule = Join((Linear(0.0, 3e-3), Linear(3e-3, 0.0)), lengths=(task.warmup,))
    config = dataclasses.replace(unit.config, learning_rate=schedule)
    optimizer = build_optimizer(config, unit.infos, total_steps=6, parametrization=opened.config.scaling)
    definition = labeller_of(opened.form)[0]
    expected, state = jax.tree.map(jnp.copy, params), optimizer.init(params)

    def loss(params, batch):
        outputs, _ = opened.form.kind.outputs(definition.merge(params), batch, Pooling.MEAN, LOCAL)
        return opened.form.kind.loss(outputs, batch)

    @jax.jit
    def plain(params, state, batch, index):
        grads = jax.grad(loss)(params, batch)
        updates, state, _ = optimizer.update(grads, state, params, step=index, loss=jnp.float32(0))
        return optax.apply_updates(params, updates), state

    step = finetuning._step(opened.form, recipe)
    for index, chosen in enumerate(order(96, 8, 3, seed=1)):
        batch = opened.batch("train", chosen)
        expected, state = plain(expected, state, batch, np.int32(index))
        params, moments = step(params, moments, batch, np.float32(3e-3), np.int32(index), seed_data(1))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, {**params, "body": opened.body})
    assert max(jax.tree.leaves(moved["body"])) > 1e-3
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_every_kind_is_learnt_and_probed(kinds):
    """A few steps beat the labels alone, from an encoder and, for classes, from a causal model under the full mask."""
    subject = Subject(opened_model(Architecture.ENCODER))
    for kind in kinds.values():
        result, _ = LinearProbe("probe", kind).evaluate(subject, samples=50)
        assert result.metrics[result.primary].value > result.chance + 0.02 and result.spread is None
        assert result.metrics[result.primary].low <= result.metrics[result.primary].value
    sweep = FinetuningSweep("sweep", kinds["sequence"], rates=(1e-3, 1e-2), seeds=(0, 1), epochs=5, limit=64)
    result, records = sweep.evaluate(subject, report=lambda line: None)
    assert result.metrics["accuracy"].value > 0.9 and result.rows == {"train": 64, "validation": 32, "test": 40}
    assert len(list(records)) == 4 and result.spread is not None
    causal = Subject(opened_model(Architecture.CAUSAL_DECODER))
    probe = LinearProbe("probe", kinds["sequence"], architecture="encoder")
    result, _ = probe.evaluate(causal, samples=0)
    assert result.architecture == "encoder" and result.metrics["accuracy"].value > 0.8


def test_meshes_agree(folder, run_python):
    """Parameters and examples over two devices: features and a trained trial are those of one."""
    found = json.loads(
        run_python(["tests/evaluation/learned_program.py", str(folder)], devices=2).stdout.splitlines()[-1]
    )
    np.testing.assert_allclose(found["two"]["features"], found["one"]["features"], atol=1e-5)
    assert found["two"]["pearson"] == pytest.approx(found["one"]["pearson"], abs=1e-3)
    with pytest.raises(TaskError, match="Task t: A batch of 3 examples cannot be split"):
        LinearProbe(
            "t", SequenceClassification(LabelledRows(str(folder), "train.jsonl", "test.jsonl")), batch_size=3
        ).opened(opened_model(Architecture.ENCODER), TwoParts())


class TwoParts:
    """A mesh of two devices, as far as a batch is concerned."""

    def batch_sharding(self, batch_size):
        if batch_size % 2:
            raise ValueError(f"A batch of {batch_size} examples cannot be split over 2 devices.")


def test_the_test_split_chooses_nothing(kinds, monkeypatch):
    def trial(task, opened, start, rate, seed):
        validation, test = {1e-3: (0.6, 0.9), 1e-2: (0.8, 0.2)}[rate]
        shift = 0.05 * seed
        return Trial(rate, seed, *({"accuracy": x + shift, "macro_f1": 0.0} for x in (validation, test))), {}

    monkeypatch.setattr(finetuning, "run_trial", trial)
    sweep = FinetuningSweep("t", kinds["sequence"], rates=(1e-3, 1e-2), seeds=(0, 1, 2))
    result, _ = sweep.evaluate(Subject(opened_model(Architecture.ENCODER)), report=lambda line: None)
    assert result.chosen == 1e-2 and result.metrics["accuracy"].value == pytest.approx(0.25)
    assert result.spread == pytest.approx(0.05)
    half = 4.3027 * 0.05 / np.sqrt(3)  # Student's t for two degrees of freedom
    assert result.metrics["accuracy"].low == pytest.approx(0.25 - half, abs=1e-4)


@pytest.fixture(scope="module")
def annotated(folder, kinds):
    """(the training texts as a teacher labelled them, what the sweep reported)."""
    output, lines = folder / "taught.jsonl.gz", []
    annotation = Annotation(str(folder / "train.jsonl"), str(output))
    sweep = FinetuningSweep(
        "t", kinds["sequence"], rates=(1e-2, 1e-9), seeds=(0,), epochs=5, limit=64, annotation=annotation
    )
    sweep.evaluate(Subject(opened_model(Architecture.ENCODER)), report=lines.append)
    return output, lines


def as_taught(rows, **changes):
    return SequenceClassification(dataclasses.replace(rows, train="taught.jsonl.gz", **changes), taught="taught")


def test_annotations_are_the_best_trials_outputs(annotated, folder, kinds):
    """Computed once for all texts, in batches of the sweep's size: what the same model says of other batches."""
    output, lines = annotated
    assert lines[-1] == f"t: the model of rate 0.01, seed 0 labelled 96 texts in {output}"
    written = [json.loads(line) for line in gzip.open(output, "rt")]
    rows = [json.loads(line) for line in (folder / "train.jsonl").open()]
    assert [{name: row[name] for name in row if name != "taught"} for row in written] == rows
    sweep = FinetuningSweep("t", kinds["sequence"], epochs=5, limit=64)
    opened = sweep.opened(opened_model(Architecture.ENCODER), None)
    _, params = finetuning.run_trial(sweep, opened, {"body": opened.body}, 1e-2, 0)
    opened = dataclasses.replace(
        opened, task=dataclasses.replace(sweep, batch_size=7), examples=kinds["sequence"].read(VOCABULARY, None)[0]
    )
    online = opened.everything("train", functools.partial(outputs_program(opened.form), params))
    given = np.array([list(row["taught"].values()) for row in written])
    np.testing.assert_allclose(given, jax.nn.softmax(online), rtol=1e-4, atol=1e-7)
    assert list(written[0]["taught"]) == ["x", "y", "z"]


def test_a_student_that_is_its_teacher_has_nothing_to_learn(annotated, rows, kinds):
    sweep = FinetuningSweep("t", kinds["sequence"], epochs=5, limit=64)
    opened = sweep.opened(opened_model(Architecture.ENCODER), None)
    _, params = finetuning.run_trial(sweep, opened, {"body": opened.body}, 1e-2, 0)
    taught = FinetuningSweep("t", as_taught(rows)).opened(opened_model(Architecture.ENCODER), None)
    definition, batch = labeller_of(taught.form)[0], taught.batch("train", range(32))

    def loss(params):
        return taught.form.kind.loss(
            taught.form.kind.outputs(definition.merge(params), batch, Pooling.MEAN, LOCAL)[0], batch
        )

    value, grads = jax.value_and_grad(loss)(params)
    moved = jax.grad(loss)(params | {"body": taught.body})
    assert abs(float(value)) < 1e-6
    assert optax.tree.norm(grads) < 1e-5 * optax.tree.norm(moved)


def test_a_student_learns_without_labels(annotated, rows):
    """From a teacher's word alone, judged by labels it never saw."""
    student = Subject(opened_model(Architecture.ENCODER, seed=7))
    sweep = FinetuningSweep("t", as_taught(rows), rates=(1e-2,), seeds=(0,), epochs=5)
    result, _ = sweep.evaluate(student, report=lambda line: None)
    assert result.metrics["accuracy"].value > 0.9 and result.chance < 0.6


def test_a_sweep_goes_on_from_the_best_model_of_another(annotated, rows, kinds):
    """Trials of a vanishing rate are that model; the trials of the first sweep are run, and the worse are left."""
    student, lines = Subject(opened_model(Architecture.ENCODER, seed=7)), []
    first = FinetuningSweep("first", as_taught(rows), rates=(1e-9, 1e-2), seeds=(0,), epochs=5)
    then = FinetuningSweep("then", kinds["sequence"], rates=(1e-9,), seeds=(0, 1), epochs=1, limit=64, after=first)
    alone, _ = first.evaluate(student, report=lambda line: None)
    result, _ = then.evaluate(student, report=lines.append)
    assert result.metrics["accuracy"].value == alone.metrics["accuracy"].value > 0.9
    assert [line.split(":")[0] for line in lines] == [
        "first, rate 1e-09, seed 0",
        "first, rate 0.01, seed 0",
        "then, rate 1e-09, seed 0",
        "then, rate 1e-09, seed 1",
    ]
    with pytest.raises(ValueError, match="must be of the same kind; they are .*'TokenClassification'.* and "):
        FinetuningSweep("then", kinds["words"], after=first)


def test_taught_classes_are_in_the_order_of_the_labels(tmp_path):
    """Keys of JSON are texts, "10" before "2"; a model that learnt from them goes on with labels that are numbers."""
    names = [str(i) for i in range(12)]
    taught = {name: 0.5 if name in ("2", "10") else 0.0 for name in reversed(names)}
    (tmp_path / "taught.jsonl").write_text(json.dumps({"text": "a", "taught": taught}) + "\n")
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps({"text": "a", "label": i}) + "\n" for i in range(12)))
    splits = {"validation": "labels.jsonl", "test": "labels.jsonl"}
    rows = {split: LabelledRows(str(tmp_path), train=f"{split}.jsonl", **splits) for split in ("taught", "labels")}
    examples, classes = SequenceClassification(rows["taught"], taught="taught").read(VOCABULARY, None)
    of_labels, known = SequenceClassification(rows["labels"]).read(VOCABULARY, None)
    assert list(classes) == names and list(known) == list(range(12))
    assert np.flatnonzero(examples["train"].labels[0]).tolist() == [2, 10]
    assert list(examples["test"].labels) == list(of_labels["test"].labels)


def test_a_sweep_does_not_go_on_with_other_classes(rows, kinds, folder):
    (folder / "two.jsonl").write_text("".join(json.dumps({"text": x * 8, "label": x}) + "\n" for x in "xy" * 16))
    two = SequenceClassification(dataclasses.replace(rows, train="two.jsonl", validation="two.jsonl", test="two.jsonl"))
    sweep = FinetuningSweep("then", kinds["sequence"], after=FinetuningSweep("first", two))
    with pytest.raises(
        TaskError, match=r"what first has learnt, whose 2 classes \(x, y\) are not its own 3 \(x, y, z\)"
    ):
        sweep.evaluate(Subject(opened_model(Architecture.ENCODER)))


@pytest.mark.parametrize(
    ("chances", "sentence"),
    [
        ({"x": 0.5, "y": 0.5}, "row 1 of the split 'train' teaches the classes x, y, but must give"),
        ({"x": 0.5, "y": 0.1, "z": 0.1}, "row 1 of the split 'train' has probabilities that sum to 0.7 and not to 1"),
    ],
)
def test_distributions_that_are_none_are_named(chances, sentence, annotated, rows, folder):
    (folder / "bad.jsonl").write_text(
        "".join(json.dumps({"text": "a", "taught": of}) + "\n" for of in ({"x": 1.0, "y": 0.0, "z": 0.0}, chances))
    )
    task = FinetuningSweep("t", dataclasses.replace(as_taught(rows), rows=dataclasses.replace(rows, train="bad.jsonl")))
    with pytest.raises(TaskError, match=sentence):
        task.opened(opened_model(Architecture.ENCODER), None)


def test_labelled_files_are_looked_for_before_there_is_a_model(kinds, rows, folder, tmp_path):
    """Those that a teacher writes on the way need not be there yet."""
    output = str(tmp_path / "taught.jsonl.gz")
    teacher = FinetuningSweep("t", kinds["sequence"], annotation=Annotation(str(folder / "train.jsonl"), output))
    late = dataclasses.replace(rows, train=output)  # a path of its own, whatever the folder
    student = FinetuningSweep("s", SequenceClassification(late, taught="taught"))
    teacher.check()
    assert teacher.writes == (output,) and dataclasses.replace(student, after=teacher).writes == (output,)
    student.check(teacher.writes)
    for task in (student, LinearProbe("p", SequenceClassification(late)), dataclasses.replace(teacher, after=student)):
        with pytest.raises(TaskError, match=r"^Task [sp]: No text at '.*/taught.jsonl.gz': nothing is there"):
            task.check()
    nowhere = dataclasses.replace(teacher, annotation=Annotation(str(tmp_path / "none.jsonl"), output))
    with pytest.raises(TaskError, match="Task t, its annotation: No text at '.*/none.jsonl'"):
        nowhere.check()


def test_what_cannot_be_annotated_is_one_sentence(kinds, folder, tmp_path):
    annotation = Annotation(str(folder / "train.jsonl"), str(tmp_path / "out.jsonl"))
    with pytest.raises(ValueError, match=r"FinetuningSweep 't': an Annotation gives .* TokenClassification has none"):
        FinetuningSweep("t", kinds["words"], annotation=annotation)
    nowhere = dataclasses.replace(annotation, texts=str(tmp_path / "none.jsonl"))
    sweep = FinetuningSweep("t", kinds["sequence"], rates=(1e-3,), seeds=(0,), epochs=0.1, limit=8, annotation=nowhere)
    with pytest.raises(TaskError, match="Task t, its annotation: .*none.jsonl"):
        sweep.evaluate(Subject(opened_model(Architecture.ENCODER)), report=pytest.fail)
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    empty = dataclasses.replace(sweep, annotation=dataclasses.replace(annotation, texts=str(tmp_path / "one.jsonl")))
    with pytest.raises(TaskError, match=r"Task t, its annotation: row 1 of .*one.jsonl has no text"):
        empty.evaluate(Subject(opened_model(Architecture.ENCODER)), report=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]


def test_probes_are_at_their_optimum():
    rng = np.random.default_rng(0)
    features, gold = rng.normal(size=(200, 5)), rng.integers(0, 3, 200)
    weights, bias = fit(features, gold, 3, 0.1)

    def loss(weights, bias):
        logits = features @ weights + bias
        return -np.mean((logits - np.logaddexp.reduce(logits, 1, keepdims=True))[np.arange(200), gold]) + (
            0.05 * (weights**2).sum()
        )

    best = loss(weights, bias)
    for _ in range(20):
        assert loss(weights + 1e-3 * rng.normal(size=weights.shape), bias + 1e-3 * rng.normal(size=3)) > best
    numeric = [(loss(weights + e, bias) - loss(weights - e, bias)) / 2e-5 for e in 1e-5 * np.eye(15).reshape(15, 5, 3)]
    assert np.abs(numeric).max() < 1e-5
    scores = features @ np.arange(5.0) + 2.0
    weights, bias = fit(features, scores, 0, 1e-9)
    np.testing.assert_allclose(weights, np.arange(5.0), atol=1e-6)
    assert bias == pytest.approx(2.0)
    shrunk, _ = fit(features, scores, 0, 1.0)
    centred = features - features.mean(0)
    np.testing.assert_allclose(
        centred.T @ (centred @ shrunk - (scores - scores.mean())) / 200 + shrunk, np.zeros(5), atol=1e-9
    )


def test_metrics_by_hand():
    gold, predicted, ones = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]), np.ones(4)
    assert label_metrics.accuracy(gold, predicted, ones) == 0.5
    assert label_metrics.macro_f1(gold, predicted, ones) == pytest.approx((2 / 3 + 0.5 + 0.0) / 3)
    weights = np.array([2, 0, 1, 0])
    repeated = np.repeat(np.arange(4), weights)
    for name, metric in label_metrics.METRICS.items():
        given = (gold, predicted) if name in ("accuracy", "macro_f1") else (gold * 0.5, np.array([0.1, 3.0, 0.4, -1.0]))
        assert metric(*given, weights) == pytest.approx(metric(*(x[repeated] for x in given), np.ones(3))), name
    assert label_metrics.spearman(np.array([1.0, 2, 3]), np.array([1.0, 10, 100]), np.ones(3)) == pytest.approx(1.0)
    assert label_metrics.pearson(np.array([1.0, 2, 3]), np.ones(3), np.ones(3)) == 0.0
    low, high = label_metrics.resampled("accuracy", gold, predicted, np.arange(4), samples=200, seed=0)
    assert 0.0 <= low < 0.5 < high <= 1.0


def test_an_encoder_decoder_gives_its_encoder():
    model = opened_model(Architecture.ENCODER_DECODER).model
    body = body_of(model)
    assert body.config.architecture is Architecture.ENCODER and body.decoder is None and body.vocabulary_head is None
    whole, own = (dict(nnx.to_flat_state(nnx.state(x))) for x in (model, body))
    assert all(np.array_equal(variable.get_value(), whole[key].get_value()) for key, variable in own.items())
    assert {key[0] for key in own} == {"embedding", "encoder"} and len(own) < len(whole)
    with pytest.raises(ValueError, match="Of an encoder_decoder the encoder is labelled with"):
        body_config(model.config, Architecture.CAUSAL_DECODER)
    with pytest.raises(ValueError, match="A model of one stack"):
        body_config(opened_model(Architecture.ENCODER).config, Architecture.ENCODER_DECODER)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"label": "nothing"}, "row 0 of the split 'train': 'nothing' is not defined by the row"),
        ({"label": "'same'"}, "the training rows have the labels ['same'] alone"),
        ({"text": "{{ '' }}"}, "row 0 of the split 'train' has no text"),
        ({"label": "text"}, "row 0 of the split 'validation' has the label"),
    ],
    ids=["no such field", "one class", "no text", "unknown class"],
)
def test_rows_that_cannot_be_learnt_are_named(change, sentence, rows):
    kind = dataclasses.replace(SequenceClassification(rows), **change)
    with pytest.raises(TaskError, match="Task mine: ") as error:
        LinearProbe("mine", kind).opened(opened_model(Architecture.ENCODER), None)
    assert sentence in str(error.value)


def test_more_bad_input(rows, kinds):
    model = opened_model(Architecture.ENCODER)
    for kind, sentence in (
        (TokenClassification(rows, words="words", labels="tags[:2]"), "it has 4 words and 2 labels"),
        (SentenceSimilarity(rows, first="{{ text }}", second="x", high=1.0), "scores outside 0.0 to 1.0"),
        (SequenceClassification(dataclasses.replace(rows, where={"test": "label == 'q'"})), "'test' has no rows"),
    ):
        with pytest.raises(TaskError) as error:
            LinearProbe("mine", kind).opened(model, None)
        assert sentence in str(error.value)
    with pytest.raises(ValueError, match="names the splits"):
        dataclasses.replace(rows, where={"dev": "true"})
    with pytest.raises(ValueError, match="primary is 'spearman'; it has accuracy, macro_f1"):
        SequenceClassification(rows, primary="spearman")
    with pytest.raises(ValueError, match="needs rates above 0"):
        FinetuningSweep("t", kinds["sequence"], rates=())
    with pytest.raises(ValueError, match="needs strengths above 0"):
        LinearProbe("t", kinds["sequence"], strengths=(0.0,))


def test_the_shipped_tasks_by_name(monkeypatch, folder, tmp_path, capsys):
    """`python -m jaxlm.evaluate` with encoders.gin, on rows of its layout."""
    monkeypatch.setattr("jaxlm.checkpoints.pretrained.load", lambda path, **_: opened_model(Architecture.ENCODER))
    (tmp_path / "rotten_tomatoes").mkdir()
    for split in SIZES:
        with gzip.open(tmp_path / "rotten_tomatoes" / f"{split}.jsonl.gz", "wt") as file:
            file.write((folder / f"{split}.jsonl").read_text())
    asked = ["--model=mine", "--gin_file=gin_configs/evaluation/encoders.gin", f"--gin.EVALUATION_DATA='{tmp_path}'"]
    asked += [f"--output={tmp_path / 'out'}", "--gin.LIMIT=40"]
    assert main([*asked, "--tasks=sentiment_probe"]) == ExitStatus.FINISHED
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["sentiment_probe"]
    assert found["primary"] == "accuracy" and found["rows"]["train"] == 40 and len(found["trials"]) == 5
    assert main([*asked, "--tasks=intents"]) == ExitStatus.FAILED
    assert "Task intents: No text at" in capsys.readouterr().out


def test_real_rows_fit_the_shipped_tasks(shared_data, repository, tmp_path):
    """The bundle's files have the fields that encoders.gin names; STS-B's are not in it."""
    from jaxlm.configuration import resolve
    from jaxlm.evaluation.suite import EvaluationConfig

    for name, place in (("rotten_tomatoes", "finetune"), ("banking77", "finetune"), ("protein_flip_ss", "domain")):
        (tmp_path / name).symlink_to(shared_data / place / name)
    flags = ["--gin_file=gin_configs/evaluation/encoders.gin", f"--gin.EVALUATION_DATA='{tmp_path}'"]
    tasks = {task.name: task for task in resolve(EvaluationConfig, flags).tasks}
    classes = {}
    for name in ("sentiment", "intents", "structure"):
        examples, found = tasks[name].labels.read(VOCABULARY, 3000)
        classes[name] = len(found)
        assert all(len(examples[split]) > 300 for split in SIZES)
        assert tasks[name].labels == tasks[f"{name}_probe"].labels
    assert classes == {"sentiment": 2, "intents": 77, "structure": 3}


def test_probing_module_has_no_seed():
    """A probe is a function of its features: the same twice, bit for bit."""
    rng = np.random.default_rng(1)
    features, gold = rng.normal(size=(60, 4)), rng.integers(0, 2, 60)
    first, second = (probing.fit(features, gold, 2, 0.01) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
