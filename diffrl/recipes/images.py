"""A diffusion model of images, from config to checkpoints, samples and scores: what the image experiments share."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.config import Run, from_dict, leaf, read
from diffrl.data.catalog import DataConfig, make_source
from diffrl.data.prefetch import Prefetch
from diffrl.data.source import Source
from diffrl.errors import UserError
from diffrl.evaluate import grids
from diffrl.recipes import denoising, digests, latents, networks, training
from diffrl.recipes.denoising import Diffusion, DiffusionConfig, SampleConfig
from diffrl.recipes.judging import JudgeConfig, check_images
from diffrl.recipes.latents import Codec, LatentsConfig
from diffrl.recipes.networks import DiTConfig, UNetConfig
from diffrl.recipes.training import TrainConfig, Training
from diffrl.train import hooks, mesh, optim, post_hoc, state, step
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.mesh import MeshConfig
from diffrl.train.optim import OptimConfig
from diffrl.train.state import TrainState
from diffrl.train.writers import Writers

Array = jax.Array


@dataclasses.dataclass
class EvalConfig(JudgeConfig):
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
    latents: LatentsConfig = dataclasses.field(default_factory=LatentsConfig)
    network: str = leaf("unet", "unet or dit")
    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    dit: DiTConfig = dataclasses.field(default_factory=DiTConfig)
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


def trained_by(config: ImageConfig) -> dict[str, Any]:
    """What a trained model depends on, for a digest: of the free leaves, the number of updates."""
    return digests.settings(config) | {"steps": config.train.steps}


class Model(NamedTuple):
    """What a config comes to for one data set.

    apply: (params, x [B, H, W, C], t [B], labels [B] or None, keys [B] or None) -> y.
    init: key -> params.
    shape: of what is diffused, images or latents.
    """

    apply: Callable
    init: Callable[[Array], Any]
    diffusion: Diffusion
    shape: tuple[int, ...]
    num_classes: int | None


def build(config: ImageConfig, source: Source, shape: tuple[int, ...] | None = None) -> Model:
    """The network and the diffusion around it.  shape: of latents, where these are diffused in the images' place.

    Raises UserError where data and network do not suit each other.
    """
    check_images(source)
    shape = shape or source.shape
    unet = denoising.choose("network", config.network, {"unet": True, "dit": False})
    diffusion = denoising.make_diffusion(config.diffusion, unet and config.unet.fourier)
    out_channels = shape[-1] * (2 if diffusion.learned else 1)
    num_classes = source.num_classes if config.conditional else None
    network: Any = (
        networks.make_unet(config.unet, out_channels, num_classes, shape)
        if unet
        else networks.make_dit(config.dit, out_channels, num_classes)
    )
    label = None if num_classes is None else jnp.zeros(1, jnp.int32)
    example = (jnp.zeros((1, *shape)), jnp.zeros(1), label)

    def init(key):
        # Hardware-friendly bits: the initialisers' threefry would take longer to compile than the gradient.
        fast = jax.random.key(jax.random.bits(key), impl="rbg")
        return jax.jit(network.init)(fast, *example)["params"]

    def apply(params, x, t, label, keys):
        return network.apply({"params": params}, x, t, label, keys)

    return Model(apply, init, diffusion, shape, num_classes)


def make_step(config: ImageConfig, model: Model, draw: Callable | None = None) -> Callable:
    """The pure training step (state, batch) -> (state, metrics).

    draw: (x of a batch, keys [B], the state's frozen) -> what is diffused; None: x itself.
    """
    settings = config.train
    loss = denoising.make_loss(model.diffusion, model.apply, model.num_classes, config.diffusion.drop_label, draw)
    update = step.make_update(
        loss,
        optim.make(config.optim, settings.steps),
        ema_decay=settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        accumulate=settings.accumulate,
    )
    return step.global_step(update)


def make_generator(
    config: ImageConfig, model: Model, devices: jax.sharding.Mesh, key: Array, codec: Codec | None = None
) -> Callable:
    """(params, labels [N] or None, num) -> samples float32 [N, H, W, C] in [-1, 1], sample i made from (key, i).

    codec: makes images of the latents that the model draws.
    """
    grid = denoising.make_grid(model.diffusion, config.sample, config.diffusion.table_steps)
    # Only pixels are known to lie in [-1, 1].
    settings = config.sample if codec is None else dataclasses.replace(config.sample, clip=False)
    denoising.make_sampler(model.diffusion, settings, model.apply, model.num_classes)  # if it cannot be, here and now

    @jax.jit
    def chunk(params, coding, part):
        denoise = denoising.make_denoiser(model.diffusion, model.apply, params)
        sampler = denoising.make_sampler(model.diffusion, settings, denoise, model.num_classes)
        x = denoising.draw(sampler, model.diffusion, grid, key, part["id"], model.shape, part.get("label"))
        return x if codec is None else jnp.clip(latents.decode(codec, coding, x), -1, 1)

    def generate(params, labels, num):
        draw = functools.partial(chunk, params, None if codec is None else codec.arrays)
        return denoising.in_chunks(draw, labels, num, config.sample.batch, devices)

    return generate


class Session(NamedTuple):
    """A run that is open: its model, devices and files.

    codec: of a model of latents; source is of images all the same.
    """

    config: ImageConfig
    workdir: pathlib.Path
    source: Source
    model: Model
    devices: jax.sharding.Mesh
    checkpoints: Checkpoints
    writers: Writers
    codec: Codec | None = None

    def generator(self, key: Array) -> Callable:
        """`make_generator` of this run's parts."""
        return make_generator(self.config, self.model, self.devices, key, self.codec)


def open_session(config: ImageConfig, run: Run) -> Session:
    """Data, autoencoder, model, devices, checkpoints and writers of a run; the data are encoded if need be."""
    source = make_source(config.data)
    check_images(source)
    sizes = config.mesh
    devices = mesh.make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    codec = latents.open_codec(config.latents, config.data, source, run.workdir) if config.latents.model else None
    return Session(
        config,
        run.workdir,
        source,
        build(config, source, codec.shape if codec else None),
        devices,
        Checkpoints(run.workdir / "checkpoints", config.train.keep),
        Writers(run.workdir),
        codec,
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


def _fresh(session: Session) -> Callable[[], TrainState]:
    """Makes a fresh state."""
    config, model = session.config, session.model
    key = jax.random.key(config.seed)
    optimizer = optim.make(config.optim, config.train.steps)
    frozen = {"normaliser": session.codec.normaliser} if session.codec else None
    profiles = len(post_hoc.STORED) if config.train.profiles_every else 0

    def make():
        params = model.init(jax.random.fold_in(key, 1))
        return state.create(params, optimizer, key, frozen=frozen, profiles=profiles)

    return make


def initial_state(session: Session) -> TrainState:
    """A fresh state, made where it shall lie."""
    return mesh.initialise(session.devices, _fresh(session))


def restored_state(session: Session) -> TrainState:
    """The newest checkpoint's state, for sampling and evaluation; raises UserError where there is none."""
    restored = session.checkpoints.restore(mesh.abstract(session.devices, _fresh(session)))
    if restored is None:
        raise UserError(f"{session.workdir} has no checkpoint yet: train first (--mode=train)")
    return restored[0]


def check_averages(config: ImageConfig) -> None:
    """Raises UserError for an average to draw with that training will not have kept."""
    if config.sample.ema_width and not config.train.profiles_every:
        raise UserError(
            f"--config.sample.ema_width={config.sample.ema_width} needs snapshots: set --config.train.profiles_every"
        )


def averaged(session: Session, current: TrainState) -> Any:
    """The parameters to draw with: the state's average, or with `sample.ema_width` one of that width, from snapshots.

    Raises UserError where the run has kept none.
    """
    width = session.config.sample.ema_width
    if not width:
        return current.ema
    snapshots = open_profiles(session)
    try:
        return post_hoc.reconstruct(snapshots, current.params, width)
    finally:
        snapshots.close()


def open_profiles(session: Session) -> Checkpoints:
    """Where the run keeps its averages of power functions."""
    return Checkpoints(session.workdir / "profiles", keep=None)


def job(session: Session) -> Training:
    """What the session trains with: images, or the latents of its codec."""
    config, codec = session.config, session.codec
    source, data = session.source, config.data
    if codec is not None:  # the mirrored images are among the latents
        source, data = codec.source(), dataclasses.replace(data, flip=False, workers=0)
    pure = make_step(config, session.model, codec and codec.draw)
    return Training(
        config.train, data, config.seed, source, pure, session.devices, session.checkpoints, session.writers
    )


def prepare(session: Session, current: TrainState) -> tuple[Callable, TrainState, Prefetch]:
    """The compiled step, the state to go on from, and the batches from there."""
    return training.prepare(job(session), current)


def train(session: Session, every: Sequence[hooks.Hook] = ()) -> TrainState:
    """Trains to the end, from the newest checkpoint if there is one; every: hooks beside the grids of samples."""
    fresh = initial_state(session)
    print(describe(session, fresh), file=sys.stderr)
    settings = session.config.train
    grids_too = [grid_hook(session)] if settings.sample_every else []
    if not settings.profiles_every:
        return training.train(job(session), fresh, [*every, *grids_too])
    snapshots = open_profiles(session)
    try:
        save = post_hoc.snapshots_every(settings.profiles_every, snapshots, inner=settings.inner)
        return training.train(job(session), fresh, [*every, save, *grids_too])
    finally:
        snapshots.close()


def price(config: ImageConfig, model: Model) -> float:
    """XLA's count of FLOPs for one training step; nothing is compiled or run.

    Raises UserError where XLA does not count.
    """
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = optim.make(config.optim, config.optim.warmup_steps + 1)
    current = jax.eval_shape(lambda p: state.create(p, optimizer, jax.random.key(0)), abstract)
    shape = (config.train.batch_size, *model.shape)
    batch = {"x": jax.ShapeDtypeStruct(shape, np.float32), "label": jax.ShapeDtypeStruct(shape[:1], np.int32)}
    cost = jax.jit(make_step(config, model)).lower(current, batch).cost_analysis() or {}
    if not cost.get("flops"):
        raise UserError(
            f"XLA counts no FLOPs on {jax.default_backend()}, so there is no equal compute: run it on a CPU or a GPU"
        )
    return cost["flops"]


def grid_hook(session: Session) -> hooks.Hook:
    """Every now and then, the same samples as the model makes them then."""
    columns = min(8, session.config.sample.batch)
    labels, num = class_labels(session.model, columns)
    generate = session.generator(jax.random.key(session.config.sample.seed))

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
    training.plot_loss(session.writers, session.workdir / "loss.png")


def describe(session: Session, current: TrainState) -> str:
    """One line about what is trained on what."""
    size = sum(leaf.size for leaf in jax.tree.leaves(current.params))
    shape = "x".join(map(str, session.source.shape))
    what = {"unet": "U-Net", "dit": "DiT"}[session.config.network]
    coded = f" as latents of {'x'.join(map(str, session.model.shape))}" if session.codec else ""
    kind = session.devices.devices.flat[0].device_kind
    names = session.source.class_names
    some = f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
    classes = "no labels" if session.source.num_classes is None else f"{session.source.num_classes} classes{some}"
    return (
        f"{session.source.name}: {session.source.length} images of {shape}{coded}, {classes}; "
        f"{what} of {size / 1e6:.2f} M parameters on {session.devices.size} x {kind}"
    )
