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


def windows(tree: Any, size: int) -> Any:
    """[T, N, ...] -> [T / size, N, size, ...]."""

    def one(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(-1, size, *x.shape[1:]), 1, 2)

    return jax.tree.map(one, tree)


def flat(tree: Any) -> Any:
    """[G, M, ...] -> [G M, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def values_after(value: Callable[[Any], Array], v_tm1: Array, rollout: Any, groups: int) -> Array:
    """The values [T, N] of what each step led to, from those of what was acted on, `v_tm1` [T, N].

    Where no episode ended, a step leads to what the next one acts on, whose value is known.  The others, truncated
    steps and the last of the rollout, are gathered and evaluated an eighth of the rollout at a time, until none is
    left: almost always once.  After a termination there is no value, and 0 or whatever the next row has is returned.

    Args:
        value: obs [B, ...] -> [B].
        rollout: a Transition.
        groups: of worlds (see above); nothing is gathered across them.
    """
    steps, worlds = v_tm1.shape
    needed = rollout.truncated.at[-1].set(True) & ~rollout.terminated
    known = jnp.concatenate([v_tm1[1:], jnp.zeros_like(v_tm1[:1])])
    needed, known, obs = grouped((needed, known, rollout.next_obs), groups)
    size = needed.shape[1]
    chunk = max(worlds // groups, -(-size // 8))
    counts = needed.sum(axis=1)
    # Sample i is the rank[i]-th of its group that is needed; what is not goes beyond the end and is dropped.
    rank = jnp.where(needed, jnp.cumsum(needed, axis=1) - 1, size + chunk)
    at = jax.vmap(lambda rank: jnp.zeros(size + chunk, jnp.int32).at[rank].set(jnp.arange(size), mode="drop"))(rank)

    def going(carry: tuple[Array, Array]) -> Array:
        return carry[0] < counts.max()

    def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        done, v_t = carry
        index = jax.lax.dynamic_slice_in_dim(at, done, chunk, axis=1)
        chosen = jax.tree.map(lambda x: jax.vmap(lambda x, i: x[i])(x, index), obs)
        new = value(flat(chosen)).reshape(groups, chunk)
        index = jnp.where(done + jnp.arange(chunk) < counts[:, None], index, size)
        return done + chunk, jax.vmap(lambda v, i, new: v.at[i].set(new, mode="drop"))(v_t, index, new)

    return ungrouped(jax.lax.while_loop(going, body, (jnp.zeros((), counts.dtype), known))[1], steps)


def number_of_groups(
    worlds: int, per_group: int, minibatches: int, groups: int | None = None, unit: str = "steps"
) -> int:
    """The most groups, up to GROUPS, that divide `worlds` and leave each minibatch an equal share of each.

    Args:
        per_group: steps of a rollout, so that a group holds per_group * worlds / groups samples.
        groups: the number that the user wants, if any.
        unit: what messages call the steps.

    Raises:
        UserError: it cannot be done.
    """
    total = per_group * worlds
    if total % minibatches:
        raise UserError(
            f"{total} samples ({per_group} {unit} of {worlds} worlds) cannot be cut into {minibatches} minibatches: "
            "choose a number that divides them"
        )
    fits = [g for g in range(1, GROUPS + 1) if worlds % g == 0 and total // minibatches % g == 0]
    if groups is not None and groups not in fits:
        raise UserError(f"groups={groups}: choose from {', '.join(map(str, fits))}")
    # As many devices as possible should divide them, and those come in powers of two.
    return groups or max(fits, key=lambda g: (math.gcd(g, GROUPS), g))


def permutation(key: Array, size: int) -> Array:
    """The numbers below `size`, shuffled.

    Sorting single numbers is five times as fast on a CPU as sorting pairs, so the number lies in the low bits of what
    is sorted, below random ones; where these are equal (one pair in 2^18 or more), the order stays as it was.
    """
    bits, low = jax.random.bits(key, (size,)), (size - 1).bit_length()
    if low > 14:  # too few random bits would be left
        return jnp.argsort(bits)
    number = jnp.uint32(2**low - 1)
    return (jnp.sort((bits & ~number) | jnp.arange(size, dtype=jnp.uint32)) & number).astype(jnp.int32)


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
        order = jax.vmap(lambda key: permutation(key, size))(keys)
        return jax.lax.scan(minibatch, carry, jnp.moveaxis(order.reshape(groups, minibatches, -1), 1, 0))

    return jax.lax.scan(epoch, carry, jax.random.split(key, epochs))
