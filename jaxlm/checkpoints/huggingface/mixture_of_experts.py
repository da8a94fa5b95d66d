"""Mixtral, Qwen2-MoE and Qwen3-MoE: decoders as Mistral and Qwen whose feed-forward layers are mixtures of experts.

Checkpoints hold each expert's matrices by themselves, and are written so. What transformers 5 calculates with, all of a
layer's experts in two tensors, is read as well.
"""

from collections.abc import Collection

from jaxlm.checkpoints.huggingface import llama
from jaxlm.checkpoints.huggingface.family import Json, layer_types, one, sliding_window
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Experts, Linear, Table, by_expert, entry, linear
from jaxlm.layers.attention import QKNorm
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.mixture_of_experts import MixtureOfExpertsConfig
from jaxlm.models.config import LanguageModelConfig

SHARED: Table = (
    *linear("mlp.shared_expert.gate_proj", "feed_forward/shared/gate"),
    *linear("mlp.shared_expert.up_proj", "feed_forward/shared/up"),
    *linear("mlp.shared_expert.down_proj", "feed_forward/shared/down"),
    entry("mlp.shared_expert_gate.weight", "feed_forward/shared_gate", form=Linear()),
)
FUSED: Table = (
    entry("mlp.gate.weight", "feed_forward/router", form=Linear()),
    entry("mlp.experts.gate_up_proj", "feed_forward/experts/gate", "feed_forward/experts/up", form=Experts()),
    entry("mlp.experts.down_proj", "feed_forward/experts/down", form=Experts()),
)


def separate(module: str, count: int, kernels: Json) -> Table:
    """Router and experts of a layer.

    Args:
      module: its name.
      count: number of experts.
      kernels: {ours: name in each expert}.
    """
    return (
        entry(f"{module}.gate.weight", "feed_forward/router", form=Linear()),
        *(
            e
            for ours, name in kernels.items()
            for e in by_expert(f"{module}.experts", name, f"feed_forward/experts/{ours}", count)
        ),
    )


