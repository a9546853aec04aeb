"""Diffusion transformers (Peebles & Xie, 2023, arXiv:2212.09748), on pixels or on the latents of an autoencoder.

    python -m experiments.dit                                      # handwritten digits: minutes on two CPU cores
    python -m experiments.dit --mode=scaling                       # three sizes: loss against compute
    python -m experiments.dit --preset=cifar10 --config.data.dir=DIR
    python -m experiments.dit --preset=imagenet256_xl2 --config.data.dir=DIR --config.latents.model=VAE

The default trains a 0.7 M-parameter DiT with adaLN-zero on scikit-learn's 8x8 digits, patches of 2, and ends with a
grid, in which a classifier of real digits recognises at least 95 %.  The same command again resumes, or just scores.

train, sample, eval: as of `experiments.ddpm`.  `latents.model` names the autoencoder (see `experiments.ldm`); the
paper's networks want Stable Diffusion's, a folder of diffusers.
scaling: trains networks of several sizes on the same batches, and draws the held-out loss against the floating-point
operations spent so far (scaling.png, scaling.json).
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from diffrl import config as config_lib
from diffrl.config import leaf
from diffrl.data.catalog import DataConfig
from diffrl.errors import UserError
from diffrl.evaluate import plots
from diffrl.recipes import digests, image_runs, images, judging, results, scores
from diffrl.recipes.denoising import DiffusionConfig, SampleConfig
from diffrl.recipes.images import EvalConfig, ImageConfig
from diffrl.recipes.latents import LatentsConfig
from diffrl.recipes.networks import DiTConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train import hooks
from diffrl.train.mesh import init_distributed
from diffrl.train.optim import OptimConfig


@dataclasses.dataclass
class ScalingConfig:
    """Sizes that `--mode=scaling` compares; widths, depths and heads belong together, one by one."""

    widths: tuple[int, ...] = leaf((32, 64, 128), at_least=4)
    depths: tuple[int, ...] = leaf((2, 4, 6), at_least=1)
    heads: tuple[int, ...] = leaf((2, 4, 4), at_least=1)
    points: int = leaf(10, "measurements of the held-out loss in each run", at_least=1)


@dataclasses.dataclass
class Config(ImageConfig):
    """A diffusion model of images, and what a scaling study varies."""

    scaling: ScalingConfig = dataclasses.field(default_factory=ScalingConfig)


def digits() -> Config:
    """scikit-learn's digits: v-prediction, guidance 1.5, minutes on two CPU cores."""
    return Config(
        network="dit",
        data=DataConfig(name="digits"),
        dit=DiTConfig(width=96, depth=4, heads=4, unroll=True),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, schedule="cosine"),
        train=TrainConfig(steps=1500, ema_decay=0.995, sample_every=500, checkpoint_every=500),
        sample=SampleConfig(guidance=1.5),
        eval=EvalConfig(samples=359, bound_images=128, bound_steps=500),
    )


def cifar10() -> Config:
    """CIFAR-10 by class: DiT-S/2 on pixels, hours of a GPU."""
    return Config(
        network="dit",
        data=DataConfig(name="cifar10", flip=True),
        dit=DiTConfig(size="S", dtype="bfloat16"),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000, schedule="cosine"),
        train=TrainConfig(
            steps=200_000, batch_size=256, inner=10, sample_every=10_000, checkpoint_every=10_000, log_every=500
        ),
        sample=SampleConfig(guidance=1.5),
        eval=EvalConfig(judge="resnet"),
        scaling=ScalingConfig((384, 512, 768), (6, 8, 12), (6, 8, 12)),
    )


def imagenet256(size: str, patch: int = 2) -> Config:
    """The paper's recipe on latents of Stable Diffusion's autoencoder; XL/2 took 7 M steps to an FID of 2.27."""
    return Config(
        network="dit",
        data=DataConfig(name="folder", image_size=256, channels=3, flip=True, workers=16),
        latents=LatentsConfig(model="sd-vae-ft-ema"),
        dit=DiTConfig(size=size, patch=patch, dtype="bfloat16", remat="dots"),
        diffusion=DiffusionConfig(process="ddpm", prediction="eps", learned_variance=True, times="discrete"),
        optim=OptimConfig(learning_rate=1e-4, clip_norm=0.0),
        train=TrainConfig(steps=400_000, batch_size=256, sample_every=10_000, checkpoint_every=10_000, log_every=100),
        sample=SampleConfig(sampler="ancestral", steps=250, grid="table", guidance=4.0, batch=64),
        eval=EvalConfig(judge="none", split="validation"),
        scaling=ScalingConfig((384, 768, 1024), (12, 12, 24), (6, 12, 16)),
    )


