"""A tiny model with the contract of `LanguageModel`, and an objective for it, so that these tests compile fast."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.layers.side_values import SideValues
from jaxlm.layers.stacking import StackLayout
from jaxlm.objectives.base import Objective

VOCABULARY, LENGTH = 32, 8


def param(key, shape, axes, role, std=0.1):
    return nnx.Param(std * jax.random.normal(key, shape), axes=axes, role=role)


class TinyModel(nnx.Module):
    """Embedding, layers of (shift by one, matrix, gelu, matrix) under two patterns, norm scale, head."""

    def __init__(self, key, *, width=16, layers=4, scan=False, dropout=0.0):
        self.scan, self.layers_count, self.dropout = scan, layers, dropout
        self.layouts = (StackLayout(("decoder",), 2, layers // 2),) if scan else ()
        names = ("wi", "wo", "bias")

        def layer(i):
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            return (
                0.1 * jax.random.normal(keys[0], (width, 2, width)),
                0.1 * jax.random.normal(keys[1], (2, width, width)),
                0.1 * jax.random.normal(keys[2], (width,)),
            )

        axes = (("embed", "heads", "head_dim"), ("heads", "head_dim", "embed"), ("embed",))
        roles = ("hidden", "hidden", "vector")

        def block(values, lead):
            return nnx.Dict(
                {
                    n: nnx.Param(v, axes=(*lead, *a), role=r)
                    for n, v, a, r in zip(names, values, axes, roles, strict=True)
                }
            )

        if scan:
            stacked = [
                jax.tree.map(lambda *x: jnp.stack(x), *(layer(2 * r + p) for r in range(layers // 2))) for p in range(2)
            ]
            blocks = {str(p): block(values, ("layers",)) for p, values in enumerate(stacked)}
        else:
            blocks = {str(i): block(layer(i), ()) for i in range(layers)}
        self.decoder = nnx.Dict(layers=nnx.Dict(blocks))
        keys = jax.random.split(jax.random.fold_in(key, 1000), 3)
        self.embedding = param(keys[0], (VOCABULARY, width), ("vocab", "embed"), "input", 1.0)
        self.scale = nnx.Param(jnp.ones((width,)), axes=("embed",), role="vector")
        self.output = param(keys[1], (width, VOCABULARY), ("embed", "vocab"), "output", 0.2)

    def hidden_states(self, batch, *, context):
        x = self.embedding[...][batch["decoder_input_tokens"]]  # [B, T, E]
        x = context.ops.constrain(x, ("batch", "length", "embed"))
        for i in range(self.layers_count):
            if self.scan:
                block = {n: v[...][i // 2] for n, v in self.decoder["layers"][str(i % 2)].items()}
            else:
                block = {n: v[...] for n, v in self.decoder["layers"][str(i)].items()}
            shifted = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            y = jnp.einsum("bte,ehd->bthd", x + shifted, block["wi"])
            y = context.ops.constrain(y, ("batch", "length", "heads", None))
            y = jnp.einsum("bthd,hde->bte", jax.nn.gelu(y), block["wo"]) + block["bias"]
            x = x + context.fold(i).dropout(y, self.dropout)
        squares = jnp.square(x).sum(-1) * (batch["decoder_segment_ids"] > 0)
        return x * self.scale[...], SideValues({"size": 1e-3 * squares.sum()}, {"largest": (squares.max(), 1.0)})

    def head(self, hidden):
        return (hidden @ self.output[...]).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TinyObjective(Objective):
    """Next-token cross-entropy."""

    @property
    def name(self):
        return "tiny"

    def raw_length(self, lengths, architecture):
        return lengths["targets"]

    def corrupt(self, example, vocabulary, rng, *, step=0):
        raise NotImplementedError

    def loss_weights(self, batch):
        return {"cross_entropy": batch["decoder_loss_weights"].sum()}

    def loss_sums(self, model, batch, *, context, config):
        hidden, side = model.hidden_states(batch, context=context)
        logits = model.head(hidden)
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        total = (nats * weights).sum()
        return {"cross_entropy": total}, {"nats": (total, weights.sum())}, side


def make_batch(seed=0, size=8, dtype=np.int32):
    """A learnable batch: each token is the one before plus one, with uneven weights from row to row."""
    rng = np.random.default_rng(seed)
    tokens = ((rng.integers(0, VOCABULARY, (size, 1)) + np.arange(LENGTH + 1)) % VOCABULARY).astype(dtype)
    weights = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (size, 1))).astype(np.float32)
    return {
        "decoder_input_tokens": tokens[:, :-1],
        "decoder_target_tokens": tokens[:, 1:],
        "decoder_loss_weights": weights,
        "decoder_segment_ids": (weights > 0).astype(dtype),
    }


@pytest.fixture(scope="session")
def tiny():
    """TinyModel, TinyObjective, make_batch and their sizes under one name."""
    return types.SimpleNamespace(
        Model=TinyModel, Objective=TinyObjective, batch=make_batch, vocabulary=VOCABULARY, length=LENGTH
    )
