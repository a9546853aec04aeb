"""Score matching, every way (Hyvärinen, 2005; Vincent, 2011; Song et al., 2019; Song & Ermon, 2019).

    python -m experiments.score_matching                          # eight Gaussians, two minutes of two CPU cores
    python -m experiments.score_matching --preset=long            # wider, longer, five seeds

The same perceptron learns grad log p of a mixture of Gaussians in the plane, whose score is known, from each objective
with the same number of steps on the same number of fresh samples.  Its error is the Fisher divergence to the exact
score, E_p ||s - grad log p||^2, on a grid weighted by p and relative to E_p ||grad log p||^2: 0 is exact, 1 is s = 0.

Expected: explicit matching, which is told the score, is the bound at 0.0001.  Implicit matching reaches 0.005, sliced
0.011, and 0.009 with reduced variance.  Denoising at one level is cheap and learns the score of the *blurred* data as
well as implicit matching learns that of the data; as an estimate of the latter it trades bias (0.13 at sigma = 0.1)
for variance (0.06 at 0.02).  The same network for all levels at once pays for it with accuracy at each.

Ends with a table (table.md, results.json) and a picture of the fields (fields.png).  A second run of the same command
goes on where the first stopped; one with another config (--accept_changes) uses only what was made with it.
"""

import dataclasses
import io
import math
import pathlib
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import LogNorm

from diffrl import config as config_lib
from diffrl.data import toy
from diffrl.diffusion import losses, mixtures, prediction, score_matching, times
from diffrl.diffusion.mixtures import Mixture
from diffrl.diffusion.process import Process, ve
from diffrl.errors import UserError
from diffrl.evaluate import plots
from diffrl.nets.mlp import MLP
from diffrl.recipes import digests, results
from diffrl.train import loop, mesh, optim, state, step
from diffrl.train.optim import OptimConfig
from diffrl.train.state import Aux

Array = jax.Array
HALF_WIDTH, PIXELS = 1.5, 90  # of the square on which fields are compared
SIGMA_MAX = 2.0


@dataclasses.dataclass
class Config:
    """The data, the network and how long it learns."""

    means: str = config_lib.leaf("ring", "of the Gaussians: ring (eight) or grid (25)")
    std: float = config_lib.leaf(0.15, "of each Gaussian", above=0)
    noise: tuple[float, ...] = config_lib.leaf(
        (0.1, 0.02), "levels sigma of denoising, each by itself", above=0, below=SIGMA_MAX
    )
    level: float = config_lib.leaf(
        0.1, "the noise level at which a noise-conditional score is compared", above=0, below=SIGMA_MAX
    )
    width: int = config_lib.leaf(128, "of the perceptron", at_least=1)
    depth: int = config_lib.leaf(4, "its hidden layers", at_least=1)
    steps: int = config_lib.leaf(2000, "updates of every network", at_least=1)
    batch_size: int = config_lib.leaf(256, "fresh samples of an update", at_least=1)
    inner: int = config_lib.leaf(100, "updates per dispatch; divides steps", at_least=1)
    seeds: int = config_lib.leaf(3, "runs per objective", at_least=1)
    only: tuple[str, ...] = config_lib.leaf((), "only these objectives; all if empty", free=True)
    optim: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(learning_rate=3e-3, warmup_steps=100, schedule="cosine")
    )


def long() -> Config:
    """As far as it goes: minutes of an accelerator."""
    return Config(width=256, steps=30_000, batch_size=1024, inner=500, seeds=5)


class Problem(NamedTuple):
    """A mixture with its exact score, and the process by which it is blurred."""

    data: Mixture
    process: Process
    network: MLP

    def exact(self, x: Array, sigma: float = 0.0) -> Array:
        """grad log of the mixture convolved with N(0, sigma^2), [B, 2]."""
        t = self.time(sigma)
        return jax.grad(lambda x: mixtures.log_density(self.data, self.process, x, t).sum())(x)

    def time(self, sigma: float) -> Array:
        return times.from_log_snr(self.process, -2.0 * jnp.log(sigma)) if sigma else jnp.zeros(())


class Method(NamedTuple):
    """An objective of `losses`' form, and what is asked of the model in the end."""

    objective: losses.Objective
    level: float = 0.0  # sigma of the score that it learns, or is compared at
    conditional: bool = False


def make_problem(config: Config) -> Problem:
    means = {"ring": toy.ring_means, "grid": toy.grid_means}
    if config.means not in means:
        raise UserError(f"means={config.means!r} is not known: choose ring or grid")
    centres = means[config.means]()
    data = mixtures.mixture(np.ones(len(centres)), centres, np.full(len(centres), config.std**2))
    return Problem(data, ve(0.01, SIGMA_MAX), MLP(2, config.width, config.depth))


