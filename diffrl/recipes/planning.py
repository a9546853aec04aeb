"""The run that trains a model of trajectories."""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from diffrl.config import Run
from diffrl.data.catalog import DataConfig
from diffrl.data.source import Source
from diffrl.errors import UserError
from diffrl.recipes import training
from diffrl.recipes.planners import Model
from diffrl.recipes.training import Training
from diffrl.train import hooks, mesh, optim, state, step
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.state import TrainState
from diffrl.train.writers import Writers


class Session(NamedTuple):
    """A run that is open."""

    config: Any
    workdir: pathlib.Path
    source: Source
    fitted: Any
    model: Model
    devices: jax.sharding.Mesh
    checkpoints: Checkpoints
    best: Checkpoints
    writers: Writers


def open_session(config: Any, run: Run, source: Source, fitted: Any, model: Model) -> Session:
    """Devices, checkpoints and writers of a run of a config with `mesh`, `train`, `optim` and `seed`."""
    sizes = config.mesh
    if config.train.profiles_every:
        raise UserError(f"train.profiles_every={config.train.profiles_every}: planners keep no snapshots; leave it out")
    return Session(
        config,
        run.workdir,
        source,
        fitted,
        model,
        mesh.make_mesh(sizes.data, sizes.fsdp, sizes.tensor),
        Checkpoints(run.workdir / "checkpoints", config.train.keep),
        Checkpoints(run.workdir / "best", 1),
        Writers(run.workdir),
    )


def _fresh(session: Session) -> Callable[[], TrainState]:
    config = session.config
    key = jax.random.key(config.seed)
    optimizer = optim.make(config.optim, config.train.steps)

    def make():
        params = session.model.init(jax.random.fold_in(key, 1))
        return state.create(params, optimizer, key, frozen=session.fitted)

    return make


def train(session: Session, every: Sequence[hooks.Hook] = ()) -> TrainState:
    """Trains to the end, from the newest checkpoint if there is one."""
    config = session.config
    settings = config.train
    fresh = mesh.initialise(session.devices, _fresh(session))
    size = sum(leaf.size for leaf in jax.tree.leaves(fresh.params))
    kind = session.devices.devices.flat[0].device_kind
    print(
        f"{session.source.name}: {session.source.length:,} windows of {session.source.shape[0]} steps; "
        f"{size / 1e6:.2f} M parameters on {session.devices.size} x {kind}",
        file=sys.stderr,
    )
    update = step.make_update(
        session.model.loss,
        optim.make(config.optim, settings.steps),
        ema_decay=settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        accumulate=settings.accumulate,
    )
    job = Training(
        settings, DataConfig(name=session.source.name), config.seed, session.source, step.global_step(update),
        session.devices, session.checkpoints, session.writers,
    )  # fmt: skip
    try:
        return training.train(job, fresh, every)
    finally:
        session.best.close()


def shapes(session: Session) -> Any:
    """Parameters without numbers."""
    return jax.eval_shape(session.model.init, jax.random.key(0))


def restored(session: Session, best: bool = False) -> TrainState:
    """The newest checkpoint's state, or that of the best score; raises UserError where there is none."""
    folder = (session.best if best else session.checkpoints).folder
    reader = Checkpoints(folder)  # a session's own are closed once it is trained
    try:
        found = reader.restore(mesh.abstract(session.devices, _fresh(session)))
    finally:
        reader.close()
    if found is None:
        raise UserError(f"{folder} has no checkpoint yet: train first (--mode=train)")
    return found[0]
