"""Gaussian latents: what an encoder's moments mean (Kingma & Welling, arXiv:1312.6114).

q(z | x) = N(mean, exp(log_var)),    KL(q | N(0, 1)) = 1/2 sum (mean² + exp(log_var) - 1 - log_var)
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# Beyond these a float32 variance is no longer told from 0 or infinity; the bounds of published autoencoders.
LOG_VAR = (-30.0, 20.0)


def split(moments: Array) -> tuple[Array, Array]:
    """[..., 2 C] -> mean and log variance, [..., C] each."""
    mean, log_var = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_var, *LOG_VAR)


def sample(moments: Array, keys: Array) -> Array:
    """A latent [B, ..., C] for each of the moments [B, ..., 2 C]; sample i depends on keys[i] alone."""
    mean, log_var = split(moments)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
    return mean + jnp.exp(0.5 * log_var) * noise


def kl(moments: Array) -> Array:
    """KL divergence of each latent from N(0, 1), in nats, [B]."""
    mean, log_var = split(moments)
    terms = 0.5 * (mean**2 + jnp.exp(log_var) - 1.0 - log_var)
    return terms.reshape(len(terms), -1).sum(-1)
