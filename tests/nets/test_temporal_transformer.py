"""The transformer along time: it begins as zero, sees time, place and condition, and takes any horizon."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.nets.temporal_transformer import TemporalTransformer

NET = TemporalTransformer(3, width=16, depth=2, heads=2, conditions=1)
X = jax.random.normal(jax.random.key(0), (2, 7, 5))
T = jnp.array([3.0, 70.0])


def condition(known):
    return {"value": jnp.array([[0.2], [0.9]]), "known": jnp.asarray(known)}


@pytest.fixture(scope="module")
def apply():
    """A jitted function of (x, t, cond), with numbers everywhere where the start has zeros."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(NET.init, jax.random.key(0), X, T)
    variables = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), jnp.float32), shapes)
    return jax.jit(lambda *told: NET.apply(variables, *told))


def test_it_begins_as_zero():
    y, _ = jax.jit(dataclasses.replace(NET, depth=1).init_with_output)(jax.random.key(0), X, T)
    assert y.shape == (2, 7, 3)
    assert not np.any(y)


def test_what_it_sees(apply):
    base = apply(X, T, condition([1.0, 1.0]))
    others = {
        "time": apply(X, T + 5, condition([1.0, 1.0])),
        "condition": apply(X, T, condition([0.0, 0.0])),
        "place": apply(X[:, ::-1], T, condition([1.0, 1.0]))[:, ::-1],
        "far away": apply(X.at[:, -1].add(1.0), T, condition([1.0, 1.0]))[:, :1] - base[:, :1] + base,
    }
    for name, other in others.items():
        assert np.abs(other - base).reshape(2, -1).max(axis=1).min() > 1e-3, name


def test_unknown_is_the_null_condition(apply):
    null = apply(X, T, None)
    np.testing.assert_array_equal(apply(X, T, condition([0.0, 0.0])), null)
    mixed = apply(X, T, condition([True, False]))
    np.testing.assert_allclose(mixed[1], null[1], atol=1e-6)
    assert np.abs(mixed[0] - null[0]).max() > 1e-3


def test_parameters_fit_any_horizon(apply):
    assert apply(X[:, :4], T, None).shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"heads": 3}, "heads=3 does not divide width=16"),
        ({"width": 15, "heads": 1}, "width 15 has no half"),
        ({"conditions": 0}, "conditions=0 was given a condition"),
    ],
)
def test_mistakes_are_one_line(fields, words):
    net = dataclasses.replace(NET, **fields)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(net.init, jax.random.key(0), X, T, condition([1.0, 1.0]))
