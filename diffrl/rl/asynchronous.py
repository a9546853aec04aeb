"""Parameters that threads change at the same time, without a lock (Recht et al., arXiv:1106.5730: Hogwild!).

They are flat numpy arrays in one memory, changed in place.  Two updates at once may each read what the other has half
written, and then one of two additions to a number is lost, or one's new statistics meet the other's old parameters.
This is tolerated: updates are small and so is the chance, and a lock would make workers wait for one another.  Hence a
run of several workers cannot be repeated exactly; one of a single worker can.
"""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class RMSProp(NamedTuple):
    """theta <- theta - eta g / sqrt(s + eps), s <- decay s + (1 - decay) g^2, with one s for all workers.

    Attributes:
        learning_rate: eta.
        decay, eps: see above.
        anneal: eta falls linearly to 0 over the whole run.
        clip_norm: the largest norm of g; longer ones are shortened.
    """

    learning_rate: float = 1e-3
    decay: float = 0.99
    eps: float = 1e-5
    anneal: bool = True
    clip_norm: float = 0.5

    def rate(self, progress: float) -> float:
        """eta after this share of the run."""
        return self.learning_rate * (max(0.0, 1 - progress) if self.anneal else 1.0)


class Staleness(NamedTuple):
    """By how many updates of other workers gradients were late: mean, max, and how many were late by n, [max + 1]."""

    mean: float
    max: int
    histogram: np.ndarray


class Shared:
    """What all workers see.

    Attributes:
        params, square: float32 [P], theta and s.
    """

    def __init__(self, params: np.ndarray, square: np.ndarray, workers: int, steps: int = 0, updates: int = 0) -> None:
        self.params, self.square = np.array(params, np.float32), np.array(square, np.float32)
        self._before = steps, updates
        # Each worker writes to its own place alone, so that no count is ever lost.
        self._steps, self._updates = np.zeros(workers, np.int64), np.zeros(workers, np.int64)
        self._late = [collections.Counter[int]() for _ in range(workers)]

    @property
    def steps(self) -> int:
        """Of environments, by all workers."""
        return self._before[0] + int(self._steps.sum())

    @property
    def updates(self) -> int:
        return self._before[1] + int(self._updates.sum())

    def apply(
        self, worker: int, gradient: np.ndarray, rate: float, optimizer: RMSProp, steps: int, snapshot: int
    ) -> None:
        """Changes parameters and statistics in place.

        Args:
            steps: that the gradient was made of.
            snapshot: `updates` when the worker read the parameters.
        """
        self._late[worker][self.updates - snapshot] += 1
        norm = float(np.sqrt(np.vdot(gradient, gradient)))
        if norm > optimizer.clip_norm:
            gradient = gradient * np.float32(optimizer.clip_norm / norm)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is told where parameters are saved
            self.square *= np.float32(optimizer.decay)
            self.square += np.float32(1 - optimizer.decay) * np.square(gradient)
            self.params -= np.float32(rate) * gradient / np.sqrt(self.square + np.float32(optimizer.eps))
        self._updates[worker] += 1
        self._steps[worker] += steps

    def staleness(self) -> Staleness:
        late = sum((counter.copy() for counter in self._late), collections.Counter[int]())
        if not late:
            return Staleness(0.0, 0, np.zeros(1, np.int64))
        histogram = np.array([late[n] for n in range(max(late) + 1)], np.int64)
        return Staleness(float(np.average(np.arange(len(histogram)), weights=histogram)), max(late), histogram)


def run(
    work: Sequence[Callable[[], None]],
    stop: threading.Event,
    watch: Callable[[], None],
    every: float = 0.1,
    patience: float = 10.0,
) -> None:
    """Runs each of `work` in a thread of its own, to its end or to the first error, which is raised here.

    Args:
        stop: set when they are to end, here as well as by anyone else; `work` has to look at it.
        watch: called in this thread every so many seconds.
        patience: seconds that threads have after `stop`; one that hangs in its environment is then left behind.
    """
    errors: list[BaseException] = []
    ended = threading.Event()

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            ended.set()

    # Daemons: one that hangs does not keep the process alive.
    threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    try:
        while not errors and any(thread.is_alive() for thread in threads):
            ended.wait(every)
            ended.clear()
            watch()
    finally:
        stop.set()
        latest = time.monotonic() + patience
        for thread in threads:
            thread.join(max(0.0, latest - time.monotonic()))
    if errors:
        raise errors[0]
