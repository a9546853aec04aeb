"""Brax's robots (Freeman et al., 2021): rigid bodies in pure jax, with four kinds of physics.

The only file that knows brax, and its raw keys.  A reset costs as much as many steps, so wrap these worlds with
`wrappers.autoreset(env, keep_first=True)`.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.errors import UserError
from diffrl.rl.adapters import not_installed, unknown
from diffrl.rl.environment import Actions, Environment, State
from diffrl.rl.wrappers import action_repeat as repeat
from diffrl.rl.wrappers import time_limit

Array = jax.Array
BACKENDS = ("generalized", "mjx", "positional", "spring")


def make(name: str, backend: str = "spring", episode_length: int = 1000, action_repeat: int = 1) -> Environment:
    """One robot: obs float32 [n], actions within [-1, 1]; falling, where that ends an episode, is a termination.

    Args:
        name: ant, halfcheetah, hopper, humanoid, inverted_pendulum, walker2d, ...
        backend: "generalized" coordinates, "positional" or "spring" constraints, or "mjx", MuJoCo's.
        episode_length: brax's steps after which an episode is truncated.
        action_repeat: brax's steps for every step of ours; rewards are summed.

    Raises UserError where brax is not installed or does not know the name or the backend.
    """
    robot = _robot(name, backend)

    def state(new: Any) -> State:
        new = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.result_type(x)), new
        )  # no weak types, which would compile a loop twice
        terminated, reward = new.done > 0.5, new.reward.astype(jnp.float32)
        return State(new, new.obs.astype(jnp.float32), reward, terminated, jnp.zeros_like(terminated))

    def reset(key: Array) -> State:
        return state(robot.reset(jax.random.key_data(key)))

    def step(old: State, action: Array) -> State:
        return state(robot.step(old.inner, action))

    obs = jax.eval_shape(reset, jax.random.key(0)).obs
    env = Environment(f"brax:{name}", reset, step, Actions(shape=(robot.action_size,)), obs)
    if action_repeat != 1:
        env = repeat(env, action_repeat)
    return time_limit(env, -(-episode_length // action_repeat))


def html(name: str, states: Sequence[State], backend: str = "spring") -> str:
    """A page that plays a trajectory in three dimensions (its viewer comes from a content delivery network).

    Args:
        name, backend: as they were made.
        states: one for each moment, of one world, however it was wrapped.
    """
    robot = _robot(name, backend)
    from brax.io import html as pages

    def body(state: State) -> Any:
        inner = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "pipeline_state"))
        return next(node.pipeline_state for node in inner if hasattr(node, "pipeline_state"))

    return pages.render(robot.sys.tree_replace({"opt.timestep": robot.dt}), [body(state) for state in states])


def _robot(name: str, backend: str) -> Any:
    """brax's own environment."""
    try:
        from brax import envs
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    if name not in envs._envs:  # the only list there is
        raise unknown("brax", name, envs._envs)
    if backend not in BACKENDS:
        raise unknown("brax's physics", backend, BACKENDS)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Brax System")  # that MJX is its successor
            return envs.get_environment(name, backend=backend)
    except ValueError as error:  # the swimmer has one kind of physics only
        raise UserError(f"brax's {name} does not run with {backend} physics: try generalized") from error
