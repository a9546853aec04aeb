"""Score matching on Gaussian data, where a linear score makes every objective a quadratic that can be solved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import CURVES, PROCESSES, key

from diffrl.diffusion import losses, prediction, score_matching
from diffrl.diffusion.sampling import fold, rademacher, sample_keys

D, N = 3, 20_000
MEAN = np.array([0.5, -1.0, 0.2])
COVARIANCE = np.array([[0.8, 0.3, 0.0], [0.3, 0.5, -0.1], [0.0, -0.1, 0.3]])
PRECISION = np.linalg.inv(COVARIANCE)
X = jnp.asarray(np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, N), jnp.float32)
KEYS = sample_keys(key(1), N)
SIGMA = 0.6
OBJECTIVES = {
    "explicit": score_matching.explicit(lambda x: -(x - MEAN) @ PRECISION),
    "implicit": score_matching.implicit,
    "sliced": score_matching.sliced(4, variance_reduction=False),
    "sliced, reduced": score_matching.sliced(2),
    "sliced, signs": score_matching.sliced(2, direction=rademacher),
    "denoising": score_matching.denoising(SIGMA),
}
# Far from the optimum, so that no gradient is small there.
WRONG = jnp.asarray(np.concatenate([0.3 * np.arange(9.0) - 1.0, [0.2, -0.5, 1.0]]), jnp.float32)


def linear(theta):
    """s(x) = A x + b from theta = (A, b) [12]."""
    return lambda x: x @ theta[: D * D].reshape(D, D).T + theta[D * D :]


@jax.jit
def gradients(theta):
    """Of every objective's mean, all at once: [12]."""

    def gradient(objective):
        return jax.grad(lambda theta: objective(linear(theta), X, KEYS).mean())(theta)

    return {name: gradient(objective) for name, objective in OBJECTIVES.items()}


@jax.jit
def values(theta, x, keys):
    return {name: objective(linear(theta), x, keys) for name, objective in OBJECTIVES.items()}


def minimum(gradient):
    """(A, b) at the minimum of a quadratic; its gradient is affine, and known from its values at 0 and the basis."""
    at_zero = np.asarray(gradient(jnp.zeros(12)), np.float64)
    hessian = np.stack([np.asarray(gradient(e), np.float64) - at_zero for e in jnp.eye(12)])
    theta = -np.linalg.solve(hessian, at_zero)
    return theta[:9].reshape(D, D), theta[9:]


def solution(name):
    return minimum(lambda theta: gradients(theta)[name])


@pytest.mark.parametrize(
    ("name", "noise", "tolerance"),
    [("explicit", 0.0, 1e-4), ("sliced", 0.0, 0.25), ("sliced, reduced", 0.0, 0.25), ("denoising", SIGMA, 0.05)],
)
def test_the_minimum_is_the_score(name, noise, tolerance):
    """-S^-1 (x - m), and for denoising that of the blurred data, -(S + sigma^2 I)^-1 (x - m)."""
    precision = np.linalg.inv(COVARIANCE + noise**2 * np.eye(D))
    matrix, offset = solution(name)
    np.testing.assert_allclose(matrix, -precision, atol=tolerance)
    np.testing.assert_allclose(offset, precision @ MEAN, atol=tolerance)


