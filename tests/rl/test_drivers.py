"""Drivers: what a rollout holds, many runs in one, one device and eight, and runs taken up again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rl_worlds import counting, linear, linear_critic, many, noisy

from diffrl.errors import UserError
from diffrl.rl import distributions, driver, evaluation, moments, replay, sum_tree, wrappers
from diffrl.rl.agent import Agent
from diffrl.rl.agents.dqn import dqn
from diffrl.rl.agents.ppo import ppo
from diffrl.rl.environment import Actions
from diffrl.rl.off_policy import off_policy
from diffrl.rl.on_policy import on_policy
from diffrl.train import loop, mesh
from diffrl.train.checkpoint import Checkpoints

WORLDS, UNROLL = 16, 8


def learner(rate=0.05, **settings):
    settings = {"epochs": 2, "minibatches": 2, **settings}
    agent = ppo(linear_critic(3, 2), distributions.categorical(3), optax.adam(rate), **settings)
    return moments.normalised(agent, jax.ShapeDtypeStruct((2,), jnp.float32))


def on(per_shard=driver.whole, **settings):
    return on_policy(many(noisy(), WORLDS), learner(**settings), UNROLL, per_shard)


def off(per_shard=driver.whole):
    agent = dqn(linear(3, 2), Actions(num=3), optax.adam(0.01), epsilon=0.2)
    buffer = replay.prioritised(64, WORLDS // 8, 2, 0.9)
    return off_policy(
        many(noisy(), WORLDS), agent, buffer, batch=32, unroll=4, updates=2, start=128, groups=8, per_shard=per_shard
    )


def windows(per_shard=driver.whole):
    return on(per_shard, advantages="minibatch", window=4)


DRIVERS = pytest.mark.parametrize("make", [on, off], ids=["on_policy", "off_policy"])


def plain(tree):
    """Keys as numbers, everything as numpy."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.device_get(jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree))


def watcher():
    """An agent that keeps the last rollout and does nothing."""

    def act(state, obs, keys):
        return jnp.zeros(obs.shape[0], jnp.int32), {"seen": obs}

    return Agent(lambda key: jnp.zeros(()), act, lambda state, rollout, key: (state, {"rollout": rollout}), None)


