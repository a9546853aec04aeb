"""What planners are trained for and judged by: demonstrations, the world, and who else acts in it."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.config import leaf
from diffrl.data import normalisers, offline, trajectories
from diffrl.data.source import Source
from diffrl.data.trajectories import Paths, Transitions
from diffrl.data.windows import windows
from diffrl.errors import UserError
from diffrl.recipes import denoising
from diffrl.recipes.planners import ModelConfig
from diffrl.rl import controllers, demonstrations, maze2d, mazes, waypoints
from diffrl.rl.controllers import Controller
from diffrl.rl.environment import Environment, State
from diffrl.rl.mazes import Maze

Array = jax.Array

RANDOM_RETURN_EPISODES = 1000  # by which a maze of one's own gets the two ends of its score


@dataclasses.dataclass
class TaskConfig:
    """A maze, or a robot of Gymnasium, and demonstrations in it.

    Attributes:
        maze: umaze, medium or large, or a picture of one's own: rows of # (wall), O (free) and G (goal) with / between
            them.
        random_goal: every episode has a goal of its own (Diffuser's multi-task setting), else the maze's.
        transitions: how many are made; 0: as many as D4RL has, 1, 2 and 4 million.
        cut_at_goal: whether windows of demonstrations end where the agent leaves the maze's goal, as Diffuser's do.
            They then hardly show how one gets there: in the large maze 0.04 % of their rows are at it, else 0.9 %.
        file: demonstrations to be read instead: HDF5 of D4RL or Minari, or .npz of ours.
        robot: hopper, halfcheetah or walker2d, in place of a maze.
        actors: the .npz of trained actors by which demonstrations of a robot are made (`rl.experts`).
    """

    maze: str = leaf("umaze", "umaze, medium, large, or rows of #, O and G with / between them")
    random_goal: bool = leaf(False, "a goal of its own for every episode, instead of the maze's", free=True)
    start: tuple[float, ...] = leaf((), "x, y where every episode begins in a maze; empty: anywhere", free=True)
    reward: str = leaf("sparse", "sparse or dense", free=True)
    steps: int = leaf(0, "of an episode; 0: D4RL's 300, 600 or 800", free=True, at_least=0)
    transitions: int = leaf(0, "demonstrated steps; 0: as many as D4RL has", at_least=0)
    file: str = leaf("", "demonstrations to read instead: D4RL's or Minari's HDF5, or our .npz")
    cut_at_goal: bool = leaf(True, "of a maze: windows end where the agent leaves the maze's goal, as the paper's do")
    normaliser: str = leaf("limits", "limits, gaussian or cdf")
    robot: str = leaf("", "hopper, halfcheetah or walker2d, in place of a maze")
    quality: str = leaf("medium", "of a robot's demonstrations: medium, medium_replay or expert")
    actors: str = leaf("", "the .npz of trained actors that make a robot's demonstrations", free=True)


MAZES_ALONE: tuple[str, ...] = ("maze", "random_goal", "start", "reward", "steps", "cut_at_goal")
ROBOTS_ALONE: tuple[str, ...] = ("quality", "actors")


def check_fields(config: TaskConfig) -> None:
    """Raises UserError for a field that says nothing about the kind of task that a config names."""
    others, kind, hint = ROBOTS_ALONE, "a maze", ""
    if config.robot:
        others, kind, hint = MAZES_ALONE, "a robot", f", and begin with --preset={config.robot}"
    usual = TaskConfig()
    for name in others:
        value = getattr(config, name)
        if value != getattr(usual, name):
            raise UserError(f"task.{name}={value}: {kind} has no such thing; leave it out{hint}")


class Task(NamedTuple):
    """A maze that is open for business.

    Attributes:
        world: whether goals are random, traced or not -> one world.
        steps: of an episode.
        reference: returns that score 0 and 100.
        transitions, paths: demonstrations, and where they may be cut into windows.
        rivals: others who act in it, by name.
    """

    name: str
    maze: Maze
    world: Callable[[bool | Array], Environment]
    steps: int
    reference: tuple[float, float]
    transitions: Transitions
    paths: Paths
    rivals: dict[str, Controller]


def open_task(config: TaskConfig, workdir: pathlib.Path, seed: int = 0) -> Task:
    """The task that a config names; demonstrations that are made lie in <workdir>/demonstrations.npz from then on.

    Where D4RL has no returns, of mazes of one's own and of other lengths, random actions and the waypoint controller
    give the two ends of the score.

    Raises:
        UserError: no such maze, or one that cannot be solved; fields that are for robots only; a file that is not
            there or does not fit.
    """
    check_fields(config)
    maze = (
        mazes.parse(config.maze.replace("/", "\n"), "task.maze") if "#" in config.maze else mazes.standard(config.maze)
    )
    # A maze of one's own has the steps of D4RL's that is as large.
    fields = mazes.STANDARD.get(maze.name)
    usual = fields[1] if fields else 300 if len(maze.free) < 12 else 600 if len(maze.free) < 36 else 800
    steps = config.steps or usual
    if len(config.start) not in (0, 2):
        raise UserError(f"task.start={config.start}: give x and y, or nothing")
    start = (config.start[0], config.start[1]) if config.start else None

    def world(random_goal):
        return maze2d.make(maze, steps, config.reward, random_goal, f"maze2d-{maze.name}", start)

    env = world(config.random_goal)
    found = _demonstrations(config, maze, usual, workdir, seed)
    if found.observations.shape[1:] != (4,) or found.actions.shape[1:] != (2,):
        raise UserError(
            f"task.file={config.file} has {found.observations.shape[1]} numbers per observation and "
            f"{found.actions.shape[1]} per action: a maze has 4 and 2"
        )
    _check_places(found.observations[:, :2], maze, config.file)
    places = found.observations[:, :2]
    ends = trajectories.seams(places, found.timeouts | found.terminals)
    if config.cut_at_goal:  # whatever the agent was after
        ends |= trajectories.goal_exits(places, np.array(maze.goal, np.float32))
    rivals = {
        "waypoint controller": waypoints.controller(maze),
        "D4RL's reference": waypoints.controller(maze, stale=True),
        "random actions": controllers.uniform(env),
    }
    reference = fields[2][config.reward] if fields and steps == usual else _reference(env, steps, rivals)
    return Task(env.name, maze, world, steps, reference, found, trajectories.paths(ends), rivals)


def _demonstrations(config: TaskConfig, maze: Maze, steps: int, workdir: pathlib.Path, seed: int) -> Transitions:
    if config.file:
        return offline.read(config.file)
    path, count = workdir / "demonstrations.npz", config.transitions or demonstrations.SIZES.get(maze.name, 1_000_000)
    facts = {"maze": config.maze, "seed": seed, "made_by": "diffrl's waypoint controller, noise 0.5"}
    if path.exists():
        found = kept(path, count, facts)
    else:
        begin = time.monotonic()
        made = demonstrations.maze_walk(maze, count, steps, seed)
        found = Transitions(made.observations, made.actions, made.rewards, made.terminals, made.timeouts)
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            trajectories.save(path, found, **facts)
        print(f"{count:,} demonstrated steps in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    if config.reward == "sparse":
        return found
    distance = np.linalg.norm(found.observations[:, :2] - np.array(maze.goal, np.float32), axis=1)
    return found._replace(rewards=np.asarray(maze2d.REWARDS[config.reward](distance), np.float32))


def kept(path: pathlib.Path, count: int, facts: dict[str, Any]) -> Transitions:
    """The demonstrations that a run has made before; raises UserError where they are not those that are asked for."""
    found, told = trajectories.load(path)
    wanted, has = {**facts, "transitions": count}, {**told, "transitions": len(found.rewards)}
    for name, value in wanted.items():
        if has.get(name) != value:
            raise UserError(
                f"{path} holds demonstrations of {name}={has.get(name)!r}, not {value!r}: choose another --workdir"
            )
    return found


def _check_places(places: np.ndarray, maze: Maze, file: str) -> None:
    """Raises UserError where demonstrations walk through this maze's walls: they are of another maze."""
    cells = np.rint(places).astype(int)
    inside = ((cells >= 0) & (cells < maze.walls.shape)).all(axis=1)
    off = ~inside
    off[inside] = maze.walls[tuple(cells[inside].T)]
    if off.mean() > 1e-3:
        raise UserError(
            f"task.file={file}: {off.mean():.0%} of its positions are not in free cells of {maze.name}; it is of "
            "another maze, or has other coordinates (Gymnasium-Robotics' PointMaze has; D4RL's maze2d fits)"
        )


def _reference(env: Environment, steps: int, rivals: dict[str, Controller]) -> tuple[float, float]:
    keys = jax.random.split(jax.random.key(0), RANDOM_RETURN_EPISODES)
    low, high = (
        float(jax.jit(controllers.execute(env, rivals[name], steps))(keys).episode_return.mean())
        for name in ("random actions", "waypoint controller")
    )
    return low, high


def make_normalisers(config: TaskConfig, task: Any) -> dict[str, normalisers.Normaliser]:
    """Of observations and actions, as arrays of jax."""
    kinds = {"limits": normalisers.limits, "gaussian": normalisers.gaussian, "cdf": normalisers.cdf}
    fit = denoising.choose("task.normaliser", config.normaliser, kinds)
    found = {"observations": fit(task.transitions.observations), "actions": fit(task.transitions.actions)}
    return jax.tree.map(jnp.asarray, found)


def make_source(task: Any, fitted: Any, config: ModelConfig, returns: Any = None, pad: bool = False) -> Source:
    """Windows of the demonstrations, as long as a model's plans.

    pad: whether they may reach beyond a path's end; else a path that is shorter has none, and UserError is raised where
        no path is long enough.
    """
    plain = jax.tree.map(np.asarray, fitted)
    return windows(
        task.transitions,
        task.paths,
        config.horizon,
        observations=plain["observations"],
        actions=plain["actions"],
        pad=pad,
        returns=returns,
        stride=config.stride,
        name=task.name,
    )


def scaled_returns(task: Any, discount: float, penalty: float = 0.0) -> np.ndarray:
    """Discounted returns to the end of the path [N], of mean 0 and variance 1: what a value learns.

    penalty: what a step that terminates costs.
    """
    rewards = task.transitions.rewards - penalty * task.transitions.terminals.astype(np.float32)
    found = trajectories.returns_to_go(rewards, task.paths, discount)
    return (found - found.mean()) / max(float(found.std()), 1e-6)


def goal_observation(world: State) -> Array:
    """Where worlds are to go, as observations [B, 4]: at the goal, at rest."""
    return jnp.pad(world.info["goal"], ((0, 0), (0, 2)))


def normalised(task: Any, returns: Any) -> np.ndarray:
    """D4RL's scores of returns: 0 for random actions, 100 for its reference."""
    low, high = task.reference
    return 100 * (np.asarray(returns, np.float64) - low) / (high - low)
