"""A3C: one worker against A2C's loss and optax's RMSProp, the staleness of many, errors that end it."""

import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rl_worlds import linear_critic, noisy

from diffrl.errors import UserError
from diffrl.rl import asynchronous, distributions, wrappers
from diffrl.rl.adapters import host
from diffrl.rl.agent import Transition
from diffrl.rl.agents import a2c, a3c
from diffrl.rl.asynchronous import RMSProp, Shared

NETWORK, FAMILY = linear_critic(3, 2), distributions.categorical(3)
ENV = wrappers.time_limit(noisy(), 20)


def train(**options):
    options = {"steps": 320, "unroll": 8, "workers": 1} | options
    make = options.pop("make_world", lambda _: host.from_environment(ENV))
    return a3c.train(make, NETWORK, FAMILY, **options)


def test_shared_rmsprop_is_optax():
    """In place and by hand, against the library's transformation."""
    optimizer = RMSProp(learning_rate=0.01, anneal=False, clip_norm=0.5)
    rng = np.random.default_rng(0)
    params = rng.normal(size=7).astype(np.float32)
    shared = Shared(params, np.zeros(7, np.float32), 1)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(0.01, 0.99, 1e-5, eps_in_sqrt=True))
    state, expected = theirs.init(params), jnp.asarray(params)
    for _ in range(5):
        gradient = rng.normal(size=7).astype(np.float32)
        updates, state = theirs.update(jnp.asarray(gradient), state)
        expected = optax.apply_updates(expected, updates)
        shared.apply(0, gradient, optimizer.rate(0.3), optimizer, 1, shared.updates)
    np.testing.assert_allclose(shared.params, expected, rtol=1e-5)
    assert RMSProp(0.01).rate(0.25) == pytest.approx(0.0075)


def test_one_worker_repeats_itself_and_is_never_late():
    first, second = train(), train()
    for a, b in zip(jax.tree.leaves(first.state), jax.tree.leaves(second.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.episodes == second.episodes
    assert first.staleness.max == 0
    assert (int(first.state.steps), int(first.state.updates)) == (320, 40)
    other = train(seed=1)
    assert not np.allclose(other.state.params["policy"]["w"], first.state.params["policy"]["w"])


def test_one_worker_is_a_loop_of_a2c_and_rmsprop():
    """Forty updates in the worker's order, by `a2c.loss` and optax, with only the seed of its stream from A3C."""
    world, seed = host.from_environment(ENV), a3c.stream(0, 0, 0)
    rate = optax.linear_schedule(3e-3, 0.0, 40)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(rate, 0.99, 1e-5, eps_in_sqrt=True))
    sample = jax.jit(lambda params, obs, key: FAMILY.sample(NETWORK.policy(params, obs[None])[0], FAMILY.noise(key)))
    gradient = jax.jit(jax.grad(lambda params, rollout: a2c.loss(params, rollout, NETWORK, FAMILY)[0]))
    start = params = NETWORK.init(jax.random.key(0))
    state, obs, total, episodes = optimizer.init(params), world.reset(seed), 0.0, []
    for n in range(40):
        rows = []
        for t in range(8 * n, 8 * n + 8):
            action = np.asarray(sample(params, obs, jax.random.fold_in(jax.random.key(seed), t)))
            after, reward, terminated, truncated = world.step(action)
            rows.append((obs, action, np.float32(reward), terminated, truncated, after))
            obs, total = after, total + reward
            if terminated or truncated:
                episodes.append((8 * n + 8, total))
                obs, total = world.reset(), 0.0
        columns = [np.stack(column)[:, None] for column in zip(*rows, strict=True)]
        updates, state = optimizer.update(gradient(params, Transition(*columns, {"raw": columns[1]})), state)
        params = optax.apply_updates(params, updates)
    found = train(optimizer=RMSProp(3e-3))
    for a, b, c in zip(*map(jax.tree.leaves, (found.state.params, params, start)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert np.abs(a - c).max() > 1e-3
    assert [steps for steps, _ in found.episodes] == [steps for steps, _ in episodes]
    np.testing.assert_allclose([r for _, r in found.episodes], [r for _, r in episodes], rtol=1e-5)
    assert len(episodes) > 10


class Still:
    """A world that shows always the same and never ends; it keeps what it was given.

    script: (what happens, reward) of the first steps; nothing does in later ones.
    """

    name, actions, obs = ENV.name, ENV.actions, ENV.obs

    def __init__(self, *script):
        self.script, self.seeds, self.acts = iter(script), [], []

    def reset(self, seed=None):
        self.seeds.append(seed)
        return np.zeros(2, np.float32)

    def step(self, action):
        self.acts.append(int(action))
        happens, reward = next(self.script, (lambda: None, 0.0))
        happens()
        return np.zeros(2, np.float32), reward, False, False


def test_no_two_streams_are_alike():
    assert len({a3c.stream(*place) for place in itertools.product(range(3), range(3), (0, 8, 16))}) == 27

    def seeds(**options):
        worlds = [Still(), Still()]
        train(workers=2, steps=8, make_world=worlds.__getitem__, **options)
        return worlds[0].seeds[1:] + worlds[1].seeds  # the first one's first is for compiling

    later = a3c.init(NETWORK, 0)._replace(steps=np.asarray(4))
    used = [*seeds(), *seeds(seed=1), *seeds(start=later)]
    assert len(used) == len(set(used)) == 6


def test_a_stream_is_of_the_world_and_of_the_actions():
    def act(params, obs, key, step):
        action = jax.random.randint(jax.random.fold_in(key, step), (), 0, 10**6)
        return action, action

    worlds = [Still(), Still()]
    for seed, world in enumerate(worlds):
        a3c.Actor(world, act, seed).rollout(np.zeros(1), 4)
    assert [world.seeds for world in worlds] == [[0], [1]]
    assert len({*worlds[0].acts, *worlds[1].acts}) == 8


def test_a_gradient_is_that_of_the_parameters_that_acted():
    """Plain descent on |theta|^2 / 2 at rate 1, the second worker's update within the first one's step.

    Both gradients are the first theta, and -theta remains; a gradient in what had become of it would leave 0.
    """
    begun, updated = threading.Event(), threading.Event()

    def wait():
        begun.set()
        updated.wait(10)

    # The first step of the first world is for compiling; the second one's second shows that its update is done.
    worlds = [Still((lambda: None, 0.0), (wait, 1.0)), Still((lambda: begun.wait(10), 1.0), (updated.set, 0.0))]

    def objective(params, rollout, network, distribution):
        return 0.5 * rollout.reward.mean() * sum(jnp.vdot(x, x) for x in jax.tree.leaves(params)), {}

    descent = RMSProp(learning_rate=1.0, decay=1.0, eps=1.0, anneal=False, clip_norm=np.inf)
    start = a3c.init(NETWORK, 0)
    options = {"workers": 2, "unroll": 1, "steps": 2, "start": start, "optimizer": descent, "objective": objective}
    found = train(make_world=worlds.__getitem__, **options)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, -y, rtol=1e-6), found.state.params, start.params)
    assert found.staleness.max >= 1


def test_workers_are_late_and_none_is_lost():
    found = train(workers=4, steps=1600)
    histogram = found.staleness.histogram
    assert histogram.sum() == int(found.state.updates) == int(found.state.steps) // 8
    assert found.staleness.max >= 1
    assert found.staleness.mean == pytest.approx(np.average(np.arange(len(histogram)), weights=histogram))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.state.params))


