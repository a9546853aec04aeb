"""What the two drivers share: a run as one tree of arrays, the collection of rollouts, and many runs in one program.

A `Driver` is init(key) -> Run and step(run) -> (run, metrics), both pure: `jax.lax.scan` over `step` is a training
loop without a host, `many` and `seeds` make a population of it, and a `Run` that is saved and restored goes on bit for
bit, for it holds the worlds, the buffer and the key as well.  The key never changes; update n draws from
fold_in(key, n), and world i of it from fold_in of that, so that no device count enters.  What comes before the first
update draws from the last number that n could be.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffrl.errors import UserError
from diffrl.rl.agent import Agent, Transition, same
from diffrl.rl.environment import Environment, State

Array = jax.Array
Act = Callable[[Any, Any], tuple[Array, dict[str, Any]]]
BEFORE = 2**32 - 1  # no step of a run, which are counted in int32


class Run(NamedTuple):
    """A whole run.

    Attributes:
        step: int32 scalar, the number of driver's steps done.
        key: a typed key; constant.
        agent: the agent's state.
        world: the State of all worlds [N, ...].
        episode: `episode_return` and `episode_length`, means over what ended in the last step in which anything
            did; NaN before.
        buffer: of an off-policy driver.
    """

    step: Any
    key: Any
    agent: Any
    world: Any
    episode: Any
    buffer: Any = None

    @property
    def params(self) -> Any:
        """What must stay finite."""
        return self.agent


class Driver(NamedTuple):
    """An agent in its environment.

    Attributes:
        init: key -> Run.
        step: run -> (run, metrics), one collection and what is learned from it.
        env_steps: steps of all worlds together in one `step`.
        env_steps_before: the same in `init`.
        axes: a Run whose fields say which axis of their arrays lies along the devices, or None: that which counts the
            worlds, or in a population that is split itself, the runs.
        renew: (run, State of worlds that have just begun) -> the run in these: a restored one's, which no array holds.
    """

    init: Callable[[Array], Run]
    step: Callable[[Run], tuple[Run, dict[str, Array]]]
    env_steps: int
    env_steps_before: int
    axes: Run
    renew: Callable[[Run, State], Run] = lambda run, world: run._replace(world=world)


class PerShard(Protocol):
    """f, axes of its arguments and results -> f on each device's share of them, as `jax.vmap` takes axes."""

    def __call__(self, f: Callable, in_axes: tuple[Any, ...], out_axes: tuple[Any, ...]) -> Callable: ...


class Purpose(enum.IntEnum):
    """Independent streams of random numbers within one step of a driver."""

    ACT = 0
    LEARN = 1
    SAMPLE = 2
    RESET = 3
    INIT = 4
    FILL = 5


def whole(f: Callable, in_axes: tuple[Any, ...], out_axes: tuple[Any, ...]) -> Callable:
    """The `PerShard` of one device: f itself."""
    return f


def collect(
    env: Environment,
    act: Act,
    length: int,
    world: State,
    keys: Array,
    noise: Callable[[Array], Any] = same,
) -> tuple[State, Transition]:
    """`length` steps of n worlds, whose environment resets itself: (the new State, transitions [length, n]).

    Args:
        act: (obs [n, ...], noise [n, ...]) -> (action, info).
        keys: [n].
        noise: of an `Agent`.
    """

    def body(world: State, noise: Any) -> tuple[State, Transition]:
        action, info = act(world.obs, noise)
        new = env.step(world, action)
        told = {name: value for name, value in new.info.items() if name != "final_obs"}
        ends = new.terminated, new.truncated
        return new, Transition(world.obs, action, new.reward, *ends, new.info["final_obs"], info, told)

    return jax.lax.scan(body, world, jax.vmap(lambda t: noise(fold_in(keys, t)))(jnp.arange(length)))


def fold_in(keys: Array, data: Array | int) -> Array:
    """fold_in of the same number into each of keys [n]."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def key_of(run: Run, purpose: Purpose) -> Array:
    """The key of this step for one purpose."""
    return jax.random.fold_in(jax.random.fold_in(run.key, run.step), purpose)


def key_before(key: Array, purpose: Purpose) -> Array:
    """The key of what a run with `key` does before its first step, which is that of no step."""
    return jax.random.fold_in(jax.random.fold_in(key, BEFORE), purpose)


def split_over(key: Array, num: int) -> Array:
    """[num] keys; the i-th does not depend on num."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num))


