"""Every form of a mask equals its dense definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import masks, plans

TK, BATCH = 9, 2


def _dense(mask, tq=TK, tk=TK):
    return np.broadcast_to(np.asarray(mask.dense(tq, tk)), (BATCH, 1, tq, tk))[:, 0]


def _where(condition, tq=TK, tk=TK):
    """The mask whose entry (b, q, k) is condition(b, q, k), in plain Python."""
    return np.array([[[condition(b, q, k) for k in range(tk)] for q in range(tq)] for b in range(BATCH)])


@st.composite
def packed_ids(draw, length):
    lengths = draw(st.lists(st.integers(1, 4), max_size=5))
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length]
    return np.pad(ids, (0, length - len(ids))).astype(np.int32)


@st.composite
def interval_masks(draw):
    """(mask, the same in plain Python) for every mask of interval form."""
    kinds = [
        "full",
        "causal",
        "prefix",
        "prefix_rows",
        "window",
        "segments",
        "own_segments",
        "length",
        "chunk",
        "global",
    ]
    kind = draw(st.sampled_from(kinds))
    small = st.integers(0, TK + 1)
    per_row = st.lists(small, min_size=BATCH, max_size=BATCH).map(lambda x: np.array(x, np.int32))
    if kind == "full":
        return masks.Full(), lambda b, q, k: True
    if kind == "causal":
        offset = draw(st.one_of(st.integers(-3, 5), per_row))
        return masks.Causal(offset), lambda b, q, k: k <= q + np.broadcast_to(offset, BATCH)[b]
    if kind == "prefix":
        end = draw(st.one_of(small, per_row))
        return masks.PrefixLM(end), lambda b, q, k: k <= q or k < np.broadcast_to(end, BATCH)[b]
    if kind == "prefix_rows":
        ends = np.array(draw(st.lists(small, min_size=BATCH * TK, max_size=BATCH * TK)), np.int32).reshape(BATCH, TK)
        return masks.PrefixLM(ends), lambda b, q, k: k <= q or k < ends[b, q]
    if kind == "window":
        left, right = (draw(st.one_of(st.none(), st.integers(0, 5))), draw(st.one_of(st.none(), st.integers(0, 5))))
        return (
            masks.Window(left, right),
            lambda b, q, k: (left is None or k >= q - left) and (right is None or k <= q + right),
        )
    if kind == "segments":
        q_ids = np.stack([draw(packed_ids(TK)) for _ in range(BATCH)])
        kv_ids = np.stack([draw(packed_ids(TK)) for _ in range(BATCH)])
        return masks.Segments(q_ids, kv_ids), lambda b, q, k: q_ids[b, q] == kv_ids[b, k] != 0
    if kind == "own_segments":  # the keys' ids are the queries'; later keys belong to nobody
        ids = np.stack([draw(packed_ids(TK)) for _ in range(BATCH)])
        return masks.Segments(ids), lambda b, q, k: ids[b, q] == ids[b, k] != 0
    if kind == "global":
        count, start = draw(st.integers(0, 3)), draw(per_row)
        run = lambda b, x: start[b] <= x < start[b] + count  # noqa: E731
        return masks.GlobalTokens(count, start), lambda b, q, k: run(b, q) or run(b, k)
    if kind == "length":
        length = draw(per_row)
        return masks.KVLength(length), lambda b, q, k: k < length[b]
    size = draw(st.integers(1, 5))
    return masks.Chunked(size), lambda b, q, k: q // size == k // size


def _check_forms(mask, expected, tq=TK, tk=TK):
    """dense, its slices, rows and plans of `mask` against the array that it stands for."""
    np.testing.assert_array_equal(_dense(mask, tq, tk), expected)
    part = np.asarray(jax.jit(lambda start: mask.dense(3, tk, start))(2))
    np.testing.assert_array_equal(np.broadcast_to(part, (BATCH, 1, 3, tk))[:, 0], expected[:, 2:5])
    rows = mask.rows(tq, tk)
    assert rows.lo.shape[1] == mask.intervals
    np.testing.assert_array_equal(np.broadcast_to(rows.dense(tk), (BATCH, 1, tq, tk))[:, 0], expected)
    for block in [(4, 4), (2, 8)]:
        _check_plan(mask.plan(tq, tk, *block), expected[:, None])
    _check_parts(mask, rows, expected)


def _check_parts(mask, rows, expected):
    """Cut to some queries and some keys, the intervals are the mask of these; and nothing is visible beyond `reach`."""
    for (query, tq), (key, tk) in [((0, 3), (4, 3)), ((6, 3), (2, 5)), ((3, 2), (0, 2))]:
        found = rows.part(query, tq, key, tk)
        part, among = masks.Intervals(found.lo, found.hi), expected[:, query : query + tq, key : key + tk]
        np.testing.assert_array_equal(_dense(part, tq, tk), among)
        np.testing.assert_array_equal(found.any, among.any())
        part.check(BATCH, 1, tq, tk)
    distance = np.arange(expected.shape[2]) - np.arange(expected.shape[1])[:, None]
    left, right = mask.reach
    if left is not None:
        assert not expected[:, distance < -left].any()
    if right is not None:
        assert not expected[:, distance > right].any()


def _check_plan(plan, expected):
    """Skipped blocks have no True, full ones no False, every other one has both or reaches past the end."""
    (bq, bk), (batch, heads) = plan.block, expected.shape[:2]
    state = np.broadcast_to(plan.state, (batch, heads, *plan.state.shape[2:]))
    for b, h, i, j in np.ndindex(*state.shape):
        tile = expected[b, h, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
        whole = tile.all() and tile.shape == (bq, bk)
        assert state[b, h, i, j] == (plans.FULL if whole else plans.PARTIAL if tile.any() else plans.HIDDEN)
    for by_keys in (False, True):
        count, index = map(np.asarray, plan.lists(by_keys=by_keys))
        visited = np.asarray(plan.state != plans.HIDDEN)
        visited = visited.swapaxes(2, 3) if by_keys else visited
        for at in np.ndindex(*count.shape):
            blocks = np.flatnonzero(visited[at])
            np.testing.assert_array_equal(index[at][: count[at]], blocks)
            assert np.all(index[at][count[at] :] == (blocks[-1] if blocks.size else 0))


@settings(max_examples=30, deadline=None)
@given(st.lists(interval_masks(), min_size=1, max_size=3))
def test_and_of_intervals(parts):
    mask, conditions = parts[0][0], [condition for _, condition in parts]
    for other, _ in parts[1:]:
        mask = mask & other
    _check_forms(mask, _where(lambda b, q, k: all(condition(b, q, k) for condition in conditions)))


@settings(max_examples=30, deadline=None)
@given(interval_masks(), interval_masks(), interval_masks())
def test_or_of_intervals_and_a_third(first, second, third):
    either = first[0] | second[0]
    _check_forms(
        either & third[0], _where(lambda b, q, k: (first[1](b, q, k) or second[1](b, q, k)) and third[1](b, q, k))
    )


@pytest.mark.parametrize("tq, tk", [(3, 9), (9, 3)])
def test_more_queries_than_keys_and_fewer(tq, tk):
    mask = masks.Causal(2) & masks.Window(3, None)
    expected = _where(lambda b, q, k: k <= q + 2 and k >= q - 3, tq, tk)
    np.testing.assert_array_equal(_dense(mask, tq, tk), expected)
    np.testing.assert_array_equal(np.broadcast_to(mask.rows(tq, tk).dense(tk), (BATCH, 1, tq, tk))[:, 0], expected)
    _check_plan(mask.plan(tq, tk, 4, 2), expected[:, None])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), interval_masks())
def test_block_sparse(seed, other):
    """Lists that differ by example and head, alone and under intervals; a kernel's blocks may be smaller."""
    rng = np.random.default_rng(seed)
    visible = rng.random((BATCH, 3, 3, 3)) < 0.5
    mask = masks.BlockSparse.of_map(visible, (4, 4))
    expected = np.repeat(np.repeat(visible, 4, 2), 4, 3)[:, :, :TK, :TK]
    np.testing.assert_array_equal(mask.dense(TK, TK), expected)
    np.testing.assert_array_equal(jax.jit(lambda start: mask.dense(3, TK, start))(5), expected[:, :, 5:8])
    combined = mask & other[0]
    narrowed = expected & _where(other[1])[:, None]
    np.testing.assert_array_equal(combined.dense(TK, TK), narrowed)
    for block in [(4, 4), (2, 4)]:
        _check_plan(combined.plan(TK, TK, *block), narrowed)


