"""Policies as distributions of actions, given by a network's outputs [..., P].

Each is some functions of the outputs in a `Distribution`.  What they speak of is the *raw* action, which is what a
rollout keeps for the update; `action` makes of it what the environment takes.  A squashed normal's density of the
squashed action differs from its raw one by a factor that the outputs do not enter: ratios and Kullback-Leibler
divergences are the same, and no inverse of tanh is ever needed.  Its entropy is the squashed action's: the raw one's
grows for ever with the deviation, and a bonus for it would drive the actions to their bounds.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.rl.environment import Actions

Array = jax.Array
HALF_LOG_TAU = 0.9189385332046727  # log(2 pi) / 2
NODES = 8  # of the quadrature in `squashed`'s entropy


class Distribution(NamedTuple):
    """A family of distributions of raw actions.

    Attributes:
        size: P, how many outputs of a network it takes.
        noise: key -> all that chance has in a raw action; for one world.
        sample: (outputs [..., P], noise) -> raw action [...].
        mode: outputs [..., P] -> the raw action of the highest density.
        log_prob: (outputs [..., P], raw [...]) -> [...], in nats.
        entropy: outputs [..., P] -> [...], in nats, of the raw action; where it is squashed, of what becomes of it, per
            unit of half the actions' range.
        kl: (outputs p, outputs q) -> KL(p || q) [...], in nats.
        action: raw -> what the environment takes.
    """

    size: int
    noise: Callable[[Array], Array]
    sample: Callable[[Array, Array], Array]
    mode: Callable[[Array], Array]
    log_prob: Callable[[Array, Array], Array]
    entropy: Callable[[Array], Array]
    kl: Callable[[Array, Array], Array]
    action: Callable[[Array], Array]


def categorical(num: int) -> Distribution:
    """The actions 0 ... num - 1; outputs are logits."""

    def log_prob(outputs: Array, raw: Array) -> Array:
        # A sum and no index, whose gradient would be a scatter.
        return jnp.sum(jnp.where(raw[..., None] == jnp.arange(num), jax.nn.log_softmax(outputs), 0.0), -1)

    def kl(p: Array, q: Array) -> Array:
        log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)

    def entropy(outputs: Array) -> Array:
        logs = jax.nn.log_softmax(outputs)
        return -jnp.sum(jnp.exp(logs) * logs, -1)

    return Distribution(
        num,
        lambda key: jax.random.gumbel(key, (num,)),
        lambda outputs, noise: jnp.argmax(outputs + noise, -1),
        lambda outputs: jnp.argmax(outputs, -1),
        log_prob,
        entropy,
        kl,
        lambda raw: raw,
    )


def normal(actions: Actions, least_std: float = 1e-3) -> Distribution:
    """Independent normals, clipped to the actions' bounds; outputs are means and what softplus makes deviations of.

    One unit is half the range of the actions, so that outputs of order 1 explore all of it.
    """
    return _normal(actions, least_std, lambda raw: jnp.clip(raw, -1.0, 1.0))


def squashed(actions: Actions, least_std: float = 1e-3) -> Distribution:
    """tanh of independent normals (Haarnoja et al., arXiv:1801.01290), scaled to the actions' bounds.

    `squashed_log_prob` gives the density that SAC needs, and `entropy` is its negative mean, by Gauss and Hermite's
    quadrature: within 0.001 nats for raw deviations up to 1, 0.03 up to 2; at 4, where a bonus no longer leads, 0.2.
    """
    family = _normal(actions, least_std, jnp.tanh)
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)

    def entropy(outputs: Array) -> Array:
        # The axis of nodes comes first, so that the sum over it is one of whole arrays.
        at = jnp.asarray(nodes, outputs.dtype).reshape(NODES, *(1,) * outputs.ndim)
        raw = family.sample(outputs, at)
        return family.entropy(outputs) + jnp.tensordot(weights / weights.sum(), _log_slope(raw).sum(-1), 1)

    return family._replace(entropy=entropy)


def of(actions: Actions, squash: bool = False) -> Distribution:
    """The usual family for what an environment takes."""
    if actions.num is not None:
        return categorical(actions.num)
    return squashed(actions) if squash else normal(actions)


def squashed_log_prob(actions: Actions, outputs: Array, raw: Array, least_std: float = 1e-3) -> Array:
    """log density [...] of tanh(raw), per unit of half the actions' range."""
    return squashed(actions, least_std).log_prob(outputs, raw) - _log_slope(raw).sum(-1)


def _log_slope(x: Array) -> Array:
    """log(1 - tanh(x)^2), stable for large x."""
    return 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))


def _normal(actions: Actions, least_std: float, bound: Callable[[Array], Array]) -> Distribution:
    (size,) = actions.shape
    middle, half = (actions.high + actions.low) / 2, (actions.high - actions.low) / 2

    def split(outputs: Array) -> tuple[Array, Array]:
        mean, width = jnp.split(outputs, 2, -1)
        return mean, jax.nn.softplus(width) + least_std

    def sample(outputs: Array, noise: Array) -> Array:
        mean, std = split(outputs)
        return mean + std * noise

    def log_prob(outputs: Array, raw: Array) -> Array:
        mean, std = split(outputs)
        return jnp.sum(-0.5 * jnp.square((raw - mean) / std) - jnp.log(std) - HALF_LOG_TAU, -1)

    def entropy(outputs: Array) -> Array:
        return jnp.sum(0.5 + HALF_LOG_TAU + jnp.log(split(outputs)[1]), -1)

    def kl(p: Array, q: Array) -> Array:
        (mean_p, std_p), (mean_q, std_q) = split(p), split(q)
        ratio = jnp.square(std_p / std_q)
        return 0.5 * jnp.sum(ratio - 1 - jnp.log(ratio) + jnp.square((mean_p - mean_q) / std_q), -1)

    return Distribution(
        2 * size,
        lambda key: jax.random.normal(key, (size,)),
        sample,
        lambda outputs: split(outputs)[0],
        log_prob,
        entropy,
        kl,
        lambda raw: middle + half * bound(raw),
    )
