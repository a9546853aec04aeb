"""How often should a planner plan anew, and from what?  Diffuser on Maze2D: score and speed against the interval.

    python -m experiments.replanning                               # U-maze, minutes on two cores
    python -m experiments.replanning --mode=eval --config.replan.every='(4,8)' --config.replan.warm=0.3

Three ways to plan anew.  "cold, goal at the end" keeps the goal in a plan's last step, so that it moves away with the
horizon: the agent may always arrive later.  "cold, goal at its time" pins it where it was at first, which takes a model
that has seen goals anywhere in its windows (model.any_arrival).  "warm" does the same from the plan before: shifted,
noised to the level replan.warm and denoised again, for that part of the price.

train: trains, then fills the table (table.md, results.json, replanning.png).  eval: only the table, into eval/.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.evaluate import plots
from diffrl.planning import policies
from diffrl.recipes import closed_loop, planners, planning, results, tasks, training
from diffrl.recipes.closed_loop import EvalConfig
from diffrl.recipes.denoising import DiffusionConfig
from diffrl.recipes.planners import ModelConfig, NetConfig, PlanConfig, ValueConfig
from diffrl.recipes.tasks import TaskConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import MeshConfig, init_distributed
from diffrl.train.optim import OptimConfig


@dataclasses.dataclass
class ReplanConfig:
    """What is compared."""

    every: tuple[int, ...] = leaf((8, 16, 32, 64), "steps from plan to plan", free=True, at_least=1)
    warm: float = leaf(0.5, "noise level of a warm start, as part of the table", free=True, above=0, at_most=1)
    remaining: int = leaf(16, "steps before the goal within which no new plan is made", free=True, at_least=1)


@dataclasses.dataclass
class Config:
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    net: NetConfig = dataclasses.field(default_factory=lambda: NetConfig(multipliers=(1, 2, 4)))
    model: ModelConfig = dataclasses.field(default_factory=lambda: ModelConfig(horizon=32, stride=4, any_arrival=True))
    value: ValueConfig = dataclasses.field(default_factory=ValueConfig)
    diffusion: DiffusionConfig = dataclasses.field(
        default_factory=lambda: DiffusionConfig(process="improved", table_steps=64, prediction="x0", times="discrete")
    )
    optim: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(learning_rate=1e-3, warmup_steps=50, schedule="cosine")
    )
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(
            steps=3000, batch_size=32, ema_decay=0.995, sample_every=0, checkpoint_every=1000
        )
    )
    plan: PlanConfig = dataclasses.field(default_factory=lambda: PlanConfig(steps=32, gain=10.0))
    replan: ReplanConfig = dataclasses.field(default_factory=ReplanConfig)
    eval: EvalConfig = dataclasses.field(default_factory=lambda: EvalConfig(episodes=100, batch=100))
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0


PRESETS = {"umaze": Config}


def main(config: Config, run: config_lib.Run) -> None:
    task = tasks.open_task(config.task, run.workdir, config.seed)
    fitted = tasks.make_normalisers(config.task, task)
    source = tasks.make_source(task, fitted, config.model)
    session = planning.open_session(config, run, source, fitted, planners.diffuser_model(config, fitted, source.shape))
    for every in config.replan.every:
        planners.check_every(config.model, every)
    arenas = {name: arena(session, task, plan) for name, plan in ways(config).items()}
    folder = closed_loop.results_folder(run, config)
    if run.mode == "train":
        current = planning.train(session)
        training.plot_loss(session.writers, run.workdir / "loss.png")
    else:
        current = planning.restored(session)
    found = compare(config, arenas, current, folder)
    text = table(found)
    if jax.process_index() == 0:
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(config, found, folder)
    print(f"everything lies in {run.workdir}")


def ways(config: Config) -> dict[str, PlanConfig]:
    """What is compared, by name."""
    plan, settings = config.plan, config.replan
    often = dataclasses.replace(plan, every=settings.every[0])
    kept = dataclasses.replace(often, remaining=settings.remaining)
    return {
        "one plan": dataclasses.replace(plan, every=0),
        "cold, goal at the end": often,
        "cold, goal at its time": kept,
        "warm, goal at its time": dataclasses.replace(kept, warm=settings.warm),
    }


def arena(session: planning.Session, task: tasks.Task, plan: PlanConfig) -> closed_loop.Arena:
    """Episodes under plans that are made in one of the ways."""
    config = dataclasses.replace(session.config, plan=plan)
    model = planners.diffuser_model(config, session.fitted, session.source.shape)
    return closed_loop.Arena(session._replace(model=model), task, plan)


def compare(
    config: Config, arenas: dict[str, closed_loop.Arena], current: Any, folder: pathlib.Path
) -> list[dict[str, Any]]:
    """A row for each way and interval; one program for each way."""
    rows: list[dict[str, Any]] = []
    count = config.eval.episodes
    for name, arena in arenas.items():
        print(f"{name} ...", file=sys.stderr)
        plan, task = arena.plan, arena.task
        space = planners.make_space(arena.session.fitted, config.model)
        arena.run(current.ema, current.frozen, count)  # compiles
        for every in config.replan.every if plan.every else (0,):
            begin = time.perf_counter()
            returns, seen = arena.run(current.ema, current.frozen, count, every=every)
            seconds = time.perf_counter() - begin
            plans = policies.plans_made(space, task.steps, every=every, remaining=plan.remaining)
            speed = {"plans": plans, "plans_per_s": count * plans / seconds, "episodes_per_s": count / seconds}
            rows.append({"way": name, "every": every, **closed_loop.summary(task, returns), **speed})
            results.save(folder / "results.json", rows)
        closed_loop.draw(task, seen, folder / f"{name.replace(', ', '_').replace(' ', '_')}.png")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| way | every | plans per episode | score | plans per second | episodes per second |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['way']} | {row['every'] or '-'} | {row['plans']} | {row['score']:.1f} ± {row['interval']:.1f} | "
            f"{row['plans_per_s']:.0f} | {row['episodes_per_s']:.1f} |"
        )
    return "\n".join(lines)


def draw(config: Config, rows: list[dict[str, Any]], workdir: Any) -> None:
    """replanning.png: score, and episodes per second, against the interval."""
    figure, axes = plots.panels(1, 2, 4.4, 3.4)
    for i, name in enumerate(ways(config)):
        mine = [row for row in rows if row["way"] == name]
        every = [row["every"] for row in mine]
        colour = plots.COLOURS[i]
        for column, key in enumerate(("score", "episodes_per_s")):
            values = np.array([row[key] for row in mine])
            if name == "one plan":
                axes[0, column].axhline(values[0], color=colour, label=name, linestyle="--")
            else:
                axes[0, column].plot(every, values, color=colour, marker="o", label=name)
    for column, label in enumerate(("normalised score", "episodes per second")):
        axes[0, column].set_xscale("log", base=2)
        axes[0, column].set_xlabel("steps from plan to plan")
        axes[0, column].set_ylabel(label)
    axes[0, 0].legend(frameon=False, fontsize=8)
    plots.save(workdir / "replanning.png", figure)


if __name__ == "__main__":
    config_lib.run(main, PRESETS, modes=("train", "eval"), setup=init_distributed)
