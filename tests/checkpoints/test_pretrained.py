"""A trained model is opened from a run's folder or a Hugging Face folder with all that is needed to use it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.tiny_runs import Workshop
from jaxlm.architecture import Architecture
from jaxlm.checkpoints import conversion, naming
from jaxlm.checkpoints.huggingface.folder import export, parameter_shapes
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.pretrained import load
from jaxlm.checkpoints.sources import open_source
from jaxlm.checkpoints.warm_start import WarmStart, warm_start
from jaxlm.configuration import ConfigError, resolve, resolved_text
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.layers.positions import LearnedPositions
from jaxlm.layers.stack import Layers
from jaxlm.layers.stacking import unstack
from jaxlm.models import build_model
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.run import RunConfig
from jaxlm.training.optimizers import AdamW, OptimizerConfig, ScheduleFree, build_optimizer
from jaxlm.training.parameters import update
from jaxlm.training.schedules import Constant
from jaxlm.training.state import abstract_model, initializer
from tests.checkpoints.huggingface.family_cases import CASES
from tests.checkpoints.huggingface.test_folder import config_of, written
from tests.checkpoints.saved_runs import save_run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def saved(workshop):
    return save_run(workshop, "saved")


def hidden(model, length=16):
    tokens = jnp.arange(2 * length, dtype=jnp.int32).reshape(2, length) % 50
    batch = {"decoder_input_tokens": tokens, "decoder_segment_ids": jnp.ones_like(tokens)}
    batch["decoder_positions"] = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    return nnx.jit(lambda model, batch: model.hidden_states(batch)[0])(model, batch)


def test_a_runs_folder(saved):
    found = load(saved.folder)
    assert isinstance(found.vocabulary, ByteVocabulary) and found.no_vocabulary is None
    info = found.vocabulary.info()
    assert (found.start_id, found.eos_ids, found.context_length) == (info.pad_id, (info.eos_id,), 32)
    assert all(stack.layers is Layers.UNROLL for stack in found.config.stacks.values())
    assert saved.run.model.decoder.layers is Layers.SCAN
    np.testing.assert_allclose(hidden(found.model), hidden(saved.model), atol=1e-5)
    assert found.source.endswith("checkpoints/7")


def test_its_average_in_another_type(saved):
    found = load(saved.folder, averaged=True, compute="bfloat16")
    assert found.config.compute.value == "bfloat16"
    kernel = found.model.decoder.layers["0"].feed_forward.up.kernel[...]
    assert kernel.dtype == jnp.bfloat16, "what is cast before every use is kept as it is used"
    table = found.model.embedding.tokens[...]
    assert table.dtype == jnp.float32
    np.testing.assert_array_equal(table, saved.average["embedding"]["tokens"])


@pytest.fixture(scope="module")
def schedule_free(workshop):
    """A schedule-free run's folder, the average of its iterates by path on disk, and where it took gradients."""
    gin = workshop.gin("schedule_free")
    run = resolve(RunConfig, workshop.arguments("schedule_free", gin))
    definition, _, infos = abstract_model(lambda key: build_model(run.model, key=key))
    config = OptimizerConfig(
        AdamW(b1=0.0), Constant(0.1), schedule_free=ScheduleFree(0.8), freeze=("embedding", "decoder/layers/0/")
    )
    optimizer = build_optimizer(config, infos, total_steps=7, parametrization=run.model.scaling)
    parallel = ParallelConfig(MeshConfig()).on(jax.devices()[:1])
    state = initializer(lambda key: build_model(run.model, key=key), optimizer, parallel)(0)

    @jax.jit
    def step(state):
        trained, _ = optimizer.split(state.params)
        grads = jax.tree.map(lambda x: jnp.sin(100 * x + state.step), trained)
        updates, opt_state, _ = optimizer.update(grads, state.opt_state, trained, step=state.step, loss=jnp.float32(1))
        params = update(state.params, optax.apply_updates(trained, updates))
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)

    for _ in range(3):
        state = step(state)
    folder = workshop.folder / "schedule_free"
    with CheckpointManager(folder / "checkpoints", CheckpointConfig(), definition.layouts) as manager:
        manager.save(7, state, config=resolved_text(run))
    average = optimizer.evaluation_params(state.params, state.opt_state)
    by_path = [naming.flatten(unstack(params, definition.layouts)) for params in (average, state.params)]
    return folder, *by_path, state, definition


