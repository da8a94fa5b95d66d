"""A language model trained with jaxlm, in plain PyTorch: whatever the `config.json` beside this file describes.

`config.language_model` is jaxlm's own description of the model. Parameters have jaxlm's names and shapes: a kernel is
[inputs..., outputs...]. B: rows, T and S: tokens of a row, E: width, H: heads, D: size of a head.

Written with every model that no class of transformers computes; it needs torch and transformers, and nothing of jaxlm.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, MaskedLMOutput, Seq2SeqLMOutput

Description = dict[str, Any]  # a part of `config.language_model`: the fields of one of jaxlm's configuration classes
_HIDDEN = -0.7 * torch.finfo(torch.float32).max  # score of a key that is not seen: finite, so that no row is NaN


class JaxLMConfig(PretrainedConfig):
    """The configuration: `language_model` is jaxlm's LanguageModelConfig."""

    model_type = "jaxlm"

    def __init__(self, language_model: Description | None = None, **options: Any):
        self.language_model = language_model or {}
        super().__init__(**options)


ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "squared_relu": lambda x: torch.relu(x).square(),
    "identity": lambda x: x,
}


class Scaling:
    """How multipliers follow width and depth: standard, muP (arXiv 2203.03466) or CompleteP (arXiv 2505.01618)."""

    def __init__(self, config: Description):
        self.width = config["width"]
        self.rule = config["parametrization"] or {"kind": "standard"}
        self.standard = self.rule["kind"] == "standard"
        self.width_ratio = 1.0 if self.standard else self.width / self.rule["base_width"]
        self.scaled_width = self.width / self.width_ratio  # of whose root `scale_by_width` makes factors

    def scores(self, head_dim: int) -> float:
        """Factor on q . k."""
        return head_dim**-0.5 if self.standard else self.rule["base_head_dim"] ** 0.5 / head_dim

    def residual(self, depth: int) -> float:
        """Factor on what a branch adds."""
        if self.rule["kind"] != "completep":
            return 1.0
        return (depth / self.rule["base_depth"]) ** -self.rule["alpha"]


class Linear(nn.Module):
    """x W (+ b) over one or more axes: [..., *inputs] -> [..., *outputs]."""

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool = False):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(*inputs, *outputs))
        self.bias = nn.Parameter(torch.empty(*outputs)) if bias else None
        self.contracted = len(inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.tensordot(x, self.kernel, dims=self.contracted)
        return out if self.bias is None else out + self.bias


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axes, of this shape, in float32."""

    def __init__(self, config: Description, shape: tuple[int, ...]):
        super().__init__()
        exists = config["kind"] != "none"
        self.scale = nn.Parameter(torch.empty(*shape)) if exists and config["scale"] else None
        self.bias = nn.Parameter(torch.empty(*shape)) if exists and config["bias"] else None
        self.config, self.axes = config, tuple(range(-len(shape), 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.config["kind"] == "none":
            return x
        y = x.float()
        if self.config["kind"] == "layer":
            y = y - y.mean(self.axes, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(self.axes, keepdim=True) + self.config["epsilon"])
        if self.scale is not None:
            y = y * (self.scale + self.config["scale_offset"])
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


# Positions ------------------------------------------------------------------------------------------------------


def rope_frequencies(config: Description, head_dim: int, length: int) -> tuple[torch.Tensor, float]:
    """(radians a position for each pair of rotated dimensions, factor on what is rotated), for rows of this length."""
    dims, base, scaling = int(head_dim * config["fraction"]) // 2 * 2, config["base"], config["scaling"]
    kind = scaling["class"] if scaling else None
    if kind == "NtkScaling":
        factor, original = scaling["factor"], scaling["original_length"]
        if original is not None:
            factor = max(1.0, factor * length / original - (factor - 1.0))
        base = base * factor ** (dims / (dims - 2))
    frequencies = base ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    if kind == "LinearScaling":
        frequencies = frequencies / scaling["factor"]
    elif kind == "Llama3Scaling":
        low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
        turns = scaling["original_length"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling["factor"])
    elif kind == "YarnScaling":

        def dimension(turns: float) -> float:
            return dims * math.log(scaling["original_length"] / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(dimension(scaling["beta_fast"])), 0)
        high = min(math.ceil(dimension(scaling["beta_slow"])), dims - 1)
        interpolated = ((torch.arange(dims // 2) - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
        frequencies = frequencies * (1.0 - interpolated + interpolated / scaling["factor"])
        factor = scaling["attention_factor"]
        return frequencies, 0.1 * math.log(scaling["factor"]) + 1.0 if factor is None else factor
    return frequencies, 1.0


def rotate(x: torch.Tensor, positions: torch.Tensor, config: Description) -> torch.Tensor:
    """RoPE (arXiv 2104.09864): rotates the first dimensions of each head of x [B, T, H, D], half against half."""
    frequencies, factor = rope_frequencies(config, x.shape[-1], positions.shape[-1])
    angles = positions[..., None].float() * frequencies.float().to(x.device)  # [B, T, pairs]
    cosine, sine = factor * angles.cos()[:, :, None], factor * angles.sin()[:, :, None]
    half = cosine.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :].float()
    turned = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return torch.cat(turned, dim=-1).to(x.dtype)


def relative_buckets(offsets: torch.Tensor, config: Description) -> torch.Tensor:
    """T5's bucket of each key position minus query position (arXiv 1910.10683, 2.1)."""
    buckets, furthest = config["buckets"], config["max_distance"]
    distance, start = -offsets, torch.zeros_like(offsets)
    if config["bidirectional"]:
        buckets //= 2
        start, distance = torch.where(distance < 0, buckets, 0), distance.abs()
    else:
        distance = distance.clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact)
    shared = exact + (ratio * (buckets - exact)).long()
    return start + torch.where(distance < exact, distance, shared.clamp(max=buckets - 1))


