"""Learning in a table, one transition at a time (Sutton & Barto, 2018, chapters 5 to 7 and 12).

Every control method here moves q(s, a) towards

    r + discount sum_a' w(a') q(s', a'),     and towards r alone where the step terminated,

and they differ only in the weights w:

    SARSA            the action that will be taken          (Rummery & Niranjan, 1994)
    expected SARSA   the behaviour's probabilities          (van Seijen et al., 2009)
    Q-learning       the best action                        (Watkins, 1989)
    double Q         the best action of the *other* table   (van Hasselt, 2010)

With eligibility traces (lambda > 0) the same error also moves the pairs visited before.  A truncated episode bootstraps
from its last observation; a new episode begins with empty traces.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffrl.errors import UserError
from diffrl.rl import wrappers
from diffrl.rl.environment import Environment
from diffrl.rl.exploration import Rule, best

Array = jax.Array


class Table(NamedTuple):
    """q [S, A] (double Q: [2, S, A]), eligibility traces like q, and visits int32 [S, A]."""

    q: Array
    trace: Array
    visits: Array


class Step(NamedTuple):
    """A transition, and how the behaviour goes on from the state that it led to: an action and its probabilities [A].

    done: whether the episode ended there, in either way.
    """

    state: Array
    action: Array
    reward: Array
    terminated: Array
    next_state: Array
    next_action: Array
    next_probs: Array
    done: Array


class Learner(NamedTuple):
    """init: (states, actions) -> Table.  values: Table -> q [S, A] for the behaviour.  update: (Table, Step, key)."""

    init: Callable[[int, int], Table]
    values: Callable[[Table], Array]
    update: Callable[[Table, Step, Array], Table]


class Episodes(NamedTuple):
    """What ended at each of the steps [T]: whether an episode did, and then its return and length."""

    done: Array
    episode_return: Array
    episode_length: Array


Rate = float | Callable[[Array], ArrayLike]


def _rate(alpha: Rate, visits: Array) -> ArrayLike:
    return alpha(visits) if callable(alpha) else alpha


def _single(
    weights: Callable[[Array, Step], Array], alpha: Rate, discount: float, lam: float, initial: float
) -> Learner:
    """A learner with one table; weights: (q [A] of the next state, Step) -> [A]."""

    def init(states: int, actions: int) -> Table:
        q = jnp.full((states, actions), initial, jnp.float32)
        return Table(q, jnp.zeros_like(q), jnp.zeros(q.shape, jnp.int32))

    def update(table: Table, step: Step, key: Array) -> Table:
        ahead = table.q[step.next_state]
        future = jnp.sum(weights(ahead, step) * ahead)
        here = step.state, step.action
        error = step.reward + discount * jnp.where(step.terminated, 0.0, future) - table.q[here]
        visits = table.visits.at[here].add(1)
        rate = _rate(alpha, visits[here])
        if not lam:
            return Table(table.q.at[here].add(rate * error), table.trace, visits)
        trace = (discount * lam * table.trace).at[here].add(1.0)
        return Table(table.q + rate * error * trace, jnp.where(step.done, 0.0, trace), visits)

    return Learner(init, lambda table: table.q, update)


def sarsa(alpha: Rate, discount: float, lam: float = 0.0, initial: float = 0.0) -> Learner:
    """alpha: the step size, or a function of the number of visits; lam: decay of the (accumulating) traces."""
    return _single(lambda q, step: jax.nn.one_hot(step.next_action, q.shape[-1]), alpha, discount, lam, initial)


def expected_sarsa(alpha: Rate, discount: float, initial: float = 0.0) -> Learner:
    """As SARSA, without the noise of the next action."""
    return _single(lambda q, step: step.next_probs, alpha, discount, 0.0, initial)


def q_learning(alpha: Rate, discount: float, initial: float = 0.0) -> Learner:
    """Learns the optimal values whatever the behaviour, if that tries everything."""
    return _single(lambda q, step: best(q), alpha, discount, 0.0, initial)


def double_q(alpha: Rate, discount: float, initial: float = 0.0) -> Learner:
    """Two tables; a coin says which one is moved, by its own best action at the other one's value."""
    single = _single(lambda q, step: q, alpha, discount, 0.0, initial)

    def init(states: int, actions: int) -> Table:
        one = single.init(states, actions)
        return Table(jnp.stack([one.q, one.q]), jnp.stack([one.trace, one.trace]), one.visits)

    def update(table: Table, step: Step, key: Array) -> Table:
        moved = jax.random.bernoulli(key).astype(jnp.int32)
        ahead = table.q[:, step.next_state]
        future = jnp.sum(best(ahead[moved]) * ahead[1 - moved])
        visits = table.visits.at[step.state, step.action].add(1)
        here = moved, step.state, step.action
        error = step.reward + discount * jnp.where(step.terminated, 0.0, future) - table.q[here]
        rate = _rate(alpha, visits[step.state, step.action])
        return table._replace(q=table.q.at[here].add(rate * error), visits=visits)

    return Learner(init, lambda table: table.q.mean(axis=0), update)


def _numbered(env: Environment) -> int:
    if env.actions.num is None:
        raise UserError(f"{env.name} has vectors as actions: a table needs numbered ones")
    return env.actions.num


