"""The perceptron of observations: its start, its sizes, what is free of the observation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.nets.perceptron import Perceptron

OBS = jax.random.normal(jax.random.key(1), (5, 3, 2))


def test_it_starts_orthogonal():
    """Rows or columns of the kernels are orthogonal, of length sqrt 2, and of out_scale in the last layer."""
    params = jax.jit(Perceptron(2, (8, 4), out_scale=0.01).init)(jax.random.key(0), OBS)["params"]
    wide, tall, last = (params[name]["kernel"] for name in ("hidden_0", "hidden_1", "out"))
    np.testing.assert_allclose(wide @ wide.T, 2 * np.eye(6), atol=1e-5)
    np.testing.assert_allclose(tall.T @ tall, 2 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(last.T @ last, 1e-4 * np.eye(2), atol=1e-9)
    assert all(not np.any(layer["bias"]) for layer in params.values())


def test_without_orthogonality_the_variance_is_one_over_the_inputs():
    params = jax.jit(Perceptron(64, (256,), out_scale=3.0, orthogonal=False).init)(jax.random.key(0), OBS)["params"]
    assert float(params["hidden_0"]["kernel"].std()) == pytest.approx(6**-0.5, rel=0.05)
    assert float(params["out"]["kernel"].std()) == pytest.approx(3 / 16, rel=0.05)


def test_it_is_what_it_says():
    """A hidden layer of two units by hand, on a flattened observation of two numbers."""
    net = Perceptron(1, (2,), nn.relu)
    hidden = {"kernel": jnp.array([[1.0, -1.0], [2.0, 1.0]]), "bias": jnp.array([0.0, 0.5])}
    params = {"params": {"hidden_0": hidden, "out": {"kernel": jnp.array([[3.0], [5.0]]), "bias": jnp.array([1.0])}}}
    got = net.apply(params, jnp.array([[[1.0], [1.0]], [[-1.0], [-2.0]]]))
    np.testing.assert_allclose(got, [[3 * 3 + 5 * 0.5 + 1], [1.0]])  # hidden [3, 0.5] and, cut off, [0, 0]


def test_bytes_and_truths_are_numbers():
    net = Perceptron(2, (4,))
    params = net.init(jax.random.key(0), OBS)
    truths = OBS > 0
    want = net.apply(params, truths.astype(jnp.float32))
    np.testing.assert_array_equal(net.apply(params, truths), want)
    np.testing.assert_allclose(net.apply(params, truths.astype(jnp.uint8) * 255), want, rtol=1e-6)


def test_free_outputs_do_not_look():
    net = Perceptron(5, (4,), free_std=2)
    params = net.init(jax.random.key(0), OBS)
    assert params["params"]["out"]["kernel"].shape == (4, 3)
    params["params"]["free"] = jnp.array([1.0, -2.0])
    y = net.apply(params, OBS)
    assert y.shape == (5, 5)
    np.testing.assert_array_equal(y[:, 3:], [[1.0, -2.0]] * 5)
    assert np.ptp(y[:, :3], axis=0).min() > 1e-3
