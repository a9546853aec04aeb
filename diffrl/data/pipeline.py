"""From a source to batches: ordered by `order`, fetched, mirrored, and as floats in [-1, 1].

Grain assembles the batches ahead of time, on threads or in worker processes, and gives them in order.  As each is a
function of its number, that number is all the state there is.
"""

import functools
from typing import Any

import grain
import numpy as np

from diffrl.data.order import Order, Share
from diffrl.data.source import Batch, Source
from diffrl.errors import UserError


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
        raise UserError(f"{epochs} epochs of {source.name}: ask for 1 or more, or for None to repeat for ever")
    for count, what in ((process_count, "hosts"), (devices, "devices")):
        if batch_size % count:
            raise UserError(
                f"batch size {batch_size} is not divisible by {count} {what}: "
                f"take {(batch_size // count + 1) * count}, say"
            )
    if flip and len(source.shape) != 3:
        raise UserError(f"flip needs images [H, W, C], but {source.name} has shape {source.shape}: turn flip off")
    order = Order(source.length, batch_size, seed, shuffle, epochs, drop_remainder, flip, process_index, process_count)
    if len(order) == 0:
        raise UserError(
            f"batch size {batch_size} is larger than the {source.length * (epochs or 1)} examples that {source.name} "
            f"gives in {epochs} epoch(s): take a smaller batch, or repeat"
        )
    threads = threads or (1 if source.in_memory else 4)
    return Loader(grain.MapDataset.source(order).map(functools.partial(assemble, source)), workers, threads)


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
