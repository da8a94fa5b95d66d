"""Cross-entropy's TPU kernels: interpreted against float64 arithmetic, watched for races, compiled ahead of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import ahead_of_time
from pallas_kernels.cross_entropy import OutputProjection, UnsupportedCrossEntropy, cross_entropy, token_scores

N, E, V = 40, 128, 300  # 3 blocks of 128 ids, the last one ragged; 40 tokens in blocks of 48
LABELS = np.random.default_rng(1).integers(0, V, N).astype(np.int32)
COTANGENTS = np.random.default_rng(2).normal(size=(3, N)).astype(np.float32)


def arrays(vocab_axis, dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden, matrix = rng.normal(size=(N, E)), rng.normal(size=(E, V) if vocab_axis else (V, E)) * E**-0.5
    return hidden.astype(dtype), matrix.astype(dtype), rng.normal(size=V).astype(np.float32)


def combined(hidden, matrix, bias, *, soft_cap=None, backend="pallas_tpu", chunk=128):
    """A random combination of all that can be differentiated, and the scores."""
    projection = OutputProjection(matrix, bias, int(matrix.shape[0] == E), soft_cap=soft_cap)
    scores = token_scores(hidden, projection, LABELS, mean_logit=True, chunk=chunk, backend=backend)
    of = (scores.log_probability, scores.log_z, scores.mean_logit)
    return sum((c * x).sum() for c, x in zip(COTANGENTS, of)), scores


def by_hand(hidden, matrix, bias, soft_cap):
    """float64: the scores, and the gradients of `combined`."""
    x, w = hidden.astype(np.float64), matrix.astype(np.float64)
    w = w if w.shape[0] == E else w.T
    raw = x @ w + (0.0 if bias is None else bias.astype(np.float64))
    logits = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    log_z = np.log(np.exp(logits).sum(-1))
    p, hit = np.exp(logits - log_z[:, None]), np.eye(V)[LABELS]
    a, b, c = COTANGENTS.astype(np.float64)[:, :, None]
    d_logits = a * (hit - p) + b * p + c / V
    if soft_cap is not None:
        d_logits = d_logits * (1 - np.tanh(raw / soft_cap) ** 2)
    d_matrix = x.T @ d_logits
    scores = (logits[np.arange(N), LABELS] - log_z, log_z, logits.mean(-1), logits.argmax(-1) == LABELS)
    return scores, (d_logits @ w.T, d_matrix if matrix.shape[0] == E else d_matrix.T, d_logits.sum(0))


def relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize(("vocab_axis", "with_bias", "soft_cap"), [(1, False, None), (0, True, 2.0)])
def test_values_and_gradients(vocab_axis, with_bias, soft_cap):
    hidden, matrix, bias = arrays(vocab_axis)
    bias = bias if with_bias else None
    expected, gradients = by_hand(hidden, matrix, bias, soft_cap)
    wanted = (0, 1, 2) if with_bias else (0, 1)

    def run(*inputs):
        return combined(*inputs, soft_cap=soft_cap)

    (_, scores), found = jax.jit(jax.value_and_grad(run, wanted, has_aux=True))(hidden, matrix, bias)
    for ours, theirs in zip((*scores, *found), (*expected, *gradients)):
        assert relative(ours, theirs) < 1e-5


def test_bfloat16():
    """No worse than twice the plain form; the gradient of a float32 matrix stays float32."""
    hidden, matrix, _ = arrays(1, jnp.bfloat16)
    _, gradients = by_hand(hidden, matrix, None, None)

    def plain(hidden, matrix):
        logits = (hidden @ matrix).astype(jnp.float32)
        log_z = jax.nn.logsumexp(logits, -1)
        of = (jnp.take_along_axis(logits, LABELS[:, None], -1)[:, 0] - log_z, log_z, logits.mean(-1))
        return sum((c * x).sum() for c, x in zip(COTANGENTS, of))

    of_plain = jax.grad(plain, (0, 1))(hidden, matrix)
    for operand in (matrix, matrix.astype(np.float32)):
        found = jax.jit(jax.grad(lambda h, m: combined(h, m, None)[0], (0, 1)))(hidden, operand)
        assert found[0].dtype == jnp.bfloat16 and found[1].dtype == operand.dtype
        for ours, reference, expected in zip(found, of_plain, gradients):
            assert relative(ours, expected) <= 2 * relative(reference, expected)


def test_no_races_and_no_memory_that_nobody_wrote(no_races):
    """The simulation that finds races, with memory that nobody wrote to full of NaN."""
    hidden, matrix, bias = arrays(0)
    expected, gradients = by_hand(hidden, matrix, bias, 2.0)

    def run(*inputs):
        return combined(*inputs, soft_cap=2.0)

    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(simulated), no_races():
        (_, scores), found = jax.block_until_ready(
            jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(hidden, matrix, bias)
        )
    for ours, theirs in zip((*scores, *found), (*expected, *gradients)):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_the_sum_and_ignored_tokens(recompute):
    """`cross_entropy` runs on the kernels in either form; NaN under weight 0 changes nothing."""
    hidden, matrix, _ = arrays(1)
    weights = (np.arange(N) % 3 > 0).astype(np.float32)
    hidden[weights == 0], labels = np.nan, np.where(weights > 0, LABELS, -100)

    def total(hidden, matrix, backend):
        options = dict(z_loss=0.01, label_smoothing=0.1, recompute=recompute, backend=backend, chunk=128)
        return cross_entropy(hidden, OutputProjection(matrix), labels, weights, **options)[0]

    for ours, theirs in zip(
        *(jax.tree.leaves(jax.value_and_grad(total, (0, 1))(hidden, matrix, name)) for name in ("pallas_tpu", "xla"))
    ):
        assert np.isfinite(ours).all() and relative(ours, np.asarray(theirs, np.float64)) < 1e-5


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        (((N, 96), (96, V)), {}, "width 96 is not a multiple of 128"),
        (((N, E), (E, 100)), {}, "100 ids are fewer than 128"),
        (((N, E), (E, V)), dict(chunk=100), "chunk 100 is not a multiple of 128"),
        (((N, E), (E, V), np.float16), {}, "hidden states are float16"),
    ],
)
def test_refusals_name_the_reason_and_who_can(shapes, options, reason):
    hidden, matrix = (np.zeros(shape, *shapes[2:]) for shape in shapes[:2])
    with pytest.raises(UnsupportedCrossEntropy, match=f"pallas_tpu cannot: .*{reason}.* Backends that can: xla"):
        token_scores(hidden, OutputProjection(matrix), LABELS, backend="pallas_tpu", **options)


def test_a_mesh_of_several_devices_is_refused():
    """GSPMD cannot partition a kernel; under shard_map, whose axes are manual, it is one device's again."""
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(UnsupportedCrossEntropy, match="several devices, over which only shard_map"),
    ):
        token_scores(np.zeros((N, E), np.float32), OutputProjection(np.zeros((E, V))), LABELS, backend="pallas_tpu")


