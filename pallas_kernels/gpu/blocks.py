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
    """

    warpgroups: int
    keys: int
    key_stages: int
    value_stages: int

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
