"""Asynchronous advantage actor-critic (Mnih et al., arXiv:1602.01783): threads, each with a world of its own.

Every worker, over and over,

    copies the shared parameters, acts with the copy for `unroll` steps, takes the gradient of A2C's loss in it,
    and gives that to RMSProp, which changes the shared parameters and statistics in place and without a lock.

Meanwhile other workers have changed the parameters: by how many updates a gradient was late is its *staleness*, which
is counted.  Acting and differentiating are compiled functions that leave Python's lock to others while they compute;
a worker steps one world at a time, so that this is for environments that are slow and live on the host.

The loss is a mean over the rollout where the paper takes a sum, which only changes the learning rate and eps.
"""

import functools
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from diffrl.errors import UserError
from diffrl.rl import asynchronous
from diffrl.rl.adapters.host import HostWorld
from diffrl.rl.agent import ActorCritic, Transition
from diffrl.rl.agents import a2c
from diffrl.rl.asynchronous import RMSProp, Shared, Staleness
from diffrl.rl.distributions import Distribution

Array = jax.Array
Act = Callable[[Any, Any, Array, int], tuple[Array, Array]]
Gradient = Callable[[Any, Transition], tuple[Array, dict[str, Array]]]
Objective = Callable[[Any, Transition, ActorCritic, Distribution], tuple[Array, dict[str, Array]]]


class State(NamedTuple):
    """What a run needs to go on, arrays in numpy.

    The worlds are not part of it: they begin new episodes with new seeds, and the run that goes on is not the one that
    would have been.

    Attributes:
        params: a tree, of the network.
        square: a tree like it, the statistics of RMSProp.
        steps, updates: int64 scalars.
    """

    params: Any
    square: Any
    steps: np.ndarray
    updates: np.ndarray


class Result(NamedTuple):
    """A run so far.

    Attributes:
        state: see there.
        episodes: (steps of all workers, return) where an episode ended, since the start of this call.
        staleness: of this call's updates.
        steps_per_s: environment steps of all workers together.
        metrics: of the loss, in a recent update.
    """

    state: State
    episodes: list[tuple[int, float]]
    staleness: Staleness
    steps_per_s: float
    metrics: dict[str, float]


class Actor:
    """A worker in its world, which goes on from rollout to rollout.

    Attributes:
        episodes: returns of the episodes that the last rollout ended.
    """

    def __init__(self, world: HostWorld, act: Act, seed: int) -> None:
        self._world, self._act, self._key = world, act, jax.random.key(seed)
        self._obs, self._return, self._step = world.reset(seed), 0.0, 0
        self.episodes: list[float] = []

    def rollout(self, params: np.ndarray, length: int) -> Transition:
        """[length, 1], acted with the same flat parameters throughout."""
        self.episodes = []
        on_device = jax.numpy.asarray(params)
        rows = [self._transition(on_device) for _ in range(length)]
        return jax.tree.map(lambda *x: np.stack(x)[:, None], *rows)

    def _transition(self, params: Array) -> Transition:
        obs = self._obs
        action, raw = (np.asarray(x) for x in self._act(params, obs, self._key, self._step))
        self._obs, reward, terminated, truncated = self._world.step(action)
        parts: tuple[Any, ...] = (obs, action, np.float32(reward), terminated, truncated, self._obs, {"raw": raw})
        row = Transition(*parts)
        self._return += reward
        self._step += 1
        if terminated or truncated:
            self.episodes.append(self._return)
            self._obs, self._return = self._world.reset(), 0.0
        return row


def init(network: ActorCritic, seed: int) -> State:
    """A new run."""
    params = jax.tree.map(np.asarray, network.init(jax.random.key(seed)))
    return State(params, jax.tree.map(np.zeros_like, params), np.zeros((), np.int64), np.zeros((), np.int64))


