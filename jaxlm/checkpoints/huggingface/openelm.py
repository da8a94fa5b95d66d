"""OpenELM (arXiv 2404.14619): a pre-norm decoder whose heads and feed-forward widths grow from layer to layer.

transformers has no such class; the released folders bring a modelling file of their own, whose names and fields these
are. An exported folder needs that file beside it to be loaded there.
"""

import itertools
import math
from collections.abc import Sequence

from jaxlm.checkpoints.huggingface.family import Family, Json, activation, activation_name, causal_decoder, one
from jaxlm.checkpoints.huggingface.fields import Fields
from jaxlm.checkpoints.huggingface.tensors import Linear, Same, Table, entry, layers, linear, norm
from jaxlm.layers.attention import AttentionConfig, QKNorm
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.positions import Rope
from jaxlm.models.config import HeadConfig, LanguageModelConfig
from jaxlm.models.openelm import round_to, scaled, with_sizes


class OpenElm(Family):
    """OpenELM."""

    model_type = "openelm"
    architecture = "OpenELMForCausalLM"
    length_field = "max_context_length"

    def read(self, fields: Fields) -> LanguageModelConfig:
        """See `Family`."""
        width, count, head_dim = fields("model_dim"), fields("num_transformer_layers"), fields("head_dim")
        fields.expect("normalization_layer_name", "rms_norm")
        fields(self.length_field, None)
        fields("rope_max_length", None)
        normed, shared = NormConfig(), fields("num_gqa_groups", 1)
        across = fields("qkv_multipliers", (1.0, 1.0))
        heads = [size // head_dim for size in scaled(width, count, _ends(across), head_dim * shared)]
        heads = fields("num_query_heads", heads)
        keys = fields("num_kv_heads", [h // shared for h in heads])
        if len(heads) != count or any(h != k * shared for h, k in zip(heads, keys, strict=True)):
            raise ValueError(
                f"num_query_heads {heads} and num_kv_heads {keys} must name {count} layers with {shared} query heads "
                f"for each key head, which num_gqa_groups says."
            )
        divisor, by = fields("ffn_dim_divisor", 256), fields("ffn_multipliers", (0.5, 4.0))
        if isinstance(by, Sequence) and len(by) == count:
            hidden = [round_to(multiplier * width, divisor) for multiplier in by]
        else:
            hidden = scaled(width, count, _ends(by), divisor)
        normalized = fields("normalize_qk_projections", False)
        block = BlockConfig(
            AttentionConfig(
                1,
                head_dim,
                position=Rope(float(fields("rope_freq_constant", 10000))),
                qk_norm=QKNorm.HEAD if normalized else QKNorm.NONE,
                qk_norm_config=normed if normalized else None,
            ),
            FeedForwardConfig(1, activation(fields("activation_fn_name", "swish")), gated=fields("ffn_with_glu", True)),
            normed,
        )
        return causal_decoder(
            fields("vocab_size"),
            width,
            [with_sizes(block, h, shared, f) for h, f in zip(heads, hidden, strict=True)],
            head=HeadConfig(tied=fields("share_input_output_layers", True)),
            final_norm=normed,
        )

    def write(self, config: LanguageModelConfig) -> Json:
        """See `Family`."""
        blocks = config.decoder.all_blocks
        attentions = [block.attention for block in blocks]
        heads = [attention.num_heads for attention in attentions]
        shared = one([a.num_heads // a.kv_heads for a in attentions], "how many query heads share a key head")
        hidden = [block.feed_forward.hidden for block in blocks]
        attention, fed = attentions[0], blocks[0].feed_forward
        return {
            "vocab_size": config.vocab_size,
            "model_dim": config.width,
            "num_transformer_layers": len(blocks),
            "head_dim": attention.head_dim,
            "num_gqa_groups": shared,
            "num_query_heads": heads,
            "num_kv_heads": [a.kv_heads for a in attentions],
            "qkv_multipliers": multipliers(config.width, heads, attention.head_dim, shared),
            "ffn_multipliers": [width / config.width for width in hidden],
            "ffn_dim_divisor": math.gcd(*hidden),
            "ffn_with_glu": fed.gated,
            "activation_fn_name": activation_name(fed.activation, "swish"),
            "normalization_layer_name": "rms_norm",
            "normalize_qk_projections": attention.qk_norm is QKNorm.HEAD,
            "share_input_output_layers": config.head.tied,
            "rope_freq_constant": attention.position.base,
        }

    def table(self, config: LanguageModelConfig) -> Table:
        """See `Family`."""
        gated = config.decoder.all_blocks[0].feed_forward.gated
        first = ("feed_forward/gate", "feed_forward/up") if gated else ("feed_forward/up",)
        block = (
            *linear("attn.qkv_proj", "attention/query", "attention/key", "attention/value"),
            *linear("attn.out_proj", "attention/output", inputs=2),
            *norm("attn.q_norm", "attention/query_norm"),
            *norm("attn.k_norm", "attention/key_norm"),
            *linear("ffn.proj_1", *first),
            *linear("ffn.proj_2", "feed_forward/down"),
            *norm("attn_norm", "attention_norms/before"),
            *norm("ffn_norm", "feed_forward_norms/before"),
        )
        return (
            entry("transformer.token_embeddings.weight", "embedding/tokens", form=Same()),
            *layers(block, config.decoder.depth, "transformer.layers", "decoder/layers"),
            *norm("transformer.norm", "decoder/norm"),
            entry("lm_head.weight", "vocabulary_head/kernel", form=Linear()),
        )


def multipliers(width: int, heads: Sequence[int], head_dim: int, shared: int) -> tuple[float, float]:
    """`qkv_multipliers` from which the modelling file computes these heads: hundredths, the roundest there are.

    Raises:
      ValueError: none do, so that the modelling file would make another model.
    """
    divisor = head_dim * shared

    def around(count: int) -> list[float]:
        size = count * head_dim
        first, last = (math.floor(100 * (size + by * divisor) / width) for by in (-1, 1))
        return sorted((n / 100 for n in range(max(first, 1), last + 1)), key=lambda x: (len(f"{x:g}"), abs(x - 1)))

    for ends in itertools.product(around(heads[0]), around(heads[-1])):
        if [size // head_dim for size in scaled(width, len(heads), ends, divisor)] == list(heads):
            return ends
    raise ValueError(f"the heads {list(heads)} are not those of OpenELM's layer-wise scaling")


def _ends(multiplier: float | Sequence[float]) -> tuple[float, float]:
    """Of the first and the last layer."""
    first, last = (multiplier, multiplier) if isinstance(multiplier, int | float) else multiplier
    return first, last
