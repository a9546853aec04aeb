"""A trained image model as the prior of an inverse problem: methods by name, all around DDPM's ancestral sampler."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.config import leaf
from diffrl.diffusion import constraints, guidance, inverse, samplers
from diffrl.diffusion.operators import Operator
from diffrl.diffusion.process import Process
from diffrl.diffusion.sampling import Sampler, sample, start
from diffrl.recipes import denoising
from diffrl.recipes.images import Model

Array = jax.Array


@dataclasses.dataclass
class RestorationConfig:
    """How images are restored; see `diffrl.diffusion.constraints` and `diffrl.diffusion.inverse`."""

    steps: int = leaf(50, "of the sampler", free=True, at_least=1)
    jump: int = leaf(5, "RePaint: steps of a stretch of the grid", free=True, at_least=1)
    resample: int = leaf(5, "RePaint: how often a stretch is walked", free=True, at_least=1)
    dps_scale: float = leaf(0.5, "DPS: step along the residual's gradient", free=True, above=0)
    data_variance: float = leaf(0.25, "PiGDM, and DDNM under noise: variance of a pixel", free=True, above=0)


class Method(NamedTuple):
    """make: (denoise, operator, y, mask, noise) -> sampler, for images measured as y = A x + N(0, noise^2).

    grid: the times that it walks.  inpaints: it knows masks only (True where known).  gradients: it differentiates the
    network.
    """

    make: Callable[..., Sampler]
    grid: Array
    inpaints: bool = False
    gradients: bool = False


def methods(config: RestorationConfig, process: Process, grid: Array) -> dict[str, Method]:
    """Replacement, RePaint, DDNM, PiGDM and DPS, on `grid` [steps + 1].

    The estimate is clipped where no gradient goes through it: a clipped pixel has none.
    """
    clip, variance = guidance.clip, config.data_variance

    def ancestral(denoise):
        return samplers.ancestral(process, denoise)

    def replacement(denoise, operator, y, mask, noise):
        return constraints.inpaint(ancestral(clip(denoise)), process, y, mask)

    def repaint(denoise, operator, y, mask, noise):
        return constraints.repaint(ancestral(clip(denoise)), process, y, mask)

    def ddnm(denoise, operator, y, mask, noise):
        return ancestral(inverse.ddnm(clip(denoise), process, operator, y, noise, variance))

    def pigdm(denoise, operator, y, mask, noise):
        return ancestral(clip(inverse.pigdm(denoise, process, operator, y, noise, variance)))

    def dps(denoise, operator, y, mask, noise):
        return inverse.dps(ancestral(denoise), operator, y, config.dps_scale)

    travel = constraints.travel_grid(grid, config.jump, config.resample)
    return {
        "replacement": Method(replacement, grid, inpaints=True),
        "RePaint": Method(repaint, travel, inpaints=True),
        "DDNM": Method(ddnm, grid),
        "PiGDM": Method(pigdm, grid, gradients=True),
        "DPS": Method(dps, grid, gradients=True),
    }


def unconditional(model: Model, params: Any) -> Callable:
    """(x_t, t, None) -> x_0, without a label, or under the one that stands for none."""
    denoise = denoising.make_denoiser(model.diffusion, model.apply, params)

    def estimate(x, t, cond):
        null = None if model.num_classes is None else jnp.full(len(x), model.num_classes)
        x0 = denoise(x, t, null)
        return x0[0] if model.diffusion.learned else x0

    return estimate


def restorer(model: Model, method: Method, operator: Callable[[Any], Operator], noise: float = 0.0) -> Any:
    """The jitted (params, keys [B], y, mask) -> images [B, H, W, C] in [-1, 1].

    operator: mask -> A, so that one program serves all masks; mask is None for an operator without one.
    """

    @jax.jit
    def restore(params, keys, y, mask):
        sampler = method.make(unconditional(model, params), operator(mask), y, mask, noise)
        x = start(model.diffusion.process, keys, (len(y), *model.shape), method.grid[0])
        return jnp.clip(sample(sampler, keys, x, method.grid), -1.0, 1.0)

    return restore
