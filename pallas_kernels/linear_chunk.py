"""One chunk of linear attention, forward and backward, as plain arithmetic on matrices.

This is all the mathematics of `linear_attention`: its XLA form maps and scans these functions, its TPU kernel calls
them with the state in VMEM. For one head and C consecutive steps, b being the running sum of log decays in the chunk:

    o_i = scale * (q_i exp(b_i) S + sum over j <= i of (q_i . k_j exp(b_i - b_j)) v_j)
    S'  = diag(exp(b_C)) S + sum over j of (k_j exp(b_C - b_j)) v_j^T

(GLA, arXiv 2312.06635, section 4; with one decay for all channels, SSD, arXiv 2405.21060, section 6.) Every exponent is
a sum of log decays over later steps, so that no exponential overflows. Where each channel has its decay, a product of
matrices needs factors exp(b_i - e) and exp(e - b_j): as in GLA, e is the sum up to the start of i's sub-chunk, which
lies between the two, and the pairs inside a sub-chunk are taken one by one.

States are kept transposed, [Dv, Dk], so that decays of key channels lie along lanes. Products are taken in the type of
the inputs and added up in float32; with float32 inputs at full precision.
"""

import dataclasses

import jax
import jax.numpy as jnp

SUB_CHUNK = 16  # steps inside which the pairs of a decay by channel are taken one by one; a chunk is a multiple of it

# A log decay under this is a decay of 0: exp(-110) is 0 in float32. The state is forgotten exactly.
FORGET = -110.0


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Running sums of log decays, kept in two parts.

    In one float32 a decay near 0 (log -69) would eat the digits of the mild ones that follow it, and differences of the
    sums would be wrong. The whole parts add up exactly, and the rest stays small.
    """

    whole: jax.Array
    rest: jax.Array

    def __getitem__(self, index: tuple[slice, ...]) -> "_Sums":
        return _Sums(self.whole[index], self.rest[index])

    def minus(self, other: "_Sums") -> jax.Array:
        return (self.whole - other.whole) + (self.rest - other.rest)

    def total(self) -> jax.Array:
        return self.whole + self.rest


@dataclasses.dataclass(frozen=True)
class _Decays:
    """What the decays of a chunk do. One for all channels: N is 1; by channel: N is Dk.

    Attributes:
      sums: b, [C, N].
      into: exp(b_i), [C, N]: what is left at step i of the incoming state.
      out: exp(b_C - b_j), [C, N]: what is left at the chunk's end of what step j wrote.
      across: exp(b_C), [1, N].
      between: exp(b_i - b_j) where j <= i, else 0, [C, C]; None where decays are by channel.
    """

    sums: _Sums
    into: jax.Array
    out: jax.Array
    across: jax.Array
    between: jax.Array | None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """(o [C, Dv] float32, the state after the chunk).

    Args:
      q: [C, Dk].
      k: [C, Dk].
      v: [C, Dv].
      log_decay: [1, C] (one for all channels) or [C, Dk], float32; -inf forgets the state.
      state: [Dv, Dk] float32, before the chunk.
      scale: multiplies o.
    """
    decays = _decays(log_decay, q.shape[0])
    o = _dot(_scores(q, k, decays), v, v.dtype)
    o += _dot_nt(_times(q, decays.into), state, q.dtype)
    return scale * o, _next_state(k, v, decays, state)


def next_state(k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array) -> jax.Array:
    """The state after the chunk, as in `forward`."""
    return _next_state(k, v, _decays(log_decay, k.shape[0]), state)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    do: jax.Array,
    d_next: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv, d log_decay, d state), all float32, of the arguments of `forward`.

    Args:
      q: as in `forward`, like all that follow up to `state`.
      k: [C, Dk].
      v: [C, Dv].
      log_decay: [1, C] or [C, Dk].
      state: [Dv, Dk], before the chunk.
      do: [C, Dv], gradient of o.
      d_next: [Dv, Dk] float32, gradient of the state after the chunk.
      scale: as in `forward`.
    """
    decays = _decays(log_decay, q.shape[0])
    do = (scale * do.astype(jnp.float32)).astype(v.dtype)
    q_into, k_out = _times(q, decays.into), _times(k, decays.out)
    dv = _dot_tn(_scores(q, k, decays), do, v.dtype) + _dot_nt(k_out, d_next, v.dtype)
    dq_inside, dk_inside, d_sums = _scores_backward(q, k, decays, _dot_nt(do, v, v.dtype))
    dq_state = decays.into * _dot(do, state, v.dtype)
    dk_state = decays.out * _dot(v, d_next, v.dtype)
    kept = decays.across * d_next
    written = k * dk_state
    # exp(b_C) multiplies the state, and every write beside exp(-b_j).
    d_last = jnp.sum(state * kept, axis=0, keepdims=True) + jnp.sum(written, axis=0, keepdims=True)
    d_log_decay = _decay_gradient(log_decay, d_sums + (q * dq_state - written), d_last)
    d_state = kept + _dot_tn(do, q_into, q.dtype)
    return dq_inside + dq_state, dk_inside + dk_state, dv, d_log_decay, d_state


