"""Bits per dimension: quadrature, scipy in float64, and bounds on data whose entropy is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from diffusion_cases import CURVES, key

from diffrl.diffusion import likelihood
from diffrl.diffusion import process as P
from diffrl.errors import UserError

LEVELS = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)


def kl_by_quadrature(q, p):
    mean, std = q.mean(), q.std()

    def integrand(x):
        return q.pdf(x) * (q.logpdf(x) - p.logpdf(x))

    return scipy.integrate.quad(integrand, mean - 10 * std, mean + 10 * std, points=[mean])[0]


@pytest.mark.parametrize(("mean", "std", "other", "other_std"), [(0, 1, 0, 1), (0.3, 0.5, -0.2, 0.7), (1, 2, 0, 0.5)])
def test_gaussian_kl_by_quadrature(mean, std, other, other_std):
    expected = kl_by_quadrature(scipy.stats.norm(mean, std), scipy.stats.norm(other, other_std))
    arguments = (mean, 2 * np.log(std), other, 2 * np.log(other_std))
    actual = likelihood.gaussian_kl(*(jnp.float32(a) for a in arguments))
    assert float(actual) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_gaussian_kl_of_close_variances():
    """Second order in the difference: r^2 / 4, where 'r - 1 - log r' in float32 would return noise."""
    actual = likelihood.gaussian_kl(jnp.zeros(3), jnp.array([1e-2, 1e-3, 1e-4]), 0.0, jnp.zeros(3))
    np.testing.assert_allclose(actual, [2.5083e-5, 2.5008e-7, 2.5e-9], rtol=0.02)


# Log variances, from well inside one bin to beyond the range.
SPREADS = np.array([-11.0, -8.0, -5.0, -2.0, 1.0])
CENTRES = np.array([-1.7, -1.0, -0.31, 0.002, 0.5, 0.999, 1.0, 3.0])


@jax.jit
def masses(means, log_vars):
    """log masses [len(log_vars), len(means), 256] and their gradients in the mean and the log variance."""

    def one(x0, mean, log_var):
        return likelihood.discretised_log_likelihood(x0, mean, log_var)

    both = jax.value_and_grad(one, argnums=(1, 2))
    for axes in ((0, None, None), (None, 0, None), (None, None, 0)):
        both = jax.vmap(both, in_axes=axes)
    return both(LEVELS, means, log_vars)


def scipys(mean, log_var):
    """log masses [256] in float64, each as the difference of the smaller tails."""
    x, std = np.arange(256) / 127.5 - 1, np.exp(0.5 * log_var)
    low, high = (x - 1 / 255 - mean) / std, (x + 1 / 255 - mean) / std
    low[0], high[-1] = -np.inf, np.inf
    mirrored = low + high > 0
    low, high = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    upper, lower = scipy.stats.norm.logcdf(high), scipy.stats.norm.logcdf(low)
    return upper + np.log(-np.expm1(lower - upper))


def test_discretised_log_likelihood():
    """Sums to 1 over the 256 values; scipy's numbers, far tails included; gradients finite everywhere."""
    values, (by_mean, by_log_var) = masses(jnp.asarray(CENTRES, jnp.float32), jnp.asarray(SPREADS, jnp.float32))
    np.testing.assert_allclose(np.exp(np.asarray(values, float)).sum(-1), 1.0, atol=1e-5)
    expected = np.array([[scipys(m, v) for m in CENTRES.astype(np.float32).astype(float)] for v in SPREADS])
    assert expected.min() < -1e4
    np.testing.assert_allclose(values, expected, rtol=2e-4, atol=1e-5)
    assert np.all(np.isfinite(by_mean))
    assert np.all(np.isfinite(by_log_var))


def test_discretised_gradients():
    """By float64 differences of scipy's values, also where the mass is 1e-100."""
    log_var, mean, h = -5.0, 0.25, 1e-5
    _, (by_mean, by_log_var) = masses(jnp.full(1, mean), jnp.full(1, log_var))
    for actual, low, high in (
        (by_mean[0, 0], scipys(mean - h, log_var), scipys(mean + h, log_var)),
        (by_log_var[0, 0], scipys(mean, log_var - h), scipys(mean, log_var + h)),
    ):
        np.testing.assert_allclose(actual, (high - low) / (2 * h), rtol=2e-3, atol=2e-3)


