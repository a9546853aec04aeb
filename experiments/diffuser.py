"""Diffuser (Janner et al., 2022, arXiv:2205.09991) on Maze2D: plans are samples of a diffusion model of trajectories.

    python -m experiments.diffuser                                 # U-maze: data, training, plans; minutes on two cores
    python -m experiments.diffuser --preset=large
    python -m experiments.diffuser --preset=umaze_paper            # the paper's recipe, for a GPU
    python -m experiments.diffuser --config.task.maze='#####/#OOG#/#O#O#/#OOO#/#####' --workdir=runs/mine
    python -m experiments.diffuser --mode=eval --config.plan.every=16 --config.plan.warm=0.5
    python -m experiments.diffuser --preset=hopper --config.task.actors=ACTORS.npz

The default makes a million demonstrated steps, trains a U-Net on every fourth of them (32 rows span 124 steps), plans
with all 64 steps of diffusion and walks: environment, controller and sampler are one compiled program.

train: checkpoints, metrics, curve.json and curve.png (score against steps; the best checkpoint lies in best/), then
scores.json, plans.png and plans.gif, of the last and of the best checkpoint, for the maze's goal (single-task) and for
random ones (multi-task), beside D4RL's controller and random actions.
eval: scores and pictures again, into eval/, with other episodes (--config.plan.seed) or other ways to plan.
"""

import dataclasses
import functools

from diffrl import config as config_lib
from diffrl.recipes import closed_loop, planners, planning, robots, tasks
from diffrl.recipes.closed_loop import EvalConfig
from diffrl.recipes.denoising import DiffusionConfig
from diffrl.recipes.planners import ModelConfig, NetConfig, PlanConfig, ValueConfig
from diffrl.recipes.tasks import TaskConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import MeshConfig, init_distributed
from diffrl.train.optim import OptimConfig


def _diffusion(steps: int) -> DiffusionConfig:
    return DiffusionConfig(process="improved", table_steps=steps, prediction="x0", times="discrete")


@dataclasses.dataclass
class Config:
    task: TaskConfig = dataclasses.field(default_factory=lambda: TaskConfig(cut_at_goal=False))
    net: NetConfig = dataclasses.field(default_factory=lambda: NetConfig(multipliers=(1, 2, 4)))
    model: ModelConfig = dataclasses.field(default_factory=lambda: ModelConfig(horizon=32, stride=4))
    value: ValueConfig = dataclasses.field(default_factory=ValueConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=lambda: _diffusion(64))
    optim: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(learning_rate=1e-3, warmup_steps=50, schedule="cosine")
    )
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(
            steps=2000, batch_size=32, ema_decay=0.995, sample_every=500, checkpoint_every=500
        )
    )
    plan: PlanConfig = dataclasses.field(default_factory=lambda: PlanConfig(gain=10.0))
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0


def _small(maze: str, horizon: int, steps: int) -> Config:
    """For two cores: every fourth step is a row of the plan."""
    config = Config(task=TaskConfig(maze=maze, cut_at_goal=False), model=ModelConfig(horizon=horizon, stride=4))
    config.train = dataclasses.replace(config.train, steps=steps, sample_every=1000, checkpoint_every=1000)
    return config


def medium() -> Config:
    """64 rows span 252 steps; 12 minutes of a core."""
    return _small("medium", 64, 6000)


def large() -> Config:
    """96 rows span 380 steps; 45 minutes of a core."""
    return _small("large", 96, 16_000)


def _paper(maze: str, horizon: int, steps: int) -> Config:
    """The paper's recipe: 2 M updates of 2 x 32 windows, a plan for every step, 3.7 M parameters."""
    return Config(
        task=TaskConfig(maze=maze),
        net=NetConfig(),
        model=ModelConfig(horizon=horizon),
        diffusion=_diffusion(steps),
        optim=OptimConfig(learning_rate=2e-4, weight_decay=0.0, clip_norm=0.0),
        train=TrainConfig(
            steps=2_000_000, batch_size=64, inner=100, ema_decay=0.995, sample_every=50_000, checkpoint_every=50_000,
            log_every=1000,
        ),
        plan=PlanConfig(),
        eval=EvalConfig(episodes=1000, batch=1000),
    )  # fmt: skip


