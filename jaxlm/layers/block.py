"""One block of a transformer: attention, cross-attention where there is an encoder, feed-forward."""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.cache import BlockCache, Cache, CacheConfig, Extension, PackedTexts
from jaxlm.layers.context import Context
from jaxlm.layers.disentangled_attention import DisentangledAttentionConfig, RelativeVectors
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.linear_attention import LinearAttentionConfig
from jaxlm.layers.norms import Norm, NormConfig
from jaxlm.layers.parameters import ParameterMaker, PathKey
from jaxlm.layers.positions import Rope, Rotation
from jaxlm.layers.side_values import SideValues
from pallas_kernels.biases import Bias
from pallas_kernels.masks import Mask

Ways = Callable[[str, int], int]


class Placement(enum.Enum):
    """Where the norms of a branch f stand.

    PRE: x + f(norm(x)). POST: norm(x + f(x)) (the first Transformer, BERT). SANDWICH: x + norm(f(norm(x)))
    (Gemma 2). OUTPUT: x + norm(f(x)) (OLMo 2, arXiv 2501.00656, 3.2).
    """

    PRE = "pre"
    POST = "post"
    SANDWICH = "sandwich"
    OUTPUT = "output"


class Arrangement(enum.Enum):
    """How attention and feed-forward follow each other.

    SEQUENTIAL: the feed-forward reads the attention's result. PARALLEL: both read the same norm of the block's input
    (GPT-J, PaLM). PARALLEL_NORMS: each reads a norm of its own of the block's input (GPT-NeoX, arXiv 2204.06745, 2.1).
    """

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"
    PARALLEL_NORMS = "parallel_norms"


class BlockKind:
    """What others ask of the configuration of a block, whatever is in it: `BlockConfig`, `mamba.MambaBlockConfig`.

    Attributes:
      branches: how many branches of it write to the residual stream, for `ParameterMaker.residual_gain`.
    """

    branches: ClassVar[int]

    @property
    def crosses(self) -> bool:
        """Whether it attends to an encoder's output."""
        return False

    @property
    def running_state(self) -> str | None:
        """The configuration in it whose layer carries a state along the row, knowing only what came before; or None."""
        raise NotImplementedError

    @property
    def disentangled(self) -> bool:
        """Whether its scores take the stack's vectors of relative positions (DeBERTa)."""
        return False

    @property
    def heads(self) -> int | None:
        """Heads whose scores take a bias of the stack's relative positions; None: it has no scores."""
        return None

    @property
    def rotations(self) -> frozenset[tuple[Rope, int]]:
        """The RoPEs it wants, each with its head size."""
        return frozenset()

    def mixing_flops(self, length: int, encoder_length: int, *, both_sides: bool) -> float:
        """Floating-point operations between the tokens of a row, forwards and backwards: all but those with matrices.

        Args:
          length: tokens in the row (T).
          encoder_length: of the encoder's row that it attends to, or 0.
          both_sides: a token sees what follows it.
        """
        raise NotImplementedError

    def token_sizes(self, width: int, ways: Ways) -> "TokenSizes":
        """How many numbers a token has in it, for the planner's guess of memory.

        Args:
          width: model width.
          ways: (logical axis, size) -> into how many parts the mesh splits it.
        """
        raise NotImplementedError

    def build(self, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey) -> "BlockModule":
        """The module; arguments as for `FeedForwardConfig.build`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TokenSizes:
    """Numbers that a token has in a block, on one device, its input apart.

    Attributes:
      mixed: the result of attention, or of the scan.
      products: results of products with matrices, `mixed` included.
      everything: with what lies between them.
      named: of those with a name in `jaxlm.layers.remat.ACTIVATIONS`, by it, without `mixed`; roughly.
    """

    mixed: int
    products: int
    everything: int
    named: Mapping[str, int] = dataclasses.field(default_factory=dict)


class BlockModule(Protocol):
    """What a stack asks of a block."""

    def __call__(self, x: jax.Array, around: "Surroundings", context: Context) -> tuple[jax.Array, SideValues]:
        """[B, T, E] after the block, and its side values; `around` is what the stack's blocks share."""

    def prefill(
        self,
        x: jax.Array,
        around: "Surroundings",
        texts: PackedTexts,
        sources: PackedTexts | None,
        caching: CacheConfig,
        context: Context,
    ) -> tuple[jax.Array, Any]:
        """[R, T, E] after the block, and a pytree of `Cache`s of the N texts in these rows; see `Block.prefill`."""

    def extend(self, x: jax.Array, new: Extension, cache: Any, context: Context) -> tuple[jax.Array, Any]:
        """[B, t, E] after the block, t new tokens of each slot, and the cache with them in it."""


