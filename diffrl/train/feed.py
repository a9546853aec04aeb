"""Where the loop's batches come from: a stream that knows its place, rounds that the model collects, or nowhere.

All have `next(state) -> batch`, `position() -> dict` for the checkpoint, and `whole`: whether a checkpoint taken now
would resume exactly.
"""

from diffrl.errors import UserError
from diffrl.train.state import Purpose, step_key

_END = object()


class Stream:
    """An endless iterator; to be checkpointed it has `get_state() -> dict`, the place after the last batch taken."""

    whole = True

    def __init__(self, data):
        self._data = data

    def next(self, state):
        try:
            return next(self._data)
        except StopIteration:
            raise UserError(
                f"the data ended after step {int(state.step)}: let it repeat, or train fewer steps"
            ) from None

    def position(self):
        return self._data.get_state()


class Nothing:
    """For steps that make their own data: a run of reinforcement learning holds its worlds in its state."""

    whole = True

    def next(self, state):
        return None

    def position(self):
        return {}


class Collected:
    """Rounds of `collect(state, key) -> iterable of batches`, each made by the model as it is when the round begins.

    The next batch is fetched before the present one is used, so that the end of a round is known.  A batch made
    lazily must not read `state`, whose memory the first step of the round has taken over.
    """

    def __init__(self, collect):
        self._collect = collect
        self._batches, self._ahead = iter(()), _END

    @property
    def whole(self):
        return self._ahead is _END

    def next(self, state):
        if self.whole:
            self._batches = iter(self._collect(state, step_key(state, Purpose.COLLECT)))
            self._ahead = next(self._batches, _END)
            if self.whole:
                raise UserError(f"nothing was collected at step {int(state.step)}: a round needs at least one batch")
        batch, self._ahead = self._ahead, next(self._batches, _END)
        return batch

    def position(self):
        return {}
