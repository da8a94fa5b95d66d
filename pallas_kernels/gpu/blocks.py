"""How the kernels cut their work: blocks that fit the registers and the shared memory of a Hopper GPU."""

import dataclasses

from pallas_kernels.gpu.tiles import ROWS


@dataclasses.dataclass(frozen=True)
class QueryBlocks:
    """Of the kernels that go over keys for each block of queries: forward, and the gradient of q.

    Attributes:
      warpgroups: that compute, each on 64 queries.
      keys: of a block.
      key_stages, value_stages: blocks that shared memory has room for.
      turns: two warpgroups alternate between products and other arithmetic (forward only).
    """

    warpgroups: int
    keys: int
    key_stages: int
    value_stages: int
    turns: bool = False

    @property
    def queries(self) -> int:
        return ROWS * self.warpgroups


@dataclasses.dataclass(frozen=True)
class KeyBlocks:
    """Of the kernel that goes over queries for each block of keys: the gradients of k and v.

    Attributes:
      warpgroups: that compute.
      shared: all of them work on the same 64 keys, one on the gradient of v and one on that of k, whose sums are too
        much for the registers of one warpgroup. Otherwise each has 64 keys of its own.
      queries: of a block.
      stages: blocks of queries that shared memory has room for.
    """

    warpgroups: int
    shared: bool
    queries: int
    stages: int

    @property
    def keys(self) -> int:
        return ROWS if self.shared else ROWS * self.warpgroups


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of all kernels of one call."""

    forward: QueryBlocks
    query_gradient: QueryBlocks
    key_value_gradients: KeyBlocks


def blocks_of(size: int, v_size: int, elaborate: bool, sparse: tuple[int, int] | None) -> Blocks:
    """The blocks for a call.

    The sizes are the largest at which ptxas spills no registers, or hardly any (benchmarks/results/attention_gpu.json).

    Args:
      size, v_size: of a head, in 64, 128, 256.
      elaborate: scores take registers of their own, as with ALiBi or a soft cap, whose derivative is kept.
      sparse: queries and keys of the blocks of a `BlockSparse` mask, multiples of 64; the kernels' own divide them.
    """
    widest = max(size, v_size)
    query_groups, key_groups = (2 if sparse is None or side % (2 * ROWS) == 0 else 1 for side in sparse or (0, 0))
    keys = ROWS if widest == 256 else ROWS * key_groups
    return Blocks(
        forward=QueryBlocks(query_groups, keys, key_stages=2, value_stages=2, turns=query_groups == 2),
        query_gradient=QueryBlocks(
            query_groups, ROWS if elaborate else keys, key_stages=2, value_stages=1 if widest == 256 else 2
        ),
        key_value_gradients=KeyBlocks(
            warpgroups=2 if size + v_size > 256 else key_groups,
            shared=size + v_size > 256,
            queries=ROWS * query_groups if widest == 64 and not elaborate else ROWS,
            stages=2,
        ),
    )
