"""A stack of blocks: a repeating pattern, scanned or unrolled with the same numbers, rematerialised by policy."""

import dataclasses
import enum
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.block import BlockKind, BlockModule, Surroundings
from jaxlm.layers.cache import CacheConfig, Caches, Extension, PackedTexts
from jaxlm.layers.context import Context
from jaxlm.layers.disentangled_attention import (
    RelativeEmbeddings,
    RelativeEmbeddingTable,
)
from jaxlm.layers.norms import Norm, NormConfig
from jaxlm.layers.parameters import ParameterMaker, PathKey
from jaxlm.layers.positions import RelativePositions, RelativeTable, Rope, Rotation, rotation
from jaxlm.layers.remat import Remat, RematPolicy, SaveNamed, name_activation, rematerialized
from jaxlm.layers.side_values import NO_SIDE_VALUES, SideValues
from jaxlm.layers.stacking import StackLayout
from jaxlm.parallel.pipeline import StackedLayers
from jaxlm.parallel.stages import ONE_STAGE, Stages
from pallas_kernels.masks import Mask


class Layers(enum.Enum):
    """SCAN: one program for a repeat, run R times. UNROLL: one program for each layer. The same numbers."""

    SCAN = "scan"
    UNROLL = "unroll"


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A stack of blocks.

    Attributes:
      blocks: the pattern that repeats; one block for a uniform stack, num_layers of them where all differ.
      num_layers: layers (L), a multiple of the pattern's length, not counting `prologue`.
      prologue: blocks before the pattern, each once.
      final_norm: norm of the stack's output; None where the blocks end with one (post-norm).
      relative_positions: what all blocks share of relative positions: T5's biases from one table, or the vectors of
        disentangled attention.
      layers: scanned or unrolled; see `Layers`.
      remat: what the backward pass computes again: a `Remat` by name, or `SaveNamed` with lists of activations.
      dropout: rate on the stack's output (T5).
    """

    blocks: tuple[BlockKind, ...]
    num_layers: int
    prologue: tuple[BlockKind, ...] = ()
    final_norm: NormConfig | None = None
    relative_positions: RelativePositions | RelativeEmbeddings | None = None
    layers: Layers = Layers.SCAN
    remat: RematPolicy = Remat.NONE
    dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "prologue", tuple(self.prologue))
        object.__setattr__(self, "layers", Layers(self.layers))
        if not isinstance(self.remat, SaveNamed):
            object.__setattr__(self, "remat", Remat(self.remat))
        if not self.blocks or self.num_layers < 1 or self.num_layers % len(self.blocks):
            raise ValueError(
                f"StackConfig.num_layers={self.num_layers} must be a positive multiple of the pattern's "
                f"{len(self.blocks)} blocks; put blocks that do not repeat into `prologue`."
            )
        if isinstance(self.relative_positions, RelativePositions) and len(self.heads) != 1:
            raise ValueError(
                f"One table of relative positions needs the same number of heads in all blocks, got "
                f"{sorted(self.heads)}; give each AttentionConfig a `position` of its own."
            )
        vectors = isinstance(self.relative_positions, RelativeEmbeddings)
        if any(block.disentangled != vectors for block in self.all_blocks):
            raise ValueError(
                f"Disentangled attention and RelativeEmbeddings go together in all blocks of a stack, but "
                f"StackConfig.relative_positions is {self.relative_positions}."
            )

    @property
    def all_blocks(self) -> tuple[BlockKind, ...]:
        """The block of each layer, prologue first."""
        return self.prologue + self.blocks * (self.num_layers // len(self.blocks))

    @property
    def depth(self) -> int:
        """Number of layers, with the prologue."""
        return len(self.prologue) + self.num_layers

    @property
    def branches(self) -> int:
        """Number of branches that write to the residual stream."""
        return sum(block.branches for block in self.all_blocks)

    @property
    def heads(self) -> frozenset[int]:
        """Numbers of heads among the blocks whose scores take a bias."""
        return frozenset(block.heads for block in self.all_blocks if block.heads is not None)

    @property
    def scanned_repeats(self) -> int | None:
        """R of a scanned stack; None if the layers are unrolled."""
        repeats = self.num_layers // len(self.blocks)
        return repeats if self.layers is Layers.SCAN and repeats > 1 else None


class Stack(nnx.Module):
    """[B, T, E] -> [B, T, E]."""

    def __init__(
        self,
        config: StackConfig,
        make: ParameterMaker,
        *,
        dtype: jnp.dtype,
        key: PathKey,
        stages: Stages = ONE_STAGE,
    ):
        make = dataclasses.replace(make, depth=config.depth, branches=config.branches)
        layer_key, repeats = key.at("layers"), config.scanned_repeats
        if stages.count > 1 and repeats is None:
            raise ValueError(
                f"{stages.count} pipeline stages need a scanned stack whose pattern repeats, but this one's "
                f"{config.num_layers} layers are {config.layers.value!r} with a pattern of {len(config.blocks)}; set "
                f"StackConfig.layers to 'scan' with a shorter pattern, or MeshConfig.stage to 1."
            )

        def block(config: BlockKind, key: PathKey, make: ParameterMaker = make) -> BlockModule:
            return config.build(make, dtype=dtype, key=key)

        def repeated_block(position: int) -> BlockModule:
            made = functools.partial(block, config.blocks[position], make=dataclasses.replace(make, stacked=True))
            order = jnp.asarray(stages.order(repeats))
            graph = nnx.graphdef(nnx.eval_shape(lambda: made(layer_key.layer(0))))

            def values(repeat: jax.Array) -> nnx.State:
                drawn = nnx.state(made(layer_key.layer(repeat * len(config.blocks) + position)))
                if not stages.padding(repeats):
                    return drawn
                # Identity layers are never read; zeros stay zeros under any optimizer.
                return jax.tree.map(lambda x: jnp.where(repeat < repeats, x, 0), drawn)

            return nnx.merge(graph, jax.vmap(values)(order))

        if repeats:
            layers = [repeated_block(position) for position in range(len(config.blocks))]
        else:
            blocks = config.all_blocks[len(config.prologue) :]
            layers = [block(b, layer_key.layer(i)) for i, b in enumerate(blocks)]
        prologue = [block(b, key.at("prologue").layer(i)) for i, b in enumerate(config.prologue)]
        self.layers = nnx.Dict({str(i): layer for i, layer in enumerate(layers)})
        self.prologue = nnx.Dict({str(i): layer for i, layer in enumerate(prologue)}) if prologue else None
        self.norm = Norm(config.final_norm, make, (("embed", make.width),)) if config.final_norm else None
        self.relative = _relative(config, make, dtype=dtype, key=key.at("relative"))
        self.config, self.stages = config, stages

    def layouts(self, path: tuple[str, ...]) -> tuple[StackLayout, ...]:
        """How the layers are stacked, for a stack that lies at `path` among the parameters."""
        repeats = self.config.scanned_repeats
        return (StackLayout(path, len(self.config.blocks), repeats, self.stages),) if repeats else ()

    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        positions: jax.Array,
        *,
        context: Context,
        encoded: jax.Array | None = None,
        cross_mask: Mask | None = None,
        present: jax.Array | None = None,
        by_positions: bool = False,
        normalize: bool = True,
    ) -> tuple[jax.Array, SideValues]:
        """Runs all layers.

        Args:
          x: [B, T, E].
          mask: self-attention's mask.
          positions: int32 [B, T], positions inside each segment.
          context: operations and dropout key.
          encoded: [B, S, E], the encoder's output, for blocks with cross-attention.
          cross_mask: which decoder position sees which encoder position.
          present: bool [B, T], False on padding; None: there is none.
          by_positions: relative positions are differences of `positions`, since those of columns are others.
          normalize: whether to end with the final norm and dropout; False leaves them to `finish`.

        Returns:
          [B, T, E], and the layers' side values, added up.
        """
        around = self.surroundings(mask, positions, encoded, cross_mask, present, by_positions=by_positions)
        run = remat(self.config.remat, scanned=False)
        total = NO_SIDE_VALUES
        for i, block in (self.prologue or {}).items():
            x, side = run(block, x, around, context.fold("prologue").fold(int(i)))
            total += side
        inner = context.fold("layers")
        if self.config.scanned_repeats is None:
            for i in range(len(self.layers)):
                x, side = run(self.layers[str(i)], x, around, inner.fold(i))
                total += side
        else:
            x, side = self._scan(x, around, inner)
            total += side
        return (self.finish(x, context) if normalize else x), total

    def prefill(
        self,
        x: jax.Array,
        mask: Mask,
        positions: jax.Array,
        *,
        texts: PackedTexts,
        caching: CacheConfig,
        context: Context,
        encoded: jax.Array | None = None,
        cross_mask: Mask | None = None,
        sources: PackedTexts | None = None,
        present: jax.Array | None = None,
        more_blocks: tuple[tuple[BlockModule, Context], ...] = (),
    ) -> tuple[jax.Array, Caches]:
        """Runs all layers on packed rows, as `__call__` does, and remembers the texts in them.

        Args:
          x: [R, T, E].
          texts: where the N texts lie in the rows.
          caching: see `CacheConfig`.
          sources: where the encoder's texts lie in the rows of `encoded`.
          mask, positions, context, encoded, cross_mask, present: as for `__call__`.
          more_blocks: blocks that follow the stack's own before its final norm.

        Returns:
          [R, T, E] after the final norm, and the caches of N slots, with room for T tokens.
        """
        configs = tuple(block.config for block, _ in more_blocks)
        around = self.surroundings(mask, positions, encoded, cross_mask, present, more_blocks=configs)
        caches = []
        for block, inner in (*self._one_by_one(context), *more_blocks):
            x, cache = block.prefill(x, around, texts, sources, caching, inner)
            caches.append(cache)
        source_lengths = None if sources is None else sources.lengths
        return self.finish(x, context), Caches(texts.lengths, tuple(caches), source_lengths)

    def extend(
        self,
        x: jax.Array,
        caches: Caches,
        *,
        context: Context,
        present: jax.Array | None = None,
        more_blocks: tuple[tuple[BlockModule, Context], ...] = (),
    ) -> tuple[jax.Array, Caches]:
        """Runs all layers on t new tokens of each slot.

        Args:
          x: [B, t, E].
          caches: what the slots hold.
          context: operations.
          present: bool [B, t], False on tokens that do not count, which come last; None: all do.
          more_blocks: as for `prefill`.

        Returns:
          [B, t, E] after the final norm, and the caches with the tokens that count.
        """
        count = x.shape[1]
        positions = caches.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)
        bias = None if self.relative is None else self.relative()
        rotations = self._rotations(positions, tuple(block.config for block, _ in more_blocks))
        new = Extension(caches.lengths, positions, rotations, bias, caches.source_lengths, present)
        blocks, kept = (*self._one_by_one(context), *more_blocks), []
        for (block, inner), cache in zip(blocks, caches.blocks, strict=True):
            x, cache = block.extend(x, new, cache, inner)
            kept.append(cache)
        added = count if present is None else jnp.sum(present, axis=1, dtype=jnp.int32)
        return self.finish(x, context), Caches(caches.lengths + added, tuple(kept), caches.source_lengths)

    def _one_by_one(self, context: Context) -> list[tuple[BlockModule, Context]]:
        """Every block, from the first to the last, with its context."""
        if self.config.scanned_repeats is not None:
            raise ValueError(
                "A scanned stack remembers nothing: its layers would be copied out of their arrays for every token. "
                "Unroll the model first, with jaxlm.models.unrolled."
            )
        first = [(block, context.fold("prologue").fold(int(i))) for i, block in (self.prologue or {}).items()]
        inner = context.fold("layers")
        return first + [(self.layers[str(i)], inner.fold(i)) for i in range(len(self.layers))]

    def finish(self, x: jax.Array, context: Context) -> jax.Array:
        """The final norm and dropout."""
        if self.norm is not None:
            x = self.norm(x)
        return context.fold("output").dropout(x, self.config.dropout)

    def surroundings(
        self,
        mask: Mask,
        positions: jax.Array,
        encoded: jax.Array | None = None,
        cross_mask: Mask | None = None,
        present: jax.Array | None = None,
        *,
        by_positions: bool = False,
        more_blocks: tuple[BlockKind, ...] = (),
    ) -> Surroundings:
        """What all blocks share, computed once; `more_blocks` outside the stack are to share it as well."""
        bias = None if self.relative is None else self.relative()
        rotations, placed = self._rotations(positions, more_blocks), positions if by_positions else None
        return Surroundings(mask, rotations, bias, encoded, cross_mask, present, placed)

    def _rotations(
        self, positions: jax.Array, more_blocks: tuple[BlockKind, ...] = ()
    ) -> dict[tuple[Rope, int], Rotation]:
        """Cosines and sines at [B, T] positions, for each Rope and head size among the blocks."""
        wanted = frozenset[tuple[Rope, int]]().union(*(b.rotations for b in self.config.all_blocks + more_blocks))
        return {(rope, head_dim): rotation(rope, positions, head_dim) for rope, head_dim in wanted}

    def _scan(self, x: jax.Array, around: Surroundings, context: Context) -> tuple[jax.Array, SideValues]:
        graph, values = nnx.split(self.layers)
        run = remat(self.config.remat, scanned=True)
        pattern = len(self.config.blocks)

        rows, shared, around_of = around.split()

        def repeat(ops, x, index, values, rows, shared):
            shared, key = shared
            around, inner = around_of(rows, shared), dataclasses.replace(context, ops=ops, dropout_key=key)
            blocks = nnx.merge(graph, values)
            total = NO_SIDE_VALUES
            for position in range(pattern):
                x, side = run(blocks[str(position)], x, around, inner.fold(index * pattern + position))
                total += side
            return x, total

        layers = StackedLayers(values, self.config.scanned_repeats, self.stages)
        return context.ops.run_layers(repeat, layers, x, rows, (shared, context.dropout_key))


def _relative(
    config: StackConfig, make: ParameterMaker, *, dtype: jnp.dtype, key: PathKey
) -> RelativeTable | RelativeEmbeddingTable | None:
    """What makes the relative positions that the blocks share."""
    match config.relative_positions:
        case None:
            return None
        case RelativeEmbeddings() as vectors:
            return RelativeEmbeddingTable(vectors, make, dtype=dtype, key=key)
        case biases:
            return RelativeTable(biases, make, *config.heads, key=key)


def remat(
    policy: RematPolicy, *, scanned: bool
) -> Callable[[BlockModule, jax.Array, Surroundings, Context], tuple[jax.Array, SideValues]]:
    """A function that runs a block, recomputing in the backward pass what `policy` says."""

    def run(block: BlockModule, x: jax.Array, around: Surroundings, context: Context) -> tuple[jax.Array, SideValues]:
        graph, values = nnx.split(block)

        def parameter(variable: nnx.Variable) -> nnx.Variable:
            value, axes = variable.get_value(), variable.get_metadata()["axes"]
            return variable.replace(context.ops.parameter(value, axes[len(axes) - value.ndim :]))  # less "layers"

        values = jax.tree.map(parameter, values, is_leaf=lambda node: isinstance(node, nnx.Variable))

        def apply(values, x):
            return nnx.merge(graph, values)(name_activation(x, "block_input"), around, context)

        return rematerialized(apply, policy, scanned=scanned)(values, x)

    return run
