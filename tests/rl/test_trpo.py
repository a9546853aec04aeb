"""TRPO: its Fisher products against explicit matrices, its step against linear algebra, its promises kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agent_cases import corridor, learn, rollout, table
from jax.flatten_util import ravel_pytree
from rl_worlds import bias, counting, linear, many, noisy

from diffrl.nets.perceptron import Perceptron
from diffrl.rl import distributions, driver
from diffrl.rl import dynamic_programming as dp
from diffrl.rl.agent import Network, Transition
from diffrl.rl.agents.trpo import conjugate_gradient, fisher, trpo
from diffrl.rl.environment import Actions
from diffrl.rl.on_policy import on_policy

DISTRIBUTIONS = {"categorical": distributions.categorical(3), "normal": distributions.normal(Actions(shape=(1,)))}
OBS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 2)), jnp.float32)


def small(outputs):
    """Two numbers -> 5 tanh units -> outputs."""

    def init(key):
        first, second = jax.random.split(key)
        return {"in": jax.random.normal(first, (2, 5)), "out": jax.random.normal(second, (5, outputs)) / 2}

    return Network(init, lambda params, obs: jnp.tanh(obs @ params["in"]) @ params["out"])


def outcomes(name, outputs):
    """Actions and their weights [K], so that sums over them are expectations under the policy of these outputs [P].

    Of the normal, Gauss-Hermite nodes: exact for products of scores, which are polynomials of degree 4.
    """
    if name == "categorical":
        return jnp.arange(3), jax.nn.softmax(outputs)
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    mean, std = outputs[0], jax.nn.softplus(outputs[1]) + 1e-3
    return (mean + std * jnp.asarray(nodes, jnp.float32))[:, None], jnp.asarray(weights / weights.sum(), jnp.float32)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_fisher_products_are_those_of_the_matrix(name):
    """E[score score'] over actions and observations, and the Hessian of the divergence: one matrix, three ways."""
    distribution = DISTRIBUTIONS[name]
    network = small(distribution.size)
    params = network.init(jax.random.key(1))
    flat, unravel = ravel_pytree(params)
    rows = OBS.reshape(-1, 2)

    def product_of(v):
        outputs, jvp = jax.linearize(lambda p: network.apply(p, OBS), params)
        slope = jax.grad(lambda new: distribution.kl(outputs, new).mean())
        product = fisher(jvp, jax.linear_transpose(jvp, params), slope, outputs, 0.25)
        return ravel_pytree(product(unravel(v)))[0] - 0.25 * v

    def expected(obs):
        raw, weights = outcomes(name, network.apply(params, obs))
        log_prob = lambda f, raw: distribution.log_prob(network.apply(unravel(f), obs), raw)  # noqa: E731
        scores = jax.vmap(jax.grad(log_prob), (None, 0))(flat, raw)
        return jnp.einsum("k,ki,kj->ij", weights, scores, scores)

    def divergence(new):
        return distribution.kl(network.apply(params, rows), network.apply(unravel(new), rows)).mean()

    ours = jax.jit(jax.vmap(product_of))(jnp.eye(len(flat)))
    np.testing.assert_allclose(ours, jax.jit(jax.vmap(expected))(rows).mean(0), atol=2e-5)
    np.testing.assert_allclose(ours, jax.jit(jax.hessian(divergence))(flat), atol=2e-5)
    assert np.linalg.norm(ours) > 0.1


def test_conjugate_gradients_of_many_seeds_solve_the_system():
    """In rollouts as large as real ones, where jax's own `cg` gives NaN on a CPU (see `conjugate_gradient`)."""
    module, distribution = Perceptron(2), distributions.categorical(2)

    def residual(key):
        obs = jax.random.normal(key, (256, 8, 4))
        params = module.init(key, obs[0])
        outputs, jvp = jax.linearize(lambda p: jax.vmap(lambda x: module.apply(p, x))(obs), params)
        slope = jax.grad(lambda new: distribution.kl(outputs, new).mean())
        product = fisher(jvp, jax.linear_transpose(jvp, params), slope, outputs, 0.1)
        wanted = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
        left = jax.tree.map(jnp.subtract, product(conjugate_gradient(product, wanted, 20)), wanted)
        return optax.global_norm(left) / optax.global_norm(wanted)

    residuals = jax.jit(jax.vmap(residual))(jax.random.split(jax.random.key(0), 8))
    np.testing.assert_array_less(residuals, 1e-4)


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_the_step_on_a_bandit_solves_the_linear_system(damping):
    """F = diag(pi) - pi pi' is known, and numpy solves it."""
    logits = np.array([0.5, -0.2, 0.1, 0.3])
    pi = np.exp(logits) / np.exp(logits).sum()
    raw, reward = np.array([[0, 1, 2, 3, 1, 2]]), np.array([[1.0, 2.0, -1.0, 0.0, 2.5, 0.3]])
    agent = trpo(table(1, 4), table(1, 1), distributions.categorical(4), optax.sgd(0.0), damping=damping, delta=1e-4,
                 value_minibatches=1)  # fmt: skip
    start = agent.init(jax.random.key(0))
    start = start._replace(params={**start.params, "policy": jnp.asarray(logits, jnp.float32)[None]})
    state, told = jax.jit(agent.update)(start, rollout(0 * raw, raw, reward, True), jax.random.key(0))
    advantage = (reward - reward.mean()) / reward.std()
    gradient = np.mean((np.eye(4) - pi)[raw] * advantage[..., None], (0, 1))
    matrix = np.diag(pi) - np.outer(pi, pi) + damping * np.eye(4)
    direction = np.linalg.solve(matrix, gradient)
    step = float(told["step_fraction"]) * np.sqrt(2e-4 / (direction @ matrix @ direction)) * direction
    np.testing.assert_allclose(state.params["policy"][0] - logits, step, rtol=1e-3, atol=1e-6)
    # The step is small enough for the two orders of the theory: all of it was taken, and gained g's.
    assert float(told["step_fraction"]) == 1
    np.testing.assert_allclose(told["improvement"], gradient @ step, rtol=0.05)


def random_rollout(key, distribution, network, params):
    """Of the policy itself, with random rewards and ends."""
    act, reward, end = jax.random.split(key, 3)
    noise = jax.vmap(jax.vmap(distribution.noise))(jax.random.split(act, OBS.shape[:2]))
    raw = distribution.sample(network.apply(params, OBS), noise)
    ends = jax.random.bernoulli(end, 0.2, OBS.shape[:2])
    rewards = jax.random.normal(reward, OBS.shape[:2])
    return Transition(OBS, raw, rewards, ends, jnp.zeros_like(ends), OBS + 0.1, {"raw": raw})


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_step_stays_in_the_region_and_improves(name):
    """Sixteen seeds and two regions at once; in the large one the quadratic model is wrong and steps are shortened."""
    distribution = DISTRIBUTIONS[name]
    network = small(distribution.size)

    def one(key, delta):
        agent = trpo(network, small(1), distribution, optax.adam(1e-3), delta=delta, damping=1e-3, discount=0.9)
        state = agent.init(key)
        steps = random_rollout(key, distribution, network, state.params["policy"])
        new, told = agent.update(state, steps, key)
        outputs, later = (network.apply(s.params["policy"], OBS) for s in (state, new))
        moved = jnp.abs(outputs - later).max()
        return told, distribution.kl(outputs, later).mean(), moved

    keys, deltas = jax.random.split(jax.random.key(2), 16), jnp.array([0.01, 1.0])
    told, kl, moved = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(keys, deltas)
    told = jax.tree.map(np.asarray, told)
    taken = told["step_fraction"] > 0
    assert taken.mean() > 0.8
    np.testing.assert_allclose(told["kl"], kl, rtol=1e-3, atol=1e-6)
    assert np.all(told["kl"] <= deltas[:, None])
    assert np.all(told["improvement"][taken] > 0)
    np.testing.assert_array_equal(np.asarray(moved) > 0, taken)
    assert np.any(told["step_fraction"][1][taken[1]] < 1)
    # The longest step that will do: a good part of the region is used.
    assert np.all(told["kl"].mean(1) > 0.3 * deltas)


def test_the_improvement_is_that_of_the_surrogate():
    """Recomputed from the advantages of one-step episodes, which need no values."""
    distribution, network = DISTRIBUTIONS["normal"], small(2)
    agent = trpo(network, small(1), distribution, optax.sgd(0.0), damping=1e-3)
    state = agent.init(jax.random.key(3))
    steps = random_rollout(jax.random.key(4), distribution, network, state.params["policy"])
    steps = steps._replace(terminated=jnp.ones(OBS.shape[:2], bool))
    new, told = jax.jit(agent.update)(state, steps, jax.random.key(0))
    advantage = steps.reward - small(1).apply(state.params["value"], OBS)[..., 0]
    advantage = np.asarray((advantage - advantage.mean()) / advantage.std(), np.float64)
    logs = [
        np.asarray(distribution.log_prob(network.apply(s.params["policy"], OBS), steps.info["raw"]), np.float64)
        for s in (state, new)
    ]
    want = np.mean((np.exp(logs[1] - logs[0]) - 1) * advantage)
    assert want > 0.01
    np.testing.assert_allclose(told["improvement"], want, rtol=1e-3)


@pytest.mark.parametrize("reward", [0.0, np.nan])
def test_without_a_direction_nothing_moves(reward):
    """Advantages of 0, and such as are no numbers at all."""
    raw = np.array([[0, 1], [1, 1]])
    agent = trpo(table(2, 2), table(2, 1), distributions.categorical(2), optax.sgd(0.0))
    state = agent.init(jax.random.key(0))
    steps = rollout(raw, raw, np.full((2, 2), reward), True)
    new, told = jax.jit(agent.update)(state, steps, jax.random.key(0))
    np.testing.assert_array_equal(new.params["policy"], state.params["policy"])
    assert float(told["kl"]) == float(told["step_fraction"]) == float(told["improvement"]) == 0


@pytest.mark.parametrize(("terminated", "truncated", "first"), [(0, 0, 5.5), (1, 0, 2.0), (0, 1, 6.0)])
def test_targets_of_values_by_hand(terminated, truncated, first):
    """Rewards 2 and 5, discount 1/2, lambda 1.  The last return is 5 + 4/2 = 7, of a rollout that is cut.

    The first one is 2 + 7/2, 2 alone at an end, and 2 + 8/2 where the episode is cut in a state worth 8.
    """
    values = np.array([1.0, 2.0, 8.0, 4.0])
    agent = trpo(table(4, 2), table(4, 1), distributions.categorical(2), optax.sgd(1.0), discount=0.5, lam=1.0,
                 value_epochs=1, value_minibatches=1)  # fmt: skip
    start = agent.init(jax.random.key(0))
    start = start._replace(params={**start.params, "value": jnp.asarray(values, jnp.float32)[:, None]})
    ends = ([[end], [0]] for end in (terminated, truncated))
    after = [[2 if truncated else 1], [3]]
    steps = rollout([[0], [1]], [[0], [1]], [[2.0], [5.0]], *ends, after)
    new, _ = jax.jit(agent.update)(start, steps, jax.random.key(0))
    np.testing.assert_allclose(new.params["value"][:, 0] - values, [(first - 1) / 2, (7 - 2) / 2, 0, 0], rtol=1e-5)


def test_values_of_a_world_without_end_are_not_cut():
    """Reward 1 for ever at discount 0.98 is worth 50, however often the episode is cut."""
    agent = trpo(bias(2), bias(1), distributions.categorical(2), optax.sgd(0.3), discount=0.98)
    run = on_policy(many(counting(limit=8), 4), agent, 16)
    state, _ = jax.jit(lambda key: driver.repeat(run.step, 100)(run.init(key), None))(jax.random.key(0))
    assert float(state.agent.params["value"][0]) == pytest.approx(50.0, abs=1.0)


def test_it_walks_down_a_corridor_and_knows_how_far_it_is():
    optimizer = optax.sgd(3.0)
    agent = trpo(table(6, 2), table(6, 1), distributions.categorical(2), optimizer, discount=0.9, lam=1.0, damping=1e-3)
    state, metrics = learn(agent, corridor(), 100, unroll=16, worlds=16, limit=20)
    policy = jax.nn.softmax(state.params["policy"])
    assert np.all(policy[:5, 1] > 0.9)
    exact = dp.evaluate(corridor(), policy, 0.9)
    np.testing.assert_allclose(state.params["value"][:5, 0], exact[:5], atol=0.2)
    assert float(metrics["kl"].max()) <= 0.01


@pytest.mark.long
def test_seeds_side_by_side_learn_as_alone():
    """A population's first seed, within a scan, and the same run for itself."""
    dist = distributions.categorical(3)
    agent = trpo(linear(3, 2), linear(1, 2), dist, optax.adam(0.01), value_minibatches=1)
    one = on_policy(many(noisy(), 8), agent, 16)
    two = driver.seeds(one, 2)
    population, told = jax.jit(lambda key: driver.repeat(two.step, 6)(two.init(key), None))(jax.random.key(0))
    alone, _ = jax.jit(lambda key: driver.repeat(one.step, 6)(one.init(key), None))(
        jax.random.fold_in(jax.random.key(0), 0)
    )
    assert (told["step_fraction"] > 0).mean() > 0.8
    np.testing.assert_allclose(
        population.agent.params["policy"]["w"][0], alone.agent.params["policy"]["w"], rtol=2e-2, atol=2e-3
    )