def train(
    make_world: Callable[[int], HostWorld],
    network: ActorCritic,
    distribution: Distribution,
    *,
    steps: int,
    workers: int = 2,
    unroll: int = 20,
    optimizer: RMSProp | None = None,
    objective: Objective = a2c.loss,
    seed: int = 0,
    start: State | None = None,
    callback: Callable[[Result], bool | None] | None = None,
    every: int = 10_000,
    stopping: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains on the CPU until all workers together have made `steps` steps, those before `start` included.

    Args:
        make_world: a worker's number -> its world; called in this thread.
        unroll: steps between two updates of a worker.
        objective: (params, rollout [unroll, 1], network, distribution) -> (loss, metrics): `a2c.loss`, with other
            numbers by functools.partial.
        start: where an earlier run stood.
        callback: called in this thread about every `every` steps; it may save the state, and returning True ends the
            run.
        stopping: asked in this thread ten times a second whether the run is to end.

    Raises:
        UserError: fewer than one worker, step to unroll or step to make.
        Exception: what the first worker to fail has raised; the others are stopped.
    """
    optimizer = RMSProp() if optimizer is None else optimizer
    for name, value in {"workers": workers, "unroll": unroll, "steps": steps}.items():
        if value < 1:
            raise UserError(f"A3C with {name}={value}: choose at least 1")
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        before = init(network, seed) if start is None else start
        (flat, unravel), square = ravel_pytree(before.params), ravel_pytree(before.square)[0]
        shared = Shared(np.asarray(flat), np.asarray(square), workers, int(before.steps), int(before.updates))
        act, gradient = compiled(network, distribution, objective, unravel)
        worlds = [make_world(worker) for worker in range(workers)]
        # Both functions are compiled here, or every thread would; the world then begins anew.
        gradient(shared.params, Actor(worlds[0], act, 0).rollout(shared.params, unroll))
        actors = [Actor(world, act, stream(seed, i, int(before.steps))) for i, world in enumerate(worlds)]
    stop, episodes, recent = threading.Event(), list[tuple[int, float]](), dict[str, Array]()

    def work(worker: int) -> None:
        actor = actors[worker]
        with jax.default_device(cpu):
            while not stop.is_set() and (now := shared.steps) < steps:
                version = shared.updates  # read first: what comes during the copy may be missing from it
                snapshot = shared.params.copy()
                gradients, told = gradient(snapshot, actor.rollout(snapshot, unroll))
                shared.apply(worker, np.asarray(gradients), optimizer.rate(now / steps), optimizer, unroll, version)
                episodes.extend((shared.steps, total) for total in actor.episodes)
                recent.update(told)

    began, told_at = time.perf_counter(), shared.steps

    def so_far() -> Result:
        params, square = (jax.tree.map(np.asarray, unravel(jax.numpy.array(x))) for x in (shared.params, shared.square))
        state = State(params, square, np.asarray(shared.steps), np.asarray(shared.updates))
        speed = (shared.steps - int(before.steps)) / (time.perf_counter() - began)
        metrics = {name: float(value) for name, value in dict(recent).items()}
        return Result(state, list(episodes), shared.staleness(), speed, metrics)

    def watch() -> None:
        nonlocal told_at
        if stopping():
            stop.set()
        elif callback is not None and shared.steps >= told_at + every:
            told_at = shared.steps
            if callback(so_far()):
                stop.set()

    asynchronous.run([functools.partial(work, worker) for worker in range(workers)], stop, watch)
    return so_far()


def compiled(
    network: ActorCritic, distribution: Distribution, objective: Objective, unravel: Callable[[Any], Any]
) -> tuple[Act, Gradient]:
    """(flat params, obs, key, step) -> (action, raw action) of one world, and the gradient of a rollout [T, 1]."""

    def act(flat: Any, obs: Any, key: Array, step: int) -> tuple[Array, Array]:
        outputs = network.policy(unravel(flat), jax.tree.map(lambda x: x[None], obs))[0]
        raw = distribution.sample(outputs, distribution.noise(jax.random.fold_in(key, step)))
        return distribution.action(raw), raw

    def gradient(flat: Any, rollout: Transition) -> tuple[Array, dict[str, Array]]:
        return jax.grad(lambda flat: objective(unravel(flat), rollout, network, distribution), has_aux=True)(flat)

    return jax.jit(act), jax.jit(gradient)


def stream(seed: int, worker: int, steps: int) -> int:
    """The seed of a worker in a run that begins after so many steps; one that goes on sees other episodes."""
    return int(np.random.SeedSequence([seed, worker, steps]).generate_state(1)[0] >> 1)
