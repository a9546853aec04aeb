"""What comes back of images that went through an autoencoder: pictures, similarity, Fréchet distance, latents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.compression import codebook, posterior
from diffrl.data.source import Source
from diffrl.evaluate import frechet, grids, lpips, similarity
from diffrl.recipes import judging
from diffrl.recipes.autoencoding import Session, codec_params, make_decoder, make_encoder
from diffrl.train import hooks
from diffrl.train.state import TrainState


def reconstruct(session: Session, current: TrainState, x: np.ndarray, batch: int = 128) -> np.ndarray:
    """Images [N, H, W, C] in [-1, 1] through the mean latent and back, clipped."""
    encode, decode = make_encoder(session.model.net), make_decoder(session.model.net)

    @jax.jit
    def through(params, x):
        h = encode(params, x)
        return jnp.clip(decode(params, posterior.split(h)[0] if session.model.codes is None else h), -1, 1)

    params = codec_params(current)
    return judging.in_batches(lambda rows: through(params, x[rows]), len(x), batch)


def measure(session: Session, current: TrainState, held_out: Source) -> dict[str, Any]:
    """PSNR, SSIM, LPIPS and Fréchet distance of the reconstructions of held-out images, and what is in the latents."""
    num = min(session.config.eval.samples, held_out.length)
    x, _ = judging.spread(held_out, num)
    made = reconstruct(session, current, x)
    found: dict[str, Any] = {"step": int(current.step), "images": num}
    found["psnr"] = float(np.mean(similarity.psnr(jnp.asarray(made), jnp.asarray(x))))
    if min(session.model.shape[:2]) >= similarity.WIDTH:
        in_parts = judging.in_batches(lambda rows: similarity.ssim(jnp.asarray(made[rows]), jnp.asarray(x[rows])), num)
        found["ssim"] = float(in_parts.mean())
    if session.model.perceptual is not None:
        apply, params = session.model.perceptual
        found["lpips"] = float(lpips.measure(apply, params, made, x).mean())
    found |= _latent_scores(session, current, x)
    judge = judging.make_judge(session, held_out)
    if judge is not None:
        reference = judging.moments(judge, session.source)
        distances = [frechet.frechet_distance(frechet.moments(judge.features, [y]), reference) for y in (made, x)]
        found |= {"judge": judge.name, "frechet": distances[0], "frechet_real": distances[1]}
    return found


def _latent_scores(session: Session, current: TrainState, x: np.ndarray) -> dict[str, float]:
    params, encode = codec_params(current), jax.jit(make_encoder(session.model.net))
    h = jnp.asarray(judging.in_batches(lambda rows: encode(params, x[rows]), len(x), 128))
    if session.model.codes is None:
        return {"kl": float(posterior.kl(h).mean())}
    share, perplexity = codebook.usage(codebook.nearest(params["codes"], h), session.model.codes)
    return {"usage": float(share), "perplexity": float(perplexity)}


def report(found: dict[str, Any]) -> str:
    """The scores in words."""
    parts = [f"PSNR {found['psnr']:.2f} dB"]
    parts += [f"SSIM {found['ssim']:.4f}"] if "ssim" in found else []
    parts += [f"LPIPS-Alex {found['lpips']:.4f}"] if "lpips" in found else []
    if "frechet" in found:
        parts.append(f"FD-{found['judge']} {found['frechet']:.3f} (held-out real images: {found['frechet_real']:.3f})")
    if "kl" in found:
        parts.append(f"{found['kl']:.1f} nats in a latent")
    if "usage" in found:
        parts.append(f"{found['usage']:.0%} of the codes used, perplexity {found['perplexity']:.0f}")
    return f"reconstructions of {found['images']} held-out images: " + ", ".join(parts)


def picture(session: Session, current: TrainState, source: Source, pairs: int = 24, columns: int = 12) -> np.ndarray:
    """Rows of images, each above its reconstruction."""
    x, _ = judging.spread(source, pairs)
    both = np.stack([x, reconstruct(session, current, x, len(x))])
    rows = [both[:, i : i + columns].reshape(-1, *x.shape[1:]) for i in range(0, len(x) - columns + 1, columns)]
    return grids.image_grid(np.concatenate(rows or [both.reshape(-1, *x.shape[1:])]), min(columns, len(x)))


def picture_hook(session: Session) -> hooks.Hook:
    """Every now and then, the same images and what the model makes of them."""

    def hook(done, current):
        shown = picture(session, current, session.source)
        grids.save_png(session.workdir / "reconstructions" / f"step_{done:07d}.png", shown)
        session.writers.images(done, "reconstructions", shown)

    return hooks.every(session.config.train.sample_every, hook, session.config.train.inner)
