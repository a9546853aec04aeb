"""What the tests of this folder share: the processes with their curves in float64, mixtures to noise, exact laws.

The curves are written from the papers in numpy, so that they stand as oracles beside `diffrl.diffusion.process`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.diffusion import mixtures
from diffrl.diffusion import process as processes
from diffrl.diffusion.sampling import normal, sample_keys

MEAN, VARIANCE = 0.4, 0.09  # of one-dimensional Gaussian data
DDPM = np.linspace(1e-4, 0.02, 1000)
PROCESSES = {
    "cosine": processes.cosine(),
    "vp": processes.vp(),
    "sub_vp": processes.sub_vp(),
    "ddpm": processes.tabulated(processes.alpha_bars(processes.linear_betas())),
    "flow": processes.flow(),
    "ve": processes.ve(),
}
NAMES = list(PROCESSES)


def _vp(t):
    log_alpha = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
    return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))


def _sub_vp(t):
    alpha, sigma = _vp(t)
    return alpha, sigma**2


def _ddpm(t):
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-DDPM))])
    alpha_bar = np.exp(np.interp(t, np.arange(1001) / 1000, log_alpha_bar))
    return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)


CURVES = {  # t, float64 -> (alpha, sigma), float64
    "cosine": lambda t: (np.cos(0.5 * np.pi * t), np.sin(0.5 * np.pi * t)),
    "vp": _vp,
    "sub_vp": _sub_vp,
    "ddpm": _ddpm,
    "flow": lambda t: (1.0 - t, t),
    "ve": lambda t: (np.ones_like(t), np.sqrt(0.01**2 * ((50.0 / 0.01) ** (2 * t) - 1.0))),
}


def switched(index) -> processes.Process:
    """The process NAMES[index], chosen at run time: one compilation serves them all."""

    def curve(field):
        branches = [getattr(p, field) for p in PROCESSES.values()]
        return lambda t: jax.lax.switch(index, branches, jnp.asarray(t, jnp.result_type(float)))

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


# --- Orders of convergence, in float64 on Gaussian data --------------------------------------------------------------

# From where to where they are measured: there the error's leading term does not change sign.
SPANS = {"cosine": (0.8, 0.3), "vp": (0.8, 0.3), "sub_vp": (0.9, 0.4), "flow": (0.8, 0.3), "ve": (0.9, 0.1)}


def gaussian() -> mixtures.Mixture:
    """N(MEAN, VARIANCE) in one dimension."""
    return mixtures.mixture([1.0], [[MEAN]], [VARIANCE])


def laws(name, t):
    """Mean and variance of x_t, by the curves, for times of any shape."""
    alpha, sigma = CURVES[name](np.asarray(t, np.float64))
    return alpha * MEAN, alpha**2 * VARIANCE + sigma**2


def order(errors, counts) -> float:
    """The slope of log error against the number of steps, with its sign turned."""
    return -np.polyfit(np.log(counts), np.log(np.abs(errors)), 1)[0]


def padded(grids):
    """Grids of different lengths, repeating their ends, so that one compilation serves them all."""
    longest = max(map(len, grids))
    return [jnp.asarray(np.pad(grid, (0, longest - len(grid)), mode="edge")) for grid in grids]


@functools.cache
def _flow(make):
    @jax.jit
    def run(index, x, grid, count):
        process = switched(index)
        sampler = make(process, mixtures.denoiser(gaussian(), process))
        keys = sample_keys(key(), len(x))

        def advance(n, state):
            return sampler.step(keys, state, grid[n], grid[n + 1], None)[0]

        return jax.lax.fori_loop(0, count, advance, sampler.init(x)).x

    return run


def flow_order(make, name, grids) -> float:
    """The order in which a deterministic sampler converges to the probability flow's map, at seven points.

    For Gaussian data the flow keeps (x - alpha MEAN) / std fixed.  make: (process, denoise) -> sampler.
    """
    z, errors = np.linspace(-1.5, 1.5, 7)[:, None], []
    with jax.enable_x64(True):
        for grid, whole in zip(grids, padded(grids), strict=True):
            means, variances = laws(name, grid[[0, -1]])
            first, last = (mean + np.sqrt(variance) * z for mean, variance in zip(means, variances, strict=True))
            end = _flow(make)(NAMES.index(name), jnp.asarray(first), whole, len(grid) - 1)
            errors.append(np.abs(np.asarray(end) - last).max())
    return order(errors, [len(grid) - 1 for grid in grids])


@functools.cache
def _law(make, noise):
    @jax.jit
    def run(index, mean, variance, grid, count):
        process = switched(index)
        sampler = make(process, mixtures.denoiser(gaussian(), process))

        def vectors(state):
            return jnp.concatenate([leaf for leaf in jax.tree.leaves(state) if leaf.ndim], axis=1)

        def filled(state, points):
            leaves, tree = jax.tree.flatten(state)
            columns = iter(points.T)
            return tree.unflatten([next(columns)[:, None] if leaf.ndim else leaf for leaf in leaves])

        size = vectors(sampler.init(jnp.zeros((1, 1)))).shape[1]
        keys = sample_keys(key(), size + 2)
        points = jnp.concatenate([jnp.eye(size), jnp.zeros((2, size))])
        z = noise(keys, points[:, :1])
        design = jnp.concatenate([points, jnp.ones_like(z), z], axis=1)

        def advance(n, carry):
            state, mean, covariance = carry
            state = sampler.step(keys, filled(state, points), grid[n], grid[n + 1], None)[0]
            *slope, shift, std = jnp.linalg.solve(design, vectors(state))
            slope = jnp.stack(slope)
            return state, mean @ slope + shift, slope.T @ covariance @ slope + jnp.outer(std, std)

        first = jnp.zeros(size).at[0].set(mean), jnp.zeros((size, size)).at[0, 0].set(variance)
        _, mean, covariance = jax.lax.fori_loop(0, count, advance, (sampler.init(points[:, :1]), *first))
        return mean[0], covariance[0, 0]

    return run


def law_errors(make, name, grids, noise=normal) -> tuple[list[float], list[float]]:
    """By how much a sampler misses mean and variance at the end of each grid, started from those at its beginning.

    Without drawing: for Gaussian data a step is an affine map of x, of what the sampler remembers [B, 1] and of the
    noise z, which is read off at as many points as it has coefficients; mean and covariance are carried through it.
    noise: (keys, x) -> z.
    """
    errors = []
    with jax.enable_x64(True):
        for grid, whole in zip(grids, padded(grids), strict=True):
            first, last = np.transpose(laws(name, grid[[0, -1]]))
            end = _law(make, noise)(NAMES.index(name), *first, whole, len(grid) - 1)
            errors.append([float(found) - right for found, right in zip(end, last, strict=True)])
    means, variances = zip(*errors, strict=True)
    return list(means), list(variances)
