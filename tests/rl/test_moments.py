"""Running moments against numpy on all samples at once, and what a normalised agent sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rl_worlds import counting, many

from diffrl.errors import UserError
from diffrl.rl import driver, moments, wrappers
from diffrl.rl.agent import Agent
from diffrl.rl.on_policy import on_policy


def test_merging_equals_all_at_once():
    parts = [np.random.default_rng(i).normal(5, 3, (4, 7 + i, 2)).astype(np.float32) for i in range(5)]
    found = moments.init(jax.ShapeDtypeStruct((2,), jnp.float32))
    for part in parts:
        found = moments.merge(found, part, (0, 1))
    everything = np.concatenate([part.reshape(-1, 2) for part in parts])
    assert found.size == len(everything)
    np.testing.assert_allclose(found.mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.var, everything.var(0), rtol=1e-4)
    seen = moments.normalise(found, everything)
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(seen.std(0), 1, rtol=1e-4)


def test_what_is_far_from_the_mean_is_clipped():
    """The second number never changed: its deviation is 0."""
    samples = np.array([[1.0, 7.0], [3.0, 7.0]], np.float32)
    found = moments.merge(moments.init(jax.ShapeDtypeStruct((2,), jnp.float32)), samples)
    far = jnp.array([[1e6, 7.0], [-1e6, 7.5], [4.0, 6.5]])
    np.testing.assert_allclose(moments.normalise(found, far), [[10, 0], [-10, 10], [2, -10]], rtol=1e-5)
    np.testing.assert_allclose(moments.normalise(found, far, clip=1.5), [[1.5, 0], [-1.5, 1.5], [1.5, -1.5]], rtol=1e-5)


def spy():
    def act(state, obs, keys):
        return jnp.zeros(obs.shape[0], jnp.int32), {"seen": obs}

    return Agent(lambda key: jnp.zeros(()), act, lambda state, rollout, key: (state, {"rollout": rollout}), None)


def test_learns_from_what_it_acted_on():
    """An update sees observations through the moments that acted, not through those it has just got."""
    agent = moments.normalised(spy(), jax.ShapeDtypeStruct((1,), jnp.float32))
    run = on_policy(many(counting(limit=6), 2), agent, 4)
    state, told = jax.jit(run.step)(run.init(jax.random.key(0)))
    np.testing.assert_array_equal(told["rollout"].obs[:, 0, 0], [0, 1, 2, 3])
    _, told = jax.jit(run.step)(state)
    np.testing.assert_array_equal(told["rollout"].obs, told["rollout"].info["seen"])
    np.testing.assert_allclose(told["rollout"].obs[0, 0, 0], (4 - 1.5) / np.std([0, 1, 2, 3]), rtol=1e-5)


def test_a_cut_episode_leads_to_what_is_normalised():
    """The second rollout observes 4, 5, 0, 1, the first one's moments are those of 0, 1, 2, 3, and 6 is the last."""
    agent = moments.normalised(spy(), jax.ShapeDtypeStruct((1,), jnp.float32))
    run = on_policy(many(counting(limit=6), 2), agent, 4)
    _, told = jax.jit(lambda key: driver.repeat(run.step, 2)(run.init(key), None))(jax.random.key(0))
    np.testing.assert_array_equal(told["rollout"].truncated[1, :, 0], [0, 1, 0, 0])
    want = (np.array([5, 6, 1, 2]) - 1.5) / np.std([0, 1, 2, 3])
    np.testing.assert_allclose(told["rollout"].next_obs[1, :, 1, 0], want, rtol=1e-5)


def test_greedy_sees_what_is_normalised():
    """What acts in an evaluation is the policy of normalised observations."""
    shape = jax.ShapeDtypeStruct((1,), jnp.float32)
    agent = moments.normalised(spy()._replace(greedy=lambda state, obs: obs), shape)
    state = agent.init(jax.random.key(0))
    state = state._replace(obs=moments.merge(state.obs, jnp.array([[2.0], [6.0]])))
    np.testing.assert_allclose(agent.greedy(state, jnp.array([[8.0], [3.0]])), [[2.0], [-0.5]], rtol=1e-5)


def test_rewards_are_in_units_of_the_return():
    shape = jax.ShapeDtypeStruct((1,), jnp.float32)
    agent = moments.normalised(spy(), shape, observations=False, rewards=True)
    env = wrappers.discounted_return(wrappers.monitor(counting(limit=6)), 0.5)
    run = on_policy(wrappers.vectorize(wrappers.autoreset(env), 2), agent, 4)
    _, told = jax.jit(run.step)(run.init(jax.random.key(0)))
    deviation = np.std([1, 1.5, 1.75, 1.875])
    np.testing.assert_allclose(told["rollout"].reward, np.full((4, 2), 1 / deviation), rtol=1e-5)
    bare = on_policy(many(counting(limit=6), 2), agent, 4)
    with pytest.raises(UserError, match=r"wrappers\.discounted_return"):
        jax.eval_shape(bare.step, jax.eval_shape(bare.init, jax.random.key(0)))
