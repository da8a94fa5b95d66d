"""The selective scan on TPU: state entries along sublanes, channels along lanes, time step by step.

There is nothing for the matrix unit here. A grid step takes a chunk of time for a block of channels, whose state [N, C]
is an output block that stays in VMEM; chunks follow each other. B and C come transposed, [N, T], so that a step's N
numbers lie along sublanes as the state's do: a step takes one lane of them, and after each group of steps they are
rotated.

The forward kernel also writes the states between chunks. The backward kernel computes a chunk's states
again into scratch memory, then goes through its steps from the last to the first.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms
from pallas_kernels.tpu import costs

_CHUNK = 128  # steps of a grid step: as many as a vector has lanes
_GROUP = 16  # steps of one turn of a kernel's loop: as many rows as a tile of bfloat16 has
_CHANNELS = (512, 256, 128)  # of a grid step: the more, the better the waits of one step are filled
_LANES = 128


def refuses(x: jax.Array, a: jax.Array) -> list[str]:
    """Reasons why the kernel cannot serve x [B, T, C] and a [N, C]; empty if it can."""
    reasons = []
    if platforms.current().kind == "gpu":
        reasons.append("it runs on TPUs, and the platform is gpu")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        reasons.append(f"it takes float32 and bfloat16, not {x.dtype}")
    if a.shape[0] % 8 or a.shape[0] > 64:
        reasons.append(f"N must be a multiple of 8 up to 64, got {a.shape[0]}")
    return reasons


def scan(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    restart: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(y, final state); arguments as in `selective_scan.Inputs`."""
    length, channels = x.shape[1:]
    # Steps of size 0 after the end change no state; channels that are not there stay 0.
    x, dt, b, c, restart = (_whole_chunks(z) for z in (x, dt, b, c, restart[:, :, None]))
    x, dt, a, d, state = (_whole_lanes(z) for z in (x, dt, a, d[None], state))
    b, c, restart = (_transposed(z.astype(jnp.float32)) for z in (b, c, restart))
    y, final = _scan(x, dt, a, b, c, d, restart, state)
    return y[:, :length, :channels], final[:, :, :channels]


@jax.custom_vjp
def _scan(x, dt, a, b, c, d, restart, state):
    """As `scan`: T is whole chunks, C whole lanes; b, c [B, T / chunk, N, chunk], restart [B, T / chunk, 1, chunk]."""
    y, final, _ = _forward(x, dt, a, b, c, d, restart, state)
    return y, final


def _scan_forward(*inputs):
    y, final, states = _forward(*inputs)
    return (y, final), (inputs, states)


def _scan_backward(saved, gradients):
    (x, dt, a, b, c, d, restart, _), states = saved
    dy, d_final = gradients
    layout = _Layout(x, a, reverse=True)
    batch, blocks, chunks = layout.grid
    entries = a.shape[0]
    # B and C are shared by all channels: each block of channels gives its part of their gradients.
    part = jax.ShapeDtypeStruct((batch, blocks, chunks, entries, _CHUNK), jnp.float32)
    partial_spec = pl.BlockSpec((None, None, None, entries, _CHUNK), lambda b, i, t: (b, i, layout.at(t), 0, 0))
    dx, d_dt, da, db, dc, d_state = pl.pallas_call(
        _backward_kernel,
        grid=layout.grid,
        in_specs=[layout.steps, layout.steps, layout.per_channel(entries), layout.lanes(entries), layout.lanes(entries)]
        + [layout.per_channel(1), layout.lanes(1), layout.states, layout.steps, layout.state],
        out_specs=[layout.steps, layout.steps, layout.state, partial_spec, partial_spec, layout.state],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(dt.shape, dt.dtype),
            jax.ShapeDtypeStruct((batch, *a.shape), jnp.float32),
            part,
            part,
            jax.ShapeDtypeStruct((batch, *a.shape), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((_CHUNK + 1, entries, layout.channels), jnp.float32)],
        compiler_params=layout.params,
        # A state's entry in a step: its decay, forwards again, and the derivatives of what it is made of and gives.
        cost_estimate=costs.estimate(20 * x.size * entries, x.size * entries, ([x, dt, dy, x, dt, states], 1)),
        interpret=platforms.tpu_interpret(),
        name="selective_scan_backward",
    )(x, dt, a, b, c, d, restart, states, dy, d_final)
    dd = jnp.einsum("btc,btc->c", dy, x, preferred_element_type=jnp.float32, precision="highest")[None]
    return dx, d_dt, jnp.sum(da, axis=0), jnp.sum(db, axis=1), jnp.sum(dc, axis=1), dd, None, d_state


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(x, dt, a, b, c, d, restart, state):
    """(y, final state, the state before each chunk)."""
    layout = _Layout(x, a, reverse=False)
    entries = a.shape[0]
    batch, _, chunks = layout.grid
    return pl.pallas_call(
        _forward_kernel,
        grid=layout.grid,
        in_specs=[layout.steps, layout.steps, layout.per_channel(entries), layout.lanes(entries), layout.lanes(entries)]
        + [layout.per_channel(1), layout.lanes(1), layout.state],
        out_specs=[layout.steps, layout.state, layout.states],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, chunks, *a.shape), jnp.float32),
        ],
        compiler_params=layout.params,
        # h = exp(dt a) h + dt b x and y += c h, for each entry of the state.
        cost_estimate=costs.estimate(7 * x.size * entries, x.size * entries, ([x, dt, x], 1), ([a], batch * chunks)),
        interpret=platforms.tpu_interpret(),
        name="selective_scan_forward",
    )(x, dt, a, b, c, d, restart, state)


