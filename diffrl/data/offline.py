"""Recorded data sets of offline reinforcement learning, from files that the user has: D4RL, Minari, and our own.

    D4RL     HDF5 with observations [N, S], actions [N, A], rewards [N], terminals [N] and mostly timeouts [N]
    Minari   HDF5 (`main_data.hdf5`) with groups episode_0, episode_1, ..., whose observations have a row more than
             their actions: the one after the last
    ours     .npz, see `trajectories.save`

D4RL: Fu et al. 2020, https://arxiv.org/abs/2004.07219.  Minari: https://minari.farama.org/content/dataset_standards.
"""

import pathlib
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from diffrl.data import trajectories
from diffrl.data.trajectories import Transitions
from diffrl.errors import UserError

HDF5 = b"\x89HDF\r\n\x1a\n"  # the first bytes of such a file
EPISODE = re.compile(r"episode_(\d+)")
FLAGS = {"terminations": "terminals", "truncations": "timeouts"}  # what D4RL calls Minari's


def read(
    path: str | pathlib.Path, *, episode_steps: int = 0, observation: Sequence[str] = ("observation",)
) -> Transitions:
    """The transitions of a file, whose kind is told from its content.

    Args:
      path: a file of D4RL, of Minari or of ours, or the folder of a Minari set.
      episode_steps: after how many steps episodes were cut, for the old files of D4RL that have no timeouts; 0 takes
        only the last row as cut.
      observation: which entries of Minari's dictionaries of observations to put side by side.  The default suits
        PointMaze; AntMaze has its position in "achieved_goal" only.

    Returns:
      Transitions; the last row of each of Minari's episodes, and of a file of D4RL, is terminal or timed out.

    Raises:
      UserError: no such file, one of another kind, h5py absent, a missing field, or values that are not finite.
    """
    file = _find(path)
    if zipfile.is_zipfile(file):
        return trajectories.load(file)[0]

    def fields(opened: Any) -> dict[str, np.ndarray]:
        if _episodes(opened):
            return _minari(opened, str(file), observation)
        return _d4rl(opened, str(file), episode_steps)

    return trajectories.from_fields(_with_hdf5(file, fields), str(file))


def read_goals(path: str | pathlib.Path) -> np.ndarray:
    """The goal that was pursued at each step of a goal-conditioned set, float32 [N, G]; rows as those of `read`.

    It is D4RL's `infos/goal` and Minari's `desired_goal`.

    Raises:
      UserError: as `read`, or the file has no goals.
    """
    file = _find(path)
    if zipfile.is_zipfile(file):
        raise UserError(f"{file} has no goals, as no .npz of ours: point at an .hdf5 of D4RL or Minari")

    def goals(opened: Any) -> np.ndarray:
        episodes = _episodes(opened)
        if episodes:
            parts = [_dataset(e, "observations/desired_goal", f"{file}, {e.name}") for e in episodes]
            return np.concatenate([part[:-1] for part in parts])
        return _dataset(opened, "infos/goal", str(file))

    return np.asarray(_with_hdf5(file, goals), np.float32)


def _find(path: str | pathlib.Path) -> pathlib.Path:
    file = pathlib.Path(path).expanduser()
    if file.is_dir():  # of a Minari set, or the `data` in it
        inside = [file / "main_data.hdf5", file / "data" / "main_data.hdf5"]
        found = [candidate for candidate in inside if candidate.is_file()]
        if not found:
            raise UserError(f"{path} is a folder without main_data.hdf5: point at a file of D4RL, Minari or ours")
        return found[0]
    if not file.is_file():
        raise UserError(f"no such file: {path}; point at an .hdf5 of D4RL or Minari, or an .npz of ours")
    return file


