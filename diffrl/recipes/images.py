"""A diffusion model of images, from config to checkpoints, samples and scores: what the image experiments share."""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.config import Run, from_dict, leaf, read
from diffrl.data.catalog import DataConfig, make_source
from diffrl.data.pipeline import loader
from diffrl.data.prefetch import Prefetch
from diffrl.data.source import Source
from diffrl.errors import UserError
from diffrl.evaluate import grids, plots
from diffrl.nets.unet import UNet
from diffrl.recipes import denoising
from diffrl.recipes.denoising import Diffusion, DiffusionConfig, SampleConfig
from diffrl.train import hooks, loop, mesh, optim, state, step
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.mesh import MeshConfig
from diffrl.train.optim import OptimConfig
from diffrl.train.state import TrainState
from diffrl.train.writers import Writers

Array = jax.Array


@dataclasses.dataclass
class UNetConfig:
    """The network; see `diffrl.nets.unet.UNet` for what each field means."""

    channels: int = leaf(128, at_least=1)
    multipliers: tuple[int, ...] = leaf((1, 2, 2, 2), at_least=1)
    blocks: int = leaf(2, at_least=0)
    attention: tuple[int, ...] = leaf((16,), "sizes of the first spatial axis at which every block attends")
    middle_attention: bool = True
    heads: int = leaf(1, at_least=1)
    head_dim: int | None = leaf(None, at_least=1)
    scale_shift: bool = False
    resample_blocks: bool = False
    dropout: float = leaf(0.0, at_least=0, below=1)
    fourier: bool = False
    groups: int = leaf(32, at_least=1)
    dtype: str = leaf("float32", "of convolutions and attention: float32, or bfloat16 on GPU and TPU")
    remat: bool = leaf(False, "recompute blocks in the backward pass: less memory, more time")


@dataclasses.dataclass
class TrainConfig:
    steps: int = leaf(1000, "updates in all", free=True, at_least=1)
    batch_size: int = leaf(128, "of the global batch", at_least=1)
    accumulate: int = leaf(1, "microbatches per update", at_least=1)
    inner: int = leaf(1, "updates per dispatch", free=True, at_least=1)
    ema_decay: float = leaf(0.9999, at_least=0, below=1)
    ema_warmup: bool = leaf(True, "average over less while the run is young")
    log_every: int = leaf(50, free=True, at_least=1)
    sample_every: int = leaf(1000, "updates between grids of samples; 0 = none", free=True, at_least=0)
    checkpoint_every: int = leaf(1000, free=True, at_least=1)
    keep: int = leaf(3, "checkpoints that are kept", free=True, at_least=1)


@dataclasses.dataclass
class EvalConfig:
    judge: str = leaf("mlp", "mlp (fitted to the real images), resnet (needs judge_weights) or none", free=True)
    judge_weights: str = leaf("", ".npz of a published CIFAR-10 ResNet-20 or -56", free=True)
    split: str = leaf("test", "the held-out part of the data", free=True)
    samples: int = leaf(
        10_000, "generated and held-out images compared; no more than the held-out split", free=True, at_least=1
    )
    bound_images: int = leaf(64, "held-out images whose bits/dim --mode=eval measures; 0 = none", free=True, at_least=0)
    bound_steps: int = leaf(1000, "terms of the bound, where the process is no table", free=True, at_least=2)
    nll_images: int = leaf(
        0, "held-out images whose exact bits/dim --mode=eval measures, by the ODE", free=True, at_least=0
    )
    nll_steps: int = leaf(50, "steps of that ODE, four network calls with derivatives each", free=True, at_least=1)
    dequantisation: str = leaf("uniform", "for the exact bits/dim: uniform or truncated_normal", free=True)


@dataclasses.dataclass
class ImageConfig:
    """A diffusion model of images: data, network, objective, optimiser, loop, sampler, scores and devices."""

    seed: int = leaf(0, at_least=0)
    conditional: bool = leaf(True, "use the labels, where the data have them")
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def digits_config() -> ImageConfig:
    """scikit-learn's digits: 0.7 M parameters, v-prediction, guidance 1.5, minutes on two CPU cores."""
    return ImageConfig(
        data=DataConfig(name="digits"),
        unet=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), groups=8),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, schedule="cosine"),
        train=TrainConfig(steps=1000, ema_decay=0.995, sample_every=250, checkpoint_every=250),
        sample=SampleConfig(guidance=1.5),
        eval=EvalConfig(samples=359, bound_images=128, bound_steps=500),
    )


