"""Networks of pictures: convolutions against flax's, their sizes as published, the dueling head by its identity."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.nets.pixels import Conv, MinAtarCNN, NatureCNN


def normals(tree, scale=0.1):
    """Parameters of the right shapes, without the initialisers' compilation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32), tree)


@pytest.mark.parametrize(
    ("size", "stride", "side"), [(8, 4, 20), (8, 4, 23), (4, 2, 9), (3, 1, 6), (3, 2, 8), (2, 3, 9), (1, 1, 3)]
)
def test_against_flax(size, stride, side):
    """Values and gradients, on parameters that flax made, with sides that the strides divide and that they do not."""
    theirs = nn.Conv(5, (size, size), stride, "VALID")
    ours = Conv(5, size, stride, orthogonal=True)
    x = jax.random.normal(jax.random.key(0), (2, side, side + 1, 3))
    params = normals(jax.eval_shape(theirs.init, jax.random.key(0), x))
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(ours.init, jax.random.key(0), x))

    def run(net):
        def loss(params, x):
            y = net.apply(params, x)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    for got, want in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_a_cpu_takes_the_product_and_others_the_convolution():
    grad = jax.jit(jax.grad(lambda params, x: Conv(5, 3, 1, True).apply(params, x).sum()))
    x = jnp.ones((1, 5, 5, 2))
    params = jax.eval_shape(Conv(5, 3, 1, True).init, jax.random.key(0), x)
    counts = [
        jax.export.export(grad, platforms=[platform])(params, x).mlir_module().count("stablehlo.convolution")
        for platform in ("cpu", "cuda", "tpu")
    ]
    assert counts[0] == 0
    assert min(counts[1:]) > 0


@pytest.mark.parametrize(
    ("net", "shape", "count"),
    [
        # 8x8x4x32 + 32, 4x4x32x64 + 64, 3x3x64x64 + 64, 7x7x64x512 + 512, 512x6 + 6
        (NatureCNN(6), (84, 84, 4), 8224 + 32832 + 36928 + 1606144 + 3078),
        (NatureCNN(6, dueling=True), (84, 84, 4), 8224 + 32832 + 36928 + 2 * 1606144 + 3078 + 513),
        # 3x3x4x16 + 16, 8x8x16x128 + 128, 128x6 + 6
        (MinAtarCNN(6), (10, 10, 4), 592 + 131200 + 774),
    ],
    ids=["nature", "dueling", "minatar"],
)
def test_sizes(net, shape, count):
    x = jax.ShapeDtypeStruct((2, *shape), jnp.uint8)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    y = jax.eval_shape(net.apply, params, x)
    assert (y.shape, y.dtype) == ((2, 6), jnp.float32)


def test_bytes_and_truths():
    net, pictures = MinAtarCNN(3), jax.random.bernoulli(jax.random.key(0), 0.3, (4, 10, 10, 2))
    params = normals(jax.eval_shape(net.init, jax.random.key(0), pictures))
    apply = jax.jit(net.apply)
    want = apply(params, pictures.astype(jnp.float32))
    assert np.ptp(want, axis=0).min() > 1e-3
    np.testing.assert_array_equal(apply(params, pictures), want)
    np.testing.assert_allclose(apply(params, pictures.astype(jnp.uint8) * 255), want, rtol=1e-5, atol=1e-6)


def test_the_mean_over_actions_is_the_value():
    """Which the advantages' layer does not enter, while it decides what is above the mean."""
    net, x = MinAtarCNN(3, dueling=True), jax.random.normal(jax.random.key(0), (4, 10, 10, 2))
    params = normals(jax.eval_shape(net.init, jax.random.key(0), x))["params"]
    apply = jax.jit(lambda params: net.apply({"params": params}, x))
    q = apply(params)
    other = apply(params | {"out_advantage": jax.tree.map(lambda x: -2 * x, params["out_advantage"])})
    np.testing.assert_allclose(other.mean(axis=1), q.mean(axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        other - other.mean(1, keepdims=True), -2 * (q - q.mean(1, keepdims=True)), rtol=1e-4, atol=1e-6
    )
    raised = params | {"out_value": params["out_value"] | {"bias": params["out_value"]["bias"] + 7}}
    np.testing.assert_allclose(apply(raised), q + 7, rtol=1e-5)


def test_seeds_are_a_vmap():
    """A batch of kernels, too: every seed has its own."""
    x = jax.random.normal(jax.random.key(0), (3, 2, 12, 12, 2))
    params = normals(jax.eval_shape(nn.Conv(5, (4, 4), 2, "VALID").init, jax.random.key(0), x[0]))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 3 * leaf]), params)
    got = jax.jit(jax.vmap(Conv(5, 4, 2, True).apply))(many, x)
    for i in range(3):
        want = nn.Conv(5, (4, 4), 2, "VALID").apply(params, x[i])
        np.testing.assert_allclose(got[i], (i + 1) * want, rtol=1e-4, atol=1e-5)
