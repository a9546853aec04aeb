"""Exact likelihood: closed-form densities of Gaussians and mixtures, closed-form flows, uniform bytes."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from diffusion_cases import CURVES, NAMES, PROCESSES, blobs, key, order, switched

from diffrl.diffusion import dequantisation, mixtures, ode_likelihood
from diffrl.diffusion import process as P
from diffrl.diffusion.ode_likelihood import exact, hutchinson, noising_grid
from diffrl.diffusion.sampling import normal, rademacher, sample_keys
from diffrl.errors import UserError

STEPS, POINTS = 64, 256
MEAN, VARIANCE = np.array([0.4, -0.2]), np.array([0.02, 0.3])
# One Gaussian in the shape of three blobs, so that one compilation serves both.
GAUSSIAN = mixtures.mixture([1, 1, 1], [MEAN] * 3, [np.diag(VARIANCE)] * 3)


@functools.partial(jax.jit, static_argnames="divergence")
def run(mixture, index, grid, keys, x, divergence=exact):
    process = switched(index)
    return ode_likelihood.log_density(
        process, mixtures.denoiser(mixture, process), grid, keys, x, divergence=divergence
    )


def clean(mixture, x):
    """The mixture's own log density."""
    return mixtures.log_density(mixture, P.cosine(), x, jnp.zeros(()))


def flow_of_a_gaussian(a, mean, variance, x):
    """log p(x) and the latents under the flow from a[0] to a[1], which keeps (y - a m) / std fixed, and N(0, I)."""
    std = np.sqrt(a[:, None] ** 2 * variance + 1 - a[:, None] ** 2)
    latent = a[1] * mean + std[1] * (a[0] * x - a[0] * mean) / std[0]
    return (scipy.stats.norm.logpdf(latent) + np.log(std[1] / std[0] * a[0])).sum(1), latent


