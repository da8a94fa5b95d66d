"""Named surgeries: what each keeps of the model's function, and which parameters it gives where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import naming
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.surgery import (
    CrossAttention,
    DecoderToEncoderDecoder,
    EncoderDecoderToDecoder,
    Fill,
    Gate,
    PickLayers,
    Rename,
    Resize,
    Side,
    Upcycle,
    UpscaleDepth,
    WidenFeedForward,
    WidenResidual,
)
from jaxlm.checkpoints.warm_start import WarmStart, warm_start
from jaxlm.layers import (
    Activation,
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    InitConfig,
    LearnedPositions,
    MixtureOfExpertsConfig,
    NormConfig,
    NormKind,
    Placement,
    Rope,
    StackConfig,
)
from jaxlm.models import HeadConfig, LanguageModelConfig, build_model
from jaxlm.training.state import abstract_model

VOCAB, WIDTH, LENGTH = 40, 16, 12
ATTENTION = AttentionConfig(2, 8, num_kv_heads=1, position=Rope())
LLAMA = LanguageModelConfig(
    Architecture.CAUSAL_DECODER,
    VOCAB,
    WIDTH,
    EmbeddingConfig(),
    HeadConfig(),
    InitConfig(),
    decoder=StackConfig((BlockConfig(ATTENTION, FeedForwardConfig(24), NormConfig()),), 4, final_norm=NormConfig()),
)
LAYER_NORM = NormConfig(NormKind.LAYER, bias=True)
GPT = dataclasses.replace(
    LLAMA,
    embedding=EmbeddingConfig(positions=LearnedPositions(LENGTH)),
    head=HeadConfig(tied=False, bias=True),
    decoder=StackConfig(
        (
            BlockConfig(
                AttentionConfig(2, 8, qkv_bias=True, output_bias=True),
                FeedForwardConfig(24, Activation.GELU_TANH, gated=False, bias=True),
                LAYER_NORM,
            ),
        ),
        2,
        final_norm=LAYER_NORM,
    ),
)


# Gemma 2's blocks, with caps and a window small enough to matter here.
ADDED = NormConfig(scale_offset=1.0)
GLOBAL = BlockConfig(
    dataclasses.replace(ATTENTION, soft_cap=1.0),
    FeedForwardConfig(24, Activation.GELU_TANH),
    ADDED,
    placement=Placement.SANDWICH,
)
LOCAL = dataclasses.replace(GLOBAL, attention=dataclasses.replace(GLOBAL.attention, window=(3, 0)))
GEMMA = dataclasses.replace(
    LLAMA,
    embedding=EmbeddingConfig(scale_by_width=True),
    head=HeadConfig(soft_cap=3.0),
    decoder=StackConfig((LOCAL, GLOBAL), 4, final_norm=ADDED),
)


def deeper(config, layers):
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=layers))


def encoder_decoder(config):
    """The same blocks in two stacks: encoder windows to both sides, cross-attention without positions and windows."""

    def encoding(block):
        left, _ = block.attention.window or (None, None)
        window = None if left is None else (left, left)
        return dataclasses.replace(block, attention=dataclasses.replace(block.attention, window=window))

    def crossing(block):
        cross = dataclasses.replace(block.attention, position=None, window=None)
        return dataclasses.replace(block, cross_attention=cross)

    encoder, decoder = (
        dataclasses.replace(config.decoder, blocks=tuple(map(change, config.decoder.blocks)))
        for change in (encoding, crossing)
    )
    return dataclasses.replace(config, architecture=Architecture.ENCODER_DECODER, encoder=encoder, decoder=decoder)


def random_parameters(config, seed):
    """Large numbers, norm scales near 1, so that a parameter in the wrong place moves the logits."""
    definition, shapes, _ = abstract_model(lambda key: build_model(config, key=key))
    rng = np.random.default_rng(seed)
    leaves = [
        jnp.asarray(rng.normal(size=x.shape) * 0.3 + (path[-1] == "scale"), jnp.float32)
        for path, x in naming.flatten(shapes).items()
    ]
    return definition, jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def unstacked(definition, params):
    """{name on disk: array}."""
    leaves = naming.flatten(params)
    return {
        naming.show(path): np.asarray(leaves[at.path] if at.row is None else leaves[at.path][at.row])
        for path, at in naming.sources(params, definition.layouts).items()
    }


class Clinic:
    """Donors on disk, and what surgery makes of them."""

    def __init__(self, folder):
        self.folder = folder
        self._logits = {}

    def saved(self, name, definition, params):
        with CheckpointManager(self.folder / name, CheckpointConfig(), definition.layouts) as manager:
            manager.save(1, {"params": params})
        return str(self.folder / name)

    def donor(self, name, config):
        definition, params = random_parameters(config, seed=1)
        if not (self.folder / name).exists():
            self.saved(name, definition, params)
        return str(self.folder / name), definition, params

    def operated(self, path, config, *rules):
        """(definition, parameters) of a model made of the one at `path`."""
        definition, fresh = random_parameters(config, seed=2)
        final = fresh["decoder"].get("norm", {})
        if "scale" in final:  # a recipe looks at what it starts from
            final["scale"] = jnp.full_like(final["scale"], 1.0 - config.decoder.final_norm.scale_offset)
        started = warm_start(fresh, WarmStart(path, rules=rules), definition.layouts, report=lambda _: None)
        return definition, started.params

    def logits(self, config, definition, params, marked=0):
        if config not in self._logits:
            self._logits[config] = jax.jit(lambda p, b: (m := definition.merge(p)).head(m.hidden_states(b)[0]))
        ids = np.random.default_rng(3).integers(0, VOCAB, (2, LENGTH))
        batch = {}
        for side in ("encoder", "decoder"):
            batch |= {f"{side}_input_tokens": ids if side == "decoder" else ids[:, ::-1] * 7 % VOCAB}
            batch |= {f"{side}_segment_ids": np.ones_like(ids)}
            batch |= {f"{side}_positions": np.broadcast_to(np.arange(LENGTH), ids.shape)}
        batch["decoder_causal_attention"] = np.broadcast_to(np.arange(LENGTH) < marked, ids.shape)
        batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
        return np.asarray(self._logits[config](params, batch))


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    return Clinic(tmp_path_factory.mktemp("clinic"))


def same(found, expected):
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def differ(found, expected):
    assert np.abs(found - expected).max() >= 1e-2 * np.abs(expected).max()


def test_depth_upscaling(clinic):
    """Layers 0-2 and 1-3 of four: equal to their originals one by one; closed, the function is the donor's."""
    path, definition, params = clinic.donor("llama", LLAMA)
    order, expected = ((0, 3), (1, 4)), clinic.logits(LLAMA, definition, params)
    big = deeper(LLAMA, 6)
    grown = clinic.operated(path, big, UpscaleDepth(order))
    old, new = unstacked(definition, params), unstacked(*grown)
    for i, source in enumerate([0, 1, 2, 1, 2, 3]):
        names = [name for name in new if name.startswith(f"decoder/layers/{i}/")]
        assert len(names) == 9
        for name in names:
            np.testing.assert_array_equal(new[name], old[name.replace(f"layers/{i}/", f"layers/{source}/")])
    differ(clinic.logits(big, *grown), expected)
    same(clinic.logits(big, *clinic.operated(path, big, UpscaleDepth(order, Gate.CLOSED))), expected)


