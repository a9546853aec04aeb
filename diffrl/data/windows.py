"""Windows of paths as examples: what a diffusion planner denoises.

x [horizon, A + S]   actions first, as in Diffuser, then observations; both normalised
mask [horizon]       1 inside the path, 0 in the padding beyond its end, where x is 0
returns []           what the window is worth, if that was given
"""

import dataclasses

import numpy as np

from diffrl.data.normalisers import Normaliser, normalise
from diffrl.data.source import Batch, Source
from diffrl.data.trajectories import Paths, Transitions
from diffrl.errors import UserError

BLOCK = 2**13  # rows that are normalised at a time


def windows(
    transitions: Transitions,
    paths: Paths,
    horizon: int,
    *,
    observations: Normaliser,
    actions: Normaliser,
    pad: bool,
    returns: np.ndarray | None = None,
    stride: int = 1,
    name: str = "trajectories",
) -> Source:
    """All windows of `horizon` rows inside one path, consecutive or `stride` apart, as examples in memory.

    Args:
      transitions: N rows.
      paths: those to cut windows from.
      horizon: rows of a window, at least 1.
      observations, actions: normalisers of S and A dimensions.
      pad: whether a window may start at every row of a path and reach beyond its end; otherwise a path that is shorter
        than the horizon has no window.
      returns: [N], of the window that starts at each row; None leaves them out.
      stride: from one row of a window to the next.
      name: how messages call the set.

    Returns:
      A source whose `fetch` gives `{"x": float32 [B, horizon, A + S], "mask": float32 [B, horizon]}`, and
      `"returns": float32 [B]` if they were given.

    Raises:
      UserError: a horizon below 1, returns of another length, or no window at all.
    """
    if min(horizon, stride) < 1:
        raise UserError(
            f"{name} cannot be cut into windows of {horizon} steps, {stride} apart: "
            "horizon and stride must be at least 1"
        )
    if returns is not None and returns.shape != transitions.rewards.shape:
        raise UserError(
            f"{name} has {len(transitions.rewards)} steps but returns of shape {returns.shape}: give one each"
        )
    span = (horizon - 1) * stride + 1
    counts = paths.lengths if pad else np.maximum(paths.lengths - span + 1, 0)
    stops = np.cumsum(counts)
    if len(stops) == 0 or stops[-1] == 0:
        longest = int(paths.lengths.max(initial=0))
        remedy = "lower the horizon, or pad" if longest else "keep at least one path"
        raise UserError(f"{name} has no window of {span} steps, as its longest path has {longest}: {remedy}")
    rows = np.concatenate(
        [_normalised(actions, transitions.actions), _normalised(observations, transitions.observations)], axis=1
    )
    return Source(
        length=int(stops[-1]),
        fetch=_Windows(
            rows=rows,
            returns=None if returns is None else returns.astype(np.float32),
            first=paths.starts - (stops - counts),
            last=paths.starts + paths.lengths - 1,
            stops=stops,
            horizon=horizon,
            stride=stride,
        ),
        shape=(horizon, rows.shape[1]),
        name=name,
        in_memory=True,
    )


def _normalised(normaliser: Normaliser, values: np.ndarray) -> np.ndarray:
    """`values [N, D]`, normalised in blocks: what is made on the way then stays in the processor's cache."""
    normaliser = Normaliser(*map(np.asarray, normaliser))  # from a checkpoint it may come as JAX's
    result = np.empty(values.shape, np.float32)
    for block in range(0, len(values), BLOCK):
        result[block : block + BLOCK] = normalise(normaliser, values[block : block + BLOCK])
    return result


@dataclasses.dataclass(frozen=True)
class _Windows:
    """`fetch` of windows; no closure, so that plain pickle can send it to a worker.

    Attributes:
      rows: float32 [N, A + S].
      returns: float32 [N], or None.
      first: [P], such that window i of path p starts at row `first[p] + i`.
      last: [P], last row of each path.
      stops: [P], windows in the paths up to and including each.
      horizon: rows of a window.
      stride: from one to the next.
    """

    rows: np.ndarray
    returns: np.ndarray | None
    first: np.ndarray
    last: np.ndarray
    stops: np.ndarray
    horizon: int
    stride: int

    def __call__(self, indices: np.ndarray) -> Batch:
        path = np.searchsorted(self.stops, indices, side="right")
        start, last = self.first[path] + indices, self.last[path, None]
        row = start[:, None] + self.stride * np.arange(self.horizon)
        inside = row <= last
        x = self.rows[np.minimum(row, last)]  # what lies behind the path is never looked at
        x[~inside] = 0
        batch = {"x": x, "mask": inside.astype(np.float32)}
        return batch if self.returns is None else {**batch, "returns": self.returns[start]}
