"""T5X's and Mesh TensorFlow's checkpoints, written as those trainers write them, are read as the model they hold."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from flax import nnx, serialization, traverse_util

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import pretrained
from jaxlm.checkpoints.huggingface.family import essence
from jaxlm.checkpoints.huggingface.folder import export, open_folder, parameter_shapes
from jaxlm.checkpoints.huggingface.t5 import T5
from jaxlm.checkpoints.sources import open_source
from jaxlm.checkpoints.warm_start import WarmStart, warm_start
from jaxlm.layers.feed_forward import Activation
from jaxlm.models import build_model
from jaxlm.models.config import HeadConfig
from jaxlm.training.state import abstract_model

SIZES = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=6)
V1_1 = T5().model_of({"model_type": "t5", **SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
V1_0 = T5().model_of({"model_type": "t5", **SIZES, "feed_forward_proj": "relu"})
DECODER = dataclasses.replace(
    V1_1,
    architecture=Architecture.CAUSAL_DECODER,
    encoder=None,
    decoder=dataclasses.replace(
        V1_1.decoder, blocks=tuple(dataclasses.replace(b, cross_attention=None) for b in V1_1.decoder.blocks)
    ),
    head=HeadConfig(tied=True, scale_by_width=True),
)


def values_of(config):
    """Large random parameters, by our names."""
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in parameter_shapes(config).items()}


def t5x_arrays(config, values):
    """The same under T5X's names, in T5X's shapes; written out, not read from the table under test."""
    found = {"token_embedder/embedding": values["embedding/tokens"]}
    if not config.head.tied:
        found["decoder/logits_dense/kernel"] = values["vocabulary_head/kernel"]
    for side, stack in config.stacks.items():
        found[f"{side}/{side}_norm/scale"] = values[f"{side}/norm/scale"]
        found[f"{side}/relpos_bias/rel_embedding"] = values[f"{side}/relative/table"].T
        for i in range(stack.depth):
            old = {name.split("/", 3)[3]: x for name, x in values.items() if name.startswith(f"{side}/layers/{i}/")}
            own = "attention" if side == "encoder" else "self_attention"
            layer = {
                f"pre_{own}_layer_norm/scale": old["attention_norms/before/scale"],
                "pre_mlp_layer_norm/scale": old["feed_forward_norms/before/scale"],
                "mlp/wo/kernel": old["feed_forward/down/kernel"],
            }
            kinds = {own: "attention"}
            if "feed_forward/gate/kernel" in old:
                layer["mlp/wi_0/kernel"] = old["feed_forward/gate/kernel"]
                layer["mlp/wi_1/kernel"] = old["feed_forward/up/kernel"]
            else:
                layer["mlp/wi/kernel"] = old["feed_forward/up/kernel"]
            if "cross_attention_norms/before/scale" in old:
                layer["pre_cross_attention_layer_norm/scale"] = old["cross_attention_norms/before/scale"]
                kinds["encoder_decoder_attention"] = "cross_attention"
            for theirs, ours in kinds.items():
                for name in ("query", "key", "value"):  # [embed, heads x head_dim]
                    layer[f"{theirs}/{name}/kernel"] = old[f"{ours}/{name}/kernel"].reshape(32, 48)
                layer[f"{theirs}/out/kernel"] = old[f"{ours}/output/kernel"].reshape(48, 32)
            found |= {f"{side}/layers_{i}/{name}": value for name, value in layer.items()}
    return found


def scanned(arrays):
    """All layers of a stack in one array, on axis 1, each with a table of relative positions of its own."""
    stacks = {}
    for name, value in arrays.items():
        if "/layers_" in name:
            side, layer, rest = name.split("/", 2)
            stacks.setdefault(f"{side}/layers/{rest}", []).append((int(layer.removeprefix("layers_")), value))
    found = {name: value for name, value in arrays.items() if "/layers_" not in name}
    return found | {name: np.stack([x for _, x in sorted(parts)], axis=1) for name, parts in stacks.items()}


def write_t5x(folder, arrays, *, form="specification", bits=False):
    """A folder as T5X leaves it: gzipped zarr arrays for matrices, the rest in the msgpack file."""
    folder.mkdir(parents=True)
    tree = {}
    for name, value in arrays.items():
        stored = f"target.{name.replace('/', '.')}"
        if value.ndim == 1:
            tree[name] = value
            continue
        written = value.view(np.uint16) if bits else value
        kind = {"uint16": "uint16", "bfloat16": "bfloat16"}.get(written.dtype.name, "float32")
        chunks = [max(n // 2, 1) for n in value.shape]
        about = {"shape": list(value.shape), "chunks": chunks, "compressor": {"id": "gzip"}}
        spec = {"driver": "zarr", "dtype": kind, "metadata": about}
        place = {"driver": "file", "path": str(folder / stored)}
        tensorstore.open(spec | {"kvstore": place}, create=True).result().write(written).result()
        relative = {"driver": "gfile", "path": stored}
        tree[name] = f"PLACEHOLDER://{stored}" if form == "placeholder" else spec | {"kvstore": relative}
    state = {"target": traverse_util.unflatten_dict(tree, sep="/"), "state": {"step": np.int32(7)}}
    contents = {"version": 3, "optimizer": state} if form == "specification" else state
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    return folder


def read(source):
    """{name: array} of all parameters, each read by itself."""
    return {"/".join(path[1:]): np.asarray(source.array(path)) for path in source.leaves}


def assert_holds(source, values):
    found = read(source)
    assert found.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value, name)


@pytest.mark.parametrize(("name", "config"), [("v1_1", V1_1), ("v1_0", V1_0), ("decoder", DECODER)])
@pytest.mark.parametrize("form", ["specification", "placeholder"])
def test_a_t5x_checkpoint_is_the_model_it_holds(tmp_path, name, config, form):
    """From a model's folder the newest step is taken."""
    values = values_of(config)
    write_t5x(tmp_path / "model" / "checkpoint_1000", t5x_arrays(config, values), form=form)
    write_t5x(tmp_path / "model" / "checkpoint_90", {})
    source = open_source(tmp_path / "model")
    assert essence(source.config) == essence(config)
    assert_holds(source, values)


