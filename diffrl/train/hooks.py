"""Things to do now and then during training: `hook(step, state)` after a dispatch, before the state is donated."""

from collections.abc import Callable

from diffrl.train.state import TrainState

Hook = Callable[[int, TrainState], None]


def every(n, hook, inner=1) -> Hook:
    """Calls `hook` after each dispatch of `inner` updates that reaches or passes a multiple of n, once.

    With several updates per dispatch the multiple itself may never be seen; the hook gets the step that was reached.
    """

    def maybe(step, state):
        if step // n > (step - inner) // n:
            hook(step, state)

    return maybe
