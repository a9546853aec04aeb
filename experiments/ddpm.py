"""Denoising diffusion on images (Ho et al., 2020, arXiv:2006.11239; Nichol & Dhariwal, 2021; Karras et al., 2022).

    python -m experiments.ddpm                                     # handwritten digits: minutes on two CPU cores
    python -m experiments.ddpm --preset=cifar10 --config.data.dir=DIR
    python -m experiments.ddpm --workdir=runs/ddpm/digits --mode=sample --config.sample.guidance=3
    python -m experiments.ddpm --workdir=runs/ddpm/digits --mode=eval

The default trains a 0.7 M-parameter U-Net with v-prediction on scikit-learn's 8x8 digits and ends with a grid,
in which a classifier of real digits recognises at least 95 %.  The same command again resumes, or just scores.

train: checkpoints, metrics.jsonl, TensorBoard, grids of samples, then samples.png, loss.png and eval.json.
sample: draws `sample.count` images into samples.npz, and the first of them into samples.png.
eval: judge, Fréchet distance and bits/dim; with `eval.nll_images` above 0 also the exact bits/dim, by the ODE.
"""

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np

from diffrl import config as config_lib
from diffrl.data.catalog import DataConfig
from diffrl.data.source import Source
from diffrl.evaluate import grids
from diffrl.recipes import bits, images, results, scores
from diffrl.recipes.denoising import DiffusionConfig, SampleConfig
from diffrl.recipes.images import EvalConfig, ImageConfig, TrainConfig, UNetConfig
from diffrl.train.mesh import init_distributed
from diffrl.train.optim import OptimConfig
from diffrl.train.state import TrainState

COLUMNS, ROWS = 10, 20  # of the picture of --mode=sample, at most


def mnist() -> ImageConfig:
    """MNIST at 28x28: an hour of a laptop's CPU, minutes of a GPU."""
    return ImageConfig(
        data=DataConfig(name="mnist"),
        unet=UNetConfig(channels=32, multipliers=(1, 2, 2), blocks=1, attention=(7,), groups=8),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=200, schedule="cosine"),
        train=TrainConfig(steps=8000, ema_decay=0.999),
        sample=SampleConfig(guidance=1.5),
        eval=EvalConfig(samples=2000),
    )


def cifar10() -> ImageConfig:
    """DDPM's CIFAR-10 recipe: 35.7 M parameters, T = 1000, 800 k steps of 128; FID 3.17 in the paper."""
    return ImageConfig(
        conditional=False,
        data=DataConfig(name="cifar10", flip=True),
        unet=UNetConfig(dropout=0.1),
        diffusion=DiffusionConfig(process="ddpm", prediction="eps", times="discrete"),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=5000),
        train=TrainConfig(steps=800_000, sample_every=10_000, checkpoint_every=10_000, log_every=500),
        sample=SampleConfig(sampler="ancestral", steps=1000, grid="table", variance=1.0),
        eval=EvalConfig(judge="resnet"),
    )


def cifar10_cond() -> ImageConfig:
    """CIFAR-10 by class with improved DDPM's recipe (cosine table, learned variance) and classifier-free guidance."""
    config = cifar10()
    config.conditional = True
    config.unet = UNetConfig(blocks=3, attention=(16, 8), heads=4, scale_shift=True, dropout=0.3)
    config.diffusion = DiffusionConfig(
        process="improved", prediction="eps", learned_variance=True, table_steps=4000, times="discrete"
    )
    config.optim = OptimConfig(learning_rate=1e-4)
    config.train = dataclasses.replace(config.train, steps=500_000)
    config.sample = SampleConfig(sampler="ancestral", steps=250, grid="table", guidance=1.5)
    return config


def fast() -> ImageConfig:
    """CIFAR-10 by class in 20 minutes of one modern GPU: EDM's preconditioning, draw of noise and sampler, bfloat16.

    8.2 M images at 36 GFLOP each are 0.3 EFLOP: 18 minutes at 280 TFLOP/s.
    """
    return ImageConfig(
        data=DataConfig(name="cifar10", flip=True),
        unet=UNetConfig(head_dim=64, scale_shift=True, dropout=0.1, dtype="bfloat16"),
        diffusion=DiffusionConfig(process="ve", prediction="edm", times="log_normal", weight="edm"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1000, schedule="cosine"),
        train=TrainConfig(
            steps=16_000, batch_size=512, inner=10, ema_decay=0.9995, sample_every=4000, checkpoint_every=4000
        ),
        sample=SampleConfig(sampler="heun", steps=18, grid="karras", clip=False, batch=1000),
        eval=EvalConfig(judge="resnet"),
    )