def test_it_is_what_an_export_to_hugging_face_holds(tmp_path):
    """The same configuration and the same arrays, through two adapters."""
    values = values_of(V1_1)
    export(tmp_path / "theirs", V1_1, parameter_shapes(V1_1), values.__getitem__, family="t5")
    folder = open_folder(tmp_path / "theirs")
    source = open_source(write_t5x(tmp_path / "checkpoint_5", t5x_arrays(V1_1, values)))
    assert source.config == folder.config
    assert_holds(source, read(folder))
    value = lambda path: source.array(("params", *path.split("/")))  # noqa: E731
    export(tmp_path / "again", source.config, source.shapes, value)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("theirs", "again")]
    assert files[0] == files[1]


def test_layers_that_were_scanned_come_one_by_one(tmp_path):
    """Also in bfloat16, as native zarr and as the bits that T5X wrote before its version 3."""
    config = dataclasses.replace(
        V1_1,
        **{
            side: dataclasses.replace(
                stack,
                relative_positions=None,
                blocks=tuple(
                    dataclasses.replace(
                        b, attention=dataclasses.replace(b.attention, position=stack.relative_positions)
                    )
                    for b in stack.blocks
                ),
            )
            for side, stack in V1_1.stacks.items()
        },
    )
    values = {path: x.astype(ml_dtypes.bfloat16) for path, x in values_of(config).items()}
    shared = {f"{side}/relative/table": values[f"{side}/layers/0/attention/relative/table"] for side in config.stacks}
    arrays = t5x_arrays(V1_1, values | shared)
    for side, stack in config.stacks.items():
        del arrays[f"{side}/relpos_bias/rel_embedding"]
        for i in range(stack.depth):
            table = values[f"{side}/layers/{i}/attention/relative/table"]
            arrays[f"{side}/layers_{i}/relpos_bias/rel_embedding"] = table.T
    for name, bits in (("native", False), ("bits", True)):
        source = open_source(write_t5x(tmp_path / name, scanned(arrays), bits=bits))
        assert essence(source.config) == essence(config)
        assert_holds(source, values)


def test_a_run_starts_from_it_and_it_opens_as_a_model(tmp_path):
    """Into a scanned model, and through `pretrained.load`; both compute what the parameters compute."""
    values = values_of(V1_1)
    folder = write_t5x(tmp_path / "checkpoint_3", t5x_arrays(V1_1, values))
    definition, abstract, _ = abstract_model(lambda key: build_model(V1_1, key=key))
    fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    params = warm_start(fresh, WarmStart(str(folder)), definition.layouts, report=lambda _: None).params
    layers = params["decoder"]["layers"]["0"]["feed_forward"]["gate"]["kernel"]
    for i in range(3):
        np.testing.assert_array_equal(layers[i], values[f"decoder/layers/{i}/feed_forward/gate/kernel"])
    model = pretrained.load(folder)
    assert (model.vocabulary, model.start_id, model.eos_ids) == (None, 0, (1,))
    ids = jnp.asarray(np.random.default_rng(1).integers(2, 96, (1, 8)), jnp.int32)
    batch = {}
    for side in ("encoder", "decoder"):
        batch |= {f"{side}_input_tokens": ids, f"{side}_segment_ids": jnp.ones_like(ids)}
        batch |= {f"{side}_positions": jnp.arange(8, dtype=jnp.int32)[None]}
    compute = nnx.jit(lambda model, batch: model.head(model.hidden_states(batch)[0]))
    logits = [np.asarray(compute(m, batch)) for m in (definition.merge(params), model.model)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5 * np.abs(logits[0]).max())


