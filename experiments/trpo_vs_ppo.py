"""TRPO against PPO (Schulman et al., arXiv:1502.05477 and arXiv:1707.06347): same worlds, networks, steps and seeds.

    python -m experiments.trpo_vs_ppo                            # CartPole, Acrobot, Pendulum: 3.5 minutes of CPU
    python -m experiments.trpo_vs_ppo --preset=brax              # a GPU: pip install -e '.[envs]'

TRPO solves for the step of the natural gradient that moves the policy by delta nats and searches along it; PPO takes
many small steps on a clipped ratio.  Both see the same rollouts' sizes and learn values on the same minibatches.

Writes curves.png (a panel for each world), table.md, and a folder for each run.  Expected: both solve all three.
"""

import dataclasses
from typing import Any

import jax
import optax

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.errors import UserError
from diffrl.recipes import policies, reinforcement, worlds
from diffrl.recipes.policies import NetConfig
from diffrl.recipes.reinforcement import Contestant, RunConfig
from diffrl.recipes.worlds import WorldConfig
from diffrl.rl import moments
from diffrl.rl.agent import Agent
from diffrl.rl.agents.ppo import ppo
from diffrl.rl.agents.trpo import trpo
from diffrl.rl.environment import Environment
from diffrl.rl.on_policy import on_policy
from diffrl.train.mesh import MeshConfig, init_distributed


@dataclasses.dataclass
class ContestConfig:
    """What the two share, and what is each's own."""

    worlds: tuple[str, ...] = leaf(("cartpole", "acrobot", "pendulum"), worlds.NAMES)
    agents: tuple[str, ...] = leaf(("trpo", "ppo"), "of trpo, ppo")
    unroll: int = leaf(128, "steps of each world from update to update", at_least=1)
    epochs: int = leaf(10, "passes over a rollout: PPO's, and TRPO's of its values", at_least=1)
    minibatches: int = leaf(8, "parts of a rollout", at_least=1)
    learning_rate: float = leaf(1e-3, "of PPO, and of TRPO's values", above=0)
    clip: float = leaf(0.2, "of PPO's ratio", above=0)
    delta: float = leaf(0.01, "nats, TRPO's step", above=0)
    damping: float = leaf(0.1, "of TRPO's Fisher matrix", at_least=0)
    discount: float = leaf(0.98, at_least=0, at_most=1)
    lam: float = leaf(0.95, at_least=0, at_most=1)
    reward_scale: float = leaf(0.1, "what rewards are multiplied with", above=0)


@dataclasses.dataclass
class Config:
    world: WorldConfig = dataclasses.field(default_factory=lambda: WorldConfig(num=16))
    net: NetConfig = dataclasses.field(default_factory=NetConfig)
    contest: ContestConfig = dataclasses.field(default_factory=ContestConfig)
    run: RunConfig = dataclasses.field(default_factory=lambda: RunConfig(steps=300_000))
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0


def brax() -> Config:
    """Three of brax's robots, five seeds each."""
    return Config(
        world=WorldConfig(num=512),
        net=NetConfig((64, 64), (256, 256), "silu", orthogonal=False, squash=True, free_std=False),
        contest=ContestConfig(
            worlds=("brax:reacher", "brax:hopper", "brax:halfcheetah"),
            unroll=40,
            minibatches=16,
            learning_rate=3e-4,
            reward_scale=1.0,
        ),
        run=RunConfig(steps=20_000_000, episodes=64, final_episodes=64),
    )


def agent(config: Config, env: Environment, name: str) -> Agent:
    settings = config.contest
    policy, value = policies.policy(config.net, env), policies.value(config.net, env)
    distribution = policies.distribution(config.net, env)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(settings.learning_rate, eps=1e-5))
    returns: dict[str, Any] = {"discount": settings.discount, "lam": settings.lam}
    if name == "trpo":
        made = trpo(
            policy,
            value,
            distribution,
            optimizer,
            delta=settings.delta,
            damping=settings.damping,
            value_epochs=settings.epochs,
            value_minibatches=settings.minibatches,
            **returns,
        )
    else:
        network = policies.actor_critic(config.net, env)
        made = ppo(
            network,
            distribution,
            optimizer,
            clip=settings.clip,
            epochs=settings.epochs,
            minibatches=settings.minibatches,
            **returns,
        )
    return moments.normalised(made, jax.ShapeDtypeStruct(env.obs.shape[1:], env.obs.dtype))


def main(config: Config, run: config_lib.Run) -> None:
    settings = config.contest
    reinforcement.check_names("contest.agents", settings.agents, ("trpo", "ppo"))
    if not settings.worlds:
        raise UserError(f"--config.contest.worlds=() is empty: choose from {worlds.NAMES}")
    if config.world.name != WorldConfig().name:
        raise UserError(f"--config.world.name={config.world.name}: the worlds are those of --config.contest.worlds")
    contestants = {}
    for world in settings.worlds:
        here = dataclasses.replace(config.world, name=world)
        env = worlds.vector(here, here.num, reward_scale=settings.reward_scale)
        if len(settings.worlds) == 1:  # among several, what says nothing of one may be meant for another
            policies.check(config.net, env, Config().net, torso=False)
        for name in settings.agents:
            contestants[f"{world}/{name}"] = Contestant(
                here,
                env,
                agent(config, env, name),
                lambda env, agent, per_shard: on_policy(env, agent, settings.unroll, per_shard),
            )
    reinforcement.contest(config, run, contestants)


PRESETS = {"classic": Config, "brax": brax}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
