"""What a policy is worth in worlds of its own, and what that looks like."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.rl import driver
from diffrl.rl.agent import Agent
from diffrl.rl.environment import Environment, State

Array = jax.Array


class Episodes(NamedTuple):
    """The first episode of each world, [N].

    Attributes:
        episode_return, episode_length: sums over it; the return is the monitor's where there is one, which knows
            nothing of scaled or clipped rewards.
        done: whether it ended within the limit.
    """

    episode_return: Array
    episode_length: Array
    done: Array


def evaluate(env: Environment, agent: Agent, limit: int, explore: bool = False) -> Callable[[Any, Array], Episodes]:
    """(agent's state, key) -> the first episode of each world of a vectorised environment, whether it resets or not.

    Args:
        limit: most steps of an episode; the loop ends as soon as every world's has ended.
        explore: act as while learning.
    """

    def run(state: Any, key: Array) -> Episodes:
        world = env.reset(jax.random.fold_in(key, driver.Purpose.RESET))
        keys = driver.split_over(jax.random.fold_in(key, driver.Purpose.ACT), world.reward.shape[0])
        zeros = jnp.zeros_like(world.reward)
        start = jnp.zeros((), jnp.int32), world, Episodes(zeros, zeros.astype(jnp.int32), zeros > 0)

        def going(carry: tuple[Array, State, Episodes]) -> Array:
            return (carry[0] < limit) & ~carry[2].done.all()

        def body(carry: tuple[Array, State, Episodes]) -> tuple[Array, State, Episodes]:
            t, world, seen = carry
            now = driver.fold_in(keys, t)
            action = agent.act(state, world.obs, agent.noise(now))[0] if explore else agent.greedy(state, world.obs)
            new = env.step(world, action)
            counts = ~seen.done
            summed = new.info.get("episode_return", seen.episode_return + new.reward)
            total = jnp.where(counts, summed, seen.episode_return)
            return t + 1, new, Episodes(total, seen.episode_length + counts, seen.done | new.done)

        return jax.lax.while_loop(going, body, start)[2]

    return run


def record(env: Environment, agent: Agent, limit: int) -> Callable[[Any, Array], State]:
    """(agent's state, key) -> the States [limit + 1] of one world, from its reset on, acting greedily.

    After its end the world stands still: draw up to the first that is done.
    """

    def run(state: Any, key: Array) -> State:
        first = env.reset(key)

        def body(world: State, _: None) -> tuple[State, State]:
            obs = jax.tree.map(lambda x: x[None], world.obs)
            new = env.step(world, agent.greedy(state, obs)[0])
            new = jax.tree.map(lambda old, new: jnp.where(world.done, old, new), world, new)
            return new, new

        states = jax.lax.scan(body, first, None, limit)[1]
        return jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest]), first, states)

    return run
