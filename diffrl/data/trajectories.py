"""What an agent did, as data: transitions in time order, the paths they make up, and the returns along these.

    transitions   row 0 | 1 | 2 | 3 | 4 | 5 | ...     as D4RL has them: one flat array per field
    paths         [ path 0      ][ path 1   ][ ...     a path ends with a terminal or timed out row

Diffusion planners (Diffuser, Janner et al. 2022, https://arxiv.org/abs/2205.09991; Decision Diffuser, Ajay et al. 2023,
https://arxiv.org/abs/2211.15657) learn from windows of paths, which `windows` cuts.
"""

import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffrl.errors import UserError

FACTS = "facts"  # the key of an archive that holds how the data were made, as JSON


class Transitions(NamedTuple):
    """N steps in time order; row t + 1 follows row t unless a path ends at t.

    Attributes:
      observations: float32 [N, S], before the action.
      actions: float32 [N, A].
      rewards: float32 [N].
      terminals: bool [N], whether the world ended with this step.
      timeouts: bool [N], whether the recording was cut after this step, though the world goes on.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray


class Paths(NamedTuple):
    """P runs of rows without a break, in increasing order.

    Attributes:
      starts: int64 [P], first row of each.
      lengths: int64 [P], rows in each, at least 1.
    """

    starts: np.ndarray
    lengths: np.ndarray


def from_fields(fields: Mapping[str, np.ndarray], name: str) -> Transitions:
    """Checked transitions from arrays of numbers, by the names of `Transitions`; rewards and flags may be [N, 1].

    Raises UserError for a missing field or one that holds no numbers, and as `check` does.
    """
    missing = [field for field in Transitions._fields if field not in fields]
    if missing:
        raise UserError(f"{name} has no {missing[0]!r}, only {', '.join(fields) or 'nothing'}: add or rename it")
    arrays = {}
    for field in Transitions._fields:
        value = np.asarray(fields[field])
        if value.dtype.kind not in "biuf":
            raise UserError(f"{name} has {field} of type {value.dtype}: store numbers")
        if field in {"rewards", "terminals", "timeouts"} and value.ndim == 2 and value.shape[1] == 1:
            value = value[:, 0]
        arrays[field] = np.ascontiguousarray(value, bool if field in {"terminals", "timeouts"} else np.float32)
    transitions = Transitions(**arrays)
    check(transitions, name)
    return transitions


def check(transitions: Transitions, name: str) -> None:
    """Raises UserError if there are no transitions, shapes are wrong, lengths differ, or a value is not finite."""
    count = len(transitions.rewards) if np.ndim(transitions.rewards) else 0
    if count == 0:
        raise UserError(f"{name} holds no transitions: record at least one")
    for field, value in transitions._asdict().items():
        wanted = 2 if field in {"observations", "actions"} else 1
        if value.ndim != wanted:
            raise UserError(f"{name} has {field} of shape {value.shape}: store {'[N, D]' if wanted == 2 else '[N]'}")
        if len(value) != count:
            raise UserError(f"{name} has {len(value)} {field} but {count} rewards: store one of each per step")
    wrong = [(row, field) for field, value in transitions._asdict().items() for row in _first_not_finite(value)]
    if wrong:
        row, field = min(wrong)
        value = transitions._asdict()[field][row]
        raise UserError(f"{name} has {field} in row {row} that are not finite ({value}): drop the path, or mend it")


def _first_not_finite(value: np.ndarray) -> list[int]:
    if value.dtype == bool:
        return []
    finite = np.isfinite(value)
    return [] if finite.all() else [int(np.argmin(finite.reshape(len(value), -1).all(axis=1)))]


def save(path: str | pathlib.Path, transitions: Transitions, **facts: Any) -> None:
    """Writes an .npz archive, whole or not at all.

    Args:
      path: of the file; folders above it are made.
      transitions: of at least one step.
      facts: strings and numbers about how they were made, such as the environment's name and the seed.

    Raises:
      UserError: what `check` refuses, or the disk does.
    """
    check(transitions, str(path))
    path = pathlib.Path(path).expanduser()
    partial = path.with_name(f"{path.name}.partial")
    told = json.dumps(facts, default=np.generic.item)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:  # given a name, NumPy would append its suffix
                arrays: dict[str, Any] = {**transitions._asdict(), FACTS: np.array(told)}
                np.savez(file, **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write transitions to {path}: {error.strerror}; choose another place") from error


def load(path: str | pathlib.Path) -> tuple[Transitions, dict[str, Any]]:
    """The transitions and facts that `save` wrote.

    Raises:
      UserError: no such file, not an archive of NumPy, a missing field, or what `check` refuses.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no such file: {path}; point at an .npz of transitions")
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive")
        with np.load(file) as archive:
            fields = {key: archive[key] for key in (*Transitions._fields, FACTS) if key in archive.files}
            others = {key: np.empty(0) for key in archive.files if key not in fields}
        facts = json.loads(str(fields.pop(FACTS, "{}")))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}; write it with diffrl.data.trajectories.save") from error
    return from_fields({**fields, **others}, str(path)), facts


