"""Asynchronous advantage actor-critic (Mnih et al., arXiv:1602.01783): threads that share parameters without a lock.

    python -m experiments.a3c                                    # CartPole, two workers: 1.5 minutes of CPU
    python -m experiments.a3c --config.a3c.workers=1             # what asynchrony changes

Every worker steps a world of its own on the host, differentiates A2C's loss in a snapshot of the parameters and
changes the shared ones in place.  How late gradients are is counted.

Writes metrics.jsonl, curve.png, staleness.png (by how many updates gradients were late), results.json and video.gif.
The same command again goes on from the last evaluation, or from where a signal ended it; with threads a run is never
the same twice.
Expected: CartPole above 400 within 400k steps.
"""

import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.errors import UserError
from diffrl.evaluate import learning_curves, plots
from diffrl.recipes import policies, reinforcement, results, worlds
from diffrl.recipes.policies import NetConfig
from diffrl.recipes.reinforcement import RunConfig
from diffrl.recipes.worlds import WorldConfig
from diffrl.rl import evaluation
from diffrl.rl.agent import Transition
from diffrl.rl.agents import a2c, a3c
from diffrl.rl.agents.a3c import Result
from diffrl.rl.asynchronous import RMSProp, Staleness
from diffrl.train import loop
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.writers import Writers


@dataclasses.dataclass
class A3CConfig:
    """The algorithm; see `diffrl.rl.agents.a3c`."""

    workers: int = leaf(2, "threads, each with a world", at_least=1)
    unroll: int = leaf(32, "steps of a worker from update to update", at_least=1)
    learning_rate: float = leaf(1e-3, "of the shared RMSProp", above=0)
    decay: float = leaf(0.99, "of its statistics", above=0, below=1)
    eps: float = leaf(1e-5, "beside its mean square", above=0)
    clip_norm: float = leaf(0.5, "largest norm of a gradient", above=0)
    discount: float = leaf(0.99, at_least=0, at_most=1)
    lam: float = leaf(0.95, "lambda of the generalised advantages; 1 is the paper's", at_least=0, at_most=1)
    entropy: float = leaf(0.01, "weight of the entropy", at_least=0)
    value_weight: float = leaf(0.5, at_least=0)


@dataclasses.dataclass
class Config:
    world: WorldConfig = dataclasses.field(default_factory=lambda: WorldConfig(num=1))
    net: NetConfig = dataclasses.field(default_factory=NetConfig)
    a3c: A3CConfig = dataclasses.field(default_factory=A3CConfig)
    run: RunConfig = dataclasses.field(default_factory=lambda: RunConfig(steps=400_000, seeds=1))
    seed: int = 0