@dataclasses.dataclass(frozen=True)
class BlockConfig(BlockKind):
    """A block of a transformer.

    Attributes:
      attention: self-attention.
      feed_forward: the feed-forward layer.
      norm: every norm of the block.
      attention_norm: the norm before the attention where it differs (ModernBERT's first layer has none).
      cross_attention: attention to the encoder's output, for the decoder of an encoder-decoder.
      placement: see `Placement`.
      arrangement: see `Arrangement`.
      dropout: rate on each branch's output.
    """

    attention: AttentionConfig | LinearAttentionConfig
    feed_forward: FeedForwardConfig
    norm: NormConfig
    attention_norm: NormConfig | None = None
    cross_attention: AttentionConfig | None = None
    placement: Placement = Placement.PRE
    arrangement: Arrangement = Arrangement.SEQUENTIAL
    dropout: float = 0.0

    branches: ClassVar[int] = 2

    def __post_init__(self):
        object.__setattr__(self, "placement", Placement(self.placement))
        object.__setattr__(self, "arrangement", Arrangement(self.arrangement))
        if self.arrangement is not Arrangement.SEQUENTIAL and (
            self.placement is not Placement.PRE or self.cross_attention is not None
        ):
            raise ValueError(
                "A parallel block has placement 'pre' and no cross-attention: its branches read norms of one input."
            )
        cross = self.cross_attention
        if cross is not None and (cross.position is not None or cross.window is not None):
            raise ValueError(
                "BlockConfig.cross_attention.position and window must be None: positions of the two texts do not "
                "compare."
            )

    @property
    def crosses(self) -> bool:
        """See `BlockKind`."""
        return self.cross_attention is not None

    @property
    def running_state(self) -> str | None:
        """See `BlockKind`."""
        return type(self.attention).__name__ if self.attention.runs else None

    @property
    def disentangled(self) -> bool:
        """See `BlockKind`."""
        return isinstance(self.attention, DisentangledAttentionConfig)

    @property
    def heads(self) -> int | None:
        """See `BlockKind`."""
        return self.attention.score_heads

    @property
    def rotations(self) -> frozenset[tuple[Rope, int]]:
        """See `BlockKind`."""
        position = self.attention.position
        return frozenset({(position, self.attention.head_dim)} if isinstance(position, Rope) else ())

    def mixing_flops(self, length: int, encoder_length: int, *, both_sides: bool) -> float:
        """See `BlockKind`."""
        within = self.attention.mixing_flops(length, both_sides=both_sides)
        across = self.cross_attention.pair_flops * length * encoder_length if self.crosses else 0.0
        return within + across

    def token_sizes(self, width: int, ways: Ways) -> TokenSizes:
        """See `BlockKind`."""
        attentions = [a.token_sizes(ways) for a in (self.attention, self.cross_attention) if a is not None]
        mixed, projected = map(sum, zip(*attentions))
        hidden = getattr(self.feed_forward, "hidden", 0)
        hidden *= getattr(self.feed_forward, "experts_per_token", 1)  # of a mixture of experts
        hidden = hidden // ways("mlp", hidden) if hidden else 0
        gated = 2 if getattr(self.feed_forward, "gated", False) else 1
        outputs = width * (1 + len(attentions))
        products = projected + gated * hidden + outputs
        keys = (projected - 2 * mixed) // 2  # queries are as large as what is read
        named = {"query": mixed, "key": keys, "value": keys, "up": hidden, "gate": (gated - 1) * hidden}
        return TokenSizes(mixed, products, products + hidden + outputs, named)

    def build(self, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey) -> "Block":
        """See `BlockKind`."""
        return Block(self, make, dtype=dtype, key=key)


