"""Linear attention on TPU: head after head of row after row, its state in VMEM from the first chunk to the last.

Three kernels: forward; the states between chunks, which the backward pass needs again; backward, from the last chunk
to the first. A grid step takes several chunks of one head, so that they share its cost. Heads lie side by side along
lanes, [B, T, H * D] with D a multiple of 128 (zeros are added where it is not): a head is then a block of columns, and
nothing is transposed but decays of [B, T, H].
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear_chunk, platforms
from pallas_kernels.tpu import costs

_LANES = 128
_GRID_STEP = 512  # time steps of a grid step, at most

# q, k, v, log_decay, state, as in pallas_kernels.linear_attention.Inputs.
_Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def refuses(inputs: _Inputs) -> list[str]:
    """Reasons why the kernel cannot serve these inputs; empty if it can."""
    q, _, v, *_ = inputs
    reasons = []
    if platforms.current().kind == "gpu":
        reasons.append("it runs on TPUs, and the platform is gpu")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        reasons.append(f"it takes float32 and bfloat16, not {q.dtype}")
    if max(q.shape[-1], v.shape[-1]) > 256:
        reasons.append(f"head sizes end at 256, got Dk {q.shape[-1]} and Dv {v.shape[-1]}")
    return reasons


def forward(inputs: _Inputs, *, scale: float, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(o, final state) of `inputs`, whose T is a multiple of `chunk`."""
    q, k, v, log_decay, state = inputs
    layout = _Layout.of(q, v, chunk)
    o, final = _run(
        functools.partial(_forward_kernel, chunk=chunk, scale=scale),
        layout,
        (1, 1, 2),
        [layout.steps(q), layout.steps(k), layout.steps(v), layout.decays(log_decay), layout.state(state)],
        [layout.steps(v), layout.state(state)],
    )
    return layout.heads_apart(o, v.shape[-1]), layout.cut_state(final, state)


