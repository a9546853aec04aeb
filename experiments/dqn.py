"""Deep Q-networks (Mnih et al., 2015) with what made them better: double, dueling, prioritised, several steps.

    python -m experiments.dqn                                    # CartPole, five seeds at once: a minute of CPU
    python -m experiments.dqn --preset=breakout                  # MinAtar, from pictures: pip install -e '.[envs]'
    python -m experiments.dqn --preset=pong                      # Atari, on the host: half an hour
    python -m experiments.dqn --config.dqn.double=False --config.dqn.prioritised=False --config.dqn.n_step=1

Worlds, replay buffers and learning are one jitted scan; the buffer lies on the device and in the checkpoints, and the
same command again resumes, bit for bit.  Writes metrics.jsonl, curve.png, results.json and video.gif.
Expected: CartPole 475 and more after 50k steps.
"""

import dataclasses

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
from diffrl.rl.agents.dqn import dqn
from diffrl.rl.driver import Driver, PerShard
from diffrl.rl.environment import Environment
from diffrl.train.mesh import MeshConfig, init_distributed


@dataclasses.dataclass
class DQNConfig(ReplayConfig):
    """The algorithm; see `diffrl.rl.agents.dqn`."""

    n_step: int = leaf(10, "rewards before the bootstrap", at_least=1)
    learning_rate: float = leaf(4e-3, above=0)
    anneal: bool = leaf(True, "the learning rate falls linearly to 0")
    clip_norm: float = leaf(1e9, "largest norm of a gradient", above=0)
    epsilon: float = leaf(0.05, "exploration in the end", at_least=0, at_most=1)
    explore: float = leaf(0.2, "share of the updates over which exploration falls from 1", above=0, at_most=1)
    target_every: int = leaf(1, "updates from one change of the target network to the next", at_least=1)
    tau: float = leaf(0.02, "how far it then goes towards the network", above=0, at_most=1)
    huber: bool = leaf(False, "errors above 1 count linearly; only where rewards are scaled or clipped")
    double: bool = leaf(True, "choose by the network, value by the target (van Hasselt et al., arXiv:1509.06461)")
    dueling: bool = leaf(False, "of pictures: value and advantages apart (Wang et al., arXiv:1511.06581)")


@dataclasses.dataclass
class Config:
    world: WorldConfig = dataclasses.field(default_factory=lambda: WorldConfig(num=8))
    net: NetConfig = dataclasses.field(default_factory=lambda: NetConfig((128, 128)))
    dqn: DQNConfig = dataclasses.field(default_factory=DQNConfig)
    run: RunConfig = dataclasses.field(default_factory=lambda: RunConfig(steps=50_000))
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=-1))
    seed: int = 0


def breakout() -> Config:
    """MinAtar's Breakout; its authors' DQN reaches about 10 after 5M frames (Young & Tian, arXiv:1903.03176), this 20
    after half a million."""
    return Config(
        world=WorldConfig(name="minatar:breakout", num=8),
        dqn=DQNConfig(
            learning_rate=3e-4,
            huber=True,
            n_step=3,
            clip_norm=10.0,
            batch=64,
            updates=2,
            start=5000,
            buffer=100_000,
            epsilon=0.02,
            explore=0.1,
            target_every=1,
            tau=0.005,
            dueling=True,
            prioritised=True,
        ),
        run=RunConfig(steps=500_000, seeds=1),
    )


def pong() -> Config:
    """Atari's Pong through ALE, on the host: from -21 to about 19 in a quarter of a million steps of four frames."""
    return Config(
        world=WorldConfig(name="atari:pong", num=8),
        dqn=DQNConfig(
            learning_rate=2e-4,
            huber=True,
            n_step=3,
            clip_norm=10.0,
            batch=32,
            updates=2,
            start=10_000,
            buffer=40_000,
            epsilon=0.02,
            explore=0.2,
            tau=0.005,
            dueling=True,
        ),
        run=RunConfig(steps=250_000, seeds=1, evaluations=10, episodes=4, final_episodes=8),
    )


def build(config: Config, env: Environment) -> Agent:
    settings = config.dqn
    if env.actions.num is None:
        raise UserError(f"--config.world.name={config.world.name} takes vectors, and DQN numbered actions: use PPO")
    policies.check(config.net, env, Config().net, ("value", "out_scale"))
    if policies.is_picture(env):
        module = policies.torso(env, env.actions.num, settings.dueling)
    elif settings.dueling:
        raise UserError(
            f"--config.dqn.dueling=True: {config.world.name} shows vectors, and only pictures' networks duel"
        )
    else:
        widths, activation = config.net.policy, policies.activation(config.net.activation)
        module = perceptron.Perceptron(env.actions.num, widths, activation, orthogonal=config.net.orthogonal)
    updates = replaying.total_updates(settings, config.run.steps, config.world.num)
    rate = optax.linear_schedule(settings.learning_rate, 0.0, updates) if settings.anneal else settings.learning_rate
    return dqn(
        policies.network(module, env),
        env.actions,
        optax.chain(optax.clip_by_global_norm(settings.clip_norm), optax.adam(rate)),
        epsilon=optax.linear_schedule(1.0, settings.epsilon, max(1, round(updates * settings.explore))),
        target_every=settings.target_every,
        tau=settings.tau,
        double=settings.double,
        huber=settings.huber,
    )


def driver(config: Config, env: Environment, agent: Agent, per_shard: PerShard) -> Driver:
    return replaying.driver("dqn", config.dqn, env, config.world.num, agent, per_shard)


def main(config: Config, run: config_lib.Run) -> None:
    env = worlds.vector(config.world, config.world.num)
    session = reinforcement.open_session(
        config, run, env, build(config, env), lambda env, agent, per_shard: driver(config, env, agent, per_shard)
    )
    reinforcement.finish(session, reinforcement.train(session), f"DQN on {config.world.name}")


PRESETS = {"cartpole": Config, "breakout": breakout, "pong": pong}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
