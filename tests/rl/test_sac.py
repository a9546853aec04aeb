"""Soft actor-critic where the optimum is known: a quadratic bandit, a reward for nothing; densities; acting."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffrl.errors import UserError
from diffrl.rl import distributions
from diffrl.rl.agent import Network, Transition
from diffrl.rl.agents.sac import sac
from diffrl.rl.environment import Actions

GRID = jnp.linspace(-12.0, 12.0, 24_001)  # of raw actions


def free(size):
    """Outputs that are parameters, for a world with one state."""
    return Network(lambda key: jnp.zeros(size), lambda params, obs: jnp.broadcast_to(params, (len(obs), size)))


def parabola():
    """Quadratic in the last input, the action: exact for a quadratic bandit."""

    def features(x):
        return jnp.stack([jnp.ones(len(x)), x[:, -1], jnp.square(x[:, -1])], axis=-1)

    return Network(lambda key: 0.1 * jax.random.normal(key, (3, 1)), lambda params, x: features(x) @ params)


def batch_of(action, reward, discount):
    size = len(reward)
    obs, no = jnp.zeros((size, 1)), jnp.zeros(size, bool)
    info = {"discount": jnp.full(size, discount), "weight": jnp.full(size, 2.0)}
    return Transition(obs, action, reward, no, no, obs, info)


def learn(agent, actions, reward, discount, steps, size=256):
    """`steps` updates on actions drawn from all alike."""

    def body(state, key):
        first, second = jax.random.split(key)
        action = jax.random.uniform(first, (size, 1), minval=actions.low, maxval=actions.high)
        return agent.update(state, batch_of(action, reward(action[:, 0]), discount), second)

    def run(key):
        return jax.lax.scan(body, agent.init(key), jax.random.split(key, steps))

    return jax.jit(run)(jax.random.key(0))


def density(actions, outputs):
    """(u [G], the action in [-1, 1]; p(u) du [G]; log p(u) [G]) on a grid of raw actions."""
    log_p = distributions.squashed_log_prob(actions, jnp.broadcast_to(outputs, (len(GRID), 2)), GRID[:, None])
    scaled = np.tanh(np.asarray(GRID, np.float64))
    log_p = np.asarray(log_p, np.float64)
    return scaled, np.exp(log_p) * np.gradient(scaled), log_p


@pytest.mark.parametrize("outputs", [[0.0, 0.0], [0.7, -2.0], [-1.5, 1.0]])
def test_the_squashed_density_is_one(outputs):
    """It integrates to 1, and its mean is that of samples."""
    actions = Actions(shape=(1,), low=-3.0, high=5.0)
    scaled, mass, _ = density(actions, jnp.array(outputs))
    assert mass.sum() == pytest.approx(1, abs=1e-3)
    family = distributions.squashed(actions)
    keys = jax.random.split(jax.random.key(0), 20_000)
    raw = family.sample(jnp.array(outputs), jax.vmap(family.noise)(keys))
    assert float(family.action(raw).mean()) == pytest.approx(1 + 4 * (scaled * mass).sum(), abs=0.08)


def test_the_soft_optimum_of_a_quadratic_bandit():
    """pi is proportional to exp(r / alpha): for r = 3 - 2 (u - 0.3)^2, u in [-1, 1], a normal of variance alpha / 4.

    The entropy that is kept fixes its deviation s by H = log(s sqrt(2 pi e)), and so the temperature: alpha = 4 s^2.
    """
    actions, kept = Actions(shape=(1,), low=-1.0, high=3.0), -1.5  # u = (a - 1) / 2
    optimizer = optax.adam(optax.exponential_decay(0.03, 1000, 0.2))
    agent = sac(free(2), parabola(), actions, optimizer, target_entropy=kept, alpha=0.1)
    state, metrics = learn(agent, actions, lambda a: 3 - 2 * jnp.square((a - 1) / 2 - 0.3), 0.0, 3000)
    deviation = np.exp(kept) / np.sqrt(2 * np.pi * np.e)
    scaled, mass, _ = density(actions, state.params["policy"])
    mean = (scaled * mass).sum()
    assert mean == pytest.approx(0.3, abs=0.01)
    assert ((scaled - mean) ** 2 * mass).sum() ** 0.5 == pytest.approx(deviation, rel=0.05)
    assert float(metrics["entropy"][-300:].mean()) == pytest.approx(kept, abs=0.02)
    assert float(metrics["alpha"][-300:].mean()) == pytest.approx(4 * deviation**2, rel=0.05)
    for twin in state.params["critics"]:  # 3 - 2 (u - 0.3)^2 = 2.82 + 1.2 u - 2 u^2
        np.testing.assert_allclose(twin[:, 0], [2.82, 1.2, -2.0], atol=0.02)
    assert float(agent.greedy(state, jnp.zeros((1, 1)))[0, 0]) == pytest.approx(1 + 2 * 0.3, abs=0.03)


def test_the_price_of_entropy_is_in_the_value():
    """A reward of 1 whatever one does, for ever: q = (1 + gamma alpha H) / (1 - gamma), H the policy's own entropy."""
    actions, alpha, gamma = Actions(shape=(1,)), 0.5, 0.5
    rule = optax.partition(
        {"learn": optax.adam(optax.exponential_decay(0.03, 500, 0.2)), "keep": optax.set_to_zero()},
        {"policy": "learn", "critics": "learn", "log_alpha": "keep"},
    )
    agent = sac(free(2), parabola(), actions, rule, alpha=alpha, tau=0.1)
    state, metrics = learn(agent, actions, jnp.ones_like, gamma, 2000)
    _, mass, log_p = density(actions, state.params["policy"])
    entropy = -(mass * log_p).sum()
    assert 0.6 < entropy < np.log(2)  # nothing in the family is quite uniform
    assert float(metrics["q"][-200:].mean()) == pytest.approx((1 + gamma * alpha * entropy) / (1 - gamma), abs=0.02)
    np.testing.assert_array_equal(metrics["alpha"], np.float32(alpha))
    np.testing.assert_allclose(metrics["priority"][-1], 0.0, atol=0.5)


