"""Small worlds and networks that the tests of agents and drivers share."""

import jax
import jax.numpy as jnp

from diffrl.rl import wrappers
from diffrl.rl.agent import ActorCritic, Network, separate
from diffrl.rl.environment import Actions, Environment, State


def counting(limit: int | None = None, end: int | None = None, start: int = 0) -> Environment:
    """Reward 1 a step, obs = [steps so far]; truncated after `limit` steps, or terminated after `end`."""

    def state(count, reward):
        done = jnp.zeros((), bool) if end is None else count - start >= end
        return State(count, jnp.atleast_1d(count).astype(jnp.float32), reward, done, jnp.zeros((), bool))

    env = Environment(
        "counting",
        lambda key: state(jnp.asarray(start), jnp.zeros(())),
        lambda old, action: state(old.inner + 1, jnp.ones(())),
        Actions(num=2),
        jax.ShapeDtypeStruct((1,), jnp.float32),
    )
    return env if limit is None else wrappers.time_limit(env, limit)


def noisy(actions: Actions | None = None) -> Environment:
    """A random walk that the action pushes; ends beyond 2 and pays for being near 1."""
    actions = Actions(num=3) if actions is None else actions

    def state(key, x, reward):
        return State((key, x), jnp.stack([x, x**2]), reward, jnp.abs(x) > 2, jnp.zeros((), bool))

    def step(old, action):
        key, x = old.inner
        key, now = jax.random.split(key)
        push = action.sum() if actions.num is None else action - 1.0
        x = x + 0.3 * push + 0.2 * jax.random.normal(now)
        return state(key, x, -jnp.square(x - 1))

    return Environment(
        "noisy",
        lambda key: state(key, jax.random.uniform(key, ()), jnp.zeros(())),
        step,
        actions,
        jax.ShapeDtypeStruct((2,), jnp.float32),
    )


def many(env: Environment, num: int) -> Environment:
    return wrappers.vectorize(wrappers.autoreset(wrappers.monitor(env)), num)


def linear(outputs: int, inputs: int, scale: float = 0.1) -> Network:
    """W x + b."""

    def init(key):
        return {"w": scale * jax.random.normal(key, (inputs, outputs)), "b": jnp.zeros(outputs)}

    return Network(init, lambda params, obs: obs @ params["w"] + params["b"])


def bias(outputs: int) -> Network:
    """The same outputs for every observation, 0 at first."""
    return Network(
        lambda key: jnp.zeros(outputs), lambda params, obs: jnp.broadcast_to(params, (obs.shape[0], outputs))
    )


def linear_critic(outputs: int, inputs: int) -> ActorCritic:
    return separate(linear(outputs, inputs), linear(1, inputs))
