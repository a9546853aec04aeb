"""Gymnax's worlds (Lange, 2022): classic control, bsuite and MinAtar (Young & Tian, 2019) in pure jax.

Their steps without their automatic resets, and their time limits as truncations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.errors import UserError
from diffrl.rl import drawing
from diffrl.rl.adapters import box, not_installed, unknown
from diffrl.rl.environment import Actions, Environment, State

Array = jax.Array
# MinAtar's names, and Gymnax's.
MINATAR = {
    "asterix": "Asterix-MinAtar",
    "breakout": "Breakout-MinAtar",
    "freeway": "Freeway-MinAtar",
    "seaquest": "Seaquest-MinAtar",
    "space_invaders": "SpaceInvaders-MinAtar",
}


class Inner(NamedTuple):
    """Gymnax's state, the key of the steps to come, and the action before (of sticky ones)."""

    state: Any
    key: Array
    action: Array


def make(name: str) -> Environment:
    """A world of Gymnax by its name, as in Catch-bsuite.

    Raises UserError where gymnax is not installed, for an unknown name, and for actions that are no number and no box.
    """
    world, params = _library(name)
    return _environment(name, world, params)


def minatar(name: str, sticky: float = 0.0, ramping: bool = False, episode_length: int | None = None) -> Environment:
    """A game of MinAtar: obs float32 [10, 10, channels] of zeros and ones, its minimal set of actions.

    Args:
        name: asterix, breakout, freeway, seaquest or space_invaders.
        sticky: the probability that the world takes the action before once more (0.1 in the paper).
        ramping: asterix, seaquest and space_invaders get harder, as they do in the paper.
        episode_length: steps after which an episode is truncated; None for Gymnax's limit, 2500 in freeway and 1000
            elsewhere.  MinAtar itself has none but freeway's.

    Raises UserError where gymnax is not installed, for another name, or for a probability outside [0, 1].
    """
    known = MINATAR.get(name, name)
    if known not in MINATAR.values():
        raise unknown("MinAtar", name, MINATAR)
    if not 0 <= sticky <= 1:
        raise UserError(f"actions stick with probability {sticky}: choose one within [0, 1]")
    world, params = _library(known)
    if episode_length is not None:
        params = params.replace(max_steps_in_episode=episode_length)
    if hasattr(params, "ramping"):
        params = params.replace(ramping=ramping)
    env = _environment(known, world, params, sticky, ramping)
    return env._replace(render=lambda state: drawing.tiles(np.asarray(state.obs)))


def _library(name: str) -> tuple[Any, Any]:
    """Gymnax's own environment and its parameters."""
    try:
        import gymnax
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    if name not in gymnax.registered_envs:
        raise unknown("gymnax", name, gymnax.registered_envs)
    return gymnax.make(name)


def _environment(name: str, world: Any, params: Any, sticky: float = 0.0, ramping: bool = True) -> Environment:
    actions = _actions(name, world.action_space(params))

    def reset(key: Array) -> State:
        key, first = jax.random.split(key)
        obs, inner = _strong(world.reset_env(first, params))
        if hasattr(inner, "ramping"):  # the invaders keep it here
            inner = inner.replace(ramping=jnp.asarray(ramping))
        off = jnp.zeros((), bool)
        held = jnp.zeros(actions.shape, jnp.int32 if actions.num else jnp.float32)
        return State(Inner(inner, key, held), obs, jnp.zeros((), jnp.float32), off, off)

    def step(state: State, action: Array) -> State:
        key, now, stuck = jax.random.split(state.inner.key, 3)
        action = jnp.asarray(action, state.inner.action.dtype)
        if sticky:
            action = jnp.where(jax.random.uniform(stuck) < sticky, state.inner.action, action)
        obs, inner, reward, terminated, _ = world.step_env(now, state.inner.state, action, params)
        obs, inner = jax.tree.map(
            lambda new, old: jnp.asarray(new, old.dtype), (obs, inner), (state.obs, state.inner[0])
        )
        terminated = jnp.asarray(terminated, bool)
        truncated = jnp.asarray(world.is_truncated(inner, params), bool) & ~terminated
        return State(Inner(inner, key, action), obs, jnp.asarray(reward, jnp.float32), terminated, truncated)

    obs = jax.eval_shape(reset, jax.random.key(0)).obs
    return Environment(name, reset, step, actions, obs)


def _strong(tree: Any) -> Any:
    """No numbers of Python and no weak types, so that a scan's carry keeps its types."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def _actions(name: str, space: Any) -> Actions:
    if hasattr(space, "n"):
        return Actions(num=int(space.n))
    if not hasattr(space, "low"):
        raise UserError(f"{name} has actions of {space}: choose a world whose actions are numbers or a box")
    low, high = (np.broadcast_to(np.asarray(end, np.float32), space.shape) for end in (space.low, space.high))
    return box(name, low, high)
