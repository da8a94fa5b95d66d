"""The tuner: choices that are blocks, ranked by what they cost, without those that fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ahead_of_time, tune
from pallas_kernels.ahead_of_time import CannotCompile
from pallas_kernels.tpu.block_sizes import Blocks

SMALL = Blocks(128, 128, 128, 128)
WHY_NOT = ahead_of_time.why_not("v6e:2x2")


def test_candidates_are_cut_evenly():
    choices = tune.candidates(1024, 4096)
    assert len(choices) == len(set(choices)) > 10
    assert all(b.queries % b.sub_queries == 0 and b.keys % b.sub_keys == 0 for b in choices)
    assert max(b.keys for b in choices) == 1024
    assert max(b.keys for b in tune.candidates(4096, 512)) == 512


def test_ranks_what_works(capsys):
    costs = {1: 3.0, 2: 1.0, 3: 2.0}

    def cost(blocks):
        if blocks.keys == 4:
            raise CannotCompile("no room")
        return costs[blocks.keys]

    ranked = tune.rank([Blocks(1, n, 1, 1) for n in (1, 2, 3, 4)], cost)
    assert [(c, b.keys) for c, b in ranked] == [(1.0, 2), (2.0, 3), (3.0, 1)]
    assert "no room" in capsys.readouterr().out


def test_times_the_kernel_that_it_names():
    """Interpreted, where there is no TPU: its result is attention's."""
    function, shapes = tune.program("forward", dataclasses.asdict(SMALL), 64, 256, "float32")
    q, k, v = (jnp.asarray(np.random.default_rng(n).normal(size=s.shape), s.dtype) for n, s in enumerate(shapes[:3]))
    rows = tune.Window(256, 0).rows(256, 256)
    out, _ = jax.jit(function)(q, k, v, None, None, rows)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert tune.measured_seconds("forward", SMALL, 64, 256, runs=2) > 0


@pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))
def test_estimates_more_cycles_for_more_work():
    short, long = (tune.estimated_cycles("v6e:2x2", "forward", Blocks(256, 256, 256, 256), 128, n) for n in (512, 1024))
    assert 2.5 < long / short < 4.5  # four times the blocks, and what a kernel costs at its start


def test_says_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune", "--topology", "v2:2x2"])
    with pytest.raises(SystemExit):
        tune.main()