def test_block_sparse_lists_may_be_in_any_order_and_are_cut_to_the_width():
    lists = masks.BlockSparse(np.array([[[[2, 0, 1]]]]), np.array([[[2]]]), (4, 2))
    np.testing.assert_array_equal(np.asarray(lists.dense(4, 6))[0, 0, 0], [1, 1, 0, 0, 1, 1])
    cut = masks.BlockSparse.of_map(np.ones((1, 1, 1, 3), bool), (4, 2), width=2)
    np.testing.assert_array_equal(np.asarray(cut.dense(4, 6))[0, 0, 0], [1, 1, 1, 1, 0, 0])


def test_prefix_zero_is_causal_bit_for_bit():
    for prefix in (0, np.zeros((BATCH,), np.int32), np.zeros((BATCH, TK), np.int32)):
        np.testing.assert_array_equal(_dense(masks.PrefixLM(prefix)), _dense(masks.Causal()))


def test_full_is_the_neutral_element_and_and_is_flat():
    causal, window = masks.Causal(), masks.Window(2, 0)
    assert (masks.Full() & causal) is causal
    assert isinstance(masks.Full() & masks.Full(), masks.Full)
    chunked = masks.Chunked(2)
    assert (causal & (window & chunked)).masks == (causal, window, chunked)


