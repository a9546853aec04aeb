"""What an agent is: three pure functions and the state that they share.

    init(key) -> state    act(state, obs, noise) -> (action, info)    update(state, rollout, key) -> (state, metrics)

A driver (`on_policy`, `off_policy`) collects transitions with `act` and hands them to `update`; nothing else knows of
both an agent and an environment.  All of it is arrays, so that a whole run is one `scan`, many seeds are one `vmap`,
and a checkpoint is the tree as it stands.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array


class Transition(NamedTuple):
    """Steps of worlds: arrays [T, N, ...] of a rollout, or [B, ...] of a batch from a replay buffer.

    Attributes:
        obs: what was acted on.
        action: what the environment was given.
        reward: float32.
        terminated, truncated: how the step ended the episode, if it did.
        next_obs: what the step led to, *before* any reset: its value bootstraps.
        info: what `act` told of its choice (log-probabilities, say); in a batch also `weight` and `discount`.
        world: what wrappers told of the step (`State.info`).
    """

    obs: Any
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    next_obs: Any
    info: dict[str, Any] = {}  # noqa: RUF012 (never changed in place)
    world: dict[str, Any] = {}  # noqa: RUF012


def same(keys: Array) -> Array:
    """The noise of an agent that draws for itself, or not at all."""
    return keys


class Agent(NamedTuple):
    """An algorithm of reinforcement learning.

    Attributes:
        init: key -> state, arrays only and no keys among them.
        act: (state, obs [N, ...], noise [N, ...]) -> (action [N, ...], info): what to do while learning, exploration
            included; row i depends on obs[i] and noise[i] alone.
        update: (state, rollout, key) -> (state, metrics): learns from a rollout [T, N] of its own (on-policy) or a
            batch [B] of anyone's (off-policy).  Metrics are scalars; `priority` [B], where there is one, goes to the
            replay buffer instead.
        greedy: (state, obs [N, ...]) -> action [N, ...]: what to do when it counts.
        noise: keys [N] -> what `act` needs of chance, a tree of arrays [N, ...]; drivers draw it for a whole rollout
            at once, since a draw in every step takes a CPU longer than a small network.  By default they are the keys.
    """

    init: Callable[[Array], Any]
    act: Callable[[Any, Any, Any], tuple[Array, dict[str, Any]]]
    update: Callable[[Any, Transition, Array], tuple[Any, dict[str, Array]]]
    greedy: Callable[[Any, Any], Array]
    noise: Callable[[Array], Any] = same


class Network(NamedTuple):
    """A function of parameters: init(key) -> params, apply(params, obs [B, ...]) -> [B, outputs]."""

    init: Callable[[Array], Any]
    apply: Callable[[Any, Any], Array]


class ActorCritic(NamedTuple):
    """A policy's distribution parameters and a value of the same observation, from one network or from two.

    Attributes:
        init: key -> params.
        policy: (params, obs [B, ...]) -> outputs [B, P] of a `distributions.Distribution`.
        value: (params, obs [B, ...]) -> [B].
        both: the two at once, which a shared torso computes once.
    """

    init: Callable[[Array], Any]
    policy: Callable[[Any, Any], Array]
    value: Callable[[Any, Any], Array]
    both: Callable[[Any, Any], tuple[Array, Array]]


def separate(policy: Network, value: Network) -> ActorCritic:
    """Two networks, {"policy": params, "value": params}; the value's has one output."""

    def init(key: Array) -> dict[str, Any]:
        first, second = jax.random.split(key)
        return {"policy": policy.init(first), "value": value.init(second)}

    def outputs(params: Any, obs: Any) -> Array:
        return policy.apply(params["policy"], obs)

    def values(params: Any, obs: Any) -> Array:
        return value.apply(params["value"], obs)[..., 0]

    return ActorCritic(init, outputs, values, lambda params, obs: (outputs(params, obs), values(params, obs)))


def shared(network: Network) -> ActorCritic:
    """One network: all outputs but the last are the policy's, the last is the value."""
    return ActorCritic(
        network.init,
        lambda params, obs: network.apply(params, obs)[..., :-1],
        lambda params, obs: network.apply(params, obs)[..., -1],
        lambda params, obs: (lambda y: (y[..., :-1], y[..., -1]))(network.apply(params, obs)),
    )
