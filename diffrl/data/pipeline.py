"""From a source to batches: global shuffle, the share of one host, flips, and [-1, 1] floats.

The order of all examples, over all epochs, is one endless sequence (each epoch a fresh permutation), of which batch n
is the n-th run of `batch_size` positions, and host h of P the h-th of P equal parts of that run.  So everything about
a batch is a function of (seed, n):

- the global batch is the same for every number of hosts, and its order too;
- the state of the iterator is one integer, whatever the number of threads and worker processes;
- an epoch's permutation is drawn at once by NumPy.  (Grain's own `shuffle` maps one index at a time, at 6 us each
  several times what the rest of the pipeline costs for a set in memory.)

Grain does the rest: it assembles batches ahead of time on threads or in worker processes, in order.
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import grain
import numpy as np

from diffrl.data.source import Batch, Source
from diffrl.errors import UserError

SHUFFLE, FLIP = 0, 1  # what a random stream is for: its seed is (seed, purpose, epoch or step)


def loader(
    source: Source,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    flip: bool = False,
    workers: int = 0,
    threads: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    devices: int = 1,
) -> "Loader":
    """A checkpointable iterator over this host's part of the batches.

    Args:
      source: where examples come from.
      batch_size: of the *global* batch; this host gets `batch_size / process_count` examples of it.  It may exceed the
        set's length where the set is repeated.
      seed: of the order and of the flips, >= 0.
      shuffle: a new permutation of the whole set for every epoch; without it, the order of the source.
      epochs: passes over the data; None repeats for ever, with batches that run across the end of an epoch.
      drop_remainder: whether the incomplete batch at the end of the last epoch is left out.
      flip: mirror each image left to right with probability 1/2.
      workers: worker processes, for sources whose decoding outgrows one interpreter.  They need a picklable `fetch`,
        parsed absl flags, and a `__main__` guard in the script; 0 assembles batches on `threads`.
      threads: how many batches are assembled at a time in each process; by default 1 for sets in memory, where more
        would only contend for the interpreter, and 4 where files are read and decoded.
      process_index, process_count: which host this is, of how many.
      devices: how many devices share the global batch.

    Returns:
      An iterator of `{"x": float32 [B, ...] in [-1, 1], "label": int32 [B]}` ("label" if the source has labels).

    Raises:
      UserError: a batch that the hosts or devices cannot share evenly, or that is larger than all there is.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} must be at least 1")
    if seed < 0:
        raise UserError(f"seed {seed} must not be negative")
    if epochs is not None and epochs < 1:
        raise UserError(
            f"{epochs} epochs of {source.name}: ask for 1 or more, or for None to repeat for ever"
        )
    for count, what in ((process_count, "hosts"), (devices, "devices")):
        if batch_size % count:
            raise UserError(
                f"batch size {batch_size} is not divisible by {count} {what}: "
                f"take {max(1, batch_size // count) * count} or {(batch_size // count + 1) * count}"
            )
    if flip and len(source.shape) != 3:
        raise UserError(
            f"flip needs images [H, W, C], but {source.name} has shape {source.shape}: turn flip off"
        )
    order = Order(
        source.length, batch_size, seed, shuffle, epochs, drop_remainder, flip, process_index, process_count
    )
    if len(order) == 0:
        raise UserError(
            f"batch size {batch_size} is larger than the {source.length * (epochs or 1)} examples that {source.name} "
            f"gives in {epochs} epoch(s): take a smaller batch, or repeat"
        )
    threads = threads or (1 if source.in_memory else 4)
    return Loader(grain.MapDataset.source(order).map(functools.partial(assemble, source)), workers, threads)


class Share(NamedTuple):
    """What one host must fetch for one batch."""

    indices: np.ndarray  # [b] into the source
    flip: np.ndarray | None  # bool [b]


@dataclasses.dataclass(frozen=True)
class Order:
    """Batch number -> this host's share of it: a random-access data source in Grain's sense.

    The length is `sys.maxsize` where the data repeat for ever.
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


def assemble(source: Source, share: Share) -> Batch:
    """The batch of `share`: fetched, mirrored, and as float32."""
    batch = dict(source.fetch(share.indices))
    x = batch["x"]
    if share.flip is not None:  # before the conversion: a quarter of the bytes
        x = mirror(x, share.flip)
    batch["x"] = to_unit(x)
    return batch


def mirror(x: np.ndarray, which: np.ndarray) -> np.ndarray:
    """`x [B, H, W, C]` with the images of `which`, bool [B], mirrored left to right."""
    y = np.array(x, order="C")
    # NumPy reverses an axis item by item: whole pixels as items are several times faster than their channels.
    pixels = y.view(np.dtype((np.void, y.shape[-1] * y.itemsize)))
    pixels[which] = pixels[which][:, :, ::-1]
    return y


def to_unit(x: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> float32 `x / 127.5 - 1` in [-1, 1]; floating arrays are data already and only become float32."""
    if x.dtype != np.uint8:
        return x.astype(np.float32, copy=False)
    y = np.divide(x, np.float32(127.5), dtype=np.float32)
    y -= 1
    return y


class Loader:
    """Batches in order, assembled ahead by Grain; the state is the number of the next batch.

    Grain's own state also describes its workers, so that a run could not be resumed with another number of them;
    batches being functions of their number, the number is enough.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int, threads: int):
        self._dataset = dataset
        self._workers = workers
        self._read_options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
        self._step = 0
        self._iterator: grain.DatasetIterator | None = None  # made late: `set_state` often follows at once

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch = next(self._iterator)
        except Exception:
            self.close()  # Grain would skip the batch that failed; a new iterator tries it again
            raise
        self._step += 1
        return batch

    def _start(self) -> grain.DatasetIterator:
        dataset = self._dataset[self._step :].to_iter_dataset(self._read_options)
        if self._workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            )
        return iter(dataset)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, as plain JSON: `{"step": batches given so far}`."""
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on (or back) to where `get_state` was called."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends threads and workers; iterating again starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
