"""Data consistency: exact where theory says so, and DPS against its own formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import CURVES, NAMES, PROCESSES, blobs, key, switched

from diffrl.diffusion import inverse, mixtures, operators, samplers, times
from diffrl.diffusion.sampling import sample, start

PROCESS, CURVE = PROCESSES["cosine"], CURVES["cosine"]
SHAPE = (4, 4, 1)
VARIANCE = 0.3  # of Gaussian images whose pixels are independent
RNG = np.random.default_rng(0)
MEAN = RNG.normal(size=SHAPE).astype(np.float32)
MATRIX = np.array([[1.0, 0.5], [0.0, 2.0]], np.float32)[:1]
OPERATORS = {
    "mask": lambda: operators.mask(RNG.random((4, 4, 1)) < 0.5, SHAPE),
    "blur": lambda: operators.blur(SHAPE, 0.5),
    "downsample": lambda: operators.downsample(SHAPE, 2),
    "FFT": lambda: operators.masked_fft(RNG.random((4, 4)) < 0.5, channels=1),
}


def gaussian_denoiser(process):
    """Exact for N(MEAN, VARIANCE I) images."""

    def denoise(x, t, cond):
        alpha, sigma = (curve(t).reshape(-1, 1, 1, 1) for curve in process)
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)

    return denoise


def dense(operator):
    size = np.prod(operator.shape)
    return np.asarray(operator.forward(jnp.eye(size).reshape(size, *operator.shape))).reshape(size, -1).T.astype(float)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("name", OPERATORS)
def test_pigdm_is_the_posterior_mean_of_independent_pixels(name, noise):
    """E[x_0 | x_t, y] by Bayes' rule for x_0, with x_t and y as two measurements of it, in float64."""
    operator = OPERATORS[name]()
    matrix = dense(operator)
    x = jax.random.normal(key(1), (5, *SHAPE))
    y = operator.forward(jax.random.normal(key(2), (5, *SHAPE)))
    t = jnp.linspace(0.1, 0.95, 5)

    @jax.jit
    def estimate(index):
        process = switched(index)
        return inverse.pigdm(gaussian_denoiser(process), process, operator, y, noise, VARIANCE)(x, t, None)

    for index, process in enumerate(NAMES):
        actual = np.asarray(estimate(index)).reshape(5, -1)
        for i in range(5):
            alpha, sigma = CURVES[process](np.float64(t[i]))
            joint = np.vstack([alpha * np.eye(16), matrix])
            variances = np.concatenate([np.full(16, sigma**2), np.full(len(matrix), noise**2)])
            seen = np.concatenate([np.ravel(x[i]), np.ravel(y[i])]) - joint @ np.ravel(MEAN)
            gain = VARIANCE * joint.T @ np.linalg.pinv(VARIANCE * joint @ joint.T + np.diag(variances), rcond=1e-7)
            np.testing.assert_allclose(actual[i], np.ravel(MEAN) + gain @ seen, atol=2e-3, err_msg=process)


def test_pigdm_samples_the_posterior_of_independent_pixels():
    """With the exact E[x_0 | x_t, y], DDIM's many steps end in the posterior: its mean and its covariance."""
    operator = operators.general(lambda x: x @ MATRIX.T, (2,))
    prior = mixtures.mixture([1.0], [[0.2, -0.4]], [VARIANCE])
    noise, y = 0.3, jnp.full((20_000, 1), 0.8)
    guided = inverse.pigdm(mixtures.denoiser(prior, PROCESS), PROCESS, operator, y, noise, VARIANCE)
    grid = times.linear_grid(200, 0.999)
    x = jax.jit(lambda x: sample(samplers.ddim(PROCESS, guided), key(), x, grid))(
        start(PROCESS, key(0), (20_000, 2), grid[0])
    )
    precision = np.eye(2) / VARIANCE + MATRIX.T @ MATRIX / noise**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ (np.array([0.2, -0.4]) / VARIANCE + MATRIX[0] * 0.8 / noise**2)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.02)