@dataclasses.dataclass(frozen=True, eq=False)
class Surroundings:
    """What the blocks of a stack share.

    Attributes:
      mask: self-attention's mask.
      rotations: for each Rope and head size among the blocks, cosines and sines.
      bias: what the stack shares of relative positions: a bias, vectors, or None.
      encoded: [B, S, encoder's width], the encoder's output, or None.
      cross_mask: which decoder position sees which encoder position.
      present: bool [B, T], False on padding; None: there is none.
      positions: int32 [B, T], by which relative positions go where columns do not say them; None: they do.
    """

    mask: Mask
    rotations: dict[tuple[Rope, int], Rotation]
    bias: Bias | RelativeVectors | None = None
    encoded: jax.Array | None = None
    cross_mask: Mask | None = None
    present: jax.Array | None = None
    positions: jax.Array | None = None

    def split(self) -> tuple[list[jax.Array], list[jax.Array], Callable[[list, list], "Surroundings"]]:
        """Its arrays: those [B, ...] of the batch's rows, the others, and what makes it of the two again."""
        arrays = (self.encoded, self.cross_mask, self.present, self.positions)
        parts = (self.mask, tuple(self.rotations.values()), self.bias, *arrays)
        axes = [name for part in parts for name in _first_axes(part)]
        leaves, structure = jax.tree.flatten(parts)
        of_rows = [i for i, name in enumerate(axes) if name == "batch"]
        # Python's numbers stay what they are: to some backends they are part of a mask's static form.
        others = [i for i, leaf in enumerate(leaves) if i not in of_rows and not isinstance(leaf, int | float)]

        def join(rows: list[jax.Array], shared: list[jax.Array]) -> Surroundings:
            arrays = dict(zip(of_rows + others, rows + shared, strict=True))
            parts = jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
            return Surroundings(parts[0], dict(zip(self.rotations, parts[1])), *parts[2:])

        return [leaves[i] for i in of_rows], [leaves[i] for i in others], join


def _first_axes(part: Any) -> list[str | None]:
    """What the first axis of each array runs over."""
    if isinstance(part, Mask | Bias | RelativeVectors):
        return [axes[0] if axes else None for axes in part.axes]
    return ["batch"] * len(jax.tree.leaves(part))


Attend = Callable[[jax.Array, Context], tuple[jax.Array, Cache | None]]
"""A block's attention: (normed [B, T, E], context) -> its output, and what it remembers."""


