"""Networks of agents for what an environment shows and takes: perceptrons for vectors, convolutions for pictures."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffrl.config import leaf
from diffrl.errors import UserError, nearest
from diffrl.nets import perceptron, pixels
from diffrl.rl import distributions
from diffrl.rl.agent import ActorCritic, Network, separate, shared
from diffrl.rl.distributions import Distribution
from diffrl.rl.environment import Environment

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
}


@dataclasses.dataclass
class NetConfig:
    """Of observations that are vectors; pictures have networks of their own, with one torso for policy and value."""

    policy: tuple[int, ...] = leaf((64, 64), "widths of the policy's hidden layers", at_least=1)
    value: tuple[int, ...] = leaf((64, 64), "widths of the value's hidden layers", at_least=1)
    activation: str = leaf("tanh", "tanh, relu, silu, elu")
    orthogonal: bool = leaf(True, "orthogonal kernels, else LeCun's")
    out_scale: float = leaf(0.01, "gain of the policy's last kernel; a small one begins undecided", above=0)
    squash: bool = leaf(False, "continuous actions are tanh of a normal, else a clipped normal")
    free_std: bool = leaf(True, "the deviations of continuous actions do not depend on the observation")


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    if name not in ACTIVATIONS:
        otherwise = f"choose from {', '.join(ACTIVATIONS)}"
        raise UserError(f"--config.net.activation={name}: {nearest(name, ACTIVATIONS, otherwise)}")
    return ACTIVATIONS[name]


def network(module: Any, env: Environment) -> Network:
    """A flax module on the observations of a vectorised environment."""
    example = jnp.zeros((1, *env.obs.shape[1:]), env.obs.dtype)

    def apply(params: Any, obs: Any) -> jax.Array:
        return jnp.asarray(module.apply(params, obs))

    return Network(lambda key: module.init(key, example), apply)


def distribution(config: NetConfig, env: Environment) -> Distribution:
    return distributions.of(env.actions, config.squash)


def check(
    config: NetConfig, env: Environment, usual: NetConfig, unused: Sequence[str] = (), torso: bool = True
) -> None:
    """Raises UserError for a flag that was changed and says nothing here.

    Args:
        usual: the experiment's own.
        unused: fields of no use to the algorithm; those of no use to these observations or actions are known.
        torso: pictures have a network of their own; else they are flattened.
    """
    reasons = dict.fromkeys(unused, "the algorithm")
    if env.actions.num is not None:
        reasons |= dict.fromkeys(("squash", "free_std"), "numbered actions")
    if torso and is_picture(env):
        reasons |= {field.name: "pictures" for field in dataclasses.fields(NetConfig) if field.name not in reasons}
    for name, reason in reasons.items():
        value, wanted = getattr(config, name), getattr(usual, name)
        if value != wanted:
            raise UserError(f"--config.net.{name}={value} says nothing of {reason}: leave it at {wanted}")


def is_picture(env: Environment) -> bool:
    """Whether a vectorised environment shows [H, W, C]."""
    return len(env.obs.shape) == 4


def policy(config: NetConfig, env: Environment) -> Network:
    """The policy alone, for vectors."""
    size = distribution(config, env).size
    continuous = env.actions.num is None
    options: dict[str, Any] = {"activation": activation(config.activation), "orthogonal": config.orthogonal}
    free = size // 2 if continuous and config.free_std else 0
    module = perceptron.Perceptron(size, config.policy, out_scale=config.out_scale, free_std=free, **options)
    return network(module, env)


def value(config: NetConfig, env: Environment) -> Network:
    """The value alone, for vectors."""
    options: dict[str, Any] = {"activation": activation(config.activation), "orthogonal": config.orthogonal}
    return network(perceptron.Perceptron(1, config.value, **options), env)


def actor_critic(config: NetConfig, env: Environment) -> ActorCritic:
    """Two perceptrons, or one convolutional network for pictures."""
    if is_picture(env):
        return shared(network(torso(env, distribution(config, env).size + 1), env))
    return separate(policy(config, env), value(config, env))


def torso(env: Environment, outputs: int, dueling: bool = False) -> Any:
    """The convolutional network for pictures as large as the environment's."""
    if min(env.obs.shape[1:3]) >= 36:
        return pixels.NatureCNN(outputs, dueling=dueling)
    return pixels.MinAtarCNN(outputs, dueling=dueling)
