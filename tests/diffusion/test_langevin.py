"""Langevin dynamics: the known bias without Metropolis's test, none with it, and modes that only annealing finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from diffusion_cases import key

from diffrl.diffusion import langevin, mixtures
from diffrl.diffusion import process as P
from diffrl.diffusion.sampling import sample

VARIANCES = np.array([0.5, 1.0, 4.0])
CHAINS = 10_000


def run(sampler, x, step, count, keep=None):
    grid = step * jnp.arange(count + 1)
    return jax.jit(lambda x: sample(sampler, key(1), x, grid, trace=keep or False))(x)


@pytest.mark.parametrize("step", [0.05, 0.5])
def test_the_bias_without_metropolis(step):
    """x' = (1 - h / v) x + sqrt(2 h) z is stationary at V = (1 - h / v)^2 V + 2 h, that is V = v / (1 - h / (2 v))."""
    sampler = langevin.unadjusted(lambda x: -x / jnp.asarray(VARIANCES))
    x = run(sampler, jnp.zeros((CHAINS, 3)), step, 400)
    error = 4 * np.sqrt(2 / CHAINS)
    np.testing.assert_allclose(np.var(x, axis=0), VARIANCES / (1 - step / (2 * VARIANCES)), rtol=error)
    np.testing.assert_allclose(np.mean(x, axis=0), 0.0, atol=4 * np.sqrt(2 * VARIANCES.max() / CHAINS))


def test_metropolis_takes_the_bias_away():
    """Each coordinate of its own variance, at a step whose bias without the test is 50 % in the first."""
    sampler = langevin.adjusted(lambda x: -0.5 * (x**2 / jnp.asarray(VARIANCES)).sum(axis=-1))
    x = run(sampler, jnp.ones((CHAINS, 3)), 0.33, 150)
    np.testing.assert_allclose(np.var(x, axis=0), VARIANCES, rtol=4 * np.sqrt(2 / CHAINS))


def test_metropolis_keeps_a_mixture():
    """Started in it, at a step at which a third of the moves is rejected; images as well as vectors."""
    m = mixtures.mixture([0.4, 0.6], [[-1.0], [1.0]], [0.25, 0.09])
    clean = P.flow()  # at t = 0: no noise

    def log_density(x):
        return mixtures.log_density(m, clean, x.reshape(-1, 1), jnp.zeros(()))

    start = mixtures.draw(m, key(0), 4000).reshape(-1, 1, 1, 1)
    x, path = run(langevin.adjusted(log_density), start, 0.15, 60, keep=lambda x, info: x[:, 0, 0, 0])

    def cdf(x):
        return 0.4 * scipy.stats.norm(-1, 0.5).cdf(x) + 0.6 * scipy.stats.norm(1, 0.3).cdf(x)

    assert x.shape == (4000, 1, 1, 1)
    assert scipy.stats.kstest(np.ravel(x), cdf).pvalue > 0.01
    rejected = np.mean(np.diff(np.asarray(path), axis=0) == 0)
    assert 0.05 < rejected < 0.6
    # The same step without the test is visibly wrong.
    score = jax.grad(lambda x: log_density(x).sum())
    biased = run(langevin.unadjusted(score), start, 0.15, 60)
    assert scipy.stats.kstest(np.ravel(biased), cdf).pvalue < 1e-6


def test_a_rejected_move_changes_nothing():
    """Beyond a wall of zero density every proposal is rejected, memory included."""

    def log_density(x):
        return jnp.where(jnp.abs(x[:, 0]) < 1e-3, 0.0, -1e9)

    sampler = langevin.adjusted(log_density)
    state = sampler.init(jnp.zeros((5, 1)))
    new, info = sampler.step(jax.random.split(key(), 5), state, jnp.float32(0.0), jnp.float32(1.0), None)
    jax.tree.map(np.testing.assert_array_equal, new, state)
    assert info.std == 0


# --- Annealed --------------------------------------------------------------------------------------------------------

FAR = mixtures.mixture([0.25, 0.75], [[-4.0, 0.0], [4.0, 1.0]], [0.04, 0.04])
VE = P.ve(0.01, 10.0)


def share_on_the_left(x):
    return float(np.mean(np.asarray(x)[:, 0] < 0))


def test_annealing_weighs_modes_that_plain_dynamics_cannot():
    """Both start from the noise of t = 1; plain dynamics leaves each chain in the basin where it began."""
    start = 10.0 * jax.random.normal(key(0), (2000, 2))
    levels = jnp.concatenate([jnp.linspace(1.0, 0.2, 17), jnp.zeros(1)])
    annealed = langevin.annealed(VE, mixtures.denoiser(FAR, VE), count=40, size=0.1)
    x = np.asarray(jax.jit(lambda x: sample(annealed, key(1), x, levels))(start))
    assert share_on_the_left(x) == pytest.approx(0.25, abs=0.06)
    right = x[x[:, 0] > 0]
    np.testing.assert_allclose(right.mean(axis=0), [4.0, 1.0], atol=0.05)
    np.testing.assert_allclose(right.std(axis=0), 0.2, atol=0.04)

    def score(x):
        return mixtures.score(FAR, VE, x, jnp.full(len(x), 0.05))

    plain = run(langevin.unadjusted(score), start, 0.004, 1000)
    assert share_on_the_left(plain) > 0.4


def test_stationary_variance_at_one_level():
    """Moves of h = size sigma^2 on N(0, v + sigma^2): the unadjusted bias again, and `info` is the last move's."""
    gaussian, t = mixtures.mixture([1.0], [[0.0]], [1.0]), jnp.float32(0.6)
    sampler = langevin.annealed(VE, mixtures.denoiser(gaussian, VE), count=50, size=0.8)
    _, (x, info) = jax.jit(lambda x: sample(sampler, key(1), x, jnp.full(5, t), trace=True))(jnp.zeros((CHAINS, 1)))
    sigma = float(VE.sigma(t))
    variance, h = 1.0 + sigma**2, 0.8 * sigma**2
    assert float(x[-1].var()) == pytest.approx(variance / (1 - h / (2 * variance)), rel=4 * np.sqrt(2 / CHAINS))
    np.testing.assert_allclose(info.std, np.sqrt(2 * h), rtol=1e-5)
    z = (x - info.mean) / info.std
    assert scipy.stats.kstest(np.ravel(z), "norm").pvalue > 0.01