def methods(config: Config, problem: Problem) -> dict[str, Method]:
    """By name, in the order of the table."""

    def plain(objective: score_matching.Objective) -> losses.Objective:
        return lambda model, x, cond, keys: (objective(lambda x: model(x, jnp.zeros(len(x)), cond), x, keys), {})

    process, draw = problem.process, times.uniform(float(problem.time(min(*config.noise, config.level))))
    head = prediction.score_head(process)
    sliced = score_matching.sliced()
    return {
        "explicit": Method(plain(score_matching.explicit(problem.exact))),
        "implicit": Method(plain(score_matching.implicit)),
        "sliced": Method(plain(score_matching.sliced(variance_reduction=False))),
        "sliced with reduced variance": Method(plain(sliced)),
        **{f"denoising at {s}": Method(plain(score_matching.denoising(s)), s) for s in config.noise},
        "denoising at all levels": Method(losses.denoising(process, head, draw, losses.snr), config.level, True),
        "sliced at all levels": Method(score_matching.noise_conditional(sliced, process, draw), config.level, True),
    }


def make_score(problem: Problem, method: Method, params: Any) -> Callable[[Array, Array, Any], Array]:
    """The network as a score, (x, t, cond) -> [B, 2]; one that knows its level is scaled by 1 / sigma."""

    def score(x, t, cond):
        out: Any = problem.network.apply({"params": params}, x, t)
        return out / problem.process.sigma(t)[:, None] if method.conditional else out

    return score


class Trainer(NamedTuple):
    """A compiled training step, shared by all seeds of a method."""

    fresh: Callable[[int], state.TrainState]
    collect: Callable
    program: Callable


def make_trainer(config: Config, problem: Problem, method: Method) -> Trainer:
    def loss(params, state, batch, keys):
        del state
        value, metrics = method.objective(make_score(problem, method, params), batch["x"], None, keys)
        return value.mean(), Aux(metrics)

    optimizer = optim.make(config.optim, config.steps)
    devices = mesh.make_mesh()

    def fresh(seed):
        key = jax.random.key(seed)
        params = problem.network.init(jax.random.fold_in(key, 1), jnp.zeros((1, 2)), jnp.zeros(1))["params"]
        return mesh.place(devices, state.create(params, optimizer, key))

    put = mesh.put_batch(devices, inner=True)
    draw = jax.jit(lambda key: mixtures.draw(problem.data, key, config.inner * config.batch_size))

    def collect(state, key):
        del state
        return [put({"x": np.asarray(draw(key)).reshape(config.inner, config.batch_size, 2)})]

    update = step.make_update(loss, optimizer, ema_decay=0.995)
    many = step.repeat(step.global_step(update), config.inner)
    (example,) = collect(None, jax.random.key(0))
    compiled = mesh.compile_step(many, devices, fresh(0), inner=True).lower(fresh(0), example).compile()
    return Trainer(fresh, collect, compiled)


def train(config: Config, problem: Problem, method: Method, trainer: Trainer, seed: int, name: str) -> dict:
    """One run: the learned field on the grid, and seconds a step, compilation left out."""
    started = time.perf_counter()
    trained = loop.fit(
        trainer.program, trainer.fresh(seed), trainer.collect, steps=config.steps, inner=config.inner, desc=name
    )
    jax.block_until_ready(trained)
    seconds = (time.perf_counter() - started) / config.steps
    x, _ = grid(problem)
    t = jnp.full(len(x), problem.time(method.level) if method.conditional else 0.0)
    field = jax.jit(lambda params: make_score(problem, method, params)(x, t, None))(trained.ema)
    return {"field": np.asarray(field), "seconds": seconds}


def run_name(config: Config, name: str, method: Method, seed: int) -> str:
    """The objective, the seed, and a digest of all else that the run depends on."""
    levels = () if method.conditional else ("noise", "level")  # a level by itself stands in the objective's name
    digest = digests.digest(digests.settings(config, without=("seeds", *levels)))
    return f"{name.replace(' ', '_')}-{seed}-{digest}"


def kept(path: pathlib.Path) -> dict | None:
    """What `train` returned, from its file; None where there is none, or one that cannot be read, which moves aside."""
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            return {"field": file["field"], "seconds": file["seconds"]}
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, ValueError):
        aside = path.with_name(f"{path.name}.damaged")
        print(f"{path} cannot be read: kept as {aside.name}, and trained anew", file=sys.stderr)
        path.replace(aside)
        return None


def grid(problem: Problem) -> tuple[Array, np.ndarray]:
    """Points [PIXELS^2, 2], row by row from below, and the data's probability on each."""
    line = (jnp.arange(PIXELS) + 0.5) / PIXELS * 2 * HALF_WIDTH - HALF_WIDTH
    x = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)
    weight = np.exp(np.asarray(mixtures.log_density(problem.data, problem.process, x, jnp.zeros(())), np.float64))
    return x, weight / weight.sum()


def relative_error(problem: Problem, field: np.ndarray, sigma: float) -> float:
    """E_p ||s - grad log p_sigma||^2 / E_p ||grad log p_sigma||^2 over the grid, p being the data's density."""
    x, weight = grid(problem)
    truth = np.asarray(problem.exact(x, sigma))
    return float(weight @ ((field - truth) ** 2).sum(1) / (weight @ (truth**2).sum(1)))


