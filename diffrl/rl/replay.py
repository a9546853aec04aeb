"""Memories of the past from which batches are drawn: uniformly, or the more often the more there was to learn.

A buffer belongs to n worlds in step with one another and is a ring over time: arrays [rows, n, ...].  What is kept of a
transition is its action, reward, two flags, and both observations: next_obs is the next row's obs unless an episode
ended, but then it is the only trace of the last one, and keeping it everywhere is twice the memory and no cases.  A
transition of Atari's takes 56 kB, one of a control task with 17 numbers 150 bytes.

Returns of several steps are formed when a batch is drawn, by walking on from the drawn row until the episode ends:

    reward = sum_{k < m} gamma^k r_{t+k},    discount = gamma^m, or 0 where it terminated,    next_obs = x_{t+m},

m = n_step, or less where the episode ends, in whichever way, before that.  The newest n_step - 1 rows, whose walk would
run into what is not yet known, are not drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffrl.errors import UserError
from diffrl.rl import sum_tree
from diffrl.rl.agent import Transition

Array = jax.Array


class Replay(NamedTuple):
    """A buffer as pure functions of its state, all of which may be mapped over groups of worlds.

    Attributes:
        init: a Transition of one world, shapes and dtypes without leading axes -> an empty state.
        add: (state, rollout [T, n]) -> state; info and world are not kept.
        sample: (state, key, batch) -> Transition [batch], with info of `discount` (see above), `weight` (of importance,
            not normalised: agents divide by the largest of a batch) and `index`.  Before there are n_step rows the
            returns are of fewer steps.
        prioritise: (state, index [batch], priority [batch]) -> state: before anything else is added.
        interrupt: state -> state, where worlds have begun anew unseen: what is newest was the last of its episode, as a
            truncation; returns of several steps would else run on into the next one.
    """

    init: Callable[[Transition], Any]
    add: Callable[[Any, Transition], Any]
    sample: Callable[[Any, Array, int], Transition]
    prioritise: Callable[[Any, Array, Array], Any]
    interrupt: Callable[[Any], Any]


class Ring(NamedTuple):
    """The last rows: a Transition [rows, n, ...], and how many were ever written; row t lies at t modulo rows."""

    kept: Transition
    written: Array


class Prioritised(NamedTuple):
    """ring, sums of priorities to the power of alpha, the largest priority so far, and how often some were updated."""

    ring: Ring
    tree: sum_tree.Tree
    largest: Array
    updates: Array


def uniform(rows: int, worlds: int, n_step: int = 1, discount: ArrayLike = 0.99) -> Replay:
    """The last rows * worlds transitions, each as likely as the other (Lin, 1992; Mnih et al., 2015).

    Args:
        rows: steps of each world.
        discount: gamma.

    Raises:
        UserError: no room for n_step rows, or for a rollout.
    """
    _check(rows, worlds, n_step)

    def sample(ring: Ring, key: Array, batch: int) -> Transition:
        first, second = jax.random.split(key)
        count = jnp.minimum(ring.written, rows)
        ago = jax.random.randint(first, (batch,), n_step, jnp.maximum(count, n_step) + 1)
        world = jax.random.randint(second, (batch,), 0, worlds)
        return _walk(ring, jnp.maximum(ring.written - ago, 0), world, n_step, discount, jnp.ones(batch))

    return Replay(
        lambda example: _empty(example, rows, worlds),
        lambda ring, rollout: _write(ring, rollout, n_step),
        sample,
        lambda ring, index, priority: ring,
        _interrupt,
    )


def prioritised(
    rows: int,
    worlds: int,
    n_step: int = 1,
    discount: ArrayLike = 0.99,
    alpha: ArrayLike = 0.6,
    beta: ArrayLike | Callable[[Array], ArrayLike] = 0.4,
    least: ArrayLike = 1e-6,
) -> Replay:
    """The last rows * worlds transitions, drawn in proportion to priority^alpha (Schaul et al., arXiv:1511.05952).

    New ones have the largest priority so far, 1 at first.  A batch takes one draw from each of as many equal shares of
    the sum; its weights are (N P)^-beta.

    Args:
        rows: steps of each world.
        discount: gamma.
        alpha: 0 is uniform.
        beta: 1 undoes the bias in full; a number, or a function of the updates of priorities so far.
        least: is added to every priority, so that none is 0.

    Raises:
        UserError: no room for n_step rows, or for a rollout.
    """
    _check(rows, worlds, n_step)

    def init(example: Transition) -> Prioritised:
        tree = sum_tree.init(rows * worlds)
        return Prioritised(_empty(example, rows, worlds), tree, jnp.ones(()), jnp.zeros((), jnp.int32))

    def add(state: Prioritised, rollout: Transition) -> Prioritised:
        """The new rows may be drawn from when n_step - 1 others have followed; until then they have priority 0."""
        length, before = rollout.reward.shape[0], state.ring.written
        times = before + jnp.arange(1 - n_step, length)
        drawn = (times >= 0) & (jnp.arange(times.size) < length)
        value = jnp.where(drawn, state.largest**alpha, 0.0)
        index = (times % rows)[:, None] * worlds + jnp.arange(worlds)
        tree = sum_tree.put(state.tree, index.reshape(-1), jnp.repeat(value, worlds))
        return state._replace(ring=_write(state.ring, rollout, n_step), tree=tree)

    def sample(state: Prioritised, key: Array, batch: int) -> Transition:
        ring, whole = state.ring, sum_tree.total(state.tree)
        share = (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
        index = sum_tree.find(state.tree, share * whole)
        count = worlds * (jnp.minimum(ring.written, rows) - n_step + 1)
        likelier = count * sum_tree.get(state.tree, index) / whole  # than by a uniform draw
        power = jnp.asarray(beta(state.updates) if callable(beta) else beta)
        weight = jnp.where(whole > 0, likelier, 1.0) ** -power
        age = (ring.written - 1 - index // worlds) % rows
        return _walk(ring, ring.written - 1 - age, index % worlds, n_step, discount, weight)

    def prioritise(state: Prioritised, index: Array, priority: Array) -> Prioritised:
        tree = sum_tree.put(state.tree, index, (priority + least) ** alpha)
        largest = jnp.maximum(state.largest, priority.max())
        return state._replace(tree=tree, largest=largest, updates=state.updates + 1)

    return Replay(init, add, sample, prioritise, lambda state: state._replace(ring=_interrupt(state.ring)))


def _check(rows: int, worlds: int, n_step: int) -> None:
    for name, value in {"rows": rows, "worlds": worlds, "n_step": n_step}.items():
        if value < 1:
            raise UserError(f"a replay buffer with {name}={value}: choose at least 1")
    if n_step > rows:
        raise UserError(f"returns of {n_step} steps from a buffer of {rows} rows: choose more rows")


def _empty(example: Transition, rows: int, worlds: int) -> Ring:
    kept = example._replace(info={}, world={})
    zeros = jax.tree.map(lambda x: jnp.zeros((rows, worlds, *x.shape), x.dtype), kept)
    return Ring(zeros, jnp.zeros((), jnp.int32))


def _write(ring: Ring, rollout: Transition, n_step: int) -> Ring:
    rows, length = ring.kept.reward.shape[0], rollout.reward.shape[0]
    if length + n_step - 1 > rows:
        raise UserError(
            f"rollouts of {length} steps do not fit into {rows} rows: choose at least {length + n_step - 1}"
        )
    at = (ring.written + jnp.arange(length)) % rows
    kept = jax.tree.map(lambda old, new: old.at[at].set(new), ring.kept, rollout._replace(info={}, world={}))
    return Ring(kept, ring.written + length)


def _interrupt(ring: Ring) -> Ring:
    kept = ring.kept
    last = (ring.written - 1) % kept.truncated.shape[0]
    truncated = kept.truncated.at[last].set(~kept.terminated[last])
    return ring._replace(kept=kept._replace(truncated=truncated))


def _walk(ring: Ring, start: Array, world: Array, n_step: int, discount: ArrayLike, weight: Array) -> Transition:
    """What followed the rows `start` [B] of `world` [B]: up to `n_step` steps, and none beyond an end or the newest."""
    kept, rows = ring.kept, ring.kept.reward.shape[0]
    k = jnp.arange(n_step)[:, None]
    at = (start + k) % rows, world
    ends = kept.terminated[at] | kept.truncated[at] | (start + k >= ring.written - 1)
    taken = jnp.cumsum(ends, axis=0) - ends == 0  # no end before
    reward = jnp.sum(jnp.where(taken, discount**k * kept.reward[at], 0.0), axis=0)
    steps = taken.sum(axis=0)
    first, last = (start % rows, world), ((start + steps - 1) % rows, world)
    terminated = kept.terminated[last]
    info = {
        "discount": jnp.where(terminated, 0.0, jnp.asarray(discount, jnp.float32) ** steps),
        "weight": weight,
        "index": first[0] * kept.reward.shape[1] + world,
    }
    obs, next_obs = (jax.tree.map(lambda x: x[at], x) for x, at in ((kept.obs, first), (kept.next_obs, last)))
    return Transition(obs, kept.action[first], reward, terminated, kept.truncated[last], next_obs, info)
