"""A finite Markov decision process as arrays, and as an environment.

An action a in a state s has K possible outcomes, each with its probability, next state, reward, and whether it ends the
episode:

    p(k | s, a)     s'(s, a, k)     r(s, a, k)     terminated(s, a, k)

which holds everything that Gymnasium's toy-text tables hold, and no S x S matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.rl.environment import Actions, Environment, State

Array = jax.Array


class MDP(NamedTuple):
    """The outcomes, arrays [S, A, K], and how an episode starts.

    Attributes:
        prob: float32; sums to 1 over K.
        next_state: int32.
        reward: float32.
        terminated: bool.
        start: float32 [S], the distribution of the first state.
    """

    prob: Array
    next_state: Array
    reward: Array
    terminated: Array
    start: Array


def backup(mdp: MDP, values: Array, discount: float) -> Array:
    """q(s, a) = E[r + discount v(s')], v = 0 after an end: values [S] -> [S, A]."""
    future = jnp.where(mdp.terminated, 0.0, values[mdp.next_state])
    return jnp.sum(mdp.prob * (mdp.reward + discount * future), axis=-1)


def environment(mdp: MDP, name: str) -> Environment:
    """The process as a world whose observation is its state, an int32 scalar; it has no time limit."""

    def reset(key: Array) -> State:
        key, first = jax.random.split(key)
        place = jax.random.categorical(first, jnp.log(mdp.start)).astype(jnp.int32)
        off = jnp.zeros((), bool)
        return State((key, place), place, jnp.zeros((), mdp.reward.dtype), off, off)

    def step(state: State, action: Array) -> State:
        (key, place), here = state.inner, (state.obs, action)
        key, now = jax.random.split(key)
        k = jax.random.categorical(now, jnp.log(mdp.prob[here]))
        place = mdp.next_state[here][k]
        return state._replace(
            inner=(key, place), obs=place, reward=mdp.reward[here][k], terminated=mdp.terminated[here][k]
        )

    actions = Actions(num=mdp.prob.shape[1])
    return Environment(name, reset, step, actions, jax.ShapeDtypeStruct((), jnp.int32))


def from_outcomes(outcomes: list[list[list[tuple[float, int, float, bool]]]], start: np.ndarray) -> MDP:
    """From lists outcomes[s][a] of (probability, next state, reward, terminated); shorter lists are padded with 0."""
    most = max(len(each) for row in outcomes for each in row)
    padded = [[each + [(0.0, 0, 0.0, False)] * (most - len(each)) for each in row] for row in outcomes]
    prob, next_state, reward, terminated = np.moveaxis(np.array(padded, np.float64), -1, 0)
    return MDP(
        jnp.asarray(prob, jnp.float32),
        jnp.asarray(next_state, jnp.int32),
        jnp.asarray(reward, jnp.float32),
        jnp.asarray(terminated, bool),
        jnp.asarray(start, jnp.float32),
    )
