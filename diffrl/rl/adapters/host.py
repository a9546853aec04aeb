"""Worlds that live outside jax.

`HostWorld` is one of them, in numpy, with a state of its own: what an asynchronous worker steps.
"""

from typing import Any, Protocol

import jax
import numpy as np

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
