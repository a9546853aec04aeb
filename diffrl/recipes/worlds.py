"""Environments by the names that users write, wrapped as the drivers want them."""

import dataclasses
from collections.abc import Callable

from diffrl.config import leaf
from diffrl.errors import UserError, nearest
from diffrl.rl import classic_control, wrappers
from diffrl.rl.adapters import brax, gymnax, host, playground
from diffrl.rl.adapters.host import HostWorld
from diffrl.rl.environment import Environment

OWN: dict[str, Callable[[], Environment]] = {
    "cartpole": classic_control.cartpole,
    "acrobot": classic_control.acrobot,
    "pendulum": classic_control.pendulum,
    "mountain_car": classic_control.mountain_car,
}
NAMES = (
    "cartpole, acrobot, pendulum, mountain_car, brax:NAME, playground:NAME, minatar:NAME, gymnax:NAME, gym:NAME, "
    "atari:NAME"
)


@dataclasses.dataclass
class WorldConfig:
    """What is acted in.

    Attributes:
        name: one of our own, or a library's, as in brax:ant, playground:CheetahRun, minatar:breakout,
            gymnax:Catch-bsuite, gym:LunarLander-v3, atari:pong.
        episode_length: of brax's and playground's worlds, and of Gymnasium's without a limit; the others know theirs.
        training_length: where what is to be learned happens at an episode's beginning, as with a pole that falls in a
            second and then lies there for the rest of a thousand steps, training may go back to it sooner.  The cut is
            a truncation; evaluations have whole episodes.
    """

    name: str = leaf("cartpole", NAMES)
    num: int = leaf(8, "worlds side by side, of each seed", at_least=1)
    episode_length: int = leaf(1000, "steps after which episodes without a limit of their own are cut", at_least=1)
    training_length: int = leaf(0, "steps after which training's episodes are cut; 0: as evaluation's", at_least=0)
    action_repeat: int = leaf(1, "steps that every action is held", at_least=1)
    frames: int = leaf(1, "observations stacked along the last axis", at_least=1)
    backend: str = leaf("spring", "brax's physics: spring, positional, generalized, mjx")


def is_host(config: WorldConfig) -> bool:
    """Whether the world lives outside jax: it runs one seed, and starts anew when a run is taken up again."""
    return config.name.partition(":")[0] in ("gym", "atari")


def learns_from_signs(config: WorldConfig) -> bool:
    """Whether an agent is to learn from the signs of rewards, as it is usual with Atari's points."""
    return config.name.startswith("atari:")


def whole(config: WorldConfig) -> WorldConfig:
    """The same world with whole episodes, for evaluations."""
    return dataclasses.replace(config, training_length=0)


def on_host(config: WorldConfig) -> HostWorld:
    """One world with a state of its own, for asynchronous workers."""
    if not is_host(config):
        return host.from_environment(_cut(config))
    _check_host(config)
    prefix, _, rest = config.name.partition(":")
    return host.atari_world(rest) if prefix == "atari" else host.gymnasium_world(rest, config.episode_length)


def single(config: WorldConfig) -> Environment:
    """One world whose episodes end, without automatic resets; raises UserError for an unknown name."""
    prefix, colon, rest = config.name.partition(":")
    makers: dict[str, Callable[[], Environment]] = {
        "brax": lambda: brax.make(rest, config.backend, config.episode_length, config.action_repeat),
        "playground": lambda: playground.make(rest, config.episode_length),
        "gymnax": lambda: gymnax.make(rest),
        "minatar": lambda: gymnax.minatar(rest, sticky=0.1, ramping=True),  # as its authors measure
    }
    if colon and prefix in makers:
        env = makers[prefix]()
    elif config.name in OWN:
        env = OWN[config.name]()
    else:
        raise UserError(f"--config.world.name={config.name}: {nearest(config.name, OWN, f'choose from {NAMES}')}")
    if config.action_repeat > 1 and prefix != "brax":
        env = wrappers.action_repeat(env, config.action_repeat)
    return wrappers.frame_stack(env, config.frames) if config.frames > 1 else env


def vector(config: WorldConfig, num: int, discount: float | None = None, reward_scale: float = 1.0) -> Environment:
    """`num` worlds for training, that reset themselves and tell their returns.

    Args:
        discount: of info["discounted_return"], for agents that normalise rewards.
        reward_scale: what the agent's rewards are multiplied with; the reported returns are not.
    """
    if is_host(config):
        return _host_vector(config, num, discount, reward_scale)
    env = wrappers.monitor(_cut(config))
    env = wrappers.scale_reward(env, reward_scale) if reward_scale != 1 else env
    env = wrappers.discounted_return(env, discount) if discount is not None else env
    # A simulator's reset costs as much as many steps, and of many worlds one ends in nearly every step.
    return wrappers.vectorize(wrappers.autoreset(env, keep_first=config.name.startswith(("brax:", "playground:"))), num)


def _cut(config: WorldConfig) -> Environment:
    """`single`, its episodes as long as training wants them."""
    env = single(config)
    return wrappers.time_limit(env, config.training_length) if config.training_length else env


def _check_host(config: WorldConfig) -> None:
    """Raises UserError for wrappers that only pure worlds can have."""
    usual = WorldConfig()
    for flag in ("frames", "action_repeat", "training_length"):
        value, wanted = getattr(config, flag), getattr(usual, flag)
        if value != wanted:
            raise UserError(
                f"--config.world.{flag}={value}: {config.name} runs on the host and has wrappers of its own; "
                f"choose {wanted}"
            )


def _host_vector(config: WorldConfig, num: int, discount: float | None, reward_scale: float) -> Environment:
    """Worlds of the host; raises UserError for what only pure worlds can be wrapped in."""
    if discount is not None:
        raise UserError(f"rewards of {config.name}, which runs on the host, cannot be normalised: scale them instead")
    _check_host(config)
    prefix, _, rest = config.name.partition(":")
    if prefix == "atari":
        env = host.atari(rest, num, clip=learns_from_signs(config))
    else:
        env = host.gymnasium_vector(rest, num, limit=config.episode_length)
    return wrappers.scale_reward(env, reward_scale) if reward_scale != 1 else env
