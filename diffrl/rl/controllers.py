"""Policies that remember, in closed loop with many worlds, in one scan.

Planners, waypoint followers and recurrent policies all have a carry; agents that learn (`agent.Agent`) have none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.rl.environment import Environment, State
from diffrl.rl.evaluation import Episodes

Array = jax.Array

# What the key of an episode is folded with, beside the number of the step.
RESET, INIT, ACT = range(3)


class Controller(NamedTuple):
    """For N worlds at a time; the randomness of world i comes from key i alone.

    Attributes:
        init: (keys [N], world's State) -> carry, a tree of arrays.
        act: (carry, world's State, keys [N]) -> (actions [N, ...], carry).
    """

    init: Callable[[Array, State], Any]
    act: Callable[[Any, State, Array], tuple[Array, Any]]


def alone(init: Callable[[Array, State], Any], act: Callable[[Any, State, Array], tuple[Array, Any]]) -> Controller:
    """A controller from its two functions for one world."""
    return Controller(jax.vmap(init), jax.vmap(act))


def uniform(env: Environment) -> Controller:
    """Actions drawn uniformly from a box, whatever happens."""
    low, high, shape = env.actions.low, env.actions.high, env.actions.shape

    def act(carry: Any, world: State, key: Array) -> tuple[Array, Any]:
        return jax.random.uniform(key, shape, minval=low, maxval=high), carry

    return alone(lambda key, world: (), act)


def execute(
    env: Environment, controller: Controller, steps: int, keep: Callable[[State, Any, Array], Any] | None = None
) -> Callable[[Array], Any]:
    """keys [N] -> the first episode of each of N worlds of `env`, a single one's environment.

    Args:
        steps: of the loop; episodes that last longer are cut there.
        keep: (State that the action was taken in, carry after it, action) -> what to return of every step, stacked on
            a new leading axis [steps]; the result is then (Episodes, kept).  Worlds that have ended stand still.
    """

    def run(keys: Array) -> Any:
        own = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(3)), out_axes=1)(keys)
        world = jax.vmap(env.reset)(own[RESET])
        zeros = jnp.zeros(keys.shape, jnp.float32)
        start = world, controller.init(own[INIT], world), Episodes(zeros, zeros.astype(jnp.int32), zeros > 0)

        def body(state: Any, t: Array) -> tuple[Any, Any]:
            world, carry, seen = state
            now = jax.vmap(lambda key: jax.random.fold_in(key, t))(own[ACT])
            action, carry = controller.act(carry, world, now)
            kept = keep(world, carry, action) if keep is not None else None
            new = jax.vmap(env.step)(world, action)
            new = jax.tree.map(lambda old, new: _where(seen.done, old, new), world, new)
            total = seen.episode_return + jnp.where(seen.done, 0.0, new.reward)
            return (new, carry, Episodes(total, seen.episode_length + ~seen.done, seen.done | new.done)), kept

        (_, _, episodes), kept = jax.lax.scan(body, start, jnp.arange(steps))
        return episodes if keep is None else (episodes, kept)

    return run


def _where(done: Array, old: Array, new: Array) -> Array:
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return jnp.where(done, old, new)
    return jnp.where(done.reshape(done.shape + (1,) * (old.ndim - 1)), old, new)
