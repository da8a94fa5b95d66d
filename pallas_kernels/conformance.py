"""What every attention backend must give: cases, their results in float64, and the comparison.

@pytest.mark.parametrize("name", conformance.CASES)
def test_float32(name):
    conformance.check("xla_chunked", name, jnp.float32)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dropout, masks
from pallas_kernels.attention import attention
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.biases import AlibiBias, Bias, DenseBias, RelativeBias, relative_buckets
from pallas_kernels.requests import Backend, Request

KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention.

    Attributes:
      mask: from (batch, tq, tk) to the mask.
      bias: from the number of heads to a `Bias`, or None.
      tq, tk, heads, kv_heads, size, v_size: shapes; few distinct ones, because each compiles anew.
    """

    mask: Callable[[int, int, int], masks.Mask]
    bias: Callable[[int], Bias] | None = None
    scale: float | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    tq: int = 200
    tk: int = 200
    heads: int = 4
    kv_heads: int = 2
    size: int = 64
    v_size: int = 64
    batch: int = 2


def _ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Packed rows: a few examples of random length, then padding; the last row has one example and none."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int32)
    for row in ids[:-1]:
        ends = np.sort(rng.choice(np.arange(1, length - 10), 4, replace=False))
        for number, (start, end) in enumerate(zip(np.r_[0, ends], ends)):
            row[start:end] = number + 1
    ids[-1] = 1
    return ids


def _prefix_ends(ids: np.ndarray) -> np.ndarray:
    """Of each position the end of a prefix that covers about a third of its example."""
    ends = np.zeros_like(ids)
    for row, out in zip(ids, ends):
        for number in np.unique(row[row > 0]):
            (at,) = np.nonzero(row == number)
            out[at] = at[0] + len(at) // 3
    return ends


def _packed_prefix(batch, tq, tk):
    ids = _ids(batch, tq)
    return masks.PrefixLM(_prefix_ends(ids)) & masks.Segments(ids)


def _cross_segments(batch, tq, tk):
    return masks.Segments(_ids(batch, tq, 1), _ids(batch, tk, 2))


