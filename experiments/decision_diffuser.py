"""Decision Diffuser (Ajay et al., 2023, arXiv:2211.15657): plans of observations, asked for by their return.

    python -m experiments.decision_diffuser                        # U-maze, minutes on two cores
    python -m experiments.decision_diffuser --mode=eval --config.decision.target=0.5      # asks for a middling return
    python -m experiments.decision_diffuser --mode=eval --config.decision.guidance=0      # asks for nothing
    python -m experiments.decision_diffuser --preset=hopper --config.task.actors=ACTORS.npz

The model is not told where the goal is.  It is told a return by its rank among the demonstrations': of the next steps
in a maze (time near the goal), to the episode's end of a robot, discounted.  It is asked for a high one: with
decision.target for that rank, else for what the best ones had from where the plan begins.  Noise of half the
standard deviation draws likely plans; an inverse model acts, and plans are made anew every few steps.

train, eval: as of `experiments.diffuser`.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.data import normalisers, trajectories
from diffrl.errors import UserError
from diffrl.recipes import closed_loop, planners, planning, robots, tasks
from diffrl.recipes.closed_loop import EvalConfig
from diffrl.recipes.denoising import DiffusionConfig
from diffrl.recipes.planners import DecisionConfig, ModelConfig, NetConfig, PlanConfig
from diffrl.recipes.tasks import TaskConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import MeshConfig, init_distributed
from diffrl.train.optim import OptimConfig


@dataclasses.dataclass
class Config:
    # Windows may run across the goal and out of it again: returns tell them apart.
    task: TaskConfig = dataclasses.field(default_factory=lambda: TaskConfig(cut_at_goal=False))
    net: NetConfig = dataclasses.field(default_factory=lambda: NetConfig(multipliers=(1, 2, 4)))
    model: ModelConfig = dataclasses.field(default_factory=lambda: ModelConfig(horizon=32, stride=4))
    decision: DecisionConfig = dataclasses.field(default_factory=lambda: DecisionConfig(quantile=0.98))
    return_discount: float = leaf(0.97, "of rewards, from step to step", above=0, at_most=1)
    diffusion: DiffusionConfig = dataclasses.field(
        default_factory=lambda: DiffusionConfig(process="improved", table_steps=64, prediction="x0", times="discrete")
    )
    optim: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(learning_rate=1e-3, warmup_steps=50, schedule="cosine")
    )
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(
            steps=2000, batch_size=32, ema_decay=0.995, sample_every=1000, checkpoint_every=500
        )
    )
    plan: PlanConfig = dataclasses.field(default_factory=lambda: PlanConfig(steps=16, temperature=0.5, every=16))
    eval: EvalConfig = dataclasses.field(default_factory=lambda: EvalConfig(episodes=100, watch=50, batch=100))
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = leaf(0, "of demonstrations and training", at_least=0)


def robot(name: str, horizon: int = 32, every: int = 2, steps: int = 6000) -> Config:
    """On our medium set; needs --config.task.actors or --config.task.file, and pip install '.[envs]'.

    D4RL's locomotion at a CPU's size: 32 rows, and 4 for halfcheetah as in Diffuser's code, asked for the best
    returns that were had from there.
    """
    config = Config(
        task=TaskConfig(robot=name, transitions=200_000, normaliser="gaussian"),
        model=ModelConfig(horizon=horizon),
        return_discount=0.99,
        diffusion=DiffusionConfig(process="improved", table_steps=20, prediction="x0", times="discrete"),
        plan=PlanConfig(temperature=0.5, clip=False, every=every),
        eval=EvalConfig(episodes=8, watch=4),
    )
    config.train = dataclasses.replace(config.train, steps=steps, sample_every=0, checkpoint_every=1000)
    return config


LOSSES = ("planning", "acting")
PRESETS: config_lib.Presets = {
    "umaze": Config,
    "hopper": functools.partial(robot, "hopper"),
    "halfcheetah": functools.partial(robot, "halfcheetah", horizon=4, every=1, steps=12_000),
    "walker2d": functools.partial(robot, "walker2d"),
}


def main(config: Config, run: config_lib.Run) -> None:
    (locomotion if config.task.robot else maze)(config, run)
    print(f"everything lies in {run.workdir}")


def maze(config: Config, run: config_lib.Run) -> None:
    if config.task.random_goal:
        raise UserError("task.random_goal=True: returns are those of the maze's own goal here; leave it out")
    task = tasks.open_task(config.task, run.workdir, config.seed)
    span = (config.model.horizon - 1) * config.model.stride + 1
    returns = trajectories.window_returns(task.transitions.rewards, task.paths, span, config.return_discount)
    session = opened(config, run, task, returns)
    arena = closed_loop.Arena(session, task, config.plan, goal=False)
    current = closed_loop.trained(session, arena, run.mode, LOSSES)
    closed_loop.report(
        session, arena, current, "Decision Diffuser", closed_loop.results_folder(run, config), goal=False
    )


def locomotion(config: Config, run: config_lib.Run) -> None:
    task = robots.open_task(config.task, run.workdir, config.seed)
    returns = trajectories.returns_to_go(task.transitions.rewards, task.paths, config.return_discount)
    session = opened(config, run, task, returns, pad=True)
    course = robots.Course(session, task, config.plan)
    current = closed_loop.trained(session, course, run.mode, LOSSES)
    robots.report(session, course, current, "Decision Diffuser", closed_loop.results_folder(run, config))


def opened(config: Config, run: config_lib.Run, task: Any, returns: np.ndarray, pad: bool = False) -> planning.Session:
    """A session whose model is told the ranks, 0 to 1, of returns [N]."""
    fitted = tasks.make_normalisers(config.task, task)
    ranks = 0.5 + 0.5 * normalisers.normalise(normalisers.cdf(returns[:, None]), returns[:, None])[:, 0]
    source = tasks.make_source(task, fitted, config.model, ranks, pad)
    return planning.open_session(config, run, source, fitted, planners.decision_model(config, fitted, source.shape))


if __name__ == "__main__":
    config_lib.run(main, PRESETS, modes=("train", "eval"), setup=init_distributed)
