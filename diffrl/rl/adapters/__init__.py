"""Other people's environments behind our protocol: one library per file, imported when first asked for."""

from collections.abc import Iterable

import numpy as np

from diffrl.errors import UserError, nearest
from diffrl.rl.environment import Actions


def not_installed(error: ModuleNotFoundError) -> UserError:
    """What to say instead of an import's traceback."""
    return UserError(f"{(error.name or 'a package').partition('.')[0]} is not installed: pip install -e '.[envs]'")


def unknown(library: str, name: str, names: Iterable[str]) -> UserError:
    """What to say of a name that a library does not know."""
    names = sorted(names)
    return UserError(f"{library} has no {name!r}: {nearest(name, names, 'choose from ' + ', '.join(names))}")


def box(name: str, low: np.ndarray, high: np.ndarray) -> Actions:
    """Actions of a box whose sides all have the same two ends, which are what `Actions` can say.

    Raises UserError for another box.
    """
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    ends = float(low.flat[0]), float(high.flat[0])
    if not np.isfinite(ends).all() or (low != ends[0]).any() or (high != ends[1]).any():
        raise UserError(f"{name} takes actions between {low} and {high}: rescale them to one finite interval first")
    return Actions(None, low.shape, *ends)
