"""Samplers with exact denoisers: per-step float64 recursions, moments of a mixture, orders of convergence."""

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
    blobs,
    flow_order,
    gaussian,
    key,
    law_errors,
    order,
    switched,
)

from diffrl.diffusion import dpm_solver, mixtures, samplers, times, unipc
from diffrl.diffusion import process as P
from diffrl.diffusion.sampling import CHURN, Info, Sampler, State, fold, normal, sample, start
from diffrl.errors import UserError

GAUSSIAN = gaussian()


def exact_v(process, t, s, variance=VARIANCE):
    """The v that makes an ancestral step's variance that of q(x_s | x_t), for N(m, l I) data."""

    def marginal(u):
        return process.alpha(u) ** 2 * variance + process.sigma(u) ** 2

    true = marginal(s) - (process.alpha(t) / process.alpha(s) * marginal(s)) ** 2 / marginal(t)
    small, large = P.posterior_variance(process, t, s), P.transition_variance(process, t, s)
    return jnp.log(true / small) / jnp.log(large / small)


SAMPLERS = {
    "ancestral0": lambda p, d: samplers.ancestral(p, d, 0.0),
    "ancestral1": lambda p, d: samplers.ancestral(p, d, 1.0),
    "ddim0": lambda p, d: samplers.ddim(p, d),
    "ddim0.25": lambda p, d: samplers.ddim(p, d, 0.25),
    "ddim0.5": lambda p, d: samplers.ddim(p, d, 0.5),
    "ddim1": lambda p, d: samplers.ddim(p, d, 1.0),
    "euler": samplers.euler,
    "heun": samplers.heun,
    "heun_flow": lambda p, d: samplers.heun(p, d, flow=True),
    "heun_churn": lambda p, d: samplers.churn(samplers.heun(p, d), p, 0.2, s_min=0.05, s_max=10.0),
    "dpmpp_2m": dpm_solver.dpmpp_2m,
    "dpmpp_2m_sde": dpm_solver.dpmpp_2m_sde,
    "unipc3": lambda p, d: unipc.unipc(p, d, 3),
}


# --- Every step is the affine Gaussian map of the papers -------------------------------------------------------------

GRID = np.linspace(1.0, 0.0, 11).astype(np.float32)


def affine_step(name, curves, t, s):
    """(A, b, std) of x_s ~ N(A x_t + b, std^2) in float64, for the optimal x_0 of N(MEAN, VARIANCE) data."""
    (a_t, s_t), (a_s, s_s) = curves(t), curves(s)
    gain = a_t * VARIANCE / (a_t**2 * VARIANCE + s_t**2)
    x0 = np.array([gain, MEAN - gain * a_t * MEAN])  # (slope, intercept)
    eps = (np.array([1.0, 0.0]) - a_t * x0) / s_t
    beta = s_t**2 - (a_t / a_s * s_s) ** 2
    tilde = beta * s_s**2 / s_t**2
    if name.startswith("ancestral"):
        mean = a_s * beta / s_t**2 * x0 + (a_t / a_s) * s_s**2 / s_t**2 * np.array([1.0, 0.0])
        std = 0.0 if s_s == 0 else np.sqrt(beta if name.endswith("1") else tilde)
    else:
        eta = float(name.removeprefix("ddim"))
        std = eta * np.sqrt(tilde)
        mean = a_s * x0 + np.sqrt(max(s_s**2 - std**2, 0.0)) * eps
    return *mean, std


@functools.partial(jax.jit, static_argnums=0)
def walk(name, index, key, x):
    process = switched(index)
    sampler = SAMPLERS[name](process, mixtures.denoiser(GAUSSIAN, process))

    def keep(x, info):
        return (x[:32], info.mean[:32], info.std, info.x0[:32])

    return sample(sampler, key, x, jnp.asarray(GRID), trace=keep)