def test_conditional_variance_is_tweedies():
    """(sigma^2 / alpha) dm / dx_t, of the mixture whose components coincide."""
    point = mixtures.mixture([1.0], [[0.5]], [VARIANCE])
    t = jnp.linspace(0.05, 0.95, 7)

    @jax.jit
    def both(index):
        process = switched(index)
        denoise = mixtures.denoiser(point, process)
        slope = jax.jvp(lambda x: denoise(x, t), (jnp.ones((7, 1)),), (jnp.ones((7, 1)),))[1][:, 0]
        return inverse.conditional_variance(process, t, VARIANCE), slope

    for index, name in enumerate(NAMES):
        r2, slope = both(index)
        alpha, sigma = CURVES[name](np.asarray(t, np.float64))
        np.testing.assert_allclose(r2, sigma**2 / alpha * np.asarray(slope), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("name", OPERATORS)
def test_ddnm_is_consistent_at_every_step(name):
    """A x_0 = y, exactly; what A does not see is the denoiser's; and so ends a whole chain."""
    operator = OPERATORS[name]()
    y = operator.forward(jax.random.normal(key(2), (5, *SHAPE)))
    denoise = gaussian_denoiser(PROCESS)
    consistent = inverse.ddnm(denoise, PROCESS, operator, y)
    x, t = jax.random.normal(key(1), (5, *SHAPE)), jnp.linspace(0.1, 0.95, 5)
    x0 = consistent(x, t, None)
    np.testing.assert_allclose(operator.forward(x0), y, atol=1e-5)
    matrix = dense(operator)
    unseen = np.eye(16) - np.linalg.pinv(matrix, rcond=1e-4) @ matrix
    for before, after in zip(denoise(x, t, None), x0, strict=True):
        np.testing.assert_allclose(unseen @ np.ravel(after), unseen @ np.ravel(before), atol=1e-5)
    grid = times.linear_grid(10, 0.99)
    run = jax.jit(lambda x: sample(samplers.ancestral(PROCESS, consistent), key(3), x, grid))
    np.testing.assert_allclose(operator.forward(run(x)), y, atol=1e-5)


def test_ddnm_with_noise_weighs_estimate_and_measurement():
    """One pixel: the mean of N(m, r^2) given y = x_0 + N(0, noise^2), by hand."""
    operator = operators.mask(True, (1,))
    m, y, t = jnp.array([[0.4], [0.4]]), jnp.array([[1.0], [1.0]]), jnp.array([0.3, 0.6])
    guided = inverse.ddnm(lambda x, t, cond: m, PROCESS, operator, y, noise=0.5, data_variance=VARIANCE)
    alpha, sigma = CURVE(np.asarray(t, np.float64))
    r2 = 1.0 / (1.0 / VARIANCE + alpha**2 / sigma**2)
    expected = (0.4 / r2 + 1.0 / 0.25) / (1.0 / r2 + 1.0 / 0.25)
    np.testing.assert_allclose(guided(m, t, None)[:, 0], expected, rtol=1e-5)


def test_dps_is_its_formula():
    """m(x_t) = c x_t, so that grad |y - A c x_t| = -c A^T (y - A c x_t) / |y - A c x_t|, in float64."""
    c, scale = 0.7, 0.4
    operator = OPERATORS["blur"]()
    matrix = dense(operator)
    x, y = (np.asarray(jax.random.normal(key(i), (3, *SHAPE))) for i in (1, 2))
    plain = samplers.ancestral(PROCESS, lambda x, t, cond: c * x)
    guided = inverse.dps(plain, operator, jnp.asarray(y), scale)
    grid = jnp.array([0.8, 0.6])
    (x_plain, info_plain), (x_guided, info) = (
        sample(sampler, key(3), jnp.asarray(x), grid, trace=lambda x, info: (x[None], info))[1]
        for sampler in (plain, guided)
    )
    residual = y.reshape(3, -1) - c * x.reshape(3, -1).astype(float) @ matrix.T
    shift = -scale * c * residual @ matrix / np.linalg.norm(residual, axis=1, keepdims=True)
    np.testing.assert_allclose(np.ravel(x_guided), np.ravel(x_plain) - np.ravel(shift), atol=1e-5)
    np.testing.assert_allclose(np.ravel(info.mean), np.ravel(info_plain.mean) - np.ravel(shift), atol=1e-5)
    np.testing.assert_allclose(info.x0, info_plain.x0, atol=1e-6)


@pytest.mark.parametrize("wrap", [inverse.ddnm, inverse.pigdm])
def test_one_measurement_may_stand_for_all(wrap):
    operator, t = OPERATORS["downsample"](), jnp.array([0.2, 0.5, 0.8])
    x, y = jax.random.normal(key(1), (3, *SHAPE)), operator.forward(jax.random.normal(key(2), (1, *SHAPE)))
    one, each = (wrap(gaussian_denoiser(PROCESS), PROCESS, operator, m, 0.2) for m in (y, jnp.tile(y, (3, 1, 1, 1))))
    np.testing.assert_allclose(one(x, t, None), each(x, t, None), atol=1e-6)


def test_one_measurement_may_stand_for_all_in_dps():
    """Each sample's norm is its own all the same."""
    operator = OPERATORS["downsample"]()
    x, y = jax.random.normal(key(1), (3, *SHAPE)), operator.forward(jax.random.normal(key(2), (1, *SHAPE)))
    plain, grid = samplers.ddim(PROCESS, lambda x, t, cond: 0.7 * x), jnp.array([0.8, 0.6])
    together = sample(inverse.dps(plain, operator, y), key(), x, grid)
    alone = [sample(inverse.dps(plain, operator, y), key(), one[None], grid)[0] for one in x]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_dps_rests_where_the_measurement_is_met():
    """A residual of 0 has no gradient: no NaN, and no step."""
    operator = operators.mask(True, (2,))
    x = jnp.array([[0.5, -1.0]])
    guided = inverse.dps(samplers.ddim(PROCESS, lambda x, t, cond: 0.5 * x), operator, 0.5 * x)
    plain = samplers.ddim(PROCESS, lambda x, t, cond: 0.5 * x)
    grid = jnp.array([0.8, 0.6])
    np.testing.assert_array_equal(*(sample(sampler, key(), x, grid) for sampler in (guided, plain)))


def test_dps_draws_samples_to_the_measurement():
    """On a mixture, the residual of x_1 = 0.5 after sampling is a fraction of what it is without."""
    operator = operators.mask(jnp.array([True, False]), (2,))
    y = jnp.tile(jnp.array([[0.5, 0.0]]), (500, 1))
    grid = times.linear_grid(100, 0.99)
    plain = samplers.ancestral(PROCESS, mixtures.denoiser(blobs(), PROCESS))
    x = start(PROCESS, key(0), (500, 2), grid[0])
    run = jax.jit(lambda x: [sample(s, key(1), x, grid) for s in (plain, inverse.dps(plain, operator, y, 0.1))])
    free, drawn = (np.abs(np.asarray(out)[:, 0] - 0.5).mean() for out in run(x))
    assert drawn < 0.25 * free
