r"""Mazes as pictures of letters, and the shortest ways through them.

A maze is rows of `#` (wall), `O` (free) and at most one `G` (goal), joined by backslashes or line breaks as in D4RL (Fu
et al., 2020, arXiv:2004.07219): `#####\#GOO#\###O#\#OOO#\#####`.  The row is x and the column y; cell (i, j) is centred
at the point (i, j) less 0.2, where D4RL's particle has its zero, but targets lie at the point (i, j) itself.
"""

from typing import NamedTuple

import numpy as np

from diffrl.errors import UserError, nearest

UMAZE = "#####\\#GOO#\\###O#\\#OOO#\\#####"
MEDIUM = "########\\#OO##OO#\\#OO#OOO#\\##OOO###\\#OO#OOO#\\#O#OO#O#\\#OOO#OG#\\########"
LARGE = (
    "############\\#OOOO#OOOOO#\\#O##O#O#O#O#\\#OOOOOO#OOO#\\#O####O###O#\\#OO#O#OOOOO#\\##O#O#O#O###\\#OO#OOO#OGO#\\"
    "############"
)
# name: maze, steps of an episode, and the returns of D4RL's random policy and controller, sparse and dense
# (`d4rl/infos.py`): the 0 and the 100 of normalised scores.
STANDARD = {
    "umaze": (UMAZE, 300, {"sparse": (23.85, 161.86), "dense": (68.537689, 193.66285642381482)}),
    "medium": (MEDIUM, 600, {"sparse": (13.13, 277.39), "dense": (44.264742, 297.4552547777125)}),
    "large": (LARGE, 800, {"sparse": (6.7, 273.99), "dense": (30.569041, 303.4857382709002)}),
}
# No move, and along -y, +y, -x, +x: D4RL's order, which decides between ways of one length.
MOVES = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))


class Maze(NamedTuple):
    """walls: bool [X, Y].  goal: (i, j), the first free cell where the picture has none.  free: [n, 2], in order."""

    name: str
    walls: np.ndarray
    goal: tuple[int, int]
    free: np.ndarray


def parse(text: str, name: str = "maze") -> Maze:
    """The maze that a picture shows.

    Raises:
      UserError: rows of different lengths, another letter, two goals, no free cell, an edge that is not wall all
        around, or free cells between which there is no way.
    """
    rows = [row.strip() for row in text.strip().replace("\\", "\n").split("\n")]
    width = len(rows[0])
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise UserError(
                f"{name}: row {number}, {row!r}, has {len(row)} cells and the first {width}: make them alike"
            )
        strange = set(row) - set("#OG")
        if strange:
            raise UserError(f"{name}: row {number} has {min(strange)!r}: draw with # (wall), O (free) and G (goal)")
    cells = np.array([list(row) for row in rows])
    walls, goals, free = cells == "#", np.argwhere(cells == "G"), np.argwhere(cells != "#")
    if len(goals) > 1:
        raise UserError(f"{name} has {len(goals)} goals: leave one G, the others are O")
    if not len(free):
        raise UserError(f"{name} has no free cell: draw at least one O")
    inner = np.zeros_like(walls)
    inner[1:-1, 1:-1] = True
    if (~walls & ~inner).any():
        i, j = np.argwhere(~walls & ~inner)[0]
        raise UserError(f"{name} is open at its edge, at row {i + 1}, column {j + 1}: put # all around")
    # D4RL lists the goal after the free cells.
    order = np.concatenate([np.argwhere(cells == "O"), goals])
    maze = Maze(name, walls, (int(order[-1 if len(goals) else 0][0]), int(order[-1 if len(goals) else 0][1])), order)
    lost = order[distances(maze, maze.goal)[tuple(order.T)] < 0]
    if len(lost):
        i, j = lost[0]
        raise UserError(
            f"{name} cannot be solved: no way leads from row {i + 1}, column {j + 1} to row {maze.goal[0] + 1}, "
            f"column {maze.goal[1] + 1}; open a wall between them"
        )
    return maze


def standard(name: str) -> Maze:
    """umaze, medium or large; raises UserError for another name."""
    if name not in STANDARD:
        remedy = nearest(name, STANDARD, f"choose from {', '.join(STANDARD)}, or draw one with #, O and G")
        raise UserError(f"no maze {name!r}: {remedy}")
    return parse(STANDARD[name][0], name)


def free_cell(maze: Maze, point: tuple[float, float], what: str) -> tuple[int, int]:
    """The cell whose target the point (x, y) is next to.

    Raises UserError where that is no free cell; `what` names the point.
    """
    i, j = int(np.rint(point[0])), int(np.rint(point[1]))
    inside = 0 <= i < maze.walls.shape[0] and 0 <= j < maze.walls.shape[1]
    if not inside or maze.walls[i, j]:
        where = "in a wall" if inside else "outside"
        spots = ", ".join(f"({i}, {j})" for i, j in maze.free[:6])
        more = ", ..." if len(maze.free) > 6 else ""
        raise UserError(
            f"{what}=({point[0]:g}, {point[1]:g}) lies {where} of {maze.name}: free cells are {spots}{more}"
        )
    return i, j


def neighbours(maze: Maze) -> np.ndarray:
    """The cell [X Y, 5] (x Y + y) that each of the `MOVES` leads to: the same one where a wall is in the way."""
    shape = maze.walls.shape
    cells = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 1, 2)
    to = cells + np.array(MOVES)
    inside = ((to >= 0) & (to < shape)).all(-1)
    to = np.where(inside[..., None], to, cells)
    blocked = ~inside | maze.walls[to[..., 0], to[..., 1]]
    to = np.where(blocked[..., None], cells, to)
    return to[..., 0] * shape[1] + to[..., 1]


def distances(maze: Maze, cell: tuple[int, int]) -> np.ndarray:
    """Moves from every cell to `cell` [X, Y]; -1 where there is no way."""
    to = neighbours(maze)
    steps = np.full(maze.walls.size, -1)
    steps[cell[0] * maze.walls.shape[1] + cell[1]] = 0
    for count in range(1, maze.walls.size):
        reached = (steps < 0) & (steps[to] == count - 1).any(1)
        if not reached.any():
            break
        steps[reached] = count
    return steps.reshape(maze.walls.shape)


def next_cells(maze: Maze, discount: float = 0.99, sweeps: int = 50) -> np.ndarray:
    """D4RL's Q-iteration: the greedy cell after cell s on the way to cell g, int32 [X Y, X Y] as [g, s].

    Reward 1 for being at g; ties go to the first of the `MOVES`.  Cells are numbered x Y + y.  Walls count as places
    from which one can leave, for the particle that leans on one is rounded into it.
    """
    to = neighbours(maze)
    count = maze.walls.size
    reward = np.eye(count)[:, :, None]
    value = np.zeros((count, count))
    # A way of n moves needs n sweeps and one to see the reward; on D4RL's mazes 50 are enough.
    for _ in range(max(sweeps, int((~maze.walls).sum()) + 1)):
        q = reward + discount * value[:, to]
        value = q.max(-1)
    return np.take_along_axis(to[None], q.argmax(-1)[..., None], 2)[..., 0].astype(np.int32)
