"""An autoencoder of images, from config to checkpoints and scores: KL or VQ, perceptual and adversarial losses."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffrl.compression import adversarial, codebook, posterior
from diffrl.config import Run, from_dict, leaf, read
from diffrl.data.catalog import DataConfig, make_source
from diffrl.data.source import Source
from diffrl.diffusion.sampling import fold
from diffrl.errors import UserError
from diffrl.evaluate import lpips, similarity
from diffrl.nets.autoencoder import Autoencoder
from diffrl.nets.patchgan import PatchGAN
from diffrl.pretrained import lpips_alexnet
from diffrl.recipes import denoising, judging, training
from diffrl.recipes.judging import JudgeConfig
from diffrl.recipes.training import TrainConfig, Training
from diffrl.train import hooks, mesh, optim, state, step
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.mesh import MeshConfig
from diffrl.train.optim import OptimConfig
from diffrl.train.state import Aux, TrainState
from diffrl.train.writers import Writers

Array = jax.Array

DRAW, RESTART = 201, 202  # what a sample's key is folded with


@dataclasses.dataclass
class AutoencoderConfig:
    """The network; see `diffrl.nets.autoencoder.Autoencoder` for what each field means."""

    kind: str = leaf("kl", "kl (Gaussian latents) or vq (a codebook)")
    channels: int = leaf(128, at_least=1)
    multipliers: tuple[int, ...] = leaf((1, 2, 4, 4), "widths of the levels; n of them shrink a side by 2^(n-1)")
    blocks: int = leaf(2, at_least=1)
    attention: tuple[int, ...] = leaf((), "levels, from 0 for the finest, whose blocks attend")
    middle_attention: bool = True
    latent: int = leaf(4, "channels of the latents", at_least=1)
    codes: int = leaf(512, "vq: size of the codebook", at_least=2)
    code_decay: float = leaf(
        0.99, "vq: of the codebook's averages, which forget faster while the run is young", at_least=0, below=1
    )
    groups: int = leaf(32, at_least=1)
    dtype: str = leaf("float32", "of convolutions and attention: float32, or bfloat16 on GPU and TPU")
    remat: bool = leaf(False, "recompute blocks in the backward pass: less memory, more time")


@dataclasses.dataclass
class LossConfig:
    """What a reconstruction is measured with in training, each term in units of the mean absolute error of a pixel."""

    pixel: str = leaf("l1", "l1 or l2")
    kl: float = leaf(1e-6, "weight of the divergence of the latents from N(0, 1), in nats per pixel", at_least=0)
    commitment: float = leaf(0.25, "vq: weight of the latents' distance to their codes", at_least=0)
    perceptual: float = leaf(1.0, "weight of LPIPS, where there are lpips_weights", at_least=0)
    lpips_weights: tuple[str, ...] = leaf((), ".npz files of LPIPS on AlexNet; () = no perceptual loss", free=True)
    adversarial: float = leaf(0.5, "weight of the critic in units of the measured balance; 0 = none", at_least=0)
    adversarial_start: int = leaf(50_000, "updates before the critic has a say", at_least=0)
    critic_lead: int = leaf(0, "updates that the critic learns before it has a say", at_least=0)
    critic_channels: int = leaf(64, at_least=1)
    critic_strided: int = leaf(3, "strided convolutions: 3 see 70x70 pixels", at_least=1)


@dataclasses.dataclass
class Config:
    """An autoencoder of images: data, network, losses, optimiser of both players, loop, scores and devices."""

    seed: int = leaf(0, at_least=0)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


class Model(NamedTuple):
    """critic: None where there is no adversarial loss.  perceptual: LPIPS as (apply, params), or None."""

    net: Autoencoder
    critic: PatchGAN | None
    perceptual: tuple[Callable, Any] | None
    codes: int | None
    shape: tuple[int, ...]


class Session(NamedTuple):
    """A run that is open: its model, devices and files."""

    config: Config
    workdir: pathlib.Path
    source: Source
    model: Model
    devices: jax.sharding.Mesh
    checkpoints: Checkpoints
    writers: Writers


def build(config: Config, source: Source) -> Model:
    """The players and the perceptual network.

    Raises:
        UserError: data that are no images, or that the networks are too large for; weights that cannot be read.
    """
    judging.check_images(source)
    settings, loss = config.autoencoder, config.loss
    denoising.choose("loss.pixel", loss.pixel, dict.fromkeys(("l1", "l2")))
    if not settings.multipliers:
        raise UserError("autoencoder.multipliers=(): give one for each level, as in (1,2,4)")
    absent = [level for level in settings.attention if not 0 <= level < len(settings.multipliers)]
    if absent:
        raise UserError(f"autoencoder.attention={settings.attention}: levels are 0 ... {len(settings.multipliers) - 1}")
    dtype = denoising.choose("autoencoder.dtype", settings.dtype, {"float32": jnp.float32, "bfloat16": jnp.bfloat16})
    discrete = denoising.choose("autoencoder.kind", settings.kind, {"kl": False, "vq": True})
    net = Autoencoder(
        image_channels=source.shape[-1],
        latent=settings.latent,
        channels=settings.channels,
        multipliers=settings.multipliers,
        blocks=settings.blocks,
        attention=settings.attention,
        middle_attention=settings.middle_attention,
        moments=not discrete,
        groups=settings.groups,
        dtype=dtype,
        remat=settings.remat,
    )
    critic = None
    if loss.adversarial:
        groups = next(n for n in range(32, 0, -1) if loss.critic_channels % n == 0)
        critic = PatchGAN(loss.critic_channels, loss.critic_strided, groups, dtype)
    model = Model(net, critic, load_lpips(loss, source), settings.codes if discrete else None, source.shape)
    jax.eval_shape(lambda key: init(model, key), jax.random.key(0))  # sizes that do not fit are told now
    return model


def load_lpips(config: LossConfig, source: Source) -> tuple[Callable, Any] | None:
    """LPIPS as (apply, params), or None, with the reason on stderr where it was wanted."""
    if not config.perceptual:
        return None
    if not config.lpips_weights:
        print("no perceptual loss: --config.loss.lpips_weights names no weights of LPIPS (.npz)", file=sys.stderr)
        return None
    if min(source.shape[:2]) < lpips_alexnet.SMALLEST or source.shape[-1] not in (1, 3):
        raise UserError(
            f"LPIPS needs grey or RGB images of at least {lpips_alexnet.SMALLEST} pixels, not {source.shape}: "
            "set --config.loss.perceptual=0 or --config.data.image_size"
        )
    return lpips_alexnet.load(*(pathlib.Path(path).expanduser() for path in config.lpips_weights))


def init(model: Model, key: Array) -> dict[str, Any]:
    """Fresh parameters of both players."""
    # Hardware-friendly bits compile sooner, as in `images.build`.
    keys = [jax.random.key(jax.random.bits(jax.random.fold_in(key, i)), impl="rbg") for i in range(2)]
    x = jnp.zeros((1, *model.shape))
    params = {"autoencoder": jax.jit(model.net.init)(keys[0], x)["params"]}
    if model.critic is not None:
        params["critic"] = jax.jit(model.critic.init)(keys[1], x)["params"]
    return params


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Each player clips and adapts its own gradients."""
    players = ("autoencoder", "critic") if config.loss.adversarial else ("autoencoder",)
    return optax.multi_transform(
        {player: optim.make(config.optim, config.train.steps) for player in players}, {name: name for name in players}
    )