@pytest.mark.parametrize("name", NAMES)
def test_a_gaussians_density(name):
    """The NLL to 1e-3 bits per dimension, by scipy; every point to 1e-4 by the closed form of the flow."""
    z = np.random.default_rng(0).normal(size=(POINTS // 2, 2))
    x = MEAN + np.concatenate([z, -z]) * np.sqrt(VARIANCE)
    process = PROCESSES[name]
    grid = noising_grid(process, STEPS)
    found = run(GAUSSIAN, NAMES.index(name), grid, sample_keys(key(), POINTS), jnp.asarray(x, jnp.float32))
    nll = -np.asarray(found.log_density).mean() / (2 * np.log(2))
    assert nll == pytest.approx(-scipy.stats.norm(MEAN, np.sqrt(VARIANCE)).logpdf(x).mean() / np.log(2), abs=1e-3)
    alpha, sigma = CURVES[name](np.asarray(grid[jnp.array([0, -1])], float))
    expected, latent = flow_of_a_gaussian(alpha / np.hypot(alpha, sigma), MEAN, VARIANCE, x)
    np.testing.assert_allclose(found.log_density, expected, atol=2e-4)
    np.testing.assert_allclose(found.latent, latent, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixtures_density_and_its_latents(name):
    x = mixtures.draw(blobs(), key(1), POINTS)
    found = run(blobs(), NAMES.index(name), noising_grid(PROCESSES[name], STEPS), sample_keys(key(), POINTS), x)
    error = np.asarray(found.log_density - clean(blobs(), x)) / (2 * np.log(2))
    assert abs(error.mean()) < 1e-3
    assert np.abs(error).max() < (1e-2 if name == "ve" else 3e-3)
    latent = np.asarray(found.latent)
    assert scipy.stats.kstest(latent.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.cov(latent.T), np.eye(2), atol=5 * np.sqrt(2 / POINTS))


def test_a_sample_does_not_know_its_batch():
    x, keys, grid = mixtures.draw(blobs(), key(1), POINTS), sample_keys(key(), POINTS), noising_grid(P.cosine(), STEPS)
    forwards = run(blobs(), 0, grid, keys, x, hutchinson())
    backwards = run(blobs(), 0, grid, keys[::-1], x[::-1], hutchinson())
    np.testing.assert_allclose(forwards.log_density, backwards.log_density[::-1], atol=1e-5)


def test_hutchinsons_estimate_is_unbiased_along_the_path():
    """One point with many keys: the mean is the exact log density, and the spread is not nothing."""
    x, grid = jnp.tile(jnp.array([[0.2, 0.3]]), (POINTS, 1)), noising_grid(P.cosine(), STEPS)
    found = np.asarray(run(blobs(), 0, grid, sample_keys(key(5), POINTS), x, hutchinson()).log_density)
    expected = float(clean(blobs(), x[:1])[0])
    assert found.std() > 0.01
    assert found.mean() == pytest.approx(expected, abs=4 * found.std() / np.sqrt(POINTS))


def test_order_of_convergence():
    """Four, in float64, on a range short enough for the error to be seen."""
    x, process, counts = MEAN + np.sqrt(VARIANCE) * np.linspace(-2, 2, 8)[:, None], P.cosine(), np.array([8, 16, 32])
    with jax.enable_x64(True):
        denoise = mixtures.denoiser(mixtures.mixture([1], [MEAN], [np.diag(VARIANCE)]), process)
        run = jax.jit(lambda grid: ode_likelihood.log_density(process, denoise, grid, key(), x, divergence=exact))
        grids = [noising_grid(process, num, 7.0, -3.0) for num in counts]
        # Steps of length nothing fill the grids up, for one shape.
        found = [np.asarray(run(jnp.pad(grid, (0, 33 - len(grid)), mode="edge")).log_density) for grid in grids]
        ends = np.asarray(noising_grid(process, 1, 7.0, -3.0))
    expected, _ = flow_of_a_gaussian(np.cos(0.5 * np.pi * ends), MEAN, VARIANCE, x)
    errors = [np.abs(log_p - expected).max() for log_p in found]
    assert order(errors, counts) == pytest.approx(4, abs=0.2)


def test_steps_to_a_tolerance():
    """diffrax's adaptive steps and ours end at the same density and latents."""
    pytest.importorskip("diffrax")
    x, keys, process = mixtures.draw(blobs(), key(1), 8), sample_keys(key(), 8), P.cosine()
    denoise, grid = mixtures.denoiser(blobs(), process), noising_grid(process, STEPS)
    adaptive = jax.jit(
        lambda x: ode_likelihood.log_density_to_tolerance(process, denoise, grid, keys, x, divergence=hutchinson())
    )(x)
    fixed = run(blobs(), 0, grid, sample_keys(key(), POINTS), jnp.tile(x, (POINTS // 8, 1)), hutchinson())
    np.testing.assert_allclose(adaptive.log_density, fixed.log_density[:8], atol=2e-3)
    np.testing.assert_allclose(adaptive.latent, fixed.latent[:8], atol=2e-3)


def test_a_missing_diffrax_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(UserError, match="pip install diffrax"):
        ode_likelihood.log_density_to_tolerance(P.cosine(), None, jnp.array([0.1, 0.9]), key(), jnp.zeros((1, 2)))


# --- The divergence --------------------------------------------------------------------------------------------------

MATRIX = np.array([[1.0, 2.0, 0.0], [-0.5, 0.3, 1.0], [0.7, 0.0, -2.0]], np.float32)


@pytest.mark.parametrize(("draw", "sees_diagonal"), [(rademacher, False), (normal, True)])
def test_divergence_of_a_linear_map(draw, sees_diagonal):
    """The trace, and variances 2 |S|^2 with normal directions, 2 (|S|^2 - |diag S|^2) with signs; S symmetric part."""
    y, keys = jnp.ones((20_000, 3)), sample_keys(key(2), 20_000)

    def linear(y):
        return y @ MATRIX.T

    out, found = hutchinson(draw)(linear, y, keys)
    np.testing.assert_allclose(out[0], MATRIX.sum(1), rtol=1e-6)
    symmetric = 0.5 * (MATRIX + MATRIX.T)
    seen = symmetric if sees_diagonal else symmetric - np.diag(np.diag(symmetric))
    variance = float(2 * (seen**2).sum())
    assert float(found.mean()) == pytest.approx(np.trace(MATRIX), abs=4 * np.sqrt(variance / 20_000))
    assert float(found.var()) == pytest.approx(variance, rel=0.1)
    assert float(hutchinson(draw, 4)(linear, y, keys)[1].var()) == pytest.approx(variance / 4, rel=0.1)
    np.testing.assert_allclose(exact(linear, y[:2], keys[:2])[1], np.trace(MATRIX), rtol=1e-6)


def test_exact_divergence_of_images():
    """Each sample has its own Jacobian; pixels have three axes."""
    y = jax.random.normal(key(0), (4, 2, 3, 1))

    def f(y):
        return jnp.sin(y) * y.sum(axis=(1, 2, 3), keepdims=True)

    jacobians = jax.vmap(jax.jacobian(lambda y: f(y[None])[0].ravel()))(y).reshape(4, 6, 6)
    np.testing.assert_allclose(exact(f, y, None)[1], jnp.trace(jacobians, axis1=1, axis2=2), rtol=1e-5)


# --- Bytes -----------------------------------------------------------------------------------------------------------


def test_uniform_bytes_cost_eight_bits():
    """Bins filled by Gaussians 0.6 bins wide, a flat density to 1e-3; only its blurred edges cost something."""
    process, levels, variance = P.cosine(), jnp.arange(256) / 127.5 - 1, (0.6 * 2 / 255) ** 2

    def denoise(x, t, cond):
        alpha, sigma = P.scales(process, t, x[..., None])
        total = alpha**2 * variance + sigma**2
        posterior = jax.nn.softmax(-0.5 * (x[..., None] - alpha * levels) ** 2 / total)
        return (posterior * (levels + alpha * variance / total * (x[..., None] - alpha * levels))).sum(-1)

    @jax.jit
    def bits(x0):
        grid = noising_grid(process, STEPS)

        def log_density(z, keys):
            return ode_likelihood.log_density(process, denoise, grid, keys, z).log_density

        return dequantisation.bits_per_dim(dequantisation.uniform, log_density, key(3), x0)

    found = np.asarray(bits(levels.reshape(4, 64).T))
    assert found.mean() == pytest.approx(8.0, abs=1e-2)
    assert found.mean() > 8.0 - 1e-3


def test_the_program_does_not_grow_with_the_number_of_steps():
    denoise, x = mixtures.denoiser(blobs(), P.cosine()), jnp.zeros((2, 2))
    sizes = []
    for steps in (5, 500):
        trace = jax.make_jaxpr(lambda grid, x: ode_likelihood.log_density(P.cosine(), denoise, grid, key(), x))
        sizes.append(str(trace(jnp.linspace(0.01, 0.99, steps + 1), x)).count(" = "))
    assert sizes[0] == sizes[1] > 10
