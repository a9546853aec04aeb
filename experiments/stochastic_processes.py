"""Stochastic processes in pictures and numbers: paths, Langevin dynamics, Fokker-Planck, the reversal of diffusions.

    python -m experiments.stochastic_processes                       # about a minute of two CPU cores
    python -m experiments.stochastic_processes --preset=fine         # ten times the particles, finer grids

Nothing is trained: the data are Gaussian mixtures, whose score is exact (Song et al., "Score-Based Generative Modeling
through SDEs", 2021, arXiv:2011.13456).  Writes

    paths.png          Brownian motion, its bridge, Ornstein-Uhlenbeck, Gaussian processes of several kernels
    langevin.png       modes that plain Langevin dynamics weighs wrongly and annealing does not; the bias in the step
    double_well.png    the Fokker-Planck density over the histogram of particles, until it is Boltzmann's
    marginals.png      a mixture in the plane under the VP process: the equation, its exact solution, particles
    reversal.png       VP, sub-VP and VE: paths forwards, of the reverse SDE and of the probability flow

and a table of what was measured beside what theory says (table.md, results.json).  Expected: moments within a few
standard errors but for the share of a mode that plain Langevin dynamics gets wrong, mass kept to 1e-6, the distances
W1 about those of exact samples.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.typing import ArrayLike
from matplotlib.colors import PowerNorm

from diffrl import config as config_lib
from diffrl.diffusion import fokker_planck, langevin, mixtures, process, sde
from diffrl.diffusion import gaussian_processes as gp
from diffrl.diffusion.process import Process
from diffrl.diffusion.sampling import Sampler, sample, start
from diffrl.errors import UserError
from diffrl.evaluate import plots
from diffrl.recipes import results

Array = jax.Array
BLUE, RED, GREEN = plots.COLOURS[:3]


@dataclasses.dataclass
class Config:
    """How many particles, and how fine the grids are."""

    particles: int = config_lib.leaf(10_000, "paths behind every number", at_least=2)
    shown: int = config_lib.leaf(10, "paths drawn in each picture", at_least=2)
    steps: int = config_lib.leaf(500, "steps of each simulated path", at_least=20)
    cells: int = config_lib.leaf(96, "cells along each axis of the plane", at_least=16)
    only: tuple[str, ...] = config_lib.leaf((), "only these pictures; all if empty", free=True)
    seed: int = config_lib.leaf(0, "of all paths", at_least=0)


class Row(NamedTuple):
    """A line of the table; `error` is the standard error of `measured` where it is a mean over particles."""

    quantity: str
    measured: float
    expected: float
    error: float | None = None


def fine() -> Config:
    """For a GPU, or for patience."""
    return Config(particles=100_000, steps=2000, cells=192)


def walk(sampler: Sampler, key: Array, x: Array, grid: Array) -> np.ndarray:
    """x at every time of `grid` [N]: [N, B, ...]."""
    path = jax.jit(lambda x, grid: sample(sampler, key, x, grid, trace=lambda x, info: x)[1])(x, grid)
    return np.concatenate([x[None], path])


def between(samples: ArrayLike, others: ArrayLike) -> float:
    """The Wasserstein-1 distance of two samples of numbers."""
    return float(scipy.stats.wasserstein_distance(np.ravel(samples), np.ravel(others)))


# --- Paths -----------------------------------------------------------------------------------------------------------


def gaussian_paths(config: Config, key: Array) -> dict[str, tuple[Array, Array, Array]]:
    """name -> (paths [num, N], mean [N], covariance [N, N]) at N = 201 times in [0, 1]; the laws in closed form."""
    times, num = jnp.linspace(0.0, 1.0, 201), config.particles
    s, t = times[:, None], times
    keys = iter(jax.random.split(key, 8))
    laws = {
        "Brownian motion": (gp.brownian(next(keys), t, num), 0.0 * t, jnp.minimum(s, t)),
        "Brownian bridge": (gp.bridge(next(keys), t, num), 0.0 * t, jnp.minimum(s, t) - s * t),
        "Ornstein-Uhlenbeck": (
            gp.ornstein_uhlenbeck(next(keys), t, num, theta=5.0, sigma=2.0, start=2.0),
            2.0 * jnp.exp(-5.0 * t),
            0.4 * (jnp.exp(-5.0 * jnp.abs(s - t)) - jnp.exp(-5.0 * (s + t))),
        ),
    }
    kernels = {"Matérn 1/2": gp.matern12, "Matérn 3/2": gp.matern32, "Matérn 5/2": gp.matern52, "RBF": gp.rbf}
    for name, kernel in kernels.items():
        law = gp.prior(kernel(0.2), t)
        laws[name] = (gp.draw(law, next(keys), num), *law)
    seen, values = jnp.array([0.1, 0.35, 0.5, 0.8]), jnp.array([-1.0, 1.0, 0.5, -0.5])
    law = gp.condition(gp.matern52(0.2), t, seen, values, noise=0.05)
    laws["Matérn 5/2 given four values"] = (gp.draw(law, next(keys), num), *law)
    return laws


def paths(config: Config, key: Array, folder) -> list[Row]:
    times, rows = np.linspace(0.0, 1.0, 201), []
    figure, grid = plots.panels(2, 4, 2.9, 2.3, sharex=True)
    for axes, (name, law) in zip(grid.flat, gaussian_paths(config, key).items(), strict=True):
        drawn, mean, covariance = (np.asarray(a, np.float64) for a in law)
        spread = 2.0 * np.sqrt(np.maximum(np.diag(covariance), 0.0))
        axes.fill_between(times, mean - spread, mean + spread, color="#DDDDDD", linewidth=0)
        axes.plot(times, drawn[: config.shown].T, color=BLUE, linewidth=0.8, alpha=0.7)
        axes.plot(times, mean, color="black", linewidth=1.0, linestyle="--")
        axes.set_title(name, loc="left", fontsize=10)
        i, j = 90, 110  # t = 0.45 and 0.55
        c = covariance[np.ix_([i, j], [i, j])]
        measured = float(np.cov(drawn[:, i], drawn[:, j])[0, 1])
        error = np.sqrt((c[0, 0] * c[1, 1] + c[0, 1] ** 2) / len(drawn))
        rows.append(Row(f"{name}: Cov(x_0.45, x_0.55)", measured, c[0, 1], error))
    for axes in grid[-1]:
        axes.set_xlabel("t")
    plots.save(folder / "paths.png", figure)
    return rows


# --- Langevin dynamics -----------------------------------------------------------------------------------------------

FAR = ([0.25, 0.75], [[-2.0, 0.0], [2.0, 0.5]], [0.06, 0.1])


def stationary_variances(config: Config, key: Array) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Variance on N(0, 1) at each step size h, with and without Metropolis's test: name -> (h [H], variance [H])."""
    sizes = np.array([0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0])
    samplers = {
        "unadjusted": langevin.unadjusted(lambda x: -x),
        "adjusted": langevin.adjusted(lambda x: -0.5 * x[:, 0] ** 2),
    }
    x, measured = jax.random.normal(key, (config.particles, 1)), {}
    for name, sampler in samplers.items():
        run = jax.jit(lambda grid, sampler=sampler: sample(sampler, key, x, grid).var())
        measured[name] = sizes, np.array([run(h * jnp.arange(101.0)) for h in sizes])
    return measured


