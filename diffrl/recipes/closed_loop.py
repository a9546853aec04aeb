"""What a planner is worth in its world: scores with intervals, the best checkpoint, pictures and videos."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.config import Run, leaf
from diffrl.evaluate import grids, plots, video
from diffrl.planning import policies
from diffrl.recipes import planning, results, tasks, training
from diffrl.recipes.planners import PlanConfig, check_every
from diffrl.recipes.planning import Session
from diffrl.recipes.tasks import Task
from diffrl.rl import controllers, drawing, maze2d
from diffrl.train import hooks, mesh
from diffrl.train.state import TrainState

Array = jax.Array
SHOWN = 8  # episodes that are drawn
FRAMES = 150  # of a video, about


@dataclasses.dataclass
class EvalConfig:
    episodes: int = leaf(200, "of every policy, at the end", free=True, at_least=1)
    watch: int = leaf(50, "episodes of the score while training", free=True, at_least=1)
    batch: int = leaf(200, "episodes side by side", free=True, at_least=1)
    video: bool = leaf(True, "end with a video", free=True)


class Arena:
    """Episodes of one task, under a model's plans or a rival's control, with the maze's goal or random ones.

    Each is compiled once, for any parameters, replanning interval and kind of goal.
    """

    def __init__(self, session: Session, task: Task, plan: PlanConfig, goal: bool = True):
        self.task, self.session, self.plan = task, session, plan
        check_every(session.config.model, plan.every)
        target = tasks.goal_observation if goal else None

        def play(params, frozen, keys, every, random_goal):
            planner, act = session.model.planner(params, frozen), session.model.act(params, frozen)
            # Where plans are made but once, no second sampler is compiled.
            often = every if plan.every else 0
            controller = policies.controller(planner, act, often, goal=target, remaining=plan.remaining)

            def keep(world, carry, action):
                planned = carry.plan.observations[:SHOWN, :, :2]
                return {"obs": world.obs[:SHOWN], "plan": planned, "goal": world.info["goal"][:SHOWN]}

            return controllers.execute(task.world(random_goal), controller, task.steps, keep)(keys)

        def compete(who, keys, random_goal):
            return controllers.execute(task.world(random_goal), who, task.steps, lambda *_: {})(keys)

        self._play = jax.jit(play)
        self._rivals = {name: jax.jit(functools.partial(compete, who)) for name, who in task.rivals.items()}
        # What a plan cannot be is found before training.
        keys = jax.random.split(jax.random.key(0), _batch(self, session.config.eval.episodes))
        jax.eval_shape(self._play, planning.shapes(session), session.fitted, keys, jnp.asarray(0), jnp.asarray(False))

    def run(
        self,
        params: Any,
        frozen: Any,
        count: int,
        purpose: int = 0,
        every: int | None = None,
        random_goal: bool | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(returns [count], what was seen of the first `SHOWN` episodes, [steps, SHOWN, ...]).

        every: steps from plan to plan, in place of the config's, where that is not 0.
        random_goal: in place of the config's.
        """
        often = jnp.asarray(self.plan.every if every is None else every)
        random = self._random(random_goal)
        return _in_batches(self, lambda keys: self._play(params, frozen, keys, often, random), count, purpose)

    def rival(self, name: str, count: int, purpose: int = 0, random_goal: bool | None = None) -> np.ndarray:
        """Returns [count] of one of the task's rivals, in the same episodes."""
        random = self._random(random_goal)
        return _in_batches(self, lambda keys: self._rivals[name](keys, random), count, purpose)[0]

    def _random(self, random_goal: bool | None) -> Array:
        return jnp.asarray(self.session.config.task.random_goal if random_goal is None else random_goal)


