"""What a plan is: an array [H, A + S] of normalised actions and observations, and which of its entries are given."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def _same(x: Array) -> Array:
    return x


class Space(NamedTuple):
    """Plans of `horizon` rows, and the way to and from the world's units.

    Attributes:
        horizon: H, rows of a plan; the first is the present.
        actions, observations: A and S, how many numbers each; A = 0 for plans of observations alone.
        encode, decode: observations [..., S] to what a network sees, and back.
        encode_action, decode_action: the same for actions [..., A].
        stride: steps of the world from one row to the next.
    """

    horizon: int
    actions: int
    observations: int
    encode: Callable[[Array], Array] = _same
    decode: Callable[[Array], Array] = _same
    encode_action: Callable[[Array], Array] = _same
    decode_action: Callable[[Array], Array] = _same
    stride: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """[H, A + S]."""
        return self.horizon, self.actions + self.observations

    @property
    def span(self) -> int:
        """Steps of the world from the first row to the last."""
        return (self.horizon - 1) * self.stride


class Plan(NamedTuple):
    """In the world's units and for every step of the world: actions [..., N, A] and observations [..., N, S]."""

    actions: Array
    observations: Array


def unpack(space: Space, x: Array) -> Plan:
    """x [..., H, A + S] in the world's units.

    Between rows, where the stride leaves some out, observations lie on straight lines and actions are held.
    """
    actions, seen = x[..., : space.actions], space.decode(x[..., space.actions :])
    actions = space.decode_action(actions) if space.actions else actions
    if space.stride == 1:
        return Plan(actions, seen)
    row, rest = np.divmod(np.arange(space.span + 1), space.stride)
    share = jnp.asarray(rest / space.stride, jnp.float32)[:, None]
    after = np.minimum(row + 1, space.horizon - 1)
    return Plan(actions[..., row, :], (1 - share) * seen[..., row, :] + share * seen[..., after, :])


def pins(space: Space, obs: Array, goal: Array | None = None, arrival: Array | int | None = None) -> tuple:
    """(values [B, H, A + S], which entries they hold, bool of the same shape).

    obs: [B, S], where plans begin, in the world's units.
    goal: [B, S], where they are in row `arrival` ([B] or a number; the last one if None), or None.
    """
    steps = jnp.arange(space.horizon)[None, :, None]
    seen = jnp.arange(space.shape[1]) >= space.actions
    first = (steps == 0) & seen
    value = _wide(space, space.encode(obs))
    if goal is None:
        return jnp.broadcast_to(value, (len(obs), *space.shape)), jnp.broadcast_to(first, (len(obs), *space.shape))
    last = (steps == _arrival(space, arrival)) & seen & (steps > 0)
    value = jnp.where(last, _wide(space, space.encode(goal)), value)
    return value, jnp.broadcast_to(first | last, value.shape)


def known(space: Space, mask: Array, arrival: Array | int | None = None, goal: bool = True) -> Array:
    """The entries [B, H, A + S] of training windows that are shown clean and make no error.

    Those of `pins`, and the padding, which is held at its value, 0, so that nothing is to be learned from it.
    mask: [B, H], 1 within a path, 0 in the padding behind it.
    """
    steps = jnp.arange(space.horizon)[None, :, None]
    seen = jnp.arange(space.shape[1]) >= space.actions
    held = steps == 0
    if goal:
        held = held | (steps == _arrival(space, arrival))
    return (held & seen) | (mask[:, :, None] == 0)


def shifted(x: Array, rows: Array | int) -> Array:
    """A plan [B, H, D] as it looks `rows` rows later: the front is cut off, the last row stands in for what lacks."""
    return x[:, jnp.minimum(jnp.arange(x.shape[1]) + rows, x.shape[1] - 1)]


def _wide(space: Space, obs: Array) -> Array:
    """[B, S] -> [B, 1, A + S], zeros for actions."""
    return jnp.pad(obs, ((0, 0), (space.actions, 0)))[:, None]


def _arrival(space: Space, arrival: Array | int | None) -> Array:
    last = space.horizon - 1 if arrival is None else arrival
    return jnp.asarray(last).reshape(-1, 1, 1)
