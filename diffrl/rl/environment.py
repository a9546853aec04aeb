"""What an environment is: a pair of pure functions, for one world at a time.

    reset(key) -> State                     step(State, action) -> State

`wrappers` change them, `jax.vmap` makes many of one.  After Brax (Freeman et al., 2021), but with the two ends of an
episode apart, as in Gymnasium (Towers et al., 2024): after a *termination* there is no future and its value is 0; a
*truncation* only stops watching, and the value of the last observation stands for what would have come.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array


class State(NamedTuple):
    """A world and what its last step gave; a tree of arrays of one structure for `reset` and `step`.

    Attributes:
        inner: what the world needs to go on, its random key included.
        obs: what an agent sees of it.
        reward: float32 scalar; 0 after a reset.
        terminated, truncated: bool scalars, never both.
        info: arrays by name that wrappers add.
    """

    inner: Any
    obs: Any
    reward: Array
    terminated: Array
    truncated: Array
    info: dict[str, Any] = {}  # noqa: RUF012 (never changed in place)

    @property
    def done(self) -> Array:
        """Whether the episode has ended, in either way."""
        return self.terminated | self.truncated


class Actions(NamedTuple):
    """The actions 0 ... num - 1, or, where num is None, float32 vectors of `shape` within [low, high]."""

    num: int | None = None
    shape: tuple[int, ...] = ()
    low: float = -1.0
    high: float = 1.0


class Environment(NamedTuple):
    """reset, step, what they take and what they give.

    Attributes:
        name: as users write it.
        reset, step: see above.
        actions: what `step` takes.
        obs: a tree of jax.ShapeDtypeStruct.
        render: State -> a picture, uint8 numpy [H, W, 3], made on the host; None where there is nothing to see.
    """

    name: str
    reset: Callable[[Array], State]
    step: Callable[[State, Array], State]
    actions: Actions
    obs: Any
    render: Callable[[State], Any] | None = None
