"""Latent diffusion (Rombach et al., 2022, arXiv:2112.10752): a diffusion model of what an autoencoder makes of images.

    python -m experiments.autoencoder                              # first a latent space, two minutes
    python -m experiments.ldm                                      # then diffusion in it, two minutes on two CPU cores
    python -m experiments.ldm --config.latents.model=DIR           # DIR: another run, or published weights
    python -m experiments.ldm --mode=compression                   # f = 2, 4, 8 x KL, VQ: what compression costs

The training set is encoded once, into <workdir>/latents; each channel is brought to zero mean and unit variance, and
the decoder makes images of what is drawn.  DIR may also be a folder of diffusers (Stable Diffusion's vae/) or of TAEF2.

train, sample, eval: as of `experiments.ddpm`; scores are of decoded images.
compression: trains an autoencoder and a diffusion model in its latents for each factor and kind, and prints what
reconstructions and samples are worth and what a sample costs (compression.md, compression.json).  With another config
it uses only the networks, and the numbers, that were made with it.
"""

import dataclasses
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.data.catalog import DataConfig
from diffrl.errors import UserError
from diffrl.recipes import autoencoding, digests, image_runs, images, judging, reconstruction, results, scores
from diffrl.recipes.autoencoding import AutoencoderConfig, LossConfig
from diffrl.recipes.denoising import SampleConfig
from diffrl.recipes.images import EvalConfig, ImageConfig
from diffrl.recipes.judging import JudgeConfig
from diffrl.recipes.latents import LatentsConfig
from diffrl.recipes.networks import DiTConfig, UNetConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import init_distributed
from diffrl.train.optim import OptimConfig


@dataclasses.dataclass
class CompressionConfig:
    """Autoencoders that `--mode=compression` compares; channels belong to factors, one by one."""

    factors: tuple[int, ...] = leaf((2, 4, 8), "by how much a side shrinks: powers of 2", at_least=2)
    channels: tuple[int, ...] = leaf((2, 4, 8), "of the latents", at_least=1)
    kinds: tuple[str, ...] = leaf(("kl", "vq"), "kl, vq")
    width: int = leaf(32, "channels of the autoencoders' first level", at_least=8)
    codes: int = leaf(256, "vq: size of the codebook", at_least=2)
    steps: int = leaf(400, "updates of every autoencoder", at_least=1)
    diffusion_steps: int = leaf(600, "updates of every diffusion model", at_least=1)


@dataclasses.dataclass
class Config(ImageConfig):
    """A diffusion model of latents, and what a study of compression varies."""

    compression: CompressionConfig = dataclasses.field(default_factory=CompressionConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)


def digits() -> Config:
    """Latents of `experiments.autoencoder`'s default run: 4x4 with 2 channels."""
    return Config(
        data=DataConfig(name="digits"),
        latents=LatentsConfig(model="runs/autoencoder/digits"),
        unet=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), groups=8),
        dit=DiTConfig(width=96, depth=4, heads=4, patch=1, unroll=True),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, schedule="cosine"),
        train=TrainConfig(steps=1500, ema_decay=0.995, sample_every=500, checkpoint_every=500),
        sample=SampleConfig(guidance=1.5),
        eval=EvalConfig(samples=359),
        loss=LossConfig(
            perceptual=0.0,
            adversarial=0.1,
            adversarial_start=200,
            critic_lead=100,
            critic_channels=32,
            critic_strided=1,
        ),
    )


def mnist() -> Config:
    """MNIST at 32x32 in latents of `experiments.autoencoder --preset=mnist`: 8x8 with 3 channels."""
    config = digits()
    config.data = DataConfig(name="mnist", image_size=32)
    config.latents = LatentsConfig(model="runs/autoencoder/mnist")
    config.train = TrainConfig(steps=4000, ema_decay=0.999, sample_every=1000, checkpoint_every=1000)
    config.eval = EvalConfig(samples=2000)
    config.compression = CompressionConfig(steps=1500, diffusion_steps=3000)
    config.loss = LossConfig(
        adversarial=0.1, adversarial_start=750, critic_lead=400, critic_channels=32, critic_strided=2
    )
    return config