def make_loss(config: Config, model: Model) -> Callable:
    """The `Loss` of the training step: reconstruction, latents and, from its start on, the two players' game."""
    weights, net, pixels = config.loss, model.net, int(np.prod(model.shape))
    power = 1 if weights.pixel == "l1" else 2

    def loss(params, current, batch, keys):
        x, params_net = batch["x"], params["autoencoder"]
        code_loss, z, metrics, extra = _latents(config, model, params_net, current, x, keys, pixels)
        features: Any = net.apply({"params": params_net}, z, method="features")

        def last(kernel, h):
            layer = params_net["conv_out"] | {"kernel": kernel}
            return net.apply({"params": params_net | {"conv_out": layer}}, h, method="last")

        def reconstruction(image):
            value = (jnp.abs(image - x) ** power).mean()
            if model.perceptual is not None:
                value += weights.perceptual * _lpips(model, current.frozen["lpips"], image, x).mean()
            return value

        kernel = params_net["conv_out"]["kernel"]
        if model.critic is None:
            image = last(kernel, features)
            value = reconstruction(image)
        else:
            on, learns = (
                (current.step >= weights.adversarial_start - lead).astype(jnp.float32)
                for lead in (0, weights.critic_lead)
            )
            verdict = _critic(model, params)
            image, parts = adversarial.balanced(
                last, kernel, features, reconstruction, lambda image: -verdict(image).mean(), weights.adversarial * on
            )
            real, fake = verdict(x), verdict(jax.lax.stop_gradient(image))
            critic = adversarial.hinge(real, fake)
            value = parts.loss + learns * critic
            metrics |= {"critic": critic, "adversary": parts.adversary, "adversarial_weight": parts.weight}
            metrics |= {"critic_real": real.mean(), "critic_fake": fake.mean()}
        shown = jax.lax.stop_gradient(jnp.clip(image, -1, 1))
        metrics |= {"pixel": jnp.abs(shown - x).mean(), "psnr": similarity.psnr(shown, x).mean()}
        return value + code_loss, Aux(metrics, extra)

    return loss


