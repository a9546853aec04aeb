"""Advantage actor-critic, synchronous (Mnih et al., arXiv:1602.01783, as OpenAI's baselines made it).

    python -m experiments.a2c                                    # CartPole, five seeds at once: a minute of CPU
    python -m experiments.a2c --config.world.name=acrobot

Many worlds take a few steps, one gradient follows from all of them, and they go on.  Writes metrics.jsonl, curve.png
(interquartile mean over seeds, 95 % interval), results.json and video.gif; the same command again resumes, bit for bit.
Expected: CartPole 475 and more after 500k steps.
"""

import dataclasses

import optax

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.recipes import policies, reinforcement, worlds
from diffrl.recipes.policies import NetConfig
from diffrl.recipes.reinforcement import RunConfig
from diffrl.recipes.worlds import WorldConfig
from diffrl.rl.agent import Agent
from diffrl.rl.agents.a2c import a2c
from diffrl.rl.environment import Environment
from diffrl.rl.on_policy import on_policy
from diffrl.train.mesh import MeshConfig, init_distributed


@dataclasses.dataclass
class A2CConfig:
    """The algorithm; see `diffrl.rl.agents.a2c`."""

    unroll: int = leaf(16, "steps of each world from update to update", at_least=1)
    learning_rate: float = leaf(2e-3, above=0)
    anneal: bool = leaf(True, "the learning rate falls linearly to 0")
    clip_norm: float = leaf(0.5, "largest norm of a gradient", above=0)
    discount: float = leaf(0.99, at_least=0, at_most=1)
    lam: float = leaf(0.95, "lambda of the generalised advantages; 1 is the paper's", at_least=0, at_most=1)
    entropy: float = leaf(0.01, "weight of the entropy", at_least=0)
    value_weight: float = leaf(0.5, at_least=0)
    # Values of order 10 leave the policy its share of the clipped gradient.
    reward_scale: float = leaf(0.1, "what rewards are multiplied with", above=0)


@dataclasses.dataclass
class Config:
    world: WorldConfig = dataclasses.field(default_factory=lambda: WorldConfig(num=16))
    net: NetConfig = dataclasses.field(default_factory=NetConfig)
    a2c: A2CConfig = dataclasses.field(default_factory=A2CConfig)
    run: RunConfig = dataclasses.field(default_factory=lambda: RunConfig(steps=500_000))
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0


def build(config: Config, env: Environment) -> Agent:
    settings = config.a2c
    policies.check(config.net, env, Config().net)
    updates = max(1, config.run.steps // (settings.unroll * config.world.num))
    rate = optax.linear_schedule(settings.learning_rate, 0.0, updates) if settings.anneal else settings.learning_rate
    return a2c(
        policies.actor_critic(config.net, env),
        policies.distribution(config.net, env),
        optax.chain(optax.clip_by_global_norm(settings.clip_norm), optax.adam(rate, eps=1e-5)),
        discount=settings.discount,
        lam=settings.lam,
        entropy=settings.entropy,
        value_weight=settings.value_weight,
    )


def main(config: Config, run: config_lib.Run) -> None:
    env = worlds.vector(config.world, config.world.num, reward_scale=config.a2c.reward_scale)
    unroll = config.a2c.unroll
    session = reinforcement.open_session(
        config, run, env, build(config, env), lambda env, agent, per_shard: on_policy(env, agent, unroll, per_shard)
    )
    reinforcement.finish(session, reinforcement.train(session), f"A2C on {config.world.name}")


PRESETS = {"cartpole": Config}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
