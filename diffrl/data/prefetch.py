"""Batches on the devices before the step asks for them.

Transfers to a device are asynchronous, so keeping `size` of them under way needs a queue and no thread of its own: the
batches themselves are assembled on the loader's threads.  What makes it more than a queue is the state: a checkpoint
must hold the position after the last batch that the training step *consumed*, not after those that lie in the queue.
"""

import collections
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from diffrl.data.source import Batch

State = dict[str, Any]


class CheckpointableIterator(Protocol):
    """An iterator that can say where it stands, and be put there again."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> State: ...

    def set_state(self, state: State) -> None: ...

    def close(self) -> None: ...


class Prefetch:
    """An iterator of `put(batch)`, `size` items ahead of the consumer.

    Args:
      batches: where host batches come from.
      put: makes device arrays of a host batch; the caller knows the devices, this module does not.
      size: how many items lie ready beyond the one that is handed out; 0 fetches on demand.
      inner: consecutive batches per item.  With k > 1 they are stacked on the host to `[k, B, ...]` for a step that
        scans over them (an incomplete stack at the end of finite data is dropped); with 1 there is no leading axis.

    A source that fails raises from `next`, after the good items before the failure were handed out.
    """

    def __init__(self, batches: CheckpointableIterator, put: Callable[[Batch], Any], *, size: int = 2, inner: int = 1):
        self._batches = batches
        self._put = put
        self._size = size
        self._inner = inner
        self._queue: collections.deque[tuple[Any, State]] = collections.deque()
        self._end: Exception | None = None
        self._consumed = batches.get_state()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        while self._end is None and len(self._queue) <= self._size:
            try:
                self._queue.append(self._pull())
            except Exception as error:  # StopIteration, too: the queue is emptied first
                self._end = error
        if not self._queue:
            assert self._end is not None
            raise self._end
        item, self._consumed = self._queue.popleft()
        return item

    def _pull(self) -> tuple[Any, State]:
        if self._inner == 1:
            batch = next(self._batches)
        else:
            group = [next(self._batches) for _ in range(self._inner)]
            batch = {key: np.stack([b[key] for b in group]) for key in group[0]}
        return self._put(batch), self._batches.get_state()

    def get_state(self) -> State:
        """The loader's state just after the last item that was handed out; plain JSON if the loader's is."""
        return self._consumed

    def set_state(self, state: State) -> None:
        """Drops what was prefetched and goes on from `state`."""
        self._queue.clear()
        self._end = None
        self._batches.set_state(state)
        self._consumed = state

    def close(self) -> None:
        """Drops what was prefetched and ends the loader's threads and workers."""
        self._queue.clear()
        self._batches.close()