def learn(
    env: Environment, learner: Learner, rule: Rule, states: int, steps: int, key: Array
) -> tuple[Table, Episodes]:
    """`steps` steps of acting by `rule` and learning, in one scan; the episodes are reset as they end.

    Args:
        env: with integer observations below `states` and numbered actions.
        key: one key; `jax.vmap` over keys runs many seeds at once.
    """
    world = wrappers.autoreset(wrappers.monitor(env))
    actions = _numbered(env)
    acting, learning, resetting = (jax.random.fold_in(key, purpose) for purpose in range(3))

    def probs(table: Table, state: Array, n: Array) -> Array:
        return rule(learner.values(table)[state], table.visits[state], n)

    def body(carry: Any, n: Array) -> tuple[Any, Episodes]:
        table, state, action = carry
        now = jax.random.fold_in(acting, n)
        new = world.step(state, action)
        final = new.info["final_obs"]
        next_probs = probs(table, final, n)
        next_action = jax.random.categorical(now, jnp.log(next_probs))
        step = Step(state.obs, action, new.reward, new.terminated, final, next_action, next_probs, new.done)
        table = learner.update(table, step, jax.random.fold_in(learning, n))
        first = jax.random.categorical(now, jnp.log(probs(table, new.obs, n)))
        ended = Episodes(new.done, new.info["episode_return"], new.info["episode_length"])
        return (table, new, jnp.where(new.done, first, next_action)), ended

    table: Any = learner.init(states, actions)
    state = world.reset(resetting)
    begin = jax.random.fold_in(acting, steps)
    action = jax.random.categorical(begin, jnp.log(probs(table, state.obs, jnp.zeros((), jnp.int32))))
    start: Any = (table, state, action)
    (table, *_), episodes = jax.lax.scan(body, start, jnp.arange(steps))
    return table, episodes


def monte_carlo(
    env: Environment, rule: Rule, states: int, horizon: int, episodes: int, discount: float, key: Array
) -> tuple[Table, Episodes]:
    """First-visit Monte Carlo control: q(s, a) is the mean return that followed the first (s, a) of an episode.

    An episode that goes on after `horizon` steps is cut there and its later rewards do not count.
    """
    world = wrappers.monitor(wrappers.time_limit(env, horizon))
    actions = _numbered(env)

    def episode(learnt: Any, key: Array) -> tuple[Any, Episodes]:
        table, before = learnt

        def act(carry, n):
            state, over = carry
            p = rule(table.q[state.obs], table.visits[state.obs], before + n)
            action = jax.random.categorical(jax.random.fold_in(key, n), jnp.log(p))
            new = world.step(state, action)
            new = jax.tree.map(lambda old, new: jnp.where(over, old, new), state, new)
            return (new, over | new.done), (state.obs, action, jnp.where(over, 0.0, new.reward), ~over)

        first = world.reset(jax.random.fold_in(key, horizon)), jnp.zeros((), bool)
        (last, _), (state, action, reward, live) = jax.lax.scan(act, first, jnp.arange(horizon))
        returns = jax.lax.associative_scan(
            lambda a, b: (a[0] * b[0], b[1] + b[0] * a[1]), _discounted(discount, reward)
        )[1]
        returns = returns[::-1]
        when = jnp.where(live, jnp.arange(horizon), horizon)
        earliest = jnp.full(table.q.shape, horizon).at[state, action].min(when)
        seen = earliest < horizon
        visits = table.visits + seen
        gained = jnp.where(seen, returns[jnp.minimum(earliest, horizon - 1)] - table.q, 0.0)
        q = table.q + gained / jnp.maximum(visits, 1)
        ended = Episodes(jnp.ones((), bool), last.info["episode_return"], last.info["episode_length"])
        return (Table(q, table.trace, visits), before + live.sum()), ended

    q = jnp.zeros((states, actions))
    empty = Table(q, jnp.zeros_like(q), jnp.zeros(q.shape, jnp.int32))
    start = empty, jnp.zeros((), jnp.int32)
    (table, _), ended = jax.lax.scan(episode, start, jax.random.split(key, episodes))
    return table, ended


def _discounted(discount: float, reward: Array) -> tuple[Array, Array]:
    """The reversed rewards as the affine maps g -> discount g + r, whose composition is the return."""
    return jnp.full(reward.shape, discount), reward[::-1]


def td_lambda(
    env: Environment, policy: Array, alpha: Rate, discount: float, lam: float, steps: int, key: Array
) -> tuple[Array, Array]:
    """Values of a policy, probabilities [S, A], by TD(lambda) with accumulating traces (Sutton, 1988).

    Returns the last values [S] and the values after every step [T, S].
    """
    world = wrappers.autoreset(env)

    def body(carry, n):
        values, trace, visits, state = carry
        action = jax.random.categorical(jax.random.fold_in(key, n), jnp.log(policy[state.obs]))
        new = world.step(state, action)
        future = jnp.where(new.terminated, 0.0, values[new.info["final_obs"]])
        error = new.reward + discount * future - values[state.obs]
        visits = visits.at[state.obs].add(1)
        trace = (discount * lam * trace).at[state.obs].add(1.0)
        values = values + _rate(alpha, visits[state.obs]) * error * trace
        return (values, jnp.where(new.done, 0.0, trace), visits, new), values

    zeros = jnp.zeros(policy.shape[0])
    start = zeros, zeros, zeros.astype(jnp.int32), world.reset(jax.random.fold_in(key, steps))
    (values, *_), history = jax.lax.scan(body, start, jnp.arange(steps))
    return values, history
