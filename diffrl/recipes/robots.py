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
from diffrl.recipes import closed_loop, planning, results
from diffrl.recipes.planners import PlanConfig
from diffrl.recipes.planning import Session
from diffrl.recipes.tasks import TaskConfig
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
        UserError: an unknown robot or quality, neither a file nor actors, or what the files find wrong.
    """
    _, low, high = locomotion.WORLDS.get(config.robot, ("", 0.0, 1.0))
    path = workdir / "demonstrations.npz"
    label = f"ours-{config.robot}-{config.quality}"
    if config.file:
        found, label = offline.read(config.file), f"{config.robot} of {pathlib.Path(config.file).name}"
    elif path.exists():
        found = trajectories.load(path)[0]
    else:
        facts = locomotion.facts(config.robot, config.quality, seed)
        if not config.actors:
            raise UserError(
                "task.actors='': name the .npz of trained actors to make demonstrations with, or give task.file"
            )
        count = config.transitions or TRANSITIONS
        made = locomotion.made(config.robot, config.quality, config.actors, count, seed)
        found = Transitions(made.observations, made.actions, made.rewards, made.terminals, made.timeouts)
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            trajectories.save(path, found, **facts)
    paths = trajectories.paths(found.terminals | found.timeouts)
    return RobotTask(label, config.robot, label, (low, high), found, paths)


class Course:
    """Episodes of a robot under a model's plans, all side by side; the twin of `closed_loop.Arena`."""

    def __init__(self, session: Session, task: RobotTask, plan: PlanConfig, steps: int = locomotion.STEPS):
        self.task, self.session, self.plan, self.steps = task, session, plan, steps

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

        seed = 1000 * self.plan.seed + purpose
        returns, lengths = locomotion.run(self.task.robot, act, count, seed, self.steps)
        return returns, {"length": lengths}


def report(session: Session, course: Course, current: Any, name: str) -> dict[str, dict[str, float]]:
    """Scores of the last and the best checkpoint beside the demonstrations'; scores.json and scores.md."""
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
    results.save(session.workdir / "scores.json", {**rows, "lengths": seen["length"].tolist()})
    if jax.process_index() == 0:
        (session.workdir / "scores.md").write_text(closed_loop.table(rows) + "\n", encoding="utf-8")
    print(closed_loop.table(rows))
    return rows
