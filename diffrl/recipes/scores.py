"""How good are the samples: a judge's verdicts and the Fréchet distance on its features; the held-out loss."""

import functools
from typing import Any

import jax
import numpy as np

from diffrl.data.source import Source
from diffrl.diffusion.sampling import fold
from diffrl.evaluate import frechet, judges
from diffrl.recipes import denoising, judging, latents
from diffrl.recipes.images import EvalConfig, Session


def check(config: EvalConfig, source: Source | None = None) -> None:
    """Raises UserError for a judge or a noise that will not be there when it is needed."""
    judging.check(config, source)
    denoising.choose("eval.dequantisation", config.dequantisation, dict.fromkeys(("uniform", "truncated_normal")))


def judge_samples(session: Session, params: Any, held_out: Source) -> dict[str, Any]:
    """Recognised classes and Fréchet distance of fresh samples, each beside the value of held-out real images.

    Both sets have the same size, and the training images are the reference of both distances.
    """
    judge = judging.make_judge(session, held_out)
    if judge is None:
        return {}
    num = min(session.config.eval.samples, held_out.length)
    real, real_labels = judging.spread(held_out, num)
    classes = session.model.num_classes
    labels = None if classes is None else np.resize(np.arange(classes, dtype=np.int32), num)
    key = jax.random.fold_in(jax.random.key(session.config.sample.seed), 1)
    fake = session.generator(key)(params, labels, num)
    reference = judging.moments(judge, session.source)
    distance = [frechet.frechet_distance(frechet.moments(judge.features, [x]), reference) for x in (fake, real)]
    scores = {"judge": judge.name, "samples": num, "frechet": distance[0], "frechet_real": distance[1]}
    if labels is not None:
        scores |= {
            "guidance": session.config.sample.guidance,
            "recognised": judges.agreement(judge, fake, labels),
            "recognised_real": judges.agreement(judge, real, real_labels),
        }
    return scores


def held_out_loss(session: Session, params: Any, held_out: Source, draws: int = 8) -> float:
    """The training objective on all held-out images, with their labels and the same `draws` noises for every model."""
    model = session.model
    images, label = judging.fetched(held_out, np.arange(held_out.length))
    x = images if session.codec is None else latents.encode_all(session.codec, images)
    frozen = session.codec and {"normaliser": session.codec.normaliser}

    @jax.jit
    def losses(params, key, ids, x, label):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
        if session.codec is not None:
            x = session.codec.draw(x, fold(keys, denoising.PREPARE), frozen)

        def network(x, t, cond):
            return model.apply(params, x, model.diffusion.network_time(t), cond, None)

        return model.diffusion.objective(network, x, label, keys)[0]

    def draw(seed, rows):
        given = None if model.num_classes is None or label is None else label[rows]
        return losses(params, jax.random.key(seed), rows, x[rows], given)

    return float(np.mean([judging.in_batches(functools.partial(draw, seed), len(x)) for seed in range(draws)]))


def report(scores: dict[str, Any]) -> str:
    """The scores in words, one line each."""
    lines = []
    if "recognised" in scores:
        lines.append(
            f"recognised as their class by {scores['judge']}: {scores['recognised']:.1%} of {scores['samples']} "
            f"samples (held-out real images: {scores['recognised_real']:.1%})"
        )
    if "frechet" in scores:
        lines.append(
            f"FD-{scores['judge']}: {scores['frechet']:.3f} (held-out real images: {scores['frechet_real']:.3f}), "
            f"{scores['samples']} images against the training set"
        )
    if "bits_per_dim" in scores:
        error = scores["bits_per_dim_stderr"]
        lines.append(
            f"bits/dim: {scores['bits_per_dim']:.3f}"
            + (f" +- {error:.3f}" if error is not None else "")
            + f" (variational bound, {scores['bound_steps']} terms, {scores['bound_images']} held-out images)"
        )
    if "exact_bits_per_dim" in scores:
        error = scores["exact_bits_per_dim_stderr"]
        lines.append(
            f"bits/dim: {scores['exact_bits_per_dim']:.3f}"
            + (f" +- {error:.3f}" if error is not None else "")
            + f" (probability flow, {scores['nll_steps']} steps, {scores['dequantisation'].replace('_', ' ')} noise, "
            + f"{scores['nll_images']} held-out images)"
        )
    return "\n".join(lines)
