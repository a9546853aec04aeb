"""Environment -> environment: time limits, automatic resets, episode sums, action repeat, frame stacks, many worlds.

The usual order is `vectorize(autoreset(monitor(time_limit(env, n))), num)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.errors import UserError
from diffrl.rl.environment import Environment, State

Array = jax.Array


class Inner(NamedTuple):
    """The wrapped world's state and what the wrapper remembers."""

    state: State
    memory: Any


def _wrap(env: Environment, **changed: Any) -> Environment:
    """`env` with other functions, whose states hold the old ones in an `Inner`."""
    render = env.render
    looks = None if render is None else lambda state: render(state.inner.state)
    return env._replace(render=looks, **changed)


def time_limit(env: Environment, steps: int) -> Environment:
    """Truncates an episode after `steps` steps, unless that very step terminates it.

    Raises UserError for a limit below one step.
    """
    if steps < 1:
        raise UserError(f"a time limit of {steps} steps: choose at least 1")

    def reset(key: Array) -> State:
        state = env.reset(key)
        return state._replace(inner=Inner(state, jnp.zeros((), jnp.int32)))

    def step(state: State, action: Array) -> State:
        count = state.inner.memory + 1
        new = env.step(state.inner.state, action)
        truncated = new.truncated | ((count >= steps) & ~new.terminated)
        return new._replace(inner=Inner(new, count), truncated=truncated)

    return _wrap(env, reset=reset, step=step)


def monitor(env: Environment) -> Environment:
    """info["episode_return"] and info["episode_length"]: sums from the reset up to the present step."""

    def told(state: State, total: Array, length: Array) -> State:
        info = {**state.info, "episode_return": total, "episode_length": length}
        return state._replace(inner=Inner(state, (total, length)), info=info)

    def reset(key: Array) -> State:
        state = env.reset(key)
        return told(state, jnp.zeros_like(state.reward), jnp.zeros((), jnp.int32))

    def step(state: State, action: Array) -> State:
        total, length = state.inner.memory
        new = env.step(state.inner.state, action)
        return told(new, total + new.reward, length + 1)

    return _wrap(env, reset=reset, step=step)


def discounted_return(env: Environment, discount: float) -> Environment:
    """info["discounted_return"]: G_t = r_t + discount G_{t-1}, from 0 at the reset; what rewards are normalised by.

    Inside `autoreset` and `vectorize`.
    """

    def told(state: State, total: Array) -> State:
        return state._replace(inner=Inner(state, total), info={**state.info, "discounted_return": total})

    def reset(key: Array) -> State:
        state = env.reset(key)
        return told(state, jnp.zeros_like(state.reward))

    def step(state: State, action: Array) -> State:
        new = env.step(state.inner.state, action)
        return told(new, new.reward + discount * state.inner.memory)

    return _wrap(env, reset=reset, step=step)


def scale_reward(env: Environment, factor: float) -> Environment:
    """Rewards times `factor`; outside `monitor`, so that what is reported stays in the environment's units."""

    def step(state: State, action: Array) -> State:
        new = env.step(state, action)
        return new._replace(reward=new.reward * factor)

    return env._replace(step=step)


def autoreset(env: Environment, keep_first: bool = False) -> Environment:
    """Where a step ends the episode, `obs` is the first of the next one and info["final_obs"] the last of this one.

    reward, terminated, truncated and the other info stay those of the last step; info["final_obs"] is what the step led
    to also where nothing ended, so that it always is the observation whose value a transition bootstraps.

    Args:
        keep_first: go back to the first state there was instead of drawing a new one: for simulators whose reset costs
            as much as many steps.  (Else a step computes one for every world where any has ended, on an accelerator
            always: lanes of a batch cannot branch.)
    """

    def told(state: State, memory: Any, final: Any) -> State:
        return state._replace(inner=Inner(state, memory), info={**state.info, "final_obs": final})

    def reset(key: Array) -> State:
        own, first = jax.random.split(key)
        state = env.reset(first)
        return told(state, state if keep_first else (own, jnp.zeros((), jnp.uint32)), state.obs)

    def begun(new: State, key: Array, count: Array) -> State:
        return _where(new.done, env.reset(jax.random.fold_in(key, count)), new)

    anew = _if_any(begun)

    def step(state: State, action: Array) -> State:
        memory = state.inner.memory
        new = env.step(state.inner.state, action)
        if keep_first:
            going = _where(new.done, memory, new)
        else:
            key, count = memory
            going, memory = anew(new, key, count), (key, count + new.done)
        ended = new._replace(inner=Inner(going, memory), obs=going.obs)
        return ended._replace(info={**new.info, "final_obs": new.obs})

    return _wrap(env, reset=reset, step=step)


