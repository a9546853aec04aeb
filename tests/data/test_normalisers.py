"""Normalisers: what they make of data is checked by its statistics, and that nothing is lost by the way back."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffrl.data.normalisers import cdf, gaussian, limits, normalise, unnormalise
from diffrl.errors import UserError

KINDS = [limits, gaussian, cdf]


def data(seed=0, rows=5000):
    """Dimensions that differ in place, scale and shape; the last two are constant, and constant but for rounding."""
    rng = np.random.default_rng(seed)
    columns = [
        rng.normal(3, 2, rows),
        1e-4 * rng.exponential(size=rows),
        1000 + rng.uniform(-0.5, 0.5, rows),
        rng.integers(0, 3, rows) * 7,
        np.where(rng.random(rows) < 0.6, 0, rng.normal(size=rows)),
        np.full(rows, 0.1),
        1e3 * (1 + 1e-7 * rng.integers(0, 2, rows)),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


X = data()
SPREAD = np.ptp(X, axis=0)
VARYING = slice(0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    normaliser = kind(X)
    y = normalise(normaliser, X)
    assert isinstance(y, np.ndarray)
    assert y.dtype == np.float32
    # A distribution function is so flat between rare values that float32 tells less of them apart.
    tolerance = (1e-4 if kind is cdf else 1e-6) * SPREAD + 2e-7 * np.abs(X).max(axis=0)
    assert (np.abs(unnormalise(normaliser, y) - X) <= tolerance).all()
    beyond = X.mean(axis=0) + 3 * np.maximum(SPREAD, 1) * np.array([[-1.0], [1.0]])
    back = unnormalise(normaliser, normalise(normaliser, beyond))
    np.testing.assert_allclose(back, beyond, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_order_is_kept(kind):
    """Also between the data and beyond them."""
    grid = np.linspace(X.min(axis=0) - SPREAD - 1, X.max(axis=0) + SPREAD + 1, 3001).astype(np.float32)
    assert (np.diff(normalise(kind(X), grid), axis=0) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -7.3, 1e-20, 123456.7, 3e8])
def test_constants_become_zero_and_come_back(kind, value):
    x = np.full((4, 2), value, np.float32)
    x[:, 1] = [0, 1, 2, 3]  # beside one that is none
    normaliser = kind(x)
    y = normalise(normaliser, x)
    assert (y[:, 0] == 0).all()
    np.testing.assert_array_equal(unnormalise(normaliser, y)[:, 0], x[:, 0])
    other = np.array([[value + max(1, abs(value) / 2), 0.0]], np.float32)
    assert normalise(normaliser, other)[0, 0] > 0
    np.testing.assert_allclose(unnormalise(normaliser, normalise(normaliser, other))[0, 0], other[0, 0], rtol=1e-5)


def test_rounding_alone_is_constant():
    for kind in KINDS:
        assert np.abs(normalise(kind(X), X)[:, 6]).max() < 1e-3


def test_limits_are_exact():
    y = normalise(limits(X), X)[:, VARYING]
    np.testing.assert_array_equal(y.min(axis=0), -1)
    np.testing.assert_array_equal(y.max(axis=0), 1)
    centre = (X.min(axis=0) + X.max(axis=0)) / 2
    np.testing.assert_allclose(normalise(limits(X), centre)[VARYING], 0, atol=2e-4)


def test_gaussian_has_mean_0_and_variance_1():
    """Also at 1000 +- 0.3, and where one value far away makes up the range."""
    outlier = np.append(np.full(10**5, 1000.0), 1000.01)[:, None].astype(np.float32)
    for x in (X[:, VARYING], outlier):
        y = normalise(gaussian(x), x).astype(np.float64)
        np.testing.assert_allclose(y.mean(axis=0), 0, atol=2e-3)
        np.testing.assert_allclose(y.std(axis=0), 1, rtol=2e-3)
    np.testing.assert_allclose(normalise(gaussian(X), X)[:, 0], stats.zscore(X[:, 0].astype(np.float64)), atol=1e-5)


def test_cdf_is_that_of_a_known_distribution():
    rng = np.random.default_rng(1)
    x = np.stack([rng.normal(5, 3, 100_000), rng.exponential(2, 100_000)], axis=1)
    normaliser = cdf(x)
    at = np.stack([np.linspace(-4, 14, 200), np.linspace(0.01, 12, 200)], axis=1)
    exact = np.stack([stats.norm(5, 3).cdf(at[:, 0]), stats.expon(scale=2).cdf(at[:, 1])], axis=1)
    np.testing.assert_allclose(normalise(normaliser, at), 2 * exact - 1, atol=0.015)
    y = normalise(normaliser, x)
    assert [y.min(), y.max()] == [-1, 1]
    for d in range(2):
        assert stats.kstest(y[:, d], stats.uniform(-1, 2).cdf).statistic < 2e-3
    assert normaliser.data.shape[0] <= 1002


def test_cdf_treats_ties_alike():
    """Three values of one dimension keep to their ranks; an atom lies in the middle of what it covers."""
    y = normalise(cdf(X), X)
    np.testing.assert_allclose(np.unique(y[:, 3]), [-1, 0, 1], atol=0.05)
    below = (X[:, 4] < 0).mean()
    middle = 2 * (below + (X[:, 4] == 0).mean() / 2) - 1
    np.testing.assert_allclose(y[X[:, 4] == 0, 4], middle, atol=1e-3)
    two = cdf(np.array([[5.0], [5], [5], [8]]))
    np.testing.assert_array_equal(normalise(two, np.array([[5.0], [8]])), [[-1], [1]])


@pytest.mark.parametrize("kind", KINDS)
def test_jit_and_numpy_agree_and_gradients_are_finite(kind):
    normaliser = kind(X)
    points = np.concatenate([X[:200], np.zeros((1, 7), np.float32), 50 * X[:5], np.stack(normaliser.data)])
    for function in (normalise, unnormalise):
        np.testing.assert_allclose(
            jax.jit(function)(normaliser, points), function(normaliser, points), rtol=2e-5, atol=2e-5
        )
        np.testing.assert_array_equal(jax.jit(lambda x, f=function: f(normaliser, x))(points).shape, points.shape)
        slope = jax.jit(jax.grad(lambda x, f=function: f(normaliser, x).sum()))(jnp.asarray(points))
        assert np.isfinite(slope).all()
        assert (slope > 0).all()


def test_one_structure_for_all_kinds_and_any_leading_axes():
    normalisers = [kind(X) for kind in KINDS]
    assert len({jax.tree.structure(normaliser) for normaliser in normalisers}) == 1
    for normaliser in normalisers:
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(normaliser))
        again = pickle.loads(pickle.dumps(normaliser))
        y = normalise(normaliser, X[:12].reshape(3, 4, 7))
        np.testing.assert_array_equal(y.reshape(12, 7), normalise(again, X[:12]))
        np.testing.assert_array_equal(y[1, 2], normalise(normaliser, X[6]))
        device = jax.tree.map(jnp.asarray, normaliser)
        np.testing.assert_allclose(normalise(device, X[:12]), y.reshape(12, 7), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:0], r"of shape \(0, 7\)"),
        (X[:, 0], r"of shape \(5000,\)"),
        (np.array([[1, 2], [3, np.nan]]), "dimension 1 has a value that is not finite"),
        (np.array([[-np.inf, 2]]), "dimension 0 has a value that is not finite"),
    ],
)
def test_what_is_refused(x, message):
    for kind in KINDS:
        with pytest.raises(UserError, match=message):
            kind(x)
    with pytest.raises(UserError, match="take 2 or more"):
        cdf(X, knots=1)


def test_neighbours_that_almost_coincide_make_no_boundless_slope():
    """Among them values that XLA takes for zero; and the way back is still within a millionth of the range."""
    x = np.array([0, 1e-41, 1e-39, 1e-37, 0.5, 1 - 1e-7, 1], np.float32)[:, None]
    normaliser = cdf(x)
    slope = jax.jit(jax.grad(lambda x: normalise(normaliser, x).sum()))(jnp.asarray(x))
    assert (slope <= 2e6).all()
    np.testing.assert_allclose(unnormalise(normaliser, normalise(normaliser, x)), x, atol=1e-6)
