"""What a step was worth: n-step and lambda-returns, generalised advantages, V-trace.

All take time-major arrays [T, ...] of one rollout, whose row t is the transition from x_{t-1} to x_t, as in rlax:

    v_tm1        the value of the observation that was acted on
    r_t          the reward
    discount_t   gamma, and 0 where the step terminated: after that there is no future
    v_t          the value of the observation that the step led to, *before* any reset
    truncated_t  whether the episode was cut there; its future is v_t, and nothing of the next row belongs to it

Two arrays of values, and not one shifted by a row, because where an episode ended the next row belongs to another one.
The last row is treated as truncated: what comes after the rollout is v_T.  One recursion does it all,

    g_t = r_t + discount_t ((1 - lambda_t) v_t + lambda_t g_{t+1}),    lambda_t = 0 where truncated,

(Sutton, 1988); lambda = 1 is the Monte Carlo return, lambda = 0 the one-step target.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffrl.errors import UserError

Array = jax.Array


def lambda_returns(r_t: Array, discount_t: Array, v_t: Array, truncated_t: Array, lam: ArrayLike) -> Array:
    """g_t above [T, ...]; lam: a number in [0, 1] or an array like r_t."""
    lam_t = jnp.where(truncated_t, 0.0, lam)
    return _backwards(r_t + discount_t * (1 - lam_t) * v_t, discount_t * lam_t, v_t[-1])


def n_step_returns(r_t: Array, discount_t: Array, v_t: Array, truncated_t: Array, n: int) -> Array:
    """The rewards of up to `n` steps and then the value: fewer where the episode or the rollout ends.

    Raises UserError for n < 1.
    """
    if n < 1:
        raise UserError(f"{n}-step returns: choose at least 1")
    returns = v_t
    for k in range(n):
        later = jnp.concatenate([returns[1:], v_t[-1:]]) if k else v_t
        returns = r_t + discount_t * jnp.where(truncated_t, v_t, later)
    return returns


def gae(
    v_tm1: Array, r_t: Array, discount_t: Array, v_t: Array, truncated_t: Array, lam: ArrayLike
) -> tuple[Array, Array]:
    """Generalised advantages (Schulman et al., arXiv:1506.02438) and the returns behind them, both [T, ...]."""
    returns = lambda_returns(r_t, discount_t, v_t, truncated_t, lam)
    return returns - v_tm1, returns


class VTrace(NamedTuple):
    """targets: of the values, v_s.  advantages: of the policy gradient, clipped ratio included.  Both [T, ...]."""

    targets: Array
    advantages: Array


def v_trace(
    v_tm1: Array,
    r_t: Array,
    discount_t: Array,
    v_t: Array,
    truncated_t: Array,
    log_rho_t: Array,
    lam: ArrayLike = 1.0,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
) -> VTrace:
    """Off-policy corrected targets (Espeholt et al., arXiv:1802.01561).

    log_rho_t: log pi(a | x) - log mu(a | x), of the learner's policy over the one that acted.
    """
    ratio = jnp.exp(log_rho_t)
    rho, c = jnp.minimum(clip_rho, ratio), lam * jnp.minimum(clip_c, ratio)
    goes_on = jnp.where(truncated_t, 0.0, 1.0)
    errors = rho * (r_t + discount_t * v_t - v_tm1)
    targets = v_tm1 + _backwards(errors, discount_t * c * goes_on, jnp.zeros_like(v_t[-1]))
    following = jnp.where(truncated_t, v_t, jnp.concatenate([targets[1:], v_t[-1:]]))
    return VTrace(targets, rho * (r_t + discount_t * following - v_tm1))


def _backwards(add: Array, scale: Array, last: Array) -> Array:
    """g_t = add_t + scale_t g_{t+1}, from g_{T+1} = last."""

    def body(g, row):
        g = row[0] + row[1] * g
        return g, g

    return jax.lax.scan(body, last, (add, scale), reverse=True)[1]
