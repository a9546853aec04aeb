"""Guidance by likelihoods: exact classifiers of mixtures and conjugate Gaussians, estimates and samples alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import PROCESSES, key

from diffrl.diffusion import classifier_guidance, guidance, mixtures, samplers, times
from diffrl.diffusion.process import scales
from diffrl.diffusion.sampling import sample, sample_keys, start

PROCESS = PROCESSES["cosine"]
WEIGHTS = np.array([0.8, 0.2])
CLASSES = [
    mixtures.mixture([5, 3], [[-0.8, 0.2], [0.6, 0.7]], [[[0.10, 0.04], [0.04, 0.05]], [[0.03, -0.02], [-0.02, 0.08]]]),
    mixtures.mixture([1.0], [[0.4, -0.9]], [0.04]),
]
MARGINAL = mixtures.mixture(
    [0.5, 0.3, 0.2],
    [[-0.8, 0.2], [0.6, 0.7], [0.4, -0.9]],
    [[[0.10, 0.04], [0.04, 0.05]], [[0.03, -0.02], [-0.02, 0.08]], [[0.04, 0], [0, 0.04]]],
)
X = jax.random.normal(key(0), (6, 2))
T = jnp.linspace(0.1, 0.95, 6)
LABEL = jnp.array([0, 1, 0, 1, 1, 0], jnp.int32)


def joint(process):
    """log p(x_t, y) [B, 2] of the exact classes: logits of the exact classifier."""

    def classify(x, t):
        logs = [np.log(w) + mixtures.log_density(m, process, x, t) for w, m in zip(WEIGHTS, CLASSES, strict=True)]
        return jnp.stack(logs, axis=-1)

    return classify


def log_prob(process):
    return classifier_guidance.label_log_prob(joint(process))


def by_class(process):
    """The exact denoiser given the label."""

    def denoise(x, t, label):
        estimates = jnp.stack([mixtures.denoiser(m, process)(x, t) for m in CLASSES])
        return jnp.take_along_axis(estimates, label[None, :, None], axis=0)[0]

    return denoise


@pytest.mark.parametrize("name", ["cosine", "ve", "flow"])
def test_an_exact_classifier_makes_the_exact_conditional_denoiser(name):
    process = PROCESSES[name]
    alpha, sigma = scales(process, T, X)
    x = X * jnp.hypot(alpha, sigma)
    denoise = mixtures.denoiser(MARGINAL, process)
    guided = jax.jit(classifier_guidance.classifier(process, denoise, log_prob(process)))(x, T, LABEL)
    np.testing.assert_allclose(guided, jax.jit(by_class(process))(x, T, LABEL), atol=2e-4)


def test_sharpened_likelihoods_are_classifier_free_guidance():
    """p(x) p(y | x)^s = p(x)^(1 - s) p(x | y)^s up to a constant, for each sample's own s."""
    scale = np.array([0.0, 0.5, 1.0, 2.0, 4.0, -1.0], np.float32)
    marginal = mixtures.denoiser(MARGINAL, PROCESS)
    guided = classifier_guidance.classifier(PROCESS, marginal, log_prob(PROCESS), scale)
    mixed = guidance.guide(by_class(PROCESS), lambda x, t, y: (marginal(x, t), by_class(PROCESS)(x, t, y)), scale)
    np.testing.assert_allclose(jax.jit(guided)(X, T, LABEL), jax.jit(mixed)(X, T, LABEL), rtol=1e-3, atol=1e-3)


def test_scale_zero_and_the_outside_of_an_interval_change_nothing():
    def denoise(x, t, cond):
        return jnp.tanh(x)

    def log_prob(x, t, cond):
        return (x * cond[:, None]).sum(axis=1)

    interval = guidance.interval(PROCESS, 3.0, 20.0, 30.0, outside=0.0)
    for wrap in (classifier_guidance.classifier, classifier_guidance.through_x0):
        for scale in (0.0, interval):
            np.testing.assert_array_equal(wrap(PROCESS, denoise, log_prob, scale)(X, T, LABEL), jnp.tanh(X))
        assert not np.allclose(wrap(PROCESS, denoise, log_prob, 0.1)(X, T, LABEL), jnp.tanh(X))


