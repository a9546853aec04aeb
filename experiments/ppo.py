"""Proximal policy optimisation (Schulman et al., arXiv:1707.06347), from CartPole on a laptop to Brax on a GPU.

    python -m experiments.ppo                                    # CartPole, five seeds at once: a minute of CPU
    python -m experiments.ppo --preset=pendulum
    python -m experiments.ppo --preset=inverted_pendulum         # Brax: pip install -e '.[envs]'
    python -m experiments.ppo --preset=ant                       # a GPU
    python -m experiments.ppo --config.world.name=minatar:breakout --config.run.steps=2000000

All seeds train in one program: collecting, learning and many seeds are one jitted scan.  The same command again
resumes, bit for bit.

Writes metrics.jsonl and TensorBoard, curve.png (interquartile mean over seeds, 95 % interval), results.json and a
video (video.gif, or Brax's viewer video.html).  Expected: CartPole 500 after 100k steps.
"""

import dataclasses
from typing import Any

import jax
import optax

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.recipes import policies, reinforcement, worlds
from diffrl.recipes.policies import NetConfig
from diffrl.recipes.reinforcement import RunConfig
from diffrl.recipes.worlds import WorldConfig
from diffrl.rl import moments
from diffrl.rl.agent import Agent
from diffrl.rl.agents.ppo import ppo
from diffrl.rl.environment import Environment
from diffrl.rl.on_policy import on_policy
from diffrl.train.mesh import MeshConfig, init_distributed


@dataclasses.dataclass
class PPOConfig:
    """The algorithm; see `diffrl.rl.agents.ppo`."""

    unroll: int = leaf(128, "steps of each world from update to update", at_least=1)
    epochs: int = leaf(10, "passes over a rollout", at_least=1)
    minibatches: int = leaf(4, "parts of a rollout, an update of the parameters each", at_least=1)
    learning_rate: float = leaf(1e-3, above=0)
    anneal: bool = leaf(True, "the learning rate falls linearly to 0")
    clip_norm: float = leaf(0.5, "largest norm of a gradient", above=0)
    adam_eps: float = leaf(1e-5, "beside the root of Adam's mean square", above=0)
    discount: float = leaf(0.99, at_least=0, at_most=1)
    lam: float = leaf(0.95, "lambda of the generalised advantages", at_least=0, at_most=1)
    clip: float | None = leaf(0.2, "of the probability ratio; None = no clipping", above=0)
    value_clip: float | None = leaf(None, "of a value's change; None = none", above=0)
    kl_target: float | None = leaf(None, "nats an update, held by an adaptive penalty; None = none", above=0)
    entropy: float = leaf(0.0, "weight of the entropy", at_least=0)
    value_weight: float = leaf(0.5, at_least=0)
    advantages: str = leaf("rollout", "when they are formed anew: each rollout, epoch or minibatch")
    window: int = leaf(0, "steps of the windows that minibatches hold; 0: of the rollout", at_least=0)
    reward_scale: float = leaf(1.0, "what rewards are multiplied with", above=0)
    normalise_obs: bool = leaf(False, "observations to mean 0 and deviation 1, as seen so far")
    normalise_rewards: bool = leaf(False, "rewards by the deviation of the discounted return")


