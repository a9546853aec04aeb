"""FrozenLake, CliffWalking and Taxi: Gymnasium's tables, state for state and action for action.

Sources: FrozenLake is OpenAI Gym's; the cliff is Sutton & Barto (2018), example 6.6; the taxi is Dietterich (2000).
"""

from collections.abc import Iterator

import numpy as np

from diffrl.errors import UserError
from diffrl.rl.mdp import MDP, from_outcomes

FROZEN_LAKES = {
    "4x4": ("SFFF", "FHFH", "FFFH", "HFFG"),
    "8x8": ("SFFFFFFF", "FFFFFFFF", "FFFHFFFF", "FFFFFHFF", "FFFHFFFF", "FHHFFFHF", "FHFFHFHF", "FFFHFFFG"),
}
TAXI_STANDS = ((0, 0), (0, 4), (4, 0), (4, 3))
TAXI_WALLS_EAST = frozenset({(0, 1), (1, 1), (3, 0), (4, 0), (3, 2), (4, 2)})  # cells with a wall on their east side


def frozen_lake(size: str = "4x4", slippery: bool = True) -> MDP:
    """Reward 1 at G; H and G end the episode.  Actions: left, down, right, up.

    On the slippery lake a move goes where it should, or to either side of that, each with probability 1/3.

    Raises UserError for another size than 4x4 and 8x8.
    """
    if size not in FROZEN_LAKES:
        raise UserError(f"no frozen lake {size!r}: choose one of {', '.join(FROZEN_LAKES)}")
    lake = FROZEN_LAKES[size]
    side = len(lake)
    moves = ((0, -1), (1, 0), (0, 1), (-1, 0))

    def outcomes(row: int, column: int, action: int) -> Iterator[tuple[float, int, float, bool]]:
        if lake[row][column] in "GH":
            yield 1.0, row * side + column, 0.0, True
            return
        ways = [(action + turn) % 4 for turn in (-1, 0, 1)] if slippery else [action]
        for way in ways:
            down, right = moves[way]
            to = min(max(row + down, 0), side - 1), min(max(column + right, 0), side - 1)
            cell = lake[to[0]][to[1]]
            yield 1 / len(ways), to[0] * side + to[1], float(cell == "G"), cell in "GH"

    cells = [(row, column) for row in range(side) for column in range(side)]
    start = np.array([lake[row][column] == "S" for row, column in cells], float)
    return from_outcomes([[list(outcomes(*cell, action)) for action in range(4)] for cell in cells], start)


def cliff_walking() -> MDP:
    """4 x 12; every step costs 1, the cliff between start and goal 100 and the way back.  Up, right, down, left."""
    rows, columns, start = 4, 12, 36
    moves = ((-1, 0), (0, 1), (1, 0), (0, -1))

    def outcome(row: int, column: int, action: int) -> tuple[float, int, float, bool]:
        down, right = moves[action]
        row, column = min(max(row + down, 0), rows - 1), min(max(column + right, 0), columns - 1)
        if row == rows - 1 and 0 < column < columns - 1:
            return 1.0, start, -100.0, False
        return 1.0, row * columns + column, -1.0, (row, column) == (rows - 1, columns - 1)

    cells = [(row, column) for row in range(rows) for column in range(columns)]
    return from_outcomes([[[outcome(*cell, action)] for action in range(4)] for cell in cells], np.eye(48)[start])


def taxi() -> MDP:
    """5 x 5 with walls, 4 stands: 500 states ((row 5 + column) 5 + passenger) 4 + destination, passenger 4 in the taxi.

    Every step costs 1, an impossible pick-up or drop-off 10; the right drop-off gives 20 and ends the episode.  South,
    north, east, west, pick up, drop off.
    """

    def code(row: int, column: int, passenger: int, destination: int) -> int:
        return ((row * 5 + column) * 5 + passenger) * 4 + destination

    def outcome(row: int, column: int, passenger: int, destination: int, action: int) -> tuple[float, int, float, bool]:
        reward, terminated, here = -1.0, False, (row, column)
        if action == 0:
            row = min(row + 1, 4)
        elif action == 1:
            row = max(row - 1, 0)
        elif action == 2:
            column += column < 4 and here not in TAXI_WALLS_EAST
        elif action == 3:
            column -= column > 0 and (row, column - 1) not in TAXI_WALLS_EAST
        elif action == 4:
            if passenger < 4 and here == TAXI_STANDS[passenger]:
                passenger = 4
            else:
                reward = -10.0
        elif passenger == 4 and here == TAXI_STANDS[destination]:
            passenger, reward, terminated = destination, 20.0, True
        elif passenger == 4 and here in TAXI_STANDS:
            passenger = TAXI_STANDS.index(here)
        else:
            reward = -10.0
        return 1.0, code(row, column, passenger, destination), reward, terminated

    states = [(r, c, p, d) for r in range(5) for c in range(5) for p in range(5) for d in range(4)]
    start = np.array([passenger < 4 and passenger != goal for _, _, passenger, goal in states], float)
    outcomes = [[[outcome(*state, action)] for action in range(6)] for state in states]
    return from_outcomes(outcomes, start / start.sum())
