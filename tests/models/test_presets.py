"""Shipped sizes have exactly the published numbers of parameters. Nothing is allocated."""

import dataclasses
import pathlib

import pytest

from jaxlm.configuration import resolve
from jaxlm.models.accounting import count_parameters, parameters

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "gin_configs" / "models"

# As the models' cards, papers or released weights have them.
PUBLISHED = {
    "bert/base": 109_514_298,  # with the masked-LM head, without the pooler
    "bert/large": 335_174_458,
    "bert/small": 28_795_194,
    "gemma2/2b": 2_614_341_888,
    "gemma2/9b": 9_241_705_984,
    "gemma2/27b": 27_227_128_320,
    "gpt2/small": 124_439_808,
    "gpt2/medium": 354_823_168,
    "gpt2/large": 774_030_080,
    "gpt2/xl": 1_557_611_200,
    "mt_nlg/530b": 529_600_819_200,  # "530 billion"; with the vocabulary filled up to 51,200
    "llama3/8b": 8_030_261_248,
    "llama3/70b": 70_553_706_496,
    "mamba/130m": 129_135_360,
    "mamba/2_8b": 2_768_345_600,
    "mamba2/130m": 128_989_632,
    "mamba2/2_7b": 2_702_599_680,
    "mixtral/8x7b": 46_702_792_704,
    "modernbert/base": 149_655_232,  # with the masked-LM head
    "modernbert/large": 395_881_664,
    "olmo2/1b": 1_484_916_736,
    "olmo2/7b": 7_298_617_344,
    "olmo2/13b": 13_716_198_400,
    "openelm/270m": 271_527_168,
    "openelm/450m": 457_179_136,
    "openelm/1_1b": 1_079_891_456,
    "openelm/3b": 3_036_647_424,
    "t5_1_1/small": 76_961_152,
    "t5_1_1/base": 247_577_856,
    "t5_1_1/large": 783_150_080,
    "t5_1_1/xl": 2_849_757_184,
    "t5_1_1/xxl": 11_135_332_352,
}
# arXiv 2204.05832 gives 4.8B and 11.0B; exactly, without norms and tables of relative positions:
STUDY = {"architecture_study/decoder": 4_762_107_904, "architecture_study/encoder_decoder": 11_003_232_256}

# Sizes of our own.
OURS = {"architecture_study/small", "architecture_study/pruned", "architecture_study/full"}


