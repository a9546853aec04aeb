"""Maze2D (D4RL; Fu et al., 2020, arXiv:2004.07219): a ball that two motors push through a maze.

MuJoCo's physics, in the one case that occurs here: a ball of mass m on two slides, and walls that it touches without
friction.  MuJoCo's soft contacts minimise, over accelerations a,

    m/2 |a - a_0|^2 + sum_i D_i/2 min(0, n_i a - r_i)^2,      a_0 = (100 u - v) / m

(Todorov, 2014; MuJoCo's documentation, "Computation").  Between walls of unit cells a ball of radius 0.1 touches three
boxes at most.  The minimum is that of one of the eight quadratics in which some of the three press, so all eight are
solved and the best is taken: no iteration, and no branch.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.errors import UserError
from diffrl.rl import drawing
from diffrl.rl.environment import Actions, Environment, State
from diffrl.rl.mazes import Maze, free_cell
from diffrl.rl.wrappers import time_limit

Array = jax.Array

TIMESTEP, RADIUS, DAMPING, GEAR, FASTEST = 0.01, 0.1, 1.0, 100.0, 5.0
MASS = 1000.0 * 4 / 3 * math.pi * RADIUS**3
MARGIN = 0.002  # contacts begin at this distance
OFFSET = 0.2  # the ball's zero lies at 1.2, cell (i, j) at (i + 1, j + 1)
GOAL_RADIUS = 0.5

# MuJoCo's defaults, solref = (0.02, 1) and solimp = (0.9, 0.95, 0.001, 0.5, 2).
_SOFTEST, _HARDEST, _WIDTH = 0.9, 0.95, 0.001
_STIFFNESS = 1 / (_HARDEST * 0.02) ** 2
_BRAKING = 2 / (_HARDEST * 0.02)
_INVERSE_WEIGHT = 1 / MASS
_SUBSETS = tuple(tuple(float(n >> i & 1) for i in range(3)) for n in range(8))  # which of the boxes press


def simulate(walls: Array, position: Array, velocity: Array, action: Array) -> tuple[Array, Array]:
    """One step of 10 ms: position and velocity [2] after it.

    walls: bool [X, Y].  action: [2], clipped to [-1, 1].
    """
    action, velocity = jnp.clip(action, -1.0, 1.0), jnp.clip(velocity, -FASTEST, FASTEST)
    smooth = GEAR * action - DAMPING * velocity
    contact = _contact_force(walls, position, velocity, smooth / MASS)
    # Euler's method with the joints' damping taken at the end of the step.
    velocity = velocity + TIMESTEP * (smooth + contact) / (MASS + TIMESTEP * DAMPING)
    return position + TIMESTEP * velocity, velocity


def _contact_force(walls: Array, position: Array, velocity: Array, free: Array) -> Array:
    """The force [2] of the walls on a ball that would be accelerated by `free` [2] without them."""
    place = position + OFFSET
    cell = jnp.round(place)
    side = jnp.where(place >= cell, 1.0, -1.0)
    # The boxes beside the ball in x, in y, and across the corner.
    boxes = cell + side * jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    x, y = boxes.astype(jnp.int32).T
    # Beyond the edge of the maze there is nothing: gathers clip, which finds the wall at the edge again.
    solid = walls.at[x, y].get(mode="clip")
    away = place - jnp.clip(place, boxes - 0.5, boxes + 0.5)
    length = jnp.sqrt(jnp.maximum((away**2).sum(-1), 1e-12))
    normal = away / length[:, None]
    depth = length - RADIUS - MARGIN
    # MuJoCo's impedance between its ends: a parabola up to the middle and another one beyond it.
    share = jnp.minimum(jnp.abs(depth) / _WIDTH, 1.0)
    share = jnp.where(share <= 0.5, 2 * share**2, 1 - 2 * (1 - share) ** 2)
    impedance = _SOFTEST + share * (_HARDEST - _SOFTEST)
    target = -_BRAKING * normal @ velocity - _STIFFNESS * impedance * depth
    weight = jnp.where(solid & (depth < 0), impedance / ((1 - impedance) * _INVERSE_WEIGHT), 0.0)

    pressing = weight * jnp.array(_SUBSETS)  # [8, 3]
    matrix = MASS * jnp.eye(2) + jnp.einsum("sc,ci,cj->sij", pressing, normal, normal)
    right = MASS * free + (pressing * target) @ normal
    (a, b), (_, d) = matrix[:, 0].T, matrix[:, 1].T
    determinant = a * d - b * b
    solved = (
        jnp.stack([d * right[:, 0] - b * right[:, 1], a * right[:, 1] - b * right[:, 0]], -1) / determinant[:, None]
    )
    slack = jnp.minimum(solved @ normal.T - target, 0.0)
    cost = MASS * ((solved - free) ** 2).sum(-1) + (weight * slack**2).sum(-1)
    return -(weight * slack[jnp.argmin(cost)]) @ normal


REWARDS = {
    "sparse": lambda distance: (distance <= GOAL_RADIUS).astype(jnp.float32),
    "dense": lambda distance: jnp.exp(-distance),
}


def make(
    maze: Maze,
    steps: int,
    reward: str = "sparse",
    random_goal: bool | Array = False,
    name: str = "",
    start: tuple[float, float] | None = None,
) -> Environment:
    """The environment: obs = (x, y, vx, vy) in m and m/s, actions in [-1, 1]^2, no end but that of time.

    Episodes begin at `start` or in any free cell, with a goal that is the maze's or, with `random_goal` (it may be
    traced), in any free cell (Diffuser's Multi2D); info["goal"] [2] tells where.  After D4RL, rewards are those of
    where a step leads:

        sparse  1 within 0.5 of the goal, else 0            dense  exp(-distance to the goal)

    Raises:
      UserError: another reward, or a start in a wall.
    """
    if reward not in REWARDS:
        raise UserError(f"maze reward {reward!r}: choose sparse or dense")
    if start is not None:
        free_cell(maze, start, "start")
    off = jnp.zeros((), bool)

    def reset(key: Array) -> State:
        place, motion, target = jax.random.split(key, 3)
        goal = jnp.where(random_goal, anywhere(maze, target), jnp.array(maze.goal, jnp.float32))
        begin = anywhere(maze, place) if start is None else jnp.array(start, jnp.float32)
        obs = jnp.concatenate([begin, 0.1 * jax.random.normal(motion, (2,))])
        return State(obs, obs, jnp.zeros((), jnp.float32), off, off, {"goal": goal})

    def step(state: State, action: Array) -> State:
        obs = jnp.concatenate(simulate(jnp.asarray(maze.walls), state.inner[:2], state.inner[2:], action))
        distance = jnp.sqrt(((obs[:2] - state.info["goal"]) ** 2).sum())
        return State(obs, obs, REWARDS[reward](distance), off, off, state.info)

    def render(state: State) -> Any:
        board = picture(maze, goal=np.asarray(state.info["goal"]))
        board.circle(turned(np.asarray(state.obs[:2])), RADIUS, drawing.INK)
        return board.picture()

    obs = jax.ShapeDtypeStruct((4,), jnp.float32)
    world = Environment(name or f"maze2d-{maze.name}", reset, step, Actions(shape=(2,)), obs, render)
    return time_limit(world, steps)


def anywhere(maze: Maze, key: Array) -> Array:
    """A point [2] at a free cell: any of them, +-0.1 in both directions."""
    cell, shift = jax.random.split(key)
    spots = jnp.asarray(maze.free, jnp.float32)
    return spots[jax.random.randint(cell, (), 0, len(spots))] + jax.random.uniform(shift, (2,), minval=-0.1, maxval=0.1)


# --- Pictures --------------------------------------------------------------------------------------------------------


def turned(point: Any) -> tuple[float, float]:
    """Drawn with x downwards and y to the right, as the maze is written."""
    return float(point[1]), -float(point[0])


def picture(maze: Maze, goal: Any = None, paths: Any = (), colours: Any = (), pixels: int = 48) -> drawing.Canvas:
    """A canvas with the walls, the goal [2], and paths, each [T, 2], that begin with a dot.

    pixels: of a cell's side.
    """
    height, width = maze.walls.shape
    left = -0.5 - OFFSET
    board = drawing.canvas(height * pixels, width * pixels, left, left + width, -(height - 0.5 - OFFSET))
    for i, j in np.argwhere(maze.walls):
        board.box(turned((i - OFFSET, j - OFFSET)), (1.0, 1.0), 0.0, drawing.STEEL)
    if goal is not None:
        board.circle(turned(goal), GOAL_RADIUS / 2, drawing.AMBER)
    for n, path in enumerate(paths):
        colour = colours[n % len(colours)] if len(colours) else drawing.TEAL
        board.rod([turned(point) for point in np.asarray(path)], 0.04, colour)
        board.circle(turned(path[0]), 0.08, colour)
    return board


def mjcf(maze: Maze) -> str:
    """The same world in MuJoCo's XML.

    The ball alone has the margin: MuJoCo 3 adds the margins of two bodies up, where D4RL's took the larger one.
    """
    boxes = "".join(
        f'<geom name="wall_{i}_{j}" type="box" pos="{i + 1} {j + 1} 0" size="0.5 0.5 0.2"/>'
        for i, j in np.argwhere(maze.walls)
    )
    slides = "".join(
        f'<joint name="{axis}" type="slide" axis="{direction}" damping="{DAMPING:g}"/>'
        for axis, direction in (("x", "1 0 0"), ("y", "0 1 0"))
    )
    motors = "".join(
        f'<motor joint="{axis}" ctrlrange="-1 1" ctrllimited="true" gear="{GEAR:g}"/>' for axis in ("x", "y")
    )
    start = 1 + OFFSET
    return (
        f'<mujoco model="{maze.name}"><option timestep="{TIMESTEP}" gravity="0 0 0" integrator="Euler"/>'
        '<default><geom density="1000" condim="1"/></default>'
        f'<worldbody><body name="ball" pos="{start} {start} 0">{slides}'
        f'<geom name="ball" type="sphere" size="{RADIUS}" margin="{MARGIN}"/></body>{boxes}</worldbody>'
        f"<actuator>{motors}</actuator></mujoco>"
    )
