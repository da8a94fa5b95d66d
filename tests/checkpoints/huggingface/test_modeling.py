"""modeling_jaxlm.py computes in PyTorch what the model computes here, and every feature that it reads counts."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface import families
from jaxlm.checkpoints.huggingface.folder import export, open_folder, parameter_shapes
from jaxlm.checkpoints.huggingface.own import COVERED, TRAINING, configured, described
from jaxlm.checkpoints.pretrained import read_model, unrolled
from jaxlm.layers.feed_forward import FeedForwardConfig
from tests.checkpoints.huggingface.own_cases import OWN_CASES, VOCABULARY

LENGTH, PREFIX = 30, 9
RNG = np.random.default_rng(0)
TOKENS, SOURCES = (RNG.integers(1, VOCABULARY, (2, LENGTH + more)) for more in (0, 6))


def written(folder, config, **options):
    """A folder of the family of our own, of large random parameters."""
    rng = np.random.default_rng(1)
    shapes = parameter_shapes(config)
    values = {path: rng.normal(size=shape).astype(np.float32) * 0.2 for path, shape in shapes.items()}
    values |= {path: value + 1.0 for path, value in values.items() if path.endswith("norm/scale") or "norms" in path}
    return export(folder, config, shapes, values.__getitem__, family="jaxlm", **options)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name -> (folder, our model, theirs)."""
    torch = pytest.importorskip("torch", reason="needs the torch extra: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="needs the torch extra: pip install -e '.[torch]'")
    made, root = {}, tmp_path_factory.mktemp("own")

    def open_case(name):
        if name not in made:
            ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
            family = written(root / name, OWN_CASES[name], special_ids=ids)
            source = open_folder(root / name)
            ours = read_model(source, unrolled(source.config))
            auto = getattr(transformers, next(key for key in family.write(source.config)["auto_map"] if "Model" in key))
            theirs = auto.from_pretrained(root / name, trust_remote_code=True, dtype=torch.float32).eval()
            made[name] = root / name, ours, theirs
        return made[name]

    return open_case


def their_logits(theirs, name, mask=None, tokens=TOKENS, **options):
    import torch

    ids = torch.tensor(tokens)
    options |= {} if mask is None else {"attention_mask": torch.tensor(mask)}
    if OWN_CASES[name].architecture is Architecture.ENCODER_DECODER:
        options |= {"input_ids": torch.tensor(SOURCES), "decoder_input_ids": ids}
    else:
        options["input_ids"] = ids
    if OWN_CASES[name].architecture is Architecture.PREFIX_DECODER:
        options.setdefault("prefix_length", torch.full((len(ids),), PREFIX))
    if OWN_CASES[name].architecture is Architecture.ENCODER and mask is None:
        options["token_type_ids"] = torch.tensor(types_of(tokens))
    with torch.no_grad():
        return theirs(**options).logits.numpy()


def types_of(tokens):
    return np.asarray(tokens) % 2


@nnx.jit
def logits_of(model, batch):
    return model.head(model.hidden_states(batch)[0])


def our_logits(ours, tokens=TOKENS, prefix=PREFIX):
    batch = {}
    encodes = ours.config.architecture is Architecture.ENCODER
    for side, ids in (("decoder", tokens), ("encoder", tokens if encodes else SOURCES)):
        batch |= {f"{side}_input_tokens": ids, f"{side}_segment_ids": np.ones_like(ids)}
        batch[f"{side}_positions"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    batch["decoder_causal_attention"] = (batch["decoder_positions"] < prefix).astype(int)
    if encodes:
        batch["encoder_type_ids"] = types_of(tokens)
    return np.asarray(logits_of(ours, {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}))


@pytest.mark.parametrize("name", OWN_CASES)
def test_logits_are_ours(name, opened):
    _, ours, theirs = opened(name)
    expected = our_logits(ours)
    assert np.abs(their_logits(theirs, name) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["sandwich", "experts", "buckets"])
def test_padding_on_the_left(name, opened):
    _, _, theirs = opened(name)
    padded = np.concatenate([np.zeros((2, 7), int), TOKENS], axis=1)
    mask = (np.arange(LENGTH + 7) >= 7).astype(int)[None].repeat(2, 0)
    found, expected = their_logits(theirs, name, mask, padded)[:, 7:], their_logits(theirs, name)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["sandwich", "encoder_decoder", "ahead"])
def test_generate(name, opened):
    """Greedily, and as the model is run here: the whole row again for each token."""
    import torch

    _, ours, theirs = opened(name)
    steps, prompt = 6, TOKENS[:1, :PREFIX]
    if name == "encoder_decoder":
        given, row = torch.tensor(SOURCES[:1]), np.zeros((1, 1), int)
    else:
        given, row = torch.tensor(prompt), prompt
    found = theirs.generate(given, max_new_tokens=steps, do_sample=False, eos_token_id=None)[0].tolist()
    for _ in range(steps):
        padded = np.pad(row, ((0, 0), (0, LENGTH - row.shape[1])))
        tokens = np.concatenate([padded, TOKENS[1:]])  # a shape that is compiled already
        row = np.append(row, our_logits(ours, tokens)[:1, row.shape[1] - 1].argmax(-1)[:, None], axis=1)
    if name != "ahead":  # whose frequencies depend on the row's length
        assert found == row[0].tolist()
    assert len(found) == row.shape[1] and found[: row.shape[1] - steps] == row[0, : row.shape[1] - steps].tolist()


REMEMBERING = ["sandwich", "buckets", "experts", "encoder_decoder"]


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_a_memory_gives_is_what_the_whole_row_gives(name, opened):
    """A row padded on the left, read in pieces of several lengths, the first the whole prompt."""
    import torch

    _, _, theirs = opened(name)
    tokens = np.concatenate([np.zeros((2, 4), int), TOKENS], axis=1)
    mask = np.ones_like(tokens)
    mask[0, :4] = 0
    crosses = name == "encoder_decoder"
    expected = their_logits(
        theirs, name, **({"decoder_attention_mask": torch.tensor(mask)} if crosses else {"mask": mask}), tokens=tokens
    )
    memory, found, start = theirs.memory_for({"use_cache": True}), [], 0
    for stop in (PREFIX + 4, PREFIX + 5, PREFIX + 12, PREFIX + 13, LENGTH + 4):
        piece, seen = tokens[:, start:stop], mask[:, :stop]
        options = {"decoder_attention_mask": torch.tensor(seen)} if crosses else {"mask": seen}
        found.append(their_logits(theirs, name, tokens=piece, past_key_values=memory, **options))
        assert memory.get_seq_length() == stop
        start = stop
    difference = np.abs(np.concatenate(found, axis=1) - expected)[mask > 0]
    assert difference.max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", [*REMEMBERING, "ahead"])
def test_generate_reads_each_token_once(name, opened, monkeypatch):
    """Beams that swap rows, with the memory and without: the same texts. Dynamic NTK has none."""
    import torch

    _, _, theirs = opened(name)
    read = []
    write = type(theirs).write
    monkeypatch.setattr(
        type(theirs), "write", lambda self, ids, *a, **o: read.append(ids.shape[1]) or write(self, ids, *a, **o)
    )
    given = torch.tensor((SOURCES if name == "encoder_decoder" else TOKENS)[:, :PREFIX])
    mask = torch.ones_like(given)
    mask[0, :3] = 0
    found = []
    for use_cache in (True, False):
        options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
        found.append(theirs.generate(given, attention_mask=mask, use_cache=use_cache, **options).tolist())
    assert found[0] == found[1]
    first = 1 if name == "encoder_decoder" else PREFIX
    whole = [first + i for i in range(5)]
    assert read == (whole if name == "ahead" else [first, 1, 1, 1, 1]) + whole


CHANGED = {"original_length": lambda n: 3 * n, "max_distance": lambda n: 2 * n, "epsilon": lambda x: x + 0.5}
INERT = {"pooler", "future_tokens", "max_length", "beta_fast", "beta_slow"}  # sizes, parts unused, frequencies between


def changes(description, path=()):
    """(path, class and field, changed value) of every number, switch and activation in a description."""
    parts = enumerate(description) if isinstance(description, list) else description.items()
    for key, value in parts:
        here = (*path, key)
        field = f"{description['class']}.{key}" if isinstance(description, dict) else "a list's"
        if isinstance(value, list | dict):
            yield from changes(value, here)
        elif isinstance(value, bool):
            yield here, field, not value
        elif isinstance(value, int | float):
            yield here, field, CHANGED.get(key, lambda x: x + 1 if isinstance(x, int) else 1.5 * x + 0.1)(value)
        elif key in ("activation", "transform") and value:
            yield here, field, "tanh"


@pytest.mark.full
def test_every_field_counts(opened):
    """Each number and switch of the descriptions, changed, moves the logits of some case, or the parameters' shapes."""
    moved: dict[str, float] = {}
    for name in OWN_CASES:
        _, _, theirs = opened(name)
        expected, state = their_logits(theirs, name), theirs.state_dict()
        for path, field, value in changes(theirs.config.language_model):
            config = copy.deepcopy(theirs.config)
            node = config.language_model
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            try:
                changed = type(theirs)(config).eval()
                changed.load_state_dict(state)
                off = np.abs(their_logits(changed, name) - expected).max() / np.abs(expected).max()
            except (RuntimeError, KeyError, IndexError, TypeError, ZeroDivisionError):
                off = np.inf  # other shapes
            moved[field] = max(moved.get(field, 0.0), off)
    inert = {field for field, off in moved.items() if not off >= 1e-3}
    assert {field.split(".")[1] for field in inert} <= INERT, inert
    assert len(moved) > 50


def test_the_description_comes_back():
    for config in OWN_CASES.values():
        text = json.dumps(described(config))
        again = configured(json.loads(text))
        assert described(again) == described(config)
        family = families.by_model(config)
        assert family.code == "modeling_jaxlm.py" and not family.refusals(config)


def test_every_field_is_covered_or_of_no_consequence():
    """A field that is new must be computed by the modelling file, or be known to be refused."""
    refused = set()
    for class_, names in COVERED.items():
        fields = {field.name for field in dataclasses.fields(class_)}
        assert set(names) <= fields, class_
        refused |= {f"{class_.__name__}.{name}" for name in fields - set(names) - TRAINING}
    for name in refused:
        class_name, field = name.split(".")
        default = next(
            f.default for c in COVERED if c.__name__ == class_name for f in dataclasses.fields(c) if f.name == field
        )
        assert default is not dataclasses.MISSING, f"{name} has no default: no model could be exported"


@dataclasses.dataclass(frozen=True)
class Unheard(FeedForwardConfig):
    """A layer of a user's own."""


def test_what_is_not_covered_is_refused_by_name(tmp_path):
    config = OWN_CASES["buckets"]
    block = dataclasses.replace(config.decoder.blocks[0], feed_forward=Unheard(8))
    other = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, blocks=(block,)))
    with pytest.raises(ValueError, match="modeling_jaxlm.py does not cover Unheard"):
        export(tmp_path / "no", other, {}, lambda path: None)
    assert not (tmp_path / "no").exists()


def test_a_description_of_something_else(tmp_path):
    written(tmp_path / "own", OWN_CASES["buckets"])
    values = json.loads((tmp_path / "own" / "config.json").read_text())
    values["language_model"]["embedding"]["class"] = "os.system"
    (tmp_path / "own" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="which is no part of a model here"):
        open_folder(tmp_path / "own")


def test_without_jax_arrays_nothing_is_lost(tmp_path):
    """Tensors have our names and shapes, and come back bit for bit."""
    config = OWN_CASES["experts"]
    written(tmp_path / "own", config)
    source = open_folder(tmp_path / "own")
    assert {path.replace("/", ".") for path in source.shapes} == set(source.tensors.shapes)
    model = read_model(source, unrolled(source.config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
        name = ".".join(str(key.key) for key in path)
        np.testing.assert_array_equal(leaf, source.tensors.read(name))
