"""The one exception that a person at the keyboard is meant to see."""


class UserError(Exception):
    """A mistake that the user can mend.

    Its message is one line that names the thing, the value and the remedy.  `diffrl.config.run` prints that line and
    exits with status 2 instead of showing a traceback; everything else that goes wrong keeps its traceback.
    """
