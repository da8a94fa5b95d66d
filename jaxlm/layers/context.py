"""Context: what a layer needs of the outside world. The operations of the mesh, and the dropout key."""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, override

import jax
import jax.numpy as jnp

from jaxlm.layers.quantized import Quantization, quantized_matmul
from jaxlm.layers.remat import name_activation
from jaxlm.parallel.experts import Apply, Kernels, through_experts
from jaxlm.parallel.pipeline import Layer, StackedLayers, run_in_sequence
from pallas_kernels import dropout, platforms
from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import OutputProjection, TokenScores, cross_entropy, token_scores
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.selective_scan import selective_scan


class Ops(Protocol):
    """Operations whose implementation depends on the mesh: `LocalOps`, `jaxlm.parallel.sharded_ops.ShardedOps`.

    Attributes:
      splits_length: whether rows are spread over devices along their length (sequence parallelism).

    Such rows may lie on the mesh in another order than they were read in. Hidden states are in the mesh's order;
    masks, biases, labels and scores of tokens in the rows' own.
    """

    splits_length: bool = False

    def arrange(self, x: jax.Array) -> jax.Array:
        """[B, T, ...], of the rows' own order, in the mesh's."""

    def restore(self, x: jax.Array) -> jax.Array:
        """The reverse of `arrange`."""

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        """`pallas_kernels.attention.attention`."""

    def linear_attention(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        log_decay: jax.Array | None,
        *,
        segment_ids: jax.Array | None = None,
        initial_state: jax.Array | None = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """`pallas_kernels.linear_attention.linear_attention`."""

    def selective_scan(
        self,
        x: jax.Array,
        dt: jax.Array,
        a: jax.Array,
        b: jax.Array,
        c: jax.Array,
        d: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        initial_state: jax.Array | None = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """`pallas_kernels.selective_scan.selective_scan`."""

    def cross_entropy(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array, **options: Any
    ) -> tuple[jax.Array, TokenScores]:
        """`pallas_kernels.cross_entropy.cross_entropy` of features [B, T, E], labels and weights [B, T]."""

    def token_scores(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, **options: Any
    ) -> TokenScores:
        """`pallas_kernels.cross_entropy.token_scores` of features [B, T, E], labels [B, T]."""

    def through_experts(
        self,
        apply: Apply,
        kernels: Kernels,
        axes: Mapping[str, tuple[str, ...]],
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
    ) -> jax.Array:
        """The weighted sum of what its experts make of each token; none is dropped.

        Args:
          apply: what experts do, see `jaxlm.parallel.experts.Apply`.
          kernels: matrices by name, each with a leading axis over experts.
          axes: their logical axes: "experts", "embed" and "mlp" in any order after the first.
          x: [B, T, E].
          chosen: int32 [B, T, K], different experts for a token; the number of experts chooses none.
          weights: float32 [B, T, K].

        Returns:
          [B, T, E].
        """

    def constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """`x`, laid out as its logical axis names say."""

    def parameter(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """A layer's parameter `x`, of whose gradient each device is to get the piece that it stores."""

    def row_numbers(self, count: int) -> jax.Array:
        """int32 [count]: which rows of the whole batch a layer is given (in a pipeline, those of a microbatch)."""

    def run_layers(
        self, layer: Layer, layers: StackedLayers, x: jax.Array, rows: Any, shared: Any
    ) -> tuple[jax.Array, Any]:
        """The repeats of a stack one after the other; see `jaxlm.parallel.pipeline.run_in_stages`."""


class LocalOps(Ops):
    """Operations on one device."""

    @override
    def arrange(self, x: jax.Array) -> jax.Array:
        return x

    @override
    def restore(self, x: jax.Array) -> jax.Array:
        return x

    @override
    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        return attention(q, k, v, **options)

    @override
    def linear_attention(
        self, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        return linear_attention(q, k, v, log_decay, **options)

    @override
    def selective_scan(
        self, x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        return selective_scan(x, dt, a, b, c, d, **options)

    @override
    def cross_entropy(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array, **options: Any
    ) -> tuple[jax.Array, TokenScores]:
        return cross_entropy(features, projection, labels, weights, **options)

    @override
    def token_scores(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, **options: Any
    ) -> TokenScores:
        return token_scores(features, projection, labels, **options)

    @override
    def through_experts(
        self,
        apply: Apply,
        kernels: Kernels,
        axes: Mapping[str, tuple[str, ...]],
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
    ) -> jax.Array:
        return through_experts(apply, kernels, x, chosen, weights)

    @override
    def constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return x

    @override
    def parameter(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return x

    @override
    def row_numbers(self, count: int) -> jax.Array:
        return jnp.arange(count, dtype=jnp.int32)

    @override
    def run_layers(
        self, layer: Layer, layers: StackedLayers, x: jax.Array, rows: Any, shared: Any
    ) -> tuple[jax.Array, Any]:
        return run_in_sequence(layer, layers, x, rows, shared, ops=self)


@dataclasses.dataclass(frozen=True)
class Context:
    """Passed down through every layer's call.

    Attributes:
      ops: see `Ops`.
      dropout_key: jax key, or None: deterministic, no dropout.
      quantization: how products of bfloat16 operands are taken inside the stacks; None takes them as they are. A layer
        that wants a product in full, such as a router, gives it float32 operands.
    """

    ops: Ops = LocalOps()
    dropout_key: jax.Array | None = None
    quantization: Quantization | None = None

    def fold(self, where: int | jax.Array | str) -> "Context":
        """A context for a part of the model, with a key of its own; `where` may be traced (a layer's index)."""
        if self.dropout_key is None:
            return self
        index = zlib.crc32(where.encode()) if isinstance(where, str) else where
        return dataclasses.replace(self, dropout_key=jax.random.fold_in(self.dropout_key, index))

    def dropout(self, x: jax.Array, rate: float) -> jax.Array:
        """`x` [B, T, ...] with a share `rate` of its entries set to 0 and the rest grown by 1 / (1 - rate)."""
        if self.dropout_key is None or rate == 0.0:
            return x
        batch, length, *rest = jnp.indices(x.shape, sparse=True)
        batch = self.ops.row_numbers(len(x)).reshape(batch.shape)
        return self._dropped(x, (batch, self.ops.arrange(length), *rest), rate)

    def table_dropout(self, x: jax.Array, rate: float) -> jax.Array:
        """As `dropout`, of an array of any shape that all rows of the batch share."""
        if self.dropout_key is None or rate == 0.0:
            return x
        return self._dropped(x, jnp.indices(x.shape, sparse=True), rate)

    def _dropped(self, x: jax.Array, indices: Iterable[jax.Array], rate: float) -> jax.Array:
        kept = dropout.keep_entries(dropout.seed_of(self.dropout_key), indices, rate)
        return jnp.where(kept, x / (1.0 - rate), 0)

    def matmul(self, x: jax.Array, kernel: jax.Array, contracted: int, *, result: Any = None) -> jax.Array:
        """x times kernel over x's last and kernel's first `contracted` axes.

        All other axes of x become one, tokens, if they can. They cannot where rows are spread along their length:
        tokens would have to move. On a CPU the kernel's axes become two as well: XLA's CPU backend then takes a third
        less time for a training step, since it transposes operands of more axes before it multiplies them for
        gradients. Elsewhere they stay: behind a reshape XLA no longer sees that a kernel gathered for the forward
        pass serves the backward pass too, and gathers it again.

        Args:
          x: [*tokens, *inputs].
          kernel: [*inputs, *outputs].
          contracted: number of input axes.
          result: type of the result; None is that of the operands.

        Returns:
          [*tokens, *outputs].
        """
        if self.quantization is not None and x.dtype == kernel.dtype == jnp.bfloat16:
            return name_activation(quantized_matmul(x, kernel, contracted, self.quantization), "product")
        if self.ops.splits_length:
            axes = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted)))
            return jax.lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=result)
        tokens, outputs = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
        if platforms.current().kind == "cpu":
            x = x.reshape(math.prod(tokens), -1)
            kernel = kernel.reshape(x.shape[1], math.prod(outputs))
            return jnp.matmul(x, kernel, preferred_element_type=result).reshape(*tokens, *outputs)
        x = x.reshape(math.prod(tokens), *kernel.shape[:contracted])
        axes = (tuple(range(1, 1 + contracted)), tuple(range(contracted)))
        product = jax.lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=result)
        return product.reshape(*tokens, *outputs)


LOCAL = Context()  # one device, no dropout
