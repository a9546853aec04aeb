"""HalfCheetah, Hopper and Walker2d of Gymnasium on the host: policies rolled out, and demonstrations made of them.

D4RL's sets (Fu et al., 2020, https://arxiv.org/abs/2004.07219) are not these: `made` imitates the mean scores of its
medium, medium-replay and expert ones with a trained actor and noise on its actions, in version 5 of the environments
where D4RL has version 2.  Name results on them as on our own sets.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from diffrl.errors import UserError
from diffrl.rl import experts
from diffrl.rl.adapters import host, not_installed, unknown
from diffrl.rl.demonstrations import Demonstrations

STEPS = 1000  # of an episode, unless the walker falls before

Policy = Callable[[np.ndarray], np.ndarray]  # observations [N, S] -> actions [N, A]


class World(NamedTuple):
    """An environment of Gymnasium, the returns that D4RL scores as 0 (random) and 100 (its expert), and its sizes."""

    id: str
    random: float
    expert: float
    observations: int
    actions: int


WORLDS = {  # fields of `World`
    "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0, 17, 6),
    "hopper": ("Hopper-v5", -20.272305, 3234.3, 11, 3),
    "walker2d": ("Walker2d-v5", 1.629008, 4592.3, 17, 6),
}


class Quality(NamedTuple):
    """How a set is made.

    Attributes:
        noise: standard deviations of what is added to the actor's actions; each episode draws one of them.
        score: mean over episodes of the normalised score that came of it, with seed 0.
        episodes: that were measured.
    """

    noise: tuple[float, ...]
    score: float
    episodes: int


# D4RL's means over trajectories are about 42, 44 and 62 (medium) and 27, 15 and 15 (medium-replay).
QUALITIES: dict[tuple[str, str], tuple[tuple[float, ...], float, int]] = {  # fields of `Quality`
    ("halfcheetah", "medium"): ((0.4, 0.45, 0.5), 40.1, 60),
    ("halfcheetah", "medium_replay"): ((0.4, 0.45, 0.5, 0.5, 0.6, 0.8, 1.2, 2.0), 26.6, 60),
    ("halfcheetah", "expert"): ((0.0,), 100.1, 16),
    ("hopper", "medium"): ((0.1, 0.2, 0.3), 42.2, 151),
    ("hopper", "medium_replay"): ((0.2, 0.4, 0.6, 0.8, 1.2, 1.6, 2.0, 2.0), 15.1, 203),
    ("hopper", "expert"): ((0.0,), 99.3, 56),
    ("walker2d", "medium"): ((0.2, 0.3, 0.35), 62.1, 85),
    ("walker2d", "medium_replay"): ((0.3, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0, 2.0), 13.1, 133),
    ("walker2d", "expert"): ((0.0,), 97.7, 24),
}


def made(world: str, quality: str, actors: str | pathlib.Path, transitions: int, seed: int = 0) -> Demonstrations:
    """A set of our own, by the archive's TQC actor with the noise of `QUALITIES`.

    Args:
        world: one of `WORLDS`.
        quality: medium, medium_replay or expert.
        actors: path of the archive (see `experts.read`).
        transitions: how many, N.

    Raises:
        UserError: unknown names, no transitions, no archive or no actor in it, gymnasium or mujoco absent.
    """
    noise = _quality(world, quality).noise
    trained = experts.read(actors, world)
    if "tqc" not in trained:
        raise UserError(f"{actors} has no TQC actor for {world}, only {', '.join(trained)}: add one")
    return roll_out(world, trained["tqc"].mean, transitions, noise, seed)


def facts(world: str, quality: str, seed: int) -> dict[str, str | int]:
    """How a set was made, in words, to be kept with it (`data.trajectories.save`).

    Raises UserError for unknown names.
    """
    noise = ", ".join(f"{scale:g}" for scale in _quality(world, quality).noise)
    return {
        "name": f"ours-{world}-{quality}",
        "origin": f"made by diffrl in {named(world).id}: SB3 Zoo's TQC actor, Gaussian noise of {noise}; not D4RL's",
        "seed": seed,
    }


def roll_out(
    world: str,
    act: Policy,
    transitions: int,
    noise: float | Sequence[float] = 0.0,
    seed: int = 0,
    side_by_side: int = 32,
    limit: int = STEPS,
) -> Demonstrations:
    """Transitions of one episode after the other, the last of them cut; terminals are falls, timeouts are cuts.

    Episodes are numbered, run several at a time and put in order of their numbers, so that which ones are in the set
    does not depend on how long they last.

    Args:
        act: observations float32 [n, S] -> actions [n, A] in numpy, for any n up to `side_by_side`.
        transitions: how many, N.
        noise: standard deviations of what is added to actions; each episode draws one of them.  Actions are kept as
            they were executed, clipped to the box.
        side_by_side: how many episodes run at a time, at most.
        limit: steps after which an episode is cut.

    Raises:
        UserError: an unknown world, no transitions, no steps, gymnasium or mujoco absent, or actions that are not
            finite.
    """
    if min(transitions, limit, side_by_side) < 1:
        told = f"{transitions} transitions of episodes of {limit} steps, {side_by_side} at a time"
        raise UserError(f"{told}: choose at least 1 of each")
    levels = np.atleast_1d(np.asarray(noise, np.float64))
    idle = _worlds(world, max(1, min(side_by_side, transitions // limit)))
    episodes: list[_Episode] = []
    running: list[_Episode] = []
    count = 0
    with _bar(world, total=transitions) as bar:
        while True:
            while idle and count < transitions:
                running.append(_Episode(idle.pop(), levels, limit, seed, len(episodes)))
                episodes.append(running[-1])
            if not running:
                break
            actions = _finite(world, act(np.stack([episode.seen for episode in running])), len(running))
            for episode, action in zip(running, actions, strict=True):
                episode.step(action)
            count += len(running)
            bar.update(min(len(running), max(0, transitions - bar.n)))
            idle += [episode.world for episode in running if episode.over]
            running = [episode for episode in running if not episode.over]
    return _joined(episodes, transitions)


class _Episode:
    """One that is being recorded; what happens in it follows from the policy, the seed and its number."""

    def __init__(self, world: host.HostWorld, levels: np.ndarray, limit: int, seed: int, number: int) -> None:
        random = np.random.default_rng([seed, number])
        self.world, self.seen = world, world.reset(seed=_seed(random))
        self._noise = random.choice(levels) * random.standard_normal((limit, *world.actions.shape))
        self.observations = np.empty((limit, *world.obs.shape), np.float32)
        self.actions = np.empty((limit, *world.actions.shape), np.float32)
        self.rewards = np.empty(limit, np.float32)
        self.length, self.terminal, self.over = 0, False, False

    def step(self, action: np.ndarray) -> None:
        t, box = self.length, self.world.actions
        self.observations[t] = self.seen
        self.actions[t] = np.clip(action + self._noise[t], box.low, box.high)
        self.seen, self.rewards[t], self.terminal, truncated = self.world.step(self.actions[t])
        self.length = t + 1
        self.over = self.terminal or truncated or self.length == len(self._noise)
        if self.over:  # what was not needed is given back
            self.observations, self.actions = self.observations[: t + 1].copy(), self.actions[: t + 1].copy()
            self.rewards = self.rewards[: t + 1].copy()


def _joined(episodes: Sequence[_Episode], transitions: int) -> Demonstrations:
    """The first `transitions` rows of episodes that are over."""
    ends = np.cumsum([episode.length for episode in episodes]) - 1
    fell = np.array([episode.terminal for episode in episodes])[ends < transitions]
    ends = ends[ends < transitions]
    terminals, timeouts = np.zeros(transitions, bool), np.zeros(transitions, bool)
    terminals[ends], timeouts[ends] = fell, ~fell
    timeouts[-1] = not terminals[-1]
    return Demonstrations(
        np.concatenate([episode.observations for episode in episodes])[:transitions],
        np.concatenate([episode.actions for episode in episodes])[:transitions],
        np.concatenate([episode.rewards for episode in episodes])[:transitions],
        terminals,
        timeouts,
        np.zeros((transitions, 0), np.float32),
    )


def run(
    world: str,
    act: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    episodes: int,
    seed: int = 0,
    limit: int = STEPS,
) -> tuple[np.ndarray, np.ndarray]:
    """Closed loop on the host: returns float64 [N] and lengths int64 [N] of N episodes side by side.

    Those that have ended are not stepped any more, and all stops when all have.  Episode i begins as that of
    `roll_out` with the same seed and number.

    Args:
        act: (observations float32 [N, S], which go on [N] bool, step t) -> actions [N, A], clipped to the box here;
            both arrays are copies that it may keep, and what it returns for ended episodes is ignored.
        episodes: how many, N.
        limit: steps after which an episode is cut.

    Raises:
        UserError: an unknown world, no episodes or steps, gymnasium or mujoco absent, or actions that are not finite.
    """
    if min(episodes, limit) < 1:
        raise UserError(f"{episodes} episodes of {limit} steps: choose at least 1 of both")
    worlds = _worlds(world, episodes)
    starts = (_seed(np.random.default_rng([seed, number])) for number in range(episodes))
    obs = np.stack([one.reset(seed=start) for one, start in zip(worlds, starts, strict=True)])
    alive = np.ones(episodes, bool)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    for t in _bar(world, iterable=range(limit)):
        # Copies: jax takes over the memory of numpy's arrays and may read it after this loop has gone on.
        actions = _finite(world, act(obs.copy(), alive.copy(), t), episodes, alive)
        for i in np.flatnonzero(alive):
            obs[i], reward, terminated, truncated = worlds[i].step(actions[i])
            returns[i] += reward
            lengths[i] += 1
            alive[i] = not (terminated or truncated)
        if not alive.any():
            break
    return returns, lengths


def named(world: str) -> World:
    """One of `WORLDS`; raises UserError for another name."""
    if world not in WORLDS:
        raise unknown("locomotion", world, WORLDS)
    return World(*WORLDS[world])


def _quality(world: str, quality: str) -> Quality:
    named(world)
    if (world, quality) not in QUALITIES:
        raise unknown(world, quality, [name for known, name in QUALITIES if known == world])
    return Quality(*QUALITIES[world, quality])


def _worlds(world: str, num: int) -> list[host.HostWorld]:
    """So many of them, without what MuJoCo says of each about words in Gymnasium's files that it will drop one day."""
    name = named(world).id
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        return [host.gymnasium_world(name) for _ in range(num)]
    finally:
        mujoco.set_mju_user_warning(before)


def _finite(world: str, actions: np.ndarray, num: int, alive: np.ndarray | None = None) -> np.ndarray:
    """Checked actions of `num` episodes, of which those that have ended may hold anything."""
    actions = np.asarray(actions)
    if actions.ndim != 2 or len(actions) != num:
        raise UserError(f"{num} episodes of {world} were given actions {actions.shape}: make one row for each")
    if not np.isfinite(actions if alive is None else actions[alive]).all():
        raise UserError(f"{world} was given actions that are not finite: look for what diverged in the policy")
    return actions


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(2**31))


def _bar(world: str, **what: Any) -> tqdm:
    """Of steps, where they take long; few lines where standard error is a file."""
    patience = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(**what, desc=world, unit="step", leave=False, delay=5.0, mininterval=patience)
