"""The SDE view against Song et al.'s closed forms, exact mixtures and orders of convergence."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from diffusion_cases import (
    MEAN,
    PROCESSES,
    SPANS,
    VARIANCE,
    flow_order,
    gaussian,
    key,
    law_errors,
    laws,
    order,
    switched,
)
from diffusion_cases import NAMES as ALL

from diffrl.diffusion import mixtures, samplers, sde
from diffrl.diffusion import process as P
from diffrl.diffusion.sampling import Info, Sampler, State, sample
from diffrl.errors import UserError

BETAS = P.linear_betas()


def beta(t):
    return 0.1 + 19.9 * t


def integral(t):
    return 0.1 * t + 9.95 * t**2


PUBLISHED = {  # t, float64 -> f, g^2
    "vp": lambda t: (-0.5 * beta(t), beta(t)),
    "sub_vp": lambda t: (-0.5 * beta(t), beta(t) * (1.0 - np.exp(-2.0 * integral(t)))),
    "ve": lambda t: (0.0 * t, (0.01 * 5000.0**t) ** 2 * 2.0 * np.log(5000.0)),
    "cosine": lambda t: (-0.5 * np.pi * np.tan(0.5 * np.pi * t), np.pi * np.tan(0.5 * np.pi * t)),
    "flow": lambda t: (-1.0 / (1.0 - t), 2.0 * t / (1.0 - t)),
}


# --- Drift and diffusion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_drift_and_diffusion_are_the_published(name):
    """From t = 0, where sigma's slope may be infinite, up to where alpha vanishes."""
    last = 0.98 if name in ("cosine", "flow") else 1.0
    t = np.concatenate([[0.0, 1e-6, 1e-3], np.linspace(0.01, last, 50)]).astype(np.float32)
    f, squared = PUBLISHED[name](t.astype(np.float64))
    drift = sde.drift(PROCESSES[name], jnp.full((len(t), 3), 2.0), t)
    np.testing.assert_allclose(drift, np.repeat(2.0 * f[:, None], 3, axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sde.diffusion(PROCESSES[name], t), np.sqrt(squared), rtol=3e-4, atol=3e-6)
    assert sde.diffusion(PROCESSES[name], 0.5).shape == ()


def test_a_table_has_constant_rates_within_a_step():
    t = (np.array([0, 1, 499, 998]) + 0.5) / 1000
    rate = -1000 * np.log1p(-BETAS[[0, 1, 499, 998]])
    np.testing.assert_allclose(sde.diffusion(PROCESSES["ddpm"], t) ** 2, rate, rtol=1e-3)
    np.testing.assert_allclose(sde.log_alpha_slope(PROCESSES["ddpm"], t), -0.5 * rate, rtol=1e-3)
    assert np.isfinite(sde.diffusion(PROCESSES["ddpm"], jnp.array([0.0, 1.0]))).all()


def test_sub_vp_is_equation_29():
    """Its SDE's variance is [1 - exp(-integral of beta)]^2, nowhere above that of VP."""
    t = np.linspace(0, 1, 101).astype(np.float32)
    np.testing.assert_allclose(
        PROCESSES["sub_vp"].sigma(t) ** 2, (1.0 - np.exp(-integral(t.astype(np.float64)))) ** 2, rtol=1e-4
    )
    np.testing.assert_array_equal(PROCESSES["sub_vp"].alpha(t), PROCESSES["vp"].alpha(t))
    assert np.all(PROCESSES["sub_vp"].sigma(t) <= PROCESSES["vp"].sigma(t) + 1e-7)


# --- Forwards --------------------------------------------------------------------------------------------------------


@functools.cache
def forward_paths(name, euler, steps):
    """20,000 paths from x_0 = 1: [steps, 20000] at rising times."""
    process = PROCESSES[name]
    field = functools.partial(sde.drift, process), functools.partial(sde.diffusion, process)
    sampler = sde.simulate(*field) if euler else sde.forward(process)
    grid = jnp.linspace(0.0, 0.9, steps + 1)
    run = jax.jit(lambda x: sample(sampler, key(3), x, grid, trace=lambda x, info: x[:, 0])[1])
    return np.asarray(grid[1:], np.float64), np.asarray(run(jnp.ones((20_000, 1))), np.float64)


@pytest.mark.parametrize(("name", "euler", "steps"), [("vp", False, 6), ("ve", False, 6), ("vp", True, 600)])
def test_forward_paths_have_the_processs_law(name, euler, steps):
    """Mean alpha(t), variance sigma(t)^2, and Cov(x_s, x_t) = alpha_t / alpha_s sigma_s^2, within standard errors."""
    times, paths = forward_paths(name, euler, steps)
    early, late = steps // 3 - 1, steps - 1
    alpha, sigma = (np.asarray(curve(times[[early, late]]), np.float64) for curve in PROCESSES[name])
    errors = 4.0 / np.sqrt(paths.shape[1])
    bias = 0.02 if euler else 0.0
    x, y = paths[early], paths[late]
    np.testing.assert_allclose([x.mean(), y.mean()], alpha, atol=errors * sigma.max() + bias)
    np.testing.assert_allclose([x.var(), y.var()], sigma**2, rtol=np.sqrt(2) * errors + bias)
    expected = alpha[1] / alpha[0] * sigma[0] ** 2
    assert np.cov(x, y)[0, 1] == pytest.approx(expected, abs=2 * errors * sigma[0] * sigma[1] + bias)


# --- Backwards: orders of convergence --------------------------------------------------------------------------------

COUNTS = np.array([80, 160, 320])


def test_euler_maruyama_has_weak_order_one():
    """The variance's; under VE the leading term of its error changes sign at earlier times."""
    for name, span in (SPANS | {"ve": (0.9, 0.3)}).items():
        _, errors = law_errors(sde.euler_maruyama, name, [np.linspace(*span, n + 1) for n in COUNTS])
        assert order(errors, COUNTS) == pytest.approx(1.0, abs=0.2), name


def test_probability_flow_has_order_one():
    for name, span in SPANS.items():
        grids = [np.linspace(*span, n + 1) for n in COUNTS]
        assert flow_order(sde.probability_flow, name, grids) == pytest.approx(1.0, abs=0.2), name


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 1.5])
def test_every_lambda_keeps_the_marginals(noise):
    """To 3e-3 of them, in 4000 steps."""
    make = functools.partial(sde.euler_maruyama, noise=noise)
    errors = law_errors(make, "vp", [np.linspace(0.8, 0.1, 4001)])
    for (error,), exact in zip(errors, laws("vp", 0.1), strict=True):
        assert abs(error) < 3e-3 * exact


