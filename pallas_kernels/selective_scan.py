"""The selective scan of Mamba (arXiv 2312.00752, section 3): each channel has a state, each of its entries a decay.

For channel c and state entry n, with a step size dt that is positive and A negative:

    h_t[c, n] = exp(dt_t[c] A[c, n]) h_{t-1}[c, n] + dt_t[c] x_t[c] B_t[n]
    y_t[c]    = sum over n of C_t[n] h_t[c, n] + D[c] x_t[c]

Decays differ between the entries of a state, so that steps cannot meet in products of matrices, as they do in
`linear_attention`. What counts is memory: the states of all steps are N times as large as x. Both backends keep the
states between chunks alone, T / chunk of them, and compute those inside a chunk again for its gradient. Inside a chunk
the XLA form goes step by step: an associative scan holds the states of the whole chunk, several times over, already on
the way forward, where this holds one.

| backend | runs on | state entries | types |
|---|---|---|---|
| `xla` | everywhere (a GPU has nothing else) | all | all |
| `pallas_tpu` | TPU; interpreted on a CPU | N up to 64, a multiple of 8 | float32, bfloat16 |
"""

import dataclasses
from typing import Protocol, override

import jax
import jax.numpy as jnp

from pallas_kernels import packed_rows
from pallas_kernels.choice import Candidate, Choice
from pallas_kernels.tpu import selective_scan as tpu_kernel

