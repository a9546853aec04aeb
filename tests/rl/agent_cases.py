"""Networks that are tables, rollouts that are written down, and a world in which every policy's value is known."""

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.rl import driver, wrappers
from diffrl.rl.agent import Network, Transition
from diffrl.rl.mdp import environment, from_outcomes
from diffrl.rl.on_policy import on_policy


def table(states, outputs, start=0.0):
    """Integer observations [B] -> rows of a table: what one-hot observations and a linear layer are."""
    return Network(lambda key: jnp.full((states, outputs), start), lambda params, obs: params[obs])


def rollout(obs, raw, reward, terminated=False, truncated=False, next_obs=None):
    """A Transition of arrays [T, N] from nested lists; the ends are broadcast."""
    obs, raw, reward = np.asarray(obs, np.int32), np.asarray(raw), np.asarray(reward, np.float32)
    ends = (np.broadcast_to(np.asarray(end, bool), reward.shape) for end in (terminated, truncated))
    later = obs if next_obs is None else np.asarray(next_obs, np.int32)
    return jax.tree.map(jnp.asarray, Transition(obs, raw, reward, *ends, later, {"raw": raw}))


def corridor(length=6):
    """Action 1 goes right and 0 left, each step costs 1, and the right end terminates."""
    rows = [
        [[(1.0, max(s - 1, 0), -1.0, False)], [(1.0, min(s + 1, length - 1), -1.0, s + 1 >= length - 1)]]
        for s in range(length)
    ]
    return from_outcomes(rows, np.eye(length)[0])


def learn(agent, process, steps, unroll=16, worlds=8, limit=50, seed=0):
    """The state of an agent after `steps` updates in a finite process, and the metrics [steps]."""
    env = wrappers.monitor(wrappers.time_limit(environment(process, "finite"), limit))
    made = on_policy(wrappers.vectorize(wrappers.autoreset(env), worlds), agent, unroll)
    run = jax.jit(made.init)(jax.random.key(seed))
    run, metrics = jax.jit(driver.repeat(made.step, steps))(run, None)
    return run.agent, metrics