@pytest.mark.parametrize("name", ["ancestral0", "ancestral1", "ddim0", "ddim0.25", "ddim0.5", "ddim1"])
def test_steps_are_the_papers_recursion(name):
    """Of each step from 1 to 0 its mean, its std and x_0; of 40,000 samples the final variance, all processes."""
    for index, process in enumerate(NAMES):
        curves = CURVES[process]
        x = start(PROCESSES[process], key(index), (40_000, 1))
        final, (xs, means, stds, x0s) = walk(name, index, key(100 + index), x)
        xs = np.concatenate([x[None, :32], xs]).astype(np.float64)
        mean, variance = 0.0, float(PROCESSES[process].sigma(jnp.ones(()))) ** 2
        for n in range(10):
            t, s = np.float64(GRID[n]), np.float64(GRID[n + 1])
            slope, intercept, std = affine_step(name, curves, t, s)
            scale = np.abs(xs[n]).max()
            np.testing.assert_allclose(means[n], slope * xs[n] + intercept, atol=3e-5 * scale, err_msg=process)
            assert float(stds[n]) == pytest.approx(std, rel=3e-4, abs=1e-7), (process, n)
            mean, variance = slope * mean + intercept, slope**2 * variance + std**2
        assert float(stds[-1]) == 0.0
        np.testing.assert_array_equal(final[:32], x0s[-1])  # the last step returns the estimate
        assert float(final.var()) == pytest.approx(variance, rel=4 * np.sqrt(2 / 40_000)), process
        assert float(final.mean()) == pytest.approx(mean, abs=4 * np.sqrt(variance / 40_000) + 1e-5), process


@pytest.mark.parametrize("process", NAMES)
def test_ddim_with_eta_one_is_ancestral_with_the_posteriors_variance(process):
    """Two derivations of one chain, on the same noise."""
    index = NAMES.index(process)
    x = start(PROCESSES[process], key(index), (40_000, 1))
    ancestral, ddim = (walk(name, index, key(1), x)[0] for name in ("ancestral0", "ddim1"))
    np.testing.assert_allclose(ancestral, ddim, atol=1e-4)


def test_ancestral_with_the_exact_variance_keeps_every_marginal():
    """With q(x_s | x_t)'s own variance, learned=True, five steps are as exact as a thousand."""
    grid = jnp.linspace(1.0, 0.1, 6)

    @jax.jit
    def run(index, key, x):
        process = switched(index)
        mean = mixtures.denoiser(GAUSSIAN, process)

        def denoise(x, t, cond):
            s = t - (grid[0] - grid[1])
            return mean(x, t), exact_v(process, t, s)[:, None] + jnp.zeros_like(x)

        return sample(samplers.ancestral(process, denoise, learned=True), key, x, grid)

    for index, name in enumerate(NAMES):
        alpha, sigma = CURVES[name](np.array([1.0, 0.1]))
        variance = alpha**2 * VARIANCE + sigma**2
        noised = alpha[0] * MEAN + np.sqrt(variance[0]) * jax.random.normal(key(1), (40_000, 1))
        x = np.asarray(run(index, key(2), noised))
        assert x.var() == pytest.approx(variance[1], rel=4 * np.sqrt(2 / 40_000)), name
        assert x.mean() == pytest.approx(alpha[1] * MEAN, abs=4 * np.sqrt(variance[1] / 40_000)), name


# --- Moments of a mixture --------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def samples_of_blobs(name, index, key, x, grid):
    process = switched(index)
    return sample(SAMPLERS[name](process, mixtures.denoiser(blobs(), process)), key, x, grid)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddim0.25", "ddim1", "euler")])
def test_moments_of_a_mixture(name):
    """Mean and covariance of 20,000 samples, every process; and no NaN from 1 to 0."""
    mean, covariance = mixtures.moments(blobs())
    for index, process in enumerate(NAMES):
        x = start(PROCESSES[process], key(10 + index), (20_000, 2))
        x = np.asarray(samples_of_blobs(name, index, key(20 + index), x, times.linear_grid(150)))
        np.testing.assert_allclose(x.mean(0), mean, atol=0.02, err_msg=process)
        np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.02, err_msg=process)


# --- Orders of convergence -------------------------------------------------------------------------------------------


def churned(process, denoise):
    """Heun with an amount of churn that shrinks with the step, as EDM's S_churn / N does."""

    def step(keys, state, t, s, cond):
        return samplers.churn(samplers.heun(process, denoise), process, 3.0 * (t - s)).step(keys, state, t, s, cond)

    return Sampler(State, step)


