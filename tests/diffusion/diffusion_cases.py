"""What the tests of this folder share: the processes with their curves in float64, and mixtures to noise.

The curves are written from the papers in numpy, so that they stand as oracles beside `diffrl.diffusion.process`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.diffusion import mixtures
from diffrl.diffusion import process as processes

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
