"""Beam search finds what an exhaustive search finds, and what transformers finds."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decoding.beam import BeamConfig, EarlyStopping, GnmtPenalty, PowerPenalty, search
from jaxlm.decoding.sampling import NEVER

V, N, END = 4, 5, 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """The memory of a toy model: the last two tokens of each slot."""

    last: jax.Array  # [S, 2]

    def take(self, indices):
        return Pair(self.last[indices])


def toy(table):
    """A model whose next logits are table [V, V, V] at the last two tokens."""

    def extend(memory, tokens):
        last = jnp.concatenate([memory.last[:, 1:], tokens], axis=1)
        return table[last[:, 0], last[:, 1]][:, None], Pair(last)

    return extend


def texts(limit):
    """Every text of the toy vocabulary: all that end, and all that are cut."""
    for n in range(1, limit + 1):
        for body in itertools.product([0, 1, 2], repeat=n - 1):
            yield (*body, END)
    yield from itertools.product([0, 1, 2], repeat=limit)


def exhaustive(table, start, penalty):
    """[(score, text)], the best first."""
    log_probabilities = np.asarray(jax.nn.log_softmax(table))
    found = []
    for text in texts(N):
        last, total = list(start), 0.0
        for token in text:
            total += log_probabilities[last[0], last[1], token]
            last = [last[1], token]
        found.append((total / (penalty(float(len(text))) if penalty else 1.0), text))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [None, PowerPenalty(0.7), PowerPenalty(-0.5), GnmtPenalty(0.6)], ids=str)
def test_wide_beams_search_exhaustively(penalty):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(V, V, V)) * 1.5, jnp.float32)
    starts = jnp.array([[0, 1], [2, 0]])
    config = BeamConfig(N, width=400, penalty=penalty, early_stopping=EarlyStopping.PROVEN, num_return=400)
    run = jax.jit(lambda memory, logits: search(toy(table), memory, logits, config, end_ids=(END,)))
    found = run(Pair(starts), table[starts[:, 0], starts[:, 1]])
    for row, start in enumerate(starts.tolist()):
        wanted = exhaustive(table, start, penalty)
        assert len(wanted) == 3**N + sum(3**n for n in range(N))
        scores = np.asarray(found.scores[row])
        np.testing.assert_allclose(scores[: len(wanted)], [score for score, _ in wanted], rtol=1e-5)
        assert (scores[len(wanted) :] == NEVER).all()
        got = [tuple(t[:n].tolist()) for t, n in zip(found.tokens[row], found.lengths[row], strict=True)]
        assert got[:20] == [text for _, text in wanted[:20]]


def test_a_beam_of_one_is_greedy_and_prompts_do_not_see_each_other():
    table = jnp.asarray(np.random.default_rng(1).normal(size=(V, V, V)), jnp.float32).at[:, :, END].add(-1.0)
    starts = jnp.array([[0, 1], [2, 0], [1, 1]])
    config = BeamConfig(N, width=1)
    found = search(toy(table), Pair(starts), table[starts[:, 0], starts[:, 1]], config, end_ids=(END,))
    for row, last in enumerate(starts.tolist()):
        text = []
        while len(text) < N and END not in text:
            text.append(int(jnp.argmax(table[last[0], last[1]])))
            last = [last[1], text[-1]]
        assert found.tokens[row, 0, : found.lengths[row, 0]].tolist() == text
    for stopping in EarlyStopping:
        config = BeamConfig(N, width=3, early_stopping=stopping, num_return=3)
        run = jax.jit(functools.partial(search, toy(table), config=config, end_ids=(END,)))
        together = run(Pair(starts), table[starts[:, 0], starts[:, 1]])
        for row in range(3):
            same = starts[jnp.array([row] * 3)]
            alone = run(Pair(same), table[same[:, 0], same[:, 1]])
            np.testing.assert_allclose(alone.scores, together.scores[jnp.array([row] * 3)], rtol=1e-6)


def test_forbidden_tokens_make_no_text_and_several_tokens_may_end_one():
    table = jnp.zeros((V, V, V)).at[:, :, 0].set(NEVER).at[:, :, 1].add(0.1)
    start = jnp.array([[0, 0]])
    config = BeamConfig(2, width=16, early_stopping=EarlyStopping.PROVEN, num_return=16)
    found = search(toy(table), Pair(start), table[0, 0][None], config, end_ids=(END, 2))
    scores, lengths = np.asarray(found.scores[0]), np.asarray(found.lengths[0])
    got = {tuple(t[:n].tolist()) for t, n, s in zip(found.tokens[0], lengths, scores, strict=True) if s > NEVER}
    assert got == {(END,), (2,), (1, 1), (1, 2), (1, END)}


def test_what_is_not_a_beam_search_is_refused():
    for options, message in (
        ({"width": 0}, "at least 1, not 64 and 0"),
        ({"num_return": 5}, "between 1 and width, which is 4"),
        ({"early_stopping": "sometimes"}, "sometimes"),
    ):
        with pytest.raises(ValueError, match=message):
            BeamConfig(**options)