def test_extreme_arguments_stay_finite():
    values, gradients = masses(jnp.array([-300.0, 0.0, 300.0]), jnp.array([-20.0, 15.0]))
    for array in (values, *gradients):
        assert np.all(np.isfinite(array))
    assert np.all(values <= 0)


# --- Bounds on data whose entropy is known ---------------------------------------------------------------------------


def table(steps):
    """The linear table, its betas scaled by 1000 / T."""
    return P.tabulated(P.alpha_bars(P.linear_betas(steps, 0.1 / steps, 20 / steps)))


def exact(process, log_weights):
    """The exact denoiser of independent pixels that take level i with log probability log_weights[i]."""

    def denoise(x, t, cond):
        alpha, sigma = P.scales(process, t, x[..., None])
        logits = log_weights - 0.5 * ((x[..., None] - alpha * LEVELS) / sigma) ** 2
        return jax.nn.softmax(logits, axis=-1) @ LEVELS

    return denoise


@functools.partial(jax.jit, static_argnums=0)
def bound(steps, log_weights, key, x0, v):
    process, grid = table(steps), jnp.arange(steps + 1) / steps
    return likelihood.variational_bound(process, exact(process, log_weights), grid, key, x0, None, v)


def bits(steps, probabilities, x0, v):
    """Mean bound and its standard error; x0 is [B, D]."""
    result = bound(steps, jnp.log(jnp.asarray(probabilities, jnp.float32)), key(steps), x0, v)
    assert result["terms"].shape == (steps, len(x0))
    np.testing.assert_allclose(result["total"], result["prior"] + result["terms"].sum(0), rtol=1e-5)
    total = np.asarray(result["total"], float)
    return total.mean(), total.std() / np.sqrt(len(total))


# Each row holds every 64th level once: rows are exchangeable and their mean has little sampling error.
UNIFORM = LEVELS[(jnp.arange(64)[:, None] + 64 * jnp.arange(4)) % 256]


@pytest.mark.parametrize("v", [0.0, 1.0])
def test_uniform_bytes_cost_eight_bits(v):
    """Never below 8, within the standard error; with the smaller variance less with more steps."""
    (few, few_error), (many, many_error) = (
        bits(steps, np.full(256, 1 / 256), jnp.tile(UNIFORM, (copies, 1)), v) for steps, copies in ((100, 8), (1000, 2))
    )
    assert max(few_error, many_error) < 0.15
    assert few > 8 - 2 * few_error
    assert many > 8 - 2 * many_error
    # What 32,768 pixels at T = 100 and 12,288 at T = 1000 gave, to 0.015.
    expected = (9.757, 8.750) if v == 0 else (8.056, 8.002)
    assert few == pytest.approx(expected[0], abs=3 * few_error)
    assert many == pytest.approx(expected[1], abs=3 * many_error)


@pytest.mark.slow
def test_uniform_bytes_in_four_thousand_steps():
    x0 = jnp.tile(UNIFORM, (4, 1))
    results = [bits(steps, np.full(256, 1 / 256), x0, 0.0) for steps in (100, 1000, 4000)]
    means = [mean for mean, _ in results]
    assert means == pytest.approx([9.757, 8.750, 8.542], abs=0.15)
    assert np.all(np.diff(means) < 0)
    assert all(mean > 8 - 2 * error for mean, error in results)


def test_a_quantised_gaussian():
    """Above the entropy of the rounded values, and by less than 0.2 bits at T = 1000 with the larger variance."""
    probabilities = np.exp(scipys(0.1, 2 * np.log(0.3)))
    entropy = -np.sum(probabilities * np.log2(probabilities))
    assert entropy == pytest.approx(np.log2(0.3 * 127.5 * np.sqrt(2 * np.pi * np.e)), abs=0.01)
    # The levels at evenly spaced quantiles: their empirical entropy is the distribution's.
    quantiles = (np.arange(512) + 0.5) / 512
    x0 = LEVELS[np.searchsorted(np.cumsum(probabilities), quantiles)].reshape(8, 64).T
    mean, error = bits(1000, probabilities, x0, 1.0)
    assert entropy - 2 * error - 0.02 < mean < entropy + 0.2


