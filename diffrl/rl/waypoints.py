"""D4RL's waypoint controller (`d4rl/pointmaze/waypoint_controller.py`): Q-iteration on the grid, then a PD controller.

It walks from cell to cell along the shortest way and stops at every one, 0 to 0.2 short of it in both directions; the
last one is the goal's cell itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffrl.rl import controllers
from diffrl.rl.environment import State
from diffrl.rl.mazes import Maze, next_cells

Array = jax.Array

GAIN, BRAKE = 10.0, 1.0
NEAR, SLOW = 0.1, 0.1  # m, and m per step
SCATTER = 0.2


class Memory(NamedTuple):
    """target: int32 [2], the goal's cell.  cell: number of the next waypoint's.  offset, previous: [2]."""

    target: Array
    cell: Array
    offset: Array
    previous: Array


def begin() -> Memory:
    """The memory that holds no target yet."""
    nowhere = jnp.full((2,), -1000, jnp.int32)
    return Memory(nowhere, jnp.zeros((), jnp.int32), jnp.zeros((2,)), jnp.zeros((2,)))


def steer(table: Array, columns: int, memory: Memory, obs: Array, goal: Array, chance: Array) -> tuple:
    """(action [2] in [-1, 1], whether the goal's cell is reached, memory) for one observation.

    Args:
        table: `mazes.next_cells`.
        columns: Y, of the maze.
        goal: [2], of which the nearest cell counts.
        chance: uniform numbers [2, 2] in [0, 1), for the waypoints that are chosen in this step.
    """
    position, velocity = obs[:2], obs[2:]
    target, start = (jnp.round(point).astype(jnp.int32) for point in (goal, position))
    renew = (target != memory.target).any()
    number = target[0] * columns + target[1]
    cell = jnp.where(renew, table[number, start[0] * columns + start[1]], memory.cell)
    offset = jnp.where(renew, SCATTER * chance[0], memory.offset)
    previous = jnp.where(renew, start.astype(jnp.float32), memory.previous)

    waypoint = jnp.stack([cell // columns, cell % columns]) - jnp.where(cell == number, 0.0, offset)
    slow = _length(previous - position) < SLOW
    solved = slow & (_length(position - target) < NEAR)
    towards = jnp.where(solved, target.astype(jnp.float32), waypoint)
    action = jnp.clip(GAIN * (towards - position) - BRAKE * velocity, -1.0, 1.0)
    reached = ~solved & slow & (_length(position - towards) < NEAR)
    following = Memory(
        target,
        jnp.where(reached, table[number, cell], cell),
        jnp.where(reached, SCATTER * chance[1], offset),
        position,
    )
    return action, solved, following


def controller(maze: Maze, stale: bool = False) -> controllers.Controller:
    """The controller in closed loop with `maze2d.make`'s environments.

    stale: it has no waypoint left but the last, and so walks straight at the goal, into the walls.  That is what D4RL's
    score of 100 means: its script (`scripts/reference_scores/maze2d_controller.py`) keeps one controller for all
    episodes, and since the goal stays the same it looks for a way in the first of them only.
    """
    table, columns = next_cells(maze), maze.walls.shape[1]

    def init(key: Array, world: State) -> Memory:
        if not stale:
            return begin()
        target = jnp.round(world.info["goal"]).astype(jnp.int32)
        return begin()._replace(target=target, cell=target[0] * columns + target[1])

    def act(memory: Memory, world: State, key: Array) -> tuple[Array, Memory]:
        chance = jax.random.uniform(key, (2, 2))
        action, _, memory = steer(jnp.asarray(table), columns, memory, world.obs, world.info["goal"], chance)
        return action, memory

    return controllers.alone(init, act)


def _length(x: Array) -> Array:
    return jnp.sqrt((x**2).sum())
