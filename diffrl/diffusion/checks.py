"""Mistakes that are seen in the values of arguments: looked for where these are known, not while they are traced."""

from typing import Any

import jax
import numpy as np

from diffrl.errors import UserError


def concrete(*values: Any) -> bool:
    """Whether none of the values is being traced, so that Python may look at them."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def require_rising(times: jax.Array) -> None:
    """Times [N] that never fall; neighbours may be equal.

    Raises:
      UserError: they fall somewhere.
    """
    if concrete(times) and (falls := np.diff(np.asarray(times)) < 0).any():
        n = int(falls.argmax())
        raise UserError(f"times fall from {times[n]:g} to {times[n + 1]:g}: turn the grid round, or sort it")
