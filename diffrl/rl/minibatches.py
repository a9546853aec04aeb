"""A rollout as minibatches, each sample once an epoch, shuffled within groups of worlds.

The worlds [N] are dealt into a fixed number of groups and every minibatch takes an equal share of each group.  Samples
therefore never leave the device that holds their group, and what a minibatch holds does not depend on how many
devices there are.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.errors import UserError

Array = jax.Array
GROUPS = 16  # enough for as many devices; more make the shares of a minibatch small


def grouped(tree: Any, groups: int) -> Any:
    """[T, N, ...] -> [G, T N / G, ...]."""

    def one(x: Array) -> Array:
        steps, worlds = x.shape[:2]
        dealt = jnp.moveaxis(x.reshape(steps, groups, worlds // groups, *x.shape[2:]), 1, 0)
        return dealt.reshape(groups, steps * worlds // groups, *x.shape[2:])

    return jax.tree.map(one, tree)


def ungrouped(x: Array, steps: int) -> Array:
    """[G, T N / G, ...] -> [T, N, ...]."""
    groups, size = x.shape[:2]
    back = jnp.moveaxis(x.reshape(groups, steps, size // steps, *x.shape[2:]), 0, 1)
    return back.reshape(steps, -1, *x.shape[2:])


def flat(tree: Any) -> Any:
    """[G, M, ...] -> [G M, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def number_of_groups(worlds: int, per_group: int, minibatches: int, groups: int | None = None) -> int:
    """The most groups, up to GROUPS, that divide `worlds` and leave each minibatch an equal share of each.

    Args:
        per_group: steps of a rollout, so that a group holds per_group * worlds / groups samples.
        groups: the number that the user wants, if any.

    Raises:
        UserError: it cannot be done.
    """
    total = per_group * worlds
    if total % minibatches:
        raise UserError(
            f"{total} samples ({per_group} steps of {worlds} worlds) cannot be cut into {minibatches} minibatches: "
            "choose a number that divides them"
        )
    fits = [g for g in range(1, GROUPS + 1) if worlds % g == 0 and total // minibatches % g == 0]
    if groups is not None and groups not in fits:
        raise UserError(f"groups={groups}: choose from {', '.join(map(str, fits))}")
    # As many devices as possible should divide them, and those come in powers of two.
    return groups or max(fits, key=lambda g: (math.gcd(g, GROUPS), g))


def scan_epochs(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, data: Any, key: Array, epochs: int, minibatches: int
) -> tuple[Any, Any]:
    """step(carry, minibatch [B, ...]) over `epochs` passes: (carry, what step gave beside it [epochs, minibatches]).

    Args:
        data: a tree of [G, M, ...], from `grouped`.
    """
    groups, size = jax.tree.leaves(data)[0].shape[:2]

    def minibatch(carry: Any, index: Array) -> tuple[Any, Any]:
        return step(carry, flat(jax.tree.map(lambda x: jax.vmap(lambda x, i: x[i])(x, index), data)))

    def epoch(carry: Any, key: Array) -> tuple[Any, Any]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(groups))
        order = jax.vmap(lambda key: jnp.argsort(jax.random.bits(key, (size,))))(keys)
        return jax.lax.scan(minibatch, carry, jnp.moveaxis(order.reshape(groups, minibatches, -1), 1, 0))

    return jax.lax.scan(epoch, carry, jax.random.split(key, epochs))
