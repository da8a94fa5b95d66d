"""Linear attention with decay, in chunks: one form for RetNet, Mamba-2 (SSD), GLA and prefix linear attention.

For each head a matrix S, [Dk, Dv], goes from step to step:

    S_t = diag(g_t) S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

with g = 1 (no decay), one number a step (RetNet, arXiv 2307.08621; Mamba-2, arXiv 2405.21060), or one for each key
channel (GLA, arXiv 2312.06635). Time is O(T), not O(T^2). The sequence is cut into chunks: inside one, steps meet in
products of matrices; from one to the next only S goes on. `linear_chunk` has the arithmetic.

The backward pass keeps nothing but the arguments of the call. It computes the states between chunks again, T / chunk of
them, and then goes through the chunks from the last to the first.

| backend | runs on | head sizes | types |
|---|---|---|---|
| `xla` | everywhere (a GPU has nothing else) | all | all |
| `pallas_tpu` | TPU; interpreted on a CPU | Dk, Dv up to 256 | float32, bfloat16 |
"""

import dataclasses
import functools
from typing import Protocol, override

import jax
import jax.numpy as jnp

from pallas_kernels import linear_chunk, packed_rows
from pallas_kernels.choice import Candidate, Choice
from pallas_kernels.tpu import linear_attention as tpu_kernel


@dataclasses.dataclass(frozen=True)
class Request:
    """What a backend is asked for; arrays are padded to whole chunks.

    Attributes:
      scale: multiplies o.
      chunk: steps of a chunk, a multiple of `linear_chunk.SUB_CHUNK`.
    """

    scale: float
    chunk: int


# q, k [B, T, H, Dk]; v [B, T, H, Dv]; log_decay [B, T, H] or [B, T, H, Dk], and state [B, H, Dv, Dk], float32.
Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


class UnsupportedLinearAttention(ValueError):
    """The named backend cannot do what was asked for, or does not exist."""


