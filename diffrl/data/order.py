"""Which examples make up batch n: global shuffle, repetition, and the share of one host.

All examples of all epochs form one endless sequence, each epoch a permutation of its own; batch n is the n-th run of
`batch_size` positions, and host h of P gets the h-th of P equal parts of it.  So a batch is a function of (seed, n):

- it is the same for every number of hosts, in content and order;
- an iterator can start anywhere, with any number of threads and worker processes;
- an epoch's permutation is drawn by NumPy at once.  (Grain's own `shuffle` maps one index at a time; at 6 us each that
  is several times what the rest of the pipeline costs for a set in memory.)
"""

import dataclasses
import functools
import sys
from typing import NamedTuple

import numpy as np

SHUFFLE, FLIP = 0, 1  # what a random stream is for: its seed is (seed, purpose, epoch or step)


class Share(NamedTuple):
    """What one host must fetch for one batch."""

    indices: np.ndarray  # [b] into the source
    flip: np.ndarray | None  # bool [b]


@dataclasses.dataclass(frozen=True)
class Order:
    """Batch number -> this host's share of it: a random-access data source in Grain's sense.

    Attributes:
      size: examples in the set.
      batch_size: of the global batch.
      seed: of permutations and flips.
      shuffle: whether each epoch is a permutation, or the order of the set.
      epochs: how many; None repeats for ever, and the length is then `sys.maxsize`.
      drop_remainder: whether an incomplete last batch is left out.
      flip: whether to draw which images are mirrored.
      process_index, process_count: which host this is, of how many.
    """

    size: int
    batch_size: int
    seed: int
    shuffle: bool
    epochs: int | None
    drop_remainder: bool
    flip: bool
    process_index: int
    process_count: int

    def __len__(self) -> int:
        if self.epochs is None:
            return sys.maxsize
        whole, rest = divmod(self.size * self.epochs, self.batch_size)
        return whole + (rest > 0 and not self.drop_remainder)

    def __getitem__(self, step: int) -> Share:
        start = step * self.batch_size
        count = self.batch_size
        if self.epochs is not None:
            count = min(count, self.size * self.epochs - start)
        low = self.process_index * count // self.process_count
        high = (self.process_index + 1) * count // self.process_count
        flip = None
        if self.flip:  # drawn for the global batch, so that it does not depend on the number of hosts
            flip = np.random.default_rng([self.seed, FLIP, step]).random(count)[low:high] < 0.5
        return Share(self._indices(start + low, start + high), flip)

    def _indices(self, start: int, stop: int) -> np.ndarray:
        """Positions start .. stop - 1 of the endless sequence of epochs."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.size)
            part = self._epoch(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> np.ndarray:
        return _permutation(self.size, self.seed, epoch) if self.shuffle else np.arange(self.size)


@functools.lru_cache(maxsize=4)  # two loaders, each on either side of an epoch's end
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, SHUFFLE, epoch]).permutation(size)