def imagenet64() -> ImageConfig:
    """ImageNet 64x64 by class with ADM's network and recipe: 296 M parameters; FID 2.07 in the paper."""
    return ImageConfig(
        data=DataConfig(name="tfds:imagenet_resized/64x64"),
        unet=UNetConfig(
            channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), head_dim=64, scale_shift=True,
            resample_blocks=True, dropout=0.1, dtype="bfloat16", remat=True,
        ),
        diffusion=DiffusionConfig(process="improved", prediction="eps", learned_variance=True, times="discrete"),
        optim=OptimConfig(learning_rate=1e-4, weight_decay=0.0),
        train=TrainConfig(steps=540_000, batch_size=2048, sample_every=10_000, checkpoint_every=5000, log_every=100),
        sample=SampleConfig(sampler="ancestral", steps=250, grid="table"),
        eval=EvalConfig(judge="none", split="validation"),
    )  # fmt: skip


PRESETS = {
    "digits": images.digits_config,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar10_cond": cifar10_cond,
    "fast": fast,
    "imagenet64": imagenet64,
}


def main(config: ImageConfig, run: config_lib.Run) -> None:
    session = images.open_session(config, run)
    {"train": train, "sample": sample, "eval": evaluate}[run.mode](session)
    print(f"everything lies in {run.workdir}")


def train(session: images.Session) -> None:
    """Trains, draws the final grid and scores it."""
    # Whatever the end needs is checked before the training, not after it.
    scores.check(session.config.eval, session.source)
    held_out = scores.held_out_source(session)
    key = jax.random.key(session.config.sample.seed)
    generate = images.make_generator(session.config, session.model, session.devices, key)
    current = images.train(session)
    labels, num = images.class_labels(session.model, COLUMNS)
    made = generate(current.ema, labels, num)
    grids.save_png(session.workdir / "samples.png", images.labelled_grid(session, made, labels, COLUMNS))
    images.plot_loss(session)
    score(session, current, held_out, bound=False)


def sample(session: images.Session) -> None:
    """Draws images with the newest checkpoint's averaged parameters."""
    current = images.restored_state(session)
    count, classes = session.config.sample.count, session.model.num_classes
    labels = None if classes is None else np.sort(np.resize(np.arange(classes, dtype=np.int32), count))
    key = jax.random.key(session.config.sample.seed)
    made = images.make_generator(session.config, session.model, session.devices, key)(current.ema, labels, count)
    shown = pictured(labels, count)
    picture = images.labelled_grid(session, made[shown], None if labels is None else labels[shown], min(COLUMNS, count))
    grids.save_png(session.workdir / "samples.png", picture)
    if jax.process_index() == 0:
        given: Any = {} if labels is None else {"label": labels}
        np.savez_compressed(session.workdir / "samples.npz", x=grids.to_uint8(made), **given)
    print(f"{count} samples of step {int(current.step)}: samples.npz, and {shown.sum()} of them in samples.png")


def pictured(labels: np.ndarray | None, count: int) -> np.ndarray:
    """Which of `count` samples a picture has room for, bool [count]; labels, if there are any, rise."""
    if labels is None:
        return np.arange(count) < ROWS * COLUMNS
    return (labels < ROWS) & (np.arange(count) - np.searchsorted(labels, labels) < COLUMNS)


def evaluate(session: images.Session) -> None:
    """Scores the newest checkpoint, bits/dim included."""
    held_out = scores.held_out_source(session)
    score(session, images.restored_state(session), held_out, bound=True)


def score(session: images.Session, current: TrainState, held_out: Source | None, bound: bool) -> None:
    """Measures, prints and writes eval.json, beside what it holds of the same step already."""
    if held_out is None:
        return
    measured = {"step": int(current.step), **scores.judge_samples(session, current.ema, held_out)}
    if bound:
        measured |= bits.variational_bound(session, current.ema, held_out)
        measured |= bits.exact(session, current.ema, held_out)
    if jax.process_index() == 0:
        path = session.workdir / "eval.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        known = before if before.get("step") == measured["step"] else {}
        results.save(path, known | {name: _finite(value) for name, value in measured.items()})
    print(scores.report(measured))


def _finite(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    config_lib.run(main, PRESETS, modes=("train", "sample", "eval"), setup=init_distributed)
