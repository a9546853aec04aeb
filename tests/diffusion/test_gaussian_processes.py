"""Exact samplers against covariances in closed form, kernels and posteriors against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import key
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from diffrl.diffusion import gaussian_processes as gp
from diffrl.errors import UserError

NUM = 20_000
TIMES = jnp.array([0.0, 0.1, 0.15, 0.6, 1.0, 2.5])  # uneven on purpose


def check_law(paths, mean, covariance):
    """Sample moments within five standard errors; where the variance is 0, exactly."""
    paths, covariance = np.asarray(paths, np.float64), np.asarray(covariance, np.float64)
    deviations = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(paths.mean(axis=0) - mean) <= 5 * deviations / np.sqrt(len(paths)) + 1e-6)
    errors = np.sqrt((np.outer(deviations**2, deviations**2) + covariance**2) / len(paths))
    assert np.all(np.abs(np.cov(paths.T) - covariance) <= 5 * errors + 1e-6)


def pairs(times=TIMES):
    s = np.asarray(times, np.float64)
    return s[:, None], s[None]


def test_brownian_motion():
    s, t = pairs()
    check_law(gp.brownian(key(0), TIMES, NUM), 0.0, np.minimum(s, t))
    late = gp.brownian(key(0), TIMES[3:], NUM)
    check_law(late, 0.0, np.minimum(s, t)[3:, 3:])  # the time before the grid counts


def test_brownian_bridge():
    s, t = pairs()
    paths = gp.bridge(key(1), 1.0 + TIMES, NUM, start=1.0, end=-2.0)
    check_law(paths, 1.0 - 3.0 * s[:, 0] / 2.5, np.minimum(s, t) - s * t / 2.5)
    np.testing.assert_allclose(paths[:, -1], -2.0, atol=1e-6)


@pytest.mark.parametrize("theta", [0.7, 30.0])
def test_ornstein_uhlenbeck(theta):
    """From a point; and far beyond its memory, where exp(theta t) overflows."""
    s, t = pairs()
    paths = jax.jit(lambda key, theta: gp.ornstein_uhlenbeck(key, TIMES, NUM, theta, 0.5, 1.3, 2.0))(key(2), theta)
    covariance = 1.3**2 / (2 * theta) * (np.exp(-theta * np.abs(s - t)) - np.exp(-theta * (s + t)))
    check_law(paths, 0.5 + 1.5 * np.exp(-theta * s[:, 0]), covariance)


def test_stationary_ornstein_uhlenbeck_is_matern():
    start = np.sqrt(1.3**2 / 1.4) * jax.random.normal(key(9), (NUM,))
    paths = jax.jit(lambda start: gp.ornstein_uhlenbeck(key(3), TIMES, NUM, 0.7, sigma=1.3, start=start))(start)
    check_law(paths, 0.0, gp.prior(gp.matern12(1 / 0.7, 1.3 / np.sqrt(1.4)), TIMES).covariance)


def test_paths_keep_their_ids():
    for make in (gp.brownian, gp.bridge, gp.ornstein_uhlenbeck):
        make = jax.jit(make, static_argnums=2)
        np.testing.assert_allclose(make(key(4), TIMES, 3), make(key(4), TIMES, 7)[:3], atol=1e-6)


OURS = {
    "rbf": (gp.rbf(0.4, 1.5), kernels.RBF(0.4)),
    "matern12": (gp.matern12(0.4, 1.5), kernels.Matern(0.4, nu=0.5)),
    "matern32": (gp.matern32(0.4, 1.5), kernels.Matern(0.4, nu=1.5)),
    "matern52": (gp.matern52(0.4, 1.5), kernels.Matern(0.4, nu=2.5)),
}


@pytest.mark.parametrize("name", OURS)
def test_kernels_and_posteriors_are_scikit_learns(name):
    ours, theirs = OURS[name]
    theirs = kernels.ConstantKernel(1.5**2) * theirs
    column = np.asarray(TIMES)[:, None]
    np.testing.assert_allclose(gp.prior(ours, TIMES).covariance, theirs(column), rtol=1e-5, atol=1e-6)

    seen, values = np.array([0.0, 0.5, 0.9, 2.0]), np.array([1.0, -1.0, 0.3, 0.7])
    reference = GaussianProcessRegressor(theirs, alpha=0.1**2, optimizer=None).fit(seen[:, None], values)
    mean, covariance = reference.predict(column, return_cov=True)
    posterior = gp.condition(ours, TIMES, jnp.asarray(seen, jnp.float32), jnp.asarray(values, jnp.float32), noise=0.1)
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-4)
    np.testing.assert_allclose(posterior.covariance, covariance, atol=1e-4)


def test_a_brownian_motion_tied_down_is_a_bridge():
    inner = TIMES[1:-1]
    posterior = gp.condition(gp.wiener(), inner, TIMES[-1:], jnp.array([-2.0]))
    s, t = pairs(inner)
    np.testing.assert_allclose(posterior.mean, -2.0 * s[:, 0] / 2.5, atol=1e-6)
    np.testing.assert_allclose(posterior.covariance, np.minimum(s, t) - s * t / 2.5, atol=1e-6)


def test_draws_have_the_covariance():
    gaussian = gp.condition(gp.matern32(0.7), TIMES, TIMES[2:3], jnp.array([1.0]), noise=0.3)
    check_law(
        jax.jit(gp.draw, static_argnums=2)(gaussian, key(5), NUM),
        np.asarray(gaussian.mean),
        gaussian.covariance + 1e-5 * jnp.eye(6),
    )


@pytest.mark.parametrize("kernel", [gp.rbf(0.3), gp.matern52(0.3), gp.wiener()])
def test_fine_grids_of_smooth_kernels_stay_finite(kernel):
    """300 points; the matrix of the first has a condition number far beyond float32."""
    paths = jax.jit(lambda times: gp.draw(gp.prior(kernel, times), key(6), 3))(jnp.linspace(0.0, 1.0, 300))
    assert np.isfinite(paths).all()
    assert np.abs(np.diff(paths, axis=1)).max() < 0.5


def test_without_a_pull_the_ornstein_uhlenbeck_process_is_brownian_motion():
    s, t = pairs()
    paths = gp.ornstein_uhlenbeck(key(3), TIMES, NUM, theta=0.0, mu=5.0, sigma=0.7, start=-1.0)
    check_law(paths, -1.0, 0.7**2 * np.minimum(s, t))


@pytest.mark.parametrize("draw", [gp.brownian, gp.bridge, gp.ornstein_uhlenbeck])
def test_times_that_fall_are_one_line(draw):
    with pytest.raises(UserError, match=r"times fall from 0\.5 to 0\.2"):
        draw(key(), jnp.array([0.0, 0.5, 0.2]), 3)


def test_brownian_motion_starts_at_zero():
    with pytest.raises(UserError, match=r"times fall from 0 to -1"):
        gp.brownian(key(), jnp.array([-1.0, 1.0]), 3)
