"""Processes and tables against published numbers, float64 closed forms and Bayes' rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import CURVES, NAMES, PROCESSES

from diffrl.diffusion import process as P
from diffrl.errors import UserError

TABLES = {  # at T = 4000 the linear one has its betas divided by 4, as improved DDPM scales them
    "linear": (P.linear_betas(), 1000),
    "linear4000": (P.linear_betas(4000, 2.5e-5, 0.005), 4000),
    "cosine4000": (P.cosine_betas(4000), 4000),
    "scaled_linear": (P.scaled_linear_betas(), 1000),
}


def nodes(steps):
    n = np.arange(1, steps + 1)
    return jnp.asarray(n / steps, jnp.float32), jnp.asarray((n - 1) / steps, jnp.float32)


def test_published_ends_of_the_tables():
    """DDPM's alpha_bar_T and Stable Diffusion's largest sigma, 14.6146; improved DDPM's last beta is clipped."""
    assert P.alpha_bars(P.linear_betas())[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    ends = P.alpha_bars(P.scaled_linear_betas())[[0, -1]]
    assert np.sqrt((1 - ends) / ends) == pytest.approx([0.0292, 14.6146], rel=2e-3)
    assert P.cosine_betas()[-1] == 0.999


def test_cosine_table_is_its_closed_form():
    """alpha_bar_n = f(n) / f(0) for all steps but the clipped last; and half a table in, about a half."""
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = P.alpha_bars(P.cosine_betas(1000))
    np.testing.assert_allclose(alpha_bar[:-1], f[1:-1] / f[0], rtol=1e-9)
    assert alpha_bar[-1] == pytest.approx(alpha_bar[-2] * 0.001)
    assert alpha_bar[499] == pytest.approx(0.4938, abs=1e-4)


@pytest.mark.parametrize("name", TABLES)
def test_tabulated_variances_in_float32(name):
    """alpha_bar at the nodes, beta and beta~ of each step, first and last included, against float64."""
    betas, steps = TABLES[name]
    alpha_bar = np.cumprod(1.0 - betas)
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    process = P.tabulated(P.alpha_bars(betas))
    t, s = nodes(steps)
    np.testing.assert_allclose(process.alpha(t) ** 2, alpha_bar, rtol=2e-6)
    np.testing.assert_allclose(process.sigma(t) ** 2, 1 - alpha_bar, rtol=1e-6)
    np.testing.assert_allclose(P.transition_variance(process, t, s), betas, rtol=1e-3)
    posterior = P.posterior_variance(process, t, s)
    np.testing.assert_allclose(posterior, (1 - before) / (1 - alpha_bar) * betas, rtol=1e-3)
    assert posterior[0] == 0.0
    assert P.transition_variance(process, t, s)[0] == pytest.approx(betas[0], rel=1e-5)


def test_between_the_nodes_log_alpha_bar_is_linear():
    process = P.tabulated(np.array([0.64, 0.16]))
    times = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(process.alpha(times) ** 2, [1.0, 0.8, 0.64, 0.32, 0.16], rtol=1e-6)


@pytest.mark.parametrize(
    "table", [[0.5, 0.6], [0.5, 0.5], [1.0, 0.5], [0.5, 0.0], [[0.5, 0.4]], [0.5, float("nan")], [1.5, 0.5]]
)
def test_tables_that_are_none(table):
    with pytest.raises(UserError, match="fall strictly"):
        P.tabulated(np.array(table))


@pytest.mark.parametrize("name", NAMES)
def test_curves_in_float64(name):
    times = np.linspace(0.001, 0.999, 333).astype(np.float32)
    alpha, sigma = CURVES[name](times.astype(np.float64))
    np.testing.assert_allclose(PROCESSES[name].alpha(times), alpha, rtol=3e-5)
    np.testing.assert_allclose(PROCESSES[name].sigma(times), sigma, rtol=3e-5)


@pytest.mark.parametrize("name", NAMES)
def test_edges_and_monotone_log_snr(name):
    """Clean data at t = 0 exactly, alpha >= 0 at t = 1, and log SNR that falls from +inf."""
    process = PROCESSES[name]
    ends = jnp.array([0.0, 1.0])
    assert process.alpha(ends)[0] == 1.0
    assert process.sigma(ends)[0] == 0.0
    assert process.alpha(ends)[1] >= 0.0
    log_snr = np.asarray(P.log_snr(process, jnp.linspace(0, 1, 1001)))
    assert log_snr[0] == np.inf
    assert not np.any(np.isnan(log_snr))
    assert np.all(np.diff(log_snr[1:]) < 0)


@pytest.mark.parametrize("name", ["cosine", "vp", "ddpm"])
def test_variance_preserving(name):
    times = jnp.linspace(0, 1, 1001)
    process = PROCESSES[name]
    np.testing.assert_allclose(process.alpha(times) ** 2 + process.sigma(times) ** 2, 1.0, atol=3e-7)


def test_end_values():
    one = jnp.ones(())
    assert P.ve(0.002, 80.0).sigma(one) == pytest.approx(80.0, rel=1e-5)
    assert P.ve(0.01, 50.0).sigma(one / 2) == pytest.approx(np.sqrt(0.01 * 50 - 1e-4), rel=1e-5)
    assert P.cosine().alpha(one) == 0.0
    assert P.flow().alpha(one) == 0.0
    # The continuous linear process is the limit of DDPM's table: log alpha_bar(1) = -10.05.
    assert 2 * jnp.log(P.vp().alpha(one)) == pytest.approx(-10.05, rel=1e-6)
    times = jnp.linspace(0.01, 1, 100)
    np.testing.assert_allclose(PROCESSES["vp"].alpha(times), PROCESSES["ddpm"].alpha(times), rtol=0.04)


@pytest.mark.parametrize("name", NAMES)
def test_posterior_is_bayes_rule(name):
    """q(x_s | x_t, x_0) is the product of N(x_s; a_s x_0, s_s^2) and N(x_t; a_ts x_s, s_ts^2), normalised."""
    s, t = np.float32([0.02, 0.1, 0.5, 0.7]), np.float32([0.03, 0.5, 0.55, 0.999])
    (alpha_s, sigma_s), (alpha_t, sigma_t) = CURVES[name](s.astype(float)), CURVES[name](t.astype(float))
    ratio = alpha_t / alpha_s
    forward = sigma_t**2 - ratio**2 * sigma_s**2
    x0, xt = np.array([0.3, -1.0, 0.8, 0.1]), np.array([-0.4, 2.0, 0.7, -1.3])
    precision = 1 / sigma_s**2 + ratio**2 / forward
    mean = (alpha_s * x0 / sigma_s**2 + ratio * xt / forward) / precision
    process = PROCESSES[name]
    np.testing.assert_allclose(P.posterior_variance(process, t, s), 1 / precision, rtol=2e-4)
    np.testing.assert_allclose(P.transition_variance(process, t, s), forward, rtol=2e-4)
    actual = P.posterior_mean(process, *(jnp.asarray(a, jnp.float32) for a in (x0, xt, t, s)))
    np.testing.assert_allclose(actual, mean, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_from_one_to_zero(name):
    """s = 0: the posterior is the point x_0, whatever x_t, also where alpha(t) = 0."""
    process, zero, one = PROCESSES[name], jnp.zeros(3), jnp.ones(3)
    x0, xt = jnp.arange(6.0).reshape(3, 2), jnp.full((3, 2), 7.0)
    assert np.array_equal(P.posterior_mean(process, x0, xt, one, zero), x0)
    assert np.array_equal(P.posterior_variance(process, one, zero), zero)
    np.testing.assert_allclose(P.transition_variance(process, one, zero), process.sigma(one) ** 2)


def test_shapes_broadcast_from_the_left():
    process = PROCESSES["cosine"]
    x0, t = jnp.ones((2, 2, 3, 2)), jnp.array([0.2, 0.9])
    xt = P.add_noise(process, x0, t, 2 * x0)
    expected = np.cos(0.5 * np.pi * np.array([0.2, 0.9])) + 2 * np.sin(0.5 * np.pi * np.array([0.2, 0.9]))
    np.testing.assert_allclose(xt, np.broadcast_to(expected[:, None, None, None], xt.shape), rtol=1e-6)
    assert P.posterior_mean(process, x0, xt, t, t / 2).shape == xt.shape
    assert P.posterior_mean(process, x0, xt, jnp.float32(0.5), jnp.float32(0.1)).shape == xt.shape


@pytest.mark.filterwarnings("error")
def test_a_table_serves_both_precisions():
    """One after the other, in a branch too, where jax keeps a constant in the precision that it first had."""
    alpha = P.tabulated(P.alpha_bars(P.linear_betas(10))).alpha
    for x64, dtype in ((True, jnp.float64), (False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(x64):
            assert jax.jit(lambda t: jax.lax.cond(t > 0, alpha, alpha, t))(jnp.asarray(0.3)).dtype == dtype
