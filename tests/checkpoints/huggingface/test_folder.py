"""Folders, without transformers: nothing is lost, nothing half-written looks whole, errors name things."""

import dataclasses
import json
import re
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxlm.checkpoints import naming
from jaxlm.checkpoints.huggingface import families
from jaxlm.checkpoints.huggingface.files import TensorFolder, write_tensors
from jaxlm.checkpoints.huggingface.folder import export, open_folder, parameter_shapes
from jaxlm.checkpoints.pending import Pending
from jaxlm.checkpoints.surgery import Fresh
from jaxlm.checkpoints.warm_start import WarmStart, warm_start
from jaxlm.layers.feed_forward import Activation
from jaxlm.models import build_model
from jaxlm.training.state import abstract_model
from tests.checkpoints.huggingface.family_cases import CASES, YARN

LLAMA = CASES[0]


def case_of(name):
    return next(case for case in CASES if case.name == name)


def config_of(case):
    """The model of a case, by what `config.json` would hold at least."""
    family = next(family for family in families.FAMILIES if family.architecture == case.model)
    return family, family.model_of({"model_type": family.model_type, **case.options})


def values_of(shapes):
    """A number of its own for every entry of every parameter."""
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def written(folder, case=LLAMA, **options):
    family, config = config_of(case)
    values = values_of(parameter_shapes(config))
    shapes = {path: value.shape for path, value in values.items()}
    export(folder, config, shapes, values.__getitem__, family=family.model_type, **options)
    return config, values


@pytest.fixture
def folder(tmp_path):
    written(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_comes_back(case, tmp_path):
    config, values = written(tmp_path / "model", case)
    found = open_folder(tmp_path / "model")
    assert found.config == config
    definition, params, _ = abstract_model(lambda key: build_model(config, key=key))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), params)
    loaded = found.load(target, definition.layouts)
    leaves = naming.flatten(loaded)
    for path, source in naming.sources(loaded, definition.layouts).items():
        leaf = leaves[source.path] if source.row is None else leaves[source.path][source.row]
        np.testing.assert_array_equal(leaf, values[naming.show(path)], naming.show(path))


def test_a_stack_of_experts_is_read_once_and_let_go(tmp_path):
    """An expert's matrix is a tensor by itself: what makes them asks for each layer's array once, and keeps one."""
    case = case_of("mixtral")
    family, config = config_of(case)
    shapes, asked, alive = parameter_shapes(config), [], []

    def value(path):
        asked.append(path)
        made = np.full(shapes[path], len(asked), np.float32)
        if "/experts/" in path:
            assert sum(reference() is not None for reference in alive) <= 1
            alive.append(weakref.ref(made))
        return made

    export(tmp_path / "model", config, shapes, value, family=family.model_type)
    assert len(asked) == len(set(asked)) == len(shapes)


def test_what_would_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(
        ValueError, match="config.json of this llama would not be read back: .* has strange = 3, which "
    ):
        written(tmp_path / "model", special_ids={"strange": 3})
    assert not list(tmp_path.iterdir())


def test_shards_hold_what_one_file_holds(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"t{i}": rng.normal(size=(i + 1, 5)).astype(dtype) for i, dtype in enumerate(["f4", "f2", ml_dtypes.bfloat16])
    }
    pending = {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
    for name, size in (("one", 1 << 30), ("three", 1)):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name, pending, shard_bytes=size)
        tensors = TensorFolder(tmp_path / name)
        for tensor, x in arrays.items():
            assert tensors.dtype(tensor) == x.dtype and tensors.shapes[tensor] == x.shape
            np.testing.assert_array_equal(tensors.read(tensor), x)
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3


def test_tensors_lie_in_their_order_whatever_views_they_are(tmp_path):
    """Transposed ones are put in order in tiles: whole tiles and rests of them, one piece and several."""
    rng = np.random.default_rng(0)
    views = [rng.normal(size=shape).astype(np.float32).T for shape in ((1,), (3, 1), (64, 130), (5000, 700))]
    views += [np.swapaxes(rng.normal(size=shape).astype(np.float32), 1, 2) for shape in ((3, 5, 7), (2, 600, 700))]
    views += [views[-1].astype(ml_dtypes.bfloat16), np.arange(12)[::-2], rng.normal(size=(7, 6, 5)).T[:, ::2]]
    write_tensors(tmp_path, {str(i): Pending(x.shape, x.dtype, lambda x=x: x) for i, x in enumerate(views)})
    tensors = TensorFolder(tmp_path)
    for i, x in enumerate(views):
        np.testing.assert_array_equal(tensors.read(str(i)), x)


def test_a_run_may_start_from_it(folder):
    """`WarmStart.path` takes the folder; leaves are matched by name as from a run's own checkpoint."""
    config, values = config_of(LLAMA)[1], values_of(parameter_shapes(config_of(LLAMA)[1]))
    definition, params, _ = abstract_model(lambda key: build_model(config, key=key))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    fresh = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), here), params)
    lines = []
    config = WarmStart(str(folder), rules=(Fresh("vocabulary_head/kernel"),))
    started = warm_start(fresh, config, definition.layouts, report=lines.append)
    assert started.account.new == ("vocabulary_head/kernel",)
    assert not np.asarray(started.params["vocabulary_head"]["kernel"]).any()
    up = started.params["decoder"]["layers"]["0"]["feed_forward"]["up"]["kernel"]
    np.testing.assert_array_equal(up[3], values["decoder/layers/3/feed_forward/up/kernel"])