def test_samples_have_the_moments_of_their_class():
    num = 6000
    denoise = classifier_guidance.classifier(PROCESS, mixtures.denoiser(MARGINAL, PROCESS), log_prob(PROCESS))
    label = jnp.arange(num) % 2
    grid = times.linear_grid(60, 0.995)
    x = start(PROCESS, key(1), (num, 2), grid[0])
    made = jax.jit(lambda x: sample(samplers.heun(PROCESS, denoise, flow=True), key(2), x, grid, label))(x)
    for y, m in enumerate(CLASSES):
        mean, covariance = mixtures.moments(m)
        found = np.asarray(made)[np.asarray(label) == y]
        # 3000 samples: standard errors of 0.014 and 0.01 at most.
        np.testing.assert_allclose(found.mean(axis=0), mean, atol=0.05)
        np.testing.assert_allclose(np.cov(found.T), covariance, atol=0.04)


# --- Through the estimate of x_0 -------------------------------------------------------------------------------------

PRIOR = np.array([[0.5, 0.2], [0.2, 0.3]])
A = np.array([[1.0, -0.5]])
NOISE = 0.1  # variance of the measurement y = A x_0 + noise
Y = 0.7
GAUSSIAN = mixtures.mixture([1.0], np.zeros((1, 2)), PRIOR[None])
GAIN = PRIOR @ A.T / (A @ PRIOR @ A.T + NOISE)
POSTERIOR = mixtures.mixture([1.0], (GAIN * Y).T, (PRIOR - GAIN @ A @ PRIOR)[None])


def gaussian_log_prob(variance):
    def log_prob(x0, t, y):
        return -0.5 * ((y - x0 @ A[0]) ** 2) / variance(t)

    return log_prob


def full_variance(t):
    """Of y given x_t: A Cov(x_0 | x_t) A^T + noise, Cov(x_0 | x_t) = (PRIOR^-1 + SNR I)^-1."""
    snr = (PROCESS.alpha(t) / PROCESS.sigma(t)) ** 2
    covariance = jnp.linalg.inv(np.linalg.inv(PRIOR) + snr[:, None, None] * np.eye(2))
    return jnp.einsum("d,bde,e->b", A[0], covariance, A[0]) + NOISE


def test_the_full_likelihood_gives_the_exact_posterior_mean():
    denoise = mixtures.denoiser(GAUSSIAN, PROCESS)
    guided = classifier_guidance.through_x0(PROCESS, denoise, gaussian_log_prob(full_variance))
    exact = jax.jit(mixtures.denoiser(POSTERIOR, PROCESS))(X, T)
    np.testing.assert_allclose(jax.jit(guided)(X, T, jnp.full(6, Y)), exact, atol=1e-5)


def test_the_measurements_own_variance_gives_its_own_formula():
    """x_0 + s (sigma^2 / alpha) K^T A^T (y - A K x_t) / noise, with K = alpha S (alpha^2 S + sigma^2 I)^-1: biased."""
    denoise = mixtures.denoiser(GAUSSIAN, PROCESS)
    guided = classifier_guidance.through_x0(PROCESS, denoise, gaussian_log_prob(lambda t: NOISE), 0.3)
    actual = jax.jit(guided)(X, T, jnp.full(6, Y))
    for x, t, found in zip(np.asarray(X, float), np.asarray(T, float), actual, strict=True):
        alpha, sigma = np.cos(0.5 * np.pi * t), np.sin(0.5 * np.pi * t)
        K = alpha * PRIOR @ np.linalg.inv(alpha**2 * PRIOR + sigma**2 * np.eye(2))
        step = sigma**2 / alpha * K.T @ A.T @ (Y - A @ K @ x) / NOISE
        np.testing.assert_allclose(found, K @ x + 0.3 * step, rtol=1e-4, atol=1e-5)


def test_samples_of_the_conjugate_posterior():
    denoise = mixtures.denoiser(GAUSSIAN, PROCESS)
    guided = classifier_guidance.through_x0(PROCESS, denoise, gaussian_log_prob(full_variance))
    grid = times.linear_grid(60, 0.995)
    x = start(PROCESS, key(3), (4000, 2), grid[0])
    sampler = samplers.heun(PROCESS, guided, flow=True)
    made = jax.jit(lambda x: sample(sampler, key(4), x, grid, jnp.full(4000, Y)))(x)
    mean, covariance = mixtures.moments(POSTERIOR)
    np.testing.assert_allclose(made.mean(axis=0), mean, atol=0.04)
    np.testing.assert_allclose(np.cov(np.asarray(made).T), covariance, atol=0.03)


