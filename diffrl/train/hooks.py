"""Things to do now and then during training: `hook(step, state)` after a dispatch, before the state is donated."""

from collections.abc import Callable

from diffrl.train.state import TrainState

Hook = Callable[[int, TrainState], None]


def every(n, hook, last=None) -> Hook:
    """Calls `hook` whenever a multiple of n has been passed since the call before, and at step `last` if given.

    With several steps per dispatch the multiple itself may never be seen; the hook gets the step that was reached.
    """
    previous = None

    def maybe(step, state):
        nonlocal previous
        # A run that resumes at a multiple of n has done that one already.
        passed = step % n == 0 if previous is None else step // n > previous // n
        previous = step
        if passed or step == last:
            hook(step, state)

    return maybe
