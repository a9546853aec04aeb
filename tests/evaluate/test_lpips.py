"""The perceptual distance: hand numbers, and what a distance must be."""

import jax.numpy as jnp
import numpy as np

from diffrl.evaluate import lpips


def test_by_hand():
    """Two layers: unit vectors at right angles in every pixel, then in half of them; the lengths do not matter."""
    east, north = np.array([2.0, 0.0]), np.array([0.0, 5.0])
    first = np.tile(east, (1, 3, 3, 1)), np.tile(north, (1, 3, 3, 1))
    second = np.stack([east, east])[None, None], np.stack([3 * east, north])[None, None]
    weights = np.array([0.25, 0.5]), np.array([1.0, 3.0])
    a, b = zip(first, second, strict=True)
    assert lpips.distance(a, b, weights) == (0.25 + 0.5) + (1.0 + 3.0) / 2


def test_dead_pixels_are_no_nan():
    a, b = [jnp.zeros((2, 4, 4, 3))], [jnp.ones((2, 4, 4, 3))]
    np.testing.assert_array_equal(lpips.distance(a, a, [np.ones(3)]), 0.0)
    np.testing.assert_allclose(lpips.distance(a, b, [np.ones(3)]), 1.0, rtol=1e-6)


def test_batches_are_padded_and_cut():
    """Seven pairs in batches of three, each as it is alone."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 5, 5, 3)).astype(np.float32)
    params = {"lin": [np.array([0.5, 1.0, 2.0], np.float32)]}

    def apply(params, x):
        return (x**2,)

    together = lpips.measure(apply, params, a, b, batch=3)
    assert together.shape == (7,)
    alone = [lpips.distance([a[i : i + 1] ** 2], [b[i : i + 1] ** 2], params["lin"])[0] for i in range(7)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(lpips.measure(apply, params, b, a, batch=7), together, rtol=1e-5)
