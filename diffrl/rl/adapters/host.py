"""Worlds that live outside jax: Gymnasium's (Towers et al., 2024), Atari's, and whatever else steps in Python.

`HostWorld` is one of them, in numpy, with a state of its own: what an asynchronous worker steps.  `vector` makes an
`Environment` of many, which compiled loops call back to, in order.  Such an environment has a past that no array
holds: a run that is restored from a checkpoint has to reset it and does not go on bit for bit, and it cannot be mapped
over seeds.
"""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from diffrl.errors import UserError
from diffrl.rl.adapters import box, not_installed, unknown
from diffrl.rl.environment import Actions, Environment, State

Array = jax.Array


class HostWorld(Protocol):
    """One world with a state of its own; not to be shared by threads.

    Attributes:
        name: as users write it.
        actions, obs: as of an `Environment`.
    """

    name: str
    actions: Actions
    obs: Any

    def reset(self, seed: int | None = None) -> Any:
        """Begins an episode and gives its first observation, in numpy.

        Args:
            seed: begins a new stream of random numbers; None goes on with the present one.
        """
        ...

    def step(self, action: Any) -> tuple[Any, float, bool, bool]:
        """(obs, reward, terminated, truncated), never both of the last two; after either, `reset` has to follow."""
        ...


class _Pure:
    """An `Environment` as a HostWorld."""

    def __init__(self, env: Environment) -> None:
        self.name, self.actions, self.obs = env.name, env.actions, env.obs
        # jit knows a function that it has seen: many worlds of one environment compile once.
        self._reset, self._step = jax.jit(env.reset), jax.jit(env.step)
        self._device = jax.local_devices(backend="cpu")[0]
        self._seed, self._episode = 0, 0
        self._state: State | None = None

    def reset(self, seed: int | None = None) -> Any:
        self._seed, self._episode = (self._seed, self._episode + 1) if seed is None else (seed, 0)
        with jax.default_device(self._device):
            key = jax.random.fold_in(jax.random.key(self._seed), self._episode)
            self._state = self._reset(key)
        return jax.device_get(self._state.obs)

    def step(self, action: Any) -> tuple[Any, float, bool, bool]:
        with jax.default_device(self._device):
            self._state = new = self._step(self._state, np.asarray(action))
        obs, reward, terminated, truncated = jax.device_get((new.obs, new.reward, new.terminated, new.truncated))
        return obs, float(reward), bool(terminated), bool(truncated)


def from_environment(env: Environment) -> HostWorld:
    """One pure world, without automatic resets, as a HostWorld: every step is a compiled call on the CPU."""
    return _Pure(env)


def gymnasium_world(name: str | Callable[[], Any], limit: int | None = None) -> HostWorld:
    """One of Gymnasium's environments; actions beyond a box are clipped, float64 becomes float32.

    Numbered observations become vectors with a 1 in that place: a number would tell a network that 5 lies beside 6.

    Args:
        name: as in CartPole-v1, or a function that makes the environment, wrapped as it should be.
        limit: steps after which an episode is truncated, where the environment has no limit of its own.

    Raises UserError where it or what it needs is not installed, for an unknown name, for actions that are neither
    numbers nor a box with two ends, and for observations that are neither a number nor a box.
    """
    return _Gymnasium(name, limit)