def paths(ends: np.ndarray) -> Paths:
    """The paths whose last rows `ends`, bool [N], marks (`terminals | timeouts`); the last of all ends one anyway."""
    if len(ends) == 0:
        raise UserError("no paths in 0 transitions: record at least one")
    stops = np.flatnonzero(ends) + 1
    if not ends[-1]:
        stops = np.append(stops, len(ends))
    starts = np.concatenate([[0], stops[:-1]])
    return Paths(starts, stops - starts)


def goal_exits(positions: np.ndarray, goal: np.ndarray, radius: float = 0.5) -> np.ndarray:
    """Where an agent leaves its goal: what ends the paths of D4RL's maze2d, whose own timeouts mean nothing.

    A controller walks from goal to goal there without a reset.  Diffuser cuts where it is at the goal that counts at
    t and not at t + 1, so that a path ends with waiting at the goal.

    Args:
      positions: [N, 2].
      goal: [2], or one per row [N, 2], in the same units.
      radius: being nearer than this is being there.

    Returns:
      bool [N], to stand in for timeouts.
    """
    there = np.linalg.norm(positions - goal, axis=-1) < radius
    exits = np.zeros(len(positions), bool)
    exits[:-1] = there[:-1] & ~there[1:]
    return exits


def seams(positions: np.ndarray, timeouts: np.ndarray) -> np.ndarray:
    """Timeouts after which the agent is elsewhere: where what was recorded in several pieces is joined.

    At the timeouts of D4RL's maze2d only the target changes, and the next row has the same position once more.

    positions: [N, D].  timeouts: bool [N].  Returns bool [N], to stand in for timeouts.
    """
    elsewhere = np.append((positions[1:] != positions[:-1]).any(axis=-1), False)
    return timeouts & elsewhere


def returns_to_go(rewards: np.ndarray, paths: Paths, discount: float) -> np.ndarray:
    """From each row of `rewards [N]`, the sum over i of `discount**i r_{t+i}` to the end of its path.

    Returns float32 [N]; 0 in rows that belong to no path.
    """
    return window_returns(rewards, paths, int(paths.lengths.max(initial=1)), discount)


def window_returns(rewards: np.ndarray, paths: Paths, horizon: int, discount: float) -> np.ndarray:
    """The same over the next `horizon` rows only, or to the end of the path where that comes first.

    Sums over k rows make sums over 2 k rows, `S_2k(t) = S_k(t) + discount**k S_k(t + k)`, and those of the powers of
    two in the horizon are put together: O(N log horizon), and nothing is subtracted, so nothing cancels.

    Args:
      rewards: [N].
      paths: inside [0, N).
      horizon: at least 1.
      discount: 0 to 1.

    Returns:
      float32 [N]; 0 in rows that belong to no path.
    """
    if horizon < 1:
        raise UserError(f"a return over {horizon} steps: the horizon must be at least 1")
    if not 0 <= discount <= 1:
        raise UserError(f"discount {discount:g} must lie between 0 and 1")
    left = _left(paths, len(rewards))
    horizon = min(horizon, int(left.max(initial=1)))
    sums = np.where(left > 0, rewards, np.float64(0))
    total, done, k = np.zeros(len(rewards)), 0, 1
    while True:
        if horizon & k:
            _add_later(total, sums, done, discount, left)
            done += k
        if 2 * k > horizon:
            return total.astype(np.float32)
        _add_later(sums, sums, k, discount, left)
        k *= 2


def _left(paths: Paths, length: int) -> np.ndarray:
    """How many rows of its path each of `length` rows has before it, itself included; 0 outside the paths."""
    starts, lengths = paths
    done = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    left = np.zeros(length, np.int64)
    left[np.repeat(starts, lengths) + done] = np.repeat(lengths, lengths) - done
    return left


def _add_later(total: np.ndarray, sums: np.ndarray, k: int, discount: float, left: np.ndarray) -> None:
    """`total(t) += discount**k sums(t + k)` where row t + k belongs to the path of row t; both may be one array."""
    stop = len(sums) - k
    total[:stop] += np.where(left[:stop] > k, discount**k * sums[k:], 0)
