"""Cross-entropy and token scores against float64 arithmetic written out: whole, in chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cross_entropy as module
from pallas_kernels import cross_entropy_chunks
from pallas_kernels.cross_entropy import OutputProjection, UnsupportedCrossEntropy, cross_entropy, token_scores

N, E, V = 21, 16, 150  # nothing divides a chunk


@dataclasses.dataclass(frozen=True)
class Case:
    """Options of one comparison."""

    vocab_axis: int = 1
    bias: bool = False
    scale: float = 1.0
    soft_cap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int | None = None
    groups: tuple[int, ...] = ()


CASES = {
    "plain": Case(),
    "tied, bias, smoothed": Case(vocab_axis=0, bias=True, label_smoothing=0.1, chunk=8),
    "capped, z-loss": Case(soft_cap=3.0, z_loss=0.01, chunk=64),
    "all, in groups": Case(0, True, 0.25, 2.0, 0.01, 0.1, chunk=5, groups=(2, 3)),
    "scaled, single tokens": Case(scale=0.5, bias=True, label_smoothing=0.2, chunk=1),
}


def arrays(case, dtype=np.float32, seed=0):
    """hidden, matrix, bias, labels, weights in numpy; a third of the weights are 0."""
    rng = np.random.default_rng(seed)
    tokens = (*case.groups, N)
    hidden = np.asarray(rng.normal(size=(*tokens, E)), dtype)
    matrix = np.asarray(rng.normal(size=(E, V) if case.vocab_axis else (V, E)), dtype)
    bias = np.asarray(rng.normal(size=V), np.float32) if case.bias else None
    weights = ((rng.random(tokens) < 0.7) * rng.random(tokens)).astype(np.float32)
    return hidden, matrix, bias, rng.integers(0, V, tokens).astype(np.int32), weights


def projection_of(case, matrix, bias):
    return OutputProjection(matrix, bias, case.vocab_axis, case.scale, case.soft_cap)


def by_hand(case, hidden, matrix, bias, labels):
    """float64 over all tokens in a row: capped logits, log Z, log p, and what turns d logits into gradients."""
    x = hidden.astype(np.float64).reshape(-1, E) * case.scale
    w = matrix.astype(np.float64) if case.vocab_axis else matrix.astype(np.float64).T
    raw = x @ w + (0.0 if bias is None else bias.astype(np.float64))
    logits = raw if case.soft_cap is None else case.soft_cap * np.tanh(raw / case.soft_cap)
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[:, None]
    label = log_p[np.arange(len(x)), labels.ravel()]

    def gradients(d_logits):
        if case.soft_cap is not None:
            d_logits = d_logits * (1 - np.tanh(raw / case.soft_cap) ** 2)
        d_hidden = case.scale * (d_logits @ w.T).reshape(hidden.shape)
        d_matrix = x.T @ d_logits
        return d_hidden, d_matrix if case.vocab_axis else d_matrix.T, d_logits.sum(0)

    return logits, log_z, log_p, label, gradients


def sum_by_hand(case, hidden, matrix, bias, labels, weights):
    """The sum and its gradients."""
    logits, log_z, log_p, label, gradients = by_hand(case, hidden, matrix, bias, labels)
    target = (1 - case.label_smoothing) * np.eye(V)[labels.ravel()] + case.label_smoothing / V
    losses = -(target * log_p).sum(-1) + case.z_loss * log_z**2
    p, w = np.exp(log_p), weights.ravel().astype(np.float64)
    d_logits = w[:, None] * (p - target + 2 * case.z_loss * log_z[:, None] * p)
    return (w * losses).sum(), gradients(d_logits)


def relative(found, expected):
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def summed(case, hidden, matrix, bias, labels, weights, **options):
    """(sum, scores), (d hidden, d matrix, d bias)."""

    def total(hidden, matrix, bias):
        return cross_entropy(
            hidden,
            projection_of(case, matrix, bias),
            labels,
            weights,
            **{"z_loss": case.z_loss, "label_smoothing": case.label_smoothing, "chunk": case.chunk} | options,
        )

    wanted = (0, 1) if bias is None else (0, 1, 2)
    return jax.jit(jax.value_and_grad(total, wanted, has_aux=True))(hidden, matrix, bias)


@pytest.mark.parametrize("name", CASES)
def test_the_sum_and_its_gradients(name, monkeypatch):
    monkeypatch.setattr(cross_entropy_chunks, "_BLOCK_IDS", 64)  # two blocks and a rest
    case = CASES[name]
    inputs = arrays(case)
    expected, gradients = sum_by_hand(case, *inputs)
    (found, scores), found_gradients = summed(case, *inputs)
    assert relative(found, expected) < 1e-6
    for ours, theirs in zip(found_gradients, gradients):
        assert ours.dtype == jnp.float32 and relative(ours, theirs) < 1e-5
    logits, log_z, _, label, _ = by_hand(case, *inputs[:-1])
    counts = inputs[-1] != 0
    shape = inputs[-1].shape
    for ours, theirs in (
        (scores.log_probability, label),
        (scores.log_z, log_z),
        (scores.mean_logit, logits.mean(-1) * (case.label_smoothing > 0)),
        (scores.correct, logits.argmax(-1) == inputs[3].ravel()),
    ):
        np.testing.assert_allclose(ours, theirs.reshape(shape) * counts, rtol=1e-5, atol=1e-5)


def test_the_sum_without_gradients():
    """What evaluation runs is another program: it holds no gradient, and gives the same numbers."""
    case = CASES["all, in groups"]
    hidden, matrix, bias, labels, weights = arrays(case)
    (expected, expected_scores), _ = summed(case, hidden, matrix, bias, labels, weights)

    def evaluate(hidden, matrix):
        return cross_entropy(
            hidden, projection_of(case, matrix, bias), labels, weights, z_loss=0.01, label_smoothing=0.1, chunk=5
        )

    found, scores = jax.jit(evaluate)(hidden, matrix)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for ours, theirs in zip(scores, expected_scores):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert jax.make_jaxpr(evaluate)(hidden, matrix).pretty_print().count("dot_general") == 1


@pytest.mark.parametrize("name", CASES)
def test_scores_and_their_gradients(name):
    """Any combination of the scores can be differentiated; here one with random coefficients for each token."""
    case = CASES[name]
    hidden, matrix, bias, labels, _ = arrays(case)
    logits, log_z, log_p, label, gradients = by_hand(case, hidden, matrix, bias, labels)
    smoothed = case.label_smoothing > 0
    a, b, c = np.random.default_rng(1).normal(size=(3, *labels.shape)).astype(np.float32)

    def combined(hidden, matrix, bias):
        scores = token_scores(
            hidden, projection_of(case, matrix, bias), labels, mean_logit=smoothed, chunk=case.chunk and 8 * case.chunk
        )
        return (a * scores.log_probability + b * scores.log_z + c * scores.mean_logit).sum(), scores

    wanted = (0, 1) if bias is None else (0, 1, 2)
    (_, scores), found = jax.jit(jax.value_and_grad(combined, wanted, has_aux=True))(hidden, matrix, bias)
    assert relative(scores.log_probability, label.reshape(labels.shape)) < 1e-5
    assert relative(scores.log_z, log_z.reshape(labels.shape)) < 1e-5
    if smoothed:
        assert relative(scores.mean_logit, logits.mean(-1).reshape(labels.shape)) < 1e-5
    np.testing.assert_array_equal(scores.correct, (logits.argmax(-1) == labels.ravel()).reshape(labels.shape))
    a, b, c = (x.astype(np.float64).reshape(-1, 1) for x in (a, b, c))
    p, hit = np.exp(log_p), np.eye(V)[labels.ravel()]
    for ours, theirs in zip(found, gradients(a * (hit - p) + b * p + smoothed * c / V)):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("form", ["sum", "scores"])
def test_bfloat16(form):
    """No worse than twice the plain form of the same operands; the gradient of a float32 matrix stays float32."""
    case = Case(soft_cap=5.0, chunk=8 if form == "sum" else 64)
    hidden, matrix, _, labels, weights = arrays(case, dtype=jnp.bfloat16)
    expected, gradients = sum_by_hand(case, hidden, matrix, None, labels, weights)

    def plain(hidden, matrix):
        logits = case.soft_cap * jnp.tanh((hidden @ matrix).astype(jnp.float32) / case.soft_cap)
        log_p = jax.nn.log_softmax(logits)
        return -(weights * jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]).sum()

    def ours(hidden, matrix):
        if form == "sum":
            return cross_entropy(hidden, projection_of(case, matrix, None), labels, weights, chunk=case.chunk)[0]
        scores = token_scores(hidden, projection_of(case, matrix, None), labels, chunk=case.chunk)
        return -(weights * scores.log_probability).sum()

    (reference, of_plain), (found, of_ours), (_, of_wide) = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, m)
        for f, m in ((plain, matrix), (ours, matrix), (ours, matrix.astype(np.float32)))
    )
    assert relative(found, expected) <= 2 * max(relative(reference, expected), 1e-6)
    for f, g, plain_gradient in zip(of_ours, gradients, of_plain):
        assert f.dtype == jnp.bfloat16 and relative(f, g) <= 2 * relative(plain_gradient, g)
    assert of_wide[1].dtype == jnp.float32 and relative(of_wide[1], gradients[1]) <= relative(of_plain[1], gradients[1])


@pytest.mark.parametrize("form", ["sum", "scores"])
def test_ignored_tokens_may_hold_anything(form):
    """NaN hidden states and labels of -100 under weight 0 change nothing, in values and gradients."""
    case = CASES["tied, bias, smoothed"]
    hidden, matrix, bias, labels, weights = arrays(case)
    hidden[weights == 0] = np.nan
    labels[weights == 0] = -100
    assert (weights == 0).sum() > 3
    clean = (np.nan_to_num(hidden, nan=0.0), matrix, bias, np.maximum(labels, 0), weights)
    expected, gradients = sum_by_hand(case, *clean)
    if form == "sum":
        (found, scores), of = summed(case, hidden, matrix, bias, labels, weights)
        assert not np.isnan(scores).any()
    else:

        def total(hidden, matrix, bias):
            scores = token_scores(hidden, projection_of(case, matrix, bias), labels, mean_logit=True, chunk=64)
            losses = -0.9 * scores.log_probability + 0.1 * (scores.log_z - scores.mean_logit)
            return jnp.where(weights > 0, weights * losses, 0.0).sum()

        found, of = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(hidden, matrix, bias)
    assert relative(found, expected) < 1e-6
    for ours, theirs in zip(of, gradients):
        assert relative(ours, theirs) < 1e-5
    assert not np.asarray(of[0])[weights == 0].any()


def test_a_label_outside_the_vocabulary_is_nan():
    case = Case()
    hidden, matrix, _, labels, weights = arrays(case)
    labels[2], labels[5], weights[[2, 5]] = V, -1, 1.0
    scores = token_scores(hidden, projection_of(case, matrix, None), labels)
    assert np.flatnonzero(np.isnan(scores.log_probability)).tolist() == [2, 5]
    assert np.isfinite(scores.log_z).all() and not scores.correct[jnp.array([2, 5])].any()
    assert np.isnan(summed(case, hidden, matrix, None, labels, weights)[0][0])


def test_ties_are_correct():
    flat = projection_of(Case(), np.zeros((E, V), np.float32), None)
    hidden, _, _, labels, weights = arrays(Case())
    assert token_scores(hidden, flat, labels).correct.all()
    np.testing.assert_array_equal(cross_entropy(hidden, flat, labels, weights)[1].correct, weights != 0)


def test_large_logits_do_not_overflow():
    """Logits of 1e4: log p of the best guess is 0, of others the difference."""
    matrix = np.eye(4, dtype=np.float32)
    hidden = np.array([[1e4, 0, 0, -1e4], [1e4, 0, 0, -1e4]], np.float32)
    scores = token_scores(hidden, OutputProjection(matrix), np.array([0, 3]), chunk=2)
    np.testing.assert_allclose(scores.log_probability, [0.0, -2e4])
    total, _ = cross_entropy(hidden, OutputProjection(matrix), np.array([0, 3]), np.ones(2))
    np.testing.assert_allclose(total, 2e4)


def shapes_of(function, *inputs):
    """Shapes of every intermediate array, inside loops too."""

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)

    return {tuple(v.aval.shape) for e in equations(jax.make_jaxpr(function)(*inputs).jaxpr) for v in e.outvars}


def test_no_array_of_all_tokens_by_the_vocabulary():
    hidden, matrix, _, labels, weights = arrays(Case())

    def by_tokens(hidden, matrix, chunk):
        return cross_entropy(hidden, OutputProjection(matrix), labels, weights, chunk=chunk)[0]

    def by_ids(hidden, matrix):
        return token_scores(hidden, OutputProjection(matrix), labels, chunk=32).log_probability.sum()

    whole = shapes_of(jax.grad(lambda h, m: by_tokens(h, m, N), (0, 1)), hidden, matrix)
    assert (N, V) in whole
    cut = shapes_of(jax.grad(lambda h, m: by_tokens(h, m, 7), (0, 1)), hidden, matrix)
    assert (7, V) in cut and (N, V) not in cut
    ids = shapes_of(jax.grad(by_ids, (0, 1)), hidden, matrix)
    assert {(N, 32), (N, V % 32)} <= ids and (N, V) not in ids


def test_under_vmap_and_checkpoint():
    """A population of output matrices; the forms are transforms like any other."""
    case = Case(chunk=8)
    hidden, matrix, _, labels, weights = arrays(case)
    matrices = np.stack([matrix, 2 * matrix])
    for form in (
        lambda m: cross_entropy(hidden, OutputProjection(m), labels, weights, chunk=8)[0],
        lambda m: (weights * token_scores(hidden, OutputProjection(m), labels, chunk=64).log_probability).sum(),
    ):
        together = jax.vmap(jax.grad(jax.checkpoint(form)))(matrices)
        for i in range(2):
            np.testing.assert_allclose(together[i], jax.grad(form)(matrices[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=(N, E + 1)), r"hidden \(21, 17\) must be .* E 16, as in the matrix \(16, 150\)"),
        (dict(hidden=(E,)), r"hidden \(16,\) must be"),
        (dict(labels=(N + 1,)), r"labels must be integers of shape \(21,\).*got int32 \(22,\)"),
        (dict(weights=(1,)), r"weights \(1,\) must have the shape of labels \(21,\)"),
        (dict(matrix=(1, E, V)), r"matrix must be \[E, V\].*\(1, 16, 150\)"),
        (dict(bias=(E,)), r"bias \(16,\) must be \(150,\)"),
        (dict(options=dict(chunk=0)), "chunk is 0; give at least 1"),
        (dict(options=dict(label_smoothing=1.5)), "label_smoothing is 1.5"),
    ],
)
def test_bad_input_is_one_sentence(change, message):
    sizes = dict(hidden=(N, E), matrix=(E, V), labels=(N,), weights=(N,), bias=(V,), options={}) | change
    hidden, matrix, weights, bias = (
        np.zeros(sizes[name], np.float32) for name in ("hidden", "matrix", "weights", "bias")
    )
    labels = np.zeros(sizes["labels"], np.int32)
    with pytest.raises(ValueError, match=message):
        cross_entropy(hidden, OutputProjection(matrix, bias), labels, weights, **sizes["options"])


def test_labels_must_be_integers():
    with pytest.raises(ValueError, match="float32"):
        token_scores(np.zeros((N, E)), OutputProjection(np.zeros((E, V))), np.zeros(N, np.float32))


def test_an_unknown_backend():
    with pytest.raises(UnsupportedCrossEntropy, match="There is no cross_entropy backend 'cuda'"):
        cross_entropy(
            *(np.zeros((2, 2)), OutputProjection(np.zeros((2, 2))), np.zeros(2, int), np.zeros(2)), backend="cuda"
        )


def test_chunks_are_chosen_by_size():
    assert module.chunk_tokens(10, 4096) == 10
    assert module.chunk_tokens(100_000, 4096) == 2048
    assert module.chunk_tokens(100_000, 131_072) == 512
