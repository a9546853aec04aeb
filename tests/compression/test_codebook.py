"""Codebooks: k-means is the oracle of nearest codes and of their averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.vq import kmeans2, vq

from diffrl.compression import codebook


def clusters(num=400, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3.0 * rng.normal(size=(4, 3))
    return (centres[rng.integers(4, size=num)] + 0.1 * rng.normal(size=(num, 3))).astype(np.float32), centres


def test_nearest_is_scipys():
    z, _ = clusters()
    codes = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    np.testing.assert_array_equal(codebook.nearest(jnp.asarray(codes), jnp.asarray(z)), vq(z, codes)[0])


def test_straight_through_gradient():
    """The value is the code's, the gradient passes as through the identity, the codes get none."""
    codes = jnp.array([[0.0, 0.0], [1.0, 1.0]])
    z = jnp.array([[0.2, 0.1], [0.7, 0.9]])
    np.testing.assert_allclose(codebook.quantise(codes, z).z, codes, atol=1e-7)
    grad_z, grad_codes = jax.grad(lambda z, codes: (codebook.quantise(codes, z).z ** 3).sum(), (0, 1))(z, codes)
    np.testing.assert_allclose(grad_z, 3 * codes**2, atol=1e-6)
    np.testing.assert_array_equal(grad_codes, 0.0)


def test_commitment_pulls_latents_towards_their_codes():
    codes, z = jnp.array([[0.0, 0.0], [1.0, 1.0]]), jnp.array([[0.2, 0.1], [0.7, 0.9]])
    distance, grads = jax.value_and_grad(lambda z: codebook.quantise(codes, z).distance.sum())(z)
    np.testing.assert_allclose(distance, (0.05 + 0.10) / 2, rtol=1e-5)
    np.testing.assert_allclose(grads, z - codes, atol=1e-6)


def test_averages_converge_to_kmeans():
    """On one batch again and again, the moving average with restarts is k-means: its centroids are the oracle."""
    z, centres = clusters()
    book = codebook.create(4, 3)

    @jax.jit
    def step(book, key):
        return codebook.update(book, jnp.asarray(z), codebook.nearest(book.codes, jnp.asarray(z)), key, 0.8)

    for n in range(200):
        book = step(book, jax.random.key(n))
    wanted, _ = kmeans2(z, centres.astype(np.float32), minit="matrix")
    order = vq(wanted, np.asarray(book.codes))[0]
    assert sorted(order) == [0, 1, 2, 3]
    np.testing.assert_allclose(np.asarray(book.codes)[order], wanted, atol=1e-3)
    np.testing.assert_allclose(np.asarray(book.counts).sum(), len(z), rtol=1e-3)


def test_first_batch_fills_a_new_codebook():
    z, _ = clusters()
    book = codebook.update(codebook.create(8, 3), jnp.asarray(z), jnp.zeros(len(z), jnp.int32), jax.random.key(0))
    found = np.isclose(np.asarray(book.codes)[:, None], z[None], atol=1e-5).all(-1).any(1)
    assert found[1:].all()  # code 0 was assigned everything, and averages it
    np.testing.assert_allclose(book.codes[0], z.mean(0), atol=1e-4)


def test_dead_codes_start_again_and_living_ones_do_not():
    z, _ = clusters()
    far = jnp.full((1, 3), 1e3)
    codes = jnp.concatenate([jnp.asarray(z[:3]), far])
    book = codebook.Codebook(codes, jnp.full(4, 100.0), 100.0 * codes)
    for n in range(600):
        book = codebook.update(book, jnp.asarray(z), codebook.nearest(book.codes, jnp.asarray(z)), jax.random.key(n))
    assert jnp.abs(book.codes).max() < 20
    assert codebook.usage(codebook.nearest(book.codes, jnp.asarray(z)), 4)[0] == 1.0


@pytest.mark.parametrize(
    ("indices", "share", "perplexity"),
    [([0, 1, 2, 3], 1.0, 4.0), ([2, 2, 2], 0.25, 1.0), ([0, 0, 1, 1], 0.5, 2.0), ([0, 0, 0, 1], 0.5, 1.7548)],
)
def test_usage(indices, share, perplexity):
    found = codebook.usage(jnp.array(indices), 4)
    np.testing.assert_allclose(found, [share, perplexity], rtol=1e-4)
