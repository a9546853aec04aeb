"""Replay buffers against a list of all there was, by hand, and on a world that counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.rl import driver, replay, sum_tree, wrappers
from diffrl.rl.agent import Transition
from diffrl.rl.environment import Actions, Environment, State

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
FLAG = jax.ShapeDtypeStruct((), bool)
EXAMPLE = Transition(SCALAR, jax.ShapeDtypeStruct((), jnp.int32), SCALAR, FLAG, FLAG, SCALAR)


def jitted(buffer):
    sample = jax.jit(buffer.sample, static_argnums=2)
    return buffer._replace(add=jax.jit(buffer.add), sample=sample, prioritise=jax.jit(buffer.prioritise))


BOTH = pytest.mark.parametrize("make", [replay.uniform, replay.prioritised])


def rollout(times, worlds=1, terminated=(), truncated=()):
    """Row t of world w observes 100 w + t and gets 2^t; `terminated` and `truncated` are times."""
    t, w = np.meshgrid(times, np.arange(worlds), indexing="ij")
    obs = jnp.asarray(100 * w + t, jnp.float32)
    ends = (jnp.asarray(np.isin(t, which)) for which in (terminated, truncated))
    reward = jnp.asarray(2.0**t, jnp.float32)
    return Transition(obs, jnp.asarray(t % 3, jnp.int32), reward, *ends, obs + 0.5, {"log_prob": obs}, {"score": obs})


@BOTH
def test_the_ring_keeps_the_last_rows(make):
    buffer = jitted(make(4, 2))
    state = buffer.add(buffer.add(buffer.init(EXAMPLE), rollout([0, 1, 2], 2)), rollout([3, 4, 5], 2))
    kept = getattr(state, "ring", state).kept
    np.testing.assert_array_equal(kept.obs, [[4, 104], [5, 105], [2, 102], [3, 103]])
    np.testing.assert_array_equal(kept.next_obs, kept.obs + 0.5)
    np.testing.assert_array_equal(kept.action, [[1, 1], [2, 2], [2, 2], [0, 0]])
    assert (kept.info, kept.world) == ({}, {})
    drawn = buffer.sample(state, jax.random.key(0), 400)
    assert set(np.asarray(drawn.obs)) == {2, 3, 4, 5, 102, 103, 104, 105}
    np.testing.assert_array_equal(drawn.next_obs, drawn.obs + 0.5)
    np.testing.assert_array_equal(drawn.reward, 2 ** (drawn.obs % 100))


@BOTH
@pytest.mark.parametrize(
    ("ends", "want"),
    [
        # Six rows 2 ... 7 are left of eight; three steps at gamma = 1/2.  start: (reward, discount, where it led)
        ({}, {2: (12, 0.125, 4.5), 3: (24, 0.125, 5.5), 4: (48, 0.125, 6.5), 5: (96, 0.125, 7.5)}),
        (
            {"terminated": [4]},
            {2: (12, 0, 4.5), 3: (16, 0, 4.5), 4: (16, 0, 4.5), 5: (96, 0.125, 7.5)},
        ),
        (
            {"truncated": [3], "terminated": [7]},
            {2: (8, 0.25, 3.5), 3: (8, 0.5, 3.5), 4: (48, 0.125, 6.5), 5: (96, 0, 7.5)},
        ),
    ],
    ids=["on and on", "terminated", "truncated"],
)
def test_three_steps_by_hand(make, ends, want):
    buffer = jitted(make(6, 1, n_step=3, discount=0.5))
    state = buffer.init(EXAMPLE)
    for times in ([0, 1], [2, 3], [4, 5], [6, 7]):
        state = buffer.add(state, rollout(times, **ends))
    drawn = buffer.sample(state, jax.random.key(0), 64)
    got = {}
    for row in zip(drawn.obs, drawn.reward, drawn.info["discount"], drawn.next_obs, strict=True):
        start, *rest = (float(x) for x in row)
        assert got.setdefault(start, tuple(rest)) == tuple(rest)
    assert got == want
    last = np.asarray(drawn.next_obs) // 1
    np.testing.assert_array_equal(drawn.terminated, np.isin(last, ends.get("terminated", [])))
    np.testing.assert_array_equal(drawn.truncated, np.isin(last, ends.get("truncated", [])))


@BOTH
def test_returns_end_where_the_worlds_began_anew(make):
    """A restored run resets worlds of the host: rows before that know nothing of the new episodes."""
    buffer = jitted(make(6, 2, n_step=3, discount=0.5))
    state = buffer.add(buffer.init(EXAMPLE), rollout([0, 1, 2], 2))
    state = buffer.add(buffer.interrupt(state), rollout([4, 5], 2))
    drawn = buffer.sample(state, jax.random.key(0), 400)
    led = dict(zip(np.asarray(drawn.obs).tolist(), np.asarray(drawn.next_obs).tolist(), strict=True))
    assert led == {0: 2.5, 1: 2.5, 2: 2.5, 100: 102.5, 101: 102.5, 102: 102.5}
    np.testing.assert_array_equal(drawn.info["discount"], 0.5 ** (3 - drawn.obs % 100))
    np.testing.assert_array_equal(drawn.terminated, False)


@BOTH
def test_fewer_rows_than_steps_are_shorter_returns(make):
    buffer = jitted(make(6, 1, n_step=4, discount=0.5))
    state = buffer.add(buffer.init(EXAMPLE), rollout([0, 1]))
    drawn = buffer.sample(state, jax.random.key(0), 3)
    np.testing.assert_array_equal(drawn.reward, [2, 2, 2])
    np.testing.assert_array_equal(drawn.info["discount"], [0.25] * 3)
    np.testing.assert_array_equal(drawn.info["weight"], [1, 1, 1])


def walker():
    """Observes [the episode's random name, step]; the n-th step pays n; terminates after 2 to 9 steps by its name."""

    def made(name, n):
        obs = jnp.stack([name, n]).astype(jnp.float32)
        return State((name, n), obs, n.astype(jnp.float32), n >= 2 + name % 8, jnp.zeros((), bool))

    def reset(key):
        return made(jax.random.randint(key, (), 0, 1_000_000), jnp.int32(0))

    def step(state, action):
        return made(state.inner[0], state.inner[1] + 1)

    return Environment("walker", reset, step, Actions(num=2), jax.ShapeDtypeStruct((2,), jnp.float32))


@BOTH
@pytest.mark.parametrize(("n_step", "unroll"), [(1, 3), (4, 5), (5, 1)])
def test_batches_stay_within_episodes(make, n_step, unroll):
    """Two groups of three worlds, cut after six steps, in a ring of 17 rows that is overrun several times."""
    groups, worlds, rows, limit, gamma = 2, 3, 17, 6, 0.5
    env = wrappers.vectorize(wrappers.autoreset(wrappers.time_limit(walker(), limit)), groups * worlds)
    buffer = make(rows, worlds, n_step, gamma)
    example = EXAMPLE._replace(obs=env.obs.update(shape=(2,)), next_obs=env.obs.update(shape=(2,)))

    def act(obs, keys):
        return jnp.zeros(len(obs), jnp.int32), {}

    def body(carry, key):
        world, state = carry
        world, new = driver.collect(env, act, unroll, world, jax.random.split(key, groups * worlds))
        dealt = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(unroll, groups, worlds, *x.shape[2:]), 1, 0), new)
        state = jax.vmap(buffer.add)(state, dealt)
        drawn = jax.vmap(lambda state, key: buffer.sample(state, key, 32))(state, jax.random.split(key, groups))
        state = jax.vmap(buffer.prioritise)(state, drawn.info["index"], jnp.abs(drawn.reward))
        return (world, state), drawn

    state = jax.vmap(lambda _: buffer.init(example))(jnp.arange(groups))
    keys = jax.random.split(jax.random.key(1), 90 // unroll)
    drawn = jax.jit(lambda: jax.lax.scan(body, (env.reset(jax.random.key(0)), state), keys)[1])()
    drawn = jax.tree.map(lambda x: np.asarray(x[8:]).reshape(-1, *x.shape[3:]), drawn)  # n_step rows are in by then
    name, first, last = drawn.obs[:, 0], drawn.obs[:, 1], drawn.next_obs[:, 1]
    np.testing.assert_array_equal(drawn.next_obs[:, 0], name)
    end = np.minimum(limit, 2 + name % 8)
    np.testing.assert_array_equal(last, np.minimum(first + n_step, end))
    np.testing.assert_array_equal(drawn.terminated, (last == end) & (end == 2 + name % 8))
    np.testing.assert_array_equal(drawn.truncated, (last == end) & (end != 2 + name % 8))
    pay = sum(np.where(first + k < last, gamma**k * (first + k + 1), 0) for k in range(n_step))
    np.testing.assert_allclose(drawn.reward, pay, rtol=1e-6)
    np.testing.assert_allclose(drawn.info["discount"], np.where(drawn.terminated, 0, gamma ** (last - first)))
    assert {*zip(drawn.terminated, drawn.truncated, strict=True)} == {(False, False), (True, False), (False, True)}


def test_uniform_draws_are_uniform():
    buffer = jitted(replay.uniform(5, 3, n_step=2))
    state = buffer.add(buffer.init(EXAMPLE), rollout([-1, 0, 1, 2], 3))
    drawn = buffer.sample(buffer.add(state, rollout([3, 4, 5, 6], 3)), jax.random.key(0), 12_000)
    names, counts = np.unique(drawn.obs, return_counts=True)
    np.testing.assert_array_equal(names, [t + 100 * w for w in range(3) for t in (2, 3, 4, 5)])
    assert np.abs(counts - 1000).max() < 3.5 * (12_000 * (1 / 12) * (11 / 12)) ** 0.5
    np.testing.assert_array_equal(drawn.info["weight"], 1.0)


def test_priorities_are_frequencies_and_weights_undo_them():
    """A batch has one draw per equal share: no count is further than 2 from what is expected."""
    buffer = jitted(replay.prioritised(4, 2, alpha=0.5, beta=lambda n: jnp.where(n < 1, 0.4, 1.0), least=0.0))
    state = buffer.init(EXAMPLE)
    for t in range(4):
        state = buffer.add(state, rollout([t], 2))
    even = buffer.sample(state, jax.random.key(0), 5600)
    np.testing.assert_array_equal(np.unique(even.obs, return_counts=True)[1], 700)
    np.testing.assert_allclose(even.info["weight"], 1.0, rtol=1e-6)
    priority = jnp.array([1.0, 4.0, 9.0, 16.0, 25.0, 36.0, 49.0, 0.0])  # their roots sum to 28
    state = buffer.prioritise(state, jnp.arange(8), priority)
    prob = np.sqrt(priority) / 28
    for key in range(3):
        drawn = buffer.sample(state, jax.random.key(key), 5600)
        index = np.asarray(drawn.info["index"])
        assert np.abs(np.bincount(index, minlength=8) - 5600 * prob).max() <= 2
        np.testing.assert_array_equal(drawn.obs, index // 2 + 100 * (index % 2))
        np.testing.assert_allclose(drawn.info["weight"], 1 / (8 * prob[index]), rtol=1e-4)
    # What is new takes the place of the oldest and the largest priority that there was, 49.
    state = buffer.add(state, rollout([4], 2))
    drawn = buffer.sample(state, jax.random.key(0), 5600)
    want = 5600 / 39 * np.array([7, 7, 3, 4, 5, 6, 7])
    assert np.abs(np.bincount(drawn.info["index"]) - want).max() <= 2


def test_least_is_added_to_every_priority():
    """0, 1 and 3 are drawn as 1, 2 and 4; where all are 0, each as often as the others."""
    buffer = jitted(replay.prioritised(3, 1, alpha=1.0, least=1.0))
    state = buffer.add(buffer.init(EXAMPLE), rollout([0, 1, 2]))
    state = buffer.prioritise(state, jnp.arange(3), jnp.array([0.0, 1.0, 3.0]))
    drawn = buffer.sample(state, jax.random.key(0), 700)
    np.testing.assert_allclose(np.bincount(drawn.info["index"]), [100, 200, 400], atol=2)
    buffer = jitted(replay.prioritised(3, 1))
    state = buffer.add(buffer.init(EXAMPLE), rollout([0, 1, 2]))
    drawn = buffer.sample(buffer.prioritise(state, jnp.arange(3), jnp.zeros(3)), jax.random.key(0), 300)
    np.testing.assert_allclose(np.bincount(drawn.info["index"]), [100, 100, 100], atol=2)
    np.testing.assert_allclose(drawn.info["weight"], 1.0, rtol=1e-5)


def test_rows_that_are_too_new_are_not_drawn():
    buffer = jitted(replay.prioritised(6, 1, n_step=3))
    state = buffer.init(EXAMPLE)
    for t in range(20):
        state = buffer.add(state, rollout([t]))
        if t >= 2:
            drawn = buffer.sample(state, jax.random.key(t), 64)
            assert {*map(int, drawn.obs)} == {*range(max(0, t - 5), t - 1)}
            if t < 6:  # as likely as by uniform draws, full or not
                np.testing.assert_allclose(drawn.info["weight"], 1.0, rtol=1e-6)
                continue
            state = buffer.prioritise(state, drawn.info["index"], 1 + drawn.obs % 2)


@BOTH
def test_groups_are_a_vmap(make):
    buffer = make(6, 2, n_step=2)

    def run(x, key):
        state = buffer.add(buffer.add(buffer.init(EXAMPLE), x), x)
        state = buffer.prioritise(state, jnp.arange(6), x.obs[0, 0] + jnp.arange(6.0))
        return buffer.sample(state, key, 5)

    rollouts = [rollout(range(t, t + 4), 2) for t in (0, 10, 20)]
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *rollouts), keys)
    one = jax.jit(run)
    for i in range(3):
        pairs = zip(jax.tree.leaves(many), jax.tree.leaves(one(rollouts[i], keys[i])), strict=True)
        for got, want in pairs:
            np.testing.assert_allclose(got[i], want, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 8, 9, 1000])