def is_fused(tensors: Collection[str]) -> bool:
    """Whether a checkpoint has all experts of a layer in two tensors."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in tensors)


def mixtures(config: LanguageModelConfig) -> dict[int, MixtureOfExpertsConfig]:
    """{layer: its mixture of experts}."""
    blocks = enumerate(config.decoder.all_blocks)
    return {i: block.feed_forward for i, block in blocks if isinstance(block.feed_forward, MixtureOfExpertsConfig)}


def experts_of(config: LanguageModelConfig) -> MixtureOfExpertsConfig:
    """The mixture of experts that all layers with one share.

    Raises:
      ValueError: there is none, or they differ.
    """
    found = list(mixtures(config).values())
    if not found:
        raise ValueError("it has no experts")
    return one(found, "their experts")


class Mixtral(llama.Mistral):
    """Mixtral (arXiv 2401.04088): every layer has experts; the weights of those chosen add up to one."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        count, dense = fields("num_hidden_layers"), llama.dense(fields)
        experts = MixtureOfExpertsConfig(
            dense.hidden,
            dense.activation,
            num_experts=fields("num_local_experts", 8),
            experts_per_token=fields("num_experts_per_tok", 2),
        )
        return self.decoder(fields, {"window": sliding_window(fields)}, [{}] * count, [experts] * count)

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        experts = experts_of(config)
        return super().write(config) | {
            "num_local_experts": experts.num_experts,
            "num_experts_per_tok": experts.experts_per_token,
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        kernels = {"gate": "w1", "up": "w3", "down": "w2"}
        experts = separate("block_sparse_moe", experts_of(config).num_experts, kernels)
        return llama.table(config, (*llama.BLOCK, *experts))

    def table_of(self, config: LanguageModelConfig, tensors: Collection[str]) -> Table:
        """See `Family`."""
        return llama.table(config, (*llama.BLOCK, *FUSED)) if is_fused(tensors) else self.table(config)


class Qwen3Moe(llama.Qwen3):
    """Qwen3-MoE (arXiv 2505.09388): layers with experts, and others; a window, if there is one, in all layers."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        biased = fields("attention_bias", False)
        options = {"qkv_bias": biased, "output_bias": biased, "qk_norm": QKNorm.HEAD}
        return self.decoder(fields, options, self.windows(fields), feed_forwards(fields))

    def windows(self, fields: Fields) -> list[Json]:
        """See `Qwen2`."""
        narrow = sliding_window(fields)
        fields("max_window_layers", None)  # of no effect in this class
        return [{"window": narrow if fields("use_sliding_window", False) else None}] * fields("num_hidden_layers")

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        return super().write(config) | written_feed_forwards(config)

    def written_windows(self, config: LanguageModelConfig) -> Json:
        """See `Qwen2`."""
        seen = one([block.attention.window for block in config.decoder.all_blocks], "their window")
        return {"use_sliding_window": seen is not None, "sliding_window": None if seen is None else seen[0] + 1}

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return qwen_table(config)

    def table_of(self, config: LanguageModelConfig, tensors: Collection[str]) -> Table:
        """See `Family`."""
        return qwen_table(config, fused=is_fused(tensors))


class Qwen2Moe(llama.Qwen2):
    """Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671, 2.2.2): beside its experts a layer has a shared one with a gate."""

    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        shared = FeedForwardConfig(fields("shared_expert_intermediate_size"), llama.dense(fields).activation)
        fed = feed_forwards(fields, shared=shared, shared_gate=Activation.SIGMOID)
        return self.decoder(fields, {"qkv_bias": fields("qkv_bias", True)}, self.windows(fields), fed)

    def windows(self, fields: Fields) -> list[Json]:
        """See `Qwen2`; without `layer_types`, every other one of the first `max_window_layers`."""
        slides = fields("use_sliding_window", False)
        narrow, last, count = (
            fields("sliding_window", None),
            fields("max_window_layers", 28),
            fields("num_hidden_layers"),
        )
        default = [
            "sliding_attention" if slides and i < last and i % 2 == 0 else "full_attention" for i in range(count)
        ]
        kinds = layer_types(fields, count, default)
        return [{"window": (narrow - 1, 0) if kind == "sliding_attention" else None} for kind in kinds]

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        return (
            super().write(config)
            | written_feed_forwards(config)
            | {
                "qkv_bias": config.decoder.all_blocks[0].attention.qkv_bias,
                "shared_expert_intermediate_size": experts_of(config).shared.hidden,
            }
        )

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        return qwen_table(config)

    def table_of(self, config: LanguageModelConfig, tensors: Collection[str]) -> Table:
        """See `Family`."""
        return qwen_table(config, fused=is_fused(tensors))


def feed_forwards(fields: Fields, **options) -> list[FeedForwardConfig]:
    """Each layer's feed-forward layer in a Qwen; `options` are those of MixtureOfExpertsConfig that it adds."""
    count, dense = fields("num_hidden_layers"), llama.dense(fields)
    experts = MixtureOfExpertsConfig(
        fields("moe_intermediate_size"),
        dense.activation,
        num_experts=fields("num_experts", None) or fields("num_local_experts"),
        experts_per_token=fields("num_experts_per_tok"),
        normalize=fields("norm_topk_prob", False),
        **options,
    )
    plain, step = set(fields("mlp_only_layers", ())), fields("decoder_sparse_step", 1)
    return [dense if i in plain or (i + 1) % step else experts for i in range(count)]


def written_feed_forwards(config: LanguageModelConfig) -> Json:
    """The fields that `feed_forwards` reads."""
    experts, mixed = experts_of(config), mixtures(config)
    dense = {i: block.feed_forward for i, block in enumerate(config.decoder.all_blocks) if i not in mixed}
    return {
        # Where all layers have experts the class still wants a number.
        "intermediate_size": one([d.hidden for d in dense.values()], "their dense width") if dense else experts.hidden,
        "moe_intermediate_size": experts.hidden,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "norm_topk_prob": experts.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(dense),
    }


def qwen_table(config: LanguageModelConfig, *, fused: bool = False) -> Table:
    """The table of a Qwen: a layer takes of it what it has."""
    kernels = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    experts = FUSED if fused else separate("mlp", experts_of(config).num_experts, kernels)
    return llama.table(config, (*llama.BLOCK, *experts, *SHARED))