class Backend(Protocol):
    """One implementation of linear attention."""

    name: str

    def refuses(self, inputs: Inputs, request: Request) -> list[str]:
        """Reasons why this backend cannot serve the call; empty if it can. Looks at shapes and types only."""

    def forward(self, inputs: Inputs, request: Request) -> tuple[jax.Array, jax.Array]:
        """(o [B, T, H, Dv] in v's type, final state [B, H, Dv, Dk] float32)."""

    def backward(self, inputs: Inputs, request: Request, do: jax.Array, d_final: jax.Array) -> Inputs:
        """Gradients of the inputs, each in its input's type."""


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """o_t = scale * q_t S_t with S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, for each head.

    Sums are taken in float32, products in the type of q, k, v.

    Args:
      q: [B, T, H, Dk].
      k: [B, T, H, Dk].
      v: [B, T, H, Dv].
      log_decay: None, [B, T, H] or [B, T, H, Dk]: logarithms of decays, at most 0. -inf forgets the state, as does
        anything below `linear_chunk.FORGET`; the gradient there is 0.
      segment_ids: [B, T]; every segment of a packed row starts from a state of 0, but for the row's first, which starts
        from `initial_state`. On padding (id 0) o is 0 and the state stays. With segments, a number that is not finite
        makes NaN of its own segment's results, from its step on, and of its gradients, and of nothing else.
      initial_state: [B, H, Dk, Dv], or None for 0.
      scale: multiplies o.
      chunk: steps of a chunk, a multiple of 16; None takes 128, or 64 where decays are by channel.
      backend: "xla", "pallas_tpu", or "auto": the best for the platform.

    Returns:
      (o [B, T, H, Dv] in v's type, final state [B, H, Dk, Dv] float32).

    Raises:
      UnsupportedLinearAttention: the named backend does not exist or refuses.
      ValueError: shapes do not fit.
    """
    _check(q, k, v, log_decay, initial_state, chunk)
    batch, length, heads, key_size = q.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_size, v.shape[-1]), jnp.float32)
    state = initial_state.astype(jnp.float32).swapaxes(2, 3)
    # Without decay is with a decay of 1: a row of numbers a head, and a tenth of the kernel's time.
    log_decay = jnp.zeros(q.shape[:3], jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
    if chunk is None:
        chunk = min(128 if log_decay.ndim == 3 else 64, _up(length, linear_chunk.SUB_CHUNK))
    padding = _up(length, chunk) - length
    request = Request(float(scale), chunk)
    restart = None
    if segment_ids is not None:
        packed_rows.check_segment_ids(segment_ids, batch, length)
        real, restart = segment_ids != 0, _pad(packed_rows.restarts(segment_ids), padding)
        q, k, v = (jnp.where(real[:, :, None, None], x, jnp.zeros_like(x)) for x in (q, k, v))
        log_decay = jnp.where(real.reshape(real.shape + (1,) * (log_decay.ndim - 2)), log_decay, 0.0)
    # Steps after the end write nothing and decay nothing, as padding does.
    inputs = (*(_pad(x, padding) for x in (q, k, v, log_decay)), state)
    chosen = LINEAR_ATTENTION.choose(backend, inputs, request)
    if restart is None:
        o, final = _unpacked(chosen.name, request, *inputs)
    else:
        o, final = _packed(chosen.name, request, *inputs, restart)
    return o[:, :length], final.swapaxes(2, 3)


def linear_attention_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """One step of `linear_attention`, for decoding.

    Args:
      state: [B, H, Dk, Dv] float32.
      q: [B, H, Dk].
      k: [B, H, Dk].
      v: [B, H, Dv].
      log_decay: None, [B, H] or [B, H, Dk].
      scale: multiplies o.

    Returns:
      (state after the step, o [B, H, Dv] in v's type).
    """
    if state.shape != (*k.shape, v.shape[-1]) or q.shape != k.shape or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            "A step of linear attention takes state [B, H, Dk, Dv], q and k [B, H, Dk], v [B, H, Dv]; "
            f"got {state.shape}, {q.shape}, {k.shape}, {v.shape}."
        )
    if log_decay is not None and log_decay.shape not in (q.shape[:2], q.shape):
        raise ValueError(f"log_decay must be [B, H] or [B, H, Dk], got {log_decay.shape} beside q {q.shape}.")
    written = k.astype(jnp.float32)[..., :, None] * v.astype(jnp.float32)[..., None, :]
    if log_decay is not None:
        decay = jnp.exp(log_decay.astype(jnp.float32)).reshape(*q.shape[:2], -1, 1)
        # A decay of 0 forgets whatever the state was.
        state = jnp.where(decay > 0.0, decay * state, 0.0)
    state = state + written
    o = scale * jnp.einsum("bhk,bhkv->bhv", q.astype(jnp.float32), state, precision="highest")
    return state, o.astype(v.dtype)