def churns_noise(keys, x):
    return normal(fold(keys, CHURN), x)


@pytest.mark.parametrize(("name", "theory"), [("euler", 1), ("heun", 2), ("heun_flow", 2)])
def test_order_of_convergence(name, theory):
    for process, span in SPANS.items():
        grids = [np.linspace(*span, n + 1) for n in (20, 40, 80)]
        assert flow_order(SAMPLERS[name], process, grids) == pytest.approx(theory, abs=0.2), process


@pytest.mark.parametrize(("make", "noise", "theory"), [
    (SAMPLERS["ancestral0"], normal, 1),
    (SAMPLERS["ancestral1"], normal, 1),
    (SAMPLERS["ddim0.5"], normal, 1),
    (SAMPLERS["ddim1"], normal, 1),
    (churned, churns_noise, 2),
], ids=["ancestral0", "ancestral1", "ddim0.5", "ddim1", "heun_churn"])  # fmt: skip
def test_weak_order_of_convergence(make, noise, theory):
    """The variance's; the mean of Gaussian data is exact, whatever the grid."""
    counts = np.array([40, 80, 160])
    for process, span in SPANS.items():
        means, variances = law_errors(make, process, [np.linspace(*span, n + 1) for n in counts], noise)
        assert order(variances, counts) == pytest.approx(theory, abs=0.2), process
        assert np.abs(means).max() < 1e-12, process


def test_heun_ends_with_eulers_step():
    """Into sigma = 0, and out of alpha = 0 in EDM's variable, Heun is Euler: the step returns the estimate."""
    process = PROCESSES["flow"]

    def denoise(x, t, cond):
        return 0.3 * x + t[:, None]

    x, grid = jnp.array([[1.0], [-2.0]]), jnp.array([0.5, 0.0])
    for sampler in (samplers.heun(process, denoise), samplers.heun(process, denoise, flow=True)):
        last = sample(sampler, key(), x, grid)
        np.testing.assert_allclose(last, denoise(x, jnp.full(2, 0.5), None), rtol=1e-6)
    out = jnp.array([1.0, 0.5])
    euler = sample(samplers.euler(process, denoise), key(), x, out)
    np.testing.assert_array_equal(sample(samplers.heun(process, denoise), key(), x, out), euler)
    assert not np.allclose(sample(samplers.heun(process, denoise, flow=True), key(), x, out), euler)


def test_heun_on_the_flow_by_hand():
    """x' = v(x, t) with v = (x - x_0) / t; one step from 1 to 1/2 is the trapezoidal rule."""
    process = PROCESSES["flow"]

    def denoise(x, t, cond):
        return 0.5 * x + t[:, None]

    def velocity(x, t):
        return (x - (0.5 * x + t)) / t

    x = np.array([[1.0], [-2.0]])
    euler = x - 0.5 * velocity(x, 1.0)
    expected = x - 0.25 * (velocity(x, 1.0) + velocity(euler, 0.5))
    sampler = samplers.heun(process, denoise, flow=True)
    np.testing.assert_allclose(
        sample(sampler, key(), jnp.asarray(x, jnp.float32), jnp.array([1.0, 0.5])), expected, rtol=1e-5
    )