def assert_all_close(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6, err_msg=str(path))


def test_a_schedule_free_model_is_its_average(schedule_free):
    """However it is opened: as a module, converted, and where a run starts from it."""
    folder, average, gradients_at, state, definition = schedule_free
    kernel = next(path for path in average if path[:3] == ("decoder", "layers", "1") and average[path].ndim > 1)
    assert jnp.abs(average[kernel] - gradients_at[kernel]).max() > 1e-3
    table = ("embedding", "tokens")
    np.testing.assert_array_equal(average[table], gradients_at[table])
    opened = nnx.to_pure_dict(nnx.state(load(folder).model))
    assert_all_close({tuple(map(str, path)): leaf for path, leaf in naming.flatten(opened).items()}, average)
    converted = conversion.parameters_of(open_source(folder))
    assert_all_close({tuple(name.split("/")): converted.value(name) for name in converted.shapes}, average)
    fresh, layouts = jax.tree.map(jnp.zeros_like, state.params), definition.layouts
    for optimizer, expected in (("reset", average), ("keep", gradients_at)):  # there z is taken too
        started = warm_start(fresh, WarmStart(str(folder), optimizer=optimizer), layouts, report=lambda _: None)
        assert_all_close(naming.flatten(unstack(started.params, layouts)), expected)


def test_the_model_of_the_stage_a_step_is_in(workshop):
    text = (
        "TRAIN_STEPS = 6\nrun.RunConfig.stages = (@denoising/stages.Stage(), @last/stages.Stage())\n"
        "denoising/stages.Stage.steps = 4\n"
        "last/stages.Stage:\n    steps = 2\n    objective = @full_lm.FullLM()\n    architecture = 'causal_decoder'\n"
        "    data = @other/config.DataConfig()\n"
        "other/config.DataConfig.feature_lengths = {'inputs': 24, 'targets': 8}\n"
        "other/config.DataConfig.mixture = 'python_stdlib'\n"
        "TASK_FEATURE_LENGTHS = {'inputs': 40, 'targets': 8}\n"
    )
    options = dict(model="prefix_decoder", objective="span_corruption", imports=("run", "objectives.full_lm"))
    options["imports"] += ("training.stages",)
    saved = save_run(workshop, "staged", steps=(4, 6), text=text, **options)
    for step, architecture, length in ((4, Architecture.PREFIX_DECODER, 48), (6, Architecture.CAUSAL_DECODER, 32)):
        found = load(saved.folder, step=step)
        assert (found.config.architecture, found.context_length) == (architecture, length)


def test_a_vocabulary_that_is_gone(workshop, tmp_path):
    text = "vocabularies.SentencePieceVocabulary.path = '/nowhere/at.model'\n"
    text += "tasks.text_task.vocabulary = @vocabularies.SentencePieceVocabulary()\n"
    saved = save_run(workshop, "gone", text=text, imports=("data.vocabularies", "data.tasks"))
    found = load(saved.folder)
    assert found.vocabulary is None and found.start_id is None and found.eos_ids == ()
    assert "No SentencePiece model at '/nowhere/at.model'" in found.no_vocabulary


def test_a_hugging_face_folder(tmp_path):
    gpt2 = next(case for case in CASES if case.name == "gpt2")
    config, values = written(tmp_path / "gpt2", gpt2)
    found = load(tmp_path / "gpt2")
    assert isinstance(config.embedding.positions, LearnedPositions) and found.context_length == 64
    state = nnx.to_pure_dict(nnx.state(found.model))
    read = {naming.show(path): leaf for path, leaf in naming.flatten(state).items()}
    assert read.keys() == values.keys()
    for path, value in values.items():
        np.testing.assert_array_equal(read[path], value, path)
    assert found.vocabulary is None and "has no tokenizer.json" in found.no_vocabulary
    assert (found.start_id, found.eos_ids) == (None, ())


