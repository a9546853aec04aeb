"""The one exception that a person at the keyboard is meant to see."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend.

    Its message is one line that names the thing, the value and the remedy.  `diffrl.config.run` prints that line and
    exits with status 2 instead of showing a traceback; everything else that goes wrong keeps its traceback.
    """


def nearest(name: str, names: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown name: a question after the nearest of `names`, or `otherwise`."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f"did you mean {near[0]!r}?" if near else otherwise