def _forward_kernel(x, dt, a, b, c, d, restart, initial, y, state, states):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial[...]

    states[...] = state[...]
    a_, d_ = a[...], d[...]

    def group(g, carry):
        h, lanes = carry
        rows = pl.ds(pl.multiple_of(g * _GROUP, _GROUP), _GROUP)
        x_, dt_ = x[rows, :].astype(jnp.float32), dt[rows, :].astype(jnp.float32)
        out = d_ * x_
        for j in range(_GROUP):
            x_j, dt_j, (b_j, c_j, restart_j) = x_[j : j + 1], dt_[j : j + 1], _lane(lanes, j)
            h = jnp.exp(dt_j * a_) * jnp.where(restart_j > 0.0, 0.0, h) + (dt_j * x_j) * b_j
            out = _add_row(out, j, jnp.sum(c_j * h, axis=0, keepdims=True))
        y[rows, :] = out.astype(y.dtype)
        return h, _rotated(lanes, _CHUNK - _GROUP)

    state[...], _ = jax.lax.fori_loop(0, _CHUNK // _GROUP, group, (state[...], (b[...], c[...], restart[...])))


def _backward_kernel(x, dt, a, b, c, d, restart, states, dy, d_final, dx, d_dt, da, db, dc, d_state, inside):
    """`inside` [chunk + 1, N, channels]: the states before the chunk's steps, and the one after."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state[...] = d_final[...]
        da[...] = jnp.zeros_like(da)

    a_, d_ = a[...], d[...]
    everywhere = (b[...], c[...], restart[...])
    inside[0] = states[...]

    def again(g, carry):
        h, lanes = carry
        rows = pl.ds(pl.multiple_of(g * _GROUP, _GROUP), _GROUP)
        x_, dt_ = x[rows, :].astype(jnp.float32), dt[rows, :].astype(jnp.float32)
        for j in range(_GROUP):
            x_j, dt_j, (b_j, _, restart_j) = x_[j : j + 1], dt_[j : j + 1], _lane(lanes, j)
            h = jnp.exp(dt_j * a_) * jnp.where(restart_j > 0.0, 0.0, h) + (dt_j * x_j) * b_j
            inside[g * _GROUP + j + 1] = h
        return h, _rotated(lanes, _CHUNK - _GROUP)

    jax.lax.fori_loop(0, _CHUNK // _GROUP, again, (states[...], everywhere))

    def back(i, carry):
        g, lanes, da_, db_, dc_ = carry
        start = (_CHUNK // _GROUP - 1 - i) * _GROUP
        rows = pl.ds(pl.multiple_of(start, _GROUP), _GROUP)
        x_, dt_, dy_ = (z[rows, :].astype(jnp.float32) for z in (x, dt, dy))
        dx_, d_dt_ = d_ * dy_, jnp.zeros_like(x_)
        for j in reversed(range(_GROUP)):
            x_j, dt_j, dy_j, (b_j, c_j, restart_j) = x_[j : j + 1], dt_[j : j + 1], dy_[j : j + 1], _lane(lanes, j)
            g = g + c_j * dy_j
            dc_ = _set_lane(dc_, start + j, jnp.sum(inside[start + j + 1] * dy_j, axis=1, keepdims=True))
            db_ = _set_lane(db_, start + j, jnp.sum(g * (dt_j * x_j), axis=1, keepdims=True))
            d_written = jnp.sum(g * b_j, axis=0, keepdims=True)
            g = g * jnp.exp(dt_j * a_)
            d_exponent = g * jnp.where(restart_j > 0.0, 0.0, inside[start + j])
            da_ = da_ + d_exponent * dt_j
            dx_ = _add_row(dx_, j, dt_j * d_written)
            d_dt_ = _add_row(d_dt_, j, x_j * d_written + jnp.sum(d_exponent * a_, axis=0, keepdims=True))
            g = jnp.where(restart_j > 0.0, 0.0, g)
        dx[rows, :], d_dt[rows, :] = dx_.astype(dx.dtype), d_dt_.astype(d_dt.dtype)
        return g, _rotated(lanes, _GROUP), da_, db_, dc_

    zeros = jnp.zeros(b.shape, jnp.float32)
    first = (d_state[...], _rotated(everywhere, _GROUP), da[...], zeros, zeros)
    d_state[...], _, da[...], db[...], dc[...] = jax.lax.fori_loop(0, _CHUNK // _GROUP, back, first)


def _lane(lanes: tuple[jax.Array, ...], j: int) -> list[jax.Array]:
    """Lane j of each, as columns."""
    return [z[:, j : j + 1] for z in lanes]


def _rotated(lanes: tuple[jax.Array, ...], shift: int) -> tuple[jax.Array, ...]:
    return tuple(pltpu.roll(z, shift, axis=1) for z in lanes)


def _set_lane(z: jax.Array, at: jax.Array, column: jax.Array) -> jax.Array:
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) == at, column, z)


def _add_row(z: jax.Array, at: int, row: jax.Array) -> jax.Array:
    return z + jnp.where(jax.lax.broadcasted_iota(jnp.int32, z.shape, 0) == at, row, 0.0)


class _Layout:
    """How the arrays are cut for the grid [B, blocks of channels, chunks]."""

    def __init__(self, x: jax.Array, a: jax.Array, reverse: bool):
        batch, length, channels = x.shape
        self.channels = next(n for n in _CHANNELS if channels % n == 0)
        self.grid = (batch, channels // self.channels, length // _CHUNK)
        self._reverse = reverse
        self.params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        )
        self.steps = pl.BlockSpec((None, _CHUNK, self.channels), lambda b, i, t: (b, self.at(t), i))
        self.state = pl.BlockSpec((None, a.shape[0], self.channels), lambda b, i, t: (b, 0, i))
        self.states = pl.BlockSpec((None, None, a.shape[0], self.channels), lambda b, i, t: (b, self.at(t), 0, i))

    def at(self, t: jax.Array) -> jax.Array:
        """The chunk that grid step t has."""
        return self.grid[2] - 1 - t if self._reverse else t

    def per_channel(self, rows: int) -> pl.BlockSpec:
        """Of an array [rows, C]."""
        return pl.BlockSpec((rows, self.channels), lambda b, i, t: (0, i))

    def lanes(self, rows: int) -> pl.BlockSpec:
        """Of an array [B, T / chunk, rows, chunk]."""
        return pl.BlockSpec((None, None, rows, _CHUNK), lambda b, i, t: (b, self.at(t), 0, 0))


def _whole_chunks(z: jax.Array) -> jax.Array:
    return jnp.pad(z, [(0, 0), (0, -z.shape[1] % _CHUNK), (0, 0)])


def _whole_lanes(z: jax.Array) -> jax.Array:
    return jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, -z.shape[-1] % _LANES)])


def _transposed(z: jax.Array) -> jax.Array:
    """[B, T, N] -> [B, T / chunk, N, chunk]."""
    batch, length, entries = z.shape
    return z.reshape(batch, length // _CHUNK, _CHUNK, entries).swapaxes(2, 3)