def test_targets_are_the_smaller_twin_and_follow():
    """One critic says 5 for everything and the other -7; then both targets go a tenth of the way to the new ones."""
    actions = Actions(shape=(1,))
    constant = Network(lambda key: jnp.zeros(()), lambda params, x: jnp.full((len(x), 1), params))
    agent = sac(free(2), constant, actions, optax.sgd(1.0), tau=0.1, alpha=1e-8)
    state = agent.init(jax.random.key(0))._replace(target=jnp.array([5.0, -7.0]))
    batch = batch_of(jnp.zeros((4, 1)), jnp.ones(4), 0.5)
    new, metrics = jax.jit(agent.update)(state, batch, jax.random.key(0))
    y = 1 + 0.5 * -7
    np.testing.assert_allclose(metrics["priority"], abs(y), rtol=1e-5)
    np.testing.assert_allclose(new.params["critics"], [y, y], rtol=1e-5)  # a step of 1 on (q - y)^2 / 2
    np.testing.assert_allclose(new.target, [0.9 * 5 + 0.1 * y, 0.9 * -7 + 0.1 * y], rtol=1e-5)


def test_errors_count_by_their_weights():
    """In units of the largest weight: from 0, a step of 1 leads to (8 / 4 + 0 / 2 + 4 + 0 / 4) / 4."""
    constant = Network(lambda key: jnp.zeros(()), lambda params, x: jnp.full((len(x), 1), params))
    agent = sac(free(2), constant, Actions(shape=(1,)), optax.sgd(1.0))
    batch = batch_of(jnp.zeros((4, 1)), jnp.array([8.0, 0.0, 4.0, 0.0]), 0.0)
    batch.info["weight"] = jnp.array([1.0, 2.0, 4.0, 1.0])
    new, metrics = jax.jit(agent.update)(agent.init(jax.random.key(0)), batch, jax.random.key(0))
    np.testing.assert_allclose(new.params["critics"], [1.5, 1.5], rtol=1e-5)
    np.testing.assert_allclose(metrics["priority"], [8, 0, 4, 0], rtol=1e-5)  # weights are no part of it


def test_the_entropy_kept_is_minus_one_for_each_number():
    """Of actions of three numbers, by default."""
    batch, moved = batch_of(jnp.zeros((4, 3)), jnp.zeros(4), 0.0), []
    for settings in ({}, {"target_entropy": -3.0}):
        agent = sac(free(6), parabola(), Actions(shape=(3,)), optax.sgd(0.1), **settings)
        new, _ = jax.jit(agent.update)(agent.init(jax.random.key(0)), batch, jax.random.key(1))
        moved.append(float(new.params["log_alpha"]))
    assert moved[0] == moved[1] != 0


def test_the_policy_climbs_the_smaller_twin_and_no_target():
    """Twins u and -2 u at u = tanh(1): a step of 1 moves the mean by -2 du/dx = -2 (1 - tanh(1)^2)."""
    slope = Network(lambda key: jnp.zeros(()), lambda params, x: params * x[:, -1:])
    agent = sac(free(2), slope, Actions(shape=(1,)), optax.sgd(1.0), alpha=1e-8)
    state = agent.init(jax.random.key(0))
    params = {"policy": jnp.array([1.0, -6.0]), "critics": jnp.array([1.0, -2.0])}
    state = state._replace(params=state.params | params, target=jnp.array([50.0, -70.0]))
    new, _ = jax.jit(agent.update)(state, batch_of(jnp.zeros((64, 1)), jnp.ones(64), 0.9), jax.random.key(0))
    assert float(new.params["policy"][0]) == pytest.approx(1 - 2 * (1 - np.tanh(1) ** 2), abs=0.01)


def test_actions_are_uniform_until_there_is_something_to_follow():
    actions = Actions(shape=(1,), low=-2.0, high=4.0)
    agent = sac(free(2), parabola(), actions, optax.sgd(0.1))
    state, obs = agent.init(jax.random.key(0)), jnp.zeros((4000, 1))
    state = state._replace(params=state.params | {"policy": jnp.array([0.5, -4.0])})
    noise = agent.noise(jax.random.split(jax.random.key(1), 4000))
    act = jax.jit(agent.act)
    action, info = act(state, obs, noise)
    assert not info
    np.testing.assert_allclose(np.histogram(action, 6, (-2, 4))[0] / 4000, 1 / 6, atol=0.025)
    action, _ = act(state._replace(updates=jnp.int32(1)), obs, noise)
    std = np.log1p(np.exp(-4)) + 1e-3
    assert float(jnp.arctanh((action - 1) / 3).std()) == pytest.approx(std, rel=0.05)
    np.testing.assert_allclose(agent.greedy(state, obs[:1]), [[1 + 3 * np.tanh(0.5)]], rtol=1e-5)


def test_numbered_actions_are_one_line():
    with pytest.raises(UserError, match="3 numbered actions: use DQN"):
        sac(free(2), parabola(), Actions(3), optax.sgd(0.1))
