"""The TPU attention kernels against jax's splash attention, by the TPU compiler's own estimate of cycles.

    python -m benchmarks.attention_tpu                  # every chip; writes results/attention_tpu.json
    python -m benchmarks.attention_tpu --chips v6e      # one, printed only

No TPU is used. Both kernels do the same work on the same blocks: 4 heads of size 128, 4096 queries and keys, bfloat16.
Estimates rank kernels on one chip; they are not times. The estimator reads scalars in memory as 0, so neither kernel's
skipping can be seen in it: here every block of both is computed, splash made to by a patch. That ours skips is shown by
estimates for lists of fixed lengths, which must lie on a line, and by the tests, which count the blocks it visits.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

from jaxlm.training import machine
from pallas_kernels import ahead_of_time, masks, platforms
from pallas_kernels.ahead_of_time import Case
from pallas_kernels.fused import inputs_of
from pallas_kernels.requests import WHOLE, Request
from pallas_kernels.tpu import attention as tpu_attention
from pallas_kernels.tpu import block_sizes
from pallas_kernels.tpu.attention_backward import backward
from pallas_kernels.tpu.attention_forward import forward
from pallas_kernels.tpu.block_sizes import Blocks
from pallas_kernels.tpu.operands import Sizes
from pallas_kernels.tpu.schedule import Listed

RESULTS = pathlib.Path(__file__).parent / "results" / "attention_tpu.json"
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
HEADS, LENGTH, SIZE = 4, 4096, 128
BLOCKS = (1024, 1024, 512)  # queries, keys, and what splash computes at once; how ours divides a block is its own
# The estimator of this chip gives up where operands lie in vector memory: there they stay in main memory.
OPTIONS = {"v5e": {"xla_vf_vmem_memory_space_assignment": False}}
# Its estimator loses count of a queue between the branches of a kernel, and gives up after about 30 steps with any.
LISTS = {"tpu7x": (2, 3, 4, 6)}
KERNELS = ("attention_forward", "attention_backward", "splash_mha_fwd", "splash_mha_dkv")
TARGETS = {
    "unmasked / splash full": 1.0,
    "unmasked / splash computed": 0.95,
    "masked / splash computed": 1.05,
    "masked, two-sided / splash computed": 1.05,
    "backward / splash computed": 1.10,
    "backward, two-sided / splash computed": 1.10,
    "listed residual": 0.05,
}


def ours(
    masked: bool,
    backwards: bool = False,
    two_sided: bool = False,
    blocks: tuple[int, int, int, int] | None = None,
    length: int = LENGTH,
    size: int = SIZE,
    listed: int | None = None,
):
    """Our kernel over all blocks, or over a list of `listed` blocks a head.

    A causal mask starts at the first key and ends at one that must be compared; `two_sided` is a window, of which both
    ends must be.
    """
    shape = (HEADS, length, 1, size)  # heads are examples here: no copy brings the arrays in the kernel's order
    mask = masks.Full() if not masked else masks.Window(length, 0) if two_sided else masks.Causal()

    def run(q, k, v, lse, delta, rows):
        request = Request(mask, None, size**-0.5, None, 0.0, None, WHOLE, False, shape, shape, shape, q.dtype)
        inputs = dataclasses.replace(inputs_of(request), rows=rows)
        table = block_sizes.backward if backwards else block_sizes.forward
        wanted = Blocks(*blocks) if blocks else table(platforms.current().chip, size)
        sizes = Sizes.of(q, k, v, wanted)
        walk = tpu_attention.whole(sizes, 1, masked) if listed is None else _list(sizes, listed)
        if backwards:
            return backward(q, k, v, inputs, lse, delta, v, walk, sizes, 0)
        return forward(q, k, v, inputs, walk, sizes)

    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    row = jax.ShapeDtypeStruct((HEADS, 1, length), jnp.float32)
    rows = jax.eval_shape(lambda: mask.rows(length, length))
    return run, (array, array, array, row, row, rows)


def _list(sizes: Sizes, count: int) -> Listed:
    """A list of fixed length whose entries the estimator takes for masked blocks in the middle of a row."""
    zeros = jnp.zeros(count, jnp.int32)
    return Listed((sizes.batch, sizes.heads), 1, zeros, zeros, count)


def splash_kernel(mask: str, backwards: bool = False, blocks: tuple[int, int, int] = BLOCKS, length: int = LENGTH):
    """jax's splash attention, with the mask "full", or "computed": a causal one, with no block left out."""
    queries, keys, sub_keys = blocks
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=sub_keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=sub_keys,
        use_fused_bwd_kernel=True,
    )
    kind = {"full": splash_masks.FullMask, "computed": splash_masks.CausalMask}[mask]
    heads = splash_masks.MultiHeadMask([kind((length, length))] * HEADS)
    splash._next_nonzero = functools.partial(_every_block, splash._next_nonzero)

    def attend(q, k, v):
        return splash.make_splash_mha_single_device(heads, block_sizes=sizes)(q, k, v)

    def run(q, k, v):
        # Without dq: the kernel computes it still, in a part for each block of keys; their sum is not the kernel's.
        return jax.vjp(attend, q, k, v)[1](v)[1:] if backwards else attend(q, k, v)

    return run, (jax.ShapeDtypeStruct((HEADS, length, SIZE), jnp.bfloat16),) * 3


