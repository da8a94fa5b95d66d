"""Small models of each family with every feature of it switched on, and what to change to see that each one counts.

transformers and torch are imported by those who call, so that the cases can be listed without them.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

from jaxlm.layers.block import Arrangement, Placement
from jaxlm.layers.convolved_block import ConvolvedBlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.mixture_of_experts import MixtureOfExpertsConfig, Scoring
from jaxlm.layers.norms import NormKind
from jaxlm.layers.stack import StackConfig
from jaxlm.models.config import ModelConfig

Change = Callable[[ModelConfig], ModelConfig]

DECODER = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=32,  # shorter than the rows of the test
)
ENCODER = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"} | {
    "max_position_embeddings": 64
}
T5 = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4)
T5_BUCKETS = dict(relative_attention_num_buckets=16, relative_attention_max_distance=40)
MAMBA = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, state_size=4, layer_norm_epsilon=1e-4)
MAMBA2 = MAMBA | dict(num_heads=8, head_dim=8, state_size=8)
DEBERTA = ENCODER | dict(relative_attention=True, pos_att_type="c2p|p2c", legacy=False, max_position_embeddings=48)
LLAMA3 = dict(rope_type="llama3", rope_theta=5000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=5000.0, factor=2.0, original_max_position_embeddings=16)
GEMMA3_ROPES = {
    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}


GEMMA2 = dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=20)
T5GEMMA = DECODER | GEMMA2 | dict(attn_logit_softcapping=10.0, num_hidden_layers=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model to build with transformers.

    Attributes:
      name: of the case.
      model: transformers' class.
      options: of its configuration.
      features: what must move the logits when it is changed, by name.
      scale: what the norms' scales are drawn around.
    """

    name: str
    model: str
    options: dict[str, Any]
    features: dict[str, Change] = dataclasses.field(default_factory=dict)
    scale: float = 1.0

    def __str__(self) -> str:
        return self.name


def stacks(change: Callable[[StackConfig], StackConfig]) -> Change:
    """The change of every stack."""
    return lambda config: dataclasses.replace(config, **{name: change(s) for name, s in config.stacks.items()})


def blocks(**changes: Any) -> Change:
    """These fields of every block; a function gets the old value."""

    def of_stack(stack: StackConfig) -> StackConfig:
        return dataclasses.replace(stack, blocks=tuple(_replaced(block, changes) for block in stack.blocks))

    return stacks(of_stack)


def convolution(**changes: Any) -> Change:
    """These fields of the blocks with a convolution."""

    def of_stack(stack: StackConfig) -> StackConfig:
        each = (_replaced(b, changes) if isinstance(b, ConvolvedBlockConfig) else b for b in stack.blocks)
        return dataclasses.replace(stack, blocks=tuple(each))

    return stacks(of_stack)


def attention(**changes: Any) -> Change:
    """These fields of every self-attention."""
    return blocks(attention=lambda old: _replaced(old, changes))


def rope(**changes: Any) -> Change:
    """These fields of every RoPE."""
    return attention(position=lambda old: old if old is None else _replaced(old, changes))


def head(**changes: Any) -> Change:
    """These fields of the head."""
    return lambda config: dataclasses.replace(config, head=_replaced(config.head, changes))


def embedding(**changes: Any) -> Change:
    """These fields of the embedding."""
    return lambda config: dataclasses.replace(config, embedding=_replaced(config.embedding, changes))


def discriminator(change: Change) -> Change:
    """The change of a detector's discriminator."""
    return lambda config: dataclasses.replace(config, discriminator=change(config.discriminator))


def relative(**changes: Any) -> Change:
    """These fields of the relative positions of every stack."""
    return stacks(
        lambda stack: dataclasses.replace(stack, relative_positions=_replaced(stack.relative_positions, changes))
    )


def feed_forward(**changes: Any) -> Change:
    """These fields of every feed-forward layer."""
    return blocks(feed_forward=lambda old: _replaced(old, changes))


def mixer(**changes: Any) -> Change:
    """These fields of every Mamba mixer."""
    return blocks(mixer=lambda old: _replaced(old, changes))


def experts(**changes: Any) -> Change:
    """These fields of every mixture of experts."""

    def of_layer(old: FeedForwardConfig) -> FeedForwardConfig:
        return _replaced(old, changes) if isinstance(old, MixtureOfExpertsConfig) else old

    return blocks(feed_forward=of_layer)


def norms(**changes: Any) -> Change:
    """These fields of every norm of the blocks."""
    return blocks(norm=lambda old: _replaced(old, changes))


def _replaced(old: Any, changes: dict[str, Any]) -> Any:
    return dataclasses.replace(
        old,
        **{
            name: new(getattr(old, name)) if isinstance(new, types.FunctionType) else new
            for name, new in changes.items()
        },
    )


