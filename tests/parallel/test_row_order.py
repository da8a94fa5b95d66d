"""How rows lie on devices, what that costs each of them, and over which ways keys travel."""

import jax
import numpy as np
import pytest

from jaxlm.parallel.mesh import MESH_AXES, MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism, SequenceParallel
from jaxlm.parallel.ring_attention import Route
from jaxlm.parallel.row_order import RowOrder
from pallas_kernels.masks import Causal, Segments, Window
from pallas_kernels.plans import HIDDEN


class FakeMesh:
    """Only what the rules read of a mesh."""

    shape = dict.fromkeys(MESH_AXES, 1) | {"sequence": 4}


def on_four(**sequence) -> Parallelism:
    return Parallelism(FakeMesh(), ParallelConfig(MeshConfig(), sequence=SequenceParallel(**sequence)))


def test_balanced_devices_hold_a_run_of_the_front_and_one_of_the_end():
    order = RowOrder(16, 4, balanced=True)
    row = np.arange(16)
    assert np.asarray(order.arrange(row[None]))[0].reshape(4, 4).tolist() == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    np.testing.assert_array_equal(order.restore(order.arrange(row[None])), row[None])
    np.testing.assert_array_equal(jax.jit(order.starts)(2), [4, 10])
    plain = RowOrder(16, 4, balanced=False)
    np.testing.assert_array_equal(plain.arrange(row[None]), row[None])
    np.testing.assert_array_equal(plain.starts(2), [8])


def test_balanced_devices_compute_as_many_blocks_of_a_causal_mask_within_one():
    """A plain order gives the last device many times the first one's."""
    length, devices, block = 1024, 4, 16
    state = np.asarray(Causal().plan(length, length, block, block).state)[0, 0] != HIDDEN

    def visited(order):
        rows = np.asarray(order.arrange(np.arange(length // block)[None]))[0].reshape(devices, -1)
        return [int(state[mine].sum()) for mine in rows]

    balanced = visited(RowOrder(length // block, devices, balanced=True))
    assert max(balanced) - min(balanced) <= 1
    plain = visited(RowOrder(length // block, devices, balanced=False))
    assert max(plain) > 6 * min(plain)


@pytest.mark.parametrize(
    ("mask", "balanced", "ways"),
    [
        (Causal(), False, (3, 0)),
        (Causal(), True, (3, 0)),
        (Segments(np.ones((1, 64), np.int32)), False, (3, 0)),
        # A run has 16 keys: a window of as many reaches the device before, one that looks ahead also the next.
        (Causal() & Window(16, 0), False, (1, 0)),
        (Causal() & Window(17, 0), False, (2, 0)),
        (Window(8, 8), False, (1, 1)),
        # Balanced runs have 8; neighbours in the row are neighbours on the ring, on both sides.
        (Causal() & Window(8, 0), True, (1, 1)),
        (Window(0, 0), True, (0, 0)),
    ],
)
def test_keys_travel_as_far_as_the_mask_reaches(mask, balanced, ways):
    order = RowOrder(64, 4, balanced)
    route = Route.ring("sequence", order, order, mask)
    assert (route.forward, route.backward) == ways


def test_rows_that_cannot_be_cut_evenly_are_one_sentence():
    on_four(balanced=True).check_row(24)
    on_four(balanced=False).check_row(20)
    on_four(balanced=True).check_row(0)  # no encoder
    with pytest.raises(ValueError, match="Rows of 20 tokens .* balanced order.* multiple of 8, or set .*balanced"):
        on_four(balanced=True).check_row(20)
    with pytest.raises(ValueError, match="Rows of 18 tokens cannot be split over 4 devices .* multiple of 4"):
        on_four(balanced=False).check_row(18)
    with pytest.raises(ValueError, match="'tree' is not a valid KeysMove"):
        SequenceParallel("tree")


def test_rows_that_do_not_divide_are_whole():
    """As prompts during training may be: nothing fails, and every device has all of them."""
    assert on_four().row_order(18) is None
    assert not on_four().row_order(20).balanced
    assert on_four().row_order(24) == RowOrder(24, 4, balanced=True)
