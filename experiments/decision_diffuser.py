"""Decision Diffuser (Ajay et al., 2023, arXiv:2211.15657): plans of observations, asked for by their return.

    python -m experiments.decision_diffuser                        # U-maze, minutes on two cores
    python -m experiments.decision_diffuser --mode=eval --config.decision.target=0.5
    python -m experiments.decision_diffuser --mode=eval --config.decision.guidance=0      # asks for nothing

The model is not told where the goal is.  It is told the return of the next steps (time near the goal, discounted), by
its rank among the demonstrations', and is asked for a high one: with decision.quantile, for what the best ones had from
where the plan begins, else for decision.target.  Noise of half the standard deviation draws likely plans; an inverse
model acts, and plans are made anew every few steps.

train, eval: as of `experiments.diffuser`.
"""

import dataclasses

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.data import normalisers, trajectories
from diffrl.recipes import closed_loop, planners, planning, tasks, training
from diffrl.recipes.closed_loop import EvalConfig
from diffrl.recipes.denoising import DiffusionConfig
from diffrl.recipes.planners import DecisionConfig, ModelConfig, NetConfig, PlanConfig
from diffrl.recipes.tasks import TaskConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import MeshConfig, init_distributed
from diffrl.train.optim import OptimConfig


@dataclasses.dataclass
class Config:
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
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
    seed: int = 0


PRESETS = {"umaze": Config}


def main(config: Config, run: config_lib.Run) -> None:
    task = tasks.open_task(config.task, run.workdir, config.seed)
    # Windows may run across the goal and out of it again: returns tell them apart.
    paths = trajectories.paths(task.transitions.timeouts & ~task.transitions.timeouts)
    task = task._replace(paths=paths)
    fitted = tasks.make_normalisers(config.task, task)
    span = (config.model.horizon - 1) * config.model.stride + 1
    returns = trajectories.window_returns(task.transitions.rewards, paths, span, config.return_discount)[:, None]
    ranks = 0.5 + 0.5 * normalisers.normalise(normalisers.cdf(returns), returns)[:, 0]
    source = tasks.make_source(task, fitted, config.model, ranks)
    model = planners.decision_model(config, fitted, source.shape)
    session = planning.open_session(config, run, source, fitted, model)
    arena = closed_loop.Arena(session, task, config.plan, goal=False)
    if run.mode == "train":
        current = planning.train(session, [closed_loop.watch(session, arena)] if config.train.sample_every else [])
        training.plot_loss(session.writers, run.workdir / "loss.png", ("planning", "acting"))
        closed_loop.plot_curve(session, task)
    else:
        current = planning.restored(session)
    closed_loop.report(session, arena, current, "Decision Diffuser", goal=False)
    print(f"everything lies in {run.workdir}")


if __name__ == "__main__":
    config_lib.run(main, PRESETS, modes=("train", "eval"), setup=init_distributed)