def _every_block(original, h, i, j, data_next, block_mask, *args, **kwargs):
    """Splash's look-up of whether a block is visible, made True where the estimator takes its table for 0."""
    key, mask, runs, unmasked = original(h, i, j, data_next, block_mask, *args, **kwargs)
    if runs is not True:
        runs = block_mask[0 if block_mask.shape[0] == 1 else h, i, j].astype(jnp.int32) < 1
    return key, mask, runs, unmasked


def cycles(maker: str, chip: str, **arguments: Any) -> int:
    """Estimated cycles of the attention kernel in one case, without what surrounds it."""
    case = Case(f"benchmarks.attention_tpu:{maker}", arguments, OPTIONS.get(chip))
    found = ahead_of_time.tpu_cycles(case, TOPOLOGIES[chip], timeout=900)
    wanted = KERNELS[1::2] if arguments.get("backwards") else KERNELS[::2]
    kernels = [n for name, n in found.items() if name.startswith(wanted)]
    assert len(kernels) == 1, f"expected one kernel of {wanted}, found {found}"
    return kernels[0]


def measure(chip: str) -> dict[str, Any]:
    """All estimates for one chip, and their ratios."""
    found = {
        "unmasked": cycles("ours", chip, masked=False),
        "masked": cycles("ours", chip, masked=True),
        "masked, two-sided": cycles("ours", chip, masked=True, two_sided=True),
        "unmasked backward": cycles("ours", chip, masked=False, backwards=True),
        "masked backward": cycles("ours", chip, masked=True, backwards=True),
        "masked backward, two-sided": cycles("ours", chip, masked=True, two_sided=True, backwards=True),
        "splash full": cycles("splash_kernel", chip, mask="full"),
        "splash computed": cycles("splash_kernel", chip, mask="computed"),
        "splash computed backward": cycles("splash_kernel", chip, mask="computed", backwards=True),
    }
    lengths = LISTS.get(chip, (4, 8, 12, 16))
    listed = [cycles("ours", chip, masked=True, listed=n) for n in lengths]
    slope, start = np.polyfit(lengths, listed, 1)
    line = start + slope * np.array(lengths)
    ratios = {
        "unmasked / splash full": found["unmasked"] / found["splash full"],
        "unmasked / splash computed": found["unmasked"] / found["splash computed"],
        "masked / splash computed": found["masked"] / found["splash computed"],
        "masked, two-sided / splash computed": found["masked, two-sided"] / found["splash computed"],
        "backward / splash computed": found["masked backward"] / found["splash computed backward"],
        "backward, two-sided / splash computed": found["masked backward, two-sided"]
        / found["splash computed backward"],
        "listed residual": float(np.abs(np.array(listed) / line - 1).max()),
    }
    missed = [name for name, value in ratios.items() if value > TARGETS[name]]
    return {"cycles": found, "listed": dict(zip(lengths, listed)), "ratios": ratios, "missed": missed}


def main() -> None:
    """Measures the chips asked for; writes the results if that is all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(TOPOLOGIES), help="comma-separated names")
    chips = parser.parse_args().chips.split(",")
    found = {}
    for chip in chips:
        found[chip] = measure(chip)
        print(chip, json.dumps(found[chip], indent=2), flush=True)
    if set(chips) == set(TOPOLOGIES):
        work = {"heads": HEADS, "length": LENGTH, "size": SIZE, "blocks": BLOCKS, "type": "bfloat16"}
        compiler = f"libtpu {importlib.metadata.version('libtpu')}"
        record = {"work": work, "targets": TARGETS, "chips": found, "compiler": compiler, "machine": machine.facts()}
        RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
