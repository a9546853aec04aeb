"""Collect a rollout with the present policy, learn from it, forget it: REINFORCE, A2C, PPO, TRPO."""

import functools

import jax

from diffrl.errors import UserError
from diffrl.rl import driver
from diffrl.rl.agent import Agent
from diffrl.rl.driver import Driver, PerShard, Purpose, Run, whole
from diffrl.rl.environment import Environment

Array = jax.Array


def on_policy(env: Environment, agent: Agent, unroll: int, per_shard: PerShard = whole) -> Driver:
    """A driver whose step is `unroll` steps of every world and one update on them.

    Args:
        env: `wrappers.vectorize(wrappers.autoreset(wrappers.monitor(...)), num)`.
        per_shard: what `train.mesh` makes to keep each device to its own worlds.

    Raises:
        UserError: an environment without these wrappers, actions that do not fit, `unroll` below 1.
    """
    if unroll < 1:
        raise UserError(f"a rollout of {unroll} steps: choose at least 1")
    num = driver.check(env, agent)

    def shard(state, world, keys):
        act = functools.partial(agent.act, state)
        return driver.collect(env, act, unroll, world, keys, agent.noise)

    collect = per_shard(shard, (None, 0, 0), (0, 1))

    def init(key: Array) -> Run:
        state, world = driver.start(env, agent, key)
        return Run(jax.numpy.zeros((), jax.numpy.int32), key, state, world, driver.no_episode())

    def step(run: Run) -> tuple[Run, dict[str, Array]]:
        keys = driver.split_over(driver.key_of(run, Purpose.ACT), num)
        world, rollout = collect(run.agent, run.world, keys)
        state, metrics = agent.update(run.agent, rollout, driver.key_of(run, Purpose.LEARN))
        episode = driver.episodes(rollout, run.episode)
        return run._replace(step=run.step + 1, agent=state, world=world, episode=episode), {**metrics, **episode}

    return Driver(init, step, unroll * num, 0, Run(None, None, None, 0, None))