class _Gymnasium:
    """An environment of Gymnasium as a HostWorld."""

    def __init__(self, name: str | Callable[[], Any], limit: int | None) -> None:
        try:
            import gymnasium
        except ModuleNotFoundError as error:
            raise not_installed(error) from error
        try:
            self._env = name() if callable(name) else gymnasium.make(name, disable_env_checker=True)
        except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
            raise unknown("gymnasium", str(name), gymnasium.registry) from error
        except ModuleNotFoundError as error:  # MuJoCo's worlds want imageio, too
            raise not_installed(error) from error
        except gymnasium.error.Error as error:  # a name that is none, or what it depends on is missing
            raise UserError(f"gymnasium cannot make {name}: {' '.join(str(error).split())}") from error
        spec = self._env.spec
        if limit is not None and (spec is None or spec.max_episode_steps is None):
            self._env = gymnasium.wrappers.TimeLimit(self._env, limit)
        self.name = name if isinstance(name, str) else str(spec.id if spec else self._env)
        space, seen = self._env.action_space, self._env.observation_space
        if isinstance(space, gymnasium.spaces.Discrete):
            self.actions, self._first = Actions(num=int(space.n)), int(space.start)
        elif isinstance(space, gymnasium.spaces.Box):
            self.actions, self._first = box(self.name, space.low, space.high), 0
        else:
            raise UserError(f"{self.name} has actions of {space}: wrap it so that they are Discrete or a Box")
        if not isinstance(seen, gymnasium.spaces.Discrete | gymnasium.spaces.Box):
            raise UserError(f"{self.name} has observations of {seen}: wrap it in gymnasium.wrappers.FlattenObservation")
        self._numbers: np.ndarray | None = None
        if isinstance(seen, gymnasium.spaces.Discrete):
            self._numbers = int(seen.start) + np.arange(int(seen.n))
            self.obs = jax.ShapeDtypeStruct(self._numbers.shape, np.dtype(np.float32))
        else:
            self.obs = jax.ShapeDtypeStruct(seen.shape, jax.dtypes.canonicalize_dtype(seen.dtype))

    def reset(self, seed: int | None = None) -> Any:
        return self._seen(self._env.reset(seed=seed)[0])

    def step(self, action: Any) -> tuple[Any, float, bool, bool]:
        if self.actions.num is not None:
            action = int(action) + self._first
        else:
            action = np.clip(np.asarray(action, np.float32), self.actions.low, self.actions.high)
        obs, reward, terminated, truncated, _ = self._env.step(action)
        return self._seen(obs), float(reward), bool(terminated), bool(truncated) and not terminated

    def _seen(self, obs: Any) -> np.ndarray:
        return np.array(obs if self._numbers is None else obs == self._numbers, self.obs.dtype)


def gymnasium_vector(
    name: str | Callable[[], Any], num: int, threads: int = 1, limit: int | None = None
) -> Environment:
    """`num` of Gymnasium's environments that reset themselves (see `vector` and `gymnasium_world`)."""
    return vector(lambda: gymnasium_world(name, limit), num, threads)


def atari(
    game: str, num: int, sticky: float = 0.0, noops: int = 30, life_loss: bool = False, clip: bool = False
) -> Environment:
    """`num` games of the Arcade Learning Environment that reset themselves, one thread a core, as DQN sees them.

    Mnih et al. (2015): an action lasts 4 frames; the larger of the last two, in grey, shrunk to 84 x 84, and four of
    these are an observation, uint8 [84, 84, 4], oldest first, black before the first.  A game begins with 1 to `noops`
    frames without an action, and with a shot where it knows one; it is truncated after 108,000 frames.

    Args:
        game: as in pong or space_invaders; the actions are its minimal set.
        sticky: the probability with which a frame takes the action before once more (Machado et al., 2018: 0.25).
        life_loss: a lost life is a termination, after which the same game goes on.
        clip: rewards become their signs; info["episode_return"] stays in the game's points.

    Raises UserError where ale_py or gymnasium is not installed, for an unknown game, for a probability outside [0, 1],
    and for numbers too small.
    """
    env = _environment(_Games(game, num, sticky, noops, life_loss))
    if not clip:
        return env

    def step(state: State, action: Array) -> State:
        new = env.step(state, action)
        return new._replace(reward=jnp.sign(new.reward))

    return env._replace(step=step)


