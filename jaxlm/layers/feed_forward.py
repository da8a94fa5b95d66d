"""The feed-forward layer: plain, or gated (arXiv 2002.05202)."""

import dataclasses
import enum
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.context import Context
from jaxlm.layers.parameters import Linear, ParameterMaker, PathKey
from jaxlm.layers.remat import name_activation
from jaxlm.layers.side_values import NO_SIDE_VALUES, SideValues


class Activation(enum.Enum):
    """Nonlinearities. Gated, GELU is GEGLU, SILU is SwiGLU, RELU is ReGLU, SIGMOID is GLU and IDENTITY is bilinear."""

    GELU = "gelu"  # x Phi(x), with the error function
    GELU_TANH = "gelu_tanh"  # its tanh approximation: GPT-2, T5 v1.1, Gemma
    RELU = "relu"
    SILU = "silu"
    SIGMOID = "sigmoid"
    TANH = "tanh"
    SQUARED_RELU = "squared_relu"  # Primer, arXiv 2109.08668
    IDENTITY = "identity"

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies it to each number of x."""
        match self:
            case Activation.GELU:
                return jax.nn.gelu(x, approximate=False)
            case Activation.GELU_TANH:
                return jax.nn.gelu(x, approximate=True)
            case Activation.RELU:
                return jax.nn.relu(x)
            case Activation.SILU:
                return jax.nn.silu(x)
            case Activation.SIGMOID:
                return jax.nn.sigmoid(x)
            case Activation.TANH:
                return jnp.tanh(x)
            case Activation.SQUARED_RELU:
                return jnp.square(jax.nn.relu(x))
            case Activation.IDENTITY:
                return x


class FeedForwardLayer(Protocol):
    """What a block asks of its feed-forward layer."""

    def __call__(
        self, x: jax.Array, context: Context, *, present: jax.Array | None = None
    ) -> tuple[jax.Array, SideValues]:
        """The layer's output, before it joins the residual stream, and its side values.

        Args:
          x: [B, T, E].
          context: operations and dropout key.
          present: bool [B, T], False on padding, for layers to which other tokens matter; None: no padding.
        """


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """One feed-forward layer. A layer of another kind is a subclass with its own `build` (docs/extending.md).

    Attributes:
      hidden: width between the two matrices (F); a gated layer has two matrices of it before the gate.
      activation: of the gate, or of the hidden layer.
      gated: activation(x W_gate) * (x W_up), or activation(x W_up).
      bias: biases on all matrices.
      dropout: rate on the hidden layer (T5 has it there, BERT has not).
    """

    hidden: int
    activation: Activation = Activation.SILU
    gated: bool = True
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "activation", Activation(self.activation))

    def build(
        self, make: ParameterMaker, *, residual_gain: float, dtype: jnp.dtype, key: PathKey
    ) -> "FeedForwardLayer":
        """The module.

        Args:
          make: makes parameters with their logical axes, in the model's initialisation.
          residual_gain: factor on the initialisation of the matrix that writes to the residual stream.
          dtype: of activations.
          key: of this layer.
        """
        return FeedForward(self, make, residual_gain=residual_gain, dtype=dtype, key=key)


class FeedForward(nnx.Module):
    """[B, T, E] -> [B, T, E], each position by itself."""

    def __init__(
        self, config: FeedForwardConfig, make: ParameterMaker, *, residual_gain: float, dtype: jnp.dtype, key: PathKey
    ):
        embed, hidden = (("embed", make.width),), (("mlp", config.hidden),)

        def linear(name, inputs, outputs, gain=1.0):
            return Linear(make, inputs, outputs, bias=config.bias, gain=gain, dtype=dtype, key=key.at(name))

        self.gate = linear("gate", embed, hidden) if config.gated else None
        self.up = linear("up", embed, hidden)
        self.down = linear("down", hidden, embed, residual_gain)
        self.config = config

    def __call__(
        self, x: jax.Array, context: Context, *, present: jax.Array | None = None
    ) -> tuple[jax.Array, SideValues]:
        """See `FeedForwardLayer`."""
        activation = self.config.activation
        hidden = name_activation(self.up(x, context), "up")
        if self.gate is None:
            hidden = activation(hidden)
        else:
            hidden = activation(name_activation(self.gate(x, context), "gate")) * hidden
        hidden = context.ops.constrain(hidden, ("batch", "length", "mlp"))
        return self.down(context.dropout(hidden, self.config.dropout), context), NO_SIDE_VALUES
