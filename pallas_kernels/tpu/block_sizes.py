"""Block sizes of the TPU attention kernels, by chip and shape."""

import dataclasses

from pallas_kernels.tpu.scores import LANES

_MIB = 1 << 20

VMEM = {"v5e": 128 * _MIB, "v5p": 64 * _MIB, "v6e": 128 * _MIB, "tpu7x": 64 * _MIB}
"""Bytes of a core's vector memory."""

_SMALLEST_VMEM = min(VMEM.values())


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel cuts up the scores; all multiples of 128.

    Attributes:
      queries, keys: of a block, which is what is loaded at once and skipped at once.
      sub_queries, sub_keys: of a tile, whose scores are computed at once; they divide a block's.
    """

    queries: int
    keys: int
    sub_queries: int
    sub_keys: int

    def tiles(self) -> list[tuple[slice, slice]]:
        """The queries and keys of each tile of a block."""
        return [
            (slice(query, query + self.sub_queries), slice(key, key + self.sub_keys))
            for key in range(0, self.keys, self.sub_keys)
            for query in range(0, self.queries, self.sub_queries)
        ]


def _tiles(by_size: dict[int, tuple[int, int]]) -> dict[int, Blocks]:
    """Blocks of 1024 by 1024, which still skip most of what masks hide, in tiles of so many queries and keys."""
    return {size: Blocks(1024, 1024, *tile) for size, tile in by_size.items()}


# {chip: {head size: blocks}}: fewest cycles of seven tilings of these blocks at 2,048 tokens, by `tune.program` and the
# compiler's estimates, not by time. v5p, whose matrix units are v5e's, has what was found for that, unmeasured.
_FORWARD = {
    "v5e": _tiles({64: (1024, 512), 128: (512, 512), 256: (512, 256)}),
    "v5p": _tiles({64: (1024, 512), 128: (512, 512), 256: (512, 256)}),
    "v6e": _tiles({64: (512, 512), 128: (512, 512), 256: (1024, 512)}),
    "tpu7x": _tiles({64: (512, 1024), 128: (512, 1024), 256: (256, 1024)}),
}
_BACKWARD = {
    "v5e": _tiles({128: (256, 1024), 256: (1024, 256)}),
    "v5p": _tiles({128: (256, 1024), 256: (1024, 256)}),
    "v6e": _tiles({128: (256, 512), 256: (256, 512)}),
    "tpu7x": _tiles({128: (256, 1024), 256: (512, 256)}),
}


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def vmem(chip: str) -> int:
    """Bytes of vector memory that a kernel may use: what there is, less a part for what surrounds it."""
    return VMEM.get(chip, _SMALLEST_VMEM) * 7 // 8


def forward(chip: str, size: int) -> Blocks:
    """The forward kernel's blocks on `chip` (any other name: on all), for the larger of the two head sizes."""
    return _nearest(_FORWARD.get(chip, _FORWARD["v6e"]), size)


def backward(chip: str, size: int) -> Blocks:
    """The backward kernel's blocks."""
    return _nearest(_BACKWARD.get(chip, _BACKWARD["v6e"]), size)


def _nearest(by_size: dict[int, Blocks], size: int) -> Blocks:
    """The entry of the next larger size, or of the largest."""
    return by_size[min((n for n in by_size if n >= size), default=max(by_size))]


def fitted(wanted: Blocks, tq: int, tk: int, within: tuple[int, int] | None = None) -> Blocks:
    """Blocks of about the size wanted that cut tq queries and tk keys into equal parts with little left over.

    Args:
      wanted: the largest sizes.
      tq, tk: queries and keys there are.
      within: blocks of a block-sparse mask, which the kernel's must divide.
    """
    if within is None:
        queries, keys = _even(tq, wanted.queries), _even(tk, wanted.keys)
    else:
        queries, keys = (_divisor(n, limit) for n, limit in zip(within, (wanted.queries, wanted.keys)))
    return Blocks(queries, keys, _divisor(queries, wanted.sub_queries), _divisor(keys, wanted.sub_keys))


def _even(size: int, limit: int) -> int:
    """The block that cuts `size` into as few parts as blocks of `limit` do, and these equal."""
    parts = -(-size // limit)
    return round_up(-(-size // parts), LANES)


def _divisor(size: int, limit: int) -> int:
    """The largest multiple of 128 that divides `size`, itself one, and is at most `limit`."""
    return max(n for n in range(LANES, size + 1, LANES) if size % n == 0 and n <= max(limit, LANES))
