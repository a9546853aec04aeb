"""Tables against Gymnasium's, exact optima against published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.rl import dynamic_programming as dp
from diffrl.rl import gridworlds, mdp

WORLDS = {
    "FrozenLake-v1": gridworlds.frozen_lake,
    "FrozenLake8x8-v1": lambda: gridworlds.frozen_lake("8x8"),
    "CliffWalking-v1": gridworlds.cliff_walking,
    "Taxi-v4": gridworlds.taxi,
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", WORLDS)
def test_tables_are_gymnasiums(name):
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium of the [oracles] extra is not installed")
    reference, ours = gymnasium.make(name).unwrapped, jax.tree.map(np.asarray, WORLDS[name]())
    states, actions, _ = ours.prob.shape
    assert (states, actions) == (reference.observation_space.n, reference.action_space.n)
    for s in range(states):
        for a in range(actions):
            want = reference.P[s][a]
            have = np.stack([column[s, a] for column in ours[:4]], axis=-1)
            np.testing.assert_allclose(have[: len(want)], np.array(want, float), rtol=1e-6)
            assert not have[len(want) :, 0].any()
    np.testing.assert_allclose(ours.start, reference.initial_state_distrib, rtol=1e-6)


@pytest.mark.parametrize(
    ("world", "discount", "value"),
    [
        (gridworlds.frozen_lake, 1.0, 0.823529),  # 14 / 17
        (gridworlds.frozen_lake, 0.99, 0.542026),
        (lambda: gridworlds.frozen_lake(slippery=False), 0.9, 0.9**5),
        (gridworlds.cliff_walking, 1.0, -13.0),
        (gridworlds.taxi, 1.0, 7.93),
    ],
)
def test_value_iteration_reaches_the_known_optimum(world, discount, value):
    process = world()
    solution = dp.value_iteration(process, discount, 1e-9)
    assert float(solution.values @ process.start) == pytest.approx(value, abs=2e-6 * max(1, abs(value)))


@pytest.mark.parametrize("world", [gridworlds.frozen_lake, gridworlds.cliff_walking, gridworlds.taxi])
def test_policy_iteration_finds_the_same_values(world):
    process = world()
    by_value, by_policy = dp.value_iteration(process, 0.97), dp.policy_iteration(process, 0.97)
    np.testing.assert_allclose(by_policy.values, by_value.values, atol=2e-4)
    assert int(by_policy.sweeps) <= int(by_value.sweeps)


def test_evaluation_solves_the_linear_equations():
    """v = (I - discount P)^-1 r for a random policy, by numpy in float64."""
    process = jax.tree.map(np.asarray, gridworlds.frozen_lake("8x8"))
    policy = np.random.default_rng(0).dirichlet(np.ones(4), 64)
    p, r = np.zeros((64, 64)), np.zeros(64)
    for s, a, k in np.ndindex(*process.prob.shape):
        weight = policy[s, a] * process.prob[s, a, k]
        r[s] += weight * process.reward[s, a, k]
        p[s, process.next_state[s, a, k]] += weight * (not process.terminated[s, a, k])
    want = np.linalg.solve(np.eye(64) - 0.95 * p, r)
    np.testing.assert_allclose(dp.evaluate(gridworlds.frozen_lake("8x8"), policy, 0.95, 1e-8), want, atol=1e-6)


def test_many_discounts_at_once():
    process = gridworlds.frozen_lake()
    values = jax.jit(jax.vmap(lambda g: dp.value_iteration(process, g, 1e-9).values[0]))(jnp.array([0.9, 0.99, 1.0]))
    np.testing.assert_allclose(values, [0.068891, 0.542026, 0.823529], atol=2e-6)


def test_the_environment_draws_from_the_table():
    """Frequencies of where a slippery move ends, and of Taxi's first states."""
    env = mdp.environment(gridworlds.frozen_lake(), "lake")
    keys = jax.random.split(jax.random.key(0), 6000)
    ended = jax.jit(jax.vmap(lambda key: env.step(env.reset(key), jnp.int32(1)).obs))(keys)
    assert set(np.unique(ended)) == {0, 1, 4}
    np.testing.assert_allclose([np.mean(ended == s) for s in (0, 1, 4)], 1 / 3, atol=0.025)
    cab = gridworlds.taxi()
    first = jax.jit(jax.vmap(lambda key: mdp.environment(cab, "taxi").reset(key).obs))(keys)
    assert set(np.unique(first)) == set(np.flatnonzero(cab.start))


def test_steps_end_where_the_table_says():
    env = mdp.environment(gridworlds.cliff_walking(), "cliff")
    state, total = env.reset(jax.random.key(0)), 0.0
    for action in [0] + [1] * 11 + [2]:
        assert not bool(state.done)
        state = env.step(state, jnp.int32(action))
        total += float(state.reward)
    assert (total, bool(state.terminated), bool(state.truncated), int(state.obs)) == (-13.0, True, False, 47)


def test_an_unknown_lake_is_one_line():
    with pytest.raises(UserError, match="choose one of 4x4, 8x8"):
        gridworlds.frozen_lake("16x16")
