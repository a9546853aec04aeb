"""A classifier of noisy images beside a diffusion model of the same images: what classifier guidance takes.

It is trained by the recipe that trains the diffusion model, on the same data and the same process; only its network,
`diffrl.nets.classifier.NoisyClassifier`, and its objective, cross-entropy, are others.
"""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.config import Run, leaf, leaves
from diffrl.diffusion import classifier_guidance, times
from diffrl.diffusion.process import add_noise, scales
from diffrl.errors import UserError
from diffrl.nets.classifier import NoisyClassifier
from diffrl.recipes import digests, images, judging
from diffrl.recipes.denoising import Diffusion
from diffrl.recipes.images import ImageConfig, Session
from diffrl.train.optim import OptimConfig

Array = jax.Array


@dataclasses.dataclass
class ClassifierConfig:
    """The network (see `NoisyClassifier`) and its training; the defaults suit 8x8 digits."""

    channels: int = leaf(32, "of the first level", at_least=1)
    multipliers: tuple[int, ...] = leaf((1, 2), "of the channels, a level each", at_least=1)
    blocks: int = leaf(1, "of each level", at_least=1)
    heads: int = leaf(4, "of attention", at_least=1)
    groups: int = leaf(8, "of group normalisation", at_least=1)
    dropout: float = leaf(0.1, at_least=0, below=1)
    steps: int = leaf(300, "updates in all", at_least=1)
    optim: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(1e-3, warmup_steps=20, schedule="cosine", weight_decay=0.05)
    )


def trained_by(config: ClassifierConfig, base: ImageConfig) -> dict[str, Any]:
    """What a trained classifier depends on, for a digest: not on the network of `base` nor on how that is trained."""
    others = [path for path in leaves(base) if path.startswith(("unet.", "dit.", "optim."))]
    settings = digests.settings(base, without=others) | {"fourier": base.unet.fourier}
    return {"classifier": digests.settings(config), "base": settings}


def open_session(config: ClassifierConfig, base: ImageConfig, run: Run) -> Session:
    """A session for `images.train`, with the data, the process, the batches and the devices of `base`.

    Raises UserError for data without labels.
    """
    settings = copy.deepcopy(base)
    settings.train.steps, settings.train.sample_every = config.steps, 0
    settings.optim, settings.diffusion.drop_label = config.optim, 0.0
    session = images.open_session(settings, run)
    model, diffusion = session.model, session.model.diffusion
    if model.num_classes is None:
        raise UserError(
            f"a classifier of {session.source.name} needs its labels: choose labelled data, conditional=True"
        )
    fields = dataclasses.asdict(config)
    del fields["steps"], fields["optim"]
    network = NoisyClassifier(model.num_classes, fourier=base.unet.fourier, **fields)
    objective = classifier_guidance.classification(diffusion.process, times.uniform())

    def init(key):
        fast = jax.random.key(jax.random.bits(key), impl="rbg")  # compiles sooner, as in `images.build`
        return jax.jit(network.init)(fast, jnp.zeros((1, *model.shape)), jnp.zeros(1))["params"]

    def apply(params, x, t, label, keys):
        del label
        return network.apply({"params": params}, x, t, keys)

    def at_unit_variance(network, x0, label, keys):
        return objective(lambda x, t, cond: network(unit(diffusion, x, t), t, cond), x0, label, keys)

    diffusion = diffusion._replace(objective=at_unit_variance)
    return session._replace(model=model._replace(apply=apply, init=init, diffusion=diffusion))


def unit(diffusion: Diffusion, x: Array, t: Array) -> Array:
    """x_t at about unit variance, as a network likes it under any process."""
    alpha, sigma = scales(diffusion.process, t, x)
    return x / jnp.hypot(alpha, sigma)


def logits(session: Session, params: Any, x: Array, t: Array) -> Array:
    """[B, K] for x_t [B, H, W, C] at t [B]."""
    model = session.model
    return model.apply(params, unit(model.diffusion, x, t), model.diffusion.network_time(t), None, None)


def accuracies(session: Session, params: Any, x: np.ndarray, label: np.ndarray, at: tuple[float, ...]) -> list[float]:
    """The share of the noised images [N, H, W, C] that is recognised at each of the times."""
    eps = np.asarray(jax.random.normal(jax.random.key(0), x.shape))

    @jax.jit
    def classify(params, x0, eps, t):
        t = jnp.full(len(x0), t)
        xt = add_noise(session.model.diffusion.process, x0, t, eps)
        return logits(session, params, xt, t).argmax(axis=1)

    def accuracy(t):
        return (judging.in_batches(lambda rows: classify(params, x[rows], eps[rows], t), len(x)) == label).mean()

    return [float(accuracy(t)) for t in at]