def prefix_state(k: jax.Array, v: jax.Array, prefix_end: jax.Array | int) -> jax.Array:
    """The state that a prefix leaves without decay: sum over j < prefix_end of k_j v_j^T.

    As `initial_state` of `linear_attention` it shows the whole prefix to every step, whatever stands before or after:
    prefix linear attention, JRT (arXiv 2407.05483, section 4), whose prefix has keys and values of its own.

    Args:
      k: [B, T, H, Dk], or shorter than the sequence: steps from `prefix_end` on do not count.
      v: [B, T, H, Dv].
      prefix_end: one number, or [B].

    Returns:
      [B, H, Dk, Dv] float32.
    """
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"prefix_state takes k [B, T, H, Dk] and v [B, T, H, Dv], got {k.shape} and {v.shape}.")
    prefix_end = jnp.asarray(prefix_end)
    if prefix_end.shape not in ((), k.shape[:1]):
        raise ValueError(f"prefix_end must be a number or [B] = {k.shape[:1]}, got shape {prefix_end.shape}.")
    seen = jnp.arange(k.shape[1]) < jnp.broadcast_to(prefix_end, k.shape[:1])[:, None]
    k, v = (jnp.where(seen[:, :, None, None], x, jnp.zeros_like(x)) for x in (k, v))
    exact = "highest" if k.dtype == jnp.float32 else None
    return jnp.einsum("bthk,bthv->bhkv", k, v, precision=exact, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unpacked(name: str, request: Request, *inputs):
    return LINEAR_ATTENTION.backend(name).forward(inputs, request)


def _unpacked_forward(name, request, *inputs):
    return LINEAR_ATTENTION.backend(name).forward(inputs, request), inputs


def _unpacked_backward(name, request, inputs, gradients):
    return LINEAR_ATTENTION.backend(name).backward(inputs, request, *gradients)


_unpacked.defvjp(_unpacked_forward, _unpacked_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed(name: str, request: Request, *inputs_and_restart):
    """`_unpacked` with the state forgotten where `restart` [B, T] is true, and NaNs kept inside their segments.

    A decay of 0 separates finite numbers exactly; but 0 * NaN is NaN, and a product of matrices would spread one over
    its chunk. So the arithmetic sees 0 in place of what is not finite, and the results say where that was.
    """
    *inputs, restart = inputs_and_restart
    broken = _broken(inputs)
    o, final = LINEAR_ATTENTION.backend(name).forward(_separated(inputs, restart), request)
    poison = packed_rows.poison_after(broken, restart)
    return (o + poison[:, :, None, None]).astype(o.dtype), final + poison[:, -1, None, None, None]


def _packed_forward(name, request, *inputs_and_restart):
    return _packed(name, request, *inputs_and_restart), inputs_and_restart


def _packed_backward(name, request, inputs_and_restart, gradients):
    *inputs, restart = inputs_and_restart
    do, d_final = gradients
    broken = _broken(inputs) | packed_rows.is_broken(do)
    broken = broken.at[:, -1].set(broken[:, -1] | ~_finite(d_final))
    do, d_final = packed_rows.cleaned(do), packed_rows.cleaned(d_final)
    *by_step, d_state = LINEAR_ATTENTION.backend(name).backward(_separated(inputs, restart), request, do, d_final)
    poison = packed_rows.poison_around(broken, restart)
    by_step = [(x + poison.reshape(poison.shape + (1,) * (x.ndim - 2))).astype(x.dtype) for x in by_step]
    return *by_step, d_state + poison[:, 0, None, None, None], None


_packed.defvjp(_packed_forward, _packed_backward)


def _separated(inputs: list[jax.Array], restart: jax.Array) -> Inputs:
    q, k, v, log_decay, state = inputs
    log_decay = jnp.where(jnp.isnan(log_decay), 0.0, log_decay)
    restart = restart.reshape(restart.shape + (1,) * (log_decay.ndim - 2))
    q, k, v, state = (packed_rows.cleaned(x) for x in (q, k, v, state))
    return q, k, v, jnp.where(restart, -jnp.inf, log_decay), state


def _broken(inputs: list[jax.Array]) -> jax.Array:
    q, k, v, log_decay, state = inputs
    broken = packed_rows.is_broken(q, k, v, jnp.where(log_decay == -jnp.inf, 0.0, log_decay))
    return broken.at[:, 0].set(broken[:, 0] | ~_finite(state))


def _finite(state: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(state), axis=(1, 2, 3))


class XlaBackend(Backend):
    """A scan over chunks, all heads of all rows at once. Holds one chunk's [C, C] scores and T / C states."""

    name = "xla"

    @override
    def refuses(self, inputs: Inputs, request: Request) -> list[str]:
        return []

    @override
    def forward(self, inputs: Inputs, request: Request) -> tuple[jax.Array, jax.Array]:
        q, k, v, log_decay, state = inputs

        def step(state, chunk):
            o, state = _over_heads(functools.partial(linear_chunk.forward, scale=request.scale))(*chunk, state)
            return state, o.astype(v.dtype)

        final, o = jax.lax.scan(step, state, _chunks(q, k, v, log_decay, request.chunk))
        return _joined(o), final

    @override
    def backward(self, inputs: Inputs, request: Request, do: jax.Array, d_final: jax.Array) -> Inputs:
        q, k, v, log_decay, state = inputs
        chunks = _chunks(q, k, v, log_decay, request.chunk)

        def states_between(state, chunk):
            return _over_heads(linear_chunk.next_state)(*chunk[1:], state), state

        def step(d_state, chunk_state_do):
            chunk, state, do = chunk_state_do
            backward = _over_heads(functools.partial(linear_chunk.backward, scale=request.scale))
            *gradients, d_state = backward(*chunk, state, do, d_state)
            dq, dk, dv, d_log_decay = gradients
            return d_state, (dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_log_decay)

        _, states = jax.lax.scan(states_between, state, chunks)
        do = _by_chunk(do, request.chunk)
        d_state, (dq, dk, dv, d_log_decay) = jax.lax.scan(step, d_final, (chunks, states, do), reverse=True)
        if log_decay.ndim == 3:
            d_log_decay = d_log_decay.swapaxes(3, 4)
        return _joined(dq), _joined(dk), _joined(dv), _joined(d_log_decay).reshape(log_decay.shape), d_state


def _over_heads(function):
    """`function` of one head's matrices, mapped over [B, H]."""
    return jax.vmap(jax.vmap(function))


def _chunks(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, chunk: int):
    """Each as [T / C, B, H, C, N]; a decay for all channels as the row [T / C, B, H, 1, C]."""
    if log_decay.ndim == 3:
        log_decay = _by_chunk(log_decay[..., None], chunk).swapaxes(3, 4)
    else:
        log_decay = _by_chunk(log_decay, chunk)
    return *(_by_chunk(x, chunk) for x in (q, k, v)), log_decay


def _by_chunk(x: jax.Array, chunk: int) -> jax.Array:
    batch, length, heads, size = x.shape
    return x.reshape(batch, length // chunk, chunk, heads, size).transpose(1, 0, 3, 2, 4)


def _joined(x: jax.Array) -> jax.Array:
    """[T / C, B, H, C, N] -> [B, T, H, N]."""
    count, batch, heads, chunk, size = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * chunk, heads, size)


class TpuBackend(Backend):
    """The TPU kernel: the state stays in VMEM, a chunk is read once."""

    name = "pallas_tpu"

    @override
    def refuses(self, inputs: Inputs, request: Request) -> list[str]:
        return tpu_kernel.refuses(inputs)

    @override
    def forward(self, inputs: Inputs, request: Request) -> tuple[jax.Array, jax.Array]:
        return tpu_kernel.forward(inputs, scale=request.scale, chunk=request.chunk)

    @override
    def backward(self, inputs: Inputs, request: Request, do: jax.Array, d_final: jax.Array) -> Inputs:
        return tpu_kernel.backward(inputs, do, d_final, scale=request.scale, chunk=request.chunk)


_PLAIN = Candidate("xla", "In chunks, on any device; refuses nothing.")

LINEAR_ATTENTION: Choice[Backend] = Choice(
    "linear_attention",
    backends={"xla": XlaBackend(), "pallas_tpu": TpuBackend()},
    order={
        "cpu": (_PLAIN,),
        "gpu": (_PLAIN,),
        "tpu": (Candidate("pallas_tpu", "Keeps states on the chip (benchmarks/results/linear_mixers.json)."), _PLAIN),
    },
    error=UnsupportedLinearAttention,
)


def _pad(x: jax.Array, padding: int) -> jax.Array:
    """Zeros after the last step."""
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array | None,
    chunk: int | None,
) -> None:
    if q.ndim != 4 or v.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or q.shape[1] == 0:
        raise ValueError(
            f"linear_attention takes q and k of one shape [B, T, H, Dk] and v [B, T, H, Dv], T > 0; got {q.shape}, "
            f"{k.shape}, {v.shape}. Repeat keys that heads share."
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one type, got {q.dtype}, {k.dtype}, {v.dtype}; cast them.")
    if log_decay is not None and log_decay.shape not in (q.shape[:3], q.shape):
        raise ValueError(
            "log_decay must be [B, T, H] (one for all channels) or [B, T, H, Dk] (each its own), "
            f"got {log_decay.shape} beside q {q.shape}."
        )
    expected = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be [B, H, Dk, Dv] = {expected}, got {initial_state.shape}.")
    if chunk is not None and (chunk <= 0 or chunk % linear_chunk.SUB_CHUNK):
        raise ValueError(f"chunk must be a positive multiple of {linear_chunk.SUB_CHUNK}, got {chunk}.")
