"""A model of each family, made by transformers, computes the same here; and goes back bit for bit."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface.folder import export, open_folder
from jaxlm.layers import RelativeEmbeddings
from tests.checkpoints.huggingface.family_cases import CASES, GENERATIVE
from tests.checkpoints.huggingface.side_by_side import SideBySide, relative
from tests.checkpoints.huggingface.test_folder import written

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install -e '.[torch]'")
transformers = pytest.importorskip("transformers", reason="needs the torch extra: pip install -e '.[torch]'")

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A function that gives a case's two models, made once."""
    folder, made = tmp_path_factory.mktemp("theirs"), {}

    def of(case):
        return made.setdefault(case.name, SideBySide(case, folder))

    return of


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_transformers_computes(case, both):
    """Logits and hidden states of two texts; and of both in one packed row here, in padded rows there."""
    found = both(case).differences()
    assert max(found.values()) <= 1e-5, found


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_transformers(case, both):
    assert both(case).gradient_difference() <= 1e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_and_back_bit_for_bit(case, both, tmp_path):
    pair = both(case)
    for name, (before, after) in pair.send_back(tmp_path / "ours").items():
        np.testing.assert_array_equal(before, after, name)
    again = SideBySide(case, tmp_path)
    again.model = getattr(transformers, case.model).from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(again.theirs.logits, pair.theirs.logits)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_output_matrix_of_its_own_has_its_bias_in_transformers(name, tmp_path):
    """There is one beside it too, which transformers computes with only where the matrix is tied."""
    case = dataclasses.replace(BY_NAME[name], options=BY_NAME[name].options | {"tie_word_embeddings": False})
    _, values = written(tmp_path / "ours", case)
    model = getattr(transformers, case.model).from_pretrained(tmp_path / "ours").eval()
    (output,) = (module for path, module in model.named_modules() if path.endswith("decoder"))
    np.testing.assert_array_equal(output.bias.detach(), values["vocabulary_head/bias"])
    np.testing.assert_array_equal(output.weight.detach().T, values["vocabulary_head/kernel"])
    assert open_folder(tmp_path / "ours").config.head.tied is False


@pytest.mark.full
@pytest.mark.parametrize("case", GENERATIVE, ids=str)
def test_greedy_texts_are_those_of_transformers(case, both):
    clear, same = both(case).greedy()
    assert clear == same and clear >= 16


CHANGES = [pytest.param(case, feature, id=f"{case}-{feature}") for case in CASES for feature in case.features]


@pytest.mark.full
@pytest.mark.parametrize(("case", "feature"), CHANGES)
def test_every_feature_counts(case, feature, both):
    """Without it the logits are others by far more than the tolerance: the test above would see it missing."""
    assert both(case).mutated(feature) >= 1e-3


def test_what_no_class_computes_is_refused_by_name(both, tmp_path):
    config = both(BY_NAME["mistral"]).folder.config
    prefix = dataclasses.replace(config, architecture=Architecture.PREFIX_DECODER)
    with pytest.raises(ValueError, match="architecture is 'prefix_decoder', in a .* 'causal_decoder'"):
        export(tmp_path / "no", prefix, {}, lambda path: None, family="mistral")
    assert not (tmp_path / "no").exists()


def test_configurations_of_transformers_4_are_read(both):
    """`rope_theta` and `rope_scaling` instead of `rope_parameters`."""
    folder = both(BY_NAME["llama3"]).folder
    values = json.loads((folder.folder / "config.json").read_text())
    parameters = values.pop("rope_parameters")
    values |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    assert folder.family.model_of(values) == folder.config


def test_experts_in_one_tensor_are_read(both, tmp_path):
    """transformers 5 writes a layer's experts so where it is told to keep the form that it calculates with."""
    pair = both(BY_NAME["qwen2_moe"])
    pair.model.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = SideBySide(pair.case, tmp_path)
    fused.model, fused.path = pair.model, tmp_path / "fused"
    assert any(name.endswith("experts.gate_up_proj") for name in fused.folder.tensors.shapes)
    separate, together = pair.parameters(pair.params), fused.parameters(fused.params)
    for path, value in separate.items():
        np.testing.assert_array_equal(together[path], value, path)


def test_both_heads_of_deberta_are_read(both, tmp_path):
    """transformers has two names for one head."""
    pair = both(BY_NAME["deberta_v3"])
    case = dataclasses.replace(pair.case, options=pair.case.options | {"legacy": True})
    legacy = SideBySide(case, tmp_path)
    assert legacy.model.cls is not None and legacy.folder.config == pair.folder.config
    legacy.definition = pair.definition
    assert relative(legacy.ours.logits, legacy.theirs.logits) <= 1e-5


def test_buckets_of_relative_positions_are_those_of_transformers():
    """At the sizes of the released models: 256 buckets to a distance of 512."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    offsets = np.arange(-2000, 2001)
    for span, distance in ((256, 512), (8, 40), (32, 100)):
        theirs = make_log_bucket_position(torch.tensor(offsets), span, distance).long().numpy() + span
        found = RelativeEmbeddings(span, distance).rows(offsets)
        np.testing.assert_array_equal(found, np.clip(theirs, 0, 2 * span - 1))
