"""Cross-entropy on a mesh: each device on its own tokens and its own part of the vocabulary."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxlm.parallel.collectives import gather
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.rules import mesh_axes
from pallas_kernels.cross_entropy import OutputProjection, TokenScores, cross_entropy, token_scores


@dataclasses.dataclass(frozen=True)
class ShardedCrossEntropy:
    """`pallas_kernels.cross_entropy` of whole arrays; see `ShardedOps.cross_entropy`.

    Tokens stay where they are. The vocabulary stays split over mesh axes that split no tokens (Megatron's
    vocabulary-parallel loss): neither the matrix nor its gradient travels over them, only numbers a token and the
    gradient of the features. Where one mesh axis splits both tokens and matrix (FSDP), a device gathers the part of the
    matrix it needs once, in the products' type, and its gradient is scattered as it is summed: left to GSPMD the matrix
    is gathered for every chunk of tokens, and its gradient summed whole on every device.

    Attributes:
      parallel: a mesh of more than one device, and how arrays lie on it.
    """

    parallel: Parallelism

    def summed(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, weights: jax.Array, **options: Any
    ) -> tuple[jax.Array, TokenScores]:
        """`cross_entropy`: the sum over all devices' tokens, and the scores [B, T]."""

        def on_one_device(split, features, projection, labels, weights):
            total, scores = cross_entropy(features, projection, labels, weights, mesh_axes=split, **options)
            return total[None], scores

        tokens = self._tokens(labels)
        results = (PartitionSpec(mesh_axes(tokens) or None), tokens)
        totals, scores = self._on_devices(on_one_device, results, features, projection, labels, weights)
        return totals.sum(), scores

    def scores(
        self, features: jax.Array, projection: OutputProjection, labels: jax.Array, **options: Any
    ) -> TokenScores:
        """`token_scores` [B, T]."""

        def on_one_device(split, features, projection, labels):
            return token_scores(features, projection, labels, mesh_axes=split, **options)

        return self._on_devices(on_one_device, self._tokens(labels), features, projection, labels)

    def _tokens(self, labels: jax.Array) -> PartitionSpec:
        return self.parallel.spec(("batch", "length"), labels.shape)

    def _on_devices(
        self,
        function: Callable[..., Any],
        results: Any,
        features: jax.Array,
        projection: OutputProjection,
        *of_tokens: jax.Array,
    ) -> Any:
        """function(mesh axes that split the vocabulary, features, projection, ...) of each device's part."""
        tokens, vocab_axis = self._tokens(of_tokens[0]), projection.vocab_axis
        of_matrix = self.parallel.spec(
            ("embed", "vocab") if vocab_axis else ("vocab", "embed"), projection.matrix.shape
        )
        vocab, width = (mesh_axes(of_matrix[axis : axis + 1]) for axis in (vocab_axis, 1 - vocab_axis))
        split = vocab if set(vocab).isdisjoint(mesh_axes(tokens)) else ()

        def on_one_device(features, matrix, bias, *of_tokens):
            for axes, axis in ((width, 1 - vocab_axis), (() if split else vocab, vocab_axis)):
                if axes:
                    matrix = gather(matrix.astype(features.dtype), axes, axis)
            if bias is not None and vocab and not split:
                bias = gather(bias, vocab, 0)
            part = dataclasses.replace(projection, matrix=matrix, bias=bias)
            return function(split, features, part, *of_tokens)

        return jax.shard_map(
            on_one_device,
            mesh=self.parallel.mesh,
            in_specs=(tokens, of_matrix, PartitionSpec(vocab or None), *(tokens for _ in of_tokens)),
            out_specs=results,
            check_vma=False,  # a pallas_call does not say over which axes its results vary
        )(features, projection.matrix, projection.bias, *of_tokens)
