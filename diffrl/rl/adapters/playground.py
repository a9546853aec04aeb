"""MuJoCo Playground (Zakka et al., 2025): the control suite of Tassa et al. (2018) in MJX, MuJoCo's physics in jax.

A reset costs as much as many steps, so wrap these worlds with `wrappers.autoreset(env, keep_first=True)`.  The physics
takes tens of seconds to compile, and is made for accelerators: a CPU does one or two thousand steps a second.
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffrl.rl.adapters import box, not_installed, unknown
from diffrl.rl.environment import Environment, State
from diffrl.rl.wrappers import time_limit

Array = jax.Array


def make(name: str, episode_length: int = 1000) -> Environment:
    """A task of the control suite: obs float32 [n], rewards within [0, 1], no end but the limit.

    Where a simulation breaks (a number that is none), the step is a termination with the observation before and no
    reward.

    Args:
        name: CartpoleBalance, CheetahRun, WalkerWalk, ...
        episode_length: steps after which an episode is truncated.

    Raises UserError where playground is not installed or does not know the name.
    """
    try:
        from mujoco_playground import dm_control_suite
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    if name not in dm_control_suite.ALL_ENVS:
        raise unknown("playground", name, dm_control_suite.ALL_ENVS)
    # The default would be warp, which runs on NVIDIA's GPUs alone.
    task = dm_control_suite.load(name, config_overrides={"impl": "jax"})

    def state(new: Any, before: Any) -> State:
        new = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), new)  # no weak types in a loop's carry
        broken = new.done > 0.5
        obs = jnp.where(broken, before, new.obs).astype(jnp.float32)
        reward = jnp.where(broken, 0.0, new.reward).astype(jnp.float32)
        return State(new, obs, reward, broken, jnp.zeros_like(broken))

    def reset(key: Array) -> State:
        new = task.reset(key)
        return state(new, new.obs)

    def step(old: State, action: Array) -> State:
        return state(task.step(old.inner, action), old.obs)

    ends = task.mj_model.actuator_ctrlrange.T
    obs = jax.eval_shape(reset, jax.random.key(0)).obs
    return time_limit(Environment(f"playground:{name}", reset, step, box(name, *ends), obs), episode_length)
