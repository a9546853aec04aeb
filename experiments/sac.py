"""Soft actor-critic (Haarnoja et al., arXiv:1801.01290 and arXiv:1812.05905): a policy that earns and stays random.

    python -m experiments.sac                                    # Pendulum, five seeds at once: a minute of CPU
    python -m experiments.sac --config.sac.alpha=0.2 --noconfig.sac.adapt
    python -m experiments.sac --config.world.name=brax:reacher   # Brax: pip install -e '.[envs]'

Worlds, replay buffers and learning are one jitted scan; the buffer lies on the device and in the checkpoints, and the
same command again resumes, bit for bit.  Writes metrics.jsonl, curve.png, results.json and a video (video.gif, or
Brax's viewer video.html).  Expected: Pendulum about -150 after 20k steps.
"""

import dataclasses
from typing import Any

import jax
import optax

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.errors import UserError
from diffrl.nets import perceptron
from diffrl.recipes import policies, reinforcement, replaying, worlds
from diffrl.recipes.policies import NetConfig
from diffrl.recipes.reinforcement import RunConfig
from diffrl.recipes.replaying import ReplayConfig
from diffrl.recipes.worlds import WorldConfig
from diffrl.rl.agent import Agent
from diffrl.rl.agents.sac import sac
from diffrl.rl.environment import Environment
from diffrl.train.mesh import MeshConfig, init_distributed


@dataclasses.dataclass
class SACConfig(ReplayConfig):
    """The algorithm; see `diffrl.rl.agents.sac`."""

    learning_rate: float = leaf(1e-3, above=0)
    tau: float = leaf(0.01, "how far the target critics go towards the critics at each update", above=0, at_most=1)
    alpha: float = leaf(1.0, "price of entropy at first", above=0)
    adapt: bool = leaf(True, "the price follows the entropy that is wanted")
    entropy: float | None = leaf(None, "what is wanted, nats of actions in half their range; None: -1 for each number")
    reward_scale: float = leaf(1.0, "what rewards are multiplied with", above=0)


@dataclasses.dataclass
class Config:
    world: WorldConfig = dataclasses.field(default_factory=lambda: WorldConfig(name="pendulum", num=4))
    net: NetConfig = dataclasses.field(default_factory=lambda: NetConfig(squash=True, free_std=False))
    sac: SACConfig = dataclasses.field(default_factory=SACConfig)
    run: RunConfig = dataclasses.field(default_factory=lambda: RunConfig(steps=20_000))
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=-1))
    seed: int = 0


def build(config: Config, env: Environment) -> Agent:
    """The agent of a config in a vectorised environment."""
    settings, net = config.sac, config.net
    policies.check(net, env, Config().net, ("squash", "free_std"))
    if policies.is_picture(env):
        raise UserError(f"{env.name} shows pictures, and SAC's networks take vectors: use ppo, or dqn")
    options: dict[str, Any] = {"activation": policies.activation(net.activation), "orthogonal": net.orthogonal}
    (observed,) = env.obs.shape[1:]
    size = 0 if env.actions.num is not None else env.actions.shape[0]
    critic = perceptron.Perceptron(1, net.value, **options)
    adam, fixed = optax.adam(settings.learning_rate), optax.set_to_zero()
    return sac(
        policies.network(perceptron.Perceptron(2 * size, net.policy, out_scale=net.out_scale, **options), env),
        policies.network(critic, env._replace(obs=jax.ShapeDtypeStruct((1, observed + size), jax.numpy.float32))),
        env.actions,
        optax.partition(
            {"learned": adam, "fixed": fixed},
            {"policy": "learned", "critics": "learned", "log_alpha": "learned" if settings.adapt else "fixed"},
        ),
        tau=settings.tau,
        target_entropy=settings.entropy,
        alpha=settings.alpha,
    )


def main(config: Config, run: config_lib.Run) -> None:
    env = worlds.vector(config.world, config.world.num, reward_scale=config.sac.reward_scale)
    session = reinforcement.open_session(
        config,
        run,
        env,
        build(config, env),
        lambda env, agent, per_shard: replaying.driver("sac", config.sac, env, config.world.num, agent, per_shard),
    )
    reinforcement.finish(session, reinforcement.train(session), f"SAC on {config.world.name}")


PRESETS = {"pendulum": Config}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
