"""Wrappers on a world that counts: whatever they change can be read off its observations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.rl import classic_control, wrappers
from diffrl.rl.environment import Actions, Environment, State


def counter(end=5):
    """Observes [number of the episode's random start, steps]; reward = action; terminates after `end` steps."""

    def made(start, n, reward, terminated):
        obs = jnp.stack([start, n]).astype(jnp.float32)
        return State((start, n), obs, jnp.float32(reward), jnp.asarray(terminated), jnp.zeros((), bool))

    def reset(key):
        return made(jax.random.randint(key, (), 0, 1_000_000), jnp.int32(0), 0.0, False)

    def step(state, action):
        start, n = state.inner
        return made(start, n + 1, action, n + 1 >= end)

    return Environment("counter", reset, step, Actions(num=3), jax.ShapeDtypeStruct((2,), jnp.float32))


def play(env, actions, key=0):
    """The states after every action, stacked, the first one before them."""
    first = env.reset(jax.random.key(key))

    def body(state, action):
        new = env.step(state, action)
        return new, new

    return first, jax.lax.scan(body, first, jnp.asarray(actions, jnp.float32))[1]


@pytest.mark.parametrize(("limit", "terminated", "truncated"), [(3, False, True), (5, True, False), (6, True, False)])
def test_a_time_limit_truncates_what_does_not_terminate(limit, terminated, truncated):
    _, states = play(wrappers.time_limit(counter(), limit), [1] * min(limit, 5))
    assert (bool(states.terminated[-1]), bool(states.truncated[-1])) == (terminated, truncated)
    assert not np.any(states.done[:-1])


def test_autoreset_keeps_the_final_observation():
    env = wrappers.autoreset(wrappers.monitor(wrappers.time_limit(counter(), 3)))
    first, states = play(env, [1, 2, 3, 4, 5, 6, 7])
    steps = states.obs[:, 1]
    np.testing.assert_array_equal(steps, [1, 2, 0, 1, 2, 0, 1])
    np.testing.assert_array_equal(states.info["final_obs"][:, 1], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(states.truncated, [False, False, True, False, False, True, False])
    np.testing.assert_array_equal(states.reward, [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(states.info["episode_return"], [1, 3, 6, 4, 9, 15, 7])
    np.testing.assert_array_equal(states.info["episode_length"], [1, 2, 3, 1, 2, 3, 1])
    starts = [float(first.obs[0]), float(states.obs[2, 0]), float(states.obs[5, 0])]
    assert len(set(starts)) == 3  # every episode begins anew
    assert float(states.info["final_obs"][2, 0]) == starts[0]


def test_autoreset_may_keep_the_first_state():
    first, states = play(wrappers.autoreset(wrappers.time_limit(counter(), 2), keep_first=True), [1] * 4)
    np.testing.assert_array_equal(states.obs[:, 0], jnp.full(4, first.obs[0]))
    np.testing.assert_array_equal(states.obs[:, 1], [1, 0, 1, 0])


@pytest.mark.parametrize("keep_first", [False, True])
def test_discounted_returns_begin_anew(keep_first):
    """In every episode, and without what its last action paid."""
    env = wrappers.autoreset(wrappers.discounted_return(wrappers.time_limit(counter(), 3), 0.5), keep_first)
    first, states = play(env, [1, 2, 3, 4, 5, 6, 7])
    assert float(first.info["discounted_return"]) == 0
    np.testing.assert_array_equal(states.info["discounted_return"], [1, 2.5, 4.25, 4, 7, 9.5, 7])


def test_worlds_do_not_depend_on_how_many_there_are():
    few, many = (play(wrappers.vectorize(wrappers.autoreset(counter(2)), n), np.ones((3, n)))[1] for n in (2, 5))
    np.testing.assert_array_equal(few.obs, many.obs[:, :2])
    assert len(np.unique(many.obs[0, :, 0])) == 5


def test_mapped_worlds_are_what_each_is_alone():
    """Seeds of worlds, whose ends are looked for in all of them together."""
    seeds, worlds, steps = 3, 4, 60
    env = wrappers.autoreset(wrappers.monitor(classic_control.cartpole()))
    keys = jax.random.split(jax.random.key(3), (seeds, worlds))
    actions = jax.random.randint(jax.random.key(4), (seeds, worlds, steps), 0, 2)

    def one(key, actions):
        def step(state, action):
            state = env.step(state, action)
            return state, (state.obs, state.info["final_obs"], state.done, state.info["episode_return"])

        return jax.lax.scan(step, env.reset(key), actions)[1]

    together = jax.jit(jax.vmap(jax.vmap(one)))(keys, actions)
    alone = jax.jit(one)
    each = [[alone(keys[i, j], actions[i, j]) for j in range(worlds)] for i in range(seeds)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *(jax.tree.map(lambda *x: np.stack(x), *row) for row in each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, stacked)
    assert together[2].sum(-1).min() >= 1  # all fell at least once


def test_repeated_actions_stop_at_the_end():
    _, states = play(wrappers.action_repeat(counter(5), 3), [2, 1])
    np.testing.assert_array_equal(states.obs[:, 1], [3, 5])
    np.testing.assert_array_equal(states.reward, [6, 2])
    np.testing.assert_array_equal(states.terminated, [False, True])


def test_frames_are_stacked_and_restarted():
    env = wrappers.autoreset(wrappers.frame_stack(counter(2), 3))
    first, states = play(env, [1, 1, 1])
    assert env.obs.shape == first.obs.shape == (6,)
    np.testing.assert_array_equal(first.obs[1::2], [0, 0, 0])
    np.testing.assert_array_equal(states.info["final_obs"][:, 1::2], [[0, 0, 1], [0, 1, 2], [0, 0, 1]])
    np.testing.assert_array_equal(states.obs[1, 1::2], [0, 0, 0])


@pytest.mark.parametrize(
    "wrap", [wrappers.time_limit, wrappers.vectorize, wrappers.action_repeat, wrappers.frame_stack]
)
def test_none_of_a_thing_is_one_line(wrap):
    with pytest.raises(UserError, match="choose at least 1"):
        wrap(counter(), 0)