def train(config: Config, workdir: pathlib.Path) -> Result:
    """Runs the workers to the end, from the last evaluation that was saved.

    Raises UserError where parameters have overflowed; nothing of it is saved.
    """
    settings, run = config.a3c, config.run
    env = worlds.vector(worlds.whole(config.world), run.episodes)
    policies.check(config.net, env, Config().net)
    network, family = policies.actor_critic(config.net, env), policies.distribution(config.net, env)
    greedy = a2c.a2c(network, family, optax.identity())
    score = jax.jit(evaluation.evaluate(env, greedy, 10**9, run.explore))
    with contextlib.ExitStack() as closing:
        checkpoints, writers = Checkpoints(workdir / "checkpoints", run.keep), Writers(workdir)
        closing.callback(checkpoints.close)
        closing.callback(writers.close)
        checkpoints.claim()
        start = a3c.init(network, config.seed)
        restored = checkpoints.restore(start)
        if restored is not None:
            start = jax.tree.map(np.asarray, restored[0])
        writers.cut(int(start.steps))
        bar = tqdm(total=run.steps, initial=int(start.steps), desc=config.world.name, unit="step", dynamic_ncols=True)
        closing.callback(bar.close)

        def evaluate(result: Result) -> None:
            steps = int(result.state.steps)
            if not all(np.isfinite(x).all() for x in jax.tree.leaves((result.state.params, result.state.square))):
                raise UserError(
                    f"the parameters are not finite after {steps} steps: lower --config.a3c.learning_rate; "
                    f"{checkpoints.folder} holds what was saved before"
                )
            returns = score(result.state, jax.random.fold_in(jax.random.key(config.seed + 1), steps)).episode_return
            recent = [total for _, total in result.episodes[-20:]]
            told = {"episode_return": float(np.mean(recent))} if recent else {}
            told |= {"staleness": result.staleness.mean, "steps_per_s": result.steps_per_s, **result.metrics}
            writers.scalars(steps, {"env_steps": steps, "eval_return/0": float(returns.mean()), **told})
            checkpoints.save(steps, result.state)
            bar.update(steps - bar.n)
            bar.set_postfix({"return": f"{float(returns.mean()):.1f}", "late by": f"{result.staleness.mean:.2f}"})

        loss = functools.partial(
            a2c.loss,
            discount=settings.discount,
            lam=settings.lam,
            entropy=settings.entropy,
            value_weight=settings.value_weight,
        )

        def of_signs(params: Any, rollout: Transition, *rest: Any) -> Any:
            return loss(params, rollout._replace(reward=jax.numpy.sign(rollout.reward)), *rest)

        with loop.Signals() as signals:
            result = a3c.train(
                lambda _: worlds.on_host(config.world),
                network,
                family,
                steps=run.steps,
                workers=settings.workers,
                unroll=settings.unroll,
                optimizer=RMSProp(settings.learning_rate, settings.decay, settings.eps, True, settings.clip_norm),
                objective=of_signs if worlds.learns_from_signs(config.world) else loss,
                seed=config.seed,
                start=start,
                callback=evaluate,
                every=max(1, run.steps // run.evaluations),
                stopping=lambda: bool(signals.received(0)),
            )
            checkpoints.wait()  # for the one that may be under way
            if int(result.state.steps) not in checkpoints.steps():
                evaluate(result)
            bar.close()
            if int(result.state.steps) < run.steps:
                raise loop.stopped(signals.received(0), int(result.state.steps), checkpoints)
        return result


def draw_staleness(path: pathlib.Path, staleness: Staleness) -> None:
    """How many gradients were late by how much."""
    figure, grid = plots.panels(1, 1, 6.0, 3.4)
    axes = grid[0, 0]
    axes.bar(
        np.arange(len(staleness.histogram)), staleness.histogram / staleness.histogram.sum(), color=plots.COLOURS[0]
    )
    axes.set_yscale("log")
    axes.set_xlabel("updates of other workers between snapshot and application")
    axes.set_ylabel("share of the gradients")
    axes.set_title(f"staleness: mean {staleness.mean:.2f}, at most {staleness.max}", loc="left", fontsize=11)
    plots.save(path, figure)


def finish(config: Config, workdir: pathlib.Path, result: Result) -> None:
    """Curve, staleness, final score and video."""
    curve = reinforcement.curve(workdir)
    title = f"A3C on {config.world.name}, {config.a3c.workers} workers"
    learning_curves.plot(workdir / "curve.png", {title: curve}, title=title)
    if result.staleness.histogram.sum():
        draw_staleness(workdir / "staleness.png", result.staleness)
    env = worlds.vector(worlds.whole(config.world), config.run.final_episodes)
    network, family = policies.actor_critic(config.net, env), policies.distribution(config.net, env)
    agent = a2c.a2c(network, family, optax.identity())
    state: Any = jax.tree.map(jax.numpy.asarray, result.state)
    seen = jax.jit(evaluation.evaluate(env, agent, 10**9, config.run.explore))(state, jax.random.key(config.seed + 2))
    final = float(seen.episode_return.mean())
    # What is known of the threads is of the last call in which they had something to do.
    threads = {
        "staleness_mean": result.staleness.mean,
        "staleness_max": result.staleness.max,
        "steps_per_s": result.steps_per_s,
    }
    if not result.staleness.histogram.sum():
        before = results.load(workdir / "results.json", threads)
        threads = {name: before.get(name, value) for name, value in threads.items()}
    measured = {"return": final, "env_steps": int(result.state.steps), "updates": int(result.state.updates), **threads}
    results.save(workdir / "results.json", measured)
    print(f"return of the final policy, {config.run.final_episodes} episodes: {final:.1f}")
    print(
        f"{threads['steps_per_s']:.0f} steps/s by {config.a3c.workers} workers, gradients late by "
        f"{threads['staleness_mean']:.2f} updates, at most {threads['staleness_max']}; everything lies in {workdir}"
    )
    if config.run.video and not worlds.is_host(config.world):
        reinforcement.show(config.world, agent, state, workdir, config.seed)


def main(config: Config, run: config_lib.Run) -> None:
    if config.run.seeds != 1:
        raise UserError(f"--config.run.seeds={config.run.seeds}: threads run one seed; use --config.seed for others")
    if config.world.num != 1:
        raise UserError(f"--config.world.num={config.world.num}: a thread has one world; use --config.a3c.workers")
    if config.run.checkpoint_every != 1:
        raise UserError(
            f"--config.run.checkpoint_every={config.run.checkpoint_every}: every evaluation is saved; choose 1"
        )
    result = train(config, run.workdir)
    finish(config, run.workdir, result)


PRESETS = {"cartpole": Config}

if __name__ == "__main__":
    config_lib.run(main, PRESETS)
