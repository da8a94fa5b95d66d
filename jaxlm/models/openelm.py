"""OpenELM's layer-wise scaling: heads and feed-forward width grow from the first layer to the last."""

import dataclasses

import numpy as np

from jaxlm.layers.block import BlockConfig


def layerwise_scaling(
    block: BlockConfig,
    width: int,
    num_layers: int,
    head_multipliers: tuple[float, float] = (0.5, 1.0),
    hidden_multipliers: tuple[float, float] = (0.5, 4.0),
    queries_per_key: int = 4,
    hidden_divisor: int = 256,
) -> tuple[BlockConfig, ...]:
    """One block a layer (arXiv 2404.14619, 2.1; roundings as in the released code).

    Args:
      block: what all layers share; its number of heads and hidden width are replaced.
      width: model width.
      num_layers: number of layers.
      head_multipliers: the heads' total width over `width`, in the first and the last layer; (1, 1) is uniform.
      hidden_multipliers: hidden width over `width`, in the first and the last layer.
      queries_per_key: query heads for each key head; the number of query heads is a multiple of it.
      hidden_divisor: hidden widths are multiples of it.
    """
    head_dim = block.attention.head_dim
    heads = scaled(width, num_layers, head_multipliers, head_dim * queries_per_key)
    hidden = scaled(width, num_layers, hidden_multipliers, hidden_divisor)
    return tuple(with_sizes(block, h // head_dim, queries_per_key, f) for h, f in zip(heads, hidden))


def with_sizes(block: BlockConfig, heads: int, queries_per_key: int, hidden: int) -> BlockConfig:
    """The block with that many query heads, of which so many share a key head, and that hidden width."""
    return dataclasses.replace(
        block,
        attention=dataclasses.replace(block.attention, num_heads=heads, num_kv_heads=heads // queries_per_key),
        feed_forward=dataclasses.replace(block.feed_forward, hidden=hidden),
    )


def scaled(width: int, num_layers: int, multipliers: tuple[float, float], divisor: int) -> tuple[int, ...]:
    """A size for each layer: from the first multiple of `width` to the last, rounded to multiples of `divisor`."""
    return tuple(round_to(width * by, divisor) for by in np.round(np.linspace(*multipliers, num_layers), 2).tolist())


def round_to(value: float, divisor: int) -> int:
    """The nearest multiple of `divisor`, at least one, and not below 90% of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