def test_the_denoiser_is_called_once_and_keeps_its_variance():
    calls = []

    def denoise(x, t, cond):
        calls.append(x.shape)
        return 0.5 * x, jnp.full_like(x, 0.25)

    guided = classifier_guidance.through_x0(PROCESS, denoise, gaussian_log_prob(lambda t: NOISE))
    x0, v = guided(X, T, jnp.full(6, Y))
    assert calls == [(6, 2)]
    assert np.all(v == 0.25)
    assert not np.allclose(x0, 0.5 * X)


# --- Noisy classifiers -----------------------------------------------------------------------------------------------


def test_label_log_prob_by_hand():
    logits = jnp.log(jnp.array([[1.0, 3.0], [2.0, 6.0]]))
    log_p = classifier_guidance.label_log_prob(lambda x, t: logits)(None, None, jnp.array([0, 1]))
    np.testing.assert_allclose(jnp.exp(log_p), [0.25, 0.75], rtol=1e-6)


def test_the_exact_classifier_is_the_best():
    """Cross-entropy is proper: colder or warmer than the exact posterior is worse, on common noise."""
    num = 4000
    x0 = jnp.concatenate([mixtures.draw(CLASSES[0], key(5), 3200), mixtures.draw(CLASSES[1], key(6), 800)])
    label, keys = jnp.repeat(jnp.arange(2), jnp.array([3200, 800]), total_repeat_length=num), sample_keys(key(7), num)
    objective = classifier_guidance.classification(PROCESS, times.uniform(0.05, 0.95))

    @jax.jit
    def loss(temperature):
        value, metrics = objective(lambda x, t, _: joint(PROCESS)(x, t) / temperature, x0, label, keys)
        return value.mean(), metrics["accuracy"].mean()

    cold, exact, warm = (loss(temperature) for temperature in (0.5, 1.0, 2.0))
    assert exact[0] < min(cold[0], warm[0]) - 0.01
    assert cold[1] == exact[1] == warm[1] > 0.85


def test_the_classifier_sees_noised_images_by_the_samples_own_keys():
    seen = []

    def model(x, t, cond):
        assert cond is None
        seen.append((x, t))
        return jnp.zeros((len(x), 4))

    x0, keys = jnp.full((3000, 2), 2.0), sample_keys(key(8), 3000)
    label = jnp.zeros(3000, jnp.int32)
    objective = classifier_guidance.classification(PROCESS, lambda keys: jnp.full(len(keys), 0.4))
    loss, metrics = objective(model, x0, label, keys)
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)
    assert np.all(metrics["accuracy"] == 1.0)  # argmax of a tie is the first
    x, t = seen[0]
    assert np.all(t == np.float32(0.4))
    np.testing.assert_allclose(x.mean(), 2.0 * np.cos(0.2 * np.pi), atol=0.04)
    np.testing.assert_allclose(x.std(), np.sin(0.2 * np.pi), atol=0.03)
    objective(model, x0[:5], label[:5], keys[:5])
    np.testing.assert_array_equal(seen[1][0], x[:5])
    assert not np.array_equal(x[0], x[1])


def test_the_best_value_of_noisy_data_is_its_conditional_mean():
    """x_0 ~ N(0, 1) and the value x_0 itself: E[x_0 | x_t] = alpha x_t, with error sigma^2 (both exact)."""
    x0, keys = jax.random.normal(key(9), (20_000, 1)), sample_keys(key(10), 20_000)
    objective = classifier_guidance.regression(PROCESS, times.uniform(0.3, 0.6))
    values = x0[:, 0]

    def loss(factor):
        def model(x, t, cond):
            assert cond is None
            return factor * scales(PROCESS, t, t)[0] * x[:, 0]

        return objective(model, x0, values, keys)[0].mean()

    exact = loss(1.0)
    assert exact < min(loss(0.9), loss(1.1))
    np.testing.assert_allclose(exact, np.mean(np.sin(0.5 * np.pi * np.linspace(0.3, 0.6, 1001)) ** 2), rtol=0.03)
    known = objective(lambda x, t, cond: x[:, 0], x0, values, keys, known=jnp.ones((1,), bool))[0]
    np.testing.assert_array_equal(known, 0.0)