def test_branches_whose_end_is_unknown_are_not_left_open(clinic):
    """Closing copies of a layer with a branch of another kind: refused, not half done."""
    path, definition, params = clinic.donor("llama", LLAMA)
    other = Rename(r"decoder/layers/1/attention/(.*)", r"decoder/layers/1/adapter/\1")
    with pytest.raises(CheckpointError, match="cannot close decoder/layers/3/adapter, whose last matrix it does not"):
        clinic.operated(path, deeper(LLAMA, 6), other, UpscaleDepth(((0, 3), (1, 4)), Gate.CLOSED))


def test_a_dense_model_becomes_experts_and_those_deeper(clinic):
    """Experts alike compute what the dense layer did, whatever the router says; their closed copies add nothing."""
    path, definition, params = clinic.donor("llama", LLAMA)
    expected, (block,) = clinic.logits(LLAMA, definition, params), LLAMA.decoder.blocks
    fed = MixtureOfExpertsConfig(block.feed_forward.hidden, num_experts=3)
    stack = dataclasses.replace(LLAMA.decoder, blocks=(dataclasses.replace(block, feed_forward=fed),))
    sparse = dataclasses.replace(LLAMA, decoder=stack)
    started = clinic.operated(path, sparse, Upcycle())
    found = clinic.logits(sparse, *started)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    grown = clinic.saved("sparse", *started)
    deep = clinic.operated(grown, deeper(sparse, 5), UpscaleDepth(((0, 3), (2, 4)), Gate.CLOSED))
    same(clinic.logits(deeper(sparse, 5), *deep), found)


