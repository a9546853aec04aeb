"""What agents with a stochastic policy share: how they act, and their networks over whole rollouts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.rl.agent import ActorCritic
from diffrl.rl.distributions import Distribution

Array = jax.Array


def acting(
    network: ActorCritic, distribution: Distribution
) -> tuple[Callable[..., tuple[Array, dict[str, Any]]], Callable[[Any, Any], Array], Callable[[Array], Any]]:
    """`act`, `greedy`, `noise` of an `Agent` whose state has the network's `params`; info["raw"] is the raw action."""

    def act(state: Any, obs: Any, noise: Array) -> tuple[Array, dict[str, Any]]:
        raw = distribution.sample(network.policy(state.params, obs), noise)
        return distribution.action(raw), {"raw": raw}

    def greedy(state: Any, obs: Any) -> Array:
        return distribution.action(distribution.mode(network.policy(state.params, obs)))

    return act, greedy, jax.vmap(distribution.noise)


def over_time(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """(params, obs [N, ...]) -> [N, ...], made to take and give a rollout [T, N, ...].

    By vmap and not by a reshape: worlds that lie on several devices stay there.
    """
    return jax.vmap(f, in_axes=(None, 0))


def explained_variance(target: Array, value: Array) -> Array:
    """1 - Var[target - value] / Var[target]: 1 for a perfect critic, 0 for a constant one."""
    return 1 - jnp.var(target - value) / (jnp.var(target) + 1e-8)
