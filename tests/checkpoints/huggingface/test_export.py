"""A run goes to a Hugging Face folder and back with everything that belongs to it; the folder works in transformers."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.tiny_runs import Workshop
from jaxlm.architecture import Architecture
from jaxlm.checkpoints import conversion, pretrained
from jaxlm.checkpoints.huggingface.folder import open_folder
from jaxlm.checkpoints.huggingface.tokenizer import Tokenizer, read_tokenizer, write_tokenizer
from jaxlm.checkpoints.pretrained import load
from jaxlm.checkpoints.sources import open_source
from jaxlm.data.vocabularies import ByteVocabulary, PythonVocabulary, TokenizersVocabulary, Vocabulary
from jaxlm.layers.positions import LearnedPositions
from jaxlm.models.config import LanguageModelConfig
from tests.checkpoints.huggingface import openelm_reference
from tests.checkpoints.huggingface.family_cases import CASES
from tests.checkpoints.huggingface.test_folder import config_of, written
from tests.checkpoints.saved_runs import save_run
from tools import convert_checkpoint

PAIRS = "TASK_FEATURE_LENGTHS = {'inputs': 40, 'targets': 24}\n"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def exported(workshop):
    """A causal decoder's run, and what it was exported to."""
    saved = save_run(workshop, "run", steps=(3, 7))
    out = workshop.folder / "exported"
    assert convert_checkpoint.main([str(saved.folder), str(out)]) == 0
    return saved, out


def same_parameters(a, b):
    ours, theirs = (nnx.to_flat_state(nnx.state(model)) for model in (a, b))
    for (path, x), (other, y) in zip(ours, theirs, strict=True):
        assert path == other
        np.testing.assert_array_equal(x.get_value(), y.get_value(), str(path))


def test_what_lies_in_the_folder(exported):
    _, out = exported
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,  # not what every text begins with: transformers hides padding from a model
    }
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["max_position_embeddings"]) == (["LlamaForCausalLM"], 32)
    assert "pad_token_id" not in config
    card = (out / "README.md").read_text()
    for text in ("for 7 steps", "| parameters | 37,024 |", "began with id 0 in training", "FullLM", "corpus"):
        assert text in card, text
    assert not list(out.parent.glob(".exported*"))


