"""Other libraries' environments behind ours: what comes out is what the library itself gives."""

import jax
import numpy as np

from diffrl.rl import classic_control
from diffrl.rl.adapters import host


def test_a_pure_environment_is_a_world_on_the_host():
    env = classic_control.cartpole()
    world, other = host.from_environment(env), host.from_environment(env)
    first = world.reset(7)
    state = env.reset(jax.random.fold_in(jax.random.key(7), 0))
    np.testing.assert_array_equal(first, state.obs)
    step, terminated, length = jax.jit(env.step), False, 0
    while not terminated:
        obs, reward, terminated, truncated = world.step(1)
        state = step(state, np.int32(1))
        np.testing.assert_array_equal(obs, state.obs)
        assert (reward, terminated, truncated) == (1.0, bool(state.terminated), False)
        length += 1
    assert 5 < length < 20
    assert type(obs) is np.ndarray
    second = world.reset()  # goes on in the same stream of random numbers
    assert np.abs(second - first).max() > 0
    other.reset(7)
    np.testing.assert_array_equal(other.reset(), second)
