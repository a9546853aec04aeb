"""Guidance: wrappers that change the *estimate*, denoiser -> denoiser.

A denoiser with learned variance returns (x_0, v); guidance changes x_0 and keeps the conditional v.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.diffusion.prediction import Denoiser
from diffrl.diffusion.process import expand

Array = jax.Array


def _on_x0(change: Callable[[Array], Array], estimate: Any) -> Any:
    return (change(estimate[0]), *estimate[1:]) if isinstance(estimate, tuple) else change(estimate)


def classifier_free(denoise: Denoiser, scale: float | Array, null: Any) -> Denoiser:
    """(1 - s) u + s c, the unconditional and the conditional estimate, from one doubled batch (Ho & Salimans, 2022).

    scale: s, a number or [B]; 0 is unconditional and 1 conditional, bitwise (the paper's w is s - 1).
    null: a tree like `cond` that stands for "no condition"; its leaves broadcast against those of `cond`.
    """

    def guided(x, t, cond):
        pair = jax.tree.map(lambda n, c: jnp.stack([jnp.broadcast_to(n, c.shape).astype(c.dtype), c]), null, cond)
        both = jax.vmap(denoise, in_axes=(None, None, 0))(x, t, pair)
        conditional = jax.tree.map(lambda a: a[1], both)
        x0 = jax.tree.leaves(both)[0]
        s = expand(jnp.asarray(scale, x0.dtype), x)
        return _on_x0(lambda _: (1.0 - s) * x0[0] + s * x0[1], conditional)

    return guided


def drop_condition(keys: Array, cond: Any, null: Any, rate: float) -> Any:
    """`cond` with each sample's condition replaced by `null` with probability `rate`: classifier-free training."""
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return jax.tree.map(lambda n, c: jnp.where(expand(drop, c), n, c).astype(c.dtype), null, cond)


def clip(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Static thresholding: x_0 is kept within the data's range (DDPM's `clip_denoised`)."""
    return lambda x, t, cond: _on_x0(lambda x0: jnp.clip(x0, low, high), denoise(x, t, cond))


def dynamic_threshold(denoise: Denoiser, percentile: float = 0.995) -> Denoiser:
    """Imagen's dynamic thresholding: x_0 is clipped to [-s, s] and divided by s, for each sample's own s.

    s is the `percentile` of |x_0|, at least 1 (Saharia et al., 2022, section 2.3).
    """

    def threshold(x0):
        magnitude = jnp.abs(x0).reshape(x0.shape[0], -1)
        s = expand(jnp.maximum(jnp.quantile(magnitude, percentile, axis=1), 1.0), x0)
        return jnp.clip(x0, -s, s) / s

    return lambda x, t, cond: _on_x0(threshold, denoise(x, t, cond))