def _block_sparse(batch, tq, tk):
    rng = np.random.default_rng(5)
    nq, nk = -(-tq // 128), -(-tk // 128)
    visible = rng.random((batch, 4, nq, nk)) < 0.5
    return masks.BlockSparse.of_map(visible, (128, 128)) & masks.Causal()


def _relative(heads):
    table = np.random.default_rng(6).normal(size=(32, heads)).astype(np.float32)
    return RelativeBias(jnp.asarray(table), 128, True)


def _dense_bias(heads):
    return DenseBias(jnp.asarray(np.random.default_rng(7).normal(size=(1, heads, 200, 200)), jnp.float32), True)


def _causal(*_):
    return masks.Causal()


CROSS = dict(tq=96, tk=200, heads=2, kv_heads=2, v_size=128)
CASES = {
    "full": Case(lambda *_: masks.Full()),
    "causal": Case(_causal, scale=0.3),
    "prefix": Case(lambda b, *_: masks.PrefixLM(np.array([70, 0], np.int32))),
    "packed prefix": Case(_packed_prefix),
    "packed causal, cap": Case(lambda b, tq, tk: masks.Causal() & masks.Segments(_ids(b, tq)), soft_cap=3.0),
    "window": Case(lambda *_: masks.Causal() & masks.Window(20, 0)),
    "chunks, lengths": Case(lambda *_: masks.Chunked(48) & masks.KVLength(np.array([130, 0], np.int32))),
    "longformer": Case(lambda *_: masks.Window(15, 15) | masks.GlobalTokens(5)),
    "longformer, packed": Case(
        lambda b, tq, tk: (masks.Window(15, 15) | masks.GlobalTokens(5)) & masks.Segments(_ids(b, tq))
    ),
    "block sparse": Case(_block_sparse),
    "multi-query": Case(_causal, kv_heads=1),
    "multi-head": Case(_causal, kv_heads=4),
    "alibi": Case(_causal, bias=lambda h: AlibiBias(jnp.asarray(2.0 ** -np.arange(1, h + 1), jnp.float32))),
    "relative": Case(_packed_prefix, bias=_relative),
    "dense bias": Case(_causal, bias=_dense_bias),
    "sinks": Case(_packed_prefix, sinks=True),
    "dropout": Case(_packed_prefix, dropout=0.3),
    "cross": Case(_cross_segments, **CROSS),
    "cross, more queries": Case(lambda *_: masks.Causal(3) & masks.Window(40, None), **CROSS | dict(tq=200, tk=96)),
}


PACKED_IDS = np.zeros((2, 256), np.int32)
PACKED_IDS[0, :100], PACKED_IDS[0, 100:160], PACKED_IDS[0, 160:210], PACKED_IDS[1] = 1, 2, 3, 1
_CAUSAL = masks.Window(None, 0)  # not Causal(): masks are handed to jit, where its offset would become an array
_EVEN = dict(tq=256, tk=256, heads=2, kv_heads=1)
STATIC_CASES = {
    "full, cross": Case(lambda *_: masks.Full(), **_EVEN | dict(tq=128, v_size=128)),
    "packed causal, cap": Case(lambda *_: _CAUSAL & masks.Segments(PACKED_IDS), soft_cap=3.0, **_EVEN),
    "packed encoder": Case(lambda *_: masks.Segments(PACKED_IDS), **_EVEN),
    "windows": Case(lambda *_: masks.Window(20, 3), scale=0.3, **_EVEN),
    "causal chunks": Case(lambda *_: masks.Chunked(48) & _CAUSAL, **_EVEN),
}
"""For backends that take masks known beforehand, and multiples of 128."""


class WithReferenceLse:
    """A backend that gives no log-sum-exp, with the reference's: the cases ask for one."""

    def __init__(self, backend: Backend):
        self.backend, self.name = backend, backend.name

    def refuses(self, request: Request) -> list[str]:
        return [reason for reason in self.backend.refuses(request) if "log-sum-exp" not in reason]

    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, jax.Array]:
        return self.backend.run(q, k, v, request)[0], ATTENTION.backend("xla").run(q, k, v, request)[1]