def preset(name, *bindings):
    return resolve("%MODEL", [f"--gin_file={FOLDER / name}.gin", *(f"--gin.{b}" for b in bindings)])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert count_parameters(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name, count", [("base", 109_482_240), ("large", 335_141_888)])
def test_bert_with_pooler_and_without_head(name, count):
    """The numbers usually quoted for BERT."""
    config = preset(f"bert/{name}", "LanguageModelConfig.pooler=True")
    assert count_parameters(config, where=lambda path: path[0] != "vocabulary_head") == count


def miniature(layers, width, *bindings):
    """One of the 24 miniatures of BERT (arXiv 1908.08962)."""
    sizes = (f"NUM_LAYERS={layers}", f"WIDTH={width}", f"NUM_HEADS={width // 64}", f"HIDDEN={4 * width}")
    return preset("bert/small", *sizes, *bindings)


def test_the_24_miniatures_of_bert():
    """well_read_students (i): counts are the closed form's, which gives the numbers usually quoted for known sizes."""

    def closed_form(layers, width, head):
        embedding = (30_522 + 512 + 2) * width + 2 * width
        layer = 4 * (width**2 + width) + 8 * width**2 + 5 * width + 4 * width
        # A dense transform and its norm and the bias of the output; or the pooler of a classifier.
        top = width**2 + 3 * width + 30_522 if head else width**2 + width
        return embedding + layers * layer + top

    quoted = {(2, 128): 4_385_920, (4, 256): 11_170_560, (4, 512): 28_763_648, (8, 512): 41_373_184}
    assert {size: closed_form(*size, head=False) for size in quoted} == quoted
    assert closed_form(12, 768, head=True) == PUBLISHED["bert/base"]
    for layers in range(2, 13, 2):
        for width in (128, 256, 512, 768):
            assert count_parameters(miniature(layers, width)) == closed_form(layers, width, head=True)


def test_the_published_sizes_of_the_miniatures_have_both_heads():
    """well_read_students (i): the paper's millions are with masked-LM head (transform, norm, output bias) and pooler.

    The next-sentence classifier on the pooler, 2 width + 2, has no head here and is below their last digit.
    """
    published = {(2, 128): "4.4", (4, 256): "11.3", (4, 512): "29.1", (8, 512): "41.7", (12, 768): "110.1"}
    pooler = "LanguageModelConfig.pooler=True"
    both = {size: count_parameters(miniature(*size, pooler)) for size in published}
    with_classifier = {size: count + 2 * size[1] + 2 for size, count in both.items()}
    assert with_classifier[12, 768] == 110_106_428
    for counts in (both, with_classifier):
        assert {size: f"{count / 1e6:.1f}" for size, count in counts.items()} == published
    one = miniature(4, 512, pooler)
    for head in ("vocabulary_head", "pooler"):  # without either it is 28.8
        assert f"{count_parameters(one, where=lambda path, head=head: path[0] != head) / 1e6:.1f}" == "28.8"


def test_deberta_without_head():
    """As transformers counts DebertaV2Model."""
    config = preset("deberta/v3_base")
    assert count_parameters(config, where=lambda path: path[0] != "vocabulary_head") == 183_831_552


@pytest.mark.parametrize("name, count", [("210m", 211_766_016), ("610m", 607_874_688)])
def test_eurobert_without_head(name, count):
    """As transformers counts EuroBertModel; the names are these, rounded."""
    assert count_parameters(preset(f"eurobert/{name}"), where=lambda path: path[0] != "vocabulary_head") == count


@pytest.mark.parametrize("name", STUDY)
def test_the_architecture_study(name):
    assert count_parameters(preset(name), where=lambda path: path[-1] not in ("scale", "table")) == STUDY[name]


def test_the_studys_prefix_decoder_is_its_causal_decoder():
    causal, prefix = (preset("architecture_study/decoder", f"ARCHITECTURE='{a}_decoder'") for a in ("causal", "prefix"))
    assert causal == dataclasses.replace(prefix, architecture=causal.architecture)


def test_every_size_is_covered():
    """A new preset needs a published number here, or a place among the sizes that nobody published."""
    names = {str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob("*.gin") if p.stem != "family"}
    without_head = {"deberta/v3_base", "eurobert/210m", "eurobert/610m"}
    assert {n for n in names if not n.startswith("tiny/")} == {*PUBLISHED, *STUDY, *OURS, *without_head}


@pytest.mark.parametrize("name", sorted(p.stem for p in (FOLDER / "tiny").glob("*.gin") if p.stem != "family"))
def test_every_parameter_has_axes_and_a_role(name):
    known = {"vocab", "embed", "mlp", "heads", "kv_heads", "head_dim", "length", "relpos_buckets", "layers", "experts"}
    for path, parameter in parameters(preset(f"tiny/{name}")):
        assert len(parameter.axes) == len(parameter.shape) and set(parameter.axes) <= known | {None}, path
        assert parameter.role in ("input", "hidden", "output", "vector"), path


def test_a_token_meets_two_of_mixtrals_eight_experts():
    """arXiv 2401.04088, 2.2: 47B parameters, of which 13B are active."""
    assert count_parameters(preset("mixtral/8x7b"), active=True) == 12_879_925_248
    assert count_parameters(preset("llama3/8b"), active=True) == PUBLISHED["llama3/8b"]


def test_openelm_grows_from_layer_to_layer():
    """Published: 270M has 12 query heads and a hidden width of 768 in its first layer, 20 and 5120 in its last."""
    blocks = preset("openelm/270m").decoder.blocks
    assert (blocks[0].attention.num_heads, blocks[0].feed_forward.hidden) == (12, 768)
    assert (blocks[-1].attention.num_heads, blocks[-1].feed_forward.hidden) == (20, 5120)
    assert all(b.attention.kv_heads * 4 == b.attention.num_heads for b in blocks)
    ends = ("layerwise_scaling.head_multipliers=(1.0, 1.0)", "layerwise_scaling.hidden_multipliers=(4.0, 4.0)")
    uniform = preset("openelm/270m", *ends)
    assert len(set(uniform.decoder.blocks)) == 1


def test_gemma_alternates_and_modernbert_sees_everything_every_third_layer():
    windows = [b.attention.window for b in preset("gemma2/2b").decoder.all_blocks]
    assert windows == [(4095, 0), None] * 13
    blocks = preset("modernbert/base").encoder.all_blocks
    assert [i for i, b in enumerate(blocks) if b.attention.window is None] == list(range(0, 22, 3))
    assert {b.attention.position.base for b in blocks if b.attention.window is None} == {160000.0}
    assert {b.attention.position.base for b in blocks if b.attention.window} == {10000.0}
    assert [b.attention_norm is not None for b in blocks] == [True] + [False] * 21