def test_a_student_of_some_layers(clinic):
    path, definition, params = clinic.donor("llama", LLAMA)
    student = clinic.operated(path, deeper(LLAMA, 2), PickLayers(((0, 4, 2),)))
    old, new = unstacked(definition, params), unstacked(*student)
    for name, value in new.items():
        np.testing.assert_array_equal(value, old[name.replace("layers/1/", "layers/2/")], name)


def test_causal_and_prefix_and_encoder_are_the_same_parameters(clinic):
    """Every array is taken as it is; without a prefix the function is the same, with one it is another."""
    path, definition, params = clinic.donor("llama", LLAMA)
    for architecture in (Architecture.PREFIX_DECODER, Architecture.ENCODER):
        config = dataclasses.replace(LLAMA, architecture=architecture)
        started = clinic.operated(path, config)
        jax.tree.map(np.testing.assert_array_equal, started[1], params)
        if architecture is Architecture.PREFIX_DECODER:
            expected = clinic.logits(LLAMA, definition, params)
            np.testing.assert_array_equal(clinic.logits(config, *started), expected)
            differ(clinic.logits(config, *started, marked=6), expected)


@pytest.mark.parametrize("cross", CrossAttention)
@pytest.mark.parametrize(("name", "config"), [("llama", LLAMA), ("gemma", GEMMA)])
def test_a_decoder_becomes_an_encoder_decoder_and_comes_back(clinic, name, config, cross):
    path, definition, params = clinic.donor(name, config)
    expected, both = clinic.logits(config, definition, params), encoder_decoder(config)
    opened = clinic.operated(path, both, DecoderToEncoderDecoder(cross))
    closed = clinic.operated(path, both, DecoderToEncoderDecoder(cross, Gate.CLOSED))
    differ(clinic.logits(both, *opened), expected)
    same(clinic.logits(both, *closed), expected)

    old, new = unstacked(definition, params), unstacked(*closed)
    fresh = unstacked(*random_parameters(both, seed=2))
    for name, value in new.items():
        source = name.replace("encoder/", "decoder/")
        if cross is CrossAttention.SELF_ATTENTION:
            source = source.replace("cross_attention", "attention")
        if "cross_attention/output" in name:
            assert not value.any()
        else:
            np.testing.assert_array_equal(value, old[source] if source in old else fresh[source], name)

    saved = clinic.saved(f"both_{name}_{cross.value}", *closed)
    for keep in Side:  # the encoder, under a causal mask, is the decoder it was
        again = clinic.operated(saved, config, EncoderDecoderToDecoder(keep))
        jax.tree.map(np.testing.assert_array_equal, again[1], params)
        np.testing.assert_array_equal(clinic.logits(config, *again), expected)