def byte_tokenizer(folder, template=None):
    """A tokenizer.json of the 256 bytes' stand-ins and three specials; `template` is its post-processor's."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<unk>"]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate([*specials, *alphabet])}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[(name, i) for i, name in enumerate(specials)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(("template", "start"), [(None, None), ("<s> $A", 0), ("<s> $A </s>", 0), ("$A </s>", None)])
def test_what_its_tokenizer_puts_before_a_text_starts_the_model(template, start, tmp_path):
    written(tmp_path / "llama")
    byte_tokenizer(tmp_path / "llama", template)
    (tmp_path / "llama" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    found = load(tmp_path / "llama")
    assert (found.start_id, found.eos_ids) == (start, (1, 2))
    assert found.vocabulary.decode(found.vocabulary.encode("naïve </s>")) == "naïve </s>"
    assert len(found.vocabulary.encode("ab")) == 2, "the vocabulary itself adds nothing"


def test_an_encoder_decoders_start(tmp_path):
    family, config = config_of(next(case for case in CASES if case.name == "t5"))
    shapes = parameter_shapes(config)
    ids = {"decoder_start_token_id": 5, "pad_token_id": 0, "eos_token_id": 1}
    export(tmp_path / "t5", config, shapes, lambda path: np.zeros(shapes[path], np.float32), special_ids=ids)
    (tmp_path / "t5" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    found = load(tmp_path / "t5")
    assert (found.start_id, found.eos_ids, found.context_length) == (5, (1,), None)
    assert found.vocabulary == ByteVocabulary(extra_ids=0)


def test_bad_input_is_one_sentence(saved, workshop, tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint to start from in .*nowhere; give a run's folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 8 \(it has: 7\)"):
        load(saved.folder, step=8)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(ValueError, match="config.json is damaged .*; get it again"):
        load(tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "rwkv"}')
    with pytest.raises(ValueError, match="There is no adapter for rwkv; there are"):
        load(tmp_path / "bad")
    no_average = workshop.folder / "no_average"
    with CheckpointManager(no_average / "checkpoints", CheckpointConfig(), saved.model.layouts) as manager:
        params = nnx.to_pure_dict(nnx.state(saved.model))
        manager.save(1, {"params": params}, config=resolved_text(saved.run))
        manager.save(2, {"params": params["embedding"]}, config=resolved_text(saved.run))
        manager.save(
            3,
            {"params": params},
            config="from __gin__ import dynamic_registration\nimport jaxlm.gone\njaxlm.gone.Run:\n",
        )
    with pytest.raises(CheckpointError, match="holds no ema_params: the run kept no average"):
        load(no_average, step=1, averaged=True)
    with pytest.raises(CheckpointError, match="lacks .*, by the configuration saved with it"):
        load(no_average, step=2)
    with pytest.raises(ConfigError, match="there is no module 'jaxlm.gone'"):
        load(no_average, step=3)


def test_a_detector_is_no_language_model(workshop):
    saved = save_run(workshop, "detector", model="replaced_token_detector", objective="replaced_token_detection")
    with pytest.raises(ValueError, match="holds a ReplacedTokenDetectorConfig, not a language model"):
        load(saved.folder)


def test_onto_a_mesh(saved, run_python):
    """Parameters come in parts, and the model is the same."""
    code = f"""
import numpy as np
from jaxlm.checkpoints.pretrained import load
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
parallel = ParallelConfig(MeshConfig(data=1, fsdp=2, tensor=2)).on()
split, whole = load({str(saved.folder)!r}, parallel=parallel), load({str(saved.folder)!r})
ours, theirs = (m.model.decoder.layers["0"].feed_forward.up.kernel[...] for m in (split, whole))
assert {{s.data.shape for s in ours.addressable_shards}} == {{(16, 32)}}, ours.sharding
np.testing.assert_array_equal(ours, theirs)
"""
    run_python(code, devices=4)