# --- Backwards: a mixture --------------------------------------------------------------------------------------------

BIMODAL = mixtures.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.04, 0.09])
NAMES = ["vp", "sub_vp", "ve"]


@functools.partial(jax.jit, static_argnums=(0,))
def reverse(noise, index, key, x):
    """From t = 1 to 1e-3."""
    process = switched(index)
    sampler = sde.euler_maruyama(process, mixtures.denoiser(BIMODAL, process), noise)
    return sample(sampler, key, x, jnp.linspace(1.0, 1e-3, 1001))


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_reverse_sde_and_probability_flow_end_in_the_mixture(noise):
    """Started from the exact p_1; Kolmogorov and Smirnov find no difference from p_0 in 2000 samples."""

    def cdf(x):
        return 0.3 * scipy.stats.norm(-1.0, 0.2).cdf(x) + 0.7 * scipy.stats.norm(0.8, 0.3).cdf(x)

    for index, name in enumerate(NAMES):
        process, one = PROCESSES[name], jnp.ones(())
        x0 = mixtures.draw(BIMODAL, key(index), 2000)
        x1 = process.alpha(one) * x0 + process.sigma(one) * jax.random.normal(key(10 + index), x0.shape)
        end = np.asarray(reverse(noise, ALL.index(name), key(20 + index), x1))[:, 0]
        assert scipy.stats.kstest(end, cdf).pvalue > 0.01, name


def test_ends_of_the_grid():
    """From alpha = 0 the probability flow is finite; into sigma = 0 the reverse SDE adds no noise."""
    process = PROCESSES["flow"]
    denoise = mixtures.denoiser(gaussian(), process)
    x = jnp.array([[0.3], [-2.0]])
    flow = sde.probability_flow(process, denoise)
    # On straight lines Euler's step in t is Euler's step in any of the other variables.
    grid = jnp.array([1.0, 0.6, 0.0])
    np.testing.assert_allclose(
        sample(flow, key(), x, grid), sample(samplers.euler(process, denoise), key(), x, grid), rtol=1e-6
    )
    process = PROCESSES["vp"]
    _, info = sample(
        sde.euler_maruyama(process, mixtures.denoiser(gaussian(), process)),
        key(),
        x,
        jnp.array([0.5, 0.2, 0.0]),
        None,
        True,
    )[1]
    assert info.std[0] > 0
    assert info.std[1] == 0


# --- Predictor-corrector ---------------------------------------------------------------------------------------------

STAY = Sampler(State, lambda keys, state, t, s, cond: (state, Info(state.x, state.x, jnp.zeros(()))))


