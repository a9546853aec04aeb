"""Worlds by name: what can be asked of those that live on the host, and what cannot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.recipes import worlds
from diffrl.recipes.worlds import WorldConfig

HOST = WorldConfig(name="gym:CartPole-v1", num=2)


def test_rewards_are_scaled_and_returns_are_not():
    """On the host and off it: the same numbers of the same game."""
    pytest.importorskip("gymnasium")
    for name in ("gym:CartPole-v1", "cartpole"):
        env = worlds.vector(dataclasses.replace(HOST, name=name), 2, reward_scale=0.1)
        state = env.reset(jax.random.key(0))
        for _ in range(3):
            state = env.step(state, jnp.zeros(2, jnp.int32))
        np.testing.assert_allclose(state.reward, 0.1)
        np.testing.assert_allclose(state.info["episode_return"], 3.0)


@pytest.mark.parametrize(
    ("changes", "discount", "words"),
    [
        ({"frames": 2}, None, "--config.world.frames=2: gym:CartPole-v1 runs on the host"),
        ({"action_repeat": 3}, None, "--config.world.action_repeat=3"),
        ({"training_length": 30}, None, "--config.world.training_length=30"),
        ({}, 0.99, "cannot be normalised"),
    ],
)
def test_what_the_host_cannot_do_is_one_line(changes, discount, words):
    with pytest.raises(UserError, match=words):
        worlds.vector(dataclasses.replace(HOST, **changes), 2, discount)


def test_training_may_cut_episodes_that_evaluations_do_not():
    """The pendulum's 200 steps: a truncation after 30 of them, and a new beginning."""
    config = worlds.WorldConfig(name="pendulum", training_length=30)
    for one, length in ((config, 30), (worlds.whole(config), 200)):
        env = worlds.vector(one, 2)

        def step(state, _, env=env):
            state = env.step(state, jnp.zeros((2, 1)))
            return state, (state.truncated, state.terminated, state.info["episode_length"])

        truncated, terminated, lengths = jax.lax.scan(step, env.reset(jax.random.key(0)), None, 401)[1]
        np.testing.assert_array_equal(np.flatnonzero(truncated[:, 0]), np.arange(length - 1, 401, length))
        assert not terminated.any()
        assert lengths.max() == length