def test_sums_and_finds(size):
    rng = np.random.default_rng(size)
    values = np.zeros(size, np.float32)
    tree = sum_tree.init(size)
    put, find = jax.jit(sum_tree.put), jax.jit(sum_tree.find)
    for _ in range(5):
        index = rng.choice(size, min(size, 300), replace=False)
        values[index] = rng.integers(0, 5, index.size)  # whole numbers: sums are exact
        tree = put(tree, jnp.asarray(index), jnp.asarray(values[index]))
        assert float(sum_tree.total(tree)) == values.sum()
        np.testing.assert_array_equal(sum_tree.get(tree, jnp.arange(size)), values)
    mass = np.arange(values.sum()) + np.float32(0.5)
    np.testing.assert_array_equal(find(tree, jnp.asarray(mass)), np.repeat(np.arange(size), values.astype(int)))


def test_nothing_without_a_number_is_found():
    """Also where rounding leads beyond the last, and on numbers of all magnitudes."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random(500) < 0.5, 0, 10.0 ** rng.uniform(-8, 4, 500)).astype(np.float32)
    values[0] = 0
    tree = sum_tree.put(sum_tree.init(500), jnp.arange(500), jnp.asarray(values))
    mass = sum_tree.total(tree) * jnp.append(
        jax.random.uniform(jax.random.key(0), (10_000,)), jnp.array([0.0, 1.0, 1.1])
    )
    assert values[sum_tree.find(tree, mass)].min() > 0


def test_given_twice_the_larger_stands():
    tree = sum_tree.put(sum_tree.init(20), jnp.array([3, 7]), jnp.array([9.0, 1.0]))
    tree = sum_tree.put(tree, jnp.array([3, 3, 3, 5]), jnp.array([1.0, 4.0, 2.0, 0.5]))
    np.testing.assert_array_equal(sum_tree.get(tree, jnp.array([3, 5, 7])), [4.0, 0.5, 1.0])
    assert float(sum_tree.total(tree)) == 5.5


@BOTH
def test_what_does_not_fit_is_one_line(make):
    for args, match in (((0, 1), "rows=0"), ((4, 0), "worlds=0"), ((4, 1, 0), "n_step=0"), ((4, 1, 5), "5 steps")):
        with pytest.raises(UserError, match=match):
            make(*args)
    buffer = make(4, 1, 2)
    with pytest.raises(UserError, match="rollouts of 4 steps do not fit into 4 rows: choose at least 5"):
        buffer.add(buffer.init(EXAMPLE), rollout([0, 1, 2, 3]))
