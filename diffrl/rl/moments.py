"""Running means and deviations, and an agent that sees the world through them.

Moments of batches are merged as in Chan, Golub & LeVeque (1979).  `normalised` is agent -> agent: the statistics are
part of what is learned, so they lie in the agent's state, act on whatever it sees, and are saved with it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.errors import UserError
from diffrl.rl.agent import Agent, Transition

Array = jax.Array


class Moments(NamedTuple):
    """Of `size` samples: mean and variance (of the population), trees of float32 like one sample."""

    size: Array
    mean: Any
    var: Any


def init(like: Any) -> Moments:
    """Of no samples: mean 0, variance 1.  like: a tree of arrays or jax.ShapeDtypeStruct."""
    return Moments(
        jnp.zeros(()),
        jax.tree.map(lambda x: jnp.zeros(x.shape), like),
        jax.tree.map(lambda x: jnp.ones(x.shape), like),
    )


def merge(moments: Moments, samples: Any, axes: tuple[int, ...] = (0,)) -> Moments:
    """Moments with more samples, which lie along `axes` of the arrays."""
    shape = jax.tree.leaves(samples)[0].shape
    count = math.prod(shape[axis] for axis in axes)
    total = moments.size + count
    share = count / total

    def mean(old: Array, x: Array) -> Array:
        return old + (x.mean(axes) - old) * share

    def var(old: Array, old_mean: Array, x: Array) -> Array:
        between = jnp.square(x.mean(axes) - old_mean) * share * (1 - share)
        return old * (1 - share) + x.var(axes) * share + between

    return Moments(
        total, jax.tree.map(mean, moments.mean, samples), jax.tree.map(var, moments.var, moments.mean, samples)
    )


def normalise(moments: Moments, x: Any, clip: float = 10.0, eps: float = 1e-8) -> Any:
    """(x - mean) / deviation, within +-clip."""

    def one(x: Array, mean: Array, var: Array) -> Array:
        return jnp.clip((x - mean) / jnp.sqrt(var + eps), -clip, clip)

    return jax.tree.map(one, x, moments.mean, moments.var)


class Normalised(NamedTuple):
    """The state of a `normalised` agent."""

    agent: Any
    obs: Moments
    returns: Moments


def normalised(agent: Agent, obs: Any, *, observations: bool = True, rewards: bool = False) -> Agent:
    """An on-policy agent that sees observations of mean 0 and deviation 1, and rewards in units of the return's.

    What it acted on and what it learns from are normalised by the same moments; a rollout's observations are merged
    after the update, its returns before.  The policy that acts next is therefore not quite the one that was learned, in
    the first few updates above all, and a bound of the divergence is one of the update alone.  (brax merges before it
    learns, and then learns from a policy that is not the one that acted.)  Rewards are divided by the deviation of the
    discounted return so far (`wrappers.discounted_return`), as in the VecNormalize of OpenAI's baselines; they keep
    their mean.

    Args:
        obs: of the environment, without the axis of worlds: a tree of floating-point jax.ShapeDtypeStruct.

    Raises:
        UserError: `rewards` of an environment without that wrapper.
    """

    def init_all(key: Array) -> Normalised:
        return Normalised(agent.init(key), init(obs), init(jnp.zeros(())))

    def see(state: Normalised, x: Any) -> Any:
        return normalise(state.obs, x) if observations else x

    def update(state: Normalised, rollout: Transition, key: Array) -> tuple[Normalised, dict[str, Array]]:
        returns, reward = state.returns, rollout.reward
        if rewards:
            if "discounted_return" not in rollout.world:
                raise UserError("rewards cannot be normalised: wrap the environment with wrappers.discounted_return")
            returns = merge(returns, rollout.world["discounted_return"], (0, 1))
            reward = reward / jnp.sqrt(returns.var + 1e-8)
        seen = rollout._replace(obs=see(state, rollout.obs), next_obs=see(state, rollout.next_obs), reward=reward)
        inner, metrics = agent.update(state.agent, seen, key)
        merged = merge(state.obs, rollout.obs, (0, 1)) if observations else state.obs
        return Normalised(inner, merged, returns), metrics

    return Agent(
        init_all,
        lambda state, x, noise: agent.act(state.agent, see(state, x), noise),
        update,
        lambda state, x: agent.greedy(state.agent, see(state, x)),
        agent.noise,
    )
