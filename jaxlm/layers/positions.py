"""Where a token stands: rotary (RoPE) with its scalings, T5's relative biases, ALiBi; learned and sinusoidal tables."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.layers.parameters import ParameterMaker, PathKey
from pallas_kernels import biases


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (arXiv 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class NtkScaling:
    """The base grows so that the lowest frequency is divided by `factor` and the highest keeps.

    Attributes:
      factor: how much longer texts are than those trained on.
      original_length: None: always; a number of tokens: only on rows longer than it, and in proportion (dynamic NTK).
    """

    factor: float
    original_length: int | None = None


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth passage between (arXiv 2407.21783).

    Attributes:
      factor: divisor of the low frequencies.
      low_frequency_factor: wavelengths beyond original_length / this are low.
      high_frequency_factor: wavelengths below original_length / this are high.
      original_length: context length of the first training, in tokens.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, 3.2): a ramp between interpolated and kept frequencies, and a softer attention.

    Attributes:
      factor: s, how much longer texts are than those trained on.
      original_length: L, context length of the first training, in tokens.
      beta_fast: frequencies with more than this many turns in L are kept.
      beta_slow: those with fewer than this many are divided by s.
      attention_factor: factor on queries and on keys; None is the paper's 0.1 ln(s) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv 2104.09864), halves rotated against each other as in GPT-NeoX and Llama.

    Attributes:
      base: wavelengths grow geometrically from 2 pi to 2 pi base.
      fraction: share of each head's dimensions that is rotated, the first ones (partial rotary: GPT-J, NeoX).
      scaling: for texts longer than those trained on.
    """

    base: float = 10000.0
    fraction: float = 1.0
    scaling: LinearScaling | NtkScaling | Llama3Scaling | YarnScaling | None = None

    def rotated_dims(self, head_dim: int) -> int:
        """How many dimensions of a head are rotated: an even number."""
        return int(head_dim * self.fraction) // 2 * 2

    def frequencies(self, head_dim: int, length: int) -> tuple[np.ndarray, float]:
        """(radians a position for each pair of dimensions, factor on the rotated vectors).

        Args:
          head_dim: D.
          length: tokens in a row; only dynamic NTK looks at it.
        """
        dims, base, scaling = self.rotated_dims(head_dim), self.base, self.scaling
        if isinstance(scaling, NtkScaling):
            factor = scaling.factor
            if scaling.original_length is not None:
                factor = max(1.0, factor * length / scaling.original_length - (factor - 1.0))
            base = base * factor ** (dims / (dims - 2))
        exponents = np.arange(0, dims, 2) / dims
        frequencies = base**-exponents
        if isinstance(scaling, LinearScaling):
            frequencies = frequencies / scaling.factor
        elif isinstance(scaling, Llama3Scaling):
            turns = scaling.original_length * frequencies / (2 * math.pi)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
        elif isinstance(scaling, YarnScaling):

            def dimension(turns: float) -> float:
                return dims * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

            low = max(math.floor(dimension(scaling.beta_fast)), 0)
            high = min(math.ceil(dimension(scaling.beta_slow)), dims - 1)
            interpolated = np.clip((np.arange(dims // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
            frequencies = frequencies * (1.0 - interpolated + interpolated / scaling.factor)
            factor = scaling.attention_factor
            return frequencies, 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
        return frequencies, 1.0


Rotation = tuple[jax.Array, jax.Array]  # (cosine, sine), each float32 [B, T, 1, rotated dimensions / 2]


def rotation(config: Rope, positions: jax.Array, head_dim: int) -> Rotation:
    """Cosines and sines for [B, T] positions, computed once for all layers that share `config`."""
    frequencies, factor = config.frequencies(head_dim, positions.shape[-1])
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    return factor * jnp.cos(angles)[:, :, None], factor * jnp.sin(angles)[:, :, None]


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates the first dimensions of each head of x [B, T, H, D]."""
    cosine, sine = by
    half = cosine.shape[-1]
    first, second = (x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32))
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :].astype(jnp.float32))
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RelativePositions:
    """T5's relative position biases (arXiv 1910.10683, 2.1): one table a layer, or one a stack (StackConfig).

    Attributes:
      buckets: how many groups of distances have a bias of their own, for each head.
      max_distance: beyond it all distances are one group.
      bidirectional: keys after the query have half of the buckets. False puts them all into the bucket of distance 0:
        right for causal decoders; the architecture study ran its prefix decoders so as well.
    """

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True

    def __post_init__(self):
        exact = self.buckets // (4 if self.bidirectional else 2)  # distances with a bucket of their own
        if exact < 1 or self.max_distance <= exact:
            raise ValueError(
                f"RelativePositions.max_distance={self.max_distance} must be greater than {exact}, the number of "
                f"distances that have one of the {self.buckets} buckets to themselves."
            )


class RelativeTable(nnx.Module):
    """The table of `RelativePositions`."""

    def __init__(self, config: RelativePositions, make: ParameterMaker, heads: int, *, key: PathKey):
        # T5X: variance scaling 1.0 over the mean of both sides.
        std = math.sqrt(2.0 / (config.buckets + heads))
        self.table = make.table(key, (("relpos_buckets", config.buckets), ("heads", heads)), std)
        self.config = config

    def __call__(self) -> biases.RelativeBias:
        """The bias for attention."""
        return biases.RelativeBias(self.table[...], self.config.max_distance, self.config.bidirectional)


@dataclasses.dataclass(frozen=True)
class Alibi:
    """A penalty that grows with distance, at a fixed slope for each head (arXiv 2108.12409)."""

    def bias(self, heads: int) -> biases.AlibiBias:
        """The paper's slopes: powers of 2^(-8/n), with those of the next power of two between them if n is none."""

        def powers(n: int) -> list[float]:
            return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

        n = 2 ** math.floor(math.log2(heads))
        return biases.AlibiBias(np.array(powers(n) + powers(2 * n)[::2][: heads - n], np.float32))


@dataclasses.dataclass(frozen=True)
class LearnedPositions:
    """One learned vector a position, added to the embeddings.

    Attributes:
      max_length: number of positions.
      unused: rows of the table before the first position's (RoBERTa has two).
    """

    max_length: int
    unused: int = 0


@dataclasses.dataclass(frozen=True)
class SinusoidalPositions:
    """Fixed sines and cosines added to the embeddings (arXiv 1706.03762, 3.5; halves, as in Tensor2Tensor).

    Attributes:
      base: wavelengths grow geometrically from 2 pi to 2 pi base.
    """

    base: float = 10000.0

    def __call__(self, positions: jax.Array, width: int) -> jax.Array:
        """float32 [..., width] for integer positions [...]."""
        half = width // 2
        frequencies = np.exp(-math.log(self.base) * np.arange(half) / max(half - 1, 1)).astype(np.float32)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return jnp.pad(table, [(0, 0)] * positions.ndim + [(0, width - 2 * half)])