def test_the_activation_is_what_the_gin_file_beside_it_says(tmp_path):
    values = values_of(V1_1)
    folder = write_t5x(tmp_path / "model" / "checkpoint_1", t5x_arrays(V1_1, values))
    gin = tmp_path / "model" / "config.gin"
    gin.write_text("network.T5Config.mlp_activations = ('swish', 'linear')\nnetwork.T5Config.num_heads = 6\n")
    assert open_source(folder).config.decoder.blocks[0].feed_forward.activation is Activation.SILU
    gin.write_text("ACTIVATIONS = ('relu', 'linear')\nnetwork.T5Config.mlp_activations = %ACTIVATIONS\n")
    assert open_source(folder).config.decoder.blocks[0].feed_forward.activation is Activation.RELU
    gin.write_text("network.T5Config.mlp_activations = ('gelu', 'gelu')\n")
    with pytest.raises(ValueError, match=r"activations \('gelu', 'gelu'\); known are relu, gelu"):
        open_source(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a | {"decoder/layers_0/adapter/kernel": a["token_embedder/embedding"]},
            "adapter/kernel, which no T5",
        ),
        (lambda a: {n: x for n, x in a.items() if "layers_1/mlp/wo" not in n}, "lacks parameters of a T5: decoder/"),
        (lambda a: {n: x for n, x in a.items() if "token" not in n}, "no token embedding"),
        (lambda a: {n: x for n, x in a.items() if "decoder" not in n}, "has no decoder"),
        (
            lambda a: a | {"encoder/layers_1/mlp/wo/kernel": a["token_embedder/embedding"]},
            r"encoder/layers_1/mlp/wo/kernel has shape \[96, 32\], but .* \[48, 32\] there; the layers must",
        ),
    ],
)
def test_what_is_no_t5_is_refused_in_a_sentence(tmp_path, change, message):
    folder = write_t5x(tmp_path / "checkpoint_1", change(t5x_arrays(V1_1, values_of(V1_1))))
    with pytest.raises(ValueError, match=message):
        open_source(folder)


def test_damaged_folders_are_refused(tmp_path):
    folder = write_t5x(tmp_path / "checkpoint_1", t5x_arrays(V1_1, values_of(V1_1)))
    array = folder / "target.token_embedder.embedding"
    (array / "0.1").unlink()
    with pytest.raises(ValueError, match="token_embedder.embedding, .* lacks 0.1; the folder is not whole"):
        open_source(folder)
    (array / ".zarray").write_text("{")
    with pytest.raises(ValueError, match="the array of token_embedder/embedding, cannot be read"):
        open_source(folder)
    whole = (folder / "checkpoint").read_bytes()
    (folder / "checkpoint").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="checkpoint is no T5X checkpoint"):
        open_source(folder)
    with pytest.raises(ValueError, match=r"no T5X checkpoint of step 2 \(it has: 1\)"):
        open_source(tmp_path, step=2)
    with pytest.raises(ValueError, match="is one checkpoint, but not by its name that of step 2; leave out"):
        open_source(folder, step=2)