def _latents(config, model, params, current, x, keys, pixels):
    """(loss of the latents, latents for the decoder, metrics, the new codebook or None)."""
    h = model.net.apply({"params": params}, x, method="encode")
    if model.codes is None:
        kl = posterior.kl(h).mean()
        return config.loss.kl * kl / pixels, posterior.sample(h, fold(keys, DRAW)), {"kl": kl}, None
    quantised = codebook.quantise(current.extra.codes, h)
    key = jax.random.fold_in(keys[0], RESTART)
    # A young encoder moves fast: codes that do not follow it soon, or start again soon, leave all data to a single one.
    decay = jnp.minimum(config.autoencoder.code_decay, (1 + current.step) / (10 + current.step))
    book = codebook.update(current.extra, h, quantised.indices, key, decay)
    share, perplexity = codebook.usage(quantised.indices, model.codes)
    distance = quantised.distance.mean()
    metrics = {"commitment": distance, "usage": share, "perplexity": perplexity}
    return config.loss.commitment * distance, quantised.z, metrics, book


def _lpips(model, params, a, b):
    apply = model.perceptual[0]
    return lpips.distance(apply(params, a), apply(params, b), params["lin"])


def _critic(model, params):
    return lambda image: model.critic.apply({"params": params["critic"]}, image)


def open_session(config: Config, run: Run) -> Session:
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


def open_trained(workdir: str | pathlib.Path) -> Session:
    """The session of a finished or stopped run of `experiments.autoencoder`; raises UserError where there is none."""
    path = pathlib.Path(workdir).expanduser()
    saved = read(path)
    if saved is None or "autoencoder" not in saved["config"]:
        raise UserError(f"{workdir} holds no trained autoencoder: name the workdir of an experiments.autoencoder")
    config: Config = from_dict(Config(), saved["config"])
    config.loss.perceptual = 0.0  # nobody trains here
    return open_session(config, Run(path, "eval", saved["preset"]))


def initial_state(session: Session) -> TrainState:
    """A fresh state, spread over the devices."""
    config, model = session.config, session.model
    key = jax.random.key(config.seed)
    optimizer = make_optimizer(config)
    frozen = None if model.perceptual is None else {"lpips": model.perceptual[1]}
    extra = None if model.codes is None else codebook.create(model.codes, config.autoencoder.latent)

    def make():
        return state.create(init(model, jax.random.fold_in(key, 1)), optimizer, key, frozen=frozen, extra=extra)

    return mesh.initialise(session.devices, make)


def restored_state(session: Session) -> TrainState:
    """The newest checkpoint's state; raises UserError where there is none."""
    fresh = initial_state(session)
    restored = session.checkpoints.restore(fresh)
    if restored is None:
        raise UserError(f"{session.workdir} has no checkpoint yet: train first (--mode=train)")
    return restored[0]


def train(session: Session, every: Sequence[hooks.Hook] = ()) -> TrainState:
    """Trains to the end, from the newest checkpoint if there is one."""
    config, settings = session.config, session.config.train
    update = step.make_update(
        make_loss(config, session.model),
        make_optimizer(config),
        ema_decay=settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        accumulate=settings.accumulate,
    )
    fresh = initial_state(session)
    print(describe(session, fresh), file=sys.stderr)
    job = Training(
        settings, config.data, config.seed, session.source, step.global_step(update), session.devices,
        session.checkpoints, session.writers,
    )  # fmt: skip
    return training.train(job, fresh, every)


def describe(session: Session, current: TrainState) -> str:
    """One line about what is trained on what."""
    sizes = [f"{name} {_size(tree) / 1e6:.2f} M" for name, tree in current.params.items()]
    latent = latent_shape(session.model)
    pixels, numbers = np.prod(session.model.shape), np.prod(latent)
    codes = "" if session.model.codes is None else f" of {session.model.codes} codes"
    return (
        f"{session.source.name}: {session.source.length} images of {'x'.join(map(str, session.model.shape))} as "
        f"{'x'.join(map(str, latent))} latents{codes} ({pixels / numbers:.3g} times fewer numbers); parameters: "
        f"{', '.join(sizes)}"
    )


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def latent_shape(model: Model) -> tuple[int, ...]:
    """(h, w, c) of a latent."""
    factor = 2 ** (len(model.net.multipliers) - 1)
    return (*(side // factor for side in model.shape[:2]), model.net.code or model.net.latent)


def make_encoder(net: Autoencoder) -> Callable:
    """(params, x) -> moments, or latents before the codebook."""
    return lambda params, x: net.apply({"params": params["autoencoder"]}, x, method="encode")


def make_decoder(net: Autoencoder) -> Callable:
    """(params, z) -> images; params["codes"], if there, are put in the latents' place first."""

    def decode(params, z):
        z = codebook.quantise(params["codes"], z).z if "codes" in params else z
        return net.apply({"params": params["autoencoder"]}, z, method="decode")

    return decode


def codec_params(current: TrainState) -> dict[str, Any]:
    """What encoding and decoding need: the averaged network, and the codes."""
    params = {"autoencoder": current.ema["autoencoder"]}
    return params if current.extra is None else params | {"codes": current.extra.codes}