def draw_fields(path, problem: Problem, fields: dict[str, np.ndarray]) -> None:
    """The exact field over the density, then each learned one over its distance from the exact."""
    x, weight = grid(problem)
    truth = np.asarray(problem.exact(x))
    columns = math.ceil(math.sqrt(len(fields) + 1))
    rows = math.ceil((len(fields) + 1) / columns)
    figure, axes = plots.panels(rows, columns, 2.7, 2.75, sharex=True, sharey=True)
    extent = (-HALF_WIDTH, HALF_WIDTH) * 2
    square, shades = (PIXELS, PIXELS), LogNorm(0.3, 100.0)
    every = (slice(3, None, 6), slice(3, None, 6))

    def panel(ax, title, field, background, **colours):
        image = ax.imshow(background.reshape(square), origin="lower", extent=extent, **colours)
        length = np.linalg.norm(field, axis=-1, keepdims=True)
        arrows = field / length * np.minimum(length, 15.0)  # beyond, only the direction is drawn
        places, arrows = (a.reshape(*square, 2)[every].reshape(-1, 2).T for a in (np.asarray(x), arrows))
        ax.quiver(*places, *arrows, scale=170, width=0.006, color="black")
        ax.set_title(title, fontsize=8.5)
        ax.grid(False)
        return image

    panel(axes.flat[0], "exact score, density", truth, weight, cmap="Blues")
    for ax, (name, field) in zip(axes.flat[1:], fields.items(), strict=False):
        distance = np.linalg.norm(field - truth, axis=-1)
        image = panel(ax, name, field, distance, cmap="YlOrRd", norm=shades)
    for ax in axes.flat[len(fields) + 1 :]:
        ax.set_visible(False)
    figure.colorbar(image, ax=axes, label="distance to the data's score", shrink=0.6, aspect=30)
    plots.save(path, figure)


def summarise(problem: Problem, name: str, method: Method, runs: list[dict]) -> dict:
    """Means over seeds, and half the distance between the extremes."""

    def error(sigma):
        values = [relative_error(problem, run["field"], sigma) for run in runs]
        return {"mean": float(np.mean(values)), "spread": (max(values) - min(values)) / 2}

    milliseconds = 1e3 * min(float(run["seconds"]) for run in runs)
    return {"objective": name, "data": error(0.0), "own": error(method.level), "milliseconds": milliseconds}


def table(rows: list[dict], config: Config) -> str:
    lines = [
        "| objective | error to the data's score | to the score it learns | ms a step |",
        "|---|---|---|---|",
    ]
    for row in rows:
        errors = [f"{row[kind]['mean']:.4f} ± {row[kind]['spread']:.4f}" for kind in ("data", "own")]
        lines.append(f"| {row['objective']} | {' | '.join(errors)} | {row['milliseconds']:.2f} |")
    return "\n".join(lines) + (
        f"\n\nRelative Fisher divergence, {config.steps} steps of {config.batch_size}, mean of {config.seeds} seeds ± "
        f"half their range; those at all levels are compared at sigma = {config.level}.\n"
    )


def check(config: Config) -> None:
    """Raises UserError for what would fail later, or silently mean something else."""
    optim.make(config.optim, config.steps)
    if not config.noise:
        raise UserError("noise=(): choose at least one level")
    if config.steps % config.inner:
        raise UserError(f"inner={config.inner}: choose a value that divides steps={config.steps}")


def main(config: Config, run: config_lib.Run) -> None:
    check(config)
    problem = make_problem(config)
    known = methods(config, problem)
    for name in config.only:
        if name not in known:
            raise UserError(f"only={name!r} is no objective: choose from {', '.join(map(repr, known))}")
    chosen = {name: method for name, method in known.items() if name in (config.only or known)}
    runs: dict[str, list[dict]] = {}
    for name, method in chosen.items():
        runs[name], trainer = [], None
        for seed in range(config.seeds):
            path = run.workdir / "runs" / f"{run_name(config, name, method, seed)}.npz"
            found = kept(path)
            if found is None:
                trainer = trainer or make_trainer(config, problem, method)
                print(f"{name}, seed {seed}", file=sys.stderr)
                path.parent.mkdir(parents=True, exist_ok=True)
                found = train(config, problem, method, trainer, seed, name)
                with results.whole(path) as file:  # what is there counts as done
                    np.savez(file, **found)
            runs[name].append(found)
    rows = [summarise(problem, name, chosen[name], runs[name]) for name in chosen]
    text = table(rows, config)
    results.save(run.workdir / "results.json", rows)
    (run.workdir / "table.md").write_text(text)
    draw_fields(run.workdir / "fields.png", problem, {name: found[0]["field"] for name, found in runs.items()})
    print(text)
    print(f"everything lies in {run.workdir}")


PRESETS = {"ring": Config, "long": long}

if __name__ == "__main__":
    config_lib.run(main, PRESETS)
