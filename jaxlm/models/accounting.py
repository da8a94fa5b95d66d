"""What a model costs: parameters and floating-point operations, from its configuration alone."""

import math
from collections.abc import Callable, Iterator

import jax
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.layers.disentangled_attention import RelativeEmbeddings
from jaxlm.models import build_model
from jaxlm.models.config import LanguageModelConfig, ModelConfig, ReplacedTokenDetectorConfig

Path = tuple[str, ...]

_ONCE_A_STEP = ("position_key", "position_query")  # multiplied with relative positions, not with tokens
_READ_FROM_ENCODER = (("cross_attention", "key"), ("cross_attention", "value"))


def count_parameters(config: ModelConfig, *, where: Callable[[Path], bool] | None = None, active: bool = False) -> int:
    """Number of parameters; none is made.

    Args:
      config: the model.
      where: counts only parameters whose path it accepts, e.g. ("decoder", "layers", "0", "attention", "query",
        "kernel"); None counts all.
      active: counts those that a token meets: of a layer with many experts the few that it goes through.
    """
    found = (p for path, p in parameters(config) if where is None or where(path))
    return sum(_active_size(p) if active else math.prod(p.shape) for p in found)


def _active_size(parameter: nnx.Param) -> int:
    return round(math.prod(parameter.shape) * parameter.get_metadata().get("share", 1.0))


def parameters(config: ModelConfig) -> Iterator[tuple[Path, nnx.Param]]:
    """(path, parameter) for every parameter, with shapes in place of arrays."""
    model = nnx.eval_shape(lambda: build_model(config, key=jax.random.key(0)))
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        yield tuple(map(str, path)), parameter


def flops_per_token(config: ModelConfig, length: int, encoder_length: int = 0) -> float:
    """Floating-point operations of one training step, forward and backward, divided by the tokens of its batch.

    A matrix of n entries costs 2 n a token forwards and twice that backwards, so 6 n; embedding tables that are
    looked up cost nothing, output matrices count at every position, and of a layer's experts those that a token goes
    through. An attention layer costs, for H heads of size D, 12 H D for each (query, key) pair that its mask shows.
    A row of T tokens has T^2 such pairs in an encoder, T^2 / 2 under a causal mask (a prefix decoder counts as causal),
    and with a window of w keys on a side w - w^2 / 2T a query for that side; documents packed into a row are not told
    apart. Norms, softmax, rotations, the optimizer and anything recomputed count as nothing.

    Args:
      config: the model.
      length: tokens in a row (T); of an encoder-decoder, in the decoder's.
      encoder_length: tokens in the encoder's row (S) of an encoder-decoder, else 0.

    Returns:
      FLOPs over (length + encoder_length).
    """
    if isinstance(config, ReplacedTokenDetectorConfig):
        verdict = count_parameters(config, where=lambda path: path[0] == "verdict" and path[-1] == "kernel")
        models = [m for m in (config.generator, config.discriminator) if m is not None]
        return sum(flops_per_token(m, length) for m in models) + 6.0 * verdict
    if (encoder_length > 0) != (config.architecture is Architecture.ENCODER_DECODER):
        raise ValueError(
            f"encoder_length={encoder_length} does not fit the architecture {config.architecture.value}: only an "
            f"encoder_decoder has two rows, and needs both lengths."
        )
    total = sum(6.0 * size * tokens for size, tokens in _matrices(config, length, encoder_length))
    total += sum(_mixing_flops(config, length, encoder_length))
    return total / (length + encoder_length)


def _matrices(config: LanguageModelConfig, length: int, encoder_length: int) -> Iterator[tuple[int, int]]:
    """(entries, tokens that are multiplied with them) for every matrix."""
    heads = max(config.future_tokens, 1)
    for path, parameter in parameters(config):
        size, tokens = _active_size(parameter), length
        if parameter.role not in ("hidden", "output") or path[0] == "pooler" or path[-2] in _ONCE_A_STEP:
            continue
        if path[0] == "vocabulary_head":
            tokens = heads * length
        elif path[0] == "embedding":  # its projection
            tokens = length if config.encoder_embedding else length + encoder_length
        elif encoder_length and (path[0] in ("encoder", "encoder_embedding") or path[-3:-1] in _READ_FROM_ENCODER):
            tokens = encoder_length
        yield size, tokens
    if config.head is not None and config.head.tied:
        yield config.vocab_size * (config.embedding.width or config.width), heads * length


def _mixing_flops(config: LanguageModelConfig, length: int, encoder_length: int) -> Iterator[float]:
    """Of each block, what passes between the tokens of a row."""
    for name, stack in config.stacks.items():
        encodes = config.architecture is Architecture.ENCODER or (encoder_length > 0 and name == "encoder")
        rows = (encoder_length, 0) if encoder_length and name == "encoder" else (length, encoder_length)
        for block in stack.all_blocks:
            yield block.mixing_flops(*rows, both_sides=encodes)
            if isinstance(stack.relative_positions, RelativeEmbeddings):
                # Each term with positions is one product with 2 K vectors, where a pair of tokens stands for two.
                pairs = block.attention.terms * stack.relative_positions.span * rows[0]
                yield block.attention.pair_flops * pairs
    for _ in range(config.future_tokens):
        yield config.future_block.mixing_flops(length, 0, both_sides=False)
