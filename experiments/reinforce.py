"""REINFORCE (Williams, 1992): the policy gradient by whole episodes, with and without a learned baseline.

    python -m experiments.reinforce                              # CartPole, five seeds of each: a minute of CPU
    python -m experiments.reinforce --config.world.name=acrobot --config.run.steps=2000000

A return from here to the end of the episode weighs the log-probability of every action; a baseline, the value of the
observation as a second network learns it, is taken off without changing the expectation, and lowers the variance.

Writes curves.png and table.md of both, and for each its own folder with metrics, curve.png, results.json and video.gif.
Expected: on CartPole both learn, the baseline faster and with less spread.
"""

import dataclasses

import optax

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.recipes import policies, reinforcement, worlds
from diffrl.recipes.policies import NetConfig
from diffrl.recipes.reinforcement import Contestant, RunConfig
from diffrl.recipes.worlds import WorldConfig
from diffrl.rl.agents.reinforce import reinforce
from diffrl.rl.environment import Environment
from diffrl.rl.on_policy import on_policy
from diffrl.train.mesh import MeshConfig, init_distributed


@dataclasses.dataclass
class ReinforceConfig:
    """The algorithm; see `diffrl.rl.agents.reinforce`."""

    variants: tuple[str, ...] = leaf(("baseline", "plain"), "of baseline, plain")
    unroll: int = leaf(500, "steps of each world from update to update; only episodes that end within them count")
    learning_rate: float = leaf(5e-3, above=0)
    clip_norm: float = leaf(0.5, "largest norm of a gradient", above=0)
    discount: float = leaf(0.99, at_least=0, at_most=1)
    entropy: float = leaf(0.0, "weight of the entropy", at_least=0)


@dataclasses.dataclass
class Config:
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    net: NetConfig = dataclasses.field(default_factory=lambda: NetConfig((32,), (64, 64)))
    reinforce: ReinforceConfig = dataclasses.field(default_factory=ReinforceConfig)
    run: RunConfig = dataclasses.field(default_factory=lambda: RunConfig(steps=500_000))
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0


def contestant(config: Config, env: Environment, variant: str) -> Contestant:
    settings = config.reinforce
    agent = reinforce(
        policies.policy(config.net, env),
        policies.distribution(config.net, env),
        optax.chain(optax.clip_by_global_norm(settings.clip_norm), optax.adam(settings.learning_rate)),
        settings.discount,
        policies.value(config.net, env) if variant == "baseline" else None,
        entropy=settings.entropy,
    )
    return Contestant(
        config.world, env, agent, lambda env, agent, per_shard: on_policy(env, agent, settings.unroll, per_shard)
    )


def main(config: Config, run: config_lib.Run) -> None:
    reinforcement.check_names("reinforce.variants", config.reinforce.variants, ("baseline", "plain"))
    env = worlds.vector(config.world, config.world.num)
    policies.check(config.net, env, Config().net, torso=False)
    contestants = {variant: contestant(config, env, variant) for variant in config.reinforce.variants}
    reinforcement.contest(config, run, contestants)


PRESETS = {"cartpole": Config}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
