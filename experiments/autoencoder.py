"""Autoencoders for latent diffusion: KL (Rombach et al., 2022, arXiv:2112.10752) and VQ-GAN (Esser et al., 2021).

    python -m experiments.autoencoder                              # 8x8 digits, f = 2: two minutes on two CPU cores
    python -m experiments.autoencoder --preset=digits_vq
    python -m experiments.autoencoder --preset=cifar10 --config.data.dir=DIR --config.loss.lpips_weights="('FILE.npz',)"
    python -m experiments.autoencoder --workdir=runs/autoencoder/digits --mode=eval

L1, LPIPS (where its weights are given), the divergence of the latents or the commitment to their codes, and from
`loss.adversarial_start` on a patch critic, weighted so that both gradients are alike at the decoder's last layer; the
critic begins to learn `loss.critic_lead` updates before that.

train: checkpoints, metrics.jsonl, TensorBoard, then reconstructions.png (images above what comes back), loss.png and
eval.json with PSNR, SSIM, LPIPS and the Fréchet distance of held-out images.
eval: the scores alone.  `experiments.ldm --config.latents.model=WORKDIR` trains diffusion on the latents.
"""

import jax

from diffrl import config as config_lib
from diffrl.data.catalog import DataConfig
from diffrl.evaluate import grids
from diffrl.recipes import autoencoding, judging, reconstruction, results, training
from diffrl.recipes.autoencoding import AutoencoderConfig, Config, LossConfig
from diffrl.recipes.judging import JudgeConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import init_distributed
from diffrl.train.optim import OptimConfig
from diffrl.train.state import TrainState


def digits() -> Config:
    """scikit-learn's digits as 4x4 latents of 2 channels, half as many numbers; the critic joins halfway."""
    return Config(
        data=DataConfig(name="digits"),
        autoencoder=AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1, latent=2, groups=8),
        loss=LossConfig(
            perceptual=0.0,
            adversarial=0.1,
            adversarial_start=600,
            critic_lead=400,
            critic_channels=32,
            critic_strided=1,
        ),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, schedule="cosine", b2=0.99),
        train=TrainConfig(steps=1200, ema_decay=0.995, sample_every=300, checkpoint_every=300),
        eval=JudgeConfig(samples=359),
    )


def digits_vq() -> Config:
    """The same with a codebook of 64: an image is 16 code words, 12 bytes."""
    config = digits()
    config.autoencoder.kind, config.autoencoder.latent, config.autoencoder.codes = "vq", 4, 64
    return config


def mnist() -> Config:
    """MNIST at 32x32 as 8x8 latents of 3 channels: a quarter of an hour of a laptop's CPU."""
    return Config(
        data=DataConfig(name="mnist", image_size=32),
        autoencoder=AutoencoderConfig(channels=16, multipliers=(1, 2, 4), blocks=1, latent=3, groups=8),
        loss=LossConfig(adversarial_start=1000, critic_lead=500, critic_channels=32, critic_strided=2),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, schedule="cosine", b2=0.99),
        train=TrainConfig(steps=2000, batch_size=64, ema_decay=0.998, sample_every=500, checkpoint_every=500),
        eval=JudgeConfig(samples=2000),
    )


def cifar10() -> Config:
    """CIFAR-10, f = 4: an hour of a GPU."""
    return Config(
        data=DataConfig(name="cifar10", flip=True),
        autoencoder=AutoencoderConfig(channels=64, multipliers=(1, 2, 4), latent=4, dtype="bfloat16"),
        loss=LossConfig(adversarial_start=20_000, critic_lead=10_000, critic_strided=2),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=1000, schedule="cosine", b1=0.5, b2=0.9),
        train=TrainConfig(steps=60_000, batch_size=128, ema_decay=0.999, sample_every=5000, checkpoint_every=5000),
        eval=JudgeConfig(judge="resnet"),
    )


def imagenet256() -> Config:
    """Latent diffusion's f = 8 with 4 channels on 256x256 images, as Stable Diffusion's: days of a GPU host."""
    return Config(
        data=DataConfig(name="folder", image_size=256, channels=3, flip=True, workers=8),
        autoencoder=AutoencoderConfig(dtype="bfloat16", remat=True),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=1000, b1=0.5, b2=0.9),
        train=TrainConfig(steps=400_000, batch_size=96, sample_every=10_000, checkpoint_every=10_000, log_every=100),
        eval=JudgeConfig(judge="none", split="validation"),
    )


PRESETS = {"digits": digits, "digits_vq": digits_vq, "mnist": mnist, "cifar10": cifar10, "imagenet256": imagenet256}


def main(config: Config, run: config_lib.Run) -> None:
    session = autoencoding.open_session(config, run)
    if run.mode == "train":  # the others come to the judge at once
        judging.check(config.eval, session.source)
    held_out = judging.held_out_source(session)
    every = [reconstruction.picture_hook(session)] if config.train.sample_every else []
    current = autoencoding.train(session, every) if run.mode == "train" else autoencoding.restored_state(session)
    finish(session, current, held_out)
    print(f"everything lies in {run.workdir}")


def finish(session: autoencoding.Session, current: TrainState, held_out) -> None:
    """The picture, the curves and the scores."""
    shown = reconstruction.picture(session, current, held_out or session.source)
    grids.save_png(session.workdir / "reconstructions.png", shown)
    names = ("pixel", "lpips", "commitment", "critic")
    training.plot_loss(session.writers, session.workdir / "loss.png", names)
    if held_out is None:
        return
    found = reconstruction.measure(session, current, held_out)
    if jax.process_index() == 0:
        results.save(session.workdir / "eval.json", found)
    print(reconstruction.report(found))


if __name__ == "__main__":
    config_lib.run(main, PRESETS, modes=("train", "eval"), setup=init_distributed)