def mesh_arrays(config, values):
    """The parameters under Mesh TensorFlow's names, with an optimizer's slots beside them."""
    found = {"global_step": np.int64(1000), "shared/embedding": values["embedding/tokens"]}
    alone = "encoder" not in config.stacks
    if alone:
        found["decoder/embedding"] = found.pop("shared/embedding")
    if not config.head.tied:
        found["decoder/logits/kernel"] = values["vocabulary_head/kernel"]
    for side, stack in config.stacks.items():
        found[f"{side}/rms_norm/scale"] = values[f"{side}/norm/scale"]
        table = f"{side}/block_000/layer_000/SelfAttention/relative_attention_bias"
        found[table] = values[f"{side}/relative/table"].T
        for i in range(stack.depth):
            old = {name.split("/", 3)[3]: x for name, x in values.items() if name.startswith(f"{side}/layers/{i}/")}
            parts = [("attention", "SelfAttention"), ("cross_attention", "EncDecAttention"), ("feed_forward", None)]
            parts = [part for part in parts if f"{part[0]}_norms/before/scale" in old]
            for n, (ours, theirs) in enumerate(parts):
                block = f"{side}/block_{i:03d}/layer_{n:03d}"
                found[f"{block}/rms_norm/scale"] = old[f"{ours}_norms/before/scale"]
                if theirs is not None:
                    for letter, name in zip("qkv", ("query", "key", "value")):
                        found[f"{block}/{theirs}/{letter}"] = old[f"{ours}/{name}/kernel"].reshape(32, 48)
                    found[f"{block}/{theirs}/o"] = old[f"{ours}/output/kernel"].reshape(48, 32)
                    continue
                gated = "feed_forward/gate/kernel" in old
                names = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
                for their_name, our_name in names.items():
                    found[f"{block}/DenseReluDense/{their_name}/kernel"] = old[f"feed_forward/{our_name}/kernel"]
    slots = {f"{name}_slot_vr": x.mean(-1) for name, x in found.items() if x.ndim == 2}
    found |= slots
    return {re_decoder(name): x for name, x in found.items()} if alone else found


def re_decoder(name):
    """A decoder by itself is Mesh TensorFlow's "transformer"; but its logits stay the decoder's."""
    return name if name == "decoder/logits/kernel" else name.replace("decoder/", "transformer/", 1)


WRITER = """
import json, sys
import numpy as np
import tensorflow as tf
arrays = dict(np.load(sys.argv[1]))
for prefix, names in json.loads(sys.argv[2]).items():
    parts = [sorted(names)[::2], sorted(names)[1::2]]  # two data files
    for i, part in enumerate(parts):
        tensors = [tf.constant(arrays[n]) for n in part]
        tf.raw_ops.SaveV2(prefix=f"{prefix}_part{i}", tensor_names=[n.split(":", 1)[1] for n in part],
                          shape_and_slices=[""] * len(part), tensors=tensors)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=[f"{prefix}_part{i}" for i in (0, 1)], destination_prefix=prefix)
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, run_python):
    """Checkpoints that TensorFlow wrote, two of an encoder-decoder and one of a decoder."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("needs the seqio extra: pip install -e '.[seqio]'")
    folder = tmp_path_factory.mktemp("bundles")
    models = {"v1_0/model.ckpt-1000": V1_0, "v1_0/model.ckpt-200": V1_0, "decoder/model.ckpt-7": DECODER}
    arrays, names = {}, {}
    for where, config in models.items():
        (folder / where).parent.mkdir(exist_ok=True)
        scale = -1 if where.endswith("-200") else 1
        for name, x in mesh_arrays(config, values_of(config)).items():
            arrays[f"{where}:{name}"] = x * scale
            names.setdefault(str(folder / where), []).append(f"{where}:{name}")
        (folder / where).with_name("checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000"\n')
    np.savez(folder / "arrays.npz", **arrays)
    run_python(["-c", WRITER, str(folder / "arrays.npz"), json.dumps(names)])
    return folder


def test_a_checkpoint_of_mesh_tensorflow_is_the_model_it_holds(bundles):
    source = open_source(bundles / "v1_0")
    assert essence(source.config) == essence(V1_0)
    assert_holds(source, values_of(V1_0))
    older = open_source(bundles / "v1_0", 200)
    np.testing.assert_array_equal(older.array(("params", "embedding", "tokens")), -values_of(V1_0)["embedding/tokens"])
    alone = open_source(bundles / "decoder" / "model.ckpt-7")
    assert essence(alone.config) == essence(DECODER)
    assert_holds(alone, values_of(DECODER))


def test_damaged_bundles_are_refused(bundles, tmp_path):
    for file in (bundles / "decoder").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = sorted(tmp_path.glob("*.data-*"))
    assert len(data) == 2
    data[1].write_bytes(data[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match="data-00001-of-00002 is cut short; the checkpoint is not whole"):
        open_source(tmp_path)
    data[0].unlink()
    with pytest.raises(ValueError, match="data-00000-of-00002 is not there"):
        open_source(tmp_path)
    index = tmp_path / "model.ckpt-7.index"
    whole = index.read_bytes()
    for part in (whole[:-1], whole[: len(whole) // 2], b"", whole[: len(whole) // 2 - 60] + whole[len(whole) // 2 :]):
        index.write_bytes(part)
        with pytest.raises(ValueError, match="is no whole TensorFlow checkpoint"):
            open_source(tmp_path)
    with pytest.raises(ValueError, match="no TensorFlow checkpoint of step 3"):
        open_source(bundles / "v1_0", 3)