def _decays(log_decay: jax.Array, size: int) -> _Decays:
    log_decay = jnp.maximum(log_decay, FORGET)
    whole = jnp.round(log_decay)
    rest = log_decay - whole
    if log_decay.shape[0] == size:
        lower = _causal(size).astype(jnp.float32)
        # Whole parts are below 2^8, exact in bfloat16, and add up exactly.
        sums = _Sums(_dot(lower, whole, jnp.bfloat16), _dot(lower, rest, jnp.float32))
        between = None
    else:
        columns = [_running_column(part) for part in (whole, rest)]
        rows = [_running_row(part) for part in (whole, rest)]
        sums, across_rows = _Sums(*columns), _Sums(*rows)
        between = jnp.where(_causal(size), jnp.exp(jnp.where(_causal(size), sums.minus(across_rows), 0.0)), 0.0)
    last = sums[size - 1 :, :]
    return _Decays(sums, jnp.exp(sums.total()), jnp.exp(last.minus(sums)), jnp.exp(last.total()), between)


def _running_column(row: jax.Array) -> jax.Array:
    """[1, C] -> its running sum as a column, [C, 1]."""
    return jnp.sum(jnp.where(_causal(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def _running_row(row: jax.Array) -> jax.Array:
    """[1, C] -> its running sum as a row, [1, C]."""
    size = row.shape[1]
    column = jnp.sum(jnp.where(_index(size, 0) == _index(size, 1), row, 0.0), axis=1, keepdims=True)
    return jnp.sum(jnp.where(_index(size, 0) <= _index(size, 1), column, 0.0), axis=0, keepdims=True)


def _decay_gradient(log_decay: jax.Array, d_sums: jax.Array, d_last: jax.Array) -> jax.Array:
    """Gradient of log decays from that of their running sums, [C, Dk], and of the last sum alone, [1, Dk].

    A log decay is part of all later sums. Those beyond a step that forgets everything would cancel, but for rounding:
    they are left out, so that the segments of a packed row do not touch.
    """
    size = d_sums.shape[0]
    column, row = _times_forgotten(log_decay, size)
    if log_decay.shape[0] == size:
        reached = ((_index(size, 0) <= _index(size, 1)) & (column == row)).astype(jnp.float32)
        gradient = _dot(reached, d_sums, jnp.float32) + jnp.where(column == row[:, size - 1 :], d_last, 0.0)
    else:
        summed = jnp.where(_causal(size) & (column == row), jnp.sum(d_sums, axis=1, keepdims=True), 0.0)
        gradient = jnp.sum(summed, axis=0, keepdims=True)
        gradient += jnp.where(row == row[:, size - 1 :], jnp.sum(d_last, axis=1, keepdims=True), 0.0)
    return jnp.where(log_decay > FORGET, gradient, 0.0)


def _times_forgotten(log_decay: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """How often all channels were forgotten up to each step, as a column [C, 1] and as a row [1, C]."""
    if log_decay.shape[0] == size:
        column = (jnp.max(log_decay, axis=1, keepdims=True) <= FORGET).astype(jnp.float32)
        row = jnp.sum(jnp.where(_index(size, 0) == _index(size, 1), column, 0.0), axis=0, keepdims=True)
    else:
        row = (log_decay <= FORGET).astype(jnp.float32)
    return _running_column(row), _running_row(row)


def _next_state(k: jax.Array, v: jax.Array, decays: _Decays, state: jax.Array) -> jax.Array:
    return decays.across * state + _dot_tn(v, _times(k, decays.out), v.dtype)


def _scores(q: jax.Array, k: jax.Array, decays: _Decays) -> jax.Array:
    """(q_i . k_j exp(b_i - b_j)) where j <= i, else 0; [C, C] float32."""
    size = q.shape[0]
    if decays.between is not None:
        return _dot_nt(q, k, q.dtype) * decays.between
    earlier = [_dot_nt(q_near, k_near, q.dtype) for q_near, k_near, *_ in _sub_chunks(q, k, decays)]
    scores = jnp.concatenate(earlier, axis=0).reshape(_diagonal_shape(size, size))
    q3, k3 = _blocked(q.astype(jnp.float32)), _blocked(k.astype(jnp.float32))
    for j in range(SUB_CHUNK):
        column = jnp.sum(q3 * k3[:, j : j + 1] * _decay_since(decays.sums, j), axis=2, keepdims=True)
        scores = jnp.where(_is_column(j, scores.shape), column, scores)
    return scores.reshape(size, size)


def _scores_backward(
    q: jax.Array, k: jax.Array, decays: _Decays, d_scores: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, d b): of the queries, keys and running sums that `_scores` was made from; each [C, Dk] float32."""
    if decays.between is not None:
        d_products = d_scores * decays.between
        dq, dk = _dot(d_products, k, q.dtype), _dot_tn(d_products, q, q.dtype)
        return dq, dk, q * dq - k * dk
    dqs, d_sums, dk, d_sums_of_keys = [], [], 0.0, 0.0
    for start, (q_near, k_near, q_factor, k_factor) in zip(range(0, q.shape[0], SUB_CHUNK), _sub_chunks(q, k, decays)):
        d_rows = d_scores[start : start + SUB_CHUNK]
        dq_near, dk_near = _dot(d_rows, k_near, q.dtype), _dot_tn(d_rows, q_near, q.dtype)
        dqs.append(dq_near * q_factor)
        dk += dk_near * k_factor
        # From the rounded factors, so that what a pair adds for i it takes away for j to the last digit.
        d_sums.append(q_near * dq_near)
        d_sums_of_keys += k_near * dk_near
    dq_diagonal, dk_diagonal = _diagonal_backward(q, k, decays.sums, d_scores)
    d_diagonal = q * dq_diagonal - k * dk_diagonal
    return (
        jnp.concatenate(dqs, axis=0) + dq_diagonal,
        dk + dk_diagonal,
        jnp.concatenate(d_sums, axis=0) - d_sums_of_keys + d_diagonal,
    )


def _diagonal_backward(q: jax.Array, k: jax.Array, sums: _Sums, d_scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dq, dk) of the pairs inside a sub-chunk."""
    size = q.shape[0]
    q3, k3 = _blocked(q.astype(jnp.float32)), _blocked(k.astype(jnp.float32))
    d3 = d_scores.reshape(_diagonal_shape(size, size))
    row = jax.lax.broadcasted_iota(jnp.int32, k3.shape, 1)
    dq, dk = jnp.zeros(q3.shape, jnp.float32), jnp.zeros(k3.shape, jnp.float32)
    for j in range(SUB_CHUNK):
        column = jnp.sum(jnp.where(_is_column(j, d3.shape), d3, 0.0), axis=2, keepdims=True)
        weighted = column * _decay_since(sums, j)
        dq += weighted * k3[:, j : j + 1]
        dk = jnp.where(row == j, jnp.sum(weighted * q3, axis=1, keepdims=True), dk)
    return dq.reshape(q.shape), dk.reshape(k.shape)


def _sub_chunks(q: jax.Array, k: jax.Array, decays: _Decays):
    """For each sub-chunk: its queries decayed from its start, earlier keys decayed up to it, and the two factors."""
    sums, size = decays.sums, q.shape[0]
    step = jax.lax.broadcasted_iota(jnp.int32, k.shape, 0)
    for start in range(0, size, SUB_CHUNK):
        rows = slice(start, start + SUB_CHUNK)
        here = sums[rows, :]
        if start == 0:  # nothing is earlier
            q_factor, k_factor = jnp.exp(here.total()), jnp.zeros(k.shape, jnp.float32)
        else:
            edge = sums[start - 1 : start, :]
            q_factor = jnp.exp(here.minus(edge))
            k_factor = jnp.where(step < start, jnp.exp(jnp.where(step < start, edge.minus(sums), 0.0)), 0.0)
        yield _times(q[rows], q_factor), _times(k, k_factor), q_factor, k_factor


def _decay_since(sums: _Sums, j: int) -> jax.Array:
    """exp(b_i - b_j) from step j of each sub-chunk, 0 for i < j; [C / SUB_CHUNK, SUB_CHUNK, Dk]."""
    blocked = _Sums(_blocked(sums.whole), _blocked(sums.rest))
    difference = blocked.minus(blocked[:, j : j + 1])
    later = jax.lax.broadcasted_iota(jnp.int32, difference.shape, 1) >= j
    return jnp.where(later, jnp.exp(jnp.where(later, difference, 0.0)), 0.0)


def _blocked(x: jax.Array) -> jax.Array:
    """[C, N] -> [C / SUB_CHUNK, SUB_CHUNK, N]."""
    return x.reshape(_diagonal_shape(*x.shape))


def _diagonal_shape(rows: int, columns: int) -> tuple[int, int, int]:
    return rows // SUB_CHUNK, SUB_CHUNK, columns


def _is_column(j: int, shape: tuple[int, ...]) -> jax.Array:
    """Where a blocked [C / SUB_CHUNK, SUB_CHUNK, C] matrix has column j of its block's own sub-chunk."""
    block, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 2))
    return lane == block * SUB_CHUNK + j


def _times(x: jax.Array, factor: jax.Array) -> jax.Array:
    return (x * factor).astype(x.dtype)


def _index(size: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)


def _causal(size: int) -> jax.Array:
    return _index(size, 0) >= _index(size, 1)


def _dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _contract(a, b, 1, 0, dtype)


def _dot_nt(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _contract(a, b, 1, 1, dtype)


def _dot_tn(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _contract(a, b, 0, 0, dtype)


def _contract(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, dtype: jnp.dtype) -> jax.Array:
    """Product over one axis of each matrix, taken in `dtype` and added up in float32."""
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((axis_a,), (axis_b,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