def langevin_dynamics(config: Config, key: Array, folder) -> list[Row]:
    noising, m = process.ve(0.01, 10.0), mixtures.mixture(*FAR)
    keys = jax.random.split(key, 4)
    first = start(noising, keys[0], (config.particles, 2))
    plain = langevin.unadjusted(lambda x: mixtures.score(m, noising, x, jnp.full(len(x), 1e-3)))
    levels = jnp.append(jnp.linspace(1.0, 0.2, 25), 0.0)
    annealed = langevin.annealed(noising, mixtures.denoiser(m, noising), count=config.steps // 5)
    ends = {
        "exact": mixtures.draw(m, keys[1], config.particles),
        "Langevin": jax.jit(lambda x: sample(plain, keys[2], x, 0.01 * jnp.arange(1.0 + 2 * config.steps)))(first),
        "annealed Langevin": jax.jit(lambda x: sample(annealed, keys[3], x, levels))(first),
    }
    figure, grid = plots.panels(1, 4, 3.0, 2.8)
    rows = []
    for axes, (name, x) in zip(grid[0], ends.items(), strict=False):
        x = np.asarray(x)
        share, error = float(np.mean(x[:, 0] < 0)), np.sqrt(0.25 * 0.75 / len(x))
        rows.append(Row(f"share of the left mode, {name}", share, 0.25, error))
        axes.scatter(*x[:1500].T, s=3, color=BLUE, alpha=0.4, linewidths=0)
        axes.set(xlim=(-3.5, 3.5), ylim=(-2.5, 3.0))
        axes.set_title(f"{name}: {share:.0%} | {1 - share:.0%}", loc="left", fontsize=10)
    axes = grid[0, 3]
    measured = stationary_variances(config, keys[3])
    h = np.linspace(0.0, 1.0, 100)
    axes.plot(h, 1.0 / (1.0 - h / 2), color=RED, linewidth=1.2, label="1 / (1 - h / 2)")
    for colour, (name, (sizes, variances)) in zip((RED, BLUE), measured.items(), strict=True):
        axes.plot(sizes, variances, "o", color=colour, markersize=4, label=name)
        expected = 1.0 / (1.0 - sizes[3] / 2) if name == "unadjusted" else 1.0
        error = expected * np.sqrt(2 / config.particles)
        rows.append(Row(f"variance on N(0, 1) at h = {sizes[3]}, {name}", variances[3], expected, error))
    axes.set_title("variance on N(0, 1)", loc="left", fontsize=10)
    axes.set_xlabel("step h")
    axes.legend(frameon=False, fontsize=8)
    plots.save(folder / "langevin.png", figure)
    return rows


# --- Fokker-Planck ---------------------------------------------------------------------------------------------------

TEMPERATURE = 0.5


def potential(x: Array) -> Array:
    """Two wells, the left one deeper."""
    return (x**2 - 1.0) ** 2 + 0.2 * x


def double_well(config: Config, key: Array, folder) -> list[Row]:
    """dx = -V'(x) dt + sqrt(2 T) dw from the right well: the equation's density, and particles by Euler-Maruyama."""
    line, times = fokker_planck.Grid((-2.2,), (2.2,), (220,)), (0.0, 0.1, 0.5, 2.0, 20.0)
    field = jax.grad(lambda x: -potential(x).sum())
    equation = (lambda x, t: field(x), lambda t: jnp.sqrt(2.0 * TEMPERATURE) + 0.0 * t)
    centres = line.points()[:, 0]
    p = fokker_planck.normalised(line, -0.5 * ((centres - 0.9) / 0.15) ** 2)
    densities = np.asarray(jax.jit(lambda p: fokker_planck.solve(line, p, jnp.array(times), *equation))(p))
    boltzmann = np.asarray(fokker_planck.normalised(line, -potential(centres) / TEMPERATURE))

    run = jax.jit(lambda key, x, grid: sample(sde.simulate(*equation), key, x, grid))
    x = 0.9 + 0.15 * jax.random.normal(key, (config.particles, 1))
    figure, grid = plots.panels(1, 4, 3.0, 2.6, sharex=True, sharey=True)
    rows = []
    for n, (axes, before, now) in enumerate(zip(grid[0], times[:-1], times[1:], strict=True), 1):
        count = round((now - before) * config.steps / 2)
        x = run(jax.random.fold_in(key, n), x, jnp.linspace(before, now, count + 1))
        axes.hist(np.ravel(x), bins=55, range=(-2.2, 2.2), density=True, color="#BBD3E8", label="particles")
        axes.plot(centres, densities[n], color=BLUE, linewidth=1.8, label="Fokker-Planck")
        axes.plot(centres, boltzmann, color="black", linewidth=1.0, linestyle="--", label="Boltzmann")
        axes.set_title(f"t = {now:g}", loc="left", fontsize=10)
        distance = scipy.stats.wasserstein_distance(np.ravel(x), centres, v_weights=densities[n])
        rng = np.random.default_rng(n)
        floor = scipy.stats.wasserstein_distance(
            rng.choice(centres, len(x), p=densities[n] / densities[n].sum()), centres, v_weights=densities[n]
        )
        rows.append(Row(f"double well, t = {now:g}: W1 of particles and density", distance, floor))
    grid[0, 0].legend(frameon=False, fontsize=8)
    plots.save(folder / "double_well.png", figure)
    distance = np.abs(densities[-1] - boltzmann).sum() * line.widths.prod()
    return [*rows, Row("double well, t = 20: L1 to Boltzmann", distance, 0.0), *kept(line, "double well", densities)]


def kept(grid: fokker_planck.Grid, name: str, densities: np.ndarray) -> list[Row]:
    """How much mass was lost or made, and the least density."""
    masses = densities.astype(np.float64).reshape(len(densities), -1).sum(axis=1) * grid.widths.prod()
    change = np.abs(masses / masses[0] - 1.0).max()
    return [Row(f"{name}: change of mass", change, 0.0), Row(f"{name}: least density", densities.min(), 0.0)]


def marginals(config: Config, key: Array, folder) -> list[Row]:
    """A mixture in the plane under the VP process, by the equation, in closed form, and by particles."""
    noising, times = process.vp(), (0.0, 0.15, 0.3, 1.0)
    m = mixtures.mixture([0.4, 0.3, 0.3], [[-1.2, -0.6], [1.2, -0.6], [0.0, 1.2]], [0.05, 0.08, 0.12])
    plane = fokker_planck.Grid((-4.0, -4.0), (4.0, 4.0), (config.cells, config.cells))
    points = plane.points().reshape(-1, 2)
    exact = [np.exp(mixtures.log_density(m, noising, points, jnp.full(1, t))).reshape(plane.cells) for t in times]
    equation = functools.partial(sde.drift, noising), functools.partial(sde.diffusion, noising)
    solve = jax.jit(lambda p: fokker_planck.solve(plane, p, jnp.array(times), *equation))
    densities = np.asarray(solve(jnp.asarray(exact[0])))
    particles = walk(sde.forward(noising), key, mixtures.draw(m, key, config.particles), jnp.array(times))

    figure, grid = plots.panels(2, len(times), 2.6, 2.5, sharex=True, sharey=True)
    centres = np.asarray(plane.points()[:, 0, 0])
    rows = []
    for n, t in enumerate(times):
        norm = PowerNorm(0.5, 0.0, float(exact[n].max()))
        shared = {"cmap": "Blues", "norm": norm, "rasterized": True}
        above, below = grid[:, n]
        above.pcolormesh(centres, centres, densities[n].T, shading="nearest", **shared)
        levels = float(exact[n].max()) * np.array([0.05, 0.3, 0.8])
        above.contour(centres, centres, exact[n].T, levels, colors=RED, linewidths=0.7)
        below.hist2d(*particles[n].T, bins=50, range=[(-4, 4)] * 2, density=True, **shared)
        above.set_title(f"t = {t:g}", loc="left", fontsize=10)
        for axes in (above, below):
            axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        distance = np.abs(densities[n] - exact[n]).sum() * plane.widths.prod()
        rows.append(Row(f"mixture under VP, t = {t:g}: L1 of the equation to its exact solution", distance, 0.0))
    grid[0, 0].set_ylabel("equation, exact (red)")
    grid[1, 0].set_ylabel("particles")
    plots.save(folder / "marginals.png", figure)
    return [*rows[1:], *kept(plane, "mixture under VP", densities)]


# --- Forwards and backwards ------------------------------------------------------------------------------------------

LINE_DATA = ([0.35, 0.4, 0.25], [[-1.2], [0.3], [1.4]], [0.01, 0.02, 0.005])


def reversal(config: Config, key: Array, folder) -> list[Row]:
    """Three processes, each forwards, by its reverse SDE and by its probability flow, over its density."""
    m = mixtures.mixture(*LINE_DATA)
    noisings = {"VP": process.vp(), "sub-VP": process.sub_vp(), "VE": process.ve(0.01, 10.0)}
    keys = jax.random.split(key, 6)
    data, others = (mixtures.draw(m, k, config.particles) for k in keys[:2])
    floor = between(data, others)
    figure, grid = plots.panels(3, 3, 3.4, 2.3, sharey=True)
    rising, falling = jnp.linspace(0.0, 1.0, config.steps + 1), jnp.linspace(1.0, 0.03, config.steps + 1) ** 2
    rows = []
    for line, (name, noising) in zip(grid, noisings.items(), strict=True):
        denoise = mixtures.denoiser(m, noising)
        noise = start(noising, keys[2], (config.particles, 1))
        walks: dict[str, tuple[Sampler, Array, Array]] = {
            "forward SDE": (sde.forward(noising), data, rising),
            "reverse SDE": (sde.euler_maruyama(noising, denoise), noise, falling),
            "probability flow": (sde.probability_flow(noising, denoise), noise, falling),
        }
        for axes, k, (way, (sampler, x, times)) in zip(line, keys[3:], walks.items(), strict=True):
            path = walk(sampler, k, x, times)[..., 0]
            draw_paths(axes, m, noising, np.asarray(times), path[:, : config.shown])
            axes.set_title(f"{name}: {way}", loc="left", fontsize=10)
            if way != "forward SDE":
                axes.invert_xaxis()
                rows.append(Row(f"{name}, {way}: W1 to the data", between(path[-1], others), floor))
        line[0].set_ylabel("x / sqrt(alpha² + sigma²)")
    for axes in grid[-1]:
        axes.set_xlabel("t")
    plots.save(folder / "reversal.png", figure)
    return rows


def draw_paths(axes, m: mixtures.Mixture, noising: Process, times: np.ndarray, path: np.ndarray) -> None:
    """Paths [N, num] over the marginal densities, both in units in which data and noise are of one size at all t."""

    def unit(t):
        return np.sqrt(np.asarray(noising.alpha(t)) ** 2 + np.asarray(noising.sigma(t)) ** 2)

    t, y = np.linspace(1e-3, 1.0, 200, dtype=np.float32), np.linspace(-2.6, 2.6, 260, dtype=np.float32)
    x = unit(t)[:, None] * y
    density = mixtures.log_density(m, noising, jnp.reshape(x, (-1, 1)), jnp.repeat(t, len(y))).reshape(x.shape)
    density = unit(t)[:, None] * np.exp(density)
    norm = PowerNorm(0.4, 0.0, 2.0)
    axes.pcolormesh(t, y, density.T, cmap="Blues", norm=norm, shading="nearest", rasterized=True)
    axes.plot(times, path / unit(times)[:, None], color=RED, linewidth=0.6, alpha=0.8)
    axes.set_ylim(-2.6, 2.6)


# --- The experiment --------------------------------------------------------------------------------------------------

# Each by the name of its picture: (config, key, folder) -> rows.
PARTS: dict[str, Callable] = {
    "paths": paths,
    "langevin": langevin_dynamics,
    "double_well": double_well,
    "marginals": marginals,
    "reversal": reversal,
}


def main(config: Config, run: config_lib.Run) -> None:
    for name in config.only:
        if name not in PARTS:
            raise UserError(f"--config.only={name!r} is no picture: choose from {', '.join(PARTS)}")
    run.workdir.mkdir(parents=True, exist_ok=True)
    key, rows = jax.random.key(config.seed), []
    for n, (name, part) in enumerate(PARTS.items()):
        if name in (config.only or PARTS):
            rows += part(config, jax.random.fold_in(key, n), run.workdir)
    text = table(rows)
    (run.workdir / "table.md").write_text(text, encoding="utf-8")
    results.save(run.workdir / "results.json", [row._asdict() for row in rows])
    print(text)
    print(f"everything lies in {run.workdir}")


def table(rows: list[Row]) -> str:
    """Markdown; the expected W1 is that of two exact samples of as many particles."""
    lines = ["| quantity | measured | expected |", "|---|---|---|"]
    for row in rows:
        error = "" if row.error is None else f" ± {row.error:.2g}"
        lines.append(f"| {row.quantity} | {row.measured:.4g}{error} | {row.expected:.4g} |")
    return "\n".join(lines) + "\n"


PRESETS = {"default": Config, "fine": fine}

if __name__ == "__main__":
    config_lib.run(main, PRESETS)
