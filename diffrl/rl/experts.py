"""Actors that others have trained, read from their weights: policies in numpy, for making demonstrations.

What Stable-Baselines3 (Raffin et al., 2021) trains with SAC or TQC is a perceptron with ReLU and two linear heads, a
Gaussian before its squashing:

    h = relu(W_2 relu(W_1 obs + b_1) + b_2),   u ~ N(W_mu h + b_mu, exp(clip(W_s h + b_s, -20, 2))²)

and tanh(u), scaled to the box, is the action.

An archive of them is an .npz with torch's arrays [out, in] under `sac-Hopper-v3/actor.latent_pi.0.weight`, and so on.
"""

import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from diffrl.errors import UserError, nearest

HEAD = re.compile(r"(\w+)-(\w+)-v\d+/actor\.log_std\.weight")  # what tells an actor with two linear heads
LOG_STD = (-20.0, 2.0)  # Stable-Baselines3's bounds


class Layer(NamedTuple):
    """x -> x @ weight + bias: float32 [in, out] and [out]."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x @ self.weight + self.bias


class Actor(NamedTuple):
    """A squashed Gaussian of actions [N, A], given observations [N, S].

    Attributes:
        hidden: layers with ReLU.
        mu, log_std: the heads.
        low, high: both ends of all sides of the box of actions.
    """

    hidden: tuple[Layer, ...]
    mu: Layer
    log_std: Layer
    low: float
    high: float

    def gaussian(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and logarithm of the standard deviation, float32 [N, A] each, before the squashing."""
        h = np.asarray(obs, np.float32)
        for layer in self.hidden:
            h = np.maximum(layer(h), 0)
        return self.mu(h), np.clip(self.log_std(h), *LOG_STD)

    def mean(self, obs: np.ndarray) -> np.ndarray:
        """What the actor does where it is not to explore, float32 [N, A]: the squashed mean, scaled to the box."""
        return self.low + (self.high - self.low) * (np.tanh(self.gaussian(obs)[0]) + 1) / 2


def read(path: str | pathlib.Path, world: str, low: float = -1.0, high: float = 1.0) -> dict[str, Actor]:
    """The actors of an archive for one world, by the algorithm that trained them, as in {"sac": ..., "tqc": ...}.

    Args:
        path: the .npz.
        world: as in hopper or Hopper, without the version.
        low, high: ends of the box of actions, which the archive does not tell; MuJoCo's walkers have -1 and 1.

    Raises:
        UserError: no such file, not an archive of NumPy, or no actor with two linear heads for that world.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no such file: {path}; point at an .npz of actors' weights")
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive")
        with np.load(file) as archive:
            found = [match for match in map(HEAD.fullmatch, archive.files) if match]
            here = {match[1]: match[0].rpartition("actor.")[0] for match in found if match[2].lower() == world.lower()}
            if not here:
                raise _absent(path, world, {match[2] for match in found})
            return {name: _actor(archive, f"{prefix}actor.", low, high) for name, prefix in here.items()}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read actors from {path}: {error}; copy the file again") from error


def _absent(path: str | pathlib.Path, world: str, names: set[str]) -> UserError:
    known = sorted(name.lower() for name in names)
    remedy = nearest(world.lower(), known, f"choose from {', '.join(known) or 'another file'}")
    return UserError(f"{path} has no actor for {world!r}: {remedy}")


def _actor(archive: Mapping[str, np.ndarray], prefix: str, low: float, high: float) -> Actor:
    def layer(name: str) -> Layer:
        weight = np.asarray(archive[f"{prefix}{name}.weight"], np.float32)
        return Layer(np.ascontiguousarray(weight.T), np.asarray(archive[f"{prefix}{name}.bias"], np.float32))

    start, end = f"{prefix}latent_pi.", ".weight"
    numbers = sorted(int(key[len(start) : -len(end)]) for key in archive if key.startswith(start) and key.endswith(end))
    return Actor(tuple(layer(f"latent_pi.{n}") for n in numbers), layer("mu"), layer("log_std"), low, high)
