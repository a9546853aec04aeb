"""Times: distributions against scipy, the inverse of log SNR, EDM's published grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from diffusion_cases import CURVES, NAMES, PROCESSES, key, switched

from diffrl.diffusion import process as P
from diffrl.diffusion import times
from diffrl.diffusion.sampling import sample_keys
from diffrl.errors import UserError

# Karras et al. (2022), eq. 5 with N = 18, sigma in [0.002, 80], rho = 7.
EDM_18 = [80.0, 57.586, 40.786, 28.375, 19.352, 12.91, 8.4009, 5.3152, 3.2568, 1.9233, 1.0882, 0.58535]
EDM_18 += [0.29644, 0.13952, 0.059947, 0.022935, 0.007528, 0.002]


def drawn(draw, num=5000):
    return np.asarray(jax.jit(draw)(sample_keys(key(3), num)), np.float64)


def test_uniform():
    t = drawn(times.uniform(0.1, 0.7))
    assert t.min() >= 0.1
    assert t.max() < 0.7
    assert scipy.stats.kstest(t, scipy.stats.uniform(0.1, 0.6).cdf).pvalue > 0.01


def test_discrete():
    """All of 1/T ... T/T, equally often, and never 0."""
    t = drawn(times.discrete(10))
    values, counts = np.unique(np.round(t * 10, 5), return_counts=True)
    np.testing.assert_array_equal(values, np.arange(1, 11))
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_logit_normal():
    t = drawn(times.logit_normal(0.5, 0.8))
    assert scipy.stats.kstest(scipy.special.logit(t), scipy.stats.norm(0.5, 0.8).cdf).pvalue > 0.01


@pytest.mark.parametrize("name", ["cosine", "ve"])
def test_log_normal(name):
    """log(sigma / alpha) is normal, on whichever process; beyond its range t is the end."""
    t = drawn(times.log_normal(PROCESSES[name], -1.2, 1.2))
    alpha, sigma = CURVES[name](t)
    assert scipy.stats.kstest(np.log(sigma / alpha), scipy.stats.norm(-1.2, 1.2).cdf).pvalue > 0.01
    assert np.all(drawn(times.log_normal(PROCESSES["ve"], 9.0, 0.1), 5) == 1.0)


@pytest.mark.parametrize(
    "draw", [times.uniform(), times.discrete(1000), times.logit_normal(), times.log_normal(PROCESSES["flow"])]
)
def test_a_samples_time_is_its_own(draw):
    keys = sample_keys(key(5), 8)
    whole, part = draw(keys), draw(keys[3:5])
    np.testing.assert_array_equal(whole[3:5], part)
    assert len(np.unique(whole)) == 8


@jax.jit
def there_and_back(index, t):
    process = switched(index)
    return times.from_log_snr(process, P.log_snr(process, t))


@pytest.mark.parametrize("name", NAMES)
def test_from_log_snr_inverts(name):
    t = jnp.concatenate([jnp.geomspace(1e-4, 0.5, 40), jnp.linspace(0.5, 0.9995, 40), jnp.ones(1)])
    np.testing.assert_allclose(there_and_back(NAMES.index(name), t), t, rtol=2e-5)
    process = PROCESSES[name]
    ends = times.from_log_snr(process, jnp.array([[60.0], [-60.0]]))
    assert ends.shape == (2, 1)
    assert ends[0, 0] < 1e-6
    assert ends[1, 0] > 1 - 1e-6


@pytest.mark.parametrize("name", ["ve", "flow", "cosine"])
def test_karras_grid(name):
    process = P.ve(0.002, 100.0) if name == "ve" else PROCESSES[name]
    grid = times.karras_grid(process, 18)
    assert grid.shape == (19,)
    assert grid[-1] == 0.0
    levels = process.sigma(grid) / process.alpha(grid)
    np.testing.assert_allclose(levels[:-1], EDM_18, rtol=2e-4)
    assert levels[-1] == 0.0
    assert np.all(np.diff(grid) < 0)


@pytest.mark.parametrize("name", ["ve", "flow", "cosine"])
def test_log_snr_grid(name):
    """Levels in geometric progression from 80 to 0.002, then clean data."""
    process = P.ve(0.002, 100.0) if name == "ve" else PROCESSES[name]
    grid = times.log_snr_grid(process, 18)
    assert grid.shape == (19,)
    assert grid[-1] == 0.0
    levels = process.sigma(grid[:-1]) / process.alpha(grid[:-1])
    np.testing.assert_allclose(levels, np.geomspace(80.0, 0.002, 18), rtol=2e-4)


def test_quadratic_grid():
    np.testing.assert_allclose(times.quadratic_grid(4), np.array([16, 9, 4, 1, 0]) / 16, rtol=1e-6)
    np.testing.assert_allclose(times.quadratic_grid(2, 0.81, 0.01), [0.81, 0.25, 0.01], rtol=1e-6)


@pytest.mark.parametrize("make", [times.karras_grid, times.log_snr_grid])
def test_grids_of_levels_beyond_the_process(make):
    """A short table reaches sigma / alpha = 1.32 only: the grid starts there, and no time is repeated."""
    process = P.tabulated(P.alpha_bars(P.linear_betas(100)))
    grid = make(process, 10)
    assert grid[0] == pytest.approx(1.0, abs=1e-5)
    assert np.all(np.diff(grid) < 0)
    assert np.all(P.posterior_variance(process, grid[:-2], grid[1:-1]) > 0)


def test_linear_and_table_grids():
    np.testing.assert_allclose(times.linear_grid(4, 0.9, 0.1), [0.9, 0.7, 0.5, 0.3, 0.1], rtol=1e-6)
    grid = np.asarray(times.linear_grid(50))
    assert grid[0] == 1.0
    assert grid[-1] == 0.0
    np.testing.assert_allclose(times.table_grid(1000, 4), [1.0, 0.75, 0.5, 0.25, 0.0])
    # 1000 / 30 is no integer: the nodes are rounded, never repeated, and whole steps of the table.
    nodes = np.asarray(times.table_grid(1000, 30), np.float64) * 1000
    np.testing.assert_allclose(nodes, np.round(nodes), atol=1e-3)
    assert set(np.round(-np.diff(nodes))) == {33.0, 34.0}
    np.testing.assert_allclose(times.table_grid(7, 7) * 7, np.arange(7, -1, -1), atol=1e-6)


@pytest.mark.parametrize("num", [0, -1, 1001])
def test_a_table_cannot_be_walked_so(num):
    with pytest.raises(UserError, match="1000 steps cannot be walked in"):
        times.table_grid(1000, num)


@pytest.mark.parametrize("make", [times.karras_grid, times.log_snr_grid])
def test_grids_without_a_level_are_refused(make):
    """The same short table: below a smallest level of 1.5 there is no step to take, and none would have a length."""
    process = P.tabulated(P.alpha_bars(P.linear_betas(100)))
    with pytest.raises(UserError, match=r"sigma_min=1.5 is not below the highest sigma / alpha, 1.323"):
        make(process, 4, sigma_min=1.5)
    assert jax.jit(lambda low: make(process, 4, sigma_min=low))(0.1).shape == (5,)  # unknown values pass
