"""How good are the samples: a judge's verdicts and the Fréchet distance on its features; the held-out loss."""

import functools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from diffrl.data import cifar
from diffrl.data.catalog import make_source
from diffrl.data.pipeline import to_unit
from diffrl.data.source import Source, matched
from diffrl.errors import UserError
from diffrl.evaluate import frechet, judges
from diffrl.pretrained import cifar_resnet
from diffrl.recipes import denoising
from diffrl.recipes.images import EvalConfig, Session, make_generator

CHUNK = 2000
FITTED = 2**26  # pixels of training images that a judge is fitted to: 21,845 images of CIFAR-10, all of MNIST


def _images(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    batch = source.fetch(indices)
    return to_unit(batch["x"]), batch.get("label")


def spread(source: Source, num: int) -> tuple[np.ndarray, np.ndarray | None]:
    """`num` examples spread evenly over the set, so that a sorted set gives all its classes."""
    return _images(source, np.linspace(0, source.length - 1, min(num, source.length)).astype(int))


def check(config: EvalConfig, source: Source | None = None) -> None:
    """Raises UserError for a judge that will not be there when it is needed, or that does not know these classes."""
    denoising.choose("eval.judge", config.judge, dict.fromkeys(("mlp", "resnet", "none")))
    denoising.choose("eval.dequantisation", config.dequantisation, dict.fromkeys(("uniform", "truncated_normal")))
    if config.judge_weights and not pathlib.Path(config.judge_weights).expanduser().is_file():
        raise UserError(f"eval.judge_weights={config.judge_weights} is no file: name the .npz of a CIFAR-10 ResNet")
    if config.judge != "resnet" or not config.judge_weights or source is None or source.num_classes is None:
        return
    known = source.class_names in ((), cifar.CLASSES)
    if source.shape != (32, 32, 3) or source.num_classes != len(cifar.CLASSES) or not known:
        raise UserError(
            f"eval.judge=resnet knows CIFAR-10 alone, not {source.num_classes} classes of {source.shape} in "
            f"{source.name}: choose mlp or none"
        )


def make_judge(session: Session, held_out: Source) -> judges.Judge | None:
    """The configured judge, or None (with the reason on stderr) where there can be none."""
    config = session.config.eval
    check(config, session.source)
    if config.judge == "none":
        return None
    if session.source.num_classes is None:
        print("no judge: the data have no labels", file=sys.stderr)
        return None
    if config.judge == "resnet" and not config.judge_weights:
        print("no judge: --config.eval.judge_weights names no published ResNet (.npz)", file=sys.stderr)
        return None
    x_test, labels_test = spread(held_out, CHUNK)
    name = session.config.data.name

    def mlp() -> judges.Judge:
        x, labels = spread(session.source, max(1, FITTED // math.prod(session.source.shape)))
        return judges.fit_mlp(f"MLP-{name}", x, labels, x_test, labels_test)

    def resnet() -> judges.Judge:
        apply, params = cifar_resnet.load(pathlib.Path(config.judge_weights).expanduser())
        return judges.from_network(cifar_resnet.name(params), apply, params, x_test, labels_test)

    return denoising.choose("eval.judge", config.judge, {"mlp": mlp, "resnet": resnet})()


def moments(judge: judges.Judge, source: Source) -> frechet.Moments:
    """Of the judge's features of all images of a source."""
    chunks = [np.arange(i, min(i + CHUNK, source.length)) for i in range(0, source.length, CHUNK)]
    return frechet.moments(judge.features, (_images(source, chunk)[0] for chunk in chunks))


def judge_samples(session: Session, params: Any, held_out: Source) -> dict[str, Any]:
    """Recognised classes and Fréchet distance of fresh samples, each beside the value of held-out real images.

    Both sets have the same size, and the training images are the reference of both distances.
    """
    judge = make_judge(session, held_out)
    if judge is None:
        return {}
    num = min(session.config.eval.samples, held_out.length)
    real, real_labels = spread(held_out, num)
    classes = session.model.num_classes
    labels = None if classes is None else np.resize(np.arange(classes, dtype=np.int32), num)
    key = jax.random.fold_in(jax.random.key(session.config.sample.seed), 1)
    fake = make_generator(session.config, session.model, session.devices, key)(params, labels, num)
    reference = moments(judge, session.source)
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
    x, label = _images(held_out, np.arange(held_out.length))

    @jax.jit
    def losses(params, key, ids, x, label):
        def network(x, t, cond):
            return model.apply(params, x, model.diffusion.network_time(t), cond, None)

        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
        return model.diffusion.objective(network, x, label, keys)[0]

    def draw(seed, rows):
        given = None if model.num_classes is None or label is None else label[rows]
        return losses(params, jax.random.key(seed), rows, x[rows], given)

    return float(np.mean([in_batches(functools.partial(draw, seed), len(x)) for seed in range(draws)]))


def in_batches(measure: Callable[[np.ndarray], Any], num: int, batch: int = 500, desc: str = "") -> np.ndarray:
    """What `measure`, indices [B] -> [B, ...], says of 0 ... `num` - 1; with a progress bar where `desc` is set.

    All batches are of one size, so that a compiled program serves them all: the last one repeats its indices.
    """
    size = min(num, batch)
    found = []
    for i in tqdm(range(0, num, size), desc=desc, unit="batch", leave=False, disable=not desc):
        rows = np.resize(np.arange(i, min(i + size, num)), size)
        found.append(np.asarray(measure(rows))[: num - i])
    return np.concatenate(found)


def held_out_source(session: Session) -> Source | None:
    """The test split with the training set's labels, or None (with the reason on stderr) where there is none.

    Raises UserError for a split that is not of the training set's kind.
    """
    try:
        source = make_source(session.config.data, session.config.eval.split)
    except UserError as error:
        print(f"no held-out images, so no scores: {error}", file=sys.stderr)
        return None
    return matched(source, session.source)


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
