"""Gymnasium's robots as tasks for planners: demonstrations of ours, the closed loop on the host, scores."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.data import offline, trajectories
from diffrl.data.trajectories import Paths, Transitions
from diffrl.errors import UserError
from diffrl.planning import policies
from diffrl.recipes import closed_loop, planning
from diffrl.recipes.planners import PlanConfig, check_every
from diffrl.recipes.planning import Session
from diffrl.recipes.tasks import TaskConfig, check_fields, kept
from diffrl.rl import locomotion
from diffrl.rl.environment import State

Array = jax.Array
TRANSITIONS = 1_000_000  # of a set of D4RL's


class RobotTask(NamedTuple):
    """A robot: its demonstrations, and the returns that score 0 and 100.

    Attributes:
        robot: hopper, halfcheetah or walker2d.
        label: what scores are to be called: sets of ours are not D4RL's.
    """

    name: str
    robot: str
    label: str
    reference: tuple[float, float]
    transitions: Transitions
    paths: Paths


def open_task(config: TaskConfig, workdir: pathlib.Path, seed: int) -> RobotTask:
    """Demonstrations that a file holds, or that are made with the actors' weights.

    Raises:
        UserError: an unknown robot or quality, fields that are for mazes only, neither a file nor actors,
            demonstrations of something else, or what the files find wrong.
    """
    world = locomotion.named(config.robot)
    check_fields(config)
    path = workdir / "demonstrations.npz"
    label = f"ours-{config.robot}-{config.quality}"
    count = config.transitions or TRANSITIONS
    facts = locomotion.facts(config.robot, config.quality, seed)
    if config.file:
        found, label = offline.read(config.file), f"{config.robot} of {pathlib.Path(config.file).name}"
    elif path.exists():
        found = kept(path, count, facts)
    else:
        if not config.actors:
            raise UserError(
                "task.actors='': name the .npz of trained actors to make demonstrations with, or give task.file"
            )
        made = locomotion.made(config.robot, config.quality, config.actors, count, seed)
        found = Transitions(made.observations, made.actions, made.rewards, made.terminals, made.timeouts)
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            trajectories.save(path, found, **facts)
    sizes, wanted = (found.observations.shape[1], found.actions.shape[1]), (world.observations, world.actions)
    if sizes != wanted:
        raise UserError(
            f"task.file={config.file} has {sizes[0]} numbers per observation and {sizes[1]} per action: "
            f"{config.robot} has {wanted[0]} and {wanted[1]}"
        )
    paths = trajectories.paths(found.terminals | found.timeouts)
    return RobotTask(label, config.robot, label, (world.random, world.expert), found, paths)


class Course:
    """Episodes of a robot under a model's plans, all side by side; the twin of `closed_loop.Arena`."""

    def __init__(self, session: Session, task: RobotTask, plan: PlanConfig, steps: int = locomotion.STEPS):
        self.task, self.session, self.plan, self.steps = task, session, plan, steps
        check_every(session.config.model, plan.every)

        def controller(params, frozen):
            planner, act = session.model.planner(params, frozen), session.model.act(params, frozen)
            return policies.controller(planner, act, plan.every)

        def world(obs):
            off = jnp.zeros(len(obs), bool)
            return State((), obs, jnp.zeros(len(obs)), off, off)

        self._begin = jax.jit(lambda params, frozen, obs, keys: controller(params, frozen).init(keys, world(obs)))
        self._act = jax.jit(
            lambda params, frozen, carry, obs, keys: controller(params, frozen).act(carry, world(obs), keys)
        )
        # What a plan cannot be is found before training.
        size = task.transitions.observations.shape[1]
        obs, keys = jnp.zeros((1, size)), jax.random.split(jax.random.key(0), 1)
        jax.eval_shape(self._begin, planning.shapes(session), session.fitted, obs, keys)

    def run(self, params: Any, frozen: Any, count: int, purpose: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(returns [count], lengths under "length")."""
        key = jax.random.fold_in(jax.random.key(self.plan.seed), purpose)
        carry: list[Any] = []

        def keys(t):
            return jax.random.split(jax.random.fold_in(key, t), count)

        def act(obs, alive, t):
            if not carry:
                carry.append(self._begin(params, frozen, obs, keys(0)))
            actions, carry[0] = self._act(params, frozen, carry[0], obs, keys(t + 1))
            return np.asarray(actions)

        # Other beginnings than those of demonstrations, whose seeds are small.
        seed = 2**31 + 1000 * self.plan.seed + purpose
        returns, lengths = locomotion.run(self.task.robot, act, count, seed, self.steps)
        return returns, {"length": lengths}


def report(
    session: Session, course: Course, current: Any, name: str, folder: pathlib.Path
) -> dict[str, dict[str, float]]:
    """Scores of the last and the best checkpoint beside the demonstrations'; scores.json and scores.md in `folder`."""
    config, task = session.config, course.task
    rows: dict[str, dict[str, float]] = {}
    returns, seen = course.run(current.ema, current.frozen, config.eval.episodes)
    rows[f"{name}, {task.label}, step {int(current.step)}"] = closed_loop.summary(task, returns)
    best = planning.restored(session, best=True) if session.best.steps() else None
    if best is not None and int(best.step) != int(current.step):
        found = course.run(best.ema, best.frozen, config.eval.episodes)[0]
        label = f"{name}, {task.label}, best on the way (step {int(best.step)})"
        rows[label] = closed_loop.summary(task, found)
    sums = np.add.reduceat(task.transitions.rewards.astype(np.float64), task.paths.starts)
    rows["the demonstrations' episodes"] = closed_loop.summary(task, sums[:-1] if len(sums) > 1 else sums)
    closed_loop.write(folder, rows, lengths=seen["length"].tolist())
    return rows
