"""Guidance and thresholding: exact ends, exact denoisers, hand numbers, one network call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import PROCESSES, key

from diffrl.diffusion import guidance, mixtures, prediction
from diffrl.diffusion.sampling import sample_keys

PROCESS = PROCESSES["cosine"]
CLASSES = [mixtures.mixture([1.0], [mean], [0.09]) for mean in ([-1.0, 0.0], [1.0, 0.5])]
MARGINAL = mixtures.mixture([1, 1], [[-1.0, 0.0], [1.0, 0.5]], [0.09, 0.09])
NULL = 2


def class_conditional(x, t, cond):
    """Exact for the labels 0 and 1, and for the null class the exact marginal."""
    estimates = [mixtures.denoiser(m, PROCESS)(x, t) for m in (*CLASSES, MARGINAL)]
    return jnp.take_along_axis(jnp.stack(estimates), cond[None, :, None], axis=0)[0]


X = jax.random.normal(key(0), (6, 2))
T = jnp.linspace(0.1, 0.95, 6)
LABEL = jnp.array([0, 1, 0, 1, 1, 0], jnp.int32)


def test_ends_are_bitwise():
    """One half of the pair, untouched by the other; operation by operation, since XLA may fuse two programs unlike."""

    def denoise(x, t, cond):
        return jnp.tanh(x) * (cond[:, None] - 0.7)

    unconditional, conditional = (guidance.classifier_free(denoise, scale, NULL)(X, T, LABEL) for scale in (0.0, 1.0))
    np.testing.assert_array_equal(unconditional, denoise(X, T, jnp.full_like(LABEL, NULL)))
    np.testing.assert_array_equal(conditional, denoise(X, T, LABEL))


@pytest.mark.parametrize("scale", [2.5, np.array([0.0, 0.5, 1.0, 2.0, 4.0, -1.0], np.float32)])
def test_two_exact_denoisers_are_mixed(scale):
    exact = [jax.jit(mixtures.denoiser(m, PROCESS))(X, T) for m in (*CLASSES, MARGINAL)]
    c = np.where(np.asarray(LABEL)[:, None] == 0, exact[0], exact[1]).astype(np.float64)
    u = np.asarray(exact[2], np.float64)
    s = np.broadcast_to(scale, 6)[:, None]
    guided = jax.jit(guidance.classifier_free(class_conditional, scale, NULL))(X, T, LABEL)
    np.testing.assert_allclose(guided, u + s * (c - u), atol=2e-6)


def test_guided_score_is_the_gradient_of_the_sharpened_density():
    """s grad log p(x | c) + (1 - s) grad log p(x), by autodiff of the two densities."""

    def sharpened(x):
        conditional, marginal = (mixtures.log_density(m, PROCESS, x, T) for m in (CLASSES[1], MARGINAL))
        return (3.0 * conditional - 2.0 * marginal).sum()

    @jax.jit
    def guided_score(x):
        x0 = guidance.classifier_free(class_conditional, 3.0, NULL)(x, T, jnp.ones(6, jnp.int32))
        return prediction.to_score(PROCESS, x, T, x0)

    np.testing.assert_allclose(guided_score(X), jax.jit(jax.grad(sharpened))(X), rtol=1e-3, atol=1e-3)


def test_one_call_and_trees():
    """The network is traced once; `cond` may be a tree, and `null` broadcasts against it without changing dtypes."""
    calls = []

    def denoise(x, t, cond):
        calls.append(jax.tree.map(jnp.shape, cond))
        assert cond["label"].dtype == jnp.int32
        return x + cond["label"][:, None] + cond["prompt"].sum(axis=(1, 2))[:, None]

    cond = {"label": LABEL, "prompt": jnp.ones((6, 3, 2))}
    null = {"label": NULL, "prompt": jnp.zeros((3, 2))}
    guided = guidance.classifier_free(denoise, 2.0, null)(X, T, cond)
    assert calls == [{"label": (6,), "prompt": (6, 3, 2)}]
    expected = np.asarray(X) + (-1.0 * NULL + 2.0 * (np.asarray(LABEL) + 6.0))[:, None]
    np.testing.assert_allclose(guided, expected, rtol=1e-6)


def test_the_network_runs_once_on_a_doubled_batch():
    """At run time, one call of a host function sees both halves."""
    shapes = []

    def host(x, cond):
        shapes.append((x.shape, cond.shape))
        return np.broadcast_to(x + cond[..., None], (*cond.shape, 2)).astype(np.float32)

    def denoise(x, t, cond):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x, cond, vmap_method="expand_dims")

    jax.block_until_ready(guidance.classifier_free(denoise, 2.0, NULL)(X, T, LABEL))
    assert shapes == [((1, 6, 2), (2, 6))]


def test_learned_variance_is_the_conditional_one():
    def denoise(x, t, cond):
        return (class_conditional(x, t, cond), jnp.broadcast_to(cond[:, None], x.shape))

    x0, v = jax.jit(guidance.classifier_free(denoise, 0.0, NULL))(X, T, LABEL)
    np.testing.assert_array_equal(v, np.broadcast_to(LABEL[:, None], X.shape))
    unconditional = jax.jit(class_conditional)(X, T, jnp.full_like(LABEL, NULL))
    np.testing.assert_allclose(x0, unconditional, rtol=1e-6)
    x0, v = jax.jit(guidance.clip(denoise, -0.1, 0.1))(X, T, LABEL)
    assert np.abs(x0).max() <= 0.1
    assert v.max() == 1.0


def test_clip_by_hand():
    denoise = guidance.clip(lambda x, t, cond: 2.0 * x)
    np.testing.assert_array_equal(denoise(jnp.array([[-3.0, 0.25, 0.5, 9.0]]), None, None), [[-1, 0.5, 1, 1]])


def test_dynamic_threshold_by_hand():
    """|x_0| = 0 ... 4: the 75th percentile is 3.  A sample within [-1, 1] stays as it is."""
    x0 = jnp.array([[0.0, -1.0, 2.0, -3.0, 4.0], [0.1, -0.2, 0.3, 0.5, -0.9]])
    denoise = guidance.dynamic_threshold(lambda x, t, cond: x, 0.75)
    expected = [[0, -1 / 3, 2 / 3, -1, 1], [0.1, -0.2, 0.3, 0.5, -0.9]]
    np.testing.assert_allclose(denoise(x0, None, None), expected, rtol=1e-6)
    pictures = jnp.tile(x0[:, :, None, None], (1, 1, 2, 2))
    tiled = guidance.dynamic_threshold(lambda x, t, cond: x, 1.0)(pictures, None, None)
    np.testing.assert_allclose(tiled[:, :, 1, 1], [[0, -0.25, 0.5, -0.75, 1], expected[1]], rtol=1e-6)


def test_dropped_conditions():
    """At the given rate, all leaves of a sample together, decided by the sample's key alone."""
    keys = sample_keys(key(7), 4000)
    cond = {"label": jnp.ones(4000, jnp.int32), "prompt": jnp.ones((4000, 3))}
    null = {"label": 10, "prompt": jnp.zeros(3)}
    dropped = guidance.drop_condition(keys, cond, null, 0.2)
    gone = np.asarray(dropped["label"]) == 10
    assert abs(gone.mean() - 0.2) < 4 * np.sqrt(0.16 / 4000)
    np.testing.assert_array_equal(dropped["prompt"], np.where(gone[:, None], 0.0, np.ones((1, 3))))
    assert dropped["label"].dtype == jnp.int32
    part = guidance.drop_condition(keys[50:60], jnp.ones(10, jnp.int32), 10, 0.2)
    np.testing.assert_array_equal(part, dropped["label"][50:60])
    for rate, label in ((0.0, 1), (1.0, 10)):
        assert np.all(guidance.drop_condition(keys[:9], jnp.ones(9, jnp.int32), 10, rate) == label)
