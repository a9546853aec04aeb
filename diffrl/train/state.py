"""What training carries from step to step, and the one rule that makes its random numbers.

A `TrainState` holds arrays only, so that it can be donated, sharded, averaged and written to disk as a whole.  Its
key never changes: whatever is random at step n for purpose p draws from `fold_in(fold_in(key, n), p)`.  A resumed run
therefore needs no generator state, and a new use of randomness does not disturb the others.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Purpose(enum.IntEnum):
    """Independent streams of random numbers within one step."""

    LOSS = 0
    COLLECT = 1


class Aux(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
        metrics: scalars that are means over the samples of the batch.
        extra: the new `TrainState.extra`, or None if the loss leaves it alone.
    """

    metrics: dict[str, jax.Array]
    extra: Any = None


class TrainState(NamedTuple):
    """The whole of a run.

    Attributes:
        step: int32 scalar, the number of updates done.
        params: the trained parameters.
        ema: their exponential moving average in float32, or None.
        opt_state: the state of the optax transformation.
        key: a typed key; constant.
        frozen: weights that losses read and nothing changes (a reference policy, an autoencoder), or None.
        extra: state that losses replace without a gradient (a codebook, running statistics), or None.
        profiles: a tuple of more averages of the parameters (see `post_hoc`), or None.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    key: jax.Array
    frozen: Any = None
    extra: Any = None
    profiles: Any = None


def create(params, optimizer, key, *, ema=True, frozen=None, extra=None, profiles=0) -> TrainState:
    """A state at step 0 whose arrays are copies, so that donating it leaves the arguments alive.

    Args:
        params: tree of arrays.
        optimizer: an optax.GradientTransformation.
        key: a typed key (`jax.random.key(seed)`).
        ema: whether to keep an average of the parameters; it starts as a float32 copy of them.
        frozen, extra: see `TrainState`.
        profiles: how many averages of power functions to keep, e.g. `len(post_hoc.STORED)`; they start so as well.
    """
    params, key, frozen, extra = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, key, frozen, extra))

    def average():
        return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=average() if ema else None,
        opt_state=optimizer.init(params),
        key=key,
        frozen=frozen,
        extra=extra,
        profiles=tuple(average() for _ in range(profiles)) or None,
    )


def step_key(state, purpose):
    """The key of this step for one `Purpose`."""
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), purpose)


def batch_keys(state, batch_size):
    """Keys [batch_size] of this step's loss: sample i's key does not depend on the batch size or the devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key(state, Purpose.LOSS), jnp.arange(batch_size))