def test_it_comes_back_as_what_it_was(exported, tmp_path):
    saved, out = exported
    ours, theirs = load(saved.folder), load(out)
    same_parameters(ours.model, theirs.model)
    assert ours.vocabulary.fingerprint() == theirs.vocabulary.fingerprint()
    for field in ("start_id", "input_end_id", "eos_ids", "context_length"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert convert_checkpoint.main([str(out), str(tmp_path / "back"), "--to", "jaxlm"]) == 0
    back = load(tmp_path / "back")
    same_parameters(ours.model, back.model)
    assert back.vocabulary.fingerprint() == ours.vocabulary.fingerprint()
    assert (back.start_id, back.eos_ids, back.context_length) == (0, (1,), 32)
    assert convert_checkpoint.main([str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    again, first = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "again", out))
    assert again == first


def test_an_encoder_decoders_texts_end_as_in_training(workshop):
    saved = save_run(workshop, "pairs", text=PAIRS, model="encoder_decoder", objective="span_corruption")
    found = load(saved.folder)
    assert (found.start_id, found.input_end_id, found.eos_ids) == (0, 1, (1,))
    out = workshop.folder / "pairs_exported"
    conversion.to_hugging_face(open_source(saved.folder), out)
    assert read_tokenizer(out) == Tokenizer(found.vocabulary, None, 1)
    again = load(out)
    assert (again.start_id, again.input_end_id, again.eos_ids) == (0, 1, (1,))


@pytest.mark.parametrize("kind", ["bytes", "python", "tokenizers"])
def test_vocabularies_come_back(kind, tmp_path):
    vocabulary: Vocabulary = ByteVocabulary(extra_ids=5, named_tokens=("[MASK]", "<sep>"))
    if kind == "python":
        vocabulary = PythonVocabulary()
    (tmp_path / "out").mkdir()
    if kind == "tokenizers":
        write_tokenizer(tmp_path / "out", Tokenizer(vocabulary), decoder=True, context_length=None)
        path = str(tmp_path / "out" / "tokenizer.json")
        vocabulary = TokenizersVocabulary(path, extra_ids=7, named_tokens=("[MASK]",), pad_token="<sep>")
        (tmp_path / "again").mkdir()
    folder = tmp_path / ("again" if kind == "tokenizers" else "out")
    write_tokenizer(folder, Tokenizer(vocabulary, 0, 1), decoder=True, context_length=64)
    found = read_tokenizer(folder)
    assert (found.start_id, found.end_id) == (0, 1)
    ours, theirs = vocabulary.info(), found.vocabulary.info()
    for field in ("size", "pad_id", "eos_id", "unk_id", "mask_id", "sentinel_ids", "named_ids"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for text in ("naïve </s> <extra_id_0> [MASK]", "  def f(x):\n\treturn '東京'", ""):
        np.testing.assert_array_equal(vocabulary.encode(text), found.vocabulary.encode(text))
        np.testing.assert_array_equal(
            vocabulary.encode_with_specials(text), found.vocabulary.encode_with_specials(text)
        )
        assert found.vocabulary.decode(vocabulary.encode(text)) == text
    if kind != "tokenizers":
        assert found.vocabulary.fingerprint() == vocabulary.fingerprint()


def test_a_dry_run_says_what_is_missing(exported, tmp_path, capsys):
    saved, out = exported
    for source in (saved.folder, out):
        assert convert_checkpoint.main([str(source), "--dry-run"]) == 0
        shown = capsys.readouterr().out
        assert "model.layers.1.mlp.up_proj.weight [64, 32] <-> decoder/layers/1/feed_forward/up/kernel" in shown
        assert "Nothing is missing on either side: 20 tensors, 20 parameters." in shown
    written(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert convert_checkpoint.main([str(tmp_path / "llama"), "--dry-run"]) == 1
    assert "lacks model.layers.4." in capsys.readouterr().out
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"partial_attention": 3}))
    assert convert_checkpoint.main([str(tmp_path / "llama"), "--dry-run"]) == 1
    assert "--ignore=partial_attention" in capsys.readouterr().err
    assert convert_checkpoint.main([str(tmp_path / "llama"), "--dry-run", "--ignore=partial_attention"]) == 0


def test_bad_input_is_one_sentence(exported, tmp_path, capsys):
    saved, out = exported
    for arguments, sentence in (
        ([str(saved.folder)], "There is no folder to write to"),
        ([str(saved.folder), str(out)], "exists already; remove it"),
        ([str(saved.folder), str(tmp_path / "x"), "--family", "gpt2"], "the nearest is GPT2LMHeadModel, but"),
        ([str(saved.folder), str(tmp_path / "x"), "--step", "5"], "has no checkpoint of step 5"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "x")], "There is no checkpoint to start from"),
    ):
        assert convert_checkpoint.main(arguments) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "x").exists()


def rotating():
    """The cases whose models know positions by rotations, and OpenELM."""
    found = {case.name: case for case in CASES}
    configs = {name: config_of(case)[1] for name, case in found.items()}
    names = [name for name, config in configs.items() if hasattr(config, "stacks") and conversion._rotates(config)]
    return {name: functools.partial(written, case=found[name]) for name in names} | {
        "openelm": openelm_reference.written
    }


@pytest.mark.parametrize("name", rotating())
def test_what_rotates_says_how_long_its_rows_were(name, tmp_path, monkeypatch):
    """In a field that its own adapter reads: the folder of a run opens again, and knows the length."""
    rotating()[name](tmp_path / "theirs")
    source = open_folder(tmp_path / "theirs")
    both = source.config.architecture is Architecture.ENCODER_DECODER  # whose runs say nothing of it
    length = None if both else 24
    about = dataclasses.replace(pretrained.describe(source), context_length=length)
    monkeypatch.setattr(conversion, "describe", lambda _: about)
    conversion.to_hugging_face(source, tmp_path / "ours", family=source.family.model_type)
    found = open_folder(tmp_path / "ours")
    assert found.config == source.config
    dynamic = source.fields.get("max_position_embeddings")  # which the rotations depend on
    assert pretrained.describe(found).context_length == (dynamic or length)


