"""A2C: its gradient by hand and against rlax, its critic against exact values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agent_cases import corridor, learn, rollout, table

from diffrl.rl import distributions, gridworlds
from diffrl.rl import dynamic_programming as dp
from diffrl.rl.agent import separate
from diffrl.rl.agents.a2c import a2c, loss

CATEGORICAL = distributions.categorical(2)
T, F = True, False


def gradient(steps, network, params, **options):
    grads, told = jax.jit(jax.grad(lambda p: loss(p, steps, network, CATEGORICAL, **options), has_aux=True))(params)
    return jax.tree.map(np.asarray, grads), told


def test_two_steps_by_hand():
    """Undecided policy, V = (1, 2, 3, 4), discount 1/2, one world that goes 0 -> 1 -> 3."""
    network = separate(table(4, 2), table(4, 1))
    params = {"policy": jnp.zeros((4, 2)), "value": jnp.arange(1.0, 5)[:, None]}
    steps = rollout([[0], [1]], [[0], [1]], [[2.0], [4.0]], next_obs=[[1], [3]])
    # Returns 4 + 4/2 = 6 and 2 + 6/2 = 5, advantages 4 and 4; d log pi = +-1/2; a mean over two steps.
    grads, told = gradient(steps, network, params, discount=0.5, entropy=0.0, value_weight=0.25)
    np.testing.assert_allclose(grads["policy"], [[-1, 1], [1, -1], [0, 0], [0, 0]])
    np.testing.assert_allclose(grads["value"][:, 0], [-0.5, -0.5, 0, 0])
    assert float(told["entropy"]) == pytest.approx(np.log(2))
    assert float(told["value_loss"]) == pytest.approx(8)
    # Truncated after the first step: its return is 2 + 2/2 = 3, whatever comes in the next row.
    cut = steps._replace(truncated=jnp.asarray([[T], [F]]))
    grads, _ = gradient(cut, network, params, discount=0.5, entropy=0.0, value_weight=0.25)
    np.testing.assert_allclose(grads["policy"][0], [-0.5, 0.5])
    # Terminated: 2 alone.
    over = steps._replace(terminated=jnp.asarray([[T], [F]]))
    grads, _ = gradient(over, network, params, discount=0.5, entropy=0.0, value_weight=0.25)
    np.testing.assert_allclose(grads["policy"][0], [-0.25, 0.25])


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(2))
def test_against_rlax(seed):
    rlax = pytest.importorskip("rlax", reason="rlax of the [oracles] extra is not installed")
    rng = np.random.default_rng(seed)
    states = rng.integers(0, 5, (9, 3))
    steps = rollout(
        states[:8], rng.integers(0, 2, (8, 3)), rng.normal(size=(8, 3)), rng.random((8, 3)) < 0.2, next_obs=states[1:]
    )
    network = separate(table(5, 2), table(5, 1))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), network.init(jax.random.key(0)))

    def theirs(params):
        """One world of theirs at a time."""
        total = 0.0
        for world in range(3):
            values = params["value"][states[:, world], 0]
            logits = params["policy"][states[:8, world]]
            discount = 0.9 * (1 - steps.terminated[:, world])
            targets = rlax.lambda_returns(steps.reward[:, world], discount, values[1:], 0.8, stop_target_gradients=True)
            errors = targets - values[:-1]
            weights = jnp.ones(8)
            policy = rlax.policy_gradient_loss(logits, steps.action[:, world], errors, weights)
            spread = rlax.entropy_loss(logits, weights)
            total += policy + 0.3 * spread + 0.7 * 0.5 * jnp.mean(jnp.square(errors))
        return total / 3

    value, want = jax.value_and_grad(theirs)(params)
    grads, told = gradient(steps, network, params, discount=0.9, lam=0.8, entropy=0.3, value_weight=0.7)
    assert float(told["loss"]) == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, want)


def test_normalised_advantages():
    """Neither a scale nor a shift of the rewards of one-step episodes enters the policy's gradient."""
    rng = np.random.default_rng(0)
    steps = rollout(rng.integers(0, 4, (5, 3)), rng.integers(0, 2, (5, 3)), rng.normal(size=(5, 3)), T)
    network = separate(table(4, 2), table(4, 1))
    params = network.init(jax.random.key(0))
    one, _ = gradient(steps, network, params, normalise=True, entropy=0.0)
    two, _ = gradient(steps._replace(reward=7 * steps.reward - 3), network, params, normalise=True, entropy=0.0)
    plain, _ = gradient(steps, network, params, entropy=0.0)
    np.testing.assert_allclose(one["policy"], two["policy"], atol=1e-5)
    assert np.abs(one["policy"] - plain["policy"]).max() > 0.01


def test_the_critic_is_exact_where_the_policy_stays():
    """Every outcome of the slippery lake under the undecided policy, all equally likely, over and over: V of dp."""
    lake = gridworlds.frozen_lake()
    open_states = np.flatnonzero(lake.prob[:, 0, 0] < 1)  # where an episode goes on, each move has three outcomes
    every = np.array(list(itertools.product(open_states, range(4), range(3)))).T
    steps = rollout(
        every[0][None], every[1][None], lake.reward[tuple(every)][None], lake.terminated[tuple(every)][None],
        next_obs=lake.next_state[tuple(every)][None],
    )  # fmt: skip
    still = optax.multi_transform(
        {"policy": optax.set_to_zero(), "value": optax.sgd(10.0)}, {"policy": "policy", "value": "value"}
    )
    agent = a2c(separate(table(16, 4), table(16, 1)), distributions.categorical(4), still, discount=0.95, lam=0.0)
    state = agent.init(jax.random.key(0))
    state, _ = jax.lax.scan(lambda s, _: agent.update(s, steps, jax.random.key(0)), state, None, 3000)
    exact = dp.evaluate(lake, jnp.full((16, 4), 0.25), 0.95, 1e-8)
    np.testing.assert_allclose(state.params["value"][open_states, 0], exact[open_states], atol=1e-5)
    assert float(exact[14]) > 0.3
    np.testing.assert_array_equal(state.params["policy"], 0)


def test_it_walks_down_a_corridor_and_knows_how_far_it_is():
    """With episodes that are cut long before the end: only the values tell of it."""
    optimizer = optax.multi_transform(
        {"policy": optax.adam(0.05), "value": optax.adam(0.1)}, {"policy": "policy", "value": "value"}
    )
    agent = a2c(separate(table(6, 2), table(6, 1)), CATEGORICAL, optimizer, discount=0.9, entropy=0.0)
    state, metrics = learn(agent, corridor(), 500, unroll=8, worlds=16, limit=20)
    policy = jax.nn.softmax(state.params["policy"])
    assert np.all(policy[:5, 1] > 0.95)
    exact = dp.evaluate(corridor(), policy, 0.9)
    np.testing.assert_allclose(state.params["value"][:5, 0], exact[:5], atol=0.1)
    assert float(metrics["explained_variance"][-50:].mean()) > 0.8