class RelativeTable(nn.Module):
    """T5's biases: offsets [T, S] -> [1, H, T, S]."""

    def __init__(self, config: Description, heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(config["buckets"], heads))
        self.config = config

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        return self.table[relative_buckets(offsets, self.config)].float().permute(2, 0, 1)[None]


def alibi(offsets: torch.Tensor, heads: int) -> torch.Tensor:
    """ALiBi (arXiv 2108.12409), the same in both directions: offsets [T, S] -> [1, H, T, S]."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    n = 2 ** math.floor(math.log2(heads))
    slopes = torch.tensor(powers(n) + powers(2 * n)[::2][: heads - n], device=offsets.device)
    return -slopes[None, :, None, None] * offsets.abs().float()


def sinusoidal(positions: torch.Tensor, width: int, base: float) -> torch.Tensor:
    """Fixed sines and cosines [B, T, width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(base) * torch.arange(half, device=positions.device) / max(half - 1, 1))
    angles = positions[..., None].float() * frequencies
    return functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width - 2 * half))


# Layers ---------------------------------------------------------------------------------------------------------


class Memory:
    """Keys and values of what was read before, of every attention: a new token then costs its own row alone.

    Attributes:
      length: tokens of a row that it holds.
    """

    def __init__(self):
        self.length = 0
        self.held: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def grown(self, layer: nn.Module, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer, these [B, t, heads, D] of the newest tokens among them."""
        if layer in self.held:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.held[layer], (k, v)))
        self.held[layer] = k, v
        return k, v

    def once(
        self, layer: nn.Module, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of an encoder's text, which `make` gives the first time."""
        if layer not in self.held:
            self.held[layer] = make()
        return self.held[layer]

    def get_seq_length(self, layer_index: int = 0) -> int:
        """`length`, by the name that `generate` asks for."""
        return self.length

    def reorder_cache(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was: of beams."""
        self.held = {layer: tuple(x[rows.to(x.device)] for x in pair) for layer, pair in self.held.items()}


class Attention(nn.Module):
    """Queries of x [B, T, E] attend to keys and values of a source [B, S, E]."""

    def __init__(self, config: Description, scaling: Scaling):
        super().__init__()
        heads, dim, width = config["num_heads"], config["head_dim"], scaling.width
        kv_heads = config["num_kv_heads"] or heads
        self.query = Linear((width,), (heads, dim), config["qkv_bias"])
        self.key = Linear((width,), (kv_heads, dim), config["qkv_bias"])
        self.value = Linear((width,), (kv_heads, dim), config["qkv_bias"])
        self.output = Linear((heads, dim), (width,), config["output_bias"])
        by_head, normed = config["qk_norm"] == "head", config["qk_norm_config"]
        self.query_norm = Norm(normed, (dim,) if by_head else (heads, dim)) if normed else None
        self.key_norm = Norm(normed, (dim,) if by_head else (kv_heads, dim)) if normed else None
        self.sinks = nn.Parameter(torch.empty(heads)) if config["sinks"] else None
        self.position = config["position"] or {"class": None}
        own = self.position["class"] == "RelativePositions"
        self.relative = RelativeTable(self.position, heads) if own else None
        self.config, self.group = config, heads // kv_heads
        self.scale = scaling.scores(dim) if config["scale"] is None else config["scale"]

    def forward(
        self,
        x: torch.Tensor,
        source: torch.Tensor,
        visible: torch.Tensor,
        positions: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        memory: Memory | None = None,
    ) -> torch.Tensor:
        """What x finds, as it is or, in its own text, with what stood before it.

        Args:
          x: [B, T, E].
          source: x, or an encoder's output.
          visible: bool [B, 1, T, S]; where there is a memory, S counts what it holds.
          positions: [B, T], of x.
          bias: [1, H, T, S], the stack's own.
          memory: of what was read before; x is added to it.
        """
        q = self.query(x)
        if self.query_norm is not None:
            q = self.query_norm(q)
        if self.position["class"] == "Rope":
            q = rotate(q, positions, self.position)
        if memory is None:
            k, v = self.keys_and_values(source, positions)
        elif source is x:
            k, v = memory.grown(self, *self.keys_and_values(source, positions))
        else:
            k, v = memory.once(self, lambda: self.keys_and_values(source, positions))
        k, v = (y.repeat_interleave(self.group, dim=2) for y in (k, v))
        columns = torch.arange(k.shape[1], device=x.device)
        rows = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=x.device)  # x stands last
        offsets = columns[None] - rows[:, None]  # [T, S]
        if self.relative is not None:
            bias = self.relative(offsets)
        elif self.position["class"] == "Alibi":
            bias = alibi(offsets, q.shape[2])
        scores = torch.einsum("bthd,bshd->bhts", q * self.scale, k).float()
        if cap := self.config["soft_cap"]:
            scores = cap * torch.tanh(scores / cap)
        if bias is not None:
            scores = scores + bias
        if window := self.config["window"]:
            visible = visible & (offsets >= -window[0]) & (offsets <= window[1])
        scores = scores.masked_fill(~visible, _HIDDEN)
        if self.sinks is not None:
            sinks = self.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
            weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        weights = weights * visible.any(-1, keepdim=True)  # a query that sees nothing finds 0
        return self.output(torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v))

    def keys_and_values(
        self, source: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, heads, D] each, the keys normalised and rotated."""
        k = self.key(source)
        if self.key_norm is not None:
            k = self.key_norm(k)
        if self.position["class"] == "Rope":
            k = rotate(k, positions, self.position)
        return k, self.value(source)


class FeedForward(nn.Module):
    """Two matrices, or three with a gate (arXiv 2002.05202)."""

    def __init__(self, config: Description, scaling: Scaling):
        super().__init__()
        width, hidden, bias = scaling.width, config["hidden"], config["bias"]
        self.gate = Linear((width,), (hidden,), bias) if config["gated"] else None
        self.up = Linear((width,), (hidden,), bias)
        self.down = Linear((hidden,), (width,), bias)
        self.activation = ACTIVATIONS[config["activation"]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Kernels of all experts: [X, E, F] and [X, F, E]."""

    def __init__(self, config: Description, width: int):
        super().__init__()
        inner = (config["num_experts"], width, config["hidden"])
        self.gate = nn.Parameter(torch.empty(*inner)) if config["gated"] else None
        self.up = nn.Parameter(torch.empty(*inner))
        self.down = nn.Parameter(torch.empty(inner[0], inner[2], inner[1]))
        self.activation = ACTIVATIONS[config["activation"]]

    def forward(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """What one expert makes of rows [N, E]."""
        hidden = rows @ self.up[expert]
        if self.gate is None:
            return self.activation(hidden) @ self.down[expert]
        return (self.activation(rows @ self.gate[expert]) * hidden) @ self.down[expert]


class MixtureOfExperts(nn.Module):
    """A router sends each token through a few experts."""

    def __init__(self, config: Description, scaling: Scaling):
        super().__init__()
        self.experts = Experts(config, scaling.width)
        self.router = nn.Parameter(torch.empty(scaling.width, config["num_experts"]))
        self.shared = feed_forward(config["shared"], scaling) if config["shared"] else None
        self.config, self.multiplier = config, 1.0 / scaling.width_ratio

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = x.float() @ self.router.float() * self.multiplier
        scores = logits.softmax(-1) if self.config["scoring"] == "softmax" else logits.sigmoid()
        weights, chosen = scores.topk(self.config["experts_per_token"], dim=-1)
        if self.config["normalize"]:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * self.config["scale"]
        out = torch.zeros_like(x)
        for expert in range(self.config["num_experts"]):
            *at, choice = torch.nonzero(chosen == expert, as_tuple=True)
            at = tuple(at)
            if len(choice):
                out[at] += self.experts(x[at], expert) * weights[(*at, choice)][:, None].to(x.dtype)
        return out if self.shared is None else out + self.shared(x)


def feed_forward(config: Description, scaling: Scaling) -> nn.Module:
    """The layer that a description is of."""
    layer = {"FeedForwardConfig": FeedForward, "MixtureOfExpertsConfig": MixtureOfExperts}[config["class"]]
    return layer(config, scaling)


class Block(nn.Module):
    """Attention, cross-attention where there is an encoder, feed-forward."""

    def __init__(self, config: Description, scaling: Scaling, depth: int):
        super().__init__()
        placement, self.arrangement = config["placement"], config["arrangement"]

        def norms(first: Description) -> nn.ModuleDict:
            made = {"before": first} if placement in ("pre", "sandwich") else {}
            made |= {"after": config["norm"]} if placement != "pre" else {}
            return nn.ModuleDict({name: Norm(norm, (scaling.width,)) for name, norm in made.items()})

        self.attention = Attention(config["attention"], scaling)
        self.attention_norms = norms(config["attention_norm"] or config["norm"])
        cross = config["cross_attention"]
        self.cross_attention = Attention(cross, scaling) if cross else None
        self.cross_attention_norms = norms(config["norm"]) if cross else None
        self.feed_forward = feed_forward(config["feed_forward"], scaling)
        self.feed_forward_norms = None if self.arrangement == "parallel" else norms(config["norm"])
        self.post, self.multiplier = placement == "post", scaling.residual(depth)

    def forward(self, x: torch.Tensor, around: "Surroundings") -> torch.Tensor:
        """x [B, T, E] after the block."""

        def attend(y: torch.Tensor) -> torch.Tensor:
            return self.attention(y, y, around.visible, around.positions, around.bias, around.memory)

        if self.arrangement != "sequential":
            y = _normed(x, self.attention_norms)
            z = y if self.feed_forward_norms is None else _normed(x, self.feed_forward_norms)
            return self._join(x, attend(y) + self.feed_forward(z), self.attention_norms)
        x = self._join(x, attend(_normed(x, self.attention_norms)), self.attention_norms)
        if self.cross_attention is not None:
            y = _normed(x, self.cross_attention_norms)
            y = self.cross_attention(y, around.encoded, around.cross_visible, memory=around.memory)
            x = self._join(x, y, self.cross_attention_norms)
        return self._join(x, self.feed_forward(_normed(x, self.feed_forward_norms)), self.feed_forward_norms)

    def _join(self, x: torch.Tensor, y: torch.Tensor, norms: nn.ModuleDict) -> torch.Tensor:
        y = y * self.multiplier
        if self.post:
            return norms["after"](x + y)
        return x + (norms["after"](y) if "after" in norms else y)


def _normed(x: torch.Tensor, norms: nn.ModuleDict) -> torch.Tensor:
    return norms["before"](x) if "before" in norms else x


class Surroundings:
    """What the blocks of a stack share.

    Attributes:
      visible: bool [B, 1, T, columns], which token sees which; the T tokens are the last of the columns.
      positions: [B, T].
      encoded: [B, S, E], an encoder's output, or None.
      cross_visible: bool [B, 1, 1, S], which tokens of it are there.
      bias: [1, H, T, columns] of a table that all blocks share, or None.
      memory: of the tokens before these, or None.
    """

    def __init__(self, visible, positions, encoded=None, cross_visible=None, memory=None):
        self.visible, self.positions, self.memory = visible, positions, memory
        self.encoded, self.cross_visible, self.bias = encoded, cross_visible, None


class Stack(nn.Module):
    """Blocks one after the other, and a norm."""

    main_input_name = "input_ids"  # `generate` asks the encoder

    def __init__(self, config: Description, scaling: Scaling):
        super().__init__()
        prologue, pattern = config["prologue"], config["blocks"]
        repeats = config["num_layers"] // len(pattern)
        self.depth = len(prologue) + config["num_layers"]
        make = lambda blocks: nn.ModuleList(Block(block, scaling, self.depth) for block in blocks)  # noqa: E731
        self.prologue = make(prologue) if prologue else None
        self.layers = make(pattern * repeats)
        self.norm = Norm(config["final_norm"], (scaling.width,)) if config["final_norm"] else None
        heads, relative = pattern[0]["attention"]["num_heads"], config["relative_positions"]
        self.relative = RelativeTable(relative, heads) if relative else None

    def forward(self, x: torch.Tensor, around: Surroundings, extra: nn.Module | None = None) -> torch.Tensor:
        """x [B, T, E] after all blocks, `extra` among them as the last, and the final norm."""
        if self.relative is not None:
            index = torch.arange(around.visible.shape[-1], device=x.device)
            around.bias = self.relative(index[None] - index[-x.shape[1] :, None])
        for block in [*(self.prologue or ()), *self.layers, *([] if extra is None else [extra])]:
            x = block(x, around)
        return x if self.norm is None else self.norm(x)


class Embedding(nn.Module):
    """Tokens, positions and types: [B, T] -> [B, T, E]."""

    def __init__(self, config: Description, model: Description, scaling: Scaling):
        super().__init__()
        width = config["width"] or model["width"]
        self.tokens = nn.Parameter(torch.empty(model["vocab_size"], width))
        self.kind = config["positions"]["class"] if config["positions"] else None
        learned = self.kind == "LearnedPositions"
        self.unused = config["positions"]["unused"] if learned else 0
        rows = config["positions"]["max_length"] + self.unused if learned else 0
        self.positions = nn.Parameter(torch.empty(rows, width)) if learned else None
        self.types = nn.Parameter(torch.empty(config["types"], width)) if config["types"] else None
        self.norm = Norm(config["norm"], (width,)) if config["norm"] else None
        self.projection = Linear((width,), (model["width"],), bias=True) if width != model["width"] else None
        self.config, self.multiplier = config, scaling.scaled_width**0.5 if config["scale_by_width"] else 1.0

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        x = self.tokens[ids] * self.multiplier
        if self.positions is not None:
            x = x + self.positions[positions + self.unused]
        elif self.kind is not None:
            x = x + sinusoidal(positions, x.shape[-1], self.config["positions"]["base"]).to(x.dtype)
        if self.types is not None:
            x = x + (self.types[0] if types is None else self.types[types])
        x = x if self.norm is None else self.norm(x)
        return x if self.projection is None else self.projection(x)


class VocabularyHead(nn.Module):
    """Hidden states [..., E] -> logits [..., V]."""

    def __init__(self, config: Description, model: Description, scaling: Scaling):
        super().__init__()
        width = model["width"]
        inner = (model["embedding"]["width"] or width) if config["tied"] and config["transform"] else width
        self.transform = Linear((width,), (inner,), config["transform_bias"]) if config["transform"] else None
        self.norm = Norm(config["transform_norm"], (inner,)) if config["transform_norm"] else None
        self.kernel = None if config["tied"] else nn.Parameter(torch.empty(inner, model["vocab_size"]))
        self.bias = nn.Parameter(torch.empty(model["vocab_size"])) if config["bias"] else None
        self.config = config
        scale = scaling.scaled_width**-0.5 if config["scale_by_width"] else 1.0
        self.multiplier = scale / scaling.width_ratio

    def forward(self, hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`table` [V, embedding width] is the output matrix if there is none of its own."""
        if self.transform is not None:
            hidden = ACTIVATIONS[self.config["transform"]](self.transform(hidden))
        if self.norm is not None:
            hidden = self.norm(hidden)
        matrix = table.T if self.kernel is None else self.kernel
        logits = ((hidden * self.multiplier) @ matrix).float()
        if self.bias is not None:
            logits = logits + self.bias
        cap = self.config["soft_cap"]
        return cap * torch.tanh(logits / cap) if cap else logits


class Pooler(nn.Module):
    """BERT's dense layer over the first token; what is here does not use it."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = Linear((width,), (width,), bias=True)


# Models ---------------------------------------------------------------------------------------------------------


class JaxLM(PreTrainedModel):
    """Embedding, one or two stacks, and a head over the vocabulary."""

    config_class = JaxLMConfig
    main_input_name = "input_ids"

    def __init__(self, config: JaxLMConfig):
        super().__init__(config)
        model = config.language_model
        scaling = Scaling(model)
        self.embedding = Embedding(model["embedding"], model, scaling)
        stacks = {name: Stack(model[name], scaling) for name in ("encoder", "decoder") if model[name]}
        self.encoder, self.decoder = stacks.get("encoder"), stacks.get("decoder")
        self.vocabulary_head = VocabularyHead(model["head"], model, scaling)
        depth = 1 + max(stack.depth for stack in stacks.values())
        ahead = [Block(model["future_block"], scaling, depth) for _ in range(model["future_tokens"])]
        self.future = nn.ModuleList(ahead) if ahead else None
        self.pooler = Pooler(model["width"]) if model["pooler"] else None
        self.architecture = model["architecture"]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., E] -> float32 [..., V]."""
        return self.vocabulary_head(hidden, self.embedding.tokens)

    def embed(
        self, ids: torch.Tensor, mask: torch.Tensor | None, types: torch.Tensor | None = None, before: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """([B, T, E], whether each token of the row is there, and its position); padding may stand anywhere in it.

        `before` tokens of the row, which `mask` counts too, stand before these T; the last two are [B, before + T].
        """
        row = (len(ids), before + ids.shape[1])
        present = torch.ones(row, dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
        positions = (present.long().cumsum(-1) - 1).clamp(min=0)
        return self.embedding(ids, positions[:, before:], types), present, positions

    def read(self, ids: torch.Tensor, mask: torch.Tensor | None, types: torch.Tensor | None = None) -> torch.Tensor:
        """[B, S, E]: every token sees its whole row."""
        x, present, positions = self.embed(ids, mask, types)
        stack = self.decoder if self.encoder is None else self.encoder
        return stack(x, Surroundings(present[:, None, None], positions))

    def write(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        prefix_length: torch.Tensor | None = None,
        encoded: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        memory: Memory | None = None,
    ) -> torch.Tensor:
        """[B, T, E]: every token sees what came before it, and those of a prefix, read at once, see each other."""
        before = 0 if memory is None else memory.length
        x, present, positions = self.embed(ids, mask, before=before)
        index = torch.arange(before + ids.shape[1], device=ids.device)
        visible = (index[None] <= index[before:, None])[None]
        if prefix_length is not None:
            inside = present & (positions < prefix_length[:, None])
            visible = visible | (inside[:, before:, None] & inside[:, None])
        visible = (visible & present[:, None])[:, None]
        cross = None if encoder_mask is None else encoder_mask.bool()[:, None, None]
        stack = self.encoder if self.decoder is None else self.decoder
        extra = None if self.future is None else self.future[0]
        hidden = stack(x, Surroundings(visible, positions[:, before:], encoded, cross, memory), extra)
        if memory is not None:
            memory.length = len(index)
        return hidden

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The memory is made here."""
        return False

    def _reorder_cache(self, memory: Memory, rows: torch.Tensor) -> Memory:
        """For beams."""
        memory.reorder_cache(rows)
        return memory

    def memory_for(self, options: dict[str, Any]) -> Memory | None:
        """What `generate` has, or begins with; None where its `use_cache` is False.

        None as well where rotations depend on the row's length (dynamic NTK): all of it is then computed anew.
        """
        held = options.get("past_key_values")
        if held is not None or not options.get("use_cache") or _rotates_by_length(self.config.language_model):
            return held
        return Memory()


def _rotates_by_length(description: Any) -> bool:
    if isinstance(description, list):
        return any(map(_rotates_by_length, description))
    if not isinstance(description, dict):
        return False
    dynamic = description.get("class") == "NtkScaling" and description["original_length"] is not None
    return dynamic or any(map(_rotates_by_length, description.values()))


def shifted_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token; labels of -100 do not count."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class JaxLMForCausalLM(JaxLM, GenerationMixin):
    """A causal decoder, or a prefix decoder, whose prompts are seen in both directions."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prefix_length: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Memory | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of each next token.

        Args:
          input_ids: [B, T].
          attention_mask: [B, T], 0 on padding.
          prefix_length: int [B], of a prefix decoder: as many tokens at the beginning of each row see each other, the
            id that every text begins with among them. None: none do.
          labels: [B, T], usually input_ids, with -100 on what is not to be predicted.
          past_key_values: of the tokens before these, which the mask counts too; these are added. None: there are none.
        """
        if prefix_length is not None and self.architecture != "prefix_decoder":
            raise ValueError(f"prefix_length was given, but this model is a {self.architecture}: leave it out.")
        logits = self.logits(self.write(input_ids, attention_mask, prefix_length, memory=past_key_values))
        loss = None if labels is None else shifted_loss(logits, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def generate(self, inputs: torch.Tensor | None = None, **options: Any) -> Any:
        """As of every model in transformers. A prefix decoder sees the prompt in both directions."""
        if self.architecture == "prefix_decoder" and options.get("prefix_length") is None:
            ids = options["input_ids"] if inputs is None else inputs
            mask = options.get("attention_mask")
            options["prefix_length"] = (torch.ones_like(ids) if mask is None else mask).sum(-1)
        return super().generate(inputs, **options)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """The tokens that the memory has not."""
        memory = self.memory_for(kwargs)
        ids = input_ids if memory is None else input_ids[:, memory.length :]
        given = {name: kwargs.get(name) for name in ("attention_mask", "prefix_length")}
        return {"input_ids": ids, "past_key_values": memory} | given


class JaxLMForMaskedLM(JaxLM):
    """An encoder."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **unused: Any,
    ) -> MaskedLMOutput:
        """Logits of the token at each position; `labels` [B, T] with -100 where none is asked for."""
        logits = self.logits(self.read(input_ids, attention_mask, token_type_ids))
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class Reader:
    """The encoder as `generate` calls it."""

    def __init__(self, model: JaxLM):
        self.model = model

    def __call__(self, *arguments: Any, **options: Any) -> BaseModelOutput:
        return self.forward(*arguments, **options)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **unused: Any
    ) -> BaseModelOutput:
        """Hidden states [B, S, E]."""
        return BaseModelOutput(last_hidden_state=self.model.read(input_ids, attention_mask))


class JaxLMForConditionalGeneration(JaxLM, GenerationMixin):
    """An encoder-decoder."""

    def get_encoder(self, modality: str | None = None) -> Reader:
        """What reads the inputs."""
        return Reader(self)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Memory | None = None,
        **unused: Any,
    ) -> Seq2SeqLMOutput:
        """Logits of what follows each of `decoder_input_ids` [B, T]; without these, `labels` shifted by one.

        `past_key_values` is of the decoder's tokens before these, which its mask counts too; these are added.
        """
        encoded = self.read(input_ids, attention_mask) if encoder_outputs is None else encoder_outputs[0]
        if attention_mask is None:
            attention_mask = torch.ones(encoded.shape[:2], device=encoded.device)
        if decoder_input_ids is None:
            start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)
        memory = past_key_values
        hidden = self.write(decoder_input_ids, decoder_attention_mask, None, encoded, attention_mask, memory)
        logits = self.logits(hidden)
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Seq2SeqLMOutput(loss=loss, logits=logits, past_key_values=memory, encoder_last_hidden_state=encoded)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """The tokens that the memory has not."""
        memory = self.memory_for(kwargs)
        ids = input_ids if memory is None else input_ids[:, memory.length :]
        names = ("attention_mask", "encoder_outputs", "decoder_attention_mask")
        given = {name: kwargs.get(name) for name in names}
        return {"decoder_input_ids": ids, "past_key_values": memory} | given