def test_a_half_written_folder_is_not_left(exported, tmp_path, monkeypatch):
    saved, _ = exported
    monkeypatch.setattr(conversion.card.Card, "__str__", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conversion.to_hugging_face(open_source(saved.folder), tmp_path / "half")
    assert not list(tmp_path.iterdir())


def test_a_roberta_needs_its_padding(tmp_path):
    family, config = config_of(next(case for case in CASES if case.name == "roberta"))
    assert isinstance(config, LanguageModelConfig) and isinstance(config.embedding.positions, LearnedPositions)
    family.check_ids(config, {"pad_token_id": 1})
    with pytest.raises(ValueError, match="A RoBERTa pads with id 1, but this vocabulary with 0"):
        family.check_ids(config, {"pad_token_id": 0})


def test_pickles_are_read_only_when_asked_for(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs the torch extra: pip install -e '.[torch]'")
    written(tmp_path / "model")
    source = open_folder(tmp_path / "model")
    state = {name: torch.tensor(source.tensors.read(name)).to(torch.bfloat16) for name in source.tensors.shapes}
    (tmp_path / "model" / "model.safetensors").unlink()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    assert convert_checkpoint.main([str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "can run code when they are read" in capsys.readouterr().err
    assert convert_checkpoint.main([str(tmp_path / "model"), str(tmp_path / "out"), "--allow_pickle"]) == 0
    found = open_folder(tmp_path / "out")
    assert found.shapes == source.shapes
    for name, tensor in state.items():
        if "inv_freq" not in name:
            np.testing.assert_array_equal(found.tensors.read(name), tensor.float().numpy())
    torch.save({"weights": print}, tmp_path / "model" / "pytorch_model.bin")
    assert convert_checkpoint.main([str(tmp_path / "model"), str(tmp_path / "no"), "--allow_pickle"]) == 1
    assert "is damaged or holds more than weights" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["causal_decoder", "prefix_decoder"])
def test_transformers_reads_writes_and_continues_it(architecture, exported, workshop, capsys):
    """Three lines from a run to a pipeline: same ids, same logits, the same greedy continuation."""
    torch = pytest.importorskip("torch", reason="needs the torch extra: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="needs the torch extra: pip install -e '.[torch]'")
    saved, out = exported
    if architecture == "prefix_decoder":
        saved = save_run(workshop, "prefix", text=PAIRS, model="prefix_decoder", objective="span_corruption")
        out = workshop.folder / "prefix_exported"
        assert convert_checkpoint.main([str(saved.folder), str(out), "--dtype", "bfloat16", "--verify"]) == 0
        assert "the same ids" in capsys.readouterr().out
    own = architecture == "prefix_decoder"
    pipe = transformers.pipeline("text-generation", model=str(out), trust_remote_code=own, dtype=torch.float32)
    text = "the naïve cat"
    ids = pipe.tokenizer(text)["input_ids"]
    ours = load(out)
    assert ids == [0, *ours.vocabulary.encode(text), *([1] if own else [])]
    written = pipe.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    row = np.array([ids])
    for _ in range(5):
        row = np.append(row, our_logits(ours, row, len(ids) if own else 0)[:, -1].argmax(-1)[:, None], axis=1)
    assert written[0].tolist() == row[0].tolist()
    batch = pipe.tokenizer([text, "a"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][1].tolist()[0] == 0 and batch["input_ids"][0].tolist() == ids
    assert pipe(text, max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith(text)


def our_logits(ours, tokens, prefix):
    """[B, T, V]; rows are filled to one length, so that it compiles once."""
    shape, length = (len(tokens), 32), tokens.shape[1]
    positions = np.broadcast_to(np.arange(shape[1]), shape)
    batch = {
        "decoder_input_tokens": np.pad(tokens, ((0, 0), (0, shape[1] - length))),
        "decoder_segment_ids": (positions < length).astype(int),
        "decoder_positions": positions,
        "decoder_causal_attention": (positions < prefix).astype(int),
    }
    assert prefix == 0 or ours.config.architecture is Architecture.PREFIX_DECODER
    return np.asarray(logits_of(ours.model, {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}))[:, :length]


@nnx.jit
def logits_of(model, batch):
    return model.head(model.hidden_states(batch)[0])
