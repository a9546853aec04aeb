"""Exact solutions of a finite Markov decision process (Bellman, 1957; Howard, 1960; Sutton & Barto, 2018, chapter 4).

    evaluation        v(s) = sum_a pi(a | s) q(s, a),    q(s, a) = E[r + discount v(s')]
    value iteration   v(s) = max_a q(s, a)
    policy iteration  evaluate pi, then let it be greedy with respect to q, until it stays

Each is one `lax.while_loop`: it compiles once, and runs under vmap over processes or discounts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffrl.rl.mdp import MDP, backup

Array = jax.Array


class Solution(NamedTuple):
    """values [S], q [S, A] of them, the greedy policy int32 [S], and how many sweeps (or improvements) it took."""

    values: Array
    q: Array
    policy: Array
    sweeps: Array


def greedy(q: Array) -> Array:
    """The first of the best actions: q [..., A] -> int32 [...]."""
    return jnp.argmax(q, axis=-1).astype(jnp.int32)


def evaluate(mdp: MDP, policy: Array, discount: float, tolerance: float = 1e-6, limit: int = 100_000) -> Array:
    """v [S] of a policy, probabilities [S, A], by sweeps until no value moves by more than `tolerance`.

    With discount = 1 every policy that is evaluated must end its episodes; `limit` bounds the sweeps of one that does
    not.
    """

    return _sweep(lambda v: jnp.sum(policy * backup(mdp, v, discount), axis=-1), mdp, tolerance, limit)[0]


def value_iteration(mdp: MDP, discount: float, tolerance: float = 1e-6, limit: int = 100_000) -> Solution:
    """The optimal values, to about tolerance / (1 - discount); at discount = 1 to where the sweeps stop moving."""

    values, count = _sweep(lambda v: jnp.max(backup(mdp, v, discount), axis=-1), mdp, tolerance, limit)
    q = backup(mdp, values, discount)
    return Solution(values, q, greedy(q), count)


def policy_iteration(mdp: MDP, discount: float, tolerance: float = 1e-6, limit: int = 1000) -> Solution:
    """The optimal values by alternating evaluation and improvement, from the policy that is greedy for v = 0.

    An action is only exchanged for one that is better by more than `tolerance`, so that ties do not cycle.
    """
    states, actions = mdp.reward.shape[:2]

    def improve(loop: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        policy, _, count = loop
        # Evaluated more finely than it is compared, or the error of the sweeps would pass for an improvement.
        q = backup(mdp, evaluate(mdp, jax.nn.one_hot(policy, actions), discount, 0.1 * tolerance), discount)
        better = q.max(axis=-1) > q[jnp.arange(states), policy] + tolerance
        new = jnp.where(better, greedy(q), policy)
        return new, jnp.any(better), count + 1

    def go_on(loop: tuple[Array, Array, Array]) -> Array:
        return loop[1] & (loop[2] < limit)

    start = greedy(backup(mdp, jnp.zeros(states), discount)), jnp.ones((), bool), jnp.zeros((), jnp.int32)
    policy, _, count = jax.lax.while_loop(go_on, improve, start)
    values = evaluate(mdp, jax.nn.one_hot(policy, actions), discount, 0.1 * tolerance)
    return Solution(values, backup(mdp, values, discount), policy, count)


def _sweep(update: Callable[[Array], Array], mdp: MDP, tolerance: float, limit: int) -> tuple[Array, Array]:
    """values -> update(values) from 0 until none moves by more than `tolerance`; and how often."""

    def body(loop: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, _, count = loop
        new = update(values)
        return new, jnp.max(jnp.abs(new - values)), count + 1

    start = jnp.zeros(mdp.reward.shape[0]), jnp.full((), jnp.inf), jnp.zeros((), jnp.int32)
    values, _, count = jax.lax.while_loop(lambda loop: (loop[1] > tolerance) & (loop[2] < limit), body, start)
    return values, count