_CHUNK = 64  # of the XLA form


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of a scan as backends take them: channels along the last axis, nothing left out.

    Attributes:
      x: [B, T, C].
      dt: [B, T, C].
      a: [N, C] float32.
      b: [B, T, N].
      c: [B, T, N].
      d: [C] float32.
      restart: [B, T] bool: the state becomes 0 before the step.
      state: [B, N, C] float32.
    """

    x: jax.Array
    dt: jax.Array
    a: jax.Array
    b: jax.Array
    c: jax.Array
    d: jax.Array
    restart: jax.Array
    state: jax.Array


class UnsupportedSelectiveScan(ValueError):
    """The named backend cannot do what was asked for, or does not exist."""


class Backend(Protocol):
    """One implementation of the selective scan."""

    name: str

    def refuses(self, inputs: Inputs) -> list[str]:
        """Reasons why this backend cannot serve the call; empty if it can. Looks at shapes and types only."""

    def run(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """(y [B, T, C] in x's type, final state [B, N, C] float32); differentiable."""


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = C_t h_t + D x_t, for each channel; all in float32.

    Args:
      x: [B, T, C].
      dt: [B, T, C], step sizes, at least 0 (after the softplus).
      a: [C, N], at most 0.
      b: [B, T, N].
      c: [B, T, N].
      d: [C], or None for 0.
      segment_ids: [B, T]; every segment of a packed row starts from a state of 0, but for the row's first, which starts
        from `initial_state`. On padding (id 0) y is 0 and the state stays. Segments do not touch, not even by NaNs.
      initial_state: [B, C, N], or None for 0.
      backend: "xla", "pallas_tpu", or "auto": the best for the platform.

    Returns:
      (y [B, T, C] in x's type, final state [B, C, N] float32).

    Raises:
      UnsupportedSelectiveScan: the named backend does not exist or refuses.
      ValueError: shapes do not fit.
    """
    _check(x, dt, a, b, c, d, initial_state)
    batch, length, channels = x.shape
    entries = a.shape[1]
    restart = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        packed_rows.check_segment_ids(segment_ids, batch, length)
        restart = packed_rows.restarts(segment_ids)
        # A step size of 0 leaves the state as it is.
        real = (segment_ids != 0)[:, :, None]
        x, dt, b, c = (jnp.where(real, z, jnp.zeros_like(z)) for z in (x, dt, b, c))
    if initial_state is None:
        initial_state = jnp.zeros((batch, channels, entries), jnp.float32)
    inputs = Inputs(
        x=x,
        dt=dt,
        a=a.astype(jnp.float32).T,
        b=b,
        c=c,
        d=jnp.zeros(channels, jnp.float32) if d is None else d.astype(jnp.float32),
        restart=restart,
        state=initial_state.astype(jnp.float32).swapaxes(1, 2),
    )
    y, final = SELECTIVE_SCAN.choose(backend, inputs).run(inputs)
    return y, final.swapaxes(1, 2)


def selective_scan_step(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of `selective_scan`, for decoding.

    Args:
      state: [B, C, N] float32.
      x: [B, C].
      dt: [B, C].
      a: [C, N].
      b: [B, N].
      c: [B, N].
      d: [C], or None for 0.

    Returns:
      (state after the step, y [B, C] in x's type).
    """
    if (
        state.shape != (*x.shape, b.shape[-1])
        or dt.shape != x.shape
        or c.shape != b.shape
        or a.shape != state.shape[1:]
    ):
        raise ValueError(
            "A step of the selective scan takes state [B, C, N], x and dt [B, C], a [C, N], b and c [B, N]; "
            f"got {state.shape}, {x.shape}, {dt.shape}, {a.shape}, {b.shape}, {c.shape}."
        )
    after, y = _step(state.swapaxes(1, 2), x, dt, a.astype(jnp.float32).T, b, c)
    if d is not None:
        y += d.astype(jnp.float32) * x.astype(jnp.float32)
    return after.swapaxes(1, 2), y.astype(x.dtype)


def _step(
    state: jax.Array, x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(state [B, N, C], y [B, C] without D), from the state before, a [N, C], and the others [B, C] or [B, N]."""
    x, dt, b, c = (z.astype(jnp.float32) for z in (x, dt, b, c))
    state = jnp.exp(dt[:, None, :] * a) * state + (dt * x)[:, None, :] * b[:, :, None]
    return state, jnp.sum(c[:, :, None] * state, axis=1)


class XlaBackend(Backend):
    """A scan over chunks of a scan over steps; each chunk's inner states are computed again for its gradient."""

    name = "xla"

    @override
    def refuses(self, inputs: Inputs) -> list[str]:
        return []

    @override
    def run(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        batch, length, channels = inputs.x.shape
        chunk = min(_CHUNK, length)
        padding = -length % chunk

        def step(state, at):
            x, dt, b, c, restart = at
            # The state is masked, not its product: what one segment holds is never multiplied with another's decay.
            state, y = _step(jnp.where(restart[:, None, None], 0.0, state), x, dt, inputs.a, b, c)
            return state, (y + inputs.d * x.astype(jnp.float32)).astype(x.dtype)

        @jax.checkpoint
        def over_chunk(state, steps):
            return jax.lax.scan(step, state, steps)

        def by_chunk(z):
            z = jnp.pad(z, [(0, 0), (0, padding)] + [(0, 0)] * (z.ndim - 2)).swapaxes(0, 1)
            return z.reshape(-1, chunk, *z.shape[1:])

        steps = tuple(map(by_chunk, (inputs.x, inputs.dt, inputs.b, inputs.c, inputs.restart)))
        final, y = jax.lax.scan(over_chunk, inputs.state, steps)
        return y.reshape(-1, batch, channels)[:length].swapaxes(0, 1), final


class TpuBackend(Backend):
    """The TPU kernel: a block of channels keeps its states in VMEM from the first step to the last."""

    name = "pallas_tpu"

    @override
    def refuses(self, inputs: Inputs) -> list[str]:
        return tpu_kernel.refuses(inputs.x, inputs.a)

    @override
    def run(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        return tpu_kernel.scan(*(getattr(inputs, field.name) for field in dataclasses.fields(Inputs)))


_PLAIN = Candidate("xla", "In chunks, on any device; refuses nothing.")

SELECTIVE_SCAN: Choice[Backend] = Choice(
    "selective_scan",
    backends={"xla": XlaBackend(), "pallas_tpu": TpuBackend()},
    order={
        "cpu": (_PLAIN,),
        "gpu": (_PLAIN,),
        "tpu": (Candidate("pallas_tpu", "Keeps states on the chip (benchmarks/results/linear_mixers.json)."), _PLAIN),
    },
    error=UnsupportedSelectiveScan,
)


def _check(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None,
    initial_state: jax.Array | None,
) -> None:
    if x.ndim != 3 or dt.shape != x.shape or x.shape[1] == 0:
        raise ValueError(f"selective_scan takes x and dt of one shape [B, T, C], T > 0; got {x.shape} and {dt.shape}.")
    batch, length, channels = x.shape
    if a.ndim != 2 or a.shape[0] != channels:
        raise ValueError(f"a must be [C, N] with C = {channels} of x, got {a.shape}.")
    if b.shape != (batch, length, a.shape[1]) or c.shape != b.shape:
        raise ValueError(f"b and c must be [B, T, N] = {(batch, length, a.shape[1])}, got {b.shape} and {c.shape}.")
    if d is not None and d.shape != (channels,):
        raise ValueError(f"d must be [C] = {(channels,)}, got {d.shape}.")
    if initial_state is not None and initial_state.shape != (batch, *a.shape):
        raise ValueError(f"initial_state must be [B, C, N] = {(batch, *a.shape)}, got {initial_state.shape}.")