def test_the_implicit_minimum_is_that_of_the_sample():
    """Without the truth: the precision of these very points, no statistics between."""
    x = np.asarray(X, np.float64)
    precision = np.linalg.inv(np.cov(x.T, bias=True))
    matrix, offset = solution("implicit")
    np.testing.assert_allclose(matrix, -precision, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(offset, precision @ x.mean(0), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["implicit", "sliced", "sliced, reduced", "sliced, signs"])
def test_expectations_differ_by_the_known_constant(name):
    """E explicit = E implicit + tr(S^-1) / 2, the constant being E ||grad log p||^2 / 2."""
    found = values(WRONG, X, KEYS)
    difference = np.asarray(found["explicit"] - found[name], np.float64)
    error = difference.std() / np.sqrt(N)
    assert difference.mean() == pytest.approx(np.trace(PRECISION) / 2, abs=4 * error)
    assert error < 0.15 * np.trace(PRECISION)


def test_gradients_agree_in_expectation():
    found = {name: np.asarray(gradient) for name, gradient in gradients(WRONG).items()}
    size = np.linalg.norm(found["explicit"])
    for name in ("implicit", "sliced", "sliced, reduced", "sliced, signs"):
        assert np.linalg.norm(found[name] - found["explicit"]) < 0.05 * size, name
    assert np.linalg.norm(found["denoising"] - found["explicit"]) > 0.2 * size  # another density's score


def test_integrating_the_square_out_reduces_the_variance_alone():
    """The mean is the same; the variance, that of v^T M v, is 2 ||M||^2: M = J with it, J + s s^T / 2 without."""
    x = jnp.ones((N, D))

    @jax.jit
    def estimates(x):
        return [score_matching.sliced(1, reduce)(linear(WRONG), x, KEYS) for reduce in (False, True)]

    s = np.asarray(linear(WRONG)(x[:1])[0], np.float64)
    slope = np.asarray(WRONG[:9]).reshape(D, D)
    symmetric = 0.5 * (slope + slope.T)
    spreads = [np.sqrt(2) * np.linalg.norm(m) for m in (symmetric + 0.5 * np.outer(s, s), symmetric)]
    for estimate, spread in zip(estimates(x), spreads, strict=True):
        assert np.asarray(estimate, np.float64).mean() == pytest.approx(
            np.trace(slope) + 0.5 * s @ s, abs=4 * spread / N**0.5
        )
        assert np.asarray(estimate, np.float64).std() == pytest.approx(spread, rel=0.05)
    assert spreads[1] < 0.5 * spreads[0]


@jax.jit
def of_a_network(x, keys):
    """A score that is not linear, on samples that are matrices: exact trace, its oracle, and many slices."""
    weights = jnp.cos(jnp.arange(36.0)).reshape(6, 6)

    def score(x):
        return jnp.tanh(x.reshape(-1, 6) @ weights + 0.1).reshape(x.shape)

    jacobians = jax.vmap(jax.jacfwd(lambda one: score(one[None])[0].ravel()))(x.reshape(-1, 3, 2)).reshape(-1, 6, 6)
    oracle = jnp.trace(jacobians, axis1=1, axis2=2) + 0.5 * (score(x) ** 2).sum((1, 2))
    many = score_matching.sliced(3000, direction=rademacher)
    return score_matching.implicit(score, x, keys), oracle, many(score, x, keys)


def test_the_trace_is_exact():
    exact, oracle, sliced = of_a_network(jnp.sin(jnp.arange(24.0)).reshape(4, 3, 2), KEYS[:4])
    np.testing.assert_allclose(exact, oracle, rtol=1e-5)
    np.testing.assert_allclose(sliced, oracle, atol=0.25)


def test_a_samples_loss_is_its_own():
    whole, part = values(WRONG, X, KEYS), values(WRONG, X[5:8], KEYS[5:8])
    for name in OBJECTIVES:
        assert part[name].shape == (3,)
        np.testing.assert_allclose(part[name], whole[name][5:8], rtol=2e-5, err_msg=name)


def constant(t):
    return lambda keys: jnp.full(keys.shape, t)


def model(theta):
    return lambda x, t, cond: linear(theta)(x) / (1.0 + t[:, None])


def test_ncsns_objective_is_the_denoising_loss_of_a_score():
    """The same draws, at one level: sigma^2 ||s + eps / sigma||^2, here a mean over D and there half a sum."""
    process, t = PROCESSES["ve"], 0.7
    sigma = float(CURVES["ve"](np.float64(t))[1])

    @jax.jit
    def both(x, keys):
        ours = losses.denoising(process, prediction.score_head(process), constant(t), losses.snr)
        at_one_level = score_matching.denoising(sigma)
        noise = fold(keys, losses.NOISE)
        plain = at_one_level(lambda x: model(WRONG)(x, jnp.full(len(x), t), None), x, noise)
        return ours(model(WRONG), x, None, keys)[0], plain

    weighted, plain = both(X[:16], KEYS[:16])
    np.testing.assert_allclose(weighted, sigma**2 * plain * 2 / D, rtol=2e-4)


@pytest.mark.parametrize("name", ["cosine", "ve"])
def test_any_objective_becomes_noise_conditional(name):
    """Hyvärinen's at one time: the minimum is the score of x_t, and the weight sigma^2 scales the value."""
    t = 0.3
    alpha, sigma = CURVES[name](np.float64(t))
    conditional = score_matching.noise_conditional(score_matching.implicit, PROCESSES[name], constant(t))

    mean = jax.jit(lambda theta: conditional(model(theta), X, None, KEYS)[0].mean())
    matrix, offset = minimum(jax.jit(jax.grad(mean)))
    precision = np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(D))
    np.testing.assert_allclose(matrix / (1 + t), -precision, atol=0.05 * np.linalg.norm(precision))
    # At the minimum the implicit objective is -E ||score||^2 / 2 = -tr(precision) / 2.
    value = float(mean(jnp.concatenate([matrix.ravel(), offset])))
    assert value == pytest.approx(-0.5 * sigma**2 * np.trace(precision), rel=0.05)