def cifar10() -> Config:
    """CIFAR-10 in latents of `experiments.autoencoder --preset=cifar10`: 8x8 with 4 channels, an hour of a GPU."""
    return Config(
        data=DataConfig(name="cifar10", flip=True),
        latents=LatentsConfig(model="runs/autoencoder/cifar10"),
        unet=UNetConfig(multipliers=(1, 2), attention=(8, 4), head_dim=64, dropout=0.1, dtype="bfloat16"),
        dit=DiTConfig(size="S", patch=1, dtype="bfloat16"),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=1000, schedule="cosine"),
        train=TrainConfig(
            steps=60_000, batch_size=256, inner=10, sample_every=5000, checkpoint_every=5000, log_every=100
        ),
        sample=SampleConfig(guidance=1.5),
        eval=EvalConfig(judge="resnet"),
        compression=CompressionConfig(width=64, steps=30_000, diffusion_steps=60_000),
        loss=LossConfig(adversarial_start=15_000, critic_lead=7500, critic_strided=2),
    )


PRESETS = {"digits": digits, "mnist": mnist, "cifar10": cifar10}


def main(config: Config, run: config_lib.Run) -> None:
    if run.mode == "compression":
        compression(config, run)
    elif not config.latents.model:
        raise UserError(
            "latents.model='': name the autoencoder whose latents are to be modelled, or run experiments.ddpm"
        )
    else:
        image_runs.main(config, run)


class Cell(NamedTuple):
    """A row of the study: an autoencoder, and the diffusion model of its latents (which it is still to be told of)."""

    name: str
    coding: autoencoding.Config
    diffused: Config

    def codec(self) -> dict[str, Any]:
        """What the autoencoder depends on."""
        free = {"steps": self.coding.train.steps, "perceptual": bool(self.coding.loss.lpips_weights)}
        return digests.settings(self.coding) | free

    def model(self) -> dict[str, Any]:
        """What the diffusion model depends on."""
        others = [path for path in config_lib.leaves(self.diffused) if path.startswith(("compression.", "latents."))]
        settings = digests.settings(self.diffused, without=others)
        return {"codec": self.codec(), "model": settings | {"steps": self.diffused.train.steps}}

    def key(self) -> str:
        """By which the row's numbers are kept: they depend on how samples are drawn and judged, too."""
        drawn = dataclasses.asdict(self.diffused.sample) | {"count": None}
        judged = dataclasses.asdict(self.coding.eval)
        return f"{self.name}-{digests.digest([self.model(), drawn, judged])}"


def compression(config: Config, run: config_lib.Run) -> None:
    """Trains and scores all cells of the table; those that are done are not done again."""
    path = run.workdir / "compression.json"
    found = results.load(path, {})
    cells = plan(config)
    for i, cell in enumerate(cells):
        if cell.key() not in found:
            print(f"[{i + 1}/{len(cells)}] {cell.name}", file=sys.stderr)
            found[cell.key()] = work(cell, run._replace(workdir=run.workdir / cell.name))
            results.save(path, found)
    text = table({cell.name: found[cell.key()] for cell in cells})
    if jax.process_index() == 0:
        (run.workdir / "compression.md").write_text(text + "\n")
    print(text)
    print(f"everything lies in {run.workdir}")


