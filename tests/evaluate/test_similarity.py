"""PSNR and SSIM against scikit-image, which takes the same window."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.evaluate import similarity


def pair(shape=(3, 24, 32, 3)):
    rng = np.random.default_rng(0)
    a = np.clip(rng.normal(size=shape).cumsum(1).cumsum(2) / 8, -1, 1).astype(np.float32)
    return a, np.clip(a + 0.2 * rng.normal(size=shape), -1, 1).astype(np.float32)


def test_against_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pair()
    options = {"data_range": 2.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    # It averages inside a margin of the window's half width, as we do.
    wanted = [metrics.structural_similarity(x, y, channel_axis=-1, **options) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(similarity.ssim(jnp.asarray(a), jnp.asarray(b)), wanted, atol=1e-4)
    wanted = [metrics.peak_signal_noise_ratio(x, y, data_range=2.0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(similarity.psnr(jnp.asarray(a), jnp.asarray(b)), wanted, rtol=1e-4)


def test_hand_computed():
    """A tenth of the range off everywhere is 20 dB; an image is perfectly similar to itself."""
    a = jnp.full((2, 16, 16, 1), -0.5)
    np.testing.assert_allclose(similarity.psnr(a, a + 0.2), 20.0, rtol=1e-5)
    x = jnp.asarray(pair()[0])
    np.testing.assert_allclose(similarity.ssim(x, x), 1.0, rtol=1e-5)


def test_small_images_are_named():
    with pytest.raises(UserError, match="at least 11 pixels, not 8"):
        similarity.ssim(jnp.zeros((1, 8, 8, 1)), jnp.zeros((1, 8, 8, 1)))
