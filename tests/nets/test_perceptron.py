"""The perceptron of observations: its start, its sizes, what is free of the observation."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.nets.perceptron import Perceptron, product

OBS = jax.random.normal(jax.random.key(1), (5, 3, 2))


def test_it_starts_orthogonal():
    """Rows or columns of the kernels are orthogonal, of length sqrt 2, and of out_scale in the last layer."""
    params = jax.jit(Perceptron(2, (8, 4), out_scale=0.01).init)(jax.random.key(0), OBS)["params"]
    wide, tall, last = (params[name]["kernel"] for name in ("hidden_0", "hidden_1", "out"))
    np.testing.assert_allclose(wide @ wide.T, 2 * np.eye(6), atol=1e-5)
    np.testing.assert_allclose(tall.T @ tall, 2 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(last.T @ last, 1e-4 * np.eye(2), atol=1e-9)
    assert all(not np.any(layer["bias"]) for layer in params.values())


def test_a_population_factorises_no_batch_of_matrices():
    """Batches of them, two at a time, stop jaxlib's CPU threads for ever; every seed gets what it would get alone."""
    net = Perceptron(2)
    keys = jax.random.split(jax.random.key(0), 4)
    many = jax.vmap(lambda key: net.init(key, jnp.zeros((1, 4))))
    shapes = re.findall(r"f32\[([\d,]+)\] \S+ = qr\[", str(jax.make_jaxpr(many)(keys)))
    assert shapes == ["64,4", "64,64", "64,2"]
    for a, b in zip(jax.tree.leaves(many(keys)), jax.tree.leaves(net.init(keys[2], jnp.zeros((1, 4)))), strict=True):
        np.testing.assert_allclose(a[2], b, atol=1e-6)


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


@pytest.mark.parametrize("shape", [(16, 4, 8), (16, 8, 4), (16, 8, 8)], ids=str)
def test_a_product_and_all_its_derivatives(shape):
    """Forwards, backwards, twice and side by side, as of x @ w."""
    rows, inner, columns = shape
    keys = jax.random.split(jax.random.key(0), 4)
    x, dx = jax.random.normal(keys[0], (2, 3, rows, inner))
    w, dw = jax.random.normal(keys[1], (2, 3, inner, columns))

    def all_of_it(multiply):
        def loss(x, w):
            return jnp.sum(jnp.sin(multiply(x, w)) ** 2)

        def one(x, w, dx, dw):
            grad = jax.grad(loss, argnums=(0, 1))
            return jax.jvp(multiply, (x, w), (dx, dw)), grad(x, w), jax.jvp(grad, (x, w), (dx, dw))

        return jax.jit(jax.vmap(one))(x, w, dx, dw)

    for got, want in zip(jax.tree.leaves(all_of_it(product)), jax.tree.leaves(all_of_it(jnp.matmul)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_only_a_cpu_turns_what_it_multiplies():
    grad = jax.jit(jax.grad(lambda params, x: jnp.sum(Perceptron(2, (4,)).apply(params, x) ** 2)))
    params = jax.eval_shape(Perceptron(2, (4,)).init, jax.random.key(0), OBS)
    turned = {
        platform: "optimization_barrier" in jax.export.export(grad, platforms=[platform])(params, OBS).mlir_module()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert turned == {"cpu": True, "cuda": False, "tpu": False}