def test_a_mask_without_interval_form_has_no_rows():
    anything = masks.Dense(np.eye(TK, TK, dtype=bool)[None, None])
    assert (masks.Causal() & anything).rows(TK, TK) is None
    np.testing.assert_array_equal(_dense(masks.Causal() & anything)[0], np.eye(TK, TK, dtype=bool))


def test_masks_pass_through_jit_and_vmap():
    ids = jnp.array([[1, 1, 2, 2, 0]] * BATCH)
    mask = masks.PrefixLM(jnp.array([1, 3])) & masks.Segments(ids) & masks.Window(2, None)
    traced = jax.jit(lambda m: m.dense(5, 5))(mask)
    np.testing.assert_array_equal(traced, mask.dense(5, 5))
    singles = jax.vmap(lambda m: masks.Segments(m[None]).dense(5, 5)[0])(ids)
    np.testing.assert_array_equal(singles, masks.Segments(ids).dense(5, 5))


def test_masks_combine_with_masks_only():
    with pytest.raises(TypeError):
        masks.Causal() & True
    with pytest.raises(TypeError):
        masks.Causal() | True


LONGFORMER = masks.Window(1, 1) | masks.GlobalTokens(1)
DENSE = masks.Dense(np.eye(TK, dtype=bool)[None, None])
BLOCKS = masks.BlockSparse.of_map(np.ones((1, 1, 3, 3), bool), (4, 4))


@pytest.mark.parametrize(
    "combine, message",
    [
        (lambda: LONGFORMER & LONGFORMER, r"\(Window \| GlobalTokens\) & .* more than two key intervals .* Dense"),
        (lambda: LONGFORMER | masks.Causal(), "only masks of one interval each can be joined"),
        (lambda: DENSE | masks.Causal(), "Dense \\| Causal has no form of one or two key intervals"),
        (lambda: BLOCKS | masks.Causal(), "BlockSparse \\| Causal has no form"),
        (lambda: BLOCKS & BLOCKS, "make one BlockSparse"),
        (lambda: (DENSE & masks.Causal()).plan(TK, TK, 4, 4), "Dense & Causal has no block plan"),
    ],
)
def test_combinations_without_normal_form(combine, message):
    with pytest.raises(TypeError, match=message):
        combine()


def test_full_absorbs_under_or():
    assert isinstance(masks.Causal() | masks.Full(), masks.Full)


