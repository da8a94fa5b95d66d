"""A model of each family, made by transformers, computes the same here; and goes back bit for bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import naming
from jaxlm.checkpoints.huggingface.folder import export, open_folder
from jaxlm.models import build_model
from jaxlm.training.state import abstract_model
from tests.checkpoints.huggingface.family_cases import CASES

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install 'jaxlm[torch]'")
transformers = pytest.importorskip("transformers", reason="needs the torch extra: pip install 'jaxlm[torch]'")

LENGTH = 40
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 96, (2, LENGTH))
SOURCES = RNG.integers(3, 96, (2, LENGTH + 8))


class Workshop:
    """What several tests of a case need, made once."""

    def __init__(self, folder):
        self._folder = folder
        self._made, self._ours = {}, {}

    def made(self, case):
        """transformers' model with large random parameters, and its folder."""
        if case not in self._made:
            model_class = getattr(transformers, case.model)
            model = model_class(model_class.config_class(**case.options)).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    scale = parameter.ndim == 1 and name.endswith("weight")
                    noise = torch.randn(parameter.shape, generator=generator) * 0.2
                    parameter.copy_(noise + (case.scale if scale else 0.0))
            model.save_pretrained(self._folder / case.name)
            self._made[case] = model, self._folder / case.name
        return self._made[case]

    def ours(self, case):
        """Its folder opened here, the model's definition, and its parameters."""
        if case not in self._ours:
            folder = open_folder(self.made(case)[1])
            definition, abstract, _ = abstract_model(lambda key: build_model(folder.config, key=key))
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
            self._ours[case] = folder, definition, folder.load(target, definition.layouts)
        return self._ours[case]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("theirs"))


def their_logits(model, tokens, sources, **options):
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": torch.tensor(sources), "decoder_input_ids": torch.tensor(tokens)}
        else:
            inputs = {"input_ids": torch.tensor(tokens)}
        return model(**inputs, **options).logits.numpy()


def batch_of(tokens, sources, segments=None):
    """One text a row, or what `segments` says; encoders read `tokens` too."""
    batch = {}
    for side, ids in (("decoder", tokens), ("encoder", sources)):
        batch |= {f"{side}_input_tokens": ids, f"{side}_segment_ids": np.ones_like(ids)}
        batch[f"{side}_positions"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()} | (segments or {})


def our_logits(config, definition, params, batch):
    @jax.jit
    def logits(params, batch):
        model = definition.merge(params)
        return model.head(model.hidden_states(batch)[0])

    if config.architecture is Architecture.ENCODER:
        batch = batch | {name.replace("decoder", "encoder"): x for name, x in batch.items() if "decoder" in name}
    return np.asarray(logits(params, batch))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_transformers(case, workshop):
    model, _ = workshop.made(case)
    folder, definition, params = workshop.ours(case)
    expected = their_logits(model, TOKENS, SOURCES)
    found = our_logits(folder.config, definition, params, batch_of(TOKENS, SOURCES))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_and_back_bit_for_bit(case, workshop, tmp_path):
    model, theirs = workshop.made(case)
    folder, definition, params = workshop.ours(case)
    leaves = naming.flatten(params)
    sources = {naming.show(path): source for path, source in naming.sources(params, definition.layouts).items()}

    def value(path):
        leaf = np.asarray(leaves[sources[path].path])
        return leaf if sources[path].row is None else leaf[sources[path].row]

    ids = {name: getattr(model.config, name) for name in ("pad_token_id",) if getattr(model.config, name) is not None}
    family = export(
        tmp_path / "ours",
        folder.config,
        {p: value(p).shape for p in sources},
        value,
        special_ids=ids,
        family=folder.family.model_type,
    )
    assert family.architecture == case.model
    before, after = load_file(theirs / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], name)
    again = getattr(transformers, case.model).from_pretrained(tmp_path / "ours").eval()
    expected = their_logits(model, TOKENS, SOURCES)
    np.testing.assert_array_equal(their_logits(again, TOKENS, SOURCES), expected)


CHANGES = [pytest.param(case, feature, id=f"{case}-{feature}") for case in CASES for feature in case.features]


@pytest.mark.full
@pytest.mark.parametrize(("case", "feature"), CHANGES)
def test_every_feature_counts(case, feature, workshop):
    """Without it the logits are others by far more than the tolerance: the test above would see it missing."""
    folder, _, params = workshop.ours(case)
    expected = their_logits(workshop.made(case)[0], TOKENS, SOURCES)
    changed = case.features[feature](folder.config)
    assert changed != folder.config
    definition, _, _ = abstract_model(lambda key: build_model(changed, key=key))
    found = our_logits(changed, definition, params, batch_of(TOKENS, SOURCES))
    assert np.abs(found - expected).max() >= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("case", [CASES[4], CASES[-1]], ids=str)
def test_padded_and_packed_rows(case, workshop):
    """Two texts side by side in one row here are two padded rows there."""
    model, _ = workshop.made(case)
    folder, definition, params = workshop.ours(case)
    lengths = (17, 23)
    mask = np.arange(LENGTH)[None] < np.array(lengths)[:, None]
    expected = their_logits(model, TOKENS, SOURCES, attention_mask=torch.tensor(mask.astype(np.int64)))
    row = np.concatenate([TOKENS[i, :n] for i, n in enumerate(lengths)])[None]
    segments = np.repeat([1, 2], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = {"decoder_segment_ids": jnp.asarray(segments), "decoder_positions": jnp.asarray(positions)}
    found = our_logits(folder.config, definition, params, batch_of(row, SOURCES, packed))[0]
    wanted = np.concatenate([expected[i, :n] for i, n in enumerate(lengths)])
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_what_no_class_computes_is_refused_by_name(workshop, tmp_path):
    folder, _, _ = workshop.ours(CASES[4])
    prefix = dataclasses.replace(folder.config, architecture=Architecture.PREFIX_DECODER)
    with pytest.raises(ValueError, match="architecture is 'prefix_decoder', in a .* 'causal_decoder'"):
        export(tmp_path / "no", prefix, {}, lambda path: None, family="mistral")
    assert not (tmp_path / "no").exists()


def test_configurations_of_transformers_4_are_read(workshop):
    """`rope_theta` and `rope_scaling` instead of `rope_parameters`."""
    folder, _, _ = workshop.ours(CASES[0])
    values = json.loads((folder.folder / "config.json").read_text())
    parameters = values.pop("rope_parameters")
    values |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    assert folder.family.model_of(values) == folder.config
