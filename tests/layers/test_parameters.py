"""Initialisers give the papers' standard deviations, parametrisations their tables' factors; keys follow paths."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxlm.layers.parameters import (
    InitConfig,
    InitScheme,
    ParameterMaker,
    Parametrization,
    PathKey,
    ResidualInit,
    Scaling,
)

KEY = PathKey(jax.random.key(0))
IN, OUT = (("embed", 256),), (("mlp", 512),)
T5 = InitConfig(InitScheme.FAN_IN, std=1.0, scaled_query=True)
GPT2 = InitConfig(std=0.02, position_std=0.01, residual=ResidualInit.BY_DEPTH)


def deviation(parameter):
    return float(np.std(parameter[...]))


def test_fixed_and_fan_in():
    fixed = ParameterMaker(GPT2, Parametrization(), 256, depth=8, branches=16)
    assert deviation(fixed.matrix(KEY, IN, OUT)) == pytest.approx(0.02, rel=0.02)
    assert fixed.residual_gain == 1 / math.sqrt(16)
    t5 = ParameterMaker(T5, Parametrization(), 256, depth=8)
    assert deviation(t5.matrix(KEY, IN, OUT)) == pytest.approx(1 / 16, rel=0.02)
    assert t5.residual_gain == 1.0
    assert deviation(t5.embedding(KEY, (("vocab", 500), *IN))) == pytest.approx(1.0, rel=0.02)
    assert deviation(t5.head(KEY, IN, OUT)) == pytest.approx(1 / 16, rel=0.02)


def test_cut_normals_stay_within_the_cut():
    bert = ParameterMaker(InitConfig(std=0.02, cut=2.0), Parametrization(), 256)
    values = bert.matrix(KEY, IN, OUT)
    assert np.abs(values[...]).max() <= 0.04
    # A normal cut at 2 deviations has 0.8796 of its deviation left.
    assert deviation(values) == pytest.approx(0.02 * 0.8796, rel=0.02)


def test_metadata():
    make = ParameterMaker(GPT2, Parametrization(), 256)
    stacked = dataclasses.replace(make, stacked=True)
    assert make.matrix(KEY, IN, OUT).axes == ("embed", "mlp") and make.matrix(KEY, IN, OUT).role == "hidden"
    assert stacked.vector(IN, 1.0).axes == ("layers", "embed") and stacked.vector(IN, 1.0).role == "vector"
    assert make.embedding(KEY, IN + OUT).role == "input" and make.head(KEY, IN, OUT).role == "output"


def test_keys_follow_the_path():
    assert KEY.at("a").at("b").key == KEY.at("a").at("b").key
    keys = {str(jax.random.key_data(k.key)) for k in (KEY, KEY.at("a"), KEY.at("b"), KEY.at("a").at("b"), KEY.layer(1))}
    assert len(keys) == 5


@pytest.mark.parametrize("kind", [Scaling.MUP, Scaling.COMPLETEP])
def test_at_the_base_every_parametrisation_is_the_standard_one(kind):
    base = Parametrization(kind, base_width=256, base_depth=4, base_head_dim=64)
    standard = Parametrization()
    assert base.attention_scale(64) == standard.attention_scale(64) == 1 / 8
    assert base.residual_multiplier(4) == 1.0
    for role in ("input", "hidden", "vector", "output"):
        assert base.learning_rate_multiplier(role, 256, 4) == base.epsilon_multiplier(role, 256, 4) == 1.0
        assert base.weight_decay_multiplier(role, 256) == 1.0
    for init in (GPT2, T5):
        ours, theirs = (ParameterMaker(init, p, 256) for p in (base, standard))
        np.testing.assert_array_equal(ours.matrix(KEY, IN, OUT)[...], theirs.matrix(KEY, IN, OUT)[...])
        np.testing.assert_array_equal(ours.head(KEY, IN, OUT)[...], theirs.head(KEY, IN, OUT)[...])


def test_mup_by_width():
    """Tensor Programs V, table 8: hidden variance and rate 1/width; embeddings and output matrix as at the base."""
    mup = Parametrization(Scaling.MUP, base_width=64, base_depth=2)
    make = ParameterMaker(GPT2, mup, 256)
    assert deviation(make.matrix(KEY, IN, OUT)) == pytest.approx(0.02 / 2, rel=0.02)
    assert deviation(make.embedding(KEY, IN + OUT)) == pytest.approx(0.02, rel=0.02)
    assert deviation(make.head(KEY, IN, OUT)) == pytest.approx(0.02, rel=0.02)
    t5 = ParameterMaker(T5, mup, 256)
    assert deviation(t5.matrix(KEY, IN, OUT)) == pytest.approx(1 / 16, rel=0.02)  # 1 / sqrt(fan_in) follows already
    assert deviation(t5.head(KEY, IN, OUT)) == pytest.approx(1 / 8, rel=0.02)
    assert mup.learning_rate_multiplier("hidden", 256, 9) == 1 / 4
    assert mup.learning_rate_multiplier("input", 256, 9) == mup.learning_rate_multiplier("output", 256, 9) == 1.0
    assert mup.residual_multiplier(100) == 1.0
    assert mup.attention_scale(128) == 8 / 128


def test_completep_by_depth():
    """CompleteP, table 1, at alpha = 1."""
    deep = Parametrization(Scaling.COMPLETEP, base_width=64, base_depth=2)
    assert deep.residual_multiplier(8) == 1 / 4
    assert deep.learning_rate_multiplier("hidden", 256, 8) == 1 / 4
    assert deep.learning_rate_multiplier("vector", 256, 8) == 1.0
    assert deep.epsilon_multiplier("hidden", 256, 8) == deep.epsilon_multiplier("vector", 256, 8) == 1 / 16
    assert deep.epsilon_multiplier("input", 256, 8) == 1 / 4
    assert deep.weight_decay_multiplier("hidden", 256) == 4.0
    lazy = dataclasses.replace(deep, alpha=0.5)
    assert lazy.residual_multiplier(8) == 1 / 2 and lazy.learning_rate_multiplier("vector", 256, 8) == 1 / 2