def start(env: Environment, agent: Agent, key: Array) -> tuple[Any, State]:
    """A new agent and its worlds."""
    first, second = (key_before(key, purpose) for purpose in (Purpose.INIT, Purpose.RESET))
    # A weakly typed leaf would come back from `step` strongly typed, and everything would be compiled twice.
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), (agent.init(first), env.reset(second)))


def no_episode() -> dict[str, Array]:
    return {name: jnp.full((), jnp.nan, jnp.float32) for name in ("episode_return", "episode_length")}


def episodes(rollout: Transition, before: dict[str, Array]) -> dict[str, Array]:
    """Means over the episodes that ended in a rollout, or those of `before` where none did."""
    done = rollout.terminated | rollout.truncated
    count = done.sum()
    return {
        name: jnp.where(count > 0, jnp.sum(rollout.world[name] * done) / jnp.maximum(count, 1), old)
        for name, old in before.items()
    }


def check(env: Environment, agent: Agent) -> int:
    """The number of worlds; raises UserError where the environment is not ready for a driver or the two do not fit."""
    shapes = jax.eval_shape(lambda: start(env, agent, jax.random.key(0)))
    state, world = shapes
    for name, wrapper in {"final_obs": "autoreset", "episode_return": "monitor"}.items():
        if name not in world.info:
            raise UserError(f"{env.name} has no info[{name!r}]: wrap it with wrappers.{wrapper} before a driver")
    if world.reward.ndim != 1:
        raise UserError(f"{env.name} is one world, and a driver wants many: wrap it with wrappers.vectorize")
    num = world.reward.shape[0]
    keys = jax.eval_shape(lambda: split_over(jax.random.key(0), num))
    action, _ = jax.eval_shape(agent.act, state, world.obs, jax.eval_shape(agent.noise, keys))
    wanted = (num, *env.actions.shape)
    integer = jnp.issubdtype(action.dtype, jnp.integer)
    if action.shape != wanted or integer != (env.actions.num is not None):
        takes = f"integers {wanted}" if env.actions.num is not None else f"float32 {wanted}"
        raise UserError(
            f"{env.name} takes actions {takes} and the agent gives {action.dtype} {action.shape}: "
            "make the agent's distribution from env.actions"
        )
    return num


def many(make: Callable[[Any], Driver], values: Any, per_shard: PerShard | None = None) -> Driver:
    """One program of a run for each of `values`: hyperparameters, or nothing but seeds.

    Args:
        make: a value -> its driver; the value is an array or a tree of them, traced, and may enter as any number of
            the agent that is not a shape or a Python condition.
        values: the same with a leading axis [M].
        per_shard: what `train.mesh` makes to give each device whole runs, M / devices of them, where nothing is left
            to exchange; `make` then leaves its worlds alone.  None: devices share the worlds of every run, if `make`
            has it so.

    Run m starts from fold_in(key, m); every array of the Run but `step` gets a leading axis M, and metrics too.
    """
    first = make(jax.tree.map(lambda x: x[0], values))
    num = jax.tree.leaves(values)[0].shape[0]
    axes = Run(None, 0, 0, 0, 0, 0)

    def init(key: Array) -> Run:
        return jax.vmap(lambda value, key: make(value).init(key), out_axes=axes)(values, split_over(key, num))

    def step(run: Run) -> tuple[Run, dict[str, Array]]:
        over = jax.vmap(lambda value, run: make(value).step(run), in_axes=(0, axes), out_axes=(axes, 0))
        return over(values, run) if per_shard is None else per_shard(over, (0, axes), (axes, 0))(values, run)

    inner = Run(*(None if axis is None else axis + 1 for axis in first.axes))
    renew = jax.vmap(first.renew, in_axes=(axes, 0), out_axes=axes)
    return Driver(init, step, first.env_steps, first.env_steps_before, inner if per_shard is None else axes, renew)


def seeds(driver: Driver, num: int, per_shard: PerShard | None = None) -> Driver:
    """`num` independent runs of one driver in one program (see `many`)."""
    if num < 1:
        raise UserError(f"{num} seeds: choose at least 1")
    return many(lambda _: driver, jnp.arange(num), per_shard)


def repeat(step: Callable[[Run], tuple[Run, dict[str, Array]]], times: int) -> Callable[[Run, None], Any]:
    """`times` steps in one scan, (run, None) -> (run, metrics [times, ...]): the form that `train.fit` calls."""
    return lambda run, _: jax.lax.scan(lambda run, _: step(run), run, None, times)
