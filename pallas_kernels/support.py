"""Which backend of attention takes what, asked of the backends themselves.

python -m pallas_kernels.support      # prints the table of README.md; a test compares the two
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import masks
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.biases import AlibiBias, DenseBias, PlacedBias, RelativeBias
from pallas_kernels.requests import WHOLE, Request

_LENGTH, _HEADS = 1024, 8
_MACHINES = {
    "xla": ("tpu", "TPU v6 lite"),
    "xla_chunked": ("tpu", "TPU v6 lite"),
    "xla_blocks": ("tpu", "TPU v6 lite"),
    "pallas_tpu": ("tpu", "TPU v6 lite"),
    "splash": ("tpu", "TPU v6 lite"),
    "pallas_gpu": ("gpu", "NVIDIA H200"),
    "cudnn": ("gpu", "NVIDIA H200"),
    "tokamax": ("gpu", "NVIDIA H200"),
}


def table() -> str:
    """The table in Markdown: a row a feature, a column a backend; yes where the backend, on its machine, takes it.

    What a backend says of every call (that tokamax is not installed, that there is no GPU here) is left out.
    """
    features = _features()
    columns = {name: _answers(name, features) for name in _MACHINES}
    lines = [["", *(f"`{name}`" for name in _MACHINES)], ["---", *(["---"] * len(_MACHINES))]]
    for feature in features:
        lines.append([feature, *("yes" if columns[name][feature] else "" for name in _MACHINES)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _answers(name: str, features: dict[str, Request]) -> dict[str, bool]:
    backend, (platform, kind) = ATTENTION.backend(name), _MACHINES[name]
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        always = set(backend.refuses(_PLAIN))
        return {feature: set(backend.refuses(request)) <= always for feature, request in features.items()}


_PLAIN = Request(
    mask=masks.Full(),
    bias=None,
    scale=1.0,
    soft_cap=None,
    dropout_rate=0.0,
    dropout_seed=None,
    origin=WHOLE,
    needs_lse=False,
    q_shape=(2, _LENGTH, _HEADS, 128),
    k_shape=(2, _LENGTH, _HEADS, 128),
    v_shape=(2, _LENGTH, _HEADS, 128),
    dtype=jnp.dtype(jnp.bfloat16),
)


def _features() -> dict[str, Request]:
    """A request for each row of the table; they differ from the plain one in what the row names."""

    def request(**changes):
        return dataclasses.replace(_PLAIN, **changes)

    ids = jnp.ones((2, _LENGTH), jnp.int32)
    packed = masks.Segments(ids)
    prefix = masks.PrefixLM(jnp.zeros((2, _LENGTH), jnp.int32))
    blocks = masks.BlockSparse.of_map(np.ones((2, _HEADS, 8, 8), bool), (128, 128))
    dense_bias = DenseBias(jnp.zeros((1, _HEADS, _LENGTH, _LENGTH), jnp.bfloat16), differentiable=True)
    fewer, wider = (2, _LENGTH, 2, 128), (2, _LENGTH, _HEADS, 256)
    short = (2, 200, _HEADS, 128)
    return {
        "`Full`, `Causal()`": request(mask=masks.Causal()),
        "causal `Window`": request(mask=masks.Causal() & masks.Window(127, 0)),
        "`Window` to both sides, `Chunked`": request(mask=masks.Window(64, 64) & masks.Chunked(128)),
        "`KVLength`": request(mask=masks.KVLength(jnp.ones(2, jnp.int32))),
        "`Causal() & Segments` (packed)": request(mask=masks.Causal() & packed),
        "`PrefixLM & Segments` (packed prefix-LM)": request(mask=prefix & packed),
        "`Window \\| GlobalTokens` (Longformer)": request(mask=masks.Window(64, 64) | masks.GlobalTokens(4)),
        "`BlockSparse`, lists by head": request(mask=blocks & masks.Causal()),
        "`Dense`, `Segments(contiguous=False)`": request(mask=masks.Dense(jnp.ones((1, 1, _LENGTH, _LENGTH), bool))),
        "`AlibiBias`": request(bias=AlibiBias(jnp.ones(_HEADS))),
        "`RelativeBias` and its gradient": request(bias=RelativeBias(jnp.zeros((32, _HEADS)))),
        "`DenseBias` and its gradient": request(bias=dense_bias),
        "`PlacedBias`": request(bias=PlacedBias(AlibiBias(jnp.ones(_HEADS)), ids, ids)),
        "`soft_cap`": request(soft_cap=30.0),
        "dropout": request(dropout_rate=0.1, dropout_seed=jnp.uint32(0)),
        "`return_lse`, sinks": request(needs_lse=True),
        "fewer key heads than query heads": request(k_shape=fewer, v_shape=fewer),
        "values of another head size": request(v_shape=wider),
        "lengths that are no multiple of 128": request(q_shape=short, k_shape=short, v_shape=short),
        "float32": request(dtype=jnp.dtype(jnp.float32)),
        "float16": request(dtype=jnp.dtype(jnp.float16)),
    }


def in_readme(text: str) -> str:
    """The text of README.md with the table in its place, after the comment that names this module."""
    before, mark, after = text.partition("pallas_kernels.support --update -->\n\n")
    return before + mark + table() + "\n\n" + after.partition("\n\n")[2]


README = pathlib.Path(__file__).with_name("README.md")

if __name__ == "__main__":
    if sys.argv[1:] == ["--update"]:
        README.write_text(in_readme(README.read_text()))
    else:
        print(table())
