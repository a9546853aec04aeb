"""What agents with a stochastic policy share: how they act, and their networks over whole rollouts."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.rl import minibatches as mb
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
    """(params, obs [B, ...]) -> [B, ...], made to take and give a rollout [T, N, ...].

    All rows become one batch, whose products a CPU multiplies faster than T small ones; by groups of worlds, so that
    worlds that lie on several devices stay there.
    """

    def over(params: Any, obs: Any) -> Any:
        steps, worlds = jax.tree.leaves(obs)[0].shape[:2]
        groups = math.gcd(worlds, mb.GROUPS)
        given = f(params, mb.flat(mb.grouped(obs, groups)))
        return jax.tree.map(lambda x: mb.ungrouped(x.reshape(groups, -1, *x.shape[1:]), steps), given)

    return over


def explained_variance(target: Array, value: Array) -> Array:
    """1 - Var[target - value] / Var[target]: 1 for a perfect critic, 0 for a constant one."""
    return 1 - jnp.var(target - value) / (jnp.var(target) + 1e-8)
