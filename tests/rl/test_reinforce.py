"""REINFORCE against gradients that can be written down."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agent_cases import corridor, learn, rollout, table
from scipy.special import softmax
from scipy.stats import entropy

from diffrl.errors import UserError
from diffrl.rl import distributions
from diffrl.rl import dynamic_programming as dp
from diffrl.rl.agents.reinforce import ends_within, reinforce

REWARDS = np.array([1.0, 3.0, 2.0])
LOGITS = np.array([0.5, -0.2, 0.1])
PI = np.exp(LOGITS) / np.exp(LOGITS).sum()
SCORES = np.eye(3) - PI  # row a: grad log pi(a), of the logits
T, F = True, False


@functools.cache
def bandit(baseline):
    """Estimates [5000, 3] of the gradient from rollouts of 8 one-step episodes each."""
    critic = None if baseline is None else table(1, 1, baseline)
    agent = reinforce(table(1, 3), distributions.categorical(3), optax.sgd(1.0), 0.9, critic)
    start = agent.init(jax.random.key(0))
    start = start._replace(params={**start.params, "policy": jnp.asarray(LOGITS, jnp.float32)[None]})

    def estimate(key):
        obs = jnp.zeros((2, 4), jnp.int32)
        noise = jax.vmap(lambda key: agent.noise(jax.random.split(key, 4)))(jax.random.split(key))
        raw = jax.vmap(lambda obs, noise: agent.act(start, obs, noise)[1]["raw"])(obs, noise)
        steps = rollout(np.zeros((2, 4)), np.zeros((2, 4), np.int32), np.zeros((2, 4)), T)
        steps = steps._replace(action=raw, info={"raw": raw}, reward=jnp.asarray(REWARDS, jnp.float32)[raw])
        new, _ = agent.update(start, steps, key)
        return (new.params["policy"] - start.params["policy"])[0]

    return np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), 5000)), np.float64)


@pytest.mark.parametrize("baseline", [None, 0.7, float(PI @ REWARDS)])
def test_the_policy_gradient_of_a_bandit_is_exact_on_average(baseline):
    """Mean and variance over rollouts are those of sum_a pi(a) grad log pi(a) (r(a) - b), whatever b is."""
    estimates, b = bandit(baseline), baseline or 0.0
    exact = PI @ (SCORES * REWARDS[:, None])
    second = PI @ np.square(SCORES * (REWARDS - b)[:, None])
    variance = (second - exact**2) / 8
    np.testing.assert_array_less(np.abs(estimates.mean(0) - exact), 4 * np.sqrt(variance / len(estimates)))
    np.testing.assert_allclose(estimates.var(0), variance, rtol=0.1)


def test_a_good_baseline_lowers_the_variance():
    without, good = bandit(None).var(0).sum(), bandit(float(PI @ REWARDS)).var(0).sum()
    assert good < 0.3 * without


def gradient(steps, baseline=None, **options):
    """What one step of SGD at rate 1 adds to a policy of 4 states and 2 actions, undecided at first."""
    agent = reinforce(table(4, 2), distributions.categorical(2), optax.sgd(1.0), 0.5, baseline, **options)
    start = agent.init(jax.random.key(0))
    new, told = jax.jit(agent.update)(start, steps, jax.random.key(0))
    return jax.tree.map(lambda old, new: np.asarray(new - old), start.params, new.params), told


def test_returns_of_whole_episodes_by_hand():
    """States 0, 1 end an episode with rewards 2 and 4; state 2 begins one that the rollout cuts."""
    steps = rollout([[0], [1], [2]], [[0], [1], [0]], [[2.0], [4.0], [100.0]], [[F], [T], [F]])
    added, told = gradient(steps)
    # pi = 1/2: grad log pi(a) = +-1/2.  Returns are 2 + 4/2 = 4 and 4; the mean is over two steps.
    np.testing.assert_allclose(added["policy"], [[1, -1], [-1, 1], [0, 0], [0, 0]])
    assert float(told["counted"]) == pytest.approx(2 / 3)
    assert float(told["mean_return"]) == pytest.approx(4)


def test_a_truncated_episode_bootstraps_where_there_is_a_baseline():
    steps = rollout([[0], [1]], [[0], [1]], [[2.0], [4.0]], F, [[F], [T]], [[1], [3]])
    added, _ = gradient(steps)
    np.testing.assert_allclose(added["policy"][:2], [[1, -1], [-1, 1]])
    # With a baseline of 6 everywhere the returns are 4 + 6/2 = 7 and 2 + 7/2 = 5.5; the advantages 1 and -0.5.
    added, told = gradient(steps, table(4, 1, 6.0), value_weight=1.0)
    np.testing.assert_allclose(added["policy"][:2], [[-0.125, 0.125], [-0.25, 0.25]])
    np.testing.assert_allclose(added["value"][:, 0], [-0.25, 0.5, 0, 0])
    assert float(told["value_loss"]) == pytest.approx((1 + 0.25) / 4)


def test_entropy_is_sought_where_steps_count():
    """Without rewards the step is uphill on the mean entropy; state 2 is in an episode that the rollout cuts."""
    logits = np.array([LOGITS, -2 * LOGITS, 3 * LOGITS])
    agent = reinforce(table(3, 3), distributions.categorical(3), optax.sgd(1.0), entropy=0.3)
    start = agent.init(jax.random.key(0))
    start = start._replace(params={**start.params, "policy": jnp.asarray(logits, jnp.float32)})
    steps = rollout([[0], [1], [2]], [[0], [1], [2]], np.zeros((3, 1)), [[T], [T], [F]])
    new, told = jax.jit(agent.update)(start, steps, jax.random.key(0))

    def spread(logits):
        return entropy(softmax(logits[:2], axis=1), axis=1).mean()

    nudges = 1e-5 * np.eye(9).reshape(9, 3, 3)
    slope = np.array([spread(logits + nudge) - spread(logits - nudge) for nudge in nudges]).reshape(3, 3) / 2e-5
    np.testing.assert_allclose(new.params["policy"] - logits, 0.3 * slope, atol=1e-6)
    assert np.abs(slope[:2]).max() > 0.05
    assert float(told["entropy"]) == pytest.approx(spread(logits), rel=1e-5)


def test_a_rollout_without_an_end_changes_nothing():
    """Not even what momentum would."""
    agent = reinforce(table(4, 2), distributions.categorical(2), optax.adam(0.1), 0.5, table(4, 1))
    update = jax.jit(agent.update)
    ended = rollout([[0], [1]], [[0], [1]], [[2.0], [4.0]], [[F], [T]])
    state, _ = update(agent.init(jax.random.key(0)), ended, jax.random.key(0))
    same, told = update(state, ended._replace(terminated=jnp.zeros((2, 1), bool)), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state, same)
    assert float(told["counted"]) == 0
    moved, _ = update(state, ended, jax.random.key(0))
    assert np.any(moved.params["policy"] != state.params["policy"])


def test_which_steps_count():
    done = jnp.asarray([[F, F], [T, F], [F, F], [F, T], [F, F]])
    np.testing.assert_array_equal(ends_within(done), [[T, T], [T, T], [F, T], [F, T], [F, F]])
    np.testing.assert_array_equal(ends_within(done, 4), [[T, T], [T, T], [F, F], [F, F], [F, F]])
    with pytest.raises(UserError, match="a rollout of 5 steps for episodes of up to 6"):
        ends_within(done, 6)


@pytest.mark.parametrize("baseline", [None, table(6, 1)])
def test_it_walks_down_a_corridor(baseline):
    """And the baseline becomes the policy's value."""
    agent = reinforce(table(6, 2), distributions.categorical(2), optax.adam(0.05), 1.0, baseline, value_weight=5.0)
    state, metrics = learn(agent, corridor(), 300, unroll=24, limit=24)
    policy = jax.nn.softmax(state.params["policy"])
    assert np.all(policy[:5, 1] > 0.9)
    assert float(metrics["episode_return"][-20:].mean()) > -6
    if baseline is not None:
        exact = dp.evaluate(corridor(), policy, 1.0)
        np.testing.assert_allclose(state.params["value"][:5, 0], exact[:5], atol=0.4)