def atari_world(game: str, sticky: float = 0.0, noops: int = 30, life_loss: bool = False) -> HostWorld:
    """One game (see `atari`), in its points; after a lost life `reset` goes on with the same game.

    Stepping it leaves Python.
    """
    return _Game(_Games(game, 1, sticky, noops, life_loss))


def vector(make: Callable[[], HostWorld], num: int, threads: int = 1) -> Environment:
    """`num` worlds as one Environment that resets itself, as `vectorize(autoreset(monitor(env)), num)` would be.

    A reset's key gives a seed, and world i gets that plus i.  States follow one another: a step from an older state
    than the last one raises an error, because the worlds have left it.

    Args:
        make: -> a world of its own.
        threads: that step worlds at the same time, which helps where they leave Python while they work.

    Raises UserError for less than one world or thread, and when traced with actions of another shape or kind.
    """
    if num < 1 or threads < 1:
        raise UserError(f"{num} worlds in {threads} threads: choose at least 1 of each")
    return _environment(_Many([make() for _ in range(num)], threads))


class _Worlds(Protocol):
    """Some worlds that reset themselves; `actions` and `obs` are those of one."""

    name: str
    num: int
    actions: Actions
    obs: Any

    def reset(self, seed: int) -> Any:
        """First observations [num, ...]."""
        ...

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        """(obs, final_obs, reward, terminated, truncated), [num, ...] each."""
        ...


class _Many:
    """HostWorlds side by side."""

    def __init__(self, worlds: Sequence[HostWorld], threads: int) -> None:
        self._worlds, self.num = worlds, len(worlds)
        self.name, self.actions, self.obs = worlds[0].name, worlds[0].actions, worlds[0].obs
        self._map: Callable = concurrent.futures.ThreadPoolExecutor(threads).map if threads > 1 else map

    def reset(self, seed: int) -> Any:
        return _stack(list(self._map(lambda i: self._worlds[i].reset(seed + i), range(self.num))))

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        def one(i: int) -> tuple[Any, ...]:
            final, reward, terminated, truncated = self._worlds[i].step(actions[i])
            obs = self._worlds[i].reset() if terminated or truncated else final
            return obs, final, np.float32(reward), terminated, truncated

        return tuple(_stack(column) for column in zip(*self._map(one, range(self.num)), strict=True))


class _Games:
    """Atari's games on ALE's own threads."""

    def __init__(self, game: str, num: int, sticky: float, noops: int, life_loss: bool) -> None:
        if num < 1 or noops < 0 or not 0 <= sticky <= 1:
            told = f"{num} games of {game} with noops={noops} and sticky={sticky}"
            raise UserError(f"{told}: choose at least 1 game, at least 0 noops and a probability")
        try:
            import ale_py
            import gymnasium
            from ale_py.vector_env import AtariVectorEnv
        except ModuleNotFoundError as error:
            raise not_installed(error) from error
        games = ale_py.roms.get_all_rom_ids()
        if game not in games:
            raise unknown("ALE", game, games)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._env: Any = AtariVectorEnv(
            game,
            num,
            repeat_action_probability=sticky,
            noop_max=noops,
            life_loss_info=life_loss,
            reward_clipping=False,
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
        )
        self.name, self.num = f"atari:{game}", num
        self.actions = Actions(num=len(self._env.ale.get_action_set()))
        self.obs = jax.ShapeDtypeStruct((84, 84, 4), np.uint8)
        self._frame = np.zeros(num, np.int32)

    def reset(self, seed: int) -> np.ndarray:
        obs, info = self._env.reset(seed=seed)
        self._frame = info["episode_frame_number"].copy()
        return _channels_last(obs)

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        obs, reward, terminated, truncated, info = self._env.step(np.asarray(actions, np.int32))
        began = info["episode_frame_number"] < self._frame  # where alone ALE's final_obs means anything
        self._frame = info["episode_frame_number"].copy()
        obs = final = _channels_last(obs)
        if began.any():
            final = np.where(began[:, None, None, None], _channels_last(info["final_obs"]), obs)
        return obs, final, reward.astype(np.float32), terminated.copy(), truncated & ~terminated


