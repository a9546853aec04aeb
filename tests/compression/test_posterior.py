"""Gaussian latents: an integral and the moments of many samples are the oracles."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate, stats

from diffrl.compression import posterior


def test_kl_is_the_integral():
    mean, log_var = np.array([0.3, -1.2, 0.0]), np.array([-0.7, 0.4, 0.0])
    total = 0.0
    for m, v in zip(mean, log_var, strict=True):
        q = stats.norm(m, np.exp(v / 2))
        total += integrate.quad(lambda z, q=q: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), -12, 12)[0]
    moments = jnp.asarray(np.concatenate([mean, log_var]), jnp.float32)[None, None]
    np.testing.assert_allclose(posterior.kl(moments), [total], rtol=1e-5)


def test_samples_have_the_moments_and_their_own_keys():
    moments = jnp.array([0.5, -2.0, jnp.log(0.25), jnp.log(4.0)])
    keys = jax.random.split(jax.random.key(0), 20_000)
    z = posterior.sample(jnp.broadcast_to(moments, (20_000, 4)), keys)
    np.testing.assert_allclose(z.mean(0), [0.5, -2.0], atol=0.05)
    np.testing.assert_allclose(z.std(0), [0.5, 2.0], rtol=0.02)
    np.testing.assert_array_equal(z[:7], posterior.sample(jnp.broadcast_to(moments, (7, 4)), keys[:7]))


def test_extreme_variances_stay_finite():
    moments = jnp.array([[0.0, 0.0, -1e9, 1e9]])
    assert jnp.isfinite(posterior.sample(moments, jax.random.split(jax.random.key(0), 1))).all()
    assert jnp.isfinite(posterior.kl(moments)).all()
