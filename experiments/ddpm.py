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

from diffrl import config as config_lib
from diffrl.data.catalog import DataConfig
from diffrl.recipes import image_runs, images
from diffrl.recipes.denoising import DiffusionConfig, SampleConfig
from diffrl.recipes.images import EvalConfig, ImageConfig
from diffrl.recipes.networks import UNetConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import init_distributed
from diffrl.train.optim import OptimConfig


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
    image_runs.main(config, run)


if __name__ == "__main__":
    config_lib.run(main, PRESETS, modes=("train", "sample", "eval"), setup=init_distributed)