def test_goes_on_from_a_state_and_stops_when_told():
    first = train(steps=160)
    second = train(steps=320, start=first.state)
    assert (int(second.state.steps), int(second.state.updates)) == (320, 40)
    stopped = train(steps=10**7, callback=lambda result: True, every=100)
    assert 100 <= int(stopped.state.steps) < 10**6


def test_an_error_in_a_worker_ends_the_run():
    class Broken:
        name, actions, obs = ENV.name, ENV.actions, ENV.obs

        def __init__(self):
            self.inner, self.left = host.from_environment(ENV), 50

        def reset(self, seed=None):
            return self.inner.reset(seed)

        def step(self, action):
            self.left -= 1
            if self.left < 0:
                raise ValueError("the simulator has crashed")
            return self.inner.step(action)

    with pytest.raises(ValueError, match="the simulator has crashed"):
        train(workers=2, steps=10**7, make_world=lambda i: Broken() if i else host.from_environment(ENV))
    with pytest.raises(UserError, match="workers=0"):
        train(workers=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_callback_stops_the_workers(error):
    def callback(result):
        raise error("enough")

    before = threading.active_count()
    with pytest.raises(error, match="enough"):
        train(workers=2, steps=10**7, callback=callback, every=100)
    assert threading.active_count() == before


def test_a_worker_that_hangs_does_not_hang_the_run():
    """Its neighbour's error is raised after no more than the patience."""
    stop, never, began = threading.Event(), threading.Event(), time.monotonic()

    def fail():
        raise ValueError("the simulator has crashed")

    with pytest.raises(ValueError, match="crashed"):
        asynchronous.run([never.wait, fail], stop, lambda: None, patience=0.2)
    assert time.monotonic() - began < 5
    assert stop.is_set()
    never.set()