def test_an_encoder_of_another_size(clinic):
    """Unbalanced: a wider, shallower decoder with an embedding of its own becomes the encoder, and comes back."""
    path, definition, params = clinic.donor("llama", LLAMA)
    expected = clinic.logits(LLAMA, definition, params)
    wide = dataclasses.replace(deeper(LLAMA, 2), width=24)
    other, wide_definition, wide_params = clinic.donor("wide", wide)
    both = dataclasses.replace(
        encoder_decoder(LLAMA), encoder=wide.decoder, encoder_width=24, encoder_embedding=EmbeddingConfig()
    )
    closed = clinic.operated(path, both, DecoderToEncoderDecoder("fresh", Gate.CLOSED, encoder_path=other))
    same(clinic.logits(both, *closed), expected)
    saved = clinic.saved("unbalanced", *closed)
    for keep, config, whole in ((Side.DECODER, LLAMA, params), (Side.ENCODER, wide, wide_params)):
        again = clinic.operated(saved, config, EncoderDecoderToDecoder(keep))
        jax.tree.map(np.testing.assert_array_equal, again[1], whole)
    message = r"attention/key/kernel of .* has shape \[16, 1, 8\], but this model wants .*cross_attention"
    with pytest.raises(CheckpointError, match=message):
        clinic.operated(path, both, DecoderToEncoderDecoder(encoder_path=other))


def finally_normed(config, norm):
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, final_norm=norm))


OFFSET = finally_normed(LLAMA, NormConfig(scale_offset=1.0))


@pytest.mark.parametrize(("name", "config"), [("llama", LLAMA), ("gpt", GPT), ("offset", OFFSET)])
def test_a_wider_model_computes_the_same(clinic, name, config):
    """Twice the width (RMS norms and a tied output, also with 1 + scale; layer norms and one of its own), then more
    hidden units."""
    path, definition, params = clinic.donor(name, config)
    expected = clinic.logits(config, definition, params)
    (block,) = config.decoder.blocks
    fed = dataclasses.replace(block.feed_forward, hidden=31)
    stack = dataclasses.replace(config.decoder, blocks=(dataclasses.replace(block, feed_forward=fed),))
    wide = dataclasses.replace(config, width=2 * WIDTH, decoder=stack)
    widened = clinic.operated(path, wide, WidenResidual(), WidenFeedForward())
    found = clinic.logits(wide, *widened)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(CheckpointError, match="WidenResidual goes from a width to a multiple .* choose 32"):
        clinic.operated(path, dataclasses.replace(config, width=24), WidenResidual())


@pytest.mark.parametrize("norm", [None, NormConfig(scale=False)])
def test_a_tied_output_without_a_scale_before_it_is_not_widened(clinic, norm):
    """Nothing is there that could divide the logits by the number of copies."""
    path, *_ = clinic.donor(f"without_{norm is None}", finally_normed(LLAMA, norm))
    wide = dataclasses.replace(finally_normed(LLAMA, norm), width=2 * WIDTH)
    with pytest.raises(
        CheckpointError, match="2 times as large: the output is the embedding, and decoder/norm/scale is n"
    ):
        clinic.operated(path, wide, WidenResidual())


@pytest.mark.parametrize(("name", "config"), [("llama", LLAMA), ("gpt", GPT)])
def test_old_ids_keep_their_logits_in_a_larger_vocabulary(clinic, name, config):
    path, definition, params = clinic.donor(name, config)
    large = dataclasses.replace(config, vocab_size=VOCAB + 8)
    rules = [Resize("embedding/tokens", 0, fill=Fill.MEAN)]
    if not config.head.tied:
        rules += [Resize("vocabulary_head/kernel", 1, fill=Fill.MEAN), Resize("vocabulary_head/bias", 0)]
    started = clinic.operated(path, large, *rules)
    found, expected = clinic.logits(large, *started), clinic.logits(config, definition, params)
    same(found[..., :VOCAB], expected)
    same(found[..., VOCAB], expected.mean(-1))  # of the mean of all rows, the mean of all logits