def test_learned_variance_of_one_kind_equals_the_fixed():
    process = PROCESSES["cosine"]
    exact = mixtures.denoiser(blobs(), process)
    x, grid = start(process, key(0), (8, 2)), times.linear_grid(4, 0.99)

    @jax.jit
    def both(v):
        learned = samplers.ancestral(process, lambda x, t, c: (exact(x, t), jnp.full_like(x, v)), learned=True)
        return [sample(s, key(1), x, grid) for s in (learned, samplers.ancestral(process, exact, v))]

    for v in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(*both(v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_ddim_refuses_more_noise_than_ddpms(eta):
    with pytest.raises(UserError, match=f"eta={eta}"):
        samplers.ddim(PROCESSES["cosine"], None, eta)


# --- Churn -----------------------------------------------------------------------------------------------------------


def probe():
    """A sampler that stays where it is and reports the time that it was told to start from."""
    return Sampler(State, lambda keys, state, t, s, cond: (state, Info(state.x, state.x, t)))


@pytest.mark.parametrize("name", NAMES)
def test_churn_moves_to_the_marginal_of_a_noisier_time(name):
    """x_t ~ p_t becomes x_t^ ~ p_t^, with sigma / alpha greater by 1 + gamma; outside [s_min, s_max] nothing moves."""
    process = PROCESSES[name]
    alpha, sigma = CURVES[name](np.array([0.3, 0.6]))
    levels = sigma / alpha
    churned = samplers.churn(probe(), process, 0.4, s_min=levels.mean())
    for t, gamma, a, u in zip([0.3, 0.6], [0.0, 0.4], alpha, levels, strict=True):
        x = a * MEAN + np.sqrt(a**2 * VARIANCE + (u * a) ** 2) * jax.random.normal(key(1), (40_000, 1))
        raised, t_hat = sample(churned, key(2), x, jnp.array([t, 0.1]), trace=lambda x, info: info.std)
        alpha_hat, sigma_hat = CURVES[name](np.float64(t_hat[0]))
        assert sigma_hat / alpha_hat == pytest.approx((1 + gamma) * u, rel=1e-4)
        variance = alpha_hat**2 * VARIANCE + sigma_hat**2
        assert raised.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / 40_000))
        assert raised.mean() == pytest.approx(alpha_hat * MEAN, abs=4 * np.sqrt(variance / 40_000))
        assert bool(jnp.array_equal(raised, x)) == (gamma == 0)


def test_churn_is_edms_algorithm_2():
    """The paper's box, in its own variables and float64, on the same noise."""
    process = P.Process(jnp.ones_like, lambda t: 4.0 * t)
    gamma, s_min, s_max, s_noise = 0.3, 0.2, 1.5, 1.007

    def denoise(x, t, cond=None):
        return 0.5 * x + t[:, None]

    churned = samplers.churn(samplers.heun(process, denoise), process, gamma, s_min, s_max, s_noise)
    x = np.array([[1.0], [-2.0]])
    for t, s in [(2.0, 1.0), (1.0, 0.4), (0.4, 0.1)]:
        keys = jax.random.split(key(int(10 * t)), 2)
        state, _ = churned.step(keys, State(jnp.asarray(x, jnp.float32)), jnp.float32(t / 4), jnp.float32(s / 4), None)
        eps = s_noise * np.asarray(normal(fold(keys, CHURN), jnp.asarray(x, jnp.float32)), np.float64)
        t_hat = t + (gamma if s_min <= t <= s_max else 0.0) * t
        x_hat = x + np.sqrt(t_hat**2 - t**2) * eps
        d = (x_hat - (0.5 * x_hat + t_hat / 4)) / t_hat
        euler = x_hat + (s - t_hat) * d
        x = x_hat + (s - t_hat) * 0.5 * (d + (euler - (0.5 * euler + s / 4)) / s)
        np.testing.assert_allclose(state.x, x, rtol=2e-5, atol=1e-5)


def test_churn_refuses_a_memory():
    process = PROCESSES["cosine"]
    churned = samplers.churn(dpm_solver.dpmpp_2m(process, mixtures.denoiser(blobs(), process)), process, 0.1)
    with pytest.raises(UserError, match="churn needs a one-step sampler"):
        sample(churned, key(), jnp.zeros((2, 2)), jnp.array([0.9, 0.5]))


def test_temperature_scales_the_noise_of_a_step_and_nothing_else():
    keys, x = jax.random.split(key(5), 64), jax.random.normal(key(6), (64, 2))
    process = PROCESSES["cosine"]

    def step(temperature):
        sampler = samplers.ancestral(process, lambda x, t, cond: 0.3 * x, temperature=temperature)
        return sampler.step(keys, sampler.init(x), jnp.float32(0.6), jnp.float32(0.5), None)

    (warm, info), (cool, cold) = step(1.0), step(0.5)
    np.testing.assert_array_equal(cold.mean, info.mean)
    np.testing.assert_allclose(cold.std, 0.5 * info.std)
    np.testing.assert_allclose(cool.x - cold.mean, 0.5 * (warm.x - info.mean), atol=1e-6)
    np.testing.assert_array_equal(step(0.0)[0].x, info.mean)