def umaze_paper() -> Config:
    """113.9 single-task and 128.9 multi-task in the paper."""
    return _paper("umaze", 128, 64)


def medium_paper() -> Config:
    """121.5 single-task and 127.2 multi-task in the paper."""
    return _paper("medium", 256, 256)


def large_paper() -> Config:
    """123.0 single-task and 132.1 multi-task in the paper."""
    return _paper("large", 384, 256)


def robot(name: str, scale: float, horizon: int = 32, every: int = 4) -> Config:
    """On our medium set; needs --config.task.actors or --config.task.file, and pip install '.[envs]'.

    D4RL's locomotion at a CPU's size: guided by a value; the paper trains 80 times as long.  As in its code, plans
    for halfcheetah have 4 rows, those for the others 32.
    """
    config = Config(
        task=TaskConfig(robot=name, transitions=200_000, normaliser="gaussian"),
        model=ModelConfig(horizon=horizon, action_weight=10.0),
        value=ValueConfig(train=True, penalty=100.0, scale=scale),
        diffusion=_diffusion(20),
        plan=PlanConfig(clip=False, temperature=0.5, every=every),
        eval=EvalConfig(episodes=8, watch=4),
    )
    config.train = dataclasses.replace(config.train, steps=12_000, sample_every=0, checkpoint_every=2000)
    return config


LOSSES = ("planning", "value", "loss")
PRESETS: config_lib.Presets = {
    "umaze": Config,
    "medium": medium,
    "large": large,
    "umaze_paper": umaze_paper,
    "medium_paper": medium_paper,
    "large_paper": large_paper,
    # How strongly a value may pull after so short a training, as measured: it only harms the walker.
    "hopper": functools.partial(robot, "hopper", 100.0),
    "halfcheetah": functools.partial(robot, "halfcheetah", 0.0, horizon=4, every=1),
    "walker2d": functools.partial(robot, "walker2d", 0.0),
}


def main(config: Config, run: config_lib.Run) -> None:
    (locomotion if config.task.robot else maze)(config, run)
    print(f"everything lies in {run.workdir}")


def maze(config: Config, run: config_lib.Run) -> None:
    task = tasks.open_task(config.task, run.workdir, config.seed)
    fitted = tasks.make_normalisers(config.task, task)
    valued = config.value
    returns = tasks.scaled_returns(task, valued.discount, valued.penalty) if valued.train else None
    source = tasks.make_source(task, fitted, config.model, returns)
    model = planners.diffuser_model(config, fitted, source.shape)
    session = planning.open_session(config, run, source, fitted, model)
    arena = closed_loop.Arena(session, task, config.plan)
    current = closed_loop.trained(session, arena, run.mode, LOSSES)
    closed_loop.report(session, arena, current, "Diffuser", closed_loop.results_folder(run, config))


def locomotion(config: Config, run: config_lib.Run) -> None:
    task = robots.open_task(config.task, run.workdir, config.seed)
    fitted = tasks.make_normalisers(config.task, task)
    returns = tasks.scaled_returns(task, config.value.discount, config.value.penalty)
    source = tasks.make_source(task, fitted, config.model, returns, pad=True)
    model = planners.diffuser_model(config, fitted, source.shape, goal=False)
    session = planning.open_session(config, run, source, fitted, model)
    course = robots.Course(session, task, config.plan)
    current = closed_loop.trained(session, course, run.mode, LOSSES)
    robots.report(session, course, current, "Diffuser", closed_loop.results_folder(run, config))


if __name__ == "__main__":
    config_lib.run(main, PRESETS, modes=("train", "eval"), setup=init_distributed)