def _with_hdf5(file: pathlib.Path, use: Callable[[Any], Any]) -> Any:
    """What `use` makes of the opened file."""
    with file.open("rb") as stream:
        if stream.read(len(HDF5)) != HDF5:
            raise UserError(f"{file} is neither HDF5 nor .npz: point at a file of D4RL, Minari or ours")
    try:
        import h5py  # only for those who have such files
    except ModuleNotFoundError as error:
        raise UserError(f"{file} is HDF5, and h5py is not installed: pip install -e '.[offline]'") from error
    try:
        with h5py.File(file, "r") as opened:
            return use(opened)
    except (OSError, RuntimeError) as error:  # h5py raises either
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {file}: {reason}; is it whole? fetch it again") from error


def _dataset(group: Any, key: str, name: str) -> np.ndarray:
    """The array at `key`, a name or several with slashes between."""
    *folders, last = key.split("/")
    for part in folders:
        group = group[part] if hasattr(group.get(part), "keys") else {}
    found = group.get(last)
    if not hasattr(found, "dtype"):
        raise UserError(
            f"{name} has no array {key!r}, only {', '.join(group) or 'nothing'}: choose another, or mend it"
        )
    return found[()]


def _d4rl(opened: Any, name: str, episode_steps: int) -> dict[str, np.ndarray]:
    fields = {key: _dataset(opened, key, name) for key in ("observations", "actions", "rewards", "terminals")}
    terminals = fields["terminals"].reshape(-1).astype(bool)
    if "timeouts" in opened:
        timeouts = _dataset(opened, "timeouts", name).reshape(-1).astype(bool)
    else:
        timeouts = _cut(terminals, episode_steps)
    timeouts[-1:] |= ~terminals[-1:]  # whatever came next is not in the file
    return {**fields, "timeouts": timeouts}


def _cut(terminals: np.ndarray, steps: int) -> np.ndarray:
    """Timeouts, bool [N], every `steps` rows since the last episode's end; none if `steps` is 0."""
    if not steps or not len(terminals):
        return np.zeros(len(terminals), bool)
    starts, lengths = trajectories.paths(terminals)
    age = np.arange(len(terminals)) - np.repeat(starts, lengths)
    return (age % steps == steps - 1) & ~terminals


def _episodes(opened: Any) -> list[Any]:
    """Minari's groups, in the order in which they were recorded; HDF5 has episode_10 before episode_2."""
    numbers = sorted(int(found[1]) for key in opened if (found := EPISODE.fullmatch(key)))
    return [opened[f"episode_{number}"] for number in numbers]


def _minari(opened: Any, name: str, observation: Sequence[str]) -> dict[str, np.ndarray]:
    episodes = _episodes(opened)
    bar = tqdm(episodes, desc="reading", unit="episode", leave=False, disable=len(episodes) < 1000)
    parts = [_episode(episode, f"{name}, {episode.name.strip('/')}", observation) for episode in bar]
    return {key: np.concatenate([part[key] for part in parts]) for key in Transitions._fields}


def _episode(episode: Any, name: str, observation: Sequence[str]) -> dict[str, np.ndarray]:
    """One episode's fields under the names of `Transitions`, its last row marked as an end."""
    keys = ["observations"]
    if hasattr(episode.get("observations"), "keys"):
        keys = [f"observations/{key}" for key in observation]
    seen = [_dataset(episode, key, name) for key in keys]
    fields = {key: _dataset(episode, key, name) for key in ("actions", "rewards")}
    fields |= {ours: _dataset(episode, theirs, name).astype(bool) for theirs, ours in FLAGS.items()}
    steps = len(fields["rewards"])
    for key, value in zip(keys, seen, strict=True):
        if len(value) != steps + 1:
            raise UserError(f"{name} has {len(value)} {key} but {steps} rewards: Minari has one more, mend the file")
    for key, value in fields.items():
        if len(value) != steps:
            raise UserError(f"{name} has {len(value)} {key} but {steps} rewards: mend the file")
    fields["timeouts"][-1:] |= ~fields["terminals"][-1:]
    fields["observations"] = np.concatenate([value[:-1] for value in seen], axis=-1)
    return fields
