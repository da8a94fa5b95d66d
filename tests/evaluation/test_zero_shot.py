"""BLiMP's minimal pairs and LAMBADA's last words through zero_shot.gin, against whole logits of each text alone."""

import gzip
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.configuration import resolve
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.evaluation.suite import EvaluationConfig, evaluate
from tests.data.tfds_files import write_tfds
from tests.evaluation.models import as_pretrained, make_model

VOCABULARY = ByteVocabulary(extra_ids=0)
PADDED = 64
# As the Hub has them.
PAIRS = [
    ("adjunct_island", "Who should Derek hug after he left?", "Who should Derek hug he after left?"),
    ("wh_island", "What could Alan discover he has run around?", "What could Alan discover who has run around?"),
    ("adjunct_island", "What had Theresa walked through?", "What had Theresa walked while talking through?"),
    ("wh_island", "Who has Aaron forgot to aid?", "Who has Aaron forgot who to aid?"),
]
BLIMP = [
    {"UID": uid, "pairID": str(i), "field": "syntax", "sentence_good": good, "sentence_bad": bad}
    for i, (uid, good, bad) in enumerate(PAIRS)
]
LAMBADA = [
    {"context": "I look at him, stunned, but I don't care about", "continuation": "signs"},
    {"context": "She poured the tea and handed him the", "continuation": "cup"},
]


@nnx.jit
def logits_of(model, batch):
    return model.head(model.hidden_states(batch)[0])


class Alone:
    """A decoder asked about one text at a time, of ids, in rows of one length."""

    def __init__(self, module):
        self._module = module

    def logits(self, texts):
        """[texts, PADDED, V]; column i predicts token i."""
        ids, segments = np.zeros((2, len(texts), PADDED), np.int32)
        for row, text in enumerate(texts):
            ids[row, 1 : len(text)] = text[:-1]  # the start is id 0
            segments[row, : len(text)] = 1
        positions = np.broadcast_to(np.arange(PADDED, dtype=np.int32), ids.shape)
        features = {"input_tokens": ids, "segment_ids": segments, "positions": positions}
        batch = {f"decoder_{name}": jnp.asarray(array) for name, array in features.items()}
        return np.asarray(logits_of(self._module, batch), np.float64)

    def scored(self, context, text):
        """(sum of the log-probabilities of `text`, whether each of its tokens is the likeliest)."""
        before, both = VOCABULARY.encode(context), VOCABULARY.encode(context + text)
        logits = self.logits([both])[0, len(before) : len(both)]
        own = both[len(before) :]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logs[np.arange(len(own)), own].sum(), bool((logits.argmax(-1) == own).all())

    def likeliest(self, text):
        """The token after a text."""
        return self.logits([[*text, 0]])[0, len(text)].argmax()


@pytest.fixture(scope="module")
def module():
    return make_model(Architecture.CAUSAL_DECODER, vocab_size=VOCABULARY.size)


@pytest.fixture(scope="module")
def alone(module):
    return Alone(module)


@pytest.fixture(scope="module")
def answer(alone):
    """A row whose last word greedy decoding gives; after no context, since there no space needs to be likely."""
    ids = np.zeros(0, np.int32)
    for _ in range(2):
        ids = np.append(ids, alone.likeliest(ids))
    return {"context": "", "continuation": VOCABULARY.decode(ids)}


def asked(folder, *flags, file="gin_configs/evaluation/zero_shot.gin"):
    return resolve(EvaluationConfig, [f"--gin_file={file}", f"--gin.EVALUATION_DATA='{folder}'", *flags])


def write_rows(path, rows):
    path.parent.mkdir()
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def evaluated(config, module, folder):
    """({task: its result}, the records of examples.jsonl)."""
    found = evaluate(config, as_pretrained(module, VOCABULARY), folder=folder, report=lambda line: None)
    assert not found.failures
    lines = (folder / "examples.jsonl").read_text().splitlines()
    return {result.task: result for result in found.results}, [json.loads(line) for line in lines]


def test_last_words_and_minimal_pairs(module, alone, answer, tmp_path):
    rows = [*LAMBADA, answer]
    write_rows(tmp_path / "blimp" / "test.jsonl.gz", BLIMP)
    write_rows(tmp_path / "lambada_openai" / "test.jsonl.gz", rows)
    found, records = evaluated(asked(tmp_path).only(["lambada", "blimp"]), module, tmp_path / "out")

    assert answer["continuation"].isprintable(), "another seed may write text"
    scores = [alone.scored(row["context"], " " * bool(row["context"]) + row["continuation"]) for row in rows]
    assert [greedy for _, greedy in scores] == [False, False, True]
    words = [record for record in records if record["task"] == "lambada"]
    np.testing.assert_allclose([w["log_likelihood"] for w in words], [total for total, _ in scores], atol=1e-4)
    metrics = found["lambada"].metrics
    nats, tokens = -sum(total for total, _ in scores), len(" signs" + " cup" + answer["continuation"])
    assert metrics["accuracy"].value == pytest.approx(1 / 3)
    assert metrics["perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["lambada"].chance is None

    totals = [[alone.scored("", row[name])[0] for name in ("sentence_good", "sentence_bad")] for row in BLIMP]
    pairs = [record for record in records if record["task"] == "blimp"]
    np.testing.assert_allclose([pair["log_likelihoods"] for pair in pairs], totals, atol=1e-3)
    right = [good > bad for good, bad in totals]
    result = found["blimp"]
    assert 0 < sum(right) < 4, "nothing is told apart; change a pair"
    assert result.metrics["accuracy"].value == np.mean(right) and result.chance == 0.5
    groups = {uid: of["accuracy"].value for uid, of in result.groups.items()}
    assert groups == {"adjunct_island": np.mean(right[::2]), "wh_island": np.mean(right[1::2])}
    bits = -sum(good for good, _ in totals) / math.log(2) / sum(len(good) for _, good, _ in PAIRS)
    assert result.metrics["gold_bits_per_byte"].value == pytest.approx(bits, rel=1e-4)


def test_rows_may_be_a_prepared_tfds_data_set(module, alone, tmp_path):
    """BLiMP as TFDS has it, in a split "train"."""
    pytest.importorskip("tensorflow_datasets")
    write_tfds(tmp_path / "blimp" / "1.0.0", "array_record", BLIMP, name="blimp")
    file = tmp_path / "from_tfds.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\nfrom jaxlm.data import sources\nfrom jaxlm.evaluation import tasks\n"
        "include 'gin_configs/evaluation/zero_shot.gin'\n"
        "blimp/tasks.EvaluationTask.source = @sources.TfdsSource()\nblimp/tasks.EvaluationTask.split = 'train'\n"
        f"sources.TfdsSource.name = '{tmp_path / 'blimp' / '1.0.0'}'\n"
    )
    config = asked("nowhere", "--gin.LIMIT=3", file=file)
    found, records = evaluated(config.only(["blimp"]), module, tmp_path / "out")
    totals = [[alone.scored("", row[name])[0] for name in ("sentence_good", "sentence_bad")] for row in BLIMP[:3]]
    np.testing.assert_allclose([record["log_likelihoods"] for record in records], totals, atol=1e-3)
    assert found["blimp"].metrics["accuracy"].value == pytest.approx(np.mean([good > bad for good, bad in totals]))
    assert [record["group"] for record in records] == [uid for uid, *_ in PAIRS[:3]]
