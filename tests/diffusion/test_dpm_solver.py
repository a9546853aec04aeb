"""DPM-Solver++(2M): the paper's box by hand, orders on a Gaussian, the SDE's marginals, both ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import (
    CURVES,
    MEAN,
    NAMES,
    PROCESSES,
    SPANS,
    VARIANCE,
    flow_order,
    gaussian,
    key,
    law_errors,
    order,
    relative,
)

from diffrl.diffusion import mixtures
from diffrl.diffusion.dpm_solver import dpmpp_2m, dpmpp_2m_sde
from diffrl.diffusion.samplers import ddim
from diffrl.diffusion.sampling import normal, sample, sample_keys, start

X = jnp.array([[1.0, -0.5], [-2.0, 0.3]])


def denoise(x, t, cond=None):
    """Smooth, of no particular data."""
    return 0.4 * jnp.tanh(x) + jnp.cos(3.0 * t)[:, None]


@pytest.mark.parametrize("process", NAMES)
def test_three_steps_are_algorithm_2(process):
    """x_i = sigma_i / sigma_{i-1} x_{i-1} - alpha_i (e^{-h_i} - 1) D_i with r_i = h_{i-1} / h_i, in float64."""
    t = np.array([0.9, 0.7, 0.4, 0.35])
    alpha, sigma = CURVES[process](t)
    h = np.diff(np.log(alpha / sigma))
    x, estimates = np.asarray(X, np.float64), []
    for i in range(3):
        estimates.append(0.4 * np.tanh(x) + np.cos(3.0 * t[i]))
        r = h[i - 1] / h[i]
        d = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2] if i else estimates[0]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h[i]) * d
    actual = sample(dpmpp_2m(PROCESSES[process], denoise), key(), X, jnp.asarray(t, jnp.float32))
    assert relative(actual, x) < 2e-5


def test_second_order():
    for process, span in SPANS.items():
        grids = [np.linspace(*span, n + 1) for n in (40, 80, 160)]
        assert flow_order(dpmpp_2m, process, grids) == pytest.approx(2, abs=0.2), process


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_sde_has_weak_order_two(eta):
    """The variance's; the mean of Gaussian data is exact, whatever the grid."""
    counts = np.array([40, 80, 160, 320])
    make = functools.partial(dpmpp_2m_sde, eta=eta)
    for process, span in SPANS.items():
        means, variances = law_errors(make, process, [np.linspace(*span, n + 1) for n in counts])
        assert order(variances, counts) == pytest.approx(2, abs=0.1), process
        assert np.abs(means).max() < 1e-12, process


def test_uneven_grids_keep_the_order():
    """Steps of lengths 1 : 2, in turns; a fixed ratio would be of first order here."""
    grids = [0.8 - 0.5 * np.append(0.0, np.cumsum(np.tile([1.0, 2.0], n // 2)) / (1.5 * n)) for n in (40, 80, 160)]
    assert flow_order(dpmpp_2m, "flow", grids) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(("make", "eta"), [(dpmpp_2m, 0.0), (dpmpp_2m_sde, 1.0)])
def test_one_step_is_ddim(make, eta):
    process, grid = PROCESSES["cosine"], jnp.array([0.8, 0.5])
    for times in (grid, jnp.array([0.8, 0.0])):
        ours, theirs = (sample(s, key(), X, times) for s in (make(process, denoise), ddim(process, denoise, eta)))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_noise_the_sde_is_the_ode():
    process, grid = PROCESSES["flow"], jnp.linspace(0.9, 0.0, 6)
    ode = sample(dpmpp_2m(process, denoise), key(), X, grid)
    np.testing.assert_array_equal(sample(dpmpp_2m_sde(process, denoise, 0.0), key(), X, grid), ode)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_every_eta_has_the_same_marginals(eta):
    """Mean and variance of N(MEAN, VARIANCE) data at t = 0.1, from the exact marginal at t = 0.9, 40,000 samples."""
    process = PROCESSES["vp"]
    alpha, sigma = CURVES["vp"](np.array([0.9, 0.1]))
    variance = alpha**2 * VARIANCE + sigma**2
    exact = mixtures.denoiser(gaussian(), process)
    x = alpha[0] * MEAN + np.sqrt(variance[0]) * jax.random.normal(key(1), (40_000, 1))
    run = jax.jit(lambda x: sample(dpmpp_2m_sde(process, exact, eta), key(2), x, jnp.linspace(0.9, 0.1, 101)))
    end = run(x)
    assert end.mean() == pytest.approx(alpha[1] * MEAN, abs=4 * np.sqrt(variance[1] / 40_000) + 1e-3)
    assert end.var() == pytest.approx(variance[1], rel=4 * np.sqrt(2 / 40_000) + 5e-3)


def test_info_is_the_steps_gaussian():
    process, grid = PROCESSES["cosine"], jnp.linspace(0.99, 0.0, 6)
    sampler = dpmpp_2m_sde(process, denoise)
    end, (path, info) = sample(sampler, key(), X, grid, trace=True)
    noise = jnp.stack([normal(jax.vmap(jax.random.fold_in, (0, None))(sample_keys(key(), 2), n), X) for n in range(5)])
    np.testing.assert_allclose(path, info.mean + info.std[:, None, None] * noise, atol=1e-6)
    assert info.std[-1] == 0.0
    np.testing.assert_array_equal(end, info.x0[-1])  # not extrapolated


@pytest.mark.parametrize("make", [dpmpp_2m, dpmpp_2m_sde])
@pytest.mark.parametrize("process", ["cosine", "flow"])
def test_from_vanishing_alpha_to_vanishing_sigma(make, process):
    """1 to 0 in one step is the estimate; out of alpha = 0 the first step knows no slope, nor does the second."""
    process = PROCESSES[process]
    sampler = make(process, denoise)
    np.testing.assert_allclose(sample(sampler, key(), X, jnp.array([1.0, 0.0])), denoise(X, jnp.ones(2)), rtol=1e-6)
    x = start(process, key(0), (4, 2))
    _, (path, info) = sample(sampler, key(), x, jnp.linspace(1.0, 0.0, 5), trace=True)
    assert np.all(np.isfinite(path))
    assert np.all(np.isfinite(info.std))
    twice = sample(ddim(process, denoise, float(make is dpmpp_2m_sde)), key(), x, jnp.array([1.0, 0.75, 0.5]))
    np.testing.assert_allclose(path[1], twice, rtol=1e-5, atol=1e-6)