def test_prior_term():
    """KL(N(alpha x_0, sigma^2) || N(0, 1)) by scipy: bits per dimension, averaged over the dimensions."""
    process = P.tabulated(np.array([0.5, 0.2]))
    x0 = np.array([[-1.0, 0.5, 1.0], [0.0, 0.0, 0.0]])
    kl = 0.5 * (0.8 + 0.2 * x0**2 - 1 - np.log(0.8))
    np.testing.assert_allclose(
        likelihood.prior_term(process, jnp.asarray(x0, jnp.float32)), kl.mean(1) / np.log(2), rtol=1e-5
    )
    sigma = CURVES["ddpm"](1.0)[1]
    assert 0 < 0.5 * (sigma**2 - 1 - 2 * np.log(sigma)) < 1e-8  # of DDPM's table: nothing


def constant(*values):
    """A denoiser whose estimates are these numbers."""

    def denoise(x, t, cond):
        estimates = tuple(jnp.full_like(x, value) for value in values)
        return estimates if len(values) > 1 else estimates[0]

    return denoise


def test_terms_are_kls_of_the_reverse_step():
    """n >= 2 by quadrature of the two Gaussians, built in float64 from the betas."""
    betas = np.array([0.1, 0.2, 0.3])
    process, grid = P.tabulated(np.cumprod(1 - betas)), jnp.arange(4) / 3
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    x0, xt, estimate, v = 1.0, -0.3, 0.2, 0.4
    for n in (2, 3):
        tilde = (1 - alpha_bar[n - 1]) / (1 - alpha_bar[n]) * betas[n - 1]
        gap = np.sqrt(alpha_bar[n - 1]) * betas[n - 1] / (1 - alpha_bar[n]) * (x0 - estimate)
        variance = betas[n - 1] ** v * tilde ** (1 - v)
        expected = kl_by_quadrature(scipy.stats.norm(gap, np.sqrt(tilde)), scipy.stats.norm(0, np.sqrt(variance)))
        for learned in (False, True):
            term = likelihood.bound_term(
                process,
                constant(estimate, v) if learned else constant(estimate),
                grid,
                n=jnp.array([n]),
                x0=jnp.full((1, 2), x0),
                xt=jnp.full((1, 2), xt),
                interpolation=v,
                learned=learned,
            )
            np.testing.assert_allclose(term, [expected / np.log(2)], rtol=1e-4)


def test_the_first_term_is_the_decoder():
    """n = 1: N(estimate, beta_1^v beta~_2^(1 - v)) on the bin of x_0."""
    betas = np.array([1e-3, 0.02, 0.3])
    alpha_bar = np.cumprod(1 - betas)
    process = P.tabulated(alpha_bar)
    tilde = (1 - alpha_bar[0]) / (1 - alpha_bar[1]) * betas[1]
    level, estimate, v = 100, -0.2, 0.25
    expected = -scipys(estimate, v * np.log(betas[0]) + (1 - v) * np.log(tilde))[level] / np.log(2)
    x0 = jnp.full((1, 2), LEVELS[level])
    term = likelihood.bound_term(
        process, constant(estimate), jnp.arange(4) / 3, jnp.array([1]), x0, 3 * x0, interpolation=v
    )
    np.testing.assert_allclose(term, [expected], rtol=1e-3)


def test_learned_variance_of_one_value_equals_the_fixed():
    process, grid = P.tabulated(P.alpha_bars(P.cosine_betas(20))), jnp.arange(21) / 20
    denoise = exact(process, jnp.zeros(256))

    def pair(x, t, cond):
        return (denoise(x, t, cond), jnp.full_like(x, 0.3))

    run = jax.jit(
        lambda x0: (
            likelihood.variational_bound(process, denoise, grid, key(), x0, None, 0.3),
            likelihood.variational_bound(process, pair, grid, key(), x0, None, learned=True),
        )
    )
    fixed, learned = run(UNIFORM[:5])
    for name in ("total", "prior", "terms"):
        np.testing.assert_allclose(learned[name], fixed[name], rtol=1e-5)


def test_bits_of_an_image_do_not_depend_on_its_batch():
    process, grid = P.tabulated(P.alpha_bars(P.cosine_betas(20))), jnp.arange(21) / 20
    denoise = exact(process, jnp.zeros(256))
    run = jax.jit(lambda x0: likelihood.variational_bound(process, denoise, grid, key(), x0)["total"])
    np.testing.assert_allclose(run(UNIFORM[:2]), run(UNIFORM[:5])[:2], rtol=1e-5)


def test_a_bound_of_one_step_is_refused():
    with pytest.raises(UserError, match="a bound of 1 step: choose 2 or more"):
        likelihood.variational_bound(P.cosine(), lambda x, t, cond: x, jnp.array([0.0, 0.9]), key(), jnp.zeros((2, 3)))