@dataclasses.dataclass
class Config:
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    net: NetConfig = dataclasses.field(default_factory=NetConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0


def acrobot() -> Config:
    """About -80 after 200k steps."""
    return Config(
        world=WorldConfig(name="acrobot", num=16),
        ppo=PPOConfig(unroll=128, epochs=4, minibatches=4, entropy=0.01, normalise_obs=True, lam=0.94),
        run=RunConfig(steps=300_000),
    )


def pendulum() -> Config:
    """About -160."""
    return Config(
        world=WorldConfig(name="pendulum", num=16),
        ppo=PPOConfig(unroll=128, epochs=10, minibatches=16, discount=0.9, lam=0.95, reward_scale=0.1),
        run=RunConfig(steps=300_000),
    )


def breakout() -> Config:
    """MinAtar (Young & Tian, arXiv:1903.03176) from pictures."""
    return Config(
        world=WorldConfig(name="minatar:breakout", num=64),
        ppo=PPOConfig(unroll=128, epochs=4, minibatches=8, learning_rate=1e-3, entropy=0.01),
        run=RunConfig(steps=2_000_000, seeds=1),
    )


def brax(name: str, steps: int, **changes: Any) -> Config:
    """The sizes of Brax's own recipes: 32 minibatches of thousands of samples, wide values, squashed actions."""
    settings: dict[str, Any] = {
        **{"unroll": 80, "epochs": 4, "minibatches": 32, "learning_rate": 3e-4, "anneal": False, "clip_norm": 1e9},
        **{"adam_eps": 1e-8},
        **{"discount": 0.97, "clip": 0.3, "entropy": 1e-2, "reward_scale": 10.0, "normalise_obs": True},
        **{"advantages": "minibatch", "window": 20},
    }
    world = WorldConfig(name=f"brax:{name}", num=2048)
    for field in ("num", "action_repeat", "backend"):
        if field in changes:
            world = dataclasses.replace(world, **{field: changes.pop(field)})
    out_scale = changes.pop("out_scale", 1.0)
    return Config(
        world=world,
        net=NetConfig((32,) * 4, (256,) * 5, "silu", False, out_scale, squash=True, free_std=False),
        ppo=PPOConfig(**{**settings, **changes}),
        run=RunConfig(steps=steps, seeds=1, episodes=128, final_episodes=128, evaluations=20),
    )


# Against brax's habits: advantages once a rollout, a policy that begins undecided, PPO's usual eps.
ROLLOUT: dict[str, Any] = {"advantages": "rollout", "window": 0, "out_scale": 0.01, "adam_eps": 1e-5}


def inverted_pendulum() -> Config:
    """1000, the most there is, after half a million steps; with brax's discount of 0.97 the cart drifts off unseen."""
    smaller: dict[str, Any] = {"num": 256, "unroll": 40, "minibatches": 16, **ROLLOUT}
    return brax("inverted_pendulum", 1_000_000, anneal=True, entropy=1e-3, discount=0.99, reward_scale=0.1, **smaller)


def reacher() -> Config:
    """Brax's 50M steps, four of which are one of ours."""
    return brax(
        "reacher", 12_500_000, unroll=200, window=50, epochs=8, discount=0.95, entropy=1e-3, reward_scale=5.0,
        action_repeat=4,
    )  # fmt: skip


def hopper() -> Config:
    return brax("hopper", 50_000_000, unroll=160, epochs=8, discount=0.99, entropy=1e-3, reward_scale=1.0)


def walker2d() -> Config:
    return brax("walker2d", 50_000_000, unroll=160, epochs=8, discount=0.99, entropy=1e-3, reward_scale=1.0)


def halfcheetah() -> Config:
    return brax("halfcheetah", 50_000_000, unroll=160, epochs=8, discount=0.95, entropy=1e-3, reward_scale=1.0)


def ant() -> Config:
    return brax("ant", 50_000_000, num=4096, window=5)


def humanoid() -> Config:
    return brax("humanoid", 50_000_000, unroll=160, window=10, epochs=8, entropy=1e-3, reward_scale=0.1)


def playground(name: str, steps: int) -> Config:
    """MuJoCo Playground's sizes for the suite of dm_control, which begins episodes anew for every rollout."""
    config = brax(name, steps, unroll=480, window=30, epochs=16, discount=0.995, learning_rate=1e-3, clip_norm=1e9)
    return dataclasses.replace(config, world=WorldConfig(name=f"playground:{name}", num=2048, training_length=480))


def cartpole_balance() -> Config:
    """About 990 of 1000 after a million steps; 999 on the way, after a third of them, a minute of a core.

    A pole that has fallen stays down for the rest of a thousand steps, and a million steps that are cut after 240 teach
    nothing.  Cut after 100, most of what is seen is the pole that is to be kept up.  The learning rate falls, or what
    was learned in the first half is slowly lost again.
    """
    config = brax(
        "CartpoleBalance", 1_000_000, unroll=50, minibatches=8, epochs=8, discount=0.99, learning_rate=5e-4,
        clip_norm=1.0, entropy=1e-3, reward_scale=0.1, anneal=True, **ROLLOUT,
    )  # fmt: skip
    world = WorldConfig(name="playground:CartpoleBalance", num=256, training_length=100)
    return dataclasses.replace(config, world=world)


def build(config: Config, env: Environment) -> Agent:
    """The agent of a config in a vectorised environment."""
    settings = config.ppo
    policies.check(config.net, env, Config().net)
    updates = max(1, config.run.steps // (settings.unroll * config.world.num)) * settings.epochs * settings.minibatches
    rate = optax.linear_schedule(settings.learning_rate, 0.0, updates) if settings.anneal else settings.learning_rate
    optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optax.adam(rate, eps=settings.adam_eps))
    agent = ppo(
        policies.actor_critic(config.net, env),
        policies.distribution(config.net, env),
        optimizer,
        discount=settings.discount,
        lam=settings.lam,
        clip=settings.clip,
        value_clip=settings.value_clip,
        kl_target=settings.kl_target,
        entropy=settings.entropy,
        value_weight=settings.value_weight,
        advantages=settings.advantages,
        window=settings.window,
        epochs=settings.epochs,
        minibatches=settings.minibatches,
    )
    if not (settings.normalise_obs or settings.normalise_rewards):
        return agent
    seen = jax.ShapeDtypeStruct(env.obs.shape[1:], env.obs.dtype)
    return moments.normalised(agent, seen, observations=settings.normalise_obs, rewards=settings.normalise_rewards)


def main(config: Config, run: config_lib.Run) -> None:
    settings = config.ppo
    discount = settings.discount if settings.normalise_rewards else None
    env = worlds.vector(config.world, config.world.num, discount, settings.reward_scale)
    session = reinforcement.open_session(
        config,
        run,
        env,
        build(config, env),
        lambda env, agent, per_shard: on_policy(env, agent, settings.unroll, per_shard),
    )
    reinforcement.finish(session, reinforcement.train(session), f"PPO on {config.world.name}")


PRESETS = {
    "cartpole": Config,
    "acrobot": acrobot,
    "pendulum": pendulum,
    "breakout": breakout,
    "inverted_pendulum": inverted_pendulum,
    "reacher": reacher,
    "hopper": hopper,
    "walker2d": walker2d,
    "halfcheetah": halfcheetah,
    "ant": ant,
    "humanoid": humanoid,
    "cartpole_balance": cartpole_balance,
    "cheetah_run": lambda: playground("CheetahRun", 100_000_000),
}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