def _where(done: Array, fresh: State, going: State) -> State:
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), fresh, going)


def _if_any(begun: Callable[..., State]) -> Callable[..., State]:
    """(states, *arguments) -> states: `begun` if any of all worlds is done, else as they were; on a CPU.

    However often it is mapped: a branch within a lane would become a choice among the results of both.  Random numbers
    cost a CPU many small kernels, eighty for each draw, and an accelerator would wait for the branch.
    """

    @jax.custom_batching.custom_vmap
    def anew(states: State, *arguments: Array) -> State:
        def branch(states: State, *arguments: Array) -> State:
            return jax.lax.cond(states.done.any(), begun, lambda states, *_: states, states, *arguments)

        return jax.lax.platform_dependent(states, *arguments, cpu=branch, default=begun)

    @anew.def_vmap
    def mapped(size: int, batched: Any, *arguments: Any) -> tuple[State, Any]:
        def wide(x: Array, is_batched: bool) -> Array:
            return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

        states = _if_any(jax.vmap(begun))(*jax.tree.map(wide, arguments, tuple(batched)))
        return states, jax.tree.map(lambda _: True, states)

    return anew


def vectorize(env: Environment, num: int) -> Environment:
    """`num` worlds at once, every array with a leading axis: world i starts from fold_in(key, i)."""
    if num < 1:
        raise UserError(f"{num} worlds: choose at least 1")

    def reset(key: Array) -> State:
        return jax.vmap(lambda i: env.reset(jax.random.fold_in(key, i)))(jnp.arange(num))

    obs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num, *x.shape), x.dtype), env.obs)
    return env._replace(reset=reset, step=jax.vmap(env.step), obs=obs, render=None)


def action_repeat(env: Environment, times: int) -> Environment:
    """Every action `times` times, or until the episode ends; the rewards are summed."""
    if times < 1:
        raise UserError(f"actions repeated {times} times: choose at least 1")

    def step(state: State, action: Array) -> State:
        def again(state: State, _: None) -> tuple[State, None]:
            new = env.step(state, action)
            new = new._replace(reward=state.reward + new.reward)
            return jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, new), None

        off = jnp.zeros_like(state.terminated)
        start = state._replace(reward=jnp.zeros_like(state.reward), terminated=off, truncated=off)
        return jax.lax.scan(again, start, None, times)[0]

    return env._replace(step=step)


def frame_stack(env: Environment, num: int) -> Environment:
    """The last `num` observations along the last axis, oldest first; a new episode begins with copies of its first."""
    if num < 1:
        raise UserError(f"a stack of {num} frames: choose at least 1")
    *shape, depth = env.obs.shape

    def told(state: State, frames: Array) -> State:
        return state._replace(inner=Inner(state, frames), obs=frames)

    def reset(key: Array) -> State:
        state = env.reset(key)
        return told(state, jnp.concatenate([state.obs] * num, axis=-1))

    def step(state: State, action: Array) -> State:
        new = env.step(state.inner.state, action)
        return told(new, jnp.concatenate([state.inner.memory[..., depth:], new.obs], axis=-1))

    return _wrap(env, reset=reset, step=step, obs=jax.ShapeDtypeStruct((*shape, depth * num), env.obs.dtype))