def wide(dimensions=256):
    return mixtures.mixture([1.0], np.full((1, dimensions), MEAN), [VARIANCE])


@pytest.mark.parametrize("snr", [0.16, 0.5])
def test_the_correctors_stationary_moments(snr):
    """At one level, in many dimensions, ||grad log p||^2 = D V / v^2, so h = 2 r^2 v^2 / V for x_t ~ N(m, v I), and
    V = (1 - h / v)^2 V + 2 h has the solution V = v (1 + r^2); the mean is m."""
    process = PROCESSES["vp"]
    sampler = sde.predictor_corrector(STAY, process, mixtures.denoiser(wide(), process), 4, snr)
    x = 3.0 * jax.random.normal(key(0), (100, 256))
    x = jax.jit(lambda x: sample(sampler, key(1), x, jnp.full(101, 0.3)))(x)
    mean, variance = laws("vp", 0.3)
    assert float(x.var()) == pytest.approx(variance * (1.0 + snr**2), rel=0.03)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * np.sqrt(variance * (1.0 + snr**2) / x.size))


def test_the_corrector_mends_a_coarse_predictor():
    """Twenty steps of the reverse SDE, whose variance is far off; and its samples do not know their batch."""
    process = PROCESSES["vp"]
    denoise = mixtures.denoiser(wide(64), process)
    plain = sde.euler_maruyama(process, denoise)
    both = sde.predictor_corrector(plain, process, denoise, 10)
    grid = jnp.linspace(1.0, 0.1, 21)

    @jax.jit
    def run(x):
        return [sample(sampler, key(1), x, grid) for sampler in (plain, both)]

    x = jax.random.normal(key(0), (200, 64))
    expected = laws("vp", 0.1)[1]
    errors = [abs(float(end.var()) / expected - 1.0) for end in run(x)]
    assert errors[1] < 0.5 * errors[0]
    np.testing.assert_allclose(run(x[:3])[1], run(x)[1][:3], atol=1e-5)


def test_the_corrector_reports_its_own_gaussian():
    """The last move's mean and std, which with the sample's noise make x; none into sigma = 0."""
    process = PROCESSES["vp"]
    denoise = mixtures.denoiser(wide(64), process)
    plain = sde.euler_maruyama(process, denoise)
    both = sde.predictor_corrector(plain, process, denoise, 1)
    x = jax.random.normal(key(0), (50, 64))

    @jax.jit
    def run(x):
        path, info = sample(both, key(1), x, jnp.array([0.3, 0.2, 0.0]), trace=True)[1]
        return path, info, sample(plain, key(1), path[0], jnp.array([0.2, 0.0]))

    path, info, last = run(x)
    z = (path[0] - info.mean[0]) / info.std[0]
    assert scipy.stats.kstest(np.ravel(z), "norm").pvalue > 0.01
    np.testing.assert_allclose(path[1], last, atol=1e-5)
    assert not info.std[1].any()


# --- To a tolerance --------------------------------------------------------------------------------------------------


def test_adaptive_solution_meets_its_tolerance():
    """Gaussian data, both ways: the map keeps (x - mean) / std; no sample knows its batch."""
    pytest.importorskip("diffrax")
    process = PROCESSES["vp"]
    denoise = mixtures.denoiser(gaussian(), process)
    x = jnp.array([[-1.5], [0.0], [1.0], [30.0]])

    @jax.jit
    def solve(x, ends, tolerance):
        return sde.solve_ode(process, denoise, x, *ends, rtol=tolerance, atol=tolerance)

    (mean1, variance1), (mean0, variance0) = laws("vp", 1.0), laws("vp", 1e-3)
    exact = mean0 + np.sqrt(variance0 / variance1) * (np.asarray(x) - mean1)
    down, up = jnp.array([1.0, 1e-3]), jnp.array([1e-3, 1.0])
    fine, coarse = solve(x, down, 1e-5), solve(x, down, 1e-2)
    np.testing.assert_allclose(fine.x, exact, atol=3e-4, rtol=1e-4)
    assert np.all(coarse.steps < fine.steps)
    np.testing.assert_allclose(solve(fine.x, up, 1e-5).x, x, atol=3e-3, rtol=1e-3)
    others = solve(x.at[1:].mul(100.0), down, 1e-5)
    np.testing.assert_array_equal(others.x[0], fine.x[0])
    assert others.steps[0] == fine.steps[0]


def test_without_diffrax_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(UserError, match="pip install diffrax"):
        sde.solve_ode(PROCESSES["vp"], lambda x, t, cond: x, jnp.ones((1, 1)), 1.0, 0.1)
