"""Returns by hand, against rlax, and across the ends of episodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.rl import returns

NO = np.zeros(3, bool)


def random_rollout(seed, length=12):
    rng = np.random.default_rng(seed)
    v_tm1, r_t, v_t = rng.normal(size=(3, length)).astype(np.float32)
    discount_t = np.where(rng.random(length) < 0.2, 0.0, 0.9).astype(np.float32)
    return {"v_tm1": v_tm1, "r_t": r_t, "discount_t": discount_t, "v_t": v_t, "truncated_t": np.zeros(length, bool)}


def without(rollout, *names):
    return {name: row for name, row in rollout.items() if name not in names}


@pytest.mark.parametrize(
    ("lam", "want"),
    [
        (1.0, [1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 8)), 2 + 0.5 * (3 + 0.5 * 8), 3 + 0.5 * 8]),
        (0.0, [1 + 0.5 * 6, 2 + 0.5 * 7, 3 + 0.5 * 8]),
    ],
)
def test_lambda_returns_by_hand(lam, want):
    r, d, v = jnp.array([1.0, 2.0, 3.0]), jnp.full(3, 0.5), jnp.array([6.0, 7.0, 8.0])
    for run in (returns.lambda_returns, jax.jit(returns.lambda_returns)):
        np.testing.assert_allclose(run(r, d, v, NO, lam), want)


def test_n_step_returns_by_hand():
    r, d, v = jnp.array([1.0, 2.0, 3.0]), jnp.full(3, 0.5), jnp.array([6.0, 7.0, 8.0])
    np.testing.assert_allclose(returns.n_step_returns(r, d, v, NO, 1), [4, 5.5, 7])
    np.testing.assert_allclose(returns.n_step_returns(r, d, v, NO, 2), [1 + 0.5 * 5.5, 2 + 0.5 * 7, 7])
    cut = np.array([False, True, False])
    np.testing.assert_allclose(returns.n_step_returns(r, d, v, cut, 3), [1 + 0.5 * 5.5, 5.5, 7])
    np.testing.assert_allclose(
        returns.n_step_returns(r, d, v, NO, 9), returns.lambda_returns(r, d, v, NO, 1.0), rtol=1e-6
    )
    with pytest.raises(UserError, match="at least 1"):
        returns.n_step_returns(r, d, v, NO, 0)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(3))
def test_against_rlax(seed):
    rlax = pytest.importorskip("rlax", reason="rlax of the [oracles] extra is not installed")
    rollout = random_rollout(seed)
    r, d, v = rollout["r_t"], rollout["discount_t"], rollout["v_t"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    args = without(rollout, "v_tm1")
    close(returns.lambda_returns(**args, lam=0.7), rlax.lambda_returns(r, d, v, 0.7))
    close(returns.n_step_returns(**args, n=4), rlax.n_step_bootstrapped_returns(r, d, v, 4))
    # rlax's GAE takes one row of values; ours is given the same ones.
    values = np.append(rollout["v_tm1"], v[-1:])
    shifted = {**rollout, "v_t": values[1:]}
    advantages, _ = returns.gae(**shifted, lam=0.7)
    close(advantages, rlax.truncated_generalized_advantage_estimation(r, d, 0.7, values))
    rho = np.exp(np.random.default_rng(seed + 9).normal(size=12)).astype(np.float32)
    ours = returns.v_trace(**rollout, log_rho_t=jnp.log(rho), lam=0.9)
    theirs = rlax.vtrace_td_error_and_advantage(rollout["v_tm1"], v, r, d, rho, lambda_=0.9)
    close(ours.targets, theirs.errors + rollout["v_tm1"])
    # With lambda < 1 rlax mixes values into what the advantage bootstraps; the paper does not.
    ours = returns.v_trace(**rollout, log_rho_t=jnp.log(rho))
    theirs = rlax.vtrace_td_error_and_advantage(rollout["v_tm1"], v, r, d, rho, lambda_=1.0)
    np.testing.assert_allclose(ours.advantages, theirs.pg_advantage, rtol=1e-4, atol=1e-4)


ESTIMATORS = {
    "lambda": lambda x: returns.lambda_returns(**without(x, "v_tm1"), lam=0.8),
    "n-step": lambda x: returns.n_step_returns(**without(x, "v_tm1"), n=3),
    "gae": lambda x: returns.gae(**x, lam=0.8)[0],
    "v-trace": lambda x: returns.v_trace(**x, log_rho_t=jnp.sin(x["r_t"]))[0],
    "v-trace advantage": lambda x: returns.v_trace(**x, log_rho_t=jnp.sin(x["r_t"]))[1],
}


@pytest.mark.parametrize("end", ["terminated", "truncated"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_episodes_in_a_row_are_two_episodes(name, end):
    one, two = random_rollout(0), random_rollout(1)
    if end == "terminated":
        one["discount_t"][-1] = 0.0
    joined = {key: np.concatenate([one[key], two[key]]) for key in one}
    if end == "truncated":
        joined["truncated_t"][len(one["r_t"]) - 1] = True
    estimate = ESTIMATORS[name]
    np.testing.assert_allclose(estimate(joined), np.concatenate([estimate(one), estimate(two)]), rtol=1e-5, atol=1e-5)


def test_on_policy_v_trace_is_the_monte_carlo_return():
    rollout = random_rollout(3)
    rollout["v_t"] = np.append(rollout["v_tm1"][1:], rollout["v_t"][-1:])  # then the sum telescopes
    targets = returns.v_trace(**rollout, log_rho_t=jnp.zeros(12)).targets
    want = returns.lambda_returns(**without(rollout, "v_tm1"), lam=1.0)
    np.testing.assert_allclose(targets, want, rtol=1e-5, atol=1e-5)


def test_batches_are_columns():
    rollouts = [random_rollout(seed) for seed in range(3)]
    stacked = {key: np.stack([rollout[key] for rollout in rollouts], axis=1) for key in rollouts[0]}
    for estimate in ESTIMATORS.values():
        want = np.stack([estimate(rollout) for rollout in rollouts], axis=1)
        np.testing.assert_allclose(estimate(stacked), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("terminal", "value"), [(False, 50.0), (True, None)])
def test_a_time_limit_is_not_an_end(terminal, value):
    """Reward 1 for ever, gamma = 0.98, cut every 8 steps: worth 1 / (1 - 0.98) = 50, but not if the cut is an end."""
    length, gamma = 64, 0.98
    cut = jnp.arange(length) % 8 == 7
    discount = jnp.where(cut & terminal, 0.0, gamma)

    def learn(_, v):
        r_t, v_t = jnp.ones(length), jnp.full(length, v)
        targets = returns.lambda_returns(r_t, discount, v_t, cut & (not terminal), 0.95)
        return v + 0.1 * (targets.mean() - v)

    v = jax.jit(lambda: jax.lax.fori_loop(0, 2000, learn, 0.0))()
    if value is None:
        assert float(v) < 10
    else:
        assert float(v) == pytest.approx(value, abs=1.0)
