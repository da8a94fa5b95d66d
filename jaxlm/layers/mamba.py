"""Mamba's mixer (arXiv 2312.00752, section 3): a state a channel, with step sizes and inputs that the text selects."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.cache import PackedTexts, RecurrentCache, run_steps
from jaxlm.layers.context import Context
from jaxlm.layers.feed_forward import Activation
from jaxlm.layers.parameters import Linear, ParameterMaker, PathKey
from jaxlm.layers.remat import name_activation
from jaxlm.layers.short_convolution import ShortConvolution
from jaxlm.layers.step_sizes import StepSizes, refuse_scaling
from pallas_kernels.residuals import ATTENTION_OUT
from pallas_kernels.selective_scan import SELECTIVE_SCAN, selective_scan_step

_AXES = (("mlp", None), (None, "mlp"))  # of the state and of the convolution's window


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """One Mamba mixer.

    Attributes:
      inner: channels (C); the paper has twice the model's width.
      step_rank: rank of the projection to step sizes (R); the paper has the model's width / 16, rounded up.
      state: entries of a channel's state (N).
      taps: tokens that the convolution sees.
      convolution_bias: bias of the convolution.
      bias: biases of the projections into and out of the mixer.
      activation: after the convolution; the gate's is always SILU.
      steps: where step sizes start; None: as `StepSizes` has it.
      backend: who computes the scan, a name in `pallas_kernels.selective_scan`, or "auto": the fastest that can.
    """

    inner: int
    step_rank: int
    state: int = 16
    taps: int = 4
    convolution_bias: bool = True
    bias: bool = False
    activation: Activation = Activation.SILU
    steps: StepSizes | None = None
    backend: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "activation", Activation(self.activation))
        SELECTIVE_SCAN.check_name(self.backend, "MambaConfig.backend")

    def mixing_flops(self, length: int) -> float:
        """Forwards and backwards, of a row of so many tokens, beside the products with matrices.

        A token writes to its channels' states and reads them, 2 N multiplications and additions a channel, and there
        are the taps.
        """
        return length * (12.0 * self.inner * self.state + 6.0 * self.inner * self.taps)

    def token_sizes(self, ways: Callable[[str, int], int]) -> tuple[int, int, int]:
        """See `jaxlm.layers.block.TokenSizes`."""
        inner = self.inner // ways("mlp", self.inner)
        products = 3 * inner + self.step_rank + 2 * self.state
        return inner, products + inner, products + 4 * inner

    def build(self, make: ParameterMaker, *, residual_gain: float, dtype: jnp.dtype, key: PathKey) -> "Mamba":
        """The module; arguments as for `FeedForwardConfig.build`."""
        return Mamba(self, make, residual_gain=residual_gain, dtype=dtype, key=key)


class Mamba(nnx.Module):
    """[B, T, E] -> [B, T, E].

    Of u = act(conv(x W_value)) come dt = softplus(u W_down W_up + bias), B = u W_write and C = u W_read; y is its
    selective scan with these, A = -exp(log_decay) and D; the result is (y * silu(x W_gate)) W_output. Step sizes and
    states are float32.
    """

    def __init__(
        self, config: MambaConfig, make: ParameterMaker, *, residual_gain: float, dtype: jnp.dtype, key: PathKey
    ):
        refuse_scaling(make, "Mamba")
        embed, inner = (("embed", make.width),), (("mlp", config.inner),)
        rank, entries = ((None, config.step_rank),), ((None, config.state),)

        def linear(name, inputs, outputs, **options):
            return Linear(make, inputs, outputs, key=key.at(name), **({"dtype": dtype} | options))

        self.gate = linear("gate", embed, inner, bias=config.bias)
        self.value = linear("value", embed, inner, bias=config.bias)
        self.convolution = ShortConvolution(
            make, inner, config.taps, bias=config.convolution_bias, dtype=dtype, key=key.at("convolution")
        )
        self.write = linear("write", inner, entries)  # B
        self.read = linear("read", inner, entries)  # C
        self.step_down = linear("step_down", inner, rank, dtype=jnp.float32)
        # The paper's code draws uniformly from +- 1 / sqrt(R).
        std = 1.0 / math.sqrt(3 * config.step_rank)
        self.step_up = linear("step_up", rank, inner, std=std, dtype=jnp.float32)
        self.step_bias = make.vector_of(
            (config.steps or StepSizes()).biases(key.at("step_bias"), (config.inner,)), inner
        )
        # S4D-real: A = -1, -2, ..., -N in every channel (3.6).
        decays = jnp.log(jnp.arange(1, config.state + 1, dtype=jnp.float32))
        self.log_decay = make.vector_of(jnp.broadcast_to(decays, (config.inner, config.state)), inner + entries)
        self.skip = make.vector(inner, 1.0)  # D
        self.output = linear("output", inner, embed, bias=config.bias, gain=residual_gain)
        self.config = config

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None, context: Context) -> jax.Array:
        """Of whole rows.

        Args:
          x: [B, T, E].
          segment_ids: int32 [B, T], 0 for padding; None: each row is one text.
          context: operations.
        """
        value, gate = self._projected(x, context)
        u = self._activated(self.convolution(value, segment_ids), context)
        y, _ = context.ops.selective_scan(
            *self._scanned(u, context), segment_ids=segment_ids, backend=self.config.backend
        )
        return self._gated(y, gate, context)

    def prefill(
        self, x: jax.Array, segment_ids: jax.Array | None, texts: PackedTexts, context: Context
    ) -> tuple[jax.Array, RecurrentCache]:
        """As `__call__`, and the state after each of the texts in these rows. The scan has one text a row."""
        value, gate = self._projected(x, context)
        u, dt, a, b, c, d = self._scanned(self._activated(self.convolution(value, segment_ids), context), context)
        u, dt, b, c = (texts.unpacked(part) for part in (u, dt, b, c))
        ids, backend = texts.present(x.shape[1]), self.config.backend
        y, state = context.ops.selective_scan(u, dt, a, b, c, d, segment_ids=ids, backend=backend)
        cache = RecurrentCache(state, (self.convolution.window(value, texts),), _AXES)
        return self._gated(texts.packed(y, len(x)), gate, context), cache

    def extend(
        self, x: jax.Array, cache: RecurrentCache, present: jax.Array | None, context: Context
    ) -> tuple[jax.Array, RecurrentCache]:
        """Of t new tokens a slot, x [B, t, E], those that are `present`; and the cache with them in it."""
        value, gate = self._projected(x, context)
        convolved, window = self.convolution.extend(value, *cache.windows, present)
        u, dt, a, b, c, d = self._scanned(self._activated(convolved, context), context)

        def step(state, u, dt, b, c):
            return selective_scan_step(state, u, dt, a, b, c, d)

        y, state = run_steps(step, cache.state, (u, dt, b, c), present)
        return self._gated(y, gate, context), RecurrentCache(state, (window,), _AXES)

    def _projected(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        return name_activation(self.value(x, context), "up"), name_activation(self.gate(x, context), "gate")

    def _activated(self, u: jax.Array, context: Context) -> jax.Array:
        return context.ops.constrain(self.config.activation(u), ("batch", "length", "mlp"))

    def _scanned(self, u: jax.Array, context: Context) -> tuple[jax.Array, ...]:
        """The scan's x, dt, a, b, c and d, from u [B, T, C]."""
        steps = self.step_up(self.step_down(u.astype(jnp.float32), context), context)
        dt = jax.nn.softplus(steps + self.step_bias[...])
        a = -jnp.exp(self.log_decay[...])
        return u, dt, a, self.write(u, context), self.read(u, context), self.skip[...]

    def _gated(self, y: jax.Array, gate: jax.Array, context: Context) -> jax.Array:
        return self.output(name_activation(y, ATTENTION_OUT) * jax.nn.silu(gate), context)
