"""What T5's trainers call T5's parameters, and which model a set of them is.

Both have the encoder-decoders of T5 (arXiv 1910.10683), T5 v1.1, mT5, ByT5 and UL2, and decoders of the same blocks
(those of the architecture and objective study, arXiv 2204.05832). Scores are not scaled: T5 folds that into its
initialisation.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.huggingface.folder import parameter_shapes
from jaxlm.checkpoints.huggingface.tensors import Entry, Form, Reversed, Shape, resolve
from jaxlm.checkpoints.stored import some
from jaxlm.checkpoints.t5 import t5x
from jaxlm.checkpoints.t5.bundle import Bundle
from jaxlm.checkpoints.tabulated import TabulatedCheckpoint, Tensors
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import RelativePositions
from jaxlm.layers.stack import StackConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig

MAX_DISTANCE = 128  # of relative positions: a constant in both trainers
ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU_TANH,
    "swish": Activation.SILU,
    "silu": Activation.SILU,
    "linear": Activation.IDENTITY,
    "sigmoid": Activation.SIGMOID,
}


@dataclasses.dataclass(frozen=True)
class InOrder(Form):
    """The same numbers in the same order, under another shape: both have inputs before outputs.

    Attributes:
      stored: the shape in the checkpoint.
    """

    stored: Shape

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return self.stored

    def join(self, values: tuple[np.ndarray, ...]) -> np.ndarray:
        (value,) = values
        return value.reshape(self.stored)

    def split(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        (shape,) = shapes
        return (tensor.reshape(shape),)


# Our name of each of T5X's inside a layer, and of those outside; those of tables of relative positions aside.
_ATTENTIONS = {"attention": "attention", "self_attention": "attention", "encoder_decoder_attention": "cross_attention"}
_PROJECTIONS = {"query": "query", "key": "key", "value": "value", "out": "output"}
_IN_LAYER = {
    **{f"{t}/{p}/kernel": f"{o}/{q}/kernel" for t, o in _ATTENTIONS.items() for p, q in _PROJECTIONS.items()},
    "mlp/wi/kernel": "feed_forward/up/kernel",
    "mlp/wi_0/kernel": "feed_forward/gate/kernel",
    "mlp/wi_1/kernel": "feed_forward/up/kernel",
    "mlp/wo/kernel": "feed_forward/down/kernel",
    "pre_attention_layer_norm/scale": "attention_norms/before/scale",
    "pre_self_attention_layer_norm/scale": "attention_norms/before/scale",
    "pre_cross_attention_layer_norm/scale": "cross_attention_norms/before/scale",
    "pre_mlp_layer_norm/scale": "feed_forward_norms/before/scale",
}
_OUTSIDE = {
    "token_embedder/embedding": "embedding/tokens",
    "decoder/token_embedder/embedding": "embedding/tokens",
    "encoder/encoder_norm/scale": "encoder/norm/scale",
    "decoder/decoder_norm/scale": "decoder/norm/scale",
    "decoder/logits_dense/kernel": "vocabulary_head/kernel",
}
_TABLE = r"(?:relpos_bias|relative_posemb)/rel_embedding"

# Mesh TensorFlow's names as T5X's; "transformer" is a decoder by itself.
_MESH = (
    (r"shared/embedding", "token_embedder/embedding"),
    (r"decoder/embedding", "decoder/token_embedder/embedding"),
    (r"(\w+)/block_(\d+)/layer_\d+/SelfAttention/relative_attention_bias", r"\1/layers_\2/relpos_bias/rel_embedding"),
    (r"encoder/block_(\d+)/layer_\d+/SelfAttention/(\w)", r"encoder/layers_\1/attention/\2"),
    (r"decoder/block_(\d+)/layer_\d+/SelfAttention/(\w)", r"decoder/layers_\1/self_attention/\2"),
    (r"decoder/block_(\d+)/layer_\d+/EncDecAttention/(\w)", r"decoder/layers_\1/encoder_decoder_attention/\2"),
    (r"(\w+)/block_(\d+)/layer_\d+/DenseReluDense/(\w+)/kernel", r"\1/layers_\2/mlp/\3/kernel"),
    (r"(encoder|decoder)/(?:final_layer|rms)_norm/scale", r"\1/\1_norm/scale"),
    (r"decoder/logits/kernel", "decoder/logits_dense/kernel"),
)
_LETTERS = {"q": "query", "k": "key", "v": "value", "o": "out"}
_NORMS = {
    2: ("pre_self_attention_layer_norm", "pre_mlp_layer_norm"),
    3: ("pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm"),
}


@dataclasses.dataclass(frozen=True)
class T5Checkpoint(TabulatedCheckpoint):
    """A checkpoint of T5X or of Mesh TensorFlow."""


@dataclasses.dataclass(frozen=True)
class MeshTensors:
    """The parameters in a checkpoint of Mesh TensorFlow, under T5X's names.

    Attributes:
      bundle: its tensors, the optimizer's among them.
      names: {T5X's name: its own}.
    """

    bundle: Bundle
    names: Mapping[str, str]

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """{name: shape}."""
        return {name: self.bundle.shapes[own] for name, own in self.names.items()}

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor, without reading it."""
        return self.bundle.dtype(self.names[name])

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.bundle.read(self.names[name])


def find(path: pathlib.Path, step: int | None) -> pathlib.Path | None:
    """The checkpoint of either trainer that a path means; None if there is none.

    Args:
      path: the folder of a T5X checkpoint or of several, the folder of TensorFlow's checkpoints, or the prefix of one.
      step: which of several; None is the newest.

    Raises:
      ValueError: there are such checkpoints, but none of this step.
    """
    if path.with_name(f"{path.name}.index").is_file() or t5x.is_checkpoint(path):
        if step is not None and not re.search(rf"[-_]{step}$", path.name):
            raise ValueError(f"{path} is one checkpoint, but not by its name that of step {step}; leave out the step.")
        return path
    if not path.is_dir():
        return None
    if (found := t5x.find_step(path, step)) is not None:
        return found
    prefixes = [file.with_suffix("") for file in path.glob("*.index")]
    steps = {int(number[1]): prefix for prefix in prefixes if (number := re.search(r"-(\d+)$", prefix.name))}
    if not steps:
        return None
    if step is not None and step not in steps:
        at_hand = ", ".join(map(str, sorted(steps)))
        raise ValueError(f"{path} has no TensorFlow checkpoint of step {step} (it has: {at_hand}).")
    return steps[max(steps) if step is None else step]


def open_t5(path: pathlib.Path) -> T5Checkpoint:
    """The model in a checkpoint of either trainer.

    Args:
      path: what `find` found.

    Raises:
      ValueError: the parameters are not T5's, or do not fit together; a file is damaged.
      FileNotFoundError: a file is missing.
    """
    tensors: Tensors = t5x.T5XTensors(path) if path.is_dir() else _mesh_tensors(Bundle(path))
    names = _our_names(tensors.shapes, path)
    config = _config(tensors.shapes, names, _activation(path, tensors.shapes))
    table = tuple(
        Entry(name, (ours,), Reversed() if re.search(_TABLE, name) else InOrder(tensors.shapes[name]))
        for name, ours in names.items()
    )
    shapes = parameter_shapes(config)
    for name, ours in names.items():
        size = int(np.prod(tensors.shapes[name], dtype=np.int64))
        if ours not in shapes or size != int(np.prod(shapes[ours], dtype=np.int64)):
            wanted = f"{list(shapes[ours])}" if ours in shapes else "no such parameter"
            raise ValueError(
                f"{path}: {name} has shape {list(tensors.shapes[name])}, but the T5 that its other parameters make has "
                f"{wanted} there; the layers must be alike."
            )
    if missing := sorted(set(shapes) - set(names.values())):
        raise ValueError(f"{path} lacks parameters of a T5: {some(missing)}, in our names; the folder is not whole.")
    return T5Checkpoint(path, config, tensors, resolve(table, shapes), shapes)


def _mesh_tensors(bundle: Bundle) -> MeshTensors:
    names, depth = {}, {}
    for own in bundle.shapes:
        if match := re.match(r"decoder/block_\d+/layer_(\d+)/", own):
            depth["decoder"] = max(depth.get("decoder", 0), int(match[1]) + 1)
    alone = any(own.startswith("transformer/") for own in bundle.shapes)
    for own in bundle.shapes:
        if own == "global_step" or re.search(r"_slot_\w+$", own):
            continue
        name = re.sub("^transformer/", "decoder/", own)
        if match := re.fullmatch(r"(\w+)/block_(\d+)/layer_(\d+)/(?:layer|rms)_norm/scale", name):
            kinds = _NORMS[2 if alone or match[1] == "encoder" else depth["decoder"]]
            kind = kinds[int(match[3])]
            name = f"{match[1]}/layers_{int(match[2])}/{kind}/scale"
            if match[1] == "encoder":
                name = name.replace("pre_self_attention", "pre_attention")
        else:
            name = next((re.sub(p, to, name) for p, to in _MESH if re.fullmatch(p, name)), name)
            name = re.sub(r"layers_(\d+)", lambda m: f"layers_{int(m[1])}", name)
            name = re.sub(r"attention/([qkvo])$", lambda m: f"attention/{_LETTERS[m[1]]}/kernel", name)
        names[name] = own
    for stack in ("encoder", "decoder"):  # one table is the stack's, kept with its first layer
        tables = [name for name in names if name.startswith(f"{stack}/") and name.endswith("rel_embedding")]
        if len(tables) == 1:
            names[f"{stack}/relpos_bias/rel_embedding"] = names.pop(tables[0])
    return MeshTensors(bundle, names)


def _our_names(shapes: Mapping[str, Shape], path: pathlib.Path) -> dict[str, str]:
    """{T5X's name: ours}."""
    found, unknown = {}, []
    for name in shapes:
        if name in _OUTSIDE:
            found[name] = _OUTSIDE[name]
        elif match := re.fullmatch(rf"(encoder|decoder)/{_TABLE}", name):
            found[name] = f"{match[1]}/relative/table"
        elif match := re.fullmatch(rf"(encoder|decoder)/layers_(\d+)/{_TABLE}", name):
            found[name] = f"{match[1]}/layers/{match[2]}/attention/relative/table"
        elif (match := re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(.*)", name)) and match[3] in _IN_LAYER:
            found[name] = f"{match[1]}/layers/{match[2]}/{_IN_LAYER[match[3]]}"
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{path} has {some(unknown)}, which no T5 has; it is another kind of model.")
    return found


def _config(shapes: Mapping[str, Shape], names: Mapping[str, str], activation: Activation) -> LanguageModelConfig:
    """The model that has these parameters."""
    by_ours = {ours: shapes[name] for name, ours in names.items()}
    if "embedding/tokens" not in by_ours:
        raise ValueError("The checkpoint has no token embedding (token_embedder/embedding); it is no language model.")
    vocab, width = by_ours["embedding/tokens"]
    stacks = {}
    for side in ("encoder", "decoder"):
        layers = {int(m[1]) for ours in by_ours if (m := re.match(rf"{side}/layers/(\d+)/", ours))}
        if layers:
            stacks[side] = _stack(by_ours, side, len(layers), width, activation)
    if "decoder" not in stacks:
        raise ValueError("The checkpoint has no decoder; encoders of T5 by themselves are not read.")
    tied = "vocabulary_head/kernel" not in by_ours
    return LanguageModelConfig(
        Architecture.ENCODER_DECODER if "encoder" in stacks else Architecture.CAUSAL_DECODER,
        vocab,
        width,
        EmbeddingConfig(),
        HeadConfig(tied=tied, scale_by_width=tied),
        InitConfig(),
        **stacks,
    )


def _stack(shapes: Mapping[str, Shape], side: str, depth: int, width: int, activation: Activation) -> StackConfig:
    """One stack, its layers like its first."""
    first = {ours.removeprefix(f"{side}/layers/0/"): shape for ours, shape in shapes.items()}
    table = shapes.get(f"{side}/relative/table") or first.get("attention/relative/table")
    needed = ("attention/query/kernel", "attention/key/kernel", "feed_forward/down/kernel")
    if table is None or any(name not in first for name in needed):
        raise ValueError(f"The first layer of the {side} lacks its table of relative positions, attention or MLP.")
    heads, buckets = table
    dims = int(np.prod(first["attention/query/kernel"])) // width // heads
    kv_heads = int(np.prod(first["attention/key/kernel"])) // width // dims
    positions = RelativePositions(buckets, MAX_DISTANCE, bidirectional=side == "encoder")
    shared = f"{side}/relative/table" in shapes
    both = AttentionConfig(heads, dims, None if kv_heads == heads else kv_heads, scale=1.0)
    norm = NormConfig(epsilon=1e-6)
    gated = "feed_forward/gate/kernel" in first
    block = BlockConfig(
        both if shared else dataclasses.replace(both, position=positions),
        FeedForwardConfig(first["feed_forward/down/kernel"][0], activation, gated),
        norm,
        cross_attention=both if "cross_attention/query/kernel" in first else None,
    )
    return StackConfig((block,), depth, final_norm=norm, relative_positions=positions if shared else None)


def _activation(path: pathlib.Path, shapes: Mapping[str, Shape]) -> Activation:
    """The feed-forward layers' activation, which no parameter says.

    The gin file that a trainer leaves beside its checkpoints does; without one it is that of the papers, ReLU in T5 and
    GELU's tanh approximation where the layer is gated (T5 v1.1 and all that followed).
    """
    gated = any(name.endswith("mlp/wi_0/kernel") for name in shapes)
    folders = (path, path.parent) if path.is_dir() else (path.parent,)
    files = [folder / name for folder in folders for name in ("config.gin", "operative_config.gin")]
    for text in (file.read_text(errors="replace") for file in files if file.is_file()):
        said = re.search(r"(?:mlp_activations|DenseReluDense\.activation)\s*=\s*(.*)", text)
        if said is None:
            continue
        macro = re.fullmatch(r"%(\w+)", said[1].strip())
        said = (macro and re.search(rf"^{macro[1]}\s*=\s*(.*)", text, re.MULTILINE)) or said
        named = re.findall(r"\w+", said[1])
        if len(named) != 1 + gated or named[0] not in ACTIVATIONS or named[1:] not in ([], ["linear"]):
            raise ValueError(
                f"{path} was trained with the activations {said[1].strip()}; known are {', '.join(ACTIVATIONS)}, and "
                f"in a gated layer a second one that is linear."
            )
        return ACTIVATIONS[named[0]]
    return Activation.GELU_TANH if gated else Activation.RELU
