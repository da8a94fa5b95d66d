"""The floor of a planned step: a 1.1B decoder's training step on a pod, by hand in pure JAX, and nothing else.

Width 2048, 16 layers, 16 heads of 128, SwiGLU 7168, vocabulary 32000; bfloat16 compute over float32 parameters and
AdamW's moments, all split over one axis of devices (ZeRO-3). Attention is jax's own splash kernel under `shard_map`;
each layer is recomputed in the backward pass; the logits of a device's tokens exist whole. `benchmarks/plan.py`
compiles it beside jaxlm's step.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "fsdp"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the program, in the letters used below."""

    layers: int = 16  # L
    embed: int = 2048  # E
    heads: int = 16  # H
    head_dim: int = 128  # D
    mlp: int = 7168  # F
    vocab: int = 32000  # V
    length: int = 2048  # T
    batch: int = 64  # B, of all devices
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    attention_block: int = 512


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Loshchilov and Hutter 2019, arXiv 1711.05101, with the decay scaled by the learning rate; matrices decay."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1


class State(NamedTuple):
    """What a step takes and gives: count of updates, parameters, AdamW's two moments."""

    step: Any
    params: Any
    mean: Any
    square: Any


def parameters(shape: Shape) -> dict[str, Any]:
    """{name: (dimensions, which of them is split)}, layers stacked on a leading axis L."""
    layers, embed, mlp, width = shape.layers, shape.embed, shape.mlp, shape.heads * shape.head_dim
    return {
        "embedding": ((shape.vocab, embed), 1),
        "layers": {
            "attention_norm": ((layers, embed), 1),
            "query": ((layers, embed, width), 1),
            "key": ((layers, embed, width), 1),
            "value": ((layers, embed, width), 1),
            "out": ((layers, width, embed), 2),
            "mlp_norm": ((layers, embed), 1),
            "gate": ((layers, embed, mlp), 1),
            "up": ((layers, embed, mlp), 1),
            "down": ((layers, mlp, embed), 2),
        },
        "norm": ((embed,), 0),
        "head": ((embed, shape.vocab), 0),
    }


def abstract_arguments(shape: Shape, mesh: Mesh) -> tuple[State, dict[str, jax.ShapeDtypeStruct]]:
    """State and batch as shapes with shardings."""

    def struct(dims: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    params = jax.tree.map(
        lambda entry: struct(entry[0], jnp.float32, *[None] * entry[1], AXIS),
        parameters(shape),
        is_leaf=lambda entry: isinstance(entry, tuple),
    )
    rows = (shape.batch, shape.length)
    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_segment_ids", "decoder_positions")
    batch = {name: struct(rows, jnp.int32, AXIS) for name in names}
    batch["decoder_loss_weights"] = struct(rows, jnp.float32, AXIS)
    return State(struct((), jnp.int32), params, params, params), batch


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon) * scale).astype(x.dtype)


def _rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates the halves of each head; x [B, T, H, D], sin and cos [B, T, 1, D/2]."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(shape: Shape, mesh: Mesh):
    """(q, k, v [B, H, T, D], segment ids [B, T]) -> [B, H, T, D], each device on its own rows."""
    block, length = shape.attention_block, shape.length
    sizes = splash_attention_kernel.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"), block),
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * shape.heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)
    rows = PartitionSpec(AXIS)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)
    def attention(q, k, v, ids):
        return jax.vmap(kernel)(q, k, v, splash_attention_kernel.SegmentIds(ids, ids))

    return attention


def loss_fn(params: dict[str, Any], batch: dict[str, jax.Array], shape: Shape, mesh: Mesh) -> jax.Array:
    """Mean cross-entropy in nats a token."""
    h, d = shape.heads, shape.head_dim
    attention = _attention(shape, mesh)
    positions, bf16 = batch["decoder_positions"], jnp.bfloat16
    frequencies = shape.rope_base ** (-jnp.arange(0, d, 2) / d)
    angles = (positions[..., None] * frequencies)[:, :, None]  # [B, T, 1, D/2]
    sin, cos = jnp.sin(angles).astype(bf16), jnp.cos(angles).astype(bf16)

    def split(x):  # by rows
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(AXIS)))

    @jax.checkpoint
    def block(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:  # x [B, T, E]
        b, t, _ = x.shape
        p = {name: value if name.endswith("norm") else value.astype(bf16) for name, value in p.items()}
        y = _rms_norm(x, p["attention_norm"], shape.norm_epsilon)
        q, k, v = (split((y @ p[name]).reshape(b, t, h, d)) for name in ("query", "key", "value"))
        q, k = _rope(q, sin, cos) * d**-0.5, _rope(k, sin, cos)
        out = attention(*(z.swapaxes(1, 2) for z in (q, k, v)), batch["decoder_segment_ids"])
        x = split(x + out.swapaxes(1, 2).reshape(b, t, h * d) @ p["out"])
        y = _rms_norm(x, p["mlp_norm"], shape.norm_epsilon)
        hidden = split(jax.nn.silu(y @ p["gate"]) * (y @ p["up"]))
        return split(x + hidden @ p["down"]), None

    x = split(params["embedding"].astype(bf16)[batch["decoder_input_tokens"]])
    x, _ = jax.lax.scan(block, x, params["layers"])
    x = _rms_norm(x, params["norm"], shape.norm_epsilon)
    logits = split(jnp.matmul(x, params["head"].astype(bf16), preferred_element_type=jnp.float32))  # [B, T, V]
    picked = jnp.take_along_axis(logits, batch["decoder_target_tokens"][..., None], axis=-1)[..., 0]
    weights = batch["decoder_loss_weights"]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights) / jnp.sum(weights)


def make_step(shape: Shape, adamw: AdamW, mesh: Mesh):
    """jitted (state, batch) -> (state, loss), state donated."""
    places = jax.tree.map(lambda x: x.sharding, abstract_arguments(shape, mesh)[0])

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, shape, mesh)
        count = state.step + 1
        mean = jax.tree.map(lambda m, g: adamw.b1 * m + (1 - adamw.b1) * g, state.mean, grads)
        square = jax.tree.map(lambda s, g: adamw.b2 * s + (1 - adamw.b2) * g * g, state.square, grads)

        def update(path: tuple, p: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
            m, s = m / (1 - adamw.b1**count), s / (1 - adamw.b2**count)
            decay = 0.0 if "norm" in path[-1].key or path[-1].key == "embedding" else adamw.weight_decay
            return p - adamw.learning_rate * (m / (jnp.sqrt(s) + adamw.epsilon) + decay * p)

        params = jax.tree_util.tree_map_with_path(update, state.params, mean, square)
        return State(count, params, mean, square), loss

    return jax.jit(step, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, PartitionSpec())))
