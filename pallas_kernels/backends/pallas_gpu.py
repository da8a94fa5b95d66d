"""Our own kernels for Hopper GPUs: every mask made of key intervals, skipping what it hides."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.biases import Bias
from pallas_kernels.fused import Inputs, fused_attention, fused_gradients, inputs_of
from pallas_kernels.gpu.attention_backward import Saved, key_value_gradients, query_gradient
from pallas_kernels.gpu.attention_forward import forward
from pallas_kernels.gpu.blocks import Blocks, blocks_of
from pallas_kernels.gpu.diagonal_gradient import diagonal_gradient
from pallas_kernels.requests import Backend, Request

_CHIPS = ("h100", "h200")
_SIZES = (64, 128, 256)
_TYPES = (jnp.bfloat16, jnp.float16)
_BLOCK = 64


class PallasGpuBackend(Backend):
    """On a CPU the kernels run in jax's interpreter, slowly; `auto` never takes them there."""

    name = "pallas_gpu"

    @override
    def refuses(self, request: Request) -> list[str]:
        reasons = []
        platform = platforms.current()
        if platform.kind != "cpu" and platform.chip not in _CHIPS:
            reasons.append(f"it runs on Hopper GPUs ({', '.join(_CHIPS)}), not on {platform.chip}")
        if request.dtype not in _TYPES:
            reasons.append(f"q is {request.dtype}, and its matrix products take bfloat16 or float16")
        for name, size in (("q and k", request.q_shape[-1]), ("v", request.v_shape[-1])):
            if size not in _SIZES:
                reasons.append(f"the head size of {name} is {size}, not one of {', '.join(map(str, _SIZES))}")
        if request.mask.intervals is None:
            reasons.append(f"the mask {request.mask} is not made of key intervals")
        sparse = request.mask.block_sparse
        if sparse is not None and any(side % _BLOCK for side in sparse.block):
            reasons.append(f"BlockSparse.block={sparse.block} is not in multiples of {_BLOCK}")
        return reasons

    @override
    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, jax.Array]:
        return fused_attention(_HopperKernels(), q, k, v, inputs_of(request))

    @override
    def gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        request: Request,
        lse: jax.Array,
        delta: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Bias | None]:
        return fused_gradients(_HopperKernels(), q, k, v, request, lse, delta, gradient)


@dataclasses.dataclass(frozen=True)
class _HopperKernels:
    """`fused.Kernels`."""

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        return forward(q, k, v, inputs, _blocks(q, v, inputs).forward, platforms.gpu_interpret())

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        inputs: Inputs,
        lse: jax.Array,
        delta: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
        saved = Saved(q, k, v, inputs, lse, delta, gradient)
        blocks, interpret = _blocks(q, v, inputs), platforms.gpu_interpret()
        dq, d_dense = query_gradient(saved, blocks.query_gradient, interpret)
        dk, dv = key_value_gradients(saved, blocks.key_value_gradients, interpret)
        d_diagonals = None if inputs.diagonals is None else diagonal_gradient(saved, interpret)
        if d_dense is not None:
            d_dense = _sum_to(d_dense, inputs.dense_bias)
        return dq, dk, dv, d_diagonals, d_dense


def _blocks(q: jax.Array, v: jax.Array, inputs: Inputs) -> Blocks:
    sparse = None if inputs.block_sparse is None else inputs.block_sparse.block
    elaborate = inputs.soft_cap is not None or inputs.slopes is not None
    return blocks_of(q.shape[-1], v.shape[-1], elaborate, sparse)


def _sum_to(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """The gradient of an array that was broadcast to the gradient's shape."""
    shape = (1,) * (gradient.ndim - like.ndim) + like.shape
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return gradient.sum(axis=axes, keepdims=True).reshape(like.shape).astype(like.dtype)
