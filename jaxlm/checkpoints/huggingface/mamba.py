"""Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060).

In transformers the gate before Mamba-2's norm is there whatever `norm_before_gate` says, and its step for one token
forgets `time_step_limit`: where that is set, its `generate` and its forward pass differ from each other.
"""

import math
from typing import Any

from jaxlm.checkpoints.huggingface.family import Family, Json, activation, activation_name, causal_decoder
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import (
    Linear,
    Same,
    Table,
    Vector,
    convolution,
    entry,
    layers,
    linear,
    norm,
    within,
)
from jaxlm.layers.mamba import MambaConfig
from jaxlm.layers.mamba2 import Mamba2Config
from jaxlm.layers.mamba_block import MambaBlockConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig

MIXER: Table = (
    *linear("in_proj", "value", "gate"),
    *convolution("conv1d", "convolution"),
    entry("x_proj.weight", "step_down/kernel", "write/kernel", "read/kernel", form=Linear()),
    entry("dt_proj.weight", "step_up/kernel", form=Linear()),
    entry("dt_proj.bias", "step_bias", form=Vector()),
    entry("A_log", "log_decay", form=Same()),
    entry("D", "skip", form=Same()),
    *linear("out_proj", "output"),
)
MIXER2: Table = (
    *linear("in_proj", "gate", "value", "write", "read", "step"),
    *convolution("conv1d", "value_convolution", "write_convolution", "read_convolution"),
    entry("dt_bias", "step_bias", form=Same()),
    entry("A_log", "log_decay", form=Same()),
    entry("D", "skip", form=Same()),
    entry("norm.weight", "scale", form=Vector()),
    *linear("out_proj", "output", inputs=2),
)
# Where step sizes start, how sums and scans are computed, and what the released files say twice or of other code.
_INCONSEQUENTIAL = """time_step_min time_step_max time_step_floor time_step_init_scheme time_step_scale residual_in_fp32
    rescale_prenorm_residual use_mambapy use_associative_scan chunk_size d_model d_inner n_layer fused_add_norm
    pad_vocab_size_multiple norm_before_gate""".split()
_ENDINGS = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # as in the authors' own files


def _model(fields: Fields, mixer: MambaConfig | Mamba2Config, *, tied: bool) -> LanguageModelConfig:
    for name in _INCONSEQUENTIAL:
        fields(name, None)
    fields.expect("rms_norm", True)
    normed = NormConfig(epsilon=fields("layer_norm_epsilon", 1e-5))
    return causal_decoder(
        fields("vocab_size"),
        fields("hidden_size"),
        [MambaBlockConfig(mixer, normed)] * fields("num_hidden_layers"),
        head=HeadConfig(tied=fields("tie_word_embeddings", tied)),
        final_norm=normed,
    )


def _written(config: LanguageModelConfig) -> Json:
    block = config.decoder.all_blocks[0]
    mixer = block.mixer
    expand = mixer.inner / config.width
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.decoder.depth,
        "expand": int(expand) if expand.is_integer() else expand,
        "state_size": mixer.state,
        "conv_kernel": mixer.taps,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.convolution_bias,
        "hidden_act": activation_name(mixer.activation, "silu"),
        "layer_norm_epsilon": block.norm.epsilon,
        "tie_word_embeddings": config.head.tied,
    }


def _table(config: LanguageModelConfig, mixer: Table) -> Table:
    block = (*norm("norm", "norm"), *within(mixer, "mixer", "mixer"))
    return (
        entry("backbone.embeddings.weight", "embedding/tokens", form=Same()),
        *layers(block, config.decoder.depth, "backbone.layers", "decoder/layers"),
        *norm("backbone.norm_f", "decoder/norm"),
        entry("lm_head.weight", "vocabulary_head/kernel", form=Linear()),
    )


class Mamba(Family):
    """Mamba."""

    model_type = "mamba"
    architecture = "MambaForCausalLM"
    endings = _ENDINGS

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        width, rank = fields("hidden_size"), fields("time_step_rank", "auto")
        inner = int(fields("expand", 2) * width)
        fields.expect("intermediate_size", inner)
        mixer = MambaConfig(
            inner,
            step_rank=math.ceil(width / 16) if rank == "auto" else rank,
            state=fields("state_size", 16),
            taps=fields("conv_kernel", 4),
            convolution_bias=fields("use_conv_bias", True),
            bias=fields("use_bias", False),
            activation=activation(fields("hidden_act", "silu")),
        )
        return _model(fields, mixer, tied=True)

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        mixer = config.decoder.all_blocks[0].mixer
        return _written(config) | {"intermediate_size": mixer.inner, "time_step_rank": mixer.step_rank}

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return _table(config, MIXER)


class Mamba2(Family):
    """Mamba-2."""

    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"
    endings = _ENDINGS

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        fields("time_step_rank", None)  # of no use in Mamba-2
        heads, head_dim = fields("num_heads", 128), fields("head_dim", 64)
        fields.expect("intermediate_size", heads * head_dim)
        if heads * head_dim != fields("expand", 2) * fields("hidden_size"):
            raise ValueError(
                f"config.json has num_heads = {heads} of head_dim = {head_dim}, which is not hidden_size x expand."
            )
        epsilon = fields("layer_norm_epsilon", 1e-5)
        mixer = Mamba2Config(
            heads,
            head_dim,
            state=fields("state_size", 128),
            groups=fields("n_groups", 8),
            taps=fields("conv_kernel", 4),
            convolution_bias=fields("use_conv_bias", True),
            bias=fields("use_bias", False),
            activation=activation(fields("hidden_act", "silu")),
            step_limit=_limit(fields("time_step_limit", (0.0, math.inf))),
            epsilon=epsilon,
        )
        return _model(fields, mixer, tied=False)

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        mixer = config.decoder.all_blocks[0].mixer
        found = _written(config) | {"num_heads": mixer.num_heads, "head_dim": mixer.head_dim, "n_groups": mixer.groups}
        if mixer.step_limit is not None:
            found["time_step_limit"] = [_INFINITY if x is None else x for x in mixer.step_limit]
        return found

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return _table(config, MIXER2)


_INFINITY = {"__float__": "Infinity"}  # what transformers makes of it, JSON having none


def _limit(written: Any) -> tuple[float, float | None] | None:
    least, most = (math.inf if x == _INFINITY else float(x) for x in written)
    if least == 0.0 and most == math.inf:
        return None
    return least, None if most == math.inf else most