class Model(NamedTuple):
    """What a config comes to for one data set.

    apply: (params, x [B, H, W, C], t [B], labels [B] or None, keys [B] or None) -> y.
    init: key -> params.
    """

    apply: Callable
    init: Callable[[Array], Any]
    diffusion: Diffusion
    shape: tuple[int, ...]
    num_classes: int | None


def build(config: ImageConfig, source: Source) -> Model:
    """The network and the diffusion around it.

    Raises UserError where data and network do not suit each other.
    """
    _check_network(config.unet, source)
    diffusion = denoising.make_diffusion(config.diffusion, config.unet.fourier)
    fields = dataclasses.asdict(config.unet)
    fields["dtype"] = denoising.choose(
        "unet.dtype", fields["dtype"], {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    )
    out_channels = source.shape[-1] * (2 if diffusion.learned else 1)
    num_classes = source.num_classes if config.conditional else None
    network = UNet(out_channels, num_classes=num_classes, **fields)
    label = None if num_classes is None else jnp.zeros(1, jnp.int32)
    example = (jnp.zeros((1, *source.shape)), jnp.zeros(1), label)

    def init(key):
        # Hardware-friendly bits: the initialisers' threefry would take longer to compile than the gradient.
        fast = jax.random.key(jax.random.bits(key), impl="rbg")
        return jax.jit(network.init)(fast, *example)["params"]

    def apply(params, x, t, label, keys):
        return network.apply({"params": params}, x, t, label, keys)

    return Model(apply, init, diffusion, source.shape, num_classes)


def _check_network(config: UNetConfig, source: Source) -> None:
    """Raises UserError for data that are no images, and for what the network would leave out in silence."""
    if len(source.shape) != 3 or source.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"{source.name} has examples of shape {source.shape}: this experiment needs images [H, W, C] "
            "of 1, 3 or 4 channels"
        )
    if not config.multipliers:
        raise UserError("unet.multipliers=(): give one for each level, as in (1,2,2)")
    sizes = [source.shape[0] // 2**level for level in range(len(config.multipliers))]
    absent = [size for size in config.attention if size not in sizes]
    if absent:
        raise UserError(
            f"unet.attention={config.attention}: images of {source.shape[0]} rows never have {absent[0]}; "
            f"choose from {', '.join(map(str, sizes))}, or () for none"
        )


def make_step(config: ImageConfig, model: Model) -> Callable:
    """The pure training step (state, batch) -> (state, metrics)."""
    settings = config.train
    loss = denoising.make_loss(model.diffusion, model.apply, model.num_classes, config.diffusion.drop_label)
    update = step.make_update(
        loss,
        optim.make(config.optim, settings.steps),
        ema_decay=settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        accumulate=settings.accumulate,
    )
    return step.global_step(update)


def make_generator(config: ImageConfig, model: Model, devices: jax.sharding.Mesh, key: Array) -> Callable:
    """(params, labels [N] or None, num) -> samples float32 [N, H, W, C] in [-1, 1], sample i made from (key, i)."""
    grid = denoising.make_grid(model.diffusion, config.sample, config.diffusion.table_steps)

    @jax.jit
    def chunk(params, part):
        denoise = denoising.make_denoiser(model.diffusion, model.apply, params)
        sampler = denoising.make_sampler(model.diffusion, config.sample, denoise, model.num_classes)
        return denoising.draw(sampler, model.diffusion, grid, key, part["id"], model.shape, part.get("label"))

    def generate(params, labels, num):
        return denoising.in_chunks(functools.partial(chunk, params), labels, num, config.sample.batch, devices)

    return generate


class Session(NamedTuple):
    """A run that is open: its model, devices and files."""

    config: ImageConfig
    workdir: pathlib.Path
    source: Source
    model: Model
    devices: jax.sharding.Mesh
    checkpoints: Checkpoints
    writers: Writers


def open_session(config: ImageConfig, run: Run) -> Session:
    """Data, model, devices, checkpoints and writers of a run."""
    source = make_source(config.data)
    sizes = config.mesh
    return Session(
        config,
        run.workdir,
        source,
        build(config, source),
        mesh.make_mesh(sizes.data, sizes.fsdp, sizes.tensor),
        Checkpoints(run.workdir / "checkpoints", config.train.keep),
        Writers(run.workdir),
    )


def open_trained(workdir: str) -> Session:
    """The session of a model that an earlier run of `open_session`'s config trained, for `restored_state`.

    Raises UserError where there is none.
    """
    path = pathlib.Path(workdir)
    saved = read(path)
    if saved is None or "unet" not in saved["config"]:
        raise UserError(f"model={workdir}: no run here that trained an image model; name the workdir of one")
    return open_session(from_dict(ImageConfig(), saved["config"]), Run(path, "sample", saved["preset"]))


def initial_state(session: Session) -> TrainState:
    """A fresh state, spread over the devices."""
    config, model = session.config, session.model
    key = jax.random.key(config.seed)
    optimizer = optim.make(config.optim, config.train.steps)
    fresh = state.create(model.init(jax.random.fold_in(key, 1)), optimizer, key)
    return mesh.place(session.devices, fresh)


def restored_state(session: Session) -> TrainState:
    """The newest checkpoint's state, for sampling and evaluation; raises UserError where there is none."""
    restored = session.checkpoints.restore(initial_state(session))
    if restored is None:
        raise UserError(f"{session.workdir} has no checkpoint yet: train first (--mode=train)")
    return restored[0]


def prepare(session: Session, current: TrainState) -> tuple[Callable, TrainState, Prefetch]:
    """The compiled step, the state to go on from, and the batches from there."""
    config, devices, settings = session.config, session.devices, session.config.train
    data = Prefetch(
        loader(
            session.source,
            settings.batch_size,
            seed=config.seed,
            flip=config.data.flip,
            workers=config.data.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            devices=mesh.batch_parts(devices),
        ),
        mesh.put_batch(devices, inner=settings.inner > 1),
        inner=settings.inner,
    )
    compiled = mesh.compile_repeated(make_step(config, session.model), devices, current, settings.inner)
    return compiled, loop.resume(session.checkpoints, current, data, session.writers), data


def train(session: Session) -> TrainState:
    """Trains to the end, from the newest checkpoint if there is one."""
    settings = session.config.train
    fresh = initial_state(session)
    print(describe(session, fresh), file=sys.stderr)
    program, current, data = prepare(session, fresh)
    try:
        return loop.fit(
            program,
            current,
            data,
            steps=settings.steps,
            inner=settings.inner,
            checkpoints=session.checkpoints,
            checkpoint_every=settings.checkpoint_every,
            hooks=[grid_hook(session)] if settings.sample_every else [],
            writers=session.writers,
            log_every=settings.log_every,
            batch_size=settings.batch_size,
            desc=session.config.data.name,
        )
    finally:
        data.close()
        session.writers.close()
        session.checkpoints.close()


def grid_hook(session: Session) -> hooks.Hook:
    """Every now and then, the same samples as the model makes them then."""
    columns = min(8, session.config.sample.batch)
    labels, num = class_labels(session.model, columns)
    generate = make_generator(
        session.config, session.model, session.devices, jax.random.key(session.config.sample.seed)
    )

    def hook(done, current):
        picture = labelled_grid(session, generate(current.ema, labels, num), labels, columns)
        grids.save_png(session.workdir / "samples" / f"step_{done:07d}.png", picture)
        session.writers.images(done, "samples", picture)

    return hooks.every(session.config.train.sample_every, hook, session.config.train.inner)


def class_labels(model: Model, columns: int) -> tuple[np.ndarray | None, int]:
    """Labels of a grid with a row per class (at most ten rows), and how many samples it has."""
    if model.num_classes is None:
        return None, columns * columns
    rows = min(model.num_classes, 10)
    return np.repeat(np.arange(rows, dtype=np.int32), columns), rows * columns


def labelled_grid(session: Session, images: np.ndarray, labels: np.ndarray | None, columns: int) -> np.ndarray:
    """A picture with one row per class, or just a grid where there are no classes."""
    if labels is None:
        return grids.image_grid(images, columns)
    return grids.class_grid(images, labels, columns, session.source.class_names or None)


def plot_loss(session: Session) -> None:
    """The loss over the steps, from metrics.jsonl."""
    if not session.writers.metrics.exists():  # its writer is the first process, maybe on another host
        return
    lines = [json.loads(line) for line in session.writers.metrics.read_text().splitlines()]
    points = np.array([[line["step"], line["loss"]] for line in lines if line.get("loss") is not None])
    if len(points):
        curve = {"loss": (points[:, 0], points[:, 1])}
        plots.curves(session.workdir / "loss.png", curve, "step", "training loss", log_y=True)


def describe(session: Session, current: TrainState) -> str:
    """One line about what is trained on what."""
    size = sum(leaf.size for leaf in jax.tree.leaves(current.params))
    shape = "x".join(map(str, session.model.shape))
    kind = session.devices.devices.flat[0].device_kind
    names = session.source.class_names
    some = f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
    classes = "no labels" if session.source.num_classes is None else f"{session.source.num_classes} classes{some}"
    return (
        f"{session.source.name}: {session.source.length} images of {shape}, {classes}; "
        f"U-Net of {size / 1e6:.2f} M parameters on {session.devices.size} x {kind}"
    )