def inputs(case: Case, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """q, k, v, the weights of the outputs in the loss, and those of the log-sum-exp."""
    rng = np.random.default_rng(0)
    shapes = [
        (case.batch, case.tq, case.heads, case.size),
        (case.batch, case.tk, case.kv_heads, case.size),
        (case.batch, case.tk, case.kv_heads, case.v_size),
        (case.batch, case.tq, case.heads, case.v_size),
    ]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(rng.normal(size=(case.batch, case.heads, case.tq)), jnp.float32)


def options(case: Case) -> dict[str, Any]:
    """The keyword arguments of `attention`, without what is differentiated (bias and sinks)."""
    drops = dict(dropout_rate=case.dropout, dropout_key=KEY) if case.dropout else {}
    mask = case.mask(case.batch, case.tq, case.tk)
    return dict(mask=mask, scale=case.scale, soft_cap=case.soft_cap, **drops)


def learned(case: Case) -> dict[str, jax.Array]:
    """What has a gradient beside q, k and v."""
    arrays = {}
    bias = case.bias and case.bias(case.heads)
    if isinstance(bias, RelativeBias):
        arrays["bias"] = bias.table
    if isinstance(bias, DenseBias):
        arrays["bias"] = bias.values
    if case.sinks:
        arrays["sinks"] = jnp.linspace(-1.0, 2.0, case.heads)
    return arrays


def _with_learned(case: Case, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    bias = case.bias and case.bias(case.heads)
    if isinstance(bias, RelativeBias):
        bias = dataclasses.replace(bias, table=arrays["bias"])
    if isinstance(bias, DenseBias):
        bias = dataclasses.replace(bias, values=arrays["bias"])
    return dict(bias=bias, sinks=arrays.get("sinks"))


def run(backend: str, case: Case, dtype: jnp.dtype) -> dict[str, np.ndarray]:
    """Output, log-sum-exp and all gradients, from `backend`."""
    q, k, v, out_weight, lse_weight = inputs(case, dtype)

    @jax.jit
    def everything(q, k, v, arrays, mask):
        def loss(q, k, v, arrays):
            call = {**options(case), "mask": mask, **_with_learned(case, arrays)}
            out, lse = attention(q, k, v, backend=backend, return_lse=True, **call)
            visible = jnp.isfinite(lse)
            value = jnp.sum((out * out_weight).astype(jnp.float32)) + jnp.sum(jnp.where(visible, lse * lse_weight, 0.0))
            return value, (out, lse)

        gradients, (out, lse) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, arrays)
        return (
            dict(zip(("dq", "dk", "dv"), gradients))
            | {"d" + n: g for n, g in gradients[3].items()}
            | dict(out=out, lse=lse)
        )

    result = everything(q, k, v, learned(case), options(case)["mask"])
    return {name: np.asarray(x, np.float64) for name, x in result.items()}


def reference(case: Case, dtype: jnp.dtype) -> dict[str, np.ndarray]:
    """The same in float64, written out; the inputs are those of `dtype`."""
    q, k, v, out_weight, lse_weight = (np.asarray(x, np.float64) for x in inputs(case, dtype))
    extra = {name: np.asarray(x, np.float64) for name, x in learned(case).items()}
    group = case.heads // case.kv_heads
    scale = case.size**-0.5 if case.scale is None else case.scale
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = scale * np.einsum("bqhd,bkhd->bhqk", q, k)
    slope = np.ones_like(scores)
    if case.soft_cap:
        bounded = np.tanh(scores / case.soft_cap)
        scores, slope = case.soft_cap * bounded, 1 - bounded**2
    bias = case.bias and case.bias(case.heads)
    if isinstance(bias, RelativeBias):
        offsets = np.arange(case.tk)[None] - np.arange(case.tq)[:, None]
        buckets = relative_buckets(offsets, len(bias.table), bias.max_distance, bias.bidirectional)
        scores = scores + extra["bias"][buckets].transpose(2, 0, 1)
    elif bias is not None:
        scores = scores + np.asarray(bias.dense(case.tq, case.tk), np.float64)
    mask = options(case)["mask"]
    visible = np.broadcast_to(np.asarray(mask.dense(case.tq, case.tk)), scores.shape)
    highest = np.where(visible, scores, -np.inf).max(-1, keepdims=True)
    highest = np.where(np.isfinite(highest), highest, 0.0)
    weights = np.exp(np.where(visible, scores - highest, -np.inf))
    keys_total = weights.sum(-1, keepdims=True)
    total = keys_total
    if case.sinks:
        total = total + np.exp(extra["sinks"][None, :, None, None] - highest)
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0]) + highest[..., 0]
    weights = weights / np.where(total > 0, total, 1.0)
    kept = np.ones_like(weights)
    if case.dropout:
        indices = jnp.indices(weights.shape, sparse=True)
        kept = np.asarray(dropout.keep(dropout.seed_of(KEY), *indices, case.dropout)) / (1 - case.dropout)
    dropped = weights * kept
    out = np.einsum("bhqk,bkhd->bqhd", dropped, v)

    lse_gradient = np.where(np.isfinite(lse), lse_weight, 0.0)[..., None]
    d_weights = np.einsum("bqhd,bkhd->bhqk", out_weight, v) * kept
    delta = (d_weights * weights).sum(-1, keepdims=True)
    d_scores = weights * (d_weights - delta + lse_gradient)
    d_products = d_scores * slope * scale

    def per_kv_head(x):
        return x.reshape(*x.shape[:2], case.kv_heads, group, -1).sum(3)

    result = dict(
        out=out,
        lse=lse,
        dq=np.einsum("bhqk,bkhd->bqhd", d_products, k),
        dk=per_kv_head(np.einsum("bhqk,bqhd->bkhd", d_products, q)),
        dv=per_kv_head(np.einsum("bhqk,bqhd->bkhd", dropped, out_weight)),
    )
    if isinstance(bias, RelativeBias):
        result["dbias"] = np.zeros_like(extra["bias"])
        np.add.at(result["dbias"], buckets, d_scores.sum(0).transpose(1, 2, 0))
    if isinstance(bias, DenseBias):
        result["dbias"] = d_scores.sum(0, keepdims=True)
    if case.sinks:
        share = 1 - weights.sum(-1, keepdims=True)  # of the sink
        result["dsinks"] = (share * (lse_gradient - delta))[..., 0].sum((0, 2))
    return result


