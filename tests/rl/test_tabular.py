"""Learners in tables reach what dynamic programming computes, and show what Sutton & Barto's examples show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.rl import dynamic_programming as dp
from diffrl.rl import exploration, gridworlds, mdp, tabular, wrappers

SEEDS = 4


def run(process, learner, rule, steps, limit=200):
    """(tables, episodes) of some seeds at once."""
    env = wrappers.time_limit(mdp.environment(process, "world"), limit)
    learn = functools.partial(tabular.learn, env, learner, rule, process.start.shape[0], steps)
    return jax.jit(jax.vmap(learn))(jax.random.split(jax.random.key(0), SEEDS))


def greedy_return(process, q):
    """From the start, undiscounted, for tables [seeds, S, A]."""

    def value(q):
        policy = jax.nn.one_hot(dp.greedy(q), q.shape[-1])
        return dp.evaluate(process, policy, 1.0, limit=500) @ process.start

    return np.array(jax.jit(jax.vmap(value))(q))


def late_return(episodes):
    """Mean return of the episodes that ended in the second half."""
    done, returns = (np.asarray(x)[:, x.shape[1] // 2 :] for x in episodes[:2])
    return (done * returns).sum() / done.sum()


def test_the_cliff():
    """Example 6.6: Q-learning finds the edge and falls off while it explores; SARSA takes the way round."""
    cliff, rule = gridworlds.cliff_walking(), exploration.epsilon_greedy(0.1)
    tables, episodes = run(cliff, tabular.q_learning(0.5, 1.0), rule, 20_000)
    np.testing.assert_array_equal(greedy_return(cliff, tables.q), -13)
    fallen = late_return(episodes)
    tables, episodes = run(cliff, tabular.expected_sarsa(0.5, 1.0), rule, 20_000)
    around = greedy_return(cliff, tables.q)
    assert np.all((around >= -17) & (around < -13))
    assert -60 < fallen < -40
    assert late_return(episodes) > fallen + 20


@pytest.mark.parametrize(
    "learner",
    [
        tabular.sarsa(lambda n: 1 / (1 + n) ** 0.7, 0.95),
        tabular.sarsa(lambda n: 1 / (1 + n) ** 0.7, 0.95, lam=0.5),
        tabular.expected_sarsa(lambda n: 1 / (1 + n) ** 0.7, 0.95),
    ],
    ids=["sarsa", "sarsa-lambda", "expected-sarsa"],
)
def test_on_policy_learners_value_the_behaviour(learner):
    """A fixed behaviour (all actions alike) has values that a linear equation gives."""
    lake = gridworlds.frozen_lake()
    tables, _ = run(lake, learner, exploration.epsilon_greedy(1.0), 30_000)
    want = mdp.backup(lake, dp.evaluate(lake, jnp.full((16, 4), 0.25), 0.95, 1e-8), 0.95)
    visited = np.asarray(tables.visits).min(axis=0) > 150
    assert visited.sum() > 20
    np.testing.assert_allclose(np.asarray(tables.q).mean(axis=0)[visited], want[visited], atol=0.03)


@pytest.mark.parametrize("make", [tabular.q_learning, tabular.double_q])
def test_off_policy_learners_find_the_optimum(make):
    lake = gridworlds.frozen_lake(slippery=False)
    learner = make(lambda n: 1 / (1 + n) ** 0.6, 0.95)
    tables, _ = run(lake, learner, exploration.epsilon_greedy(0.5), 20_000)
    best = dp.value_iteration(lake, 0.95).values[0]
    values = jax.vmap(learner.values)(tables)[:, 0].max(axis=-1)
    np.testing.assert_allclose(values, best, atol=0.01)
    np.testing.assert_array_equal(greedy_return(lake, jax.vmap(learner.values)(tables)), 1.0)


def test_double_q_is_not_lured_by_noise():
    """Example 6.7: to the left lies a choice of ten bets, each worth -0.1 on average; a maximum of estimates of them
    looks good to a single table."""
    noise = np.random.default_rng(0).normal(size=200)
    noise += -0.1 - noise.mean()
    bets = [[(1 / 200, 2, float(r), True) for r in noise]] * 10
    begin = [[(1.0, 2, 0.0, True)], *[[(1.0, 1, 0.0, False)]] * 9]
    process = mdp.from_outcomes([begin, bets, [[(1.0, 2, 0.0, True)]] * 10], np.eye(3)[0])
    learn = functools.partial(tabular.learn, mdp.environment(process, "bets"))

    def worth(make):
        """What the left is believed to be worth: the maximum in the middle, as the learner estimates it."""
        learner = make(0.1, 1.0)
        run = jax.jit(jax.vmap(lambda key: learn(learner, exploration.epsilon_greedy(1.0), 3, 4000, key)[0].q))
        return float(run(jax.random.split(jax.random.key(0), 16))[..., 0, 1:].mean())

    assert worth(tabular.q_learning) > 0.1
    assert worth(tabular.double_q) < 0.0


def test_truncation_bootstraps():
    """Reward 1 for ever, cut every 8 steps: 1 / (1 - 0.98) = 50, whatever the cuts."""
    process = mdp.from_outcomes([[[(1.0, 0, 1.0, False)]]], np.ones(1))
    tables, episodes = run(process, tabular.q_learning(0.5, 0.98), exploration.epsilon_greedy(0.0), 2000, limit=8)
    np.testing.assert_allclose(tables.q[:, 0, 0], 50, atol=1)
    assert int(episodes.done.sum()) == SEEDS * 250
    ended = process._replace(terminated=jnp.ones_like(process.terminated))
    tables, _ = run(ended, tabular.q_learning(0.5, 0.98), exploration.epsilon_greedy(0.0), 200)
    np.testing.assert_allclose(tables.q[:, 0, 0], 1)


def walk(n=19):
    """The random walk of example 7.1: -1 at the left end, +1 at the right; values (2 i - n - 1) / (n + 1)."""
    rows = []
    for i in range(n):
        left = (0.5, max(i - 1, 0), -1.0 if i == 0 else 0.0, i == 0)
        right = (0.5, min(i + 1, n - 1), 1.0 if i == n - 1 else 0.0, i == n - 1)
        rows.append([[left, right]])
    return mdp.from_outcomes(rows, np.eye(n)[n // 2]), np.arange(-n + 1, n, 2) / (n + 1)


@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_td_lambda_values_the_random_walk(lam):
    process, want = walk(7)
    env, policy = mdp.environment(process, "walk"), jnp.ones((7, 1))
    predict = functools.partial(tabular.td_lambda, env, policy, lambda n: 0.5 / (1 + n) ** 0.7, 1.0, lam, 30_000)
    values = jax.jit(jax.vmap(lambda key: predict(key)[0]))(jax.random.split(jax.random.key(1), 8))
    np.testing.assert_allclose(values.mean(axis=0), want, atol=0.05)


def test_traces_speed_up_the_random_walk():
    """Figure 12.6: after some ten episodes an intermediate lambda, at its own best step size, beats both ends."""
    process, want = walk()
    env, policy, keys = mdp.environment(process, "walk"), jnp.ones((19, 1)), jax.random.split(jax.random.key(2), 64)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def error(alpha, lam):
        values = jax.vmap(lambda key: tabular.td_lambda(env, policy, alpha, 1.0, lam, 1000, key)[0])(keys)
        return jnp.sqrt(((values - want) ** 2).mean())

    alphas = jnp.array([0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8])
    best = {lam: float(jnp.nanmin(error(alphas, lam))) for lam in (0.0, 0.8, 1.0)}
    assert best[0.8] < 0.9 * best[0.0]
    assert best[0.8] < 0.9 * best[1.0]


def test_monte_carlo_explores_by_the_steps_of_all_episodes():
    """Four episodes of two steps: a rule that changes its mind after four of all steps takes each action in two."""
    process = mdp.from_outcomes([[[(1.0, 1, 0.0, False)]] * 2, [[(1.0, 0, 1.0, True)]] * 2], np.eye(2)[0])
    env = mdp.environment(process, "two")

    def rule(q, visits, step):
        return jax.nn.one_hot(jnp.where(step >= 4, 1, 0), 2)

    table, _ = tabular.monte_carlo(env, rule, 2, 3, 4, 0.5, jax.random.key(0))
    np.testing.assert_array_equal(table.visits, [[2, 2], [2, 2]])


@pytest.mark.parametrize("method", ["sarsa", "td"])
@pytest.mark.parametrize(("terminal", "want"), [(True, [0.375, 0.75]), (False, [0.40625, 0.8125])])
def test_a_new_episode_begins_with_empty_traces(method, terminal, want):
    """Two episodes of two steps by hand, 0 -> 1 and a reward of 1; alpha = discount = 1/2, lambda = 1.

    The first leaves [1/4, 1/2].  In the second only its last step errs: by 1 - 1/2 where the episode has ended, and by
    1 + 1/8 - 1/2 where it is cut at state 0.
    """
    process = mdp.from_outcomes([[[(1.0, 1, 0.0, False)]], [[(1.0, 0, 1.0, terminal)]]], np.eye(2)[0])
    env, key = wrappers.time_limit(mdp.environment(process, "two"), 2), jax.random.key(0)
    if method == "td":
        values, _ = tabular.td_lambda(env, jnp.ones((2, 1)), 0.5, 0.5, 1.0, 4, key)
    else:
        learner = tabular.sarsa(0.5, 0.5, lam=1.0)
        values = tabular.learn(env, learner, exploration.epsilon_greedy(0.0), 2, 4, key)[0].q[:, 0]
    np.testing.assert_allclose(values, want)


def test_monte_carlo_finds_the_optimum():
    lake = gridworlds.frozen_lake(slippery=False)
    env, rule = mdp.environment(lake, "lake"), exploration.epsilon_greedy(0.4)
    control = functools.partial(tabular.monte_carlo, env, rule, 16, 50, 5000, 0.9)
    tables, episodes = jax.jit(jax.vmap(control))(jax.random.split(jax.random.key(0), SEEDS))
    np.testing.assert_array_equal(greedy_return(lake, tables.q), 1.0)
    assert int(episodes.episode_length.max()) <= 50


def test_monte_carlo_takes_the_first_visit():
    """There and back and there again: the first visit's return is 1 + 0.5 + 0.25, not its mean with the later one's."""
    process = mdp.from_outcomes([[[(1.0, 1, 1.0, False)]], [[(1.0, 0, 1.0, False)]]], np.eye(2)[0])
    table, _ = tabular.monte_carlo(
        mdp.environment(process, "two"), exploration.epsilon_greedy(0.0), 2, 3, 2, 0.5, jax.random.key(0)
    )
    np.testing.assert_allclose(table.q[:, 0], [1.75, 1.5])
    np.testing.assert_array_equal(table.visits[:, 0], [2, 2])


def test_rules_by_hand():
    q, n = jnp.array([1.0, 3.0, 3.0, 0.0]), jnp.zeros((), jnp.int32)
    visits = jnp.array([10, 10, 10, 10])
    np.testing.assert_allclose(exploration.epsilon_greedy(0.2)(q, visits, n), [0.05, 0.45, 0.45, 0.05])
    np.testing.assert_allclose(exploration.epsilon_greedy(lambda n: n / 10)(q, visits, n + 10), [0.25] * 4)
    np.testing.assert_allclose(exploration.softmax(0.5)(q, visits, n), np.exp(2 * q) / np.exp(2 * q).sum(), rtol=1e-6)
    np.testing.assert_allclose(exploration.ucb(1.0)(q, jnp.array([5, 0, 9, 0]), n), [0, 0.5, 0, 0.5])
    # log(1010) = 6.92: 1 + 6.92^0.5 = 3.63 against 3 + (6.92 / 1000)^0.5 = 3.08
    np.testing.assert_allclose(exploration.ucb(1.0)(q[:2], jnp.array([1, 1009]), n), [1, 0])


@pytest.mark.parametrize(("make", "value"), [(exploration.epsilon_greedy, 1.5), (exploration.softmax, 0.0)])
def test_a_rule_out_of_range_is_one_line(make, value):
    with pytest.raises(UserError, match=rf"={value}: choose"):
        make(value)
