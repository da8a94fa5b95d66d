"""Attention on TPUs: block sizes, plans and parts around the two kernels."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.fused import Inputs, fused_attention
from pallas_kernels.plans import HIDDEN, Plan, plan_of_rows
from pallas_kernels.requests import Request
from pallas_kernels.tpu import block_sizes, schedule
from pallas_kernels.tpu.attention_backward import backward
from pallas_kernels.tpu.attention_forward import forward
from pallas_kernels.tpu.block_sizes import Blocks
from pallas_kernels.tpu.operands import Sizes
from pallas_kernels.tpu.schedule import Walk, Whole
from pallas_kernels.tpu.scores import LANES


@dataclasses.dataclass(frozen=True)
class TpuKernels:
    """`pallas_kernels.fused.Kernels` on TPUs.

    Attributes:
      forward_blocks, backward_blocks: sizes of blocks; None takes them from the table.
    """

    forward_blocks: Blocks | None = None
    backward_blocks: Blocks | None = None

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """See `pallas_kernels.fused.Kernels`."""
        sizes = self._forward_sizes(q, k, v, _sparse_block(inputs))
        return forward(q, k, v, inputs, _walks(inputs, sizes, group=1)(0), sizes)

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
        """See `pallas_kernels.fused.Kernels`."""
        sizes = self._backward_sizes(q, k, v, _sparse_block(inputs))
        walk = _walks(inputs, sizes, group=sizes.group)

        def of_part(part):
            return backward(q, k, v, inputs, lse, delta, gradient, walk(part), sizes, part * sizes.part_blocks)

        if sizes.key_parts == 1:
            found = of_part(0)
        else:
            found = _joined(of_part, sizes)
        dk, dv = (found[name][:, : sizes.keys] for name in ("dk", "dv"))
        d_dense = found.get("dense_bias")
        if d_dense is not None:
            d_dense = _summed(d_dense[..., : sizes.keys], inputs.dense_bias)
        return found["dq"].astype(q.dtype), dk, dv, found.get("diagonals"), d_dense

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """`fused_attention` with these kernels, one part after the other where there can be no lists for all."""
        if not self.in_parts(q, k, v, inputs):
            return fused_attention(self, q, k, v, inputs)
        batch, why_not = q.shape[0], functools.partial(self._why_not_listed, q, k, v, inputs.block_sparse)
        by_heads, examples = why_not(1) is not None, 1
        if not by_heads:
            examples = next(n for n in range(batch, 0, -1) if batch % n == 0 and why_not(n) is None)
        return _in_parts(self, q, k, v, inputs, examples, by_heads)

    def in_parts(self, q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs) -> bool:
        """Whether there can be no lists for all examples, so that `attend` takes one part after the other."""
        sparse = inputs.block_sparse
        examples = max(inputs.rows.lo.shape[0], 1 if sparse is None else sparse.index.shape[0])
        return self._why_not_listed(q, k, v, sparse, examples) is not None

    def refuses(self, request: Request) -> list[str]:
        """See `pallas_kernels.requests.Backend`."""
        platform, mask, reasons = platforms.current(), request.mask, []
        if platform.kind == "gpu":
            reasons.append("it runs on TPUs, and interpreted on CPUs, not on a gpu")
        if platform.kind == "tpu" and platform.chip not in block_sizes.VMEM:
            reasons.append(f"it is made for {', '.join(block_sizes.VMEM)}, not for {platform.chip!r}")
        if request.dtype not in (jnp.bfloat16, jnp.float32):
            reasons.append(f"it computes in bfloat16 or float32, not in {request.dtype}")
        if mask.intervals is None:
            reasons.append(f"the mask {mask} is not made of key intervals")
            return reasons
        sparse = mask.block_sparse
        if sparse is not None and any(size % LANES for size in sparse.block):
            reasons.append(f"BlockSparse.block={sparse.block} is not in multiples of {LANES}")
            return reasons
        q, k, v = (
            jax.ShapeDtypeStruct(shape, request.dtype) for shape in (request.q_shape, request.k_shape, request.v_shape)
        )
        if why_not := self._why_not_listed(q, k, v, sparse, 1, one_key_head=True):
            reasons.append(f"even of one key head {why_not}: use larger blocks or shorter rows")
        return reasons

    def _forward_sizes(self, q, k, v, within: tuple[int, int] | None) -> Sizes:
        return self._sizes(q, k, v, within, self.forward_blocks or block_sizes.forward(*_facts(q, v)))

    def _backward_sizes(self, q, k, v, within: tuple[int, int] | None) -> Sizes:
        sizes = self._sizes(q, k, v, within, self.backward_blocks or block_sizes.backward(*_facts(q, v)))
        return sizes.in_parts(block_sizes.vmem(platforms.current().chip) // 2, q.dtype)

    def _sizes(self, q, k, v, within, wanted: Blocks) -> Sizes:
        return Sizes.of(q, k, v, block_sizes.fitted(wanted, q.shape[1], k.shape[1], within))

    def _why_not_listed(self, q, k, v, sparse, examples: int, one_key_head: bool = False) -> str | None:
        """Why one of the two kernels cannot have lists for so many examples; None if both can, or need none."""
        within = None if sparse is None else sparse.block
        sizes = self._forward_sizes(q, k, v, within), self._backward_sizes(q, k, v, within)
        for s, shared_heads in zip(sizes, (1, sizes[1].group)):
            if _needs_no_lists(sparse, s):
                continue
            per_head = sparse is not None and sparse.index.shape[1] > 1
            heads = shared_heads if not per_head else s.group if one_key_head else s.heads
            entries = examples * heads * s.query_blocks * min(s.part_blocks, _longest_row(sparse, s))
            why_not = schedule.why_not_listed(examples, heads, s.query_blocks, s.part_blocks, entries)
            if why_not is not None:
                return why_not
        return None


def _facts(q, v) -> tuple[str, int]:
    return platforms.current().chip, max(q.shape[3], v.shape[3])


def _sparse_block(inputs: Inputs) -> tuple[int, int] | None:
    return None if inputs.block_sparse is None else inputs.block_sparse.block


def _needs_no_lists(sparse, sizes: Sizes) -> bool:
    """Whether there is one block alone, with nothing to skip."""
    return sparse is None and sizes.query_blocks * sizes.key_blocks == 1


def _longest_row(sparse, sizes: Sizes) -> int:
    """How many blocks of keys a block of queries sees at most."""
    if sparse is None:
        return sizes.key_blocks
    return max(1, sparse.index.shape[-1] * (sparse.block[1] // sizes.blocks.keys))


def _walks(inputs: Inputs, sizes: Sizes, group: int) -> Callable[[jax.Array | int], Walk]:
    """From the number of a part of the keys to the walk over its blocks, with `group` query heads in a scope."""
    blocks, sparse = sizes.blocks, inputs.block_sparse
    unmasked = inputs.hides_nothing and sizes.keys == sizes.padded_keys
    if unmasked or _needs_no_lists(sparse, sizes):
        return lambda part: whole(sizes, group, masked=not unmasked)
    plan = plan_of_rows(inputs.rows, sizes.keys, (blocks.queries, blocks.keys))
    state = plan.state
    if sparse is not None:
        shown = sparse.map(sizes.queries, sizes.keys, blocks.queries, blocks.keys)
        state = jnp.where(shown, state, HIDDEN)
    state = jnp.pad(state, [(0, 0)] * 3 + [(0, sizes.key_blocks - state.shape[3])], constant_values=HIDDEN)
    most = state.shape[0] * max(state.shape[1], group) * sizes.query_blocks * _longest_row(sparse, sizes)

    def of_part(part):
        own = jax.lax.dynamic_slice_in_dim(state, part * sizes.part_blocks, sizes.part_blocks, axis=3)
        return schedule.listed(Plan(own, plan.block), sizes.batch, sizes.heads, group, most)

    return of_part


def whole(sizes: Sizes, group: int, masked: bool) -> Whole:
    """The walk over all blocks of a part, with `group` query heads in a scope."""
    counts = sizes.batch, sizes.heads // group, group, sizes.query_blocks, sizes.part_blocks
    return Whole(counts, masked)


def _joined(of_part: Callable[[jax.Array], dict[str, jax.Array]], sizes: Sizes) -> dict[str, jax.Array]:
    """Gradients of all keys, from those of each part: what belongs to keys is put together, the rest summed."""
    sums = [name for name in jax.eval_shape(of_part, jnp.int32(0)) if name in ("dq", "diagonals")]

    def add(totals, part):
        found = of_part(part)
        totals = {name: totals[name] + found.pop(name) for name in sums}
        return totals, found

    shapes = jax.eval_shape(of_part, jnp.int32(0))
    totals = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in sums}
    totals, parts = jax.lax.scan(add, totals, jnp.arange(sizes.key_parts))

    def put_together(name, x):
        x = jnp.moveaxis(x, 0, -2 if name == "dense_bias" else 1)  # beside the keys' axis
        axis = x.ndim - 2 if name == "dense_bias" else 1
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return totals | {name: put_together(name, x) for name, x in parts.items()}


def _in_parts(
    kernels: TpuKernels, q, k, v, inputs: Inputs, examples: int, by_heads: bool
) -> tuple[jax.Array, jax.Array]:
    """Attention for so many examples after the other, a divisor of all, or for one key head of them."""
    batch, tq, heads, _ = q.shape
    scopes = k.shape[2] if by_heads else 1
    group, parts = heads // scopes, batch // examples

    def cut(x):  # [parts * scopes, examples, T, heads, D]
        x = x.reshape(parts, examples, x.shape[1], scopes, -1, x.shape[3])
        return jnp.moveaxis(x, 3, 1).reshape(parts * scopes, examples, x.shape[2], -1, x.shape[5])

    def one(part):
        index, q, k, v = part
        example, head = index // scopes * examples, index % scopes * group
        return fused_attention(kernels, q, k, v, _part_of(inputs, example, examples, head, group))

    out, lse = jax.lax.map(one, (jnp.arange(parts * scopes), cut(q), cut(k), cut(v)))
    out = jnp.moveaxis(out.reshape(parts, scopes, examples, tq, group, -1), 1, 3).reshape(batch, tq, heads, -1)
    lse = jnp.moveaxis(lse.reshape(parts, scopes, examples, group, tq), 1, 2)
    return out, lse.reshape(batch, heads, tq)


def _part_of(inputs: Inputs, example: jax.Array, examples: int, head: jax.Array, heads: int) -> Inputs:
    """The inputs of `examples` examples from `example` on, and of `heads` heads from `head` on."""

    def cut(x, example_axis, head_axis):
        for axis, start, size in ((example_axis, example, examples), (head_axis, head, heads)):
            if axis is not None and x.shape[axis] > 1:
                x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        return x

    def cut_all(tree, example_axis, head_axis):
        return jax.tree.map(lambda x: cut(jnp.asarray(x), example_axis, head_axis), tree)

    dense = inputs.dense_bias
    if dense is not None:
        dense = cut(dense.reshape((1,) * (4 - dense.ndim) + dense.shape), 0, 1)
    origin = inputs.origin
    return dataclasses.replace(
        inputs,
        rows=cut_all(inputs.rows, 0, None),
        block_sparse=cut_all(inputs.block_sparse, 0, 1),
        slopes=cut_all(inputs.slopes, None, 0),
        diagonals=cut_all(inputs.diagonals, None, 0),
        dense_bias=dense,
        origin=origin._replace(batch=origin.batch + example, head=origin.head + head),
    )


def _summed(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """`gradient` summed over the axes along which `like` was broadcast, in its shape and type."""
    shape = (1,) * (gradient.ndim - like.ndim) + like.shape
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return gradient.sum(axes, keepdims=True).reshape(like.shape).astype(like.dtype)
