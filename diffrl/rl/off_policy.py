"""Keep every transition and learn from draws of them, long after: DQN, SAC.

The worlds are dealt into groups, each with a replay buffer of its own, from which an equal share of every batch is
drawn.  A device holds whole groups, and their number does not depend on the devices: the batches are the same on any
number of them, and no transition travels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.errors import UserError
from diffrl.rl import driver
from diffrl.rl.agent import Agent, Transition
from diffrl.rl.driver import Driver, PerShard, Purpose, Run, whole
from diffrl.rl.environment import Environment, State
from diffrl.rl.replay import Replay

Array = jax.Array


def off_policy(
    env: Environment,
    agent: Agent,
    replay: Replay,
    *,
    batch: int,
    unroll: int = 1,
    updates: int = 1,
    start: int = 1000,
    groups: int = 1,
    per_shard: PerShard = whole,
) -> Driver:
    """A driver whose step is `unroll` steps of every world and then `updates` updates on batches of the past.

    Args:
        env: `wrappers.vectorize(wrappers.autoreset(wrappers.monitor(...)), num)`.
        replay: the buffer of one group of num / groups worlds.
        batch: transitions of an update, a multiple of `groups`.
        start: steps of all worlds together before the first update, taken by `init`.
        groups: divides the number of worlds.

    Raises:
        UserError: an environment without these wrappers, actions that do not fit, or numbers that do not divide.
    """
    num = driver.check(env, agent)
    _check(num, groups, batch, unroll, updates, start)

    def shard(state: Any, world: State, buffer: Any, keys: Array) -> tuple[State, Any, Transition]:
        act = functools.partial(agent.act, state)
        world, rollout = driver.collect(env, act, unroll, world, keys, agent.noise)
        here = rollout.reward.shape[1] * groups // num
        dealt = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(unroll, here, -1, *x.shape[2:]), 1, 0), rollout)
        return world, jax.vmap(replay.add)(buffer, dealt), rollout

    collect = per_shard(shard, (None, 0, 0, 0), (0, 0, 1))
    sample = per_shard(jax.vmap(lambda buffer, key: replay.sample(buffer, key, batch // groups)), (0, 0), (0,))
    prioritise = per_shard(jax.vmap(replay.prioritise), (0, 0, 0), (0,))

    def init(key: Array) -> Run:
        state, world = driver.start(env, agent, key)
        noise = jax.eval_shape(agent.noise, driver.split_over(key, num))
        action, _ = jax.eval_shape(agent.act, state, world.obs, noise)
        example = jax.eval_shape(lambda world, action: _one(world, action), world, action)
        buffer = jax.vmap(lambda _: replay.init(example))(jnp.arange(groups))
        run = Run(jnp.zeros((), jnp.int32), key, state, world, driver.no_episode(), buffer)
        first = driver.key_before(key, Purpose.FILL)
        fill = -(-start // (unroll * num))
        return jax.lax.fori_loop(0, fill, lambda i, run: explore(run, jax.random.fold_in(first, i)), run)

    def explore(run: Run, key: Array) -> Run:
        world, buffer, rollout = collect(run.agent, run.world, run.buffer, driver.split_over(key, num))
        return run._replace(world=world, buffer=buffer, episode=driver.episodes(rollout, run.episode))

    def learn(run: Run, key: Array) -> tuple[Run, dict[str, Array]]:
        drawn = sample(run.buffer, driver.split_over(jax.random.fold_in(key, Purpose.SAMPLE), groups))
        flat = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), drawn)
        state, metrics = agent.update(run.agent, flat, jax.random.fold_in(key, Purpose.LEARN))
        priority = metrics.pop("priority", None)
        if priority is not None:
            new = prioritise(run.buffer, drawn.info["index"], priority.reshape(groups, -1))
            run = run._replace(buffer=new)
        return run._replace(agent=state), metrics

    def step(run: Run) -> tuple[Run, dict[str, Array]]:
        run = explore(run, driver.key_of(run, Purpose.ACT))
        keys = driver.split_over(driver.key_of(run, Purpose.LEARN), updates)
        run, metrics = jax.lax.scan(learn, run, keys)
        means = jax.tree.map(lambda x: x.mean(0), metrics)
        return run._replace(step=run.step + 1), {**means, **run.episode}

    def renew(run: Run, world: State) -> Run:
        return run._replace(world=world, buffer=jax.vmap(replay.interrupt)(run.buffer))

    before = -(-start // (unroll * num)) * unroll * num
    return Driver(init, step, unroll * num, before, Run(None, None, None, 0, None, 0), renew)


def _one(world: State, action: Array) -> Transition:
    """What a transition of one world looks like."""
    obs, final = (jax.tree.map(lambda x: x[0], tree) for tree in (world.obs, world.info["final_obs"]))
    return Transition(obs, action[0], world.reward[0], world.terminated[0], world.truncated[0], final)


def _check(num: int, groups: int, batch: int, unroll: int, updates: int, start: int) -> None:
    for name, value in {"groups": groups, "batch": batch, "unroll": unroll, "updates": updates, "start": start}.items():
        if value < 1:
            raise UserError(f"{name}={value}: choose at least 1")
    for name, value in {"worlds": num, "transitions of a batch": batch}.items():
        if value % groups:
            raise UserError(f"{value} {name} cannot be dealt into {groups} groups: choose a multiple")
