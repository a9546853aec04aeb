r"""Guidance by extrapolation: wrappers that change the *estimate*, denoiser -> denoiser.

A strong and a weak estimate of x_0, c and u, differ in the direction in which samples become more typical of the
condition.  Whatever the pair, the way they are combined and the scale s are chosen apart:

    pair      classifier-free: with the condition and without it        (Ho & Salimans, 2022)
              autoguidance: a good model and a worse one                (Karras et al., 2024)
    combine   linear    x = (1 - s) u + s c
              rescale   phi x std(c) / std(x) + (1 - phi) x             (Lin et al., 2024, eqs. 15 and 16)
              project   c + (s - 1) (d_orthogonal + eta d_parallel),    d = (c - u) min(1, r / |c - u|),
                        parallel and orthogonal to c                    (APG; Sadat et al., 2025)
    scale     a number, [B], or a function of t; `interval` guides at medium noise only (Kynkaanniemi et al., 2024)

s = 0 is the weak estimate and s = 1 the strong one.  APG's momentum adds up d over the steps, d_t + beta d_{t+1} +
beta^2 d_{t+2} + ...; a denoiser has no memory, so `momentum` makes a sampler.

A denoiser with learned variance returns (x_0, v); guidance changes x_0 and keeps the strong estimate's v.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.diffusion.checks import concrete
from diffrl.diffusion.prediction import Denoiser
from diffrl.diffusion.process import Process, expand, log_snr
from diffrl.diffusion.sampling import Sampler, State, per_sample
from diffrl.errors import UserError

Array = jax.Array
Scale = float | Array | Callable[[Array], Array]
Combine = Callable[[Array, Array, Array], Array]  # (u, c, s) -> x_0, all [B, ...] or broadcasting
Pair = Callable[[Array, Array, Any], tuple[Any, Any]]  # (x_t, t, cond) -> the weak and the strong estimate


def on_x0(change: Callable[[Array], Array], estimate: Any) -> Any:
    """`change` applied to x_0, where the estimate may be (x_0, v)."""
    return (change(estimate[0]), *estimate[1:]) if isinstance(estimate, tuple) else change(estimate)


def scale_at(scale: Scale, t: Array, x: Array) -> Array:
    """The scale at times `t`, shaped to broadcast against `x`."""
    return expand(jnp.asarray(scale(t) if callable(scale) else scale, x.dtype), x)


# --- How two estimates are combined ----------------------------------------------------------------------------------


def linear(u: Array, c: Array, s: Array) -> Array:
    """(1 - s) u + s c: u at s = 0 and c at s = 1, bitwise."""
    return (1.0 - s) * u + s * c


def rescale(phi: float | Array = 0.7) -> Combine:
    """The linear estimate with the share `phi` of it brought to each sample's std of c, against over-exposure.

    phi: in [0, 1]; 0 is `linear`.  The std runs over all axes of a sample.  Lin et al. do this to the network's output,
    which for v-prediction at the noisy end is -x_0.
    """

    def combine(u, c, s):
        x, axes = linear(u, c, s), tuple(range(1, c.ndim))
        std = x.std(axes, keepdims=True)
        ratio = jnp.where(std > 0, c.std(axes, keepdims=True) / std, 1.0)  # a constant has no contrast to bring back
        return (phi * ratio + 1.0 - phi) * x

    return combine


def project(eta: float | Array = 0.0, radius: float | Array = jnp.inf) -> Combine:
    """Adaptive projected guidance: the part of c - u along c, which saturates colours, is damped.

    eta: in [0, 1], what is kept of that part; radius: the longest |c - u| of a sample.  (1, inf) is `linear`.
    """

    def combine(u, c, s):
        axes, tiny = tuple(range(1, c.ndim)), jnp.finfo(c.dtype).tiny
        difference = c - u
        norm = jnp.sqrt((difference**2).sum(axes, keepdims=True))
        difference = difference * jnp.minimum(1.0, radius / norm)
        parallel = (difference * c).sum(axes, keepdims=True) / jnp.maximum((c**2).sum(axes, keepdims=True), tiny) * c
        return c + (s - 1.0) * (difference - (1.0 - eta) * parallel)

    return combine


# --- Which two estimates ---------------------------------------------------------------------------------------------


def against_null(denoise: Denoiser, null: Any) -> Pair:
    """Without and with the condition, from one doubled batch: one call of the network.

    null: a tree like `cond` that stands for "no condition"; its leaves broadcast against those of `cond`.
    """

    def pair(x, t, cond):
        conds = jax.tree.map(lambda n, c: jnp.stack([jnp.broadcast_to(n, c.shape).astype(c.dtype), c]), null, cond)
        both = jax.vmap(denoise, in_axes=(None, None, 0))(x, t, conds)
        return jax.tree.map(lambda a: a[0], both), jax.tree.map(lambda a: a[1], both)

    return pair


def against_model(denoise: Denoiser, weak: Denoiser) -> Pair:
    """A worse model's estimate and a good one's, under the same condition: two networks, a call of each."""
    return lambda x, t, cond: (weak(x, t, cond), denoise(x, t, cond))


def guide(strong: Denoiser, pair: Pair, scale: Scale, combine: Combine = linear) -> Denoiser:
    """Any pair, combined in any way.  strong: what `pair` returns second, alone.

    A step at which a scale that is a function of t is 1 for the whole batch calls `strong` only.
    """

    def guided(x, t, cond):
        u, c = pair(x, t, cond)
        s = scale_at(scale, t, x)
        return on_x0(lambda x0: combine(jax.tree.leaves(u)[0], x0, s), c)

    if not callable(scale):
        return guided
    return lambda x, t, cond: jax.lax.cond(jnp.all(scale(t) == 1.0), strong, guided, x, t, cond)


def classifier_free(denoise: Denoiser, scale: Scale, null: Any, combine: Combine = linear) -> Denoiser:
    """Classifier-free guidance: the unconditional and the conditional estimate, from one doubled batch.

    scale: s; with `linear`, 0 is unconditional and 1 conditional, bitwise (the paper's w is s - 1).
    null: see `against_null`.
    """
    return guide(denoise, against_null(denoise, null), scale, combine)


def autoguidance(denoise: Denoiser, weak: Denoiser, scale: Scale, combine: Combine = linear) -> Denoiser:
    """Guidance away from a smaller or shorter-trained model that makes the same errors, only larger.

    scale: s, the paper's w; 0 is `weak` and 1 `denoise`.
    """
    return guide(denoise, against_model(denoise, weak), scale, combine)


def interval(process: Process, scale: float | Array, low: float, high: float, outside: float = 1.0) -> Scale:
    """The scale where low <= log SNR < high and `outside` elsewhere, as a function of t.

    log SNR is -2 log(sigma / alpha): the paper's (0.28, 2.9] for ImageNet is low = -2.1, high = 2.5.
    outside: what guides not at all, which is 1 for a pair and 0 in `classifier_guidance`.
    """

    def at(t):
        level = log_snr(process, t)
        return jnp.where((low <= level) & (level < high), scale, outside)

    return at


def momentum(
    make: Callable[[Denoiser], Sampler], pair: Pair, scale: Scale, combine: Combine = linear, beta: float = -0.5
) -> Sampler:
    """The sampler `make(denoiser)` under guidance whose direction c - u is a running sum, decaying by `beta`.

    APG's beta is negative: each step then pushes where the steps before it did not.  The pair is evaluated once a step,
    at (x_t, t), and its estimates must be x_0 alone.  Multistep samplers keep their memory.

    Raises:
      UserError: from the step, where the sampler asks for another estimate, as `heun` and `churn` do.
    """

    def init(x):
        return State(x, (make(lambda x, t, cond: x).init(x).memory, jnp.zeros_like(x)))

    def step(keys, state, t, s, cond):
        memory, direction = state.memory
        times = per_sample(t, state.x)
        u, c = pair(state.x, times, cond)
        direction = (c - u) + beta * direction
        x0 = combine(c - direction, c, scale_at(scale, times, state.x))
        asked = []

        def estimate(x, t, cond):
            asked.append(x)
            return x0

        new, info = make(estimate).step(keys, State(state.x, memory), t, s, cond)
        if len(asked) != 1 or asked[0] is not state.x:
            raise UserError("momentum needs a sampler with one estimate a step, at its start: take ddim, not heun")
        return State(new.x, (new.memory, direction)), info

    return Sampler(init, step)


# --- Training without a condition, and thresholding ------------------------------------------------------------------


def drop_condition(keys: Array, cond: Any, null: Any, rate: float) -> Any:
    """`cond` with each sample's condition replaced by `null` with probability `rate`: classifier-free training."""
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return jax.tree.map(lambda n, c: jnp.where(expand(drop, c), n, c).astype(c.dtype), null, cond)


def clip(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Static thresholding: x_0 is kept within the data's range (DDPM's `clip_denoised`)."""
    return lambda x, t, cond: on_x0(lambda x0: jnp.clip(x0, low, high), denoise(x, t, cond))


def dynamic_threshold(denoise: Denoiser, percentile: float = 0.995) -> Denoiser:
    """Imagen's dynamic thresholding: x_0 is clipped to [-s, s] and divided by s, for each sample's own s.

    s is the `percentile`, a share in (0, 1], of |x_0|, at least 1 (Saharia et al., 2022, section 2.3).

    Raises:
      UserError: a percentile outside (0, 1].
    """
    if concrete(percentile) and not 0.0 < percentile <= 1.0:
        raise UserError(f"percentile={percentile}: choose a share in (0, 1], such as 0.995")

    def threshold(x0):
        magnitude = jnp.abs(x0).reshape(x0.shape[0], -1)
        s = expand(jnp.maximum(jnp.quantile(magnitude, percentile, axis=1), 1.0), x0)
        return jnp.clip(x0, -s, s) / s

    return lambda x, t, cond: on_x0(threshold, denoise(x, t, cond))
