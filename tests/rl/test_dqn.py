"""Deep Q-learning: its errors against rlax, its fixed point against value iteration, exploration, targets, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffrl.errors import UserError
from diffrl.rl import driver, replay, wrappers
from diffrl.rl.agent import Network, Transition
from diffrl.rl.agents.dqn import dqn
from diffrl.rl.dynamic_programming import value_iteration
from diffrl.rl.environment import Actions
from diffrl.rl.mdp import environment, from_outcomes
from diffrl.rl.off_policy import off_policy


def table(states, actions):
    """Integer observations -> rows of a table: one-hot observations and a linear layer."""
    return Network(lambda key: jax.random.normal(key, (states, actions)), lambda params, obs: params[obs])


def random_batch(seed, size=32, states=5, actions=3):
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.integers(0, states, (2, size))
    terminated = rng.random(size) < 0.3
    info = {"discount": np.where(terminated, 0, 0.9), "weight": rng.uniform(0.1, 2, size)}
    narrow = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
    rest = 3 * rng.normal(size=size), terminated, np.zeros(size, bool), next_obs, info
    batch = Transition(obs, rng.integers(0, actions, size), *rest)
    return jax.tree.map(jnp.asarray, jax.tree.map(lambda x: x.astype(narrow.get(x.dtype, x.dtype)), batch))


@pytest.mark.oracle
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("huber", [True, False])
def test_against_rlax(double, huber):
    """Errors, loss and gradient, on a target table that is another one."""
    rlax = pytest.importorskip("rlax", reason="rlax of the [oracles] extra is not installed")
    agent = dqn(table(5, 3), Actions(3), optax.sgd(1.0), double=double, huber=huber, tau=0.0)
    state = agent.init(jax.random.key(0))
    state = state._replace(target=jax.random.normal(jax.random.key(1), (5, 3)))
    batch = random_batch(0)

    def theirs(q):
        now, ahead = q[batch.obs], state.target[batch.next_obs]
        common = now, batch.action, batch.reward, batch.info["discount"], ahead
        if double:
            errors = jax.vmap(rlax.double_q_learning)(*common, q[batch.next_obs])
        else:
            errors = jax.vmap(rlax.q_learning)(*common)
        each = rlax.huber_loss(errors) if huber else rlax.l2_loss(errors)
        return jnp.mean(each * batch.info["weight"]) / batch.info["weight"].max(), errors

    (loss, errors), grad = jax.value_and_grad(theirs, has_aux=True)(state.params)
    new, metrics = jax.jit(agent.update)(state, batch, jax.random.key(2))
    np.testing.assert_allclose(metrics["priority"], np.abs(errors), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(state.params - new.params, grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(new.target, state.target)


def test_the_double_estimator_by_hand():
    """In the next state the present table prefers action 1, which the target's values at 20, and 0 at 30."""
    params, target = jnp.array([[5.0, 0.0], [1.0, 2.0]]), jnp.array([[0.0, 0.0], [30.0, 20.0]])
    info = {"discount": jnp.array([0.5]), "weight": jnp.ones(1)}
    flags = jnp.zeros(1, bool), jnp.zeros(1, bool)
    batch = Transition(jnp.array([0]), jnp.array([0]), jnp.array([1.0]), *flags, jnp.array([1]), info)
    for double, error in ((True, 1 + 0.5 * 20 - 5), (False, 1 + 0.5 * 30 - 5)):
        agent = dqn(table(2, 2), Actions(2), optax.sgd(0.0), double=double)
        state = agent.init(jax.random.key(0))._replace(params=params, target=target)
        assert float(agent.update(state, batch, jax.random.key(0))[1]["priority"][0]) == error


def maze():
    """Four states in a row, left and right; the right end pays 1 and terminates, the left end pays 0.3 and stays."""
    rows = [
        [[(1.0, max(s - 1, 0), 0.3 * (s == 0), False)], [(1.0, min(s + 1, 3), float(s == 3), s == 3)]] for s in range(4)
    ]
    return from_outcomes(rows, np.full(4, 0.25))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("target_every", "tau"), [(20, 1.0), (1, 0.1)])