def plan(config: Config) -> list[Cell]:
    """A cell for each factor and kind: f2_kl, ..."""
    settings = config.compression
    if not settings.factors or not settings.kinds:
        raise UserError(f"compression.factors={settings.factors}, kinds={settings.kinds}: give at least one of each")
    if len(settings.factors) != len(settings.channels):
        raise UserError(f"compression.channels={settings.channels}: give one for each of factors={settings.factors}")
    odd = [factor for factor in settings.factors if factor & (factor - 1)]
    if odd:
        raise UserError(f"compression.factors={settings.factors}: {odd[0]} is no power of 2")
    # A transformer takes latents of every size, down to a single token.
    diffused = dataclasses.replace(
        config,
        network="dit",
        train=dataclasses.replace(config.train, steps=settings.diffusion_steps, sample_every=0),
    )
    cells = []
    for factor, channels in zip(settings.factors, settings.channels, strict=True):
        for kind in settings.kinds:
            network = AutoencoderConfig(
                kind=kind,
                channels=settings.width,
                multipliers=(1, *(2,) * (factor.bit_length() - 1)),
                blocks=1,
                latent=channels,
                codes=settings.codes,
                groups=8,
                dtype=config.unet.dtype,
            )
            train = dataclasses.replace(config.train, steps=settings.steps, sample_every=0)
            judge = JudgeConfig(
                **{field.name: getattr(config.eval, field.name) for field in dataclasses.fields(JudgeConfig)}
            )
            coding = autoencoding.Config(
                config.seed, config.data, network, config.loss, config.optim, train, judge, config.mesh
            )
            cells.append(Cell(f"f{factor}_{kind}", coding, diffused))
    return cells


def work(cell: Cell, run: config_lib.Run) -> dict[str, Any]:
    """One cell: its autoencoder, its diffusion, and what both are worth."""
    place = run.workdir / f"autoencoder-{digests.digest(cell.codec())}"
    config_lib.save(place, run.preset, cell.coding)  # by which the latents find it
    session = autoencoding.open_session(cell.coding, run._replace(workdir=place))
    judging.check(cell.coding.eval, session.source)
    held_out = judging.held_out_source(session)
    if held_out is None:
        raise UserError(f"compression needs held-out images: mend eval.split={cell.coding.eval.split}")
    current = autoencoding.train(session)
    found = {f"autoencoder_{key}": value for key, value in reconstruction.measure(session, current, held_out).items()}
    diffused = dataclasses.replace(cell.diffused, latents=dataclasses.replace(cell.diffused.latents, model=str(place)))
    place = run.workdir / f"diffusion-{digests.digest(cell.model())}"
    model = images.open_session(diffused, run._replace(workdir=place))
    trained = images.train(model)
    found |= scores.judge_samples(model, trained.ema, held_out)
    return found | {"latent": model.model.shape, "ms_per_sample": 1e3 * seconds_per_sample(model, trained.ema)}


def seconds_per_sample(session: images.Session, params: Any) -> float:
    """Of a batch, decoded; the fastest of three."""
    num, classes = session.config.sample.batch, session.model.num_classes
    labels = None if classes is None else np.resize(np.arange(classes, dtype=np.int32), num)
    generate = session.generator(jax.random.key(0))
    generate(params, labels, num)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        generate(params, labels, num)
        taken.append(time.perf_counter() - start)
    return min(taken) / num


def table(found: dict[str, Any]) -> str:
    """Markdown, one row for each autoencoder."""
    judge = next(iter(found.values())).get("judge", "")
    lines = [
        f"| autoencoder | latent | numbers | PSNR (dB) | FD-{judge} of reconstructions | of samples | recognised "
        "| ms a sample |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        shown = {key: _shown(row.get(key)) for key in ("autoencoder_psnr", "autoencoder_frechet", "frechet")}
        recognised = f"{row['recognised']:.1%}" if "recognised" in row else "-"
        lines.append(
            f"| {name.replace('_', ' ')} | {'x'.join(map(str, row['latent']))} | {int(np.prod(row['latent']))} "
            f"| {' | '.join(shown.values())} | {recognised} | {row['ms_per_sample']:.2f} |"
        )
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    modes = ("train", "sample", "eval", "compression")
    config_lib.run(main, PRESETS, modes=modes, setup=init_distributed, makers=("compression",))
