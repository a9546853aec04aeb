"""The flags of learning from the past, and the driver that they make: DQN, SAC."""

import dataclasses

from diffrl.config_leaf import leaf
from diffrl.errors import UserError
from diffrl.rl import replay
from diffrl.rl.agent import Agent
from diffrl.rl.driver import Driver, PerShard
from diffrl.rl.environment import Environment
from diffrl.rl.off_policy import off_policy


@dataclasses.dataclass
class ReplayConfig:
    """What is kept and how often it is learned from; see `diffrl.rl.replay` and `diffrl.rl.off_policy`."""

    discount: float = leaf(0.99, at_least=0, at_most=1)
    batch: int = leaf(64, "transitions of an update", at_least=1)
    unroll: int = leaf(1, "steps of each world between rounds of updates", at_least=1)
    updates: int = leaf(4, "updates of a round", at_least=1)
    start: int = leaf(1000, "steps before the first update", at_least=1)
    buffer: int = leaf(50_000, "transitions that are kept", at_least=1)
    prioritised: bool = leaf(False, "surprising transitions more often (Schaul et al., arXiv:1511.05952)")
    n_step: int = leaf(1, "rewards before the bootstrap", at_least=1)
    groups: int = leaf(1, "of worlds with a buffer each; as many devices can share the work", at_least=1)


def driver(
    section: str, settings: ReplayConfig, env: Environment, num: int, agent: Agent, per_shard: PerShard
) -> Driver:
    """`off_policy` as configured.

    Args:
        section: of the flags, for messages.
        num: worlds of `env`.
    """
    if num % settings.groups:
        raise UserError(f"--config.{section}.groups={settings.groups} does not divide {num} worlds: choose another")
    if settings.batch % settings.groups:
        raise UserError(
            f"--config.{section}.batch={settings.batch} is no multiple of --config.{section}.groups={settings.groups}: "
            "choose one"
        )
    rows = settings.unroll + settings.n_step - 1
    if settings.buffer // num < rows:
        raise UserError(
            f"--config.{section}.buffer={settings.buffer} keeps {settings.buffer // num} steps of each of {num} worlds "
            f"where {rows} are needed: choose at least {rows * num}"
        )
    make = replay.prioritised if settings.prioritised else replay.uniform
    return off_policy(
        env,
        agent,
        make(settings.buffer // num, num // settings.groups, settings.n_step, settings.discount),
        batch=settings.batch,
        unroll=settings.unroll,
        updates=settings.updates,
        start=settings.start,
        groups=settings.groups,
        per_shard=per_shard,
    )


def total_updates(settings: ReplayConfig, steps: int, num: int) -> int:
    """Of a run of so many steps of `num` worlds, at least one."""
    return max(1, (steps - settings.start) // (settings.unroll * num)) * settings.updates
