"""Attention on TPUs: plans, parts and block sizes around the two kernels."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.fused import Inputs
from pallas_kernels.masks import BlockSparse
from pallas_kernels.plans import HIDDEN, Plan, plan_of_rows
from pallas_kernels.requests import Request
from pallas_kernels.tpu import block_sizes, schedule
from pallas_kernels.tpu.attention_backward import backward
from pallas_kernels.tpu.attention_forward import forward
from pallas_kernels.tpu.block_sizes import Blocks
from pallas_kernels.tpu.operands import Sizes
from pallas_kernels.tpu.schedule import Listed, Walk, Whole


@dataclasses.dataclass(frozen=True)
class TpuKernels:
    """`pallas_kernels.fused.Kernels` on TPUs.

    Attributes:
      forward_blocks, backward_blocks: sizes of blocks; None takes them from the table.
    """

    forward_blocks: Blocks | None = None
    backward_blocks: Blocks | None = None

    def refuses(self, request: Request) -> list[str]:
        return []

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        sizes = _sizes(q, k, v, inputs, self.forward_blocks or Blocks(1024, 1024, 512))
        return forward(q, k, v, inputs, _walk(inputs, sizes, group=1), sizes)

    def backward(self, q, k, v, inputs, lse, delta, gradient):
        sizes = _sizes(q, k, v, inputs, self.backward_blocks or Blocks(1024, 1024, 512))
        walk = _walk(inputs, sizes, group=sizes.group)
        found = backward(q, k, v, inputs, lse, delta, gradient, walk, sizes, 0, sizes.key_blocks)
        dk, dv = (found[name][:, : sizes.keys] for name in ("dk", "dv"))
        d_dense = found.get("dense_bias")
        if d_dense is not None:
            d_dense = _summed(d_dense[..., : sizes.keys], inputs.dense_bias)
        return found["dq"], dk, dv, found.get("diagonals"), d_dense


def _sizes(q, k, v, inputs: Inputs, wanted: Blocks) -> Sizes:
    within = None if inputs.block_sparse is None else inputs.block_sparse.block
    return Sizes.of(q, k, v, block_sizes.fitted(wanted, q.shape[1], k.shape[1], within))


def _walk(inputs: Inputs, sizes: Sizes, group: int) -> Walk:
    blocks = sizes.blocks
    if inputs.block_sparse is None and sizes.query_blocks * sizes.key_blocks == 1:
        return Whole((sizes.batch, sizes.heads // group, group, 1, 1), masked=True)
    plan = plan_of_rows(inputs.rows, sizes.keys, (blocks.queries, blocks.keys))
    if inputs.block_sparse is not None:
        shown = inputs.block_sparse.map(sizes.queries, sizes.keys, blocks.queries, blocks.keys)
        plan = dataclasses.replace(plan, state=jnp.where(shown, plan.state, HIDDEN))
    return schedule.listed(plan, sizes.batch, sizes.heads, group)


def _summed(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """`gradient` summed over the axes along which `like` was broadcast, in its shape and type."""
    shape = (1,) * (gradient.ndim - like.ndim) + like.shape
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return gradient.sum(axes, keepdims=True).reshape(like.shape).astype(like.dtype)
