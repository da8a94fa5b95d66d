"""Every shipped adaptation fits the model that it starts from: its rules fill what they should and leave none over."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.checkpoints.warm_start import warm_start
from jaxlm.configuration import resolve
from jaxlm.models import build_model
from jaxlm.run import RunConfig
from jaxlm.training.state import abstract_model

FILES = sorted(pathlib.Path(__file__).resolve().parents[3].glob("gin_configs/adaptations/*.gin"))


def resolved(file, *bindings):
    return resolve(RunConfig, [f"--gin_file={file}", *bindings])


def zeros(config):
    definition, shapes, _ = abstract_model(lambda key: build_model(config.model_of(config.phases[0]), key=key))
    return definition, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders in which the models that adaptations start from lie, by the names that the files have for them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, file in {
        "quickstart": "runs/quickstart.gin",
        "encoder_decoder": "adaptations/encoder_decoder.gin",
        "wider": "adaptations/wider.gin",
    }.items():
        definition, params = zeros(resolved(f"gin_configs/{file}"))
        with CheckpointManager(folder / name, CheckpointConfig(), definition.layouts) as manager:
            manager.save(1, {"params": params})
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_adaptation_fits(file, runs):
    config = resolved(file)
    path = runs / pathlib.Path(config.warm_start.path).name
    bindings = [f"--gin.INITIAL_CHECKPOINT_PATH='{path}'"]
    if file.stem == "unbalanced_encoder_decoder":
        bindings.append(f"--gin.ENCODER_PATH='{runs / 'wider'}'")
    config = resolved(file, *bindings)
    definition, params = zeros(config)
    account = warm_start(params, config.warm_start, definition.layouts, report=lambda _: None).account
    fresh = {"mixture_of_experts": "/router", "unbalanced_encoder_decoder": "/cross_attention"}.get(file.stem)
    assert bool(account.new) == bool(fresh) and all(fresh in name for name in account.new)
    assert bool(account.dropped) == (file.stem in ("student", "distilled_student", "decoder_of_encoder_decoder"))


def test_the_guides_encoder_decoder_of_gemma2(tmp_path, caplog):
    """Nothing in it is unused; windows and cross-attention are T5Gemma's."""
    guide = (FILES[0].parents[2] / "docs" / "surgery.md").read_text()
    (block,) = re.findall(r"^```gin title=encoder_decoder_of_gemma2.gin\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "model.gin").write_text(block)
    model = resolve("%MODEL", [f"--gin_file={tmp_path}/model.gin"])
    assert not caplog.records
    assert [block.attention.window for block in model.encoder.blocks] == [(4096, 4096), None]
    assert [block.attention.window for block in model.decoder.blocks] == [(4095, 0), None]
    for block in model.decoder.blocks:
        cross, own = block.cross_attention, block.attention
        assert (cross.window, cross.position, cross.soft_cap, cross.kv_heads) == (None, None, 50.0, own.kv_heads)
