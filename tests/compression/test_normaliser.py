"""Latents to unit variance: the moments of drawn latents are the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.compression import normaliser, posterior
from diffrl.errors import UserError


def moments(num=4000):
    rng = np.random.default_rng(0)
    mean = rng.normal([3.0, -1.0], [2.0, 0.1], size=(num, 2, 2, 2))
    return np.concatenate([mean, np.full_like(mean, np.log(0.25))], axis=-1).astype(np.float32)


def test_drawn_latents_become_standard():
    m = moments()
    parts = (m[:1000], m[1000:])
    found = normaliser.measure((part[..., :2], np.exp(part[..., 2:])) for part in parts)
    z = posterior.sample(jnp.asarray(m), jax.random.split(jax.random.key(0), len(m)))
    np.testing.assert_allclose(found.shift, [3.0, -1.0], atol=0.05)
    normal = normaliser.normalise(found, z).reshape(-1, 2)
    np.testing.assert_allclose(normal.mean(0), 0.0, atol=0.02)
    np.testing.assert_allclose(normal.std(0), 1.0, atol=0.02)
    np.testing.assert_allclose(normaliser.restore(found, normaliser.normalise(found, z)), z, atol=1e-5)


def test_a_dead_channel_is_named():
    m = np.ones((4, 2, 2, 2), np.float32)
    m[..., 0] = np.random.default_rng(0).normal(size=(4, 2, 2))
    with pytest.raises(UserError, match="channel 1 of the latents never changes"):
        normaliser.measure([(m, np.zeros_like(m))])
    with pytest.raises(UserError, match="no latents"):
        normaliser.measure([])