class Block(nnx.Module):
    """[B, T, E] -> [B, T, E]."""

    def __init__(self, config: BlockConfig, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey):
        def norms(first: NormConfig) -> nnx.Dict:
            before = config.placement in (Placement.PRE, Placement.SANDWICH)
            after = config.placement is not Placement.PRE
            embed = (("embed", make.width),)
            made = {"before": Norm(first, make, embed)} if before else {}
            return nnx.Dict(made | ({"after": Norm(config.norm, make, embed)} if after else {}))

        options = {"residual_gain": make.residual_gain, "dtype": dtype}
        self.attention = config.attention.build(make, key=key.at("attention"), **options)
        self.attention_norms = norms(config.attention_norm or config.norm)
        crosses = config.cross_attention is not None
        self.cross_attention = (
            config.cross_attention.build(
                make, key=key.at("cross_attention"), source_width=make.encoder_width, **options
            )
            if crosses
            else None
        )
        self.cross_attention_norms = norms(config.norm) if crosses else None
        self.feed_forward = config.feed_forward.build(make, key=key.at("feed_forward"), **options)
        parallel = config.arrangement is Arrangement.PARALLEL
        self.feed_forward_norms = None if parallel else norms(config.norm)
        self.config = config
        self.multiplier = make.parametrization.residual_multiplier(make.depth)

    def __call__(self, x: jax.Array, around: Surroundings, context: Context) -> tuple[jax.Array, SideValues]:
        """x after the block, and its side values; `around` is what the stack's blocks share."""
        options = {"rotation": self._rotation(around.rotations), "bias": around.bias, "positions": around.positions}

        def attend(y: jax.Array, inner: Context) -> tuple[jax.Array, None]:
            return self.attention(y, y, around.mask, context=inner, **options), None

        def attend_encoder(y: jax.Array, inner: Context) -> tuple[jax.Array, None]:
            mask = around.cross_mask
            return self.cross_attention(y, around.encoded, mask, rotation=None, bias=None, context=inner), None

        x, side, _ = self._run(x, attend, attend_encoder, around.present, context)
        return x, side

    def prefill(
        self,
        x: jax.Array,
        around: Surroundings,
        texts: PackedTexts,
        sources: PackedTexts | None,
        caching: CacheConfig,
        context: Context,
    ) -> tuple[jax.Array, BlockCache]:
        """x [R, T, E] after the block, and what it remembers of the N texts in these rows.

        Args:
          x: packed rows.
          around: what the stack's blocks share.
          texts: where the texts lie in the rows.
          sources: where the encoder's texts lie in the rows of `around.encoded`; None without an encoder.
          caching: see `CacheConfig`.
          context: operations.
        """
        options = {"rotation": self._rotation(around.rotations), "bias": around.bias}

        def attend(y: jax.Array, inner: Context) -> tuple[jax.Array, Cache]:
            where = {"texts": texts, "caching": caching, "context": inner}
            return self.attention.prefill(y, y, around.mask, **options, **where)

        def attend_encoder(y: jax.Array, inner: Context) -> tuple[jax.Array, Cache]:
            where = {"texts": sources, "caching": caching, "context": inner}
            mask = around.cross_mask
            return self.cross_attention.prefill(y, around.encoded, mask, rotation=None, bias=None, **where)

        x, _, caches = self._run(x, attend, attend_encoder, around.present, context)
        return x, BlockCache(*caches)

    def extend(self, x: jax.Array, new: Extension, cache: BlockCache, context: Context) -> tuple[jax.Array, BlockCache]:
        """x [B, t, E] after the block, t new tokens of each slot, and the cache with them in it."""
        options = {"rotation": self._rotation(new.rotations), "bias": new.bias}

        def attend(y: jax.Array, inner: Context) -> tuple[jax.Array, Cache]:
            return self.attention.extend(y, cache.attention, new, context=inner, **options)

        def attend_encoder(y: jax.Array, inner: Context) -> tuple[jax.Array, Cache]:
            return self.cross_attention.recall(y, cache.cross, new.source_lengths, context=inner), cache.cross

        x, _, caches = self._run(x, attend, attend_encoder, new.present, context)
        return x, BlockCache(*caches)

    def _rotation(self, rotations: Mapping[tuple[Rope, int], Rotation]) -> Rotation | None:
        attention = self.config.attention
        return rotations[attention.position, attention.head_dim] if isinstance(attention.position, Rope) else None

    def _run(
        self,
        x: jax.Array,
        attend: Attend,
        attend_encoder: Attend,
        present: jax.Array | None,
        context: Context,
    ) -> tuple[jax.Array, SideValues, tuple[Cache | None, Cache | None]]:
        """The branches in their arrangement; what self- and cross-attention remember besides."""

        def branch(name: str, run: Callable[..., tuple[jax.Array, Any]], y: jax.Array) -> tuple[jax.Array, Any]:
            inner = context.fold(name)
            out, beside = run(y, inner)
            return inner.fold("out").dropout(out, self.config.dropout), beside

        def feed(y: jax.Array, inner: Context) -> tuple[jax.Array, SideValues]:
            return self.feed_forward(y, inner, present=present)

        cross = None
        if self.config.arrangement is not Arrangement.SEQUENTIAL:
            y = _normed(x, self.attention_norms)
            read = y if self.feed_forward_norms is None else _normed(x, self.feed_forward_norms)
            fed, side = branch("feed_forward", feed, read)
            out, own = branch("attention", attend, y)
            x = self._join(x, out + fed, self.attention_norms)
        else:
            out, own = branch("attention", attend, _normed(x, self.attention_norms))
            x = self._join(x, out, self.attention_norms)
            if self.cross_attention is not None:
                out, cross = branch("cross_attention", attend_encoder, _normed(x, self.cross_attention_norms))
                x = self._join(x, out, self.cross_attention_norms)
            fed, side = branch("feed_forward", feed, _normed(x, self.feed_forward_norms))
            x = self._join(x, fed, self.feed_forward_norms)
        return context.ops.constrain(x, ("batch", "length", "embed")), side, (own, cross)

    def _join(self, x: jax.Array, y: jax.Array, norms: nnx.Dict) -> jax.Array:
        """x with a branch's output y, normed where `Placement` says."""
        if self.multiplier != 1.0:
            y = y * self.multiplier
        if self.config.placement is Placement.POST:
            return norms["after"](x + y)
        return x + (norms["after"](y) if "after" in norms else y)


def _normed(x: jax.Array, norms: nnx.Dict) -> jax.Array:
    """What a branch reads: x, normed where `Placement` says."""
    return norms["before"](x) if "before" in norms else x