class _Game:
    """One game as a HostWorld: what ALE has already reset waits for `reset`."""

    def __init__(self, games: _Games) -> None:
        self._games = games
        self.name, self.actions, self.obs = games.name, games.actions, games.obs
        self._seed, self._next = 0, None

    def reset(self, seed: int | None = None) -> np.ndarray:
        if seed is None and self._next is not None:
            return self._next
        self._seed, self._next = self._seed + 1 if seed is None else seed, None
        return self._games.reset(self._seed)[0]

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool]:
        obs, final, reward, terminated, truncated = self._games.step(np.array([action]))
        self._next = obs[0] if terminated[0] or truncated[0] else None
        return final[0], float(reward[0]), bool(terminated[0]), bool(truncated[0])


def _channels_last(frames: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(frames, 1, -1))


def _environment(worlds: _Worlds) -> Environment:
    """Worlds behind ordered callbacks; a state's `inner` counts the calls."""
    num = worlds.num
    sums = _Sums(worlds)
    obs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num, *x.shape), x.dtype), worlds.obs)
    numbers = [jax.ShapeDtypeStruct((num,), kind) for kind in (np.float32, bool, bool, np.float32, np.int32)]
    shapes = jax.ShapeDtypeStruct((), np.uint32), obs, obs, *numbers

    def state(told: Any) -> State:
        token, obs, final, reward, terminated, truncated, total, length = told
        info = {"episode_return": total, "episode_length": length, "final_obs": final}
        return State(token, obs, reward, terminated, truncated, info)

    def reset(key: Array) -> State:
        return state(io_callback(sums.reset, shapes, jax.random.bits(key), ordered=True))

    def step(old: State, action: Array) -> State:
        _check(worlds, action)
        return state(io_callback(sums.step, shapes, old.inner, action, ordered=True))

    return Environment(worlds.name, reset, step, worlds.actions, obs)


def _check(worlds: _Worlds, action: Any) -> None:
    wanted = (worlds.num, *worlds.actions.shape)
    discrete = worlds.actions.num is not None
    if jnp.shape(action) != wanted or jnp.issubdtype(jnp.result_type(action), jnp.integer) != discrete:
        raise UserError(
            f"{worlds.name} takes {'integers' if discrete else 'floats'} {wanted} and was given "
            f"{jnp.result_type(action)} {jnp.shape(action)}: make them from env.actions, one for each world"
        )


class _Sums:
    """What compiled loops call: worlds, the sums of their episodes, and where in their past a state belongs."""

    def __init__(self, worlds: _Worlds) -> None:
        self._worlds, self._calls = worlds, 0
        self._return = np.zeros(worlds.num, np.float32)
        self._length = np.zeros(worlds.num, np.int32)
        self._over = np.zeros(worlds.num, bool)

    def reset(self, bits: Any) -> tuple[Any, ...]:
        obs = self._worlds.reset(int(bits) % (2**31 - self._worlds.num))
        self._return[:], self._length[:], self._over[:] = 0, 0, False
        return self._told(obs, obs, np.zeros_like(self._return), self._over, self._over)

    def step(self, token: Any, actions: Any) -> tuple[Any, ...]:
        if int(token) != self._calls:
            raise UserError(f"{self._worlds.name} has gone on from this state and cannot go back: reset it")
        self._return[self._over], self._length[self._over] = 0, 0
        obs, final, reward, terminated, truncated = self._worlds.step(np.asarray(actions))
        self._return += reward
        self._length += 1
        self._over = terminated | truncated
        return self._told(obs, final, reward, terminated, truncated)

    def _told(self, *new: Any) -> tuple[Any, ...]:
        self._calls = (self._calls + 1) % 2**32
        return np.uint32(self._calls), *new, self._return.copy(), self._length.copy()


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
