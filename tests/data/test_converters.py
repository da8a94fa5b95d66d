"""What each architecture makes of examples: the documented tables, and the law that packing equals not packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.architecture import Architecture
from jaxlm.data.converters import feature_converter
from jaxlm.objectives.base import Example


def ids(*values):
    return np.array(values, np.int32)


def rows(batch, prefix="decoder_"):
    return {k.removeprefix(prefix): v[0].tolist() for k, v in batch.items() if k.startswith(prefix)}


PAIR = [[Example(ids(7, 8, 5, 1), ids(3, 9, 1)), Example(ids(8, 4, 1), ids(6, 1))]]


def test_prefix_decoder_is_seqios_prefix_lm_table():
    batch = feature_converter(Architecture.PREFIX_DECODER, {"inputs": 7, "targets": 6}).batch(PAIR)
    assert rows(batch) == {
        "target_tokens": [7, 8, 5, 1, 3, 9, 1, 8, 4, 1, 6, 1, 0],
        "input_tokens": [0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 1, 6, 0],
        "loss_weights": [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0],
        "positions": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 0],
        "segment_ids": [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
        "causal_attention": [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0],
    }


def test_causal_decoder_is_the_same_without_the_attention_feature():
    lengths = {"inputs": 7, "targets": 6}
    causal = feature_converter(Architecture.CAUSAL_DECODER, lengths).batch(PAIR)
    prefix = feature_converter(Architecture.PREFIX_DECODER, lengths).batch(PAIR)
    prefix.pop("decoder_causal_attention")
    assert causal.keys() == prefix.keys()
    for name in causal:
        np.testing.assert_array_equal(causal[name], prefix[name])


def test_encoder_decoder_is_seqios_table():
    batch = feature_converter(Architecture.ENCODER_DECODER, {"inputs": 8, "targets": 6}).batch(PAIR)
    assert rows(batch, "encoder_") == {
        "input_tokens": [7, 8, 5, 1, 8, 4, 1, 0],
        "positions": [0, 1, 2, 3, 0, 1, 2, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 0],
    }
    assert rows(batch) == {
        "target_tokens": [3, 9, 1, 6, 1, 0],
        "input_tokens": [0, 3, 9, 0, 6, 0],
        "loss_weights": [1, 1, 1, 1, 1, 0],
        "positions": [0, 1, 2, 0, 1, 0],
        "segment_ids": [1, 1, 1, 2, 2, 0],
    }


def test_encoder_is_seqios_table():
    examples = [
        Example(ids(8, 9, 9, 1), ids(8, 7, 4, 1), np.array([0, 1, 1, 0], np.float32)),
        Example(ids(8, 3, 9, 1), ids(8, 3, 6, 1), np.array([0, 0, 1, 0], np.float32)),
    ]
    batch = feature_converter(Architecture.ENCODER, {"targets": 9}).batch([examples])
    assert rows(batch, "encoder_") == {
        "input_tokens": [8, 9, 9, 1, 8, 3, 9, 1, 0],
        "target_tokens": [8, 7, 4, 1, 8, 3, 6, 1, 0],
        "loss_weights": [0, 1, 1, 0, 0, 0, 1, 0, 0],
        "positions": [0, 1, 2, 3, 0, 1, 2, 3, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 0],
    }


def test_documents_of_one_example_become_segments_of_their_own():
    examples = [
        Example(ids(), ids(5, 6, 7, 8), segments=ids(1, 1, 2, 3)),
        Example(ids(), ids(9, 9)),
    ]
    batch = feature_converter(Architecture.PREFIX_DECODER, {"targets": 7}).batch([examples])
    assert rows(batch) == {
        "target_tokens": [5, 6, 7, 8, 9, 9, 0],
        "input_tokens": [0, 5, 0, 0, 0, 9, 0],
        "loss_weights": [1, 1, 1, 1, 1, 1, 0],
        "positions": [0, 1, 0, 0, 0, 1, 0],
        "segment_ids": [1, 1, 2, 3, 4, 4, 0],
        "causal_attention": [1, 0, 1, 1, 1, 0, 0],
    }


def test_segments_agree_between_encoder_and_decoder():
    # Two texts in the first example, one of them without targets in the second example's row.
    examples = [
        Example(ids(5, 6, 7), ids(8, 9), segments=ids(1, 2), input_segments=ids(1, 2, 2)),
        Example(ids(4), ids()),
        Example(ids(3), ids(2, 2)),
    ]
    batch = feature_converter(Architecture.ENCODER_DECODER, {"inputs": 6, "targets": 5}).batch([examples])
    assert batch["encoder_segment_ids"][0].tolist() == [1, 2, 2, 3, 4, 0]
    assert batch["decoder_segment_ids"][0].tolist() == [1, 2, 4, 4, 0]


def test_token_id_zero_inside_an_example_is_not_padding():
    example = Example(ids(5, 0, 6), ids(0, 7, 0))
    batch = feature_converter(Architecture.CAUSAL_DECODER, {"inputs": 4, "targets": 4}).batch([[example]])
    assert rows(batch)["target_tokens"] == [5, 0, 6, 0, 7, 0, 0, 0]
    assert rows(batch)["segment_ids"] == [1, 1, 1, 1, 1, 1, 0, 0]
    assert rows(batch)["loss_weights"] == [0, 0, 0, 1, 1, 1, 0, 0]


def test_accounting_ids_lie_beside_the_loss_and_padding_fills_with_the_pad_id():
    examples = [Example(ids(5), ids(6), dataset=2, objective=1), Example(ids(), ids(7), dataset=3)]
    batch = feature_converter(Architecture.CAUSAL_DECODER, {"inputs": 2, "targets": 2}, pad_id=9).batch([examples, []])
    assert batch["dataset_ids"].tolist() == [[2, 2, 3, 0], [0, 0, 0, 0]]
    assert batch["objective_ids"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["decoder_target_tokens"].tolist() == [[5, 6, 7, 9], [9, 9, 9, 9]]
    assert batch["decoder_input_tokens"].tolist() == [[9, 5, 9, 9], [9, 9, 9, 9]]
    assert not batch["decoder_loss_weights"][1].any()


@st.composite
def packed_rows(draw):
    sizes = st.tuples(st.integers(0, 5), st.integers(1, 4))
    drawn = draw(st.lists(st.lists(sizes, max_size=3), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 100)))
    return [
        [Example(rng.integers(0, 50, n, dtype=np.int32), rng.integers(0, 50, m, dtype=np.int32)) for n, m in row]
        for row in drawn
    ]


@settings(max_examples=60, deadline=None)
@given(packed_rows(), st.sampled_from([Architecture.CAUSAL_DECODER, Architecture.PREFIX_DECODER]))
def test_a_packed_row_is_its_examples_side_by_side(examples, architecture):
    """Law 1, on the data's side: every feature of an example in a pack is what it is alone."""
    lengths = {"inputs": 15, "targets": 12}
    converter = feature_converter(architecture, lengths)
    batch = converter.batch(examples)
    assert {k: (v.shape[1:], v.dtype) for k, v in batch.items()} == converter.features
    for r, row in enumerate(examples):
        at = 0
        for number, example in enumerate(row):
            alone = converter.batch([[example]])
            (size,) = converter.size(example)
            for name, values in batch.items():
                expected = alone[name][0, :size]
                if name == "decoder_segment_ids":
                    expected = expected + number
                np.testing.assert_array_equal(values[r, at : at + size], expected, err_msg=name)
            at += size
        assert not batch["decoder_segment_ids"][r, at:].any()
        assert not batch["decoder_loss_weights"][r, at:].any()