def test_auto_interprets_no_kernel_on_a_cpu():
    hidden, matrix, _ = arrays(1)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda h, m: combined(h, m, None, backend="auto"))(hidden, matrix))


def compiled(topology, tokens=1024, width=256, ids=1500):
    """Forward and backward of `auto` with an awkward vocabulary."""
    if reason := ahead_of_time.why_not(topology):
        pytest.skip(reason)

    def loss(hidden, matrix, labels):
        return token_scores(hidden, OutputProjection(matrix), labels).log_probability.sum()

    array = jax.ShapeDtypeStruct
    return ahead_of_time.compile_for(
        topology,
        jax.grad(loss, (0, 1)),
        array((tokens, width), jnp.bfloat16),
        array((width, ids), jnp.float32),
        array((tokens,), jnp.int32),
    )


@pytest.mark.parametrize(
    "topology",
    [pytest.param(name, marks=() if name.startswith("v6e") else pytest.mark.full) for name in ahead_of_time.TPUS],
)
def test_compiles(topology):
    """And is told the work: a product for the statistics and two for each gradient."""
    costs = ahead_of_time.declared_costs(compiled(topology))
    assert "cross_entropy_statistics" in costs[0][0]
    product, entries = 2 * 1024 * 256 * 1500, 1024 * 1500
    assert sorted(cost.flops for _, cost in costs) == [product, 2 * product, 2 * product]
    assert all(cost.transcendentals == entries and cost.bytes > 1500 * 256 * 2 for _, cost in costs)