def _batch(arena: Arena, count: int) -> int:
    """Episodes side by side, as many for each device."""
    parts = mesh.batch_parts(arena.session.devices)
    return -(-min(arena.session.config.eval.batch, count) // parts) * parts


def _in_batches(arena: Arena, play: Callable, count: int, purpose: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Episode i has the key (seed, purpose, i), whatever the size of a batch."""
    devices, size = arena.session.devices, _batch(arena, count)
    key = jax.random.fold_in(jax.random.key(arena.plan.seed), purpose)
    returns: list[np.ndarray] = []
    shown: dict[str, np.ndarray] = {}
    for first in range(0, count, size):
        ids = mesh.put_global(devices, np.arange(first, first + size))
        episodes, seen = play(jax.vmap(jax.random.fold_in, (None, 0))(key, ids))
        shown = shown or {name: mesh.fetch(x) for name, x in seen.items()}
        returns.append(mesh.fetch(episodes.episode_return))
    return np.concatenate(returns)[:count], shown


def summary(task: Any, returns: np.ndarray) -> dict[str, float]:
    """Mean of the normalised scores, half of its 95 % interval, and the mean return."""
    scores = tasks.normalised(task, returns)
    error = scores.std(ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.nan
    return {"score": scores.mean(), "interval": 1.96 * error, "return": returns.mean(), "episodes": len(returns)}


def watch(session: Session, arena: Any) -> hooks.Hook:
    """Now and then, the score of the averaged parameters: into curve.json, and the best ones into best/."""
    path, settings = session.workdir / "curve.json", session.config.train
    task = session.config.task
    judged = {"steps": task.steps, "reward": task.reward, "random_goal": task.random_goal, "start": list(task.start)}
    how = {"plan": dataclasses.asdict(session.config.plan), "task": judged}
    begun: list[bool] = []

    def hook(done, current):
        curve = {int(step): found for step, found in results.load(path, {}).items()}
        if not begun:  # a resumed run walks over its last steps again
            begun.append(True)
            curve = {step: found for step, found in curve.items() if step < done}
        found = summary(arena.task, arena.run(current.ema, current.frozen, session.config.eval.watch, purpose=1)[0])
        # Scores of other plans or other episodes, as of a run that was resumed with them, are not to be compared.
        best = max((earlier["score"] for earlier in curve.values() if earlier.get("how") == how), default=-np.inf)
        curve[done] = {**found, "how": how}
        results.save(path, curve)
        session.writers.scalars(done, {"score": found["score"]})
        if found["score"] > best and not session.best.has(done):
            session.best.save(done, current)

    return hooks.every(settings.sample_every, hook, settings.inner)


def trained(session: Session, judge: Any, mode: str, losses: tuple[str, ...]) -> TrainState:
    """The state at the end of training, loss.png and curve.png drawn; in mode eval that of the newest checkpoint.

    judge: an `Arena`, or a `robots.Course`.
    """
    if mode == "eval":
        return planning.restored(session)
    current = planning.train(session, [watch(session, judge)] if session.config.train.sample_every else [])
    training.plot_loss(session.writers, session.workdir / "loss.png", losses)
    plot_curve(session, judge.task)
    return current


def plot_curve(session: Session, task: Any) -> None:
    """curve.png: score against training steps."""
    curve = results.load(session.workdir / "curve.json", {})
    if len(curve) > 1:
        steps = sorted(map(int, curve))
        series = {"score": (steps, [curve[str(step)]["score"] for step in steps])}
        plots.curves(
            session.workdir / "curve.png", series, "training steps", "normalised score", title=task.name, markers=True
        )


def table(rows: dict[str, dict[str, float]]) -> str:
    """Names, scores with their 95 % intervals, and returns, as markdown."""
    lines = ["| policy | score | return | episodes |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['score']:.1f} ± {row['interval']:.1f} | {row['return']:.1f} | {row['episodes']} |"
        )
    return "\n".join(lines)


def results_folder(run: Run, config: Any) -> pathlib.Path:
    """Where a run's results go: its workdir, or, not to replace those of training, eval/ there with the settings."""
    if run.mode == "train":
        return run.workdir
    folder = run.workdir / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / "config.json", dataclasses.asdict(config))
    return folder


def write(folder: pathlib.Path, rows: dict[str, dict[str, float]], **more: Any) -> None:
    """scores.json and scores.md, which is also printed."""
    results.save(folder / "scores.json", {**rows, **more})
    if jax.process_index() == 0:
        (folder / "scores.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


def report(
    session: Session, arena: Arena, current: Any, name: str, folder: pathlib.Path, goal: bool = True
) -> dict[str, dict[str, float]]:
    """Scores of the last and the best checkpoint beside the others', for the maze's goal and, with `goal`, random ones.

    Writes scores.json, scores.md, pictures and videos into `folder`, and returns the rows of the table.
    """
    config, task = session.config, arena.task
    count = config.eval.episodes
    rows: dict[str, dict[str, float]] = {}
    kinds = [config.task.random_goal, *([not config.task.random_goal] if goal else [])]
    best = planning.restored(session, best=True) if session.best.steps() else None
    for random in kinds:
        goals = "random goals" if random else "the maze's goal"
        returns, seen = arena.run(current.ema, current.frozen, count, random_goal=random)
        rows[f"{name}, {goals}, step {int(current.step)}"] = summary(task, returns)
        if best is not None and int(best.step) != int(current.step):
            label = f"{name}, {goals}, best on the way (step {int(best.step)})"
            rows[label] = summary(task, arena.run(best.ema, best.frozen, count, random_goal=random)[0])
        for who in task.rivals:
            rows[f"{who}, {goals}"] = summary(task, arena.rival(who, count, random_goal=random))
        picture = "plans_random_goals" if random else "plans"
        draw(task, seen, folder / f"{picture}.png")
        if config.eval.video:
            film(task, seen, folder / f"{picture}.gif")
    write(folder, rows)
    print(f"\nplans (teal) and what was walked (red): {folder}/plans.png", file=sys.stderr)
    return rows


# --- Pictures --------------------------------------------------------------------------------------------------------


def draw(task: Task, seen: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """The first plan (teal) and the path that was walked (red) of every shown episode; dots are starts."""
    boards = []
    for i in range(seen["obs"].shape[1]):
        paths = [seen["plan"][0, i], seen["obs"][:, i, :2]]
        board = maze2d.picture(task.maze, seen["goal"][0, i], paths, (drawing.TEAL, drawing.RED))
        boards.append(board.picture())
    grids.save_png(path, grids.image_grid(np.stack(boards), columns=min(4, len(boards)), padding=6))


def film(task: Task, seen: dict[str, np.ndarray], path: pathlib.Path, worlds: int = 4) -> None:
    """The plan at hand, the path so far and the ball, of a few episodes side by side."""
    count = len(seen["obs"])
    every = max(1, count // FRAMES)
    frames = []
    for t in range(0, count, every):
        boards = []
        for i in range(min(worlds, seen["obs"].shape[1])):
            paths = [seen["plan"][t, i], seen["obs"][: t + 1, i, :2]]
            board = maze2d.picture(task.maze, seen["goal"][0, i], paths, (drawing.TEAL, drawing.RED), pixels=28)
            board.circle(maze2d.turned(seen["obs"][t, i, :2]), 0.14, drawing.INK)
            boards.append(board.picture())
        frames.append(grids.image_grid(np.stack(boards), columns=2, padding=4, scale=1))
    video.gif(path, frames, fps=25)