def test_rollout_keeps_final_observations():
    run = on_policy(many(counting(limit=3, start=5), 2), watcher(), 7)
    _, told = jax.jit(run.step)(run.init(jax.random.key(0)))
    rollout = told["rollout"]
    np.testing.assert_array_equal(rollout.obs[:, 0, 0], [5, 6, 7, 5, 6, 7, 5])
    np.testing.assert_array_equal(rollout.next_obs[:, 1, 0], [6, 7, 8, 6, 7, 8, 6])
    np.testing.assert_array_equal(rollout.truncated[:, 0], [0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(rollout.info["seen"], rollout.obs)
    assert not rollout.terminated.any()
    assert told["episode_return"] == 3
    assert told["episode_length"] == 3


def test_episode_means_are_carried_forward():
    run = on_policy(many(counting(limit=3), 2), watcher(), 2)
    _, told = jax.jit(lambda x: driver.repeat(run.step, 3)(x, None))(run.init(jax.random.key(0)))
    np.testing.assert_array_equal(told["episode_return"], [np.nan, 3, 3])


def dice():
    """An agent whose actions are uniform numbers, drawn from its noise."""

    def act(state, obs, keys):
        return jax.vmap(lambda key: jax.random.uniform(key, (1,)))(keys), {}

    return watcher()._replace(act=act)


def test_every_action_is_drawn_anew():
    """In two rollouts of five steps of three worlds, and in what fills a buffer before there is anything to learn."""
    env = many(counting()._replace(actions=Actions(shape=(1,))), 3)
    run = on_policy(env, dice(), 5)
    _, told = jax.jit(lambda key: driver.repeat(run.step, 2)(run.init(key), None))(jax.random.key(0))
    assert len(np.unique(told["rollout"].action)) == 2 * 5 * 3
    run = off_policy(env, dice(), replay.uniform(8, 3), batch=3, unroll=2, start=24)
    filled = jax.jit(run.init)(jax.random.key(0)).buffer
    np.testing.assert_array_equal(filled.written, [8])
    assert len(np.unique(filled.kept.action)) == 8 * 3


def test_priorities_go_to_the_transitions_that_they_are_of():
    """Two groups of two worlds: 10 + the observation for what was drawn, and what is new has 1."""

    def update(state, batch, key):
        return state, {"priority": 10 + batch.obs[:, 0]}

    agent, buffer = watcher()._replace(update=update), replay.prioritised(8, 2, alpha=1.0)
    run = off_policy(many(noisy(), 4), agent, buffer, batch=8, unroll=2, start=16, groups=2)
    after = jax.jit(lambda key: run.step(run.init(key))[0])(jax.random.key(0)).buffer
    priority = np.asarray(jax.vmap(sum_tree.get, (0, None))(after.tree, jnp.arange(16)))
    obs = np.asarray(after.ring.kept.obs[..., 0]).reshape(2, 16)
    drawn = priority > 5
    assert (drawn.sum(1) >= 3).all()
    np.testing.assert_allclose(priority[drawn], 10 + obs[drawn], rtol=1e-5)
    np.testing.assert_array_equal(np.unique(priority[~drawn]), [0, 1])  # rows not yet written, and not drawn


@pytest.mark.long
@DRIVERS
def test_jit_equals_no_jit_and_one_scan_equals_single_steps(make):
    run = make()
    first = jax.jit(run.init)(jax.random.key(0))
    scanned, _ = jax.jit(driver.repeat(run.step, 3))(first, None)
    step, single = jax.jit(run.step), first
    for _ in range(3):
        single, _ = step(single)
    for a, b in zip(jax.tree.leaves(plain(scanned)), jax.tree.leaves(plain(single)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@DRIVERS
def test_seeds_are_independent_runs(make):
    """Run i of three is what a driver alone makes from fold_in(key, i)."""
    one, key = make(), jax.random.key(3)
    three = driver.seeds(one, 3)
    population, told = jax.jit(lambda key: three.step(three.init(key)))(key)
    alone, _ = jax.jit(lambda key: one.step(one.init(key)))(jax.random.fold_in(key, 1))
    assert population.step.shape == ()
    assert told["loss"].shape == (3,)
    for a, b in zip(jax.tree.leaves(population.agent), jax.tree.leaves(alone.agent), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5)
    assert not np.allclose(told["loss"][0], told["loss"][1])


def test_hyperparameters_may_be_a_population():
    """Learning rates as a traced array: rate 0 learns nothing, the others what they would learn alone."""
    rates = jnp.array([0.0, 0.01, 0.1])
    population = driver.many(lambda rate: on_policy(many(noisy(), WORLDS), learner(rate), UNROLL), rates)
    run, _ = jax.jit(lambda key: population.step(population.init(key)))(jax.random.key(0))
    start = jax.jit(population.init)(jax.random.key(0)).agent.agent.params["policy"]["w"]
    moved = np.abs(run.agent.agent.params["policy"]["w"] - start).max((1, 2))
    assert moved[0] == 0
    assert 0 < moved[1] < moved[2]


@pytest.mark.parametrize("make", [on, *(pytest.param(make, marks=pytest.mark.long) for make in (off, windows))])
def test_one_device_equals_eight(make):
    """The same worlds bit for bit, the same learning to rounding."""
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        grid = mesh.make_mesh(devices=devices)
        run = driver.seeds(make(mesh.per_shard(grid, WORLDS)), 2)
        state = mesh.place_run(grid, jax.jit(run.init)(jax.random.key(0)), run.axes)
        step = mesh.compile_run(driver.repeat(run.step, 2), grid, run.axes)
        state, told = step(state, None)
        results.append(plain((state, told)))
        assert len(state.world.obs.sharding.device_set) == len(devices)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def over_devices(devices):
    """A population of eight runs, each device with whole ones: (grid, the driver, its compiled step, a fresh run)."""
    grid = mesh.make_mesh(devices=devices)
    run = driver.seeds(on(), 8, mesh.per_shard(grid, 8, "seeds"))
    state = mesh.place_run(grid, jax.jit(run.init)(jax.random.key(0)), run.axes)
    return state, mesh.compile_run(driver.repeat(run.step, 2), grid, run.axes)


def test_devices_with_whole_seeds_equal_one_device():
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        state, step = over_devices(devices)
        state, told = step(state, None)
        assert len(state.agent.agent.params["policy"]["w"].sharding.device_set) == len(devices)
        results.append(plain((state, told)))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_devices_with_whole_seeds_exchange_nothing():
    """But the metrics, which every device is told at the end."""
    state, step = over_devices(jax.devices())
    text = step.lower(state, None).compile().as_text()
    assert "all-reduce" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    told = jax.eval_shape(step, state, None)[1]
    assert 0 < text.count(" all-gather(") <= len(jax.tree.leaves(told))


@pytest.mark.parametrize("settings", [{}, {"advantages": "minibatch", "window": 4}], ids=["samples", "windows"])
def test_eight_devices_exchange_sums_alone(settings):
    """Learning sums gradients over devices; no world, sample or shuffled minibatch travels."""
    grid = mesh.make_mesh()
    run = on(mesh.per_shard(grid, WORLDS), **settings)
    shapes = jax.eval_shape(run.init, jax.random.key(0))
    program = mesh.compile_run(driver.repeat(run.step, 1), grid, run.axes)
    text = program.lower(shapes, None).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


@DRIVERS
def test_resume_is_bit_exact(make, tmp_path):
    """Eight updates, or four, a checkpoint, a new process's worth of objects, and four more."""
    grid = mesh.make_mesh(devices=jax.devices()[:1])

    def train(folder, steps):
        run = make()
        checkpoints = Checkpoints(folder)
        state = mesh.place_run(grid, jax.jit(run.init)(jax.random.key(0)), run.axes)
        state = loop.resume(checkpoints, state)
        step = mesh.compile_run(driver.repeat(run.step, 2), grid, run.axes)
        end = loop.fit(step, state, None, steps=steps, inner=2, checkpoints=checkpoints, progress=False)
        checkpoints.close()
        return plain(end)

    whole = train(tmp_path / "whole", 8)
    train(tmp_path / "parts", 4)
    parts = train(tmp_path / "parts", 8)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_two_purposes_share_a_key():
    """Of six steps, what comes before them, and the seeds that are split from each of these."""
    run = driver.Run(0, jax.random.key(0), None, None, None)
    keys = [driver.key_of(run._replace(step=step), purpose) for step in range(6) for purpose in driver.Purpose]
    keys += [driver.key_before(run.key, purpose) for purpose in driver.Purpose]
    keys += [split for key in keys for split in driver.split_over(key, 6)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


def test_mistakes_are_one_line():
    bare = noisy()
    with pytest.raises(UserError, match=r"wrap it with wrappers\.autoreset"):
        on_policy(bare, learner(), 4)
    wrong = ppo(linear_critic(4, 2), distributions.of(Actions(shape=(2,))), optax.adam(0.1))
    with pytest.raises(UserError, match=r"takes actions integers \(16,\) and the agent gives float32 \(16, 2\)"):
        on_policy(many(bare, WORLDS), wrong, 4)
    with pytest.raises(UserError, match="a rollout of 0 steps"):
        on_policy(many(bare, WORLDS), learner(), 0)
    with pytest.raises(UserError, match="12 worlds cannot be split over 8 devices"):
        mesh.per_shard(mesh.make_mesh(), 12)
    with pytest.raises(UserError, match="12 seeds cannot be split over 8 devices"):
        mesh.per_shard(mesh.make_mesh(), 12, "seeds")
    with pytest.raises(UserError, match="0 seeds"):
        driver.seeds(on(), 0)


def test_evaluation_counts_first_episodes_alone():
    env = many(counting(limit=5), 3)
    agent = watcher()._replace(greedy=lambda state, obs: jnp.zeros(obs.shape[0], jnp.int32))
    seen = jax.jit(evaluation.evaluate(env, agent, 100))(jnp.zeros(()), jax.random.key(0))
    np.testing.assert_array_equal(seen.episode_return, [5, 5, 5])
    np.testing.assert_array_equal(seen.episode_length, [5, 5, 5])
    cut = jax.jit(evaluation.evaluate(env, agent, 3))(jnp.zeros(()), jax.random.key(0))
    assert not cut.done.any()
    states = jax.jit(evaluation.record(counting(limit=5), agent, 8))(jnp.zeros(()), jax.random.key(0))
    np.testing.assert_array_equal(states.obs[:, 0], [0, 1, 2, 3, 4, 5, 5, 5, 5])


def test_evaluation_explores_where_it_should():
    """Two steps that pay what was chosen: greedily nothing, and else what two coins show."""

    def act(state, obs, keys):
        return jax.vmap(jax.random.bernoulli)(keys).astype(jnp.int32), {}

    two = counting(limit=2)
    env = many(two._replace(step=lambda old, action: two.step(old, action)._replace(reward=1.0 * action)), 64)
    agent = watcher()._replace(act=act, greedy=lambda state, obs: jnp.zeros(len(obs), jnp.int32))
    greedy, explored = (
        jax.jit(evaluation.evaluate(env, agent, 9, explore))(jnp.zeros(()), jax.random.key(0)).episode_return
        for explore in (False, True)
    )
    np.testing.assert_array_equal(greedy, np.zeros(64))
    np.testing.assert_array_equal(np.unique(explored), [0, 1, 2])  # 1: the two are not the same coin


def test_evaluation_reports_what_the_monitor_saw():
    """Five rewards of 1; their sum as they arrive, a tenth of them, only where there is no monitor."""
    agent = watcher()._replace(greedy=lambda state, obs: jnp.zeros(len(obs), jnp.int32))
    for inner, want in ((wrappers.monitor(counting(limit=5)), 5.0), (counting(limit=5), 0.5)):
        env = wrappers.vectorize(wrappers.scale_reward(inner, 0.1), 2)
        seen = jax.jit(evaluation.evaluate(env, agent, 9))(jnp.zeros(()), jax.random.key(0))
        np.testing.assert_allclose(seen.episode_return, [want, want], rtol=1e-6)
