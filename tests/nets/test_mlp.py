"""The perceptron for the plane: what it listens to, and how smooth it is in time."""

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.nets.mlp import MLP

X = jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)
T = jnp.linspace(0.1, 0.9, 5)


def fresh(net, *inputs):
    """Parameters of the right shapes, filled without the initialisers' compilation."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype) + 1.0).reshape(leaf.shape), shapes)


def test_points_in_vectors_out_each_by_itself():
    net = MLP(3, width=16)
    params = fresh(net, X, T)
    apply = jax.jit(net.apply)
    y = apply(params, X, T)
    assert y.shape == (5, 3)
    np.testing.assert_allclose(apply(params, X[1:3], T[1:3]), y[1:3], rtol=1e-5, atol=1e-6)


def test_it_listens_to_place_time_and_label():
    net = MLP(2, width=16, num_classes=3)
    label = jnp.array([0, 1, 2, 3, 0])
    params = fresh(net, X, T, label)
    apply = jax.jit(net.apply)
    y = apply(params, X, T, label)
    for others in ((X + 0.1, T, label), (X, T + 0.1, label), (X, T, (label + 1) % 4)):
        assert np.abs(apply(params, *others) - y).max(axis=1).min() > 1e-4


def test_size():
    """(D + D waves + 1) w + (waves + 1) w into the first layer, (depth - 1) of w (w + 1), w + 1 for each output."""
    shapes = jax.eval_shape(lambda: fresh(MLP(2, width=32, depth=4, waves=8), X, T))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == (2 + 16 + 1) * 32 + (8 + 1) * 32 + 3 * 32 * 33 + 2 * 33