def test_a_folder_that_is_there_is_left_alone(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="exists already; remove it"):
        written(folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_write_that_fails_leaves_nothing(tmp_path):
    family, config = config_of(LLAMA)
    shapes = parameter_shapes(config)

    def value(path):
        if path.endswith("down/kernel"):
            raise OSError("the disk is full")
        return np.zeros(shapes[path], np.float32)

    with pytest.raises(OSError, match="the disk is full"):
        export(tmp_path / "model", config, shapes, value)
    assert not list(tmp_path.iterdir())


def rewritten(folder, change):
    """Writes a folder's tensors again, as `change` has them of {name: array}."""
    tensors = TensorFolder(folder)
    found = change({name: tensors.read(name) for name in tensors.shapes})
    pending = {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in found.items()}
    write_tensors(folder, pending)


def named(replace, beyond=(), again=(), **fields):
    """How a folder was released: names with each of `replace` put for what they are today, tensors that the model has
    not, tensors again under other names, and fields of `config.json`."""

    def change(found):
        changed = {}
        for name, x in found.items():
            for today, released in replace.items():
                name = name.replace(today, released)
            changed[name] = x
        return (
            changed | {name: found[first] for name, first in again} | {name: np.ones(3, np.float32) for name in beyond}
        )

    return change, fields


EMBEDDING = "embeddings.word_embeddings.weight"
T5_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
RTD = (
    "mask_predictions.dense.weight",
    "mask_predictions.classifier.bias",
    "deberta.embeddings.word_embeddings._weight",
)
LEGACY_HEAD = {"lm_predictions.lm_head": "cls.predictions", "predictions.dense": "predictions.transform.dense"}
LEGACY_HEAD |= {"predictions.LayerNorm": "predictions.transform.LayerNorm"}
GAMMA = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
POOLER = ("pooler.dense.weight", "pooler.dense.bias")
RELEASED = {
    "gpt2": named({"transformer.": ""}, ("h.0.attn.bias", "h.0.attn.masked_bias"), _num_labels=1),
    "gpt_neox": named(
        {}, [f"gpt_neox.layers.0.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")]
    ),
    "gemma2": named({}, cache_implementation="hybrid", sliding_window_size=8),
    "llama3": named({}, ["model.layers.0.self_attn.rotary_emb.inv_freq"], max_sequence_length=2048),
    "llama_dynamic": named({"model.embed_tokens": "lm_head"}),
    "mamba": named({"embeddings": "embedding"}),
    "bert": named(
        GAMMA,
        [f"bert.{name}" for name in POOLER]
        + ["bert.embeddings.position_ids", "cls.seq_relationship.weight", "cls.seq_relationship.bias"],
        [
            ("cls.predictions.decoder.weight", f"bert.{EMBEDDING}"),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ],
        directionality="bidi",
        pooler_fc_size=768,
        pooler_type="first_token_transform",
    ),
    "roberta": named(
        {},
        [f"roberta.{name}" for name in POOLER],
        [("lm_head.decoder.weight", f"roberta.{EMBEDDING}"), ("lm_head.decoder.bias", "lm_head.bias")],
    ),
    "electra_generator": named(
        {}, ["electra.embeddings.position_ids"], [("generator_lm_head.weight", f"electra.{EMBEDDING}")]
    ),
    "deberta_v3": named({}, (*RTD, "deberta.embeddings.position_embeddings.weight"), architectures=...),
    "deberta_v2": named(
        LEGACY_HEAD, [], [("cls.predictions.decoder.weight", f"deberta.{EMBEDDING}")], temperature=1.0, top_k=50
    ),
    "modernbert": named(
        {}, [], [("decoder.weight", "model.embeddings.tok_embeddings.weight")], position_embedding_type="absolute"
    ),
    "t5": named(
        {},
        [T5_BIAS],
        [(f"{side}.embed_tokens.weight", "shared.weight") for side in ("encoder", "decoder")],
        architectures=["T5WithLMHeadModel"],
    ),
    "t5_v1_1": named({"shared": "decoder.embed_tokens"}),
}


@pytest.mark.parametrize("name", RELEASED)
def test_folders_open_as_they_were_released(name, tmp_path):
    """Older names, buffers and other heads among the tensors, tensors again, fields of other versions and trainers."""
    config, values = written(tmp_path / "model", case_of(name))
    change, fields = RELEASED[name]
    rewritten(tmp_path / "model", change)
    edited(tmp_path / "model", **fields)
    found = open_folder(tmp_path / "model")
    assert found.config == config
    assert set(found.shapes) == set(values)
    for path, value in values.items():
        np.testing.assert_array_equal(found.array(("params", *path.split("/"))), value, path)