def test_the_fixed_point_is_that_of_value_iteration(double, target_every, tau):
    process, gamma = maze(), 0.8
    want = value_iteration(process, gamma, tolerance=1e-7).q
    obs, action = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(4), jnp.arange(2), indexing="ij"))
    reward, ends, ahead = (x[..., 0].reshape(-1) for x in (process.reward, process.terminated, process.next_state))
    info = {"discount": jnp.where(ends, 0.0, gamma), "weight": jnp.ones(8)}
    batch = Transition(obs, action, reward, ends, jnp.zeros(8, bool), ahead, info)
    # The loss is a mean over eight pairs, each of which moves its own entry.
    agent = dqn(table(4, 2), Actions(2), optax.sgd(4.0), target_every=target_every, tau=tau, double=double)

    def body(state, _):
        return agent.update(state, batch, jax.random.key(0))

    state, metrics = jax.jit(lambda key: jax.lax.scan(body, agent.init(key), None, 2000))(jax.random.key(3))
    np.testing.assert_allclose(state.params, want, atol=1e-4)
    assert float(metrics["loss"][-1]) < 1e-8
    np.testing.assert_array_equal(agent.greedy(state, jnp.arange(4)), value_iteration(process, gamma).policy)


def test_the_target_waits_or_follows():
    agent = dqn(table(5, 3), Actions(3), optax.sgd(0.1), target_every=3, tau=0.25)
    state, update = agent.init(jax.random.key(0)), jax.jit(agent.update)
    first = state.target
    for n in range(1, 4):
        state, _ = update(state, random_batch(n), jax.random.key(n))
        want = first if n < 3 else 0.25 * state.params + 0.75 * first
        np.testing.assert_allclose(state.target, want, rtol=1e-6)
        assert int(state.updates) == n


def test_exploration_has_its_probability():
    """epsilon falls with the updates, and a fourth of the random actions is the best one as well."""
    schedule = optax.linear_schedule(1.0, 0.2, 10)
    agent = dqn(table(2, 4), Actions(4), optax.sgd(0.1), epsilon=schedule)
    obs, keys = jnp.zeros(4000, jnp.int32), jax.random.split(jax.random.key(0), 4000)
    for updates, epsilon in ((0, 1.0), (5, 0.6), (10, 0.2)):
        state = agent.init(jax.random.key(0))._replace(updates=jnp.int32(updates))
        action, info = jax.jit(agent.act)(state, obs, agent.noise(keys))
        best = int(agent.greedy(state, obs[:1])[0])
        share = np.bincount(action, minlength=4) / 4000
        want = np.where(np.arange(4) == best, 1 - 0.75 * epsilon, 0.25 * epsilon)
        np.testing.assert_allclose(share, want, atol=4 * 0.5 / 4000**0.5)
        assert not info


@pytest.mark.parametrize("make", [replay.uniform, replay.prioritised])
def test_it_learns_with_a_driver(make):
    """Whatever the draws and whoever acts, the table becomes that of value iteration."""
    process, gamma = maze(), 0.8
    env = wrappers.monitor(wrappers.time_limit(environment(process, "maze"), 12))
    env = wrappers.vectorize(wrappers.autoreset(env), 4)
    agent = dqn(table(4, 2), Actions(2), optax.sgd(0.5), epsilon=1.0, tau=0.1)
    made = off_policy(env, agent, make(250, 2, 1, gamma), batch=32, groups=2, unroll=2, updates=2, start=100)
    run, _ = jax.jit(lambda key: driver.repeat(made.step, 500)(made.init(key), None))(jax.random.key(0))
    np.testing.assert_allclose(run.agent.params, value_iteration(process, gamma).q, atol=0.01)


def test_what_cannot_be_is_one_line():
    with pytest.raises(UserError, match=r"vectors \(2,\): use SAC"):
        dqn(table(2, 2), Actions(shape=(2,)), optax.sgd(0.1))
    with pytest.raises(UserError, match="target_every=0"):
        dqn(table(2, 2), Actions(2), optax.sgd(0.1), target_every=0)