def errors(backend: str, case: Case, dtype: jnp.dtype) -> dict[str, float]:
    """||x - reference|| / ||reference|| of every result; hidden rows must agree exactly."""
    got, expected = run(backend, case, dtype), reference(case, dtype)
    unseen = np.isneginf(expected["lse"])
    np.testing.assert_array_equal(np.isneginf(got["lse"]), unseen)
    if not case.sinks:
        assert np.all(got["out"].swapaxes(1, 2)[unseen] == 0.0) and np.all(got["dq"].swapaxes(1, 2)[unseen] == 0.0)
    got["lse"], expected["lse"] = (np.where(unseen, 0.0, x["lse"]) for x in (got, expected))
    return {n: float(np.linalg.norm(got[n] - expected[n]) / np.linalg.norm(expected[n])) for n in expected}


def check(backend: str, name: str, dtype: jnp.dtype) -> None:
    """Fails unless float32 is within 1e-5 of the reference, and a narrower type within twice plain XLA's error."""
    case = CASES[name]
    found = errors(backend, case, dtype)
    if dtype == jnp.float32:
        allowed = dict.fromkeys(found, 1e-5)
    else:
        allowed = {n: 2 * e for n, e in errors("xla", case, dtype).items()}
    wrong = {n: (e, allowed[n]) for n, e in found.items() if not e <= allowed[n]}
    assert not wrong, f"{backend}, {name}, {jnp.dtype(dtype).name}: (error, allowed) {wrong}"


def check_nothing_leaks(backend: str, dtype: jnp.dtype) -> None:
    """Whatever stands in other segments, results and gradients stay the same to the last bit.

    Forward, foreign queries and keys become NaN. Wherever a product of matrices runs over hidden entries NaN would
    spread (0 * NaN is NaN): there, in values and in the backward pass, they become large numbers instead.
    """
    case = CASES["packed prefix"]
    q, k, v, weight, _ = inputs(case, dtype)
    mask = options(case)["mask"]
    foreign = np.asarray(mask.masks[1].q_ids)[:, :, None, None] != 1

    def planted(number):
        return jnp.where(foreign, number, q), jnp.where(foreign, number, k), jnp.where(foreign, 1e4, v)

    def forward(q, k, v):
        return attention(q, k, v, mask=mask, backend=backend)

    def loss(*arrays):
        return jnp.sum(jnp.where(foreign, 0, forward(*arrays) * weight))

    out, gradients = jax.jit(forward), jax.jit(jax.grad(loss, (0, 1, 2)))
    pairs = [(out(q, k, v), out(*planted(jnp.nan)))] + list(zip(gradients(q, k, v), gradients(*planted(1e4))))
    for clean, dirty in pairs:
        own = ~np.broadcast_to(foreign, clean.shape)
        np.testing.assert_array_equal(np.asarray(clean)[own], np.asarray(dirty)[own])
        assert np.asarray(clean, np.float32)[own].any()
