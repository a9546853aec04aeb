"""Which action to try: rules (q [A], visits [A], step) -> probabilities [A] (Sutton & Barto, 2018, chapter 2).

A rule gives probabilities, not an action, so that expected SARSA can average over the very rule that acts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffrl.errors import UserError

Array = jax.Array
Rule = Callable[[Array, Array, Array], Array]


def best(q: Array) -> Array:
    """Uniform over the best actions: a new table, whose entries are equal, is explored in every direction."""
    among = (q == q.max(axis=-1, keepdims=True)).astype(q.dtype)
    return among / among.sum(axis=-1, keepdims=True)


def epsilon_greedy(epsilon: float | Callable[[Array], ArrayLike]) -> Rule:
    """Any action with probability epsilon (in [0, 1], or a function of the step), else one of the best."""
    if not callable(epsilon) and not 0 <= epsilon <= 1:
        raise UserError(f"epsilon={epsilon}: choose a probability in [0, 1]")

    def rule(q: Array, visits: Array, step: Array) -> Array:
        share = jnp.asarray(epsilon(step) if callable(epsilon) else epsilon)
        return (1 - share) * best(q) + share / q.shape[-1]

    return rule


def softmax(temperature: float) -> Rule:
    """Boltzmann's probabilities, proportional to exp(q / temperature)."""
    if temperature <= 0:
        raise UserError(f"temperature={temperature}: choose one above 0")
    return lambda q, visits, step: jax.nn.softmax(q / temperature)


def ucb(scale: float) -> Rule:
    """The best upper confidence bound q + scale sqrt(log t / n) (Auer et al., 2002); what was never tried comes first.

    t is the number of visits of the state, n that of the action in it.
    """

    def rule(q: Array, visits: Array, step: Array) -> Array:
        total = jnp.maximum(visits.sum(), 1)
        bonus = scale * jnp.sqrt(jnp.log(total) / jnp.maximum(visits, 1))
        return best(jnp.where(visits == 0, jnp.inf, q + bonus))

    return rule