@pytest.mark.parametrize(
    ("architecture", "lengths", "message"),
    [
        (Architecture.ENCODER_DECODER, {"targets": 5}, "give a positive length for inputs and targets"),
        (Architecture.CAUSAL_DECODER, {"target": 5}, "do not make a row"),
        (Architecture.ENCODER, {"targets": 0}, "give a positive length for targets"),
    ],
)
def test_impossible_lengths_are_refused(architecture, lengths, message):
    with pytest.raises(ValueError, match=message):
        feature_converter(architecture, lengths)


def test_what_does_not_fit_is_refused_rather_than_cut():
    converter = feature_converter(Architecture.CAUSAL_DECODER, {"targets": 4})
    with pytest.raises(ValueError, match="take 5 columns, but it has 4"):
        converter.batch([[Example(ids(1, 2), ids(3, 4, 5))]])


def test_unequal_lengths_are_refused_for_an_encoder():
    converter = feature_converter(Architecture.ENCODER, {"targets": 4})
    with pytest.raises(ValueError, match="one target at each input"):
        converter.batch([[Example(ids(1, 2), ids(3, 4, 5))]])


@pytest.mark.parametrize("architecture", [Architecture.CAUSAL_DECODER, Architecture.PREFIX_DECODER])
def test_the_texts_of_an_example_are_rows_side_by_side(architecture):
    """In a decoder's row targets follow the inputs of their own text, as if each text were an example."""
    together = Example(
        ids(5, 6, 7, 8),
        ids(9, 3, 4, 2, 2),
        weights=np.array([1, 0, 1, 1, 1], np.float32),
        segments=ids(1, 1, 2, 4, 4),
        input_segments=ids(1, 2, 2, 3),
        dataset=2,
    )
    apart = [
        Example(ids(5), ids(9, 3), np.array([1, 0], np.float32), dataset=2),
        Example(ids(6, 7), ids(4), np.array([1], np.float32), dataset=2),
        Example(ids(8), ids(), np.zeros(0, np.float32), dataset=2),
        Example(ids(), ids(2, 2), np.array([1, 1], np.float32), dataset=2),
    ]
    documents, single = Example(ids(), ids(7, 7, 8), segments=ids(1, 1, 2)), Example(ids(4), ids(4))
    converter = feature_converter(architecture, {"inputs": 10, "targets": 6})
    batch = converter.batch([[together, single], [documents]])
    expected = converter.batch([[*apart, single], [Example(ids(), ids(7, 7)), Example(ids(), ids(8))]])
    assert batch.keys() == expected.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)


def test_inputs_of_several_texts_must_tell_which():
    converter = feature_converter(Architecture.CAUSAL_DECODER, {"targets": 4})
    with pytest.raises(ValueError, match="has inputs that do not tell to which they belong; give"):
        converter.batch([[Example(ids(1), ids(3, 4), segments=ids(1, 2))]])
