"""OpenELM in numpy and float64, by its paper (arXiv 2404.14619), with the released folders' names.

transformers has no such class to compare with.
"""

import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxlm.checkpoints import naming
from jaxlm.checkpoints.huggingface.folder import HuggingFaceFolder, export
from jaxlm.models import build_model
from jaxlm.training.state import abstract_model

WIDTH, DIM, LAYERS, VOCABULARY, LENGTH = 32, 8, 3, 50, 24
CONFIG = {
    "model_type": "openelm",
    "architectures": ["OpenELMForCausalLM"],
    "vocab_size": VOCABULARY,
    "model_dim": WIDTH,
    "num_transformer_layers": LAYERS,
    "head_dim": DIM,
    "num_gqa_groups": 2,
    "num_query_heads": [2, 4, 4],
    "num_kv_heads": [1, 2, 2],
    "qkv_multipliers": [0.5, 1.0],
    "ffn_multipliers": [0.5, 1.25, 2.0],
    "ffn_dim_divisor": 8,
    "ffn_with_glu": True,
    "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "rope_freq_constant": 10000,
    "rope_max_length": 64,
    "max_context_length": 32,
}
HIDDEN = [16, 40, 64]


def tensors():
    """By the names of the released checkpoints."""
    rng = np.random.default_rng(0)
    shapes = {"token_embeddings.weight": (VOCABULARY, WIDTH), "norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        q, kv, hidden = CONFIG["num_query_heads"][i], CONFIG["num_kv_heads"][i], HIDDEN[i]
        shapes |= {
            f"layers.{i}.attn.qkv_proj.weight": ((q + 2 * kv) * DIM, WIDTH),
            f"layers.{i}.attn.out_proj.weight": (WIDTH, q * DIM),
            f"layers.{i}.attn.q_norm.weight": (DIM,),
            f"layers.{i}.attn.k_norm.weight": (DIM,),
            f"layers.{i}.ffn.proj_1.weight": (2 * hidden, WIDTH),
            f"layers.{i}.ffn.proj_2.weight": (WIDTH, hidden),
            f"layers.{i}.attn_norm.weight": (WIDTH,),
            f"layers.{i}.ffn_norm.weight": (WIDTH,),
        }
    draw = {name: 0.2 * rng.standard_normal(shape) + (len(shape) == 1) for name, shape in shapes.items()}
    return {f"transformer.{name}": value.astype(np.float32) for name, value in draw.items()}


def reference(weights, tokens):
    """Logits of [T] tokens by the paper: pre-norm, grouped queries, normalised and rotated, SwiGLU."""
    weights = {name.removeprefix("transformer."): value.astype(np.float64) for name, value in weights.items()}

    def normed(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}.weight"]

    def rotated(x):  # [H, T, D]
        angles = np.arange(len(tokens))[:, None] * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
        first, second = np.split(x, 2, axis=-1)
        sine, cosine = np.sin(angles), np.cos(angles)
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)

    x = weights["token_embeddings.weight"][tokens]
    hidden_keys = np.triu(np.ones((len(tokens), len(tokens)), bool), 1)
    for i in range(LAYERS):
        layer, heads, keys = f"layers.{i}", CONFIG["num_query_heads"][i], CONFIG["num_kv_heads"][i]
        qkv = (normed(x, f"{layer}.attn_norm") @ weights[f"{layer}.attn.qkv_proj.weight"].T).reshape(
            len(tokens), -1, DIM
        )
        q, k, v = np.split(qkv.swapaxes(0, 1), [heads, heads + keys])
        q, k = rotated(normed(q, f"{layer}.attn.q_norm")), rotated(normed(k, f"{layer}.attn.k_norm"))
        k, v = np.repeat(k, heads // keys, 0), np.repeat(v, heads // keys, 0)
        scores = np.where(hidden_keys, -np.inf, q @ k.swapaxes(1, 2) / np.sqrt(DIM))
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        found = (shares / shares.sum(-1, keepdims=True)) @ v
        x = x + found.swapaxes(0, 1).reshape(len(tokens), -1) @ weights[f"{layer}.attn.out_proj.weight"].T
        gate, up = np.split(normed(x, f"{layer}.ffn_norm") @ weights[f"{layer}.ffn.proj_1.weight"].T, 2, -1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{layer}.ffn.proj_2.weight"].T
    return normed(x, "norm") @ weights["token_embeddings.weight"].T


def written(folder: pathlib.Path, **changes) -> pathlib.Path:
    """The folder, with the model in it; `changes` of its configuration."""
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def loaded(folder: HuggingFaceFolder):
    """Its model's definition and parameters, layers not stacked."""
    definition, abstract, _ = abstract_model(lambda key: build_model(folder.config, key=key))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    return definition, folder.load(target, definition.layouts)


def difference(folder: HuggingFaceFolder) -> float:
    """Of our logits, over the largest of the reference."""
    definition, params = loaded(folder)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, LENGTH)
    batch = {
        "decoder_input_tokens": tokens[None],
        "decoder_segment_ids": np.ones((1, LENGTH), np.int32),
        "decoder_positions": np.arange(LENGTH)[None],
    }

    @jax.jit
    def logits(params, batch):
        model = definition.merge(params)
        return model.head(model.hidden_states(batch)[0])

    expected = reference(tensors(), tokens)
    return float(np.abs(logits(params, batch)[0] - expected).max() / np.abs(expected).max())


def comes_back(folder: HuggingFaceFolder, to: pathlib.Path) -> bool:
    """Whether its parameters, exported again, are the same tensors."""
    _, params = loaded(folder)
    values = {naming.show(path): np.asarray(value) for path, value in naming.flatten(params).items()}
    export(to, folder.config, {path: value.shape for path, value in values.items()}, values.__getitem__)
    after = load_file(to / "model.safetensors")
    same = [np.array_equal(value, after.get(name)) for name, value in tensors().items()]
    return all(same) and after.keys() == tensors().keys()