@pytest.mark.parametrize(
    "mask, message",
    [
        (masks.Segments(np.ones((BATCH, 5))), r"Segments.q_ids must have the shape \[2, 9\] .* got \[2, 5\]"),
        (masks.Segments(np.ones((BATCH, TK)), np.ones((BATCH, 4))), r"Segments.kv_ids must have the shape \[2, 9\]"),
        (masks.Causal() & masks.PrefixLM(np.ones(3)), r"PrefixLM.prefix_end must .* \[\] or \[2\] or \[2, 9\]"),
        (masks.KVLength(np.ones((2, 1))), r"KVLength.length must"),
        (masks.Dense(np.ones((9, 9), bool)), r"Dense.mask must be broadcastable to .* \[2, 4, 9, 9\], got \[9, 9\]"),
        (masks.BlockSparse(np.ones((2, 3, 3, 1)), np.ones((2, 3, 3)), (4, 4)), "BlockSparse.count must"),
    ],
)
def test_arrays_of_the_wrong_shape_are_named(mask, message):
    with pytest.raises(ValueError, match=message):
        mask.check(BATCH, 4, TK, TK)


def test_segments_out_of_order():
    ids = np.array([[1, 1, 2, 2], [2, 2, 1, 0]])
    with pytest.raises(ValueError, match=r"ids of row 1 do not increase .* \[2 2 1 0\].* contiguous=False"):
        masks.Segments(ids).rows(4, 4)
    apart = masks.Segments(ids, contiguous=False)
    assert apart.intervals is None and apart.rows(4, 4) is None
    np.testing.assert_array_equal(np.asarray(apart.dense(4, 4))[1, 0, 0], [1, 1, 0, 0])


def test_blocks_that_do_not_divide_the_lists_blocks():
    with pytest.raises(ValueError, match=r"block=\(4, 4\) must be multiples of the kernel's blocks \(3, 4\)"):
        BLOCKS.plan(TK, TK, 3, 4)


def test_reach_is_what_is_known_beforehand():
    ids = masks.Segments(np.ones((BATCH, TK), np.int32))
    assert (masks.Causal() & ids).reach == (None, 0)
    assert (masks.Causal() & masks.Window(5, 2) & ids).reach == (5, 0)
    assert (masks.Window(1, 4) | masks.Chunked(3)).reach == (2, 4)
    assert (masks.Window(1, 4) | masks.GlobalTokens(1)).reach == (None, None)
    assert masks.Causal(np.zeros(BATCH, np.int32)).reach == masks.Full().reach == (None, None)


def test_near_intervals_are_a_window_by_positions():
    """A text in two runs of columns among others; each query sees both, up to itself."""
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 4, 5, 6]])
    columns = np.array([0, 1, 2, 3, 7, 8, 9])  # of the text
    lo, hi = np.zeros((2, 1, 2, 10), np.int32)
    hi[0, 0, :4], hi[0, 0, 7:] = range(1, 5), 4
    lo[0, 1, 7:], hi[0, 1, 7:] = 7, range(8, 11)
    near = _dense(masks.Intervals(lo, hi).near(2, 1, positions), 10, 10)[0]
    expected = np.zeros((10, 10), bool)
    expected[np.ix_(columns, columns)] = _dense(masks.Causal() & masks.Window(2, 1), 7, 7)[0]
    np.testing.assert_array_equal(near, expected)
    both = masks.Intervals(np.zeros((1, 1, 10), np.int32), np.full((1, 1, 10), 4, np.int32)).near(2, 1, positions)
    offsets = np.arange(4) - positions[0][:, None]
    np.testing.assert_array_equal(_dense(both, 10, 10)[0, :, :4], (offsets >= -2) & (offsets <= 1))


def test_intervals_name_arrays_that_do_not_fit():
    bounds = np.zeros((BATCH, 1, TK), np.int32)
    with pytest.raises(ValueError, match=r"Intervals.lo must have the shape"):
        masks.Intervals(bounds, bounds).check(BATCH, 1, TK + 1, TK)
    with pytest.raises(ValueError, match=r"Intervals.hi must have the shape"):
        masks.Intervals(bounds, bounds[:1]).check(BATCH, 1, TK, TK)
