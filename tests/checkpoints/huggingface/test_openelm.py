"""OpenELM, which transformers does not have, beside its definition in numpy and float64."""

import pytest

from jaxlm.checkpoints.huggingface.folder import open_folder
from jaxlm.checkpoints.huggingface.openelm import multipliers
from jaxlm.models.openelm import scaled
from tests.checkpoints.huggingface.openelm_reference import CONFIG, HIDDEN, comes_back, difference, written


def test_it_computes_what_the_paper_defines(tmp_path):
    found = open_folder(written(tmp_path / "openelm"))
    blocks = found.config.decoder.all_blocks
    assert [block.feed_forward.hidden for block in blocks] == HIDDEN
    assert [block.attention.num_heads for block in blocks] == CONFIG["num_query_heads"]
    assert difference(found) <= 1e-5


def test_and_back_bit_for_bit(tmp_path):
    found = open_folder(written(tmp_path / "openelm"))
    assert comes_back(found, tmp_path / "back")
    assert open_folder(tmp_path / "back").config == found.config


def test_multipliers_give_the_heads_again():
    """What the modelling file computes from them, for the released 270M and 3B shapes."""
    for width, count, dim in ((1280, 16, 64), (3072, 36, 128)):
        heads = [size // dim for size in scaled(width, count, (0.5, 1.0), dim * 4)]
        ends = multipliers(width, heads, dim, 4)
        assert [size // dim for size in scaled(width, count, ends, dim * 4)] == heads
    with pytest.raises(ValueError, match="are not those of OpenELM's layer-wise scaling"):
        multipliers(1280, [12, 20, 12], 64, 4)


def test_heads_that_do_not_share_keys_alike_are_refused(tmp_path):
    folder = written(tmp_path / "openelm", num_kv_heads=[1, 2, 4])
    with pytest.raises(ValueError, match=r"num_kv_heads \[1, 2, 4\] must name 3 layers with 2 query heads"):
        open_folder(folder)