def _wider(window: tuple[int, int] | None) -> tuple[int, int] | None:
    return window and (window[0] + 1, window[1])


ROPE = {"rope base": rope(base=lambda base: base * 1.05), "activation": feed_forward(activation=Activation.GELU)}
GEMMA = ROPE | {"activation": feed_forward(activation=Activation.RELU)}
MIXER = {
    "activation": mixer(activation=Activation.GELU_TANH),
    "norm": blocks(norm=lambda old: dataclasses.replace(old, kind=NormKind.LAYER)),
}
WINDOW = {"window": attention(window=_wider)}
MIXTURE = {
    "normalised weights": experts(normalize=lambda normalized: not normalized),
    "experts a token": experts(experts_per_token=1),
    "scores": experts(scoring=Scoring.SIGMOID),
}
DISENTANGLED = {
    "content to position": attention(content_to_position=False),
    "position to content": attention(position_to_content=False),
    "score scale": attention(scale=0.35),
}

CASES = (
    Case(
        "llama3",
        "LlamaForCausalLM",
        DECODER | dict(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 16}),
        ROPE | {"rope scaling": rope(scaling=None)},
    ),
    Case("llama_biases", "LlamaForCausalLM", DECODER | dict(attention_bias=True, mlp_bias=True), ROPE),
    Case("llama_yarn", "LlamaForCausalLM", DECODER | dict(rope_parameters=YARN), {"yarn": rope(scaling=None)}),
    Case(
        "llama_dynamic",
        "LlamaForCausalLM",
        DECODER | dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="dynamic", rope_theta=5e3, factor=4.0)),
        {"dynamic NTK": rope(scaling=None)},
    ),
    Case("mistral", "MistralForCausalLM", DECODER | dict(sliding_window=8, head_dim=16), ROPE | WINDOW),
    Case(
        "qwen2",
        "Qwen2ForCausalLM",
        DECODER | dict(sliding_window=8, use_sliding_window=True, max_window_layers=2),
        ROPE | WINDOW,
    ),
    Case(
        "qwen3",
        "Qwen3ForCausalLM",
        DECODER | dict(sliding_window=8, use_sliding_window=True, max_window_layers=2, head_dim=16),
        ROPE | WINDOW,
    ),
    Case(
        "gemma",
        "GemmaForCausalLM",
        DECODER | dict(head_dim=16),
        GEMMA | {"embeddings' scale": embedding(scale_by_width=False)},
        scale=0.0,
    ),
    Case(
        "gemma2",
        "Gemma2ForCausalLM",
        DECODER | GEMMA2,
        GEMMA
        | WINDOW
        | {
            "attention soft cap": attention(soft_cap=None),
            "logit soft cap": head(soft_cap=None),
            "score scale": attention(scale=None),
            "norm offset": norms(scale_offset=0.9),
        },
        scale=0.0,
    ),
    Case(
        "gemma3",
        "Gemma3ForCausalLM",
        DECODER | GEMMA2 | dict(layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=GEMMA3_ROPES),
        GEMMA | WINDOW | {"rope scaling": rope(scaling=None)},
        scale=0.0,
    ),
    Case(
        "mixtral",
        "MixtralForCausalLM",
        DECODER | dict(sliding_window=8, num_local_experts=4),
        ROPE | WINDOW | MIXTURE,
    ),
    Case(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        DECODER
        | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40)
        | dict(decoder_sparse_step=2, sliding_window=8, use_sliding_window=True, max_window_layers=3),
        WINDOW | MIXTURE | {"shared gate": experts(shared_gate=None)},
    ),
    Case(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        DECODER
        | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, head_dim=16)
        | dict(mlp_only_layers=[1], sliding_window=8, use_sliding_window=True, attention_bias=True),
        WINDOW | MIXTURE,
    ),
    Case("olmo2", "Olmo2ForCausalLM", DECODER, ROPE | {"norm epsilon": norms(epsilon=1e-2)}),
    Case(
        "gpt2",
        "GPT2LMHeadModel",
        dict(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=64, n_inner=80),
        {"gelu's form": feed_forward(activation=Activation.RELU), "norm epsilon": norms(epsilon=1e-2)},
    ),
    Case(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        ENCODER,
        {
            "rotated share": rope(fraction=0.5),
            "parallel branches": blocks(arrangement=Arrangement.SEQUENTIAL),
        },
    ),
    Case(
        "gpt_neox_sequential",
        "GPTNeoXForCausalLM",
        ENCODER | dict(use_parallel_residual=False),
        {"sequential branches": blocks(arrangement=Arrangement.PARALLEL_NORMS)},
    ),
    Case("mamba", "MambaForCausalLM", MAMBA | dict(use_bias=True, conv_kernel=3, time_step_rank=3), MIXER),
    Case("mamba_plain", "MambaForCausalLM", MAMBA | dict(use_conv_bias=False, tie_word_embeddings=False), MIXER),
    Case(
        "mamba2",
        "Mamba2ForCausalLM",
        MAMBA2 | dict(n_groups=2, use_bias=True, time_step_limit=(0.65, 0.75)),
        MIXER | {"step limit": mixer(step_limit=None), "norm's epsilon": mixer(epsilon=0.1)},
    ),
    Case(
        "mamba2_plain",
        "Mamba2ForCausalLM",
        MAMBA2 | dict(n_groups=1, use_conv_bias=False, tie_word_embeddings=True),
        {"step limit": mixer(step_limit=(0.65, None))},
    ),
    Case(
        "t5",
        "T5ForConditionalGeneration",
        T5 | T5_BUCKETS,
        {
            "buckets' range": relative(max_distance=64),
            "direction": relative(bidirectional=lambda both: not both),
            "scaled output": head(scale_by_width=False),
            "unscaled scores": attention(scale=None),
        },
    ),
    # Scores without a scale: with larger norms, float32 itself is 5e-6 from float64 here and there.
    Case(
        "t5_v1_1",
        "T5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        {"activation": feed_forward(activation=Activation.RELU)},
        scale=0.5,
    ),
    Case(
        "mt5",
        "MT5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-gelu"),
        {"scaled output": head(scale_by_width=True)},
        scale=0.5,
    ),
    Case(
        "t5gemma",
        "T5GemmaForConditionalGeneration",
        dict(
            vocab_size=96,
            encoder=T5GEMMA | dict(sliding_window=5),
            decoder=T5GEMMA | dict(hidden_size=24),
        ),
        GEMMA
        | WINDOW
        | {
            "attention soft cap": attention(soft_cap=None),
            "cross-attention soft cap": blocks(cross_attention=lambda old: old and _replaced(old, {"soft_cap": None})),
            "logit soft cap": head(soft_cap=None),
            "score scale": attention(scale=None),
            "encoder's scale": lambda config: dataclasses.replace(config, encoder_embedding=EmbeddingConfig()),
        },
        scale=0.0,
    ),
    Case(
        "bert",
        "BertForMaskedLM",
        ENCODER,
        {"placement": blocks(placement=Placement.OUTPUT), "head's activation": head(transform=Activation.RELU)},
    ),
    Case(
        "roberta",
        "RobertaForMaskedLM",
        ENCODER | dict(type_vocab_size=1, pad_token_id=1),
        {"placement": blocks(placement=Placement.OUTPUT), "activation": feed_forward(activation=Activation.RELU)},
    ),
    Case(
        "electra_generator",
        "ElectraForMaskedLM",
        ENCODER | dict(embedding_size=16, hidden_act="relu"),
        {"head's activation": head(transform=Activation.RELU), "activation": feed_forward(activation=Activation.GELU)},
    ),
    Case(
        "electra_discriminator",
        "ElectraForPreTraining",
        ENCODER | dict(embedding_size=16, hidden_act="relu"),
        {
            "head's activation": lambda config: dataclasses.replace(config, head_activation=Activation.GELU),
            "placement": discriminator(blocks(placement=Placement.OUTPUT)),
            "activation": discriminator(feed_forward(activation=Activation.GELU)),
        },
    ),
    Case(
        "deberta_v3",
        "DebertaV2ForMaskedLM",
        DEBERTA | dict(position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False),
        DISENTANGLED | {"buckets": relative(max_distance=40), "norm of positions": relative(norm=None)},
    ),
    Case(
        "deberta_v2",
        "DebertaV2ForMaskedLM",
        DEBERTA
        | dict(max_relative_positions=12, type_vocab_size=2, hidden_act="relu", conv_kernel_size=3, conv_act="gelu"),
        DISENTANGLED
        | {
            "head's activation": head(transform=Activation.GELU),
            "convolution's activation": convolution(convolution_activation=Activation.TANH),
        },
    ),
    Case(
        "deberta_content_to_position",
        "DebertaV2ForMaskedLM",
        DEBERTA | dict(pos_att_type="c2p"),
        {"score scale": attention(scale=0.35)},
    ),
    Case(
        "modernbert",
        "ModernBertForMaskedLM",
        ENCODER | dict(pad_token_id=0, local_attention=16),
        {
            "window": attention(window=lambda window: window and (window[0], window[1] + 1)),
            "rope base": rope(base=lambda base: base * 1.5),
            "head's activation": head(transform=Activation.RELU),
        },
    ),
)

# transformers' step of Mamba-2 for one token forgets the limit of step sizes, so that there texts go on in another way
# than the forward pass says.
_FORGETS = ("mamba2",)
GENERATIVE = [
    case
    for case in CASES
    if case.model.endswith(("ForCausalLM", "LMHeadModel", "ConditionalGeneration")) and case.name not in _FORGETS
]