PRESETS = {
    "digits": digits,
    "cifar10": cifar10,
    "imagenet256_s2": lambda: imagenet256("S"),
    "imagenet256_b2": lambda: imagenet256("B"),
    "imagenet256_l2": lambda: imagenet256("L"),
    "imagenet256_xl2": lambda: imagenet256("XL"),
    "imagenet256_b4": lambda: imagenet256("B", 4),
}


def main(config: Config, run: config_lib.Run) -> None:
    if run.mode == "scaling":
        scaling(config, run)
    else:
        image_runs.main(config, run)


def scaling(config: Config, run: config_lib.Run) -> None:
    """Trains each size, measuring the held-out loss on the way, and draws loss against compute."""
    plan = sizes(config)
    found: dict[str, Any] = {}
    for name, sized in plan.items():
        print(f"[{len(found) + 1}/{len(plan)}] DiT {name}", file=sys.stderr)
        place = run.workdir / f"{name}-{digest(sized)}"
        found[name] = measure(sized, config.scaling.points, run._replace(workdir=place))
        results.save(run.workdir / "scaling.json", found)
    curves = {
        f"{name} ({row['parameters'] / 1e6:.2f} M)": (
            np.array(row["steps"]) * row["flops_per_step"],
            np.array(row["losses"]),
        )
        for name, row in found.items()
    }
    plots.curves(
        run.workdir / "scaling.png", curves, "floating-point operations of training", "held-out loss",
        title=f"DiT on {config.data.name}", log_x=True, log_y=True, markers=True,
    )  # fmt: skip
    print(table(found))
    print(f"everything lies in {run.workdir}")


def sizes(config: Config) -> dict[str, Config]:
    """A config for each size, by its width and depth."""
    settings = config.scaling
    if not len(settings.widths) == len(settings.depths) == len(settings.heads) > 0:
        raise UserError(
            f"scaling.widths={settings.widths}, depths={settings.depths}, heads={settings.heads}: give each size one"
        )
    found = {}
    for width, depth, heads in zip(settings.widths, settings.depths, settings.heads, strict=True):
        dit = dataclasses.replace(config.dit, size="", width=width, depth=depth, heads=heads)
        # Constant rates: a schedule's end would make every curve's last point its only fair one.
        optim = dataclasses.replace(config.optim, schedule="constant")
        train = dataclasses.replace(config.train, sample_every=0)
        found[f"{width}x{depth}"] = dataclasses.replace(config, dit=dit, optim=optim, train=train)
    return found


def digest(config: Config) -> str:
    """Of what a curve depends on; longer training only prolongs it."""
    others = [path for path in config_lib.leaves(config) if path.startswith(("scaling.", "sample.", "eval."))]
    return digests.digest(digests.settings(config, without=others) | {"split": config.eval.split})


def measure(config: Config, points: int, run: config_lib.Run) -> dict[str, Any]:
    """One size: its parameters, its price and its curve."""
    path = run.workdir / "curve.json"
    known = results.load(path, {"steps": [], "losses": []})
    session = images.open_session(config, run)
    held_out = judging.held_out_source(session)
    if held_out is None:
        raise UserError(f"scaling needs held-out images: mend eval.split={config.eval.split}")
    every = max(1, config.train.steps // points)

    def note(done, current):
        if done not in known["steps"]:
            known["steps"].append(done)
            known["losses"].append(scores.held_out_loss(session, current.ema, held_out, draws=2))
            results.save(path, known)

    current = images.train(session, [hooks.every(every, note, config.train.inner)])
    # XLA counts a loop's body once, and what remat computes again twice.
    counted = dataclasses.replace(config, dit=dataclasses.replace(config.dit, unroll=True, remat="none"))
    model = images.build(counted, session.source, session.codec and session.codec.shape)
    price = images.price(counted, model)
    size = sum(weights.size for weights in jax.tree.leaves(current.params))
    return known | {"parameters": size, "flops_per_step": price}


def table(found: dict[str, Any]) -> str:
    """The last point of every curve, as Markdown."""
    lines = [
        "| width x depth | parameters | GFLOP a step | steps | TFLOP | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        price, steps = row["flops_per_step"], row["steps"][-1]
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {price / 1e9:.2f} | {steps} | {price * steps / 1e12:.1f} "
            f"| {row['losses'][-1]:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    modes = ("train", "sample", "eval", "scaling")
    config_lib.run(main, PRESETS, modes=modes, setup=init_distributed, makers=("scaling",))
