"""Supervised training of whatever has a loss on batches of a source: the loop's settings, and the loop put together."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffrl.config import leaf
from diffrl.data.catalog import DataConfig
from diffrl.data.pipeline import loader
from diffrl.data.prefetch import Prefetch
from diffrl.data.source import Source
from diffrl.evaluate import plots
from diffrl.train import hooks, loop, mesh
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.state import TrainState
from diffrl.train.writers import Writers


@dataclasses.dataclass
class TrainConfig:
    steps: int = leaf(1000, "updates in all", free=True, at_least=1)
    batch_size: int = leaf(128, "of the global batch", at_least=1)
    accumulate: int = leaf(1, "microbatches per update", at_least=1)
    inner: int = leaf(1, "updates per dispatch", free=True, at_least=1)
    ema_decay: float = leaf(0.9999, at_least=0, below=1)
    ema_warmup: bool = leaf(True, "average over less while the run is young")
    profiles_every: int = leaf(
        0,
        "updates between snapshots for averages whose width is chosen later; 0 = none",
        at_least=0,
    )
    log_every: int = leaf(50, free=True, at_least=1)
    sample_every: int = leaf(1000, "updates between grids of samples; 0 = none", free=True, at_least=0)
    checkpoint_every: int = leaf(1000, free=True, at_least=1)
    keep: int = leaf(3, "checkpoints that are kept", free=True, at_least=1)


class Training(NamedTuple):
    """What a run trains with.

    step: pure (state, batch) -> (state, metrics).  source: of the batches, mirrored at random where `data.flip` asks.
    """

    settings: TrainConfig
    data: DataConfig
    seed: int
    source: Source
    step: Callable
    devices: jax.sharding.Mesh
    checkpoints: Checkpoints
    writers: Writers


def prepare(training: Training, fresh: TrainState) -> tuple[Callable, TrainState, Prefetch]:
    """The compiled step, the state to go on from, and the batches from there."""
    settings, devices = training.settings, training.devices
    data = Prefetch(
        loader(
            training.source,
            settings.batch_size,
            seed=training.seed,
            flip=training.data.flip,
            workers=training.data.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            devices=mesh.batch_parts(devices),
        ),
        mesh.put_batch(devices, inner=settings.inner > 1),
        inner=settings.inner,
    )
    compiled = mesh.compile_repeated(training.step, devices, fresh, settings.inner)
    return compiled, loop.resume(training.checkpoints, fresh, data, training.writers), data


def train(training: Training, fresh: TrainState, every: Sequence[hooks.Hook] = ()) -> TrainState:
    """Trains to the end, from the newest checkpoint if there is one; closes writers and checkpoints."""
    settings = training.settings
    program, current, data = prepare(training, fresh)
    try:
        return loop.fit(
            program,
            current,
            data,
            steps=settings.steps,
            inner=settings.inner,
            checkpoints=training.checkpoints,
            checkpoint_every=settings.checkpoint_every,
            hooks=every,
            writers=training.writers,
            log_every=settings.log_every,
            batch_size=settings.batch_size,
            desc=training.data.name,
        )
    finally:
        data.close()
        training.writers.close()
        training.checkpoints.close()


def plot_loss(writers: Writers, path: pathlib.Path, names: Sequence[str] = ("loss",), log_y: bool = True) -> None:
    """Metrics over the steps, from metrics.jsonl."""
    if not writers.metrics.exists():  # its writer is the first process, maybe on another host
        return
    lines = [json.loads(line) for line in writers.metrics.read_text().splitlines()]
    curves: dict[str, Any] = {}
    for name in names:
        points = np.array([[line["step"], line[name]] for line in lines if line.get(name) is not None])
        if len(points):
            curves[name] = (points[:, 0], points[:, 1])
    if curves:
        plots.curves(path, curves, "step", "training loss" if names == ("loss",) else "training losses", log_y=log_y)
