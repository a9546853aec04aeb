"""Shuffled samples, and the values that a rollout leads to, evaluated only where they are not known already."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.rl import minibatches as mb
from diffrl.rl.agent import Transition


@pytest.mark.parametrize("size", [1, 2, 7, 128, 20_000])
def test_a_permutation_holds_every_number_once(size):
    order = jax.jit(mb.permutation, static_argnums=1)(jax.random.key(0), size)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    if size > 100:
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.3


def test_permutations_are_uniform():
    """All 24 of four numbers, as often as each other: chi^2 of 23 degrees of freedom, above 49.7 once in a thousand."""
    orders = jax.jit(jax.vmap(lambda key: mb.permutation(key, 4)))(jax.random.split(jax.random.key(1), 24_000))
    counts = np.bincount(np.asarray(orders) @ (1, 4, 16, 64), minlength=256)
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert np.sum((counts - 1000) ** 2 / 1000) < 49.7


def test_an_epoch_holds_every_sample_once_and_in_its_own_order():
    """Three epochs of 2 groups of 16 samples in four minibatches, and a tree's arrays stay together."""
    data = {"x": jnp.arange(32).reshape(2, 16), "y": 100 + jnp.arange(32).reshape(2, 16)}
    scan = jax.jit(lambda key: mb.scan_epochs(lambda n, batch: (n + 1, batch), 0, data, key, 3, 4))
    count, drawn = scan(jax.random.key(0))
    assert count == 12
    assert drawn["x"].shape == (3, 4, 8)
    np.testing.assert_array_equal(drawn["y"], 100 + drawn["x"])
    np.testing.assert_array_equal(np.sort(drawn["x"].reshape(3, 32)), np.tile(np.arange(32), (3, 1)))
    np.testing.assert_array_equal((drawn["x"] < 16).sum(-1), 4)  # an equal share of each group
    orders = drawn["x"].reshape(3, 4, 2, 4).swapaxes(1, 2).reshape(6, 16) % 16  # of each epoch and group
    assert len({*map(tuple, orders.tolist())}) == 6


def rollout_of(terminated, truncated, seed=0):
    """Worlds whose next_obs is the next row's obs but where an episode ended."""
    steps, worlds = terminated.shape
    obs, other = np.random.default_rng(seed).standard_normal((2, steps + 1, worlds, 3)).astype(np.float32)
    done = (terminated | truncated)[..., None]
    next_obs = np.where(done, other[:-1], obs[1:])
    zeros = jnp.zeros((steps, worlds))
    return Transition(obs[:-1], zeros, zeros, jnp.asarray(terminated), jnp.asarray(truncated), jnp.asarray(next_obs))


def value(obs):
    return jnp.sin(obs @ jnp.array([1.0, 2.0, -1.0]))


def check(after, rollout):
    """Equal where there is a future."""
    want = value(rollout.next_obs)
    np.testing.assert_allclose(np.where(rollout.terminated, 0, after), np.where(rollout.terminated, 0, want), atol=1e-6)


def ends(seed, share):
    kind = np.random.default_rng(seed).random((12, 8))
    return kind < share / 2, (kind >= share / 2) & (kind < share)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 2.0], ids=["none", "few", "many", "all truncated or terminated"])
def test_values_after_are_those_of_next_obs(groups, share):
    terminated, truncated = ends(3, share)
    rollout = rollout_of(terminated, truncated)
    after = jax.jit(lambda r: mb.values_after(value, value(r.obs), r, groups))(rollout)
    assert np.isfinite(after).all()
    np.testing.assert_allclose(
        np.where(terminated, 0, after), np.where(terminated, 0, value(rollout.next_obs)), atol=1e-6
    )


def test_values_after_of_a_population():
    """Seeds whose episodes end at different steps need different numbers of rounds."""
    rollouts = [rollout_of(*ends(seed, share), seed) for seed, share in enumerate((0.0, 0.2, 1.9))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *rollouts)
    after = jax.jit(jax.vmap(lambda r: mb.values_after(value, value(r.obs), r, 2)))(stacked)
    for got, rollout in zip(after, rollouts, strict=True):
        check(got, rollout)


def test_a_truncated_rollout_needs_one_round():
    """The work is an eighth of the rollout where only its last row has to be looked at."""
    rounds = []

    def counted(obs):
        jax.debug.callback(lambda n: rounds.append(int(n)), obs.shape[0])
        return value(obs)

    rollout = rollout_of(np.zeros((16, 8), bool), np.zeros((16, 8), bool))
    jax.block_until_ready(jax.jit(lambda r: mb.values_after(counted, value(r.obs), r, 1))(rollout))
    jax.effects_barrier()
    assert rounds == [16]
