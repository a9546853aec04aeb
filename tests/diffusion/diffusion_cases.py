"""What the tests of this folder share: the processes with their curves in float64, mixtures to noise, exact flows.

The curves are written from the papers in numpy, so that they stand as oracles beside `diffrl.diffusion.process`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.diffusion import mixtures
from diffrl.diffusion import process as processes
from diffrl.diffusion.sampling import sample

MEAN, VARIANCE = 0.4, 0.09  # of one-dimensional Gaussian data
DDPM = np.linspace(1e-4, 0.02, 1000)
PROCESSES = {
    "cosine": processes.cosine(),
    "vp": processes.vp(),
    "ddpm": processes.tabulated(processes.alpha_bars(processes.linear_betas())),
    "flow": processes.flow(),
    "ve": processes.ve(),
}
NAMES = list(PROCESSES)


def _vp(t):
    log_alpha = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
    return np.exp(log_alpha), np.sqrt(1.0 - np.exp(2 * log_alpha))


def _ddpm(t):
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-DDPM))])
    alpha_bar = np.exp(np.interp(t, np.arange(1001) / 1000, log_alpha_bar))
    return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)


CURVES = {  # t, float64 -> (alpha, sigma), float64
    "cosine": lambda t: (np.cos(0.5 * np.pi * t), np.sin(0.5 * np.pi * t)),
    "vp": _vp,
    "ddpm": _ddpm,
    "flow": lambda t: (1.0 - t, t),
    "ve": lambda t: (np.ones_like(t), np.sqrt(0.01**2 * ((50.0 / 0.01) ** (2 * t) - 1.0))),
}


def switched(index) -> processes.Process:
    """The process NAMES[index], chosen at run time: one compilation serves them all."""

    def curve(field):
        branches = [getattr(p, field) for p in PROCESSES.values()]
        return lambda t: jax.lax.switch(index, branches, jnp.asarray(t, jnp.float32))

    return processes.Process(curve("alpha"), curve("sigma"))


def blobs() -> mixtures.Mixture:
    """Three Gaussians in the plane, none a sphere."""
    return mixtures.mixture(
        [0.5, 0.3, 0.2],
        [[-0.8, 0.2], [0.6, 0.7], [0.4, -0.9]],
        [[[0.10, 0.04], [0.04, 0.05]], [[0.03, -0.02], [-0.02, 0.08]], [[0.06, 0.0], [0.0, 0.02]]],
    )


def relative(actual, expected) -> float:
    """The largest error relative to the largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def key(seed: int = 0) -> jax.Array:
    return jax.random.key(seed)


# From where to where orders of convergence are measured: there the error's leading term does not change sign.
SPANS = {"cosine": (0.8, 0.3), "vp": (0.8, 0.3), "flow": (0.8, 0.3), "ve": (0.9, 0.1)}


def flow_errors(make, name, grids) -> list[float]:
    """How far a solver ends from the probability flow's exact map, the largest over seven points, for each grid.

    In float64.  For Gaussian data the flow keeps (x - alpha MEAN) / std fixed.  make: (process, denoise) -> sampler.
    """
    curves, process = CURVES[name], PROCESSES[name]
    z = np.linspace(-1.5, 1.5, 7)[:, None]
    with jax.enable_x64(True):
        sampler = make(process, mixtures.denoiser(mixtures.mixture([1.0], [[MEAN]], [VARIANCE]), process))
        run = jax.jit(lambda x, grid: sample(sampler, key(), x, grid))
        errors = []
        for grid in grids:
            alpha, sigma = curves(np.asarray(grid, np.float64))
            x = alpha[:, None, None] * MEAN + np.sqrt(alpha**2 * VARIANCE + sigma**2)[:, None, None] * z
            errors.append(float(np.abs(np.asarray(run(jnp.asarray(x[0]), jnp.asarray(grid))) - x[-1]).max()))
    return errors


def order(make, name, grids) -> float:
    """The order of convergence: the slope of log error against the number of steps, with its sign turned."""
    counts = [len(grid) - 1 for grid in grids]
    return -np.polyfit(np.log(counts), np.log(flow_errors(make, name, grids)), 1)[0]