def backward(inputs: _Inputs, do: jax.Array, d_final: jax.Array, *, scale: float, chunk: int) -> _Inputs:
    """Gradients of `inputs` from those of the results of `forward`."""
    q, k, v, log_decay, state = inputs
    layout = _Layout.of(q, v, chunk)
    k_, v_, decays_, state_ = layout.steps(k), layout.steps(v), layout.decays(log_decay), layout.state(state)
    empty_states = jax.ShapeDtypeStruct((*state.shape[:2], q.shape[1] // chunk, *state_.array.shape[2:]), jnp.float32)
    states, _ = _run(
        functools.partial(_states_kernel, chunk=chunk),
        layout,
        (0, 0, 1),
        [k_, v_, decays_, state_],
        [layout.states(empty_states), state_],
    )
    layout = dataclasses.replace(layout, reverse=True)
    q_, k_, v_, decays_ = layout.steps(q), layout.steps(k), layout.steps(v), layout.decays(log_decay)
    dq, dk, dv, d_log_decay, d_state = _run(
        functools.partial(_backward_kernel, chunk=chunk, scale=scale),
        layout,
        (3, 2, 4),
        [q_, k_, v_, decays_, layout.states(states), layout.steps(do), layout.state(d_final)],
        [q_, k_, v_, decays_, state_],
    )
    dq, dk = layout.heads_apart(dq, q.shape[-1]), layout.heads_apart(dk, k.shape[-1])
    dv = layout.heads_apart(dv, v.shape[-1])
    return dq, dk, dv, layout.decays_apart(d_log_decay, log_decay), layout.cut_state(d_state, state)


def _forward_kernel(q, k, v, log_decay, initial, o, state, *, chunk: int, scale: float):
    _start_from(initial, state)

    def step(i, rows):
        decay = log_decay[_decay_rows(log_decay, i, rows, q.shape[0]), :]
        result, state[...] = linear_chunk.forward(q[rows, :], k[rows, :], v[rows, :], decay, state[...], scale)
        o[rows, :] = result.astype(o.dtype)

    _for_chunks(q.shape[0], chunk, log_decay, step)


def _states_kernel(k, v, log_decay, initial, states, state, *, chunk: int):
    _start_from(initial, state)

    def step(i, rows):
        states[i] = state[...]
        decay = log_decay[_decay_rows(log_decay, i, rows, k.shape[0]), :]
        state[...] = linear_chunk.next_state(k[rows, :], v[rows, :], decay, state[...])

    _for_chunks(k.shape[0], chunk, log_decay, step)


def _backward_kernel(
    q, k, v, log_decay, states, do, d_final, dq, dk, dv, d_log_decay, d_state, *, chunk: int, scale: float
):
    _start_from(d_final, d_state)

    def step(i, rows):
        decay = log_decay[_decay_rows(log_decay, i, rows, q.shape[0]), :]
        here = (q[rows, :], k[rows, :], v[rows, :], decay, states[i], do[rows, :])
        *gradients, by_decay, d_state[...] = linear_chunk.backward(*here, d_state[...], scale)
        for ref, gradient in zip((dq, dk, dv), gradients):
            ref[rows, :] = gradient.astype(ref.dtype)
        d_log_decay[_decay_rows(log_decay, i, rows, q.shape[0]), :] = by_decay

    _for_chunks(q.shape[0], chunk, log_decay, step, reverse=True)


def _start_from(initial, state) -> None:
    """The state is an output block that the whole sequence shares; it begins as `initial`."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial[...]


def _for_chunks(length: int, chunk: int, log_decay, step: Callable, reverse: bool = False) -> None:
    """Calls step(number of the chunk, its rows) for all chunks of a block.

    Unrolled, so that what does not wait for the state overlaps with what does; but not with decays by channel, where
    one chunk is work and code enough.
    """
    count = length // chunk

    def at(i):
        i = count - 1 - i if reverse else i
        step(i, pl.ds(pl.multiple_of(i * chunk, chunk), chunk))

    jax.lax.fori_loop(0, count, lambda i, _: at(i), None, unroll=not _by_channel(log_decay, length))


def _by_channel(log_decay, length: int) -> bool:
    """Whether a block of log decays has one row a step; else it has one row a chunk."""
    return log_decay.shape[0] == length


def _decay_rows(log_decay, i: jax.Array, rows: pl.Slice, length: int) -> pl.Slice:
    """Where a block of log decays has those of chunk i, whose steps are `rows`."""
    return rows if _by_channel(log_decay, length) else pl.ds(i, 1)


@dataclasses.dataclass(frozen=True)
class _Blocked:
    """An array as the kernels see it, and how it is cut for the grid [B, H, grid steps]."""

    array: jax.Array | jax.ShapeDtypeStruct
    spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where things lie.

    Attributes:
      grid: rows, heads, grid steps along time.
      chunks: of one grid step.
      chunk: steps of a chunk.
      reverse: grid steps run from the end of time.
    """

    grid: tuple[int, int, int]
    chunks: int
    chunk: int
    reverse: bool = False

    @staticmethod
    def of(q: jax.Array, v: jax.Array, chunk: int) -> "_Layout":
        batch, length, heads, _ = q.shape
        count = length // chunk
        chunks = max(n for n in range(1, max(1, _GRID_STEP // chunk) + 1) if count % n == 0)
        return _Layout((batch, heads, count // chunks), chunks, chunk)

    def steps(self, x: jax.Array) -> _Blocked:
        """[B, T, H, D]: a head is a block of columns."""
        x = _up_to_lanes(x, 3)
        batch, length, heads, size = x.shape
        spec = pl.BlockSpec((None, self.chunks * self.chunk, size), lambda b, h, t: (b, self._at(t), h))
        return _Blocked(x.reshape(batch, length, heads * size), spec)

    def decays(self, x: jax.Array) -> _Blocked:
        """[B, T, H, Dk] as the keys; [B, T, H] as [B, H, grid steps, chunks, chunk]."""
        if x.ndim == 4:  # channels that are not there forget whenever the others do
            return self.steps(_up_to_lanes(x, 3, -jnp.inf))
        batch, heads, count = self.grid
        spec = pl.BlockSpec((None, None, None, self.chunks, self.chunk), lambda b, h, t: (b, h, self._at(t), 0, 0))
        return _Blocked(x.transpose(0, 2, 1).reshape(batch, heads, count, self.chunks, self.chunk), spec)

    def state(self, x: jax.Array) -> _Blocked:
        """[B, H, Dv, Dk], one block for all of time."""
        x = _up_to_lanes(_up_to_lanes(x, 2), 3)
        return _Blocked(x, pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, t: (b, h, 0, 0)))

    def states(self, x: jax.Array | jax.ShapeDtypeStruct) -> _Blocked:
        """[B, H, T / chunk, Dv, Dk], sizes already whole lanes."""
        spec = pl.BlockSpec((None, None, self.chunks, *x.shape[3:]), lambda b, h, t: (b, h, self._at(t), 0, 0))
        return _Blocked(x, spec)

    def heads_apart(self, x: jax.Array, size: int) -> jax.Array:
        """The reverse of `steps`."""
        return x.reshape(*x.shape[:2], self.grid[1], -1)[..., :size]

    def decays_apart(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """The reverse of `decays`."""
        if like.ndim == 4:
            return self.heads_apart(x, like.shape[-1])
        return x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)

    def cut_state(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """The reverse of `state`."""
        return x[:, :, : like.shape[2], : like.shape[3]]

    def _at(self, t: jax.Array) -> jax.Array:
        return self.grid[2] - 1 - t if self.reverse else t


def _up_to_lanes(x: jax.Array, axis: int, value: float = 0.0) -> jax.Array:
    missing = -x.shape[axis] % _LANES
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


def _run(
    kernel: Callable,
    layout: _Layout,
    products: tuple[int, int, int],
    operands: list[_Blocked],
    results: list[_Blocked],
) -> list[jax.Array]:
    """Runs `kernel`, which takes a reference for each operand and each result, of which the last is a state.

    `products` are the matrix products of a chunk, for its declared cost: of scores with Dk, of scores with Dv, and of
    states.
    """
    v_size, size = results[-1].array.shape[2:]
    with_keys, with_values, with_states = products
    steps = math.prod(layout.grid) * layout.chunks * layout.chunk
    of_step = layout.chunk * (with_keys * size + with_values * v_size) + with_states * size * v_size
    moved = [x.array for x in (*operands, *results)]
    return pl.pallas_call(
        kernel,
        grid=layout.grid,
        in_specs=[x.spec for x in operands],
        out_specs=[x.spec for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.array.shape, x.array.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        cost_estimate=costs.estimate(2 * steps * of_step, steps * layout.chunk, (moved, 1)),
        interpret=platforms.tpu_interpret(),
        name="linear_attention" + kernel.func.__name__.removesuffix("_kernel"),
    )(*(x.array for x in operands))
