"""Mixture of experts: a router sends each token through a few of many feed-forward layers. No token is dropped."""

import dataclasses
import enum
from typing import override

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.context import Context
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.parameters import ParameterMaker, PathKey
from jaxlm.layers.remat import name_activation
from jaxlm.layers.side_values import SideValues
from pallas_kernels.grouped_matmul import GROUPED_MATMUL, grouped_matmul


class Scoring(enum.Enum):
    """Expert scores from router logits: SOFTMAX over all experts (Switch, Mixtral), or each SIGMOID (DeepSeek-V3)."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclasses.dataclass(frozen=True)
class MixtureOfExpertsConfig(FeedForwardConfig):
    """Experts that are feed-forward layers of width `hidden`, without biases and without dropout between matrices.

    Switch Transformer (arXiv 2101.03961): 1 expert a token, weights not normalised. Mixtral (arXiv 2401.04088): 2 of 8,
    normalised. DeepSeek-V3 (arXiv 2412.19437, 2.1.2): 8 of 256, sigmoid, normalised, scale 2.5, one shared expert; its
    bias that balances without a loss is not here.

    Attributes:
      num_experts: experts (X).
      experts_per_token: how many of them each token goes through, those of the highest scores (K).
      scoring: see `Scoring`.
      normalize: the weights of a token's experts are its scores divided by their sum, or the scores as they are.
      scale: factor on these weights.
      shared: a feed-forward layer that every token goes through besides (DeepSeekMoE, arXiv 2401.06066, 3.2; n shared
        experts are one layer of n times the width); None is none.
      shared_gate: what this layer gives is multiplied by this activation of a learned product with the token
        (Qwen2-MoE: SIGMOID); None leaves it.
      balance_loss: coefficient of the load-balancing loss of this layer, X sum_e f_e P_e, where f_e is the share of
        choices that fell on expert e and P_e its mean score, normalised over experts (Switch, equations 4 to 6, for K
        choices); 1 in balance. Padding does not count. Taken over a microbatch.
      z_loss: coefficient of the mean of logsumexp(router logits)^2 (ST-MoE, arXiv 2202.08906, equation 5).
      backend: who multiplies, a name in `pallas_kernels.grouped_matmul`, or "auto": the fastest that can.
    """

    num_experts: int = 8
    experts_per_token: int = 2
    scoring: Scoring = Scoring.SOFTMAX
    normalize: bool = True
    scale: float = 1.0
    shared: FeedForwardConfig | None = None
    shared_gate: Activation | None = None
    balance_loss: float = 0.01
    z_loss: float = 0.0
    backend: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "scoring", Scoring(self.scoring))
        if self.shared_gate is not None:
            object.__setattr__(self, "shared_gate", Activation(self.shared_gate))
            if self.shared is None:
                raise ValueError(
                    f"MixtureOfExpertsConfig.shared_gate={self.shared_gate.value!r} weighs the shared layer, and "
                    f"`shared` is None; give both or neither."
                )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"MixtureOfExpertsConfig.experts_per_token={self.experts_per_token} must lie between 1 and "
                f"num_experts={self.num_experts}."
            )
        if self.bias or self.dropout:
            raise ValueError(
                f"Experts have no biases and no dropout of their own, got bias={self.bias}, dropout={self.dropout}; "
                f"use BlockConfig.dropout, which acts on the layer's output."
            )
        if self.scoring is Scoring.SIGMOID and self.z_loss:
            raise ValueError(
                f"MixtureOfExpertsConfig.z_loss={self.z_loss} keeps a softmax's logits small, but scoring is sigmoid; "
                f"set it to 0."
            )
        if self.backend not in ("auto", *GROUPED_MATMUL.backends):
            raise ValueError(
                f"MixtureOfExpertsConfig.backend={self.backend!r} does not exist; there are "
                f"{sorted(GROUPED_MATMUL.backends)} and 'auto'."
            )

    @override
    def build(
        self, make: ParameterMaker, *, residual_gain: float, dtype: jnp.dtype, key: PathKey
    ) -> "MixtureOfExperts":
        return MixtureOfExperts(self, make, residual_gain=residual_gain, dtype=dtype, key=key)


KERNEL_AXES = {
    "gate": ("experts", "embed", "mlp"),
    "up": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
}


class MixtureOfExperts(nnx.Module):
    """[B, T, E] -> [B, T, E], each position by itself."""

    def __init__(
        self,
        config: MixtureOfExpertsConfig,
        make: ParameterMaker,
        *,
        residual_gain: float,
        dtype: jnp.dtype,
        key: PathKey,
    ):
        sizes = {"experts": config.num_experts, "embed": make.width, "mlp": config.hidden}

        def kernel(name: str, gain: float = 1.0) -> nnx.Param:
            count, inputs, outputs = (((axis, sizes[axis]),) for axis in KERNEL_AXES[name])
            share = config.experts_per_token / config.num_experts
            return make.matrix(key.at(name), inputs, outputs, gain=gain, count=count, share=share, used_as=dtype)

        gate = {"gate": kernel("gate")} if config.gated else {}
        self.experts = nnx.Dict(gate | {"up": kernel("up"), "down": kernel("down", residual_gain)})
        embed = (("embed", make.width),)
        self.router = make.readout(key.at("router"), embed, ((None, config.num_experts),))
        self.shared = (
            config.shared.build(make, residual_gain=residual_gain, dtype=dtype, key=key.at("shared"))
            if config.shared
            else None
        )
        self.shared_gate = make.readout(key.at("shared_gate"), embed, ()) if config.shared_gate else None
        self.config = config
        self.dtype = dtype
        self.multiplier = 1.0 / make.parametrization.width_ratio(make.width)

    def __call__(
        self, x: jax.Array, context: Context, *, present: jax.Array | None = None
    ) -> tuple[jax.Array, SideValues]:
        """See `FeedForwardLayer`. Experts give 0 for padding; the shared layer does not ask.

        Side values: losses "router_balance" and "router_z"; metrics "router/load", how many choices fell on the busiest
        expert over the mean, and "router/entropy" of the normalised scores, in nats, at most log(X).
        """
        present = jnp.ones(x.shape[:2], bool) if present is None else present
        logits = jnp.where(present[..., None], self._logits(x, context), 0.0)  # whatever padding holds
        if self.config.scoring is Scoring.SOFTMAX:
            scores = shares = jax.nn.softmax(logits)
        else:
            scores = jax.nn.sigmoid(logits)
            shares = scores / scores.sum(-1, keepdims=True)
        weights, chosen = highest(scores, self.config.experts_per_token)
        if self.config.normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        chosen = jnp.where(present[..., None], chosen, self.config.num_experts)
        kernels = {name: kernel[...].astype(self.dtype) for name, kernel in self.experts.items()}
        out = context.ops.through_experts(self._apply, kernels, KERNEL_AXES, x, chosen, weights * self.config.scale)
        side = self._side_values(logits, shares, chosen, present)
        if self.shared is not None:
            shared, more = self.shared(x, context.fold("shared"), present=present)
            if self.shared_gate is not None:
                weight = self.config.shared_gate(self._in_full(x, self.shared_gate[..., None], context))
                shared = shared * weight.astype(shared.dtype)
            out, side = out + shared, side + more
        return out, side

    def _logits(self, x: jax.Array, context: Context) -> jax.Array:
        """f32 [B, T, X]."""
        return self._in_full(x, self.router[...], context)

    def _in_full(self, x: jax.Array, kernel: jax.Array, context: Context) -> jax.Array:
        """x times [E, N] as f32 [B, T, N], of products in full float32, which is not every device's default."""
        with jax.default_matmul_precision("float32"):
            logits = context.matmul(x.astype(jnp.float32), kernel, 1)
        return context.ops.constrain(logits, ("batch", "length", None)) * self.multiplier

    def _apply(self, rows: jax.Array, kernels: dict[str, jax.Array], group_sizes: jax.Array) -> jax.Array:
        def times(y: jax.Array, name: str) -> jax.Array:
            return grouped_matmul(y, kernels[name], group_sizes, backend=self.config.backend)

        hidden, activation = name_activation(times(rows, "up"), "up"), self.config.activation
        if self.config.gated:
            hidden = activation(name_activation(times(rows, "gate"), "gate")) * hidden
        else:
            hidden = activation(hidden)
        return times(hidden, "down")

    def _side_values(self, logits: jax.Array, shares: jax.Array, chosen: jax.Array, present: jax.Array) -> SideValues:
        config, axes = self.config, (0, 1)
        mask = present.astype(jnp.float32)
        tokens = mask.sum()
        some = jnp.maximum(tokens, 1.0)
        experts = jnp.arange(config.num_experts)
        counts = jnp.sum(chosen[..., None] == experts, (0, 1, 2), dtype=jnp.float32)
        losses = {}
        if config.balance_loss:
            # f_e P_e of means over tokens; the side value is a sum over tokens.
            agreement = jnp.sum(counts * jnp.sum(shares * mask[..., None], axes))
            scale = config.balance_loss * config.num_experts / config.experts_per_token
            losses["router_balance"] = scale * agreement / some
        if config.z_loss:
            losses["router_z"] = config.z_loss * jnp.sum(mask * jax.nn.logsumexp(logits, -1) ** 2)
        entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares), -1)
        load = counts.max() * config.num_experts / (config.experts_per_token * some)
        some_tokens = (tokens > 0).astype(jnp.float32)
        return SideValues(
            losses, {"router/load": (load, some_tokens), "router/entropy": (jnp.sum(mask * entropy), tokens)}
        )


def highest(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The highest scores and their places, [..., X] -> [..., count] and int32; the first of equal ones.

    As `jax.lax.top_k`, for which GSPMD would gather the scores of all tokens on every device.
    """
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    left = jax.lax.stop_gradient(scores)
    found = []
    for _ in range(count):
        place = jnp.argmax(left, -1).astype(jnp.int32)
        hit = places == place[..., None]
        found.append((jnp.sum(jnp.where(hit, scores, 0.0), -1), place))
        left = jnp.where(hit, -jnp.inf, left)
    values, chosen = zip(*found)
    return jnp.stack(values, -1), jnp.stack(chosen, -1)