@pytest.mark.parametrize(
    ("name", "tensor", "first"),
    [
        ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("bert", "bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("t5", "encoder.embed_tokens.weight", "shared.weight"),
        ("deberta_v2", "cls.predictions.decoder.weight", f"deberta.{EMBEDDING}"),
    ],
)
def test_another_tensor_under_a_second_name_is_refused(name, tensor, first, tmp_path):
    """Whichever of the two is meant, the other is not what the model computes with."""
    written(tmp_path / "model", case_of(name))
    if name == "deberta_v2":
        rewritten(tmp_path / "model", RELEASED[name][0])
    rewritten(tmp_path / "model", lambda found: found | {tensor: found[first] + 1})
    with pytest.raises(
        ValueError, match=f"has {re.escape(tensor)}, which is not the {re.escape(first)} that it stands"
    ):
        open_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("bert", "classifier.weight"),
        ("bert", "roberta.pooler.dense.weight"),
        ("roberta", "cls.seq_relationship.weight"),
        ("electra_discriminator", "generator_predictions.dense.weight"),
        ("deberta_v3", "classifier.weight"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.relative_attention_bias.weight"),
        ("t5", "classification_head.dense.weight"),
        ("modernbert", "head.dense.bias"),
        ("llama3", "model.layers.0.self_attn.sinks"),
    ],
)
def test_what_no_released_folder_holds_is_refused(name, tensor, tmp_path):
    written(tmp_path / "model", case_of(name))
    rewritten(tmp_path / "model", lambda found: found | {tensor: np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=f"has in excess {re.escape(tensor)}; its config.json describes another model"):
        open_folder(tmp_path / "model")


def test_a_head_that_config_asks_for_is_not_passed_over(tmp_path):
    """What a masked language model leaves out is what other classes compute."""
    written(tmp_path / "model", case_of("bert"))
    rewritten(tmp_path / "model", RELEASED["bert"][0])
    edited(tmp_path / "model", architectures=["BertForPreTraining"])
    with pytest.raises(ValueError, match=r"There is no adapter for \['BertForPreTraining'\]"):
        open_folder(tmp_path / "model")


def test_gpt_neox_20b_names_its_activation_otherwise(tmp_path):
    written(tmp_path / "model", case_of("gpt_neox"))
    edited(tmp_path / "model", hidden_act="gelu_fast")
    found = open_folder(tmp_path / "model").config.decoder.blocks[0].feed_forward.activation
    assert found is Activation.GELU_TANH


def test_an_untied_output_has_the_class_name(tmp_path):
    case = case_of("electra_generator")
    untied = dataclasses.replace(case, options=case.options | {"embedding_size": 32, "tie_word_embeddings": False})
    written(tmp_path / "model", untied)
    assert "generator_lm_head.weight" in TensorFolder(tmp_path / "model").shapes


def test_positions_are_passed_over_only_where_they_are_not_used(tmp_path):
    written(tmp_path / "model", case_of("deberta_v2"))
    positions = "deberta.embeddings.position_embeddings.weight"
    rewritten(tmp_path / "model", lambda found: {name: x for name, x in found.items() if name != positions})
    with pytest.raises(ValueError, match=f"lacks {positions}"):
        open_folder(tmp_path / "model")


def test_a_tied_output_may_be_there_twice(tmp_path):
    """As trainers and older versions of transformers leave it, if it is what the embedding is."""
    config, _ = written(tmp_path / "model", case_of("gpt2"))
    rewritten(tmp_path / "model", lambda found: found | {"lm_head.weight": found["transformer.wte.weight"]})
    assert config.head.tied and open_folder(tmp_path / "model").config == config
    rewritten(tmp_path / "model", lambda found: found | {"lm_head.weight": found["lm_head.weight"] + 1})
    message = r"lm_head\.weight, which is not the transformer\.wte\.weight that it stands for"
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path / "model")


def edited(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}, "no adapter for .*Rwkv.*; there are .*Llama"),
        (
            {"partial_attention": 3},
            "partial_attention = 3, which the adapter does not know.* --ignore=partial_attention",
        ),
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not among"),
        ({"intermediate_size": 47}, r"has .*mlp\..* of shape \[48, 32\], not \[47, 32\]"),
        ({"num_hidden_layers": 3}, r"has in excess model\.layers\.3\."),
        ({"num_hidden_layers": 5}, r"lacks model\.layers\.4\."),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "RoPE scaling of type 'longrope'"),
        ({"rope_parameters": YARN | {"truncate": False}}, "YaRN with truncate = False, .* has no equivalent here"),
    ],
)
def test_other_models_are_refused_in_a_sentence(folder, changes, message):
    edited(folder, **changes)
    with pytest.raises(ValueError, match=message):
        open_folder(folder)


def test_damaged_folders_are_refused(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        open_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ValueError, match="can run code when they are read"):
        open_folder(folder)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        open_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    written(tmp_path / "model", shard_bytes=1 << 14)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name}, which the index names, is not there"):
        open_folder(tmp_path / "model")
