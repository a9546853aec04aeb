"""Sample quality against the number of network calls, for every sampler of this library.

    python -m experiments.samplers                            # a mixture and 8x8 digits: five minutes of two CPU cores
    python -m experiments.samplers --config.grid=karras --workdir=runs/samplers/karras
    python -m experiments.samplers --preset=cifar10 --config.model=WORKDIR --config.image.eval.judge_weights=NPZ

Ancestral (Ho et al., 2020), DDIM, Euler-Maruyama and predictor-corrector (all Song et al., 2021), annealed Langevin
(Song & Ermon, 2019), Heun and churn (Karras et al., 2022), DPM-Solver++ and its SDE (Lu et al., 2022) and UniPC (Zhao
et al., 2023) walk one grid of noise levels (--config.grid); what a corrector calls the network for counts too.
On a mixture of Gaussians the denoiser is exact, so that what is left is the sampler's error: sliced Wasserstein
distance to exact samples, and for solvers of the probability flow the distance to where it ends.  On a trained model
(WORKDIR: of experiments.ddpm; without one a small model of digits is trained in the workdir) a judge's Fréchet distance
and verdicts stand beside those of held-out real images.

Expect DPM-Solver++(2M) and UniPC to need a half to a third of DDIM's calls.  Heun, at two calls a step, is level with
DDIM in rectified flow's variable, and diverges below 20 calls in EDM's, which wants Karras's grid.  Noise costs calls
where the denoiser is exact, and mends some of the network's errors where it is not: there SDE-DPM-Solver++ and churn
come closest to the data.  Below 25 calls a corrector costs more than it mends, and one Langevin move a level is
not enough for images at 50.

Ends with quality.png, samples.png (a row for each sampler, its budgets from left to right), table.md (on
the mixture also of the other grids) and results.json; a second run of the same command measures only what is missing,
as does one with another config (--accept_changes), or after WORKDIR has trained on.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffrl import config as config_lib
from diffrl.data import toy
from diffrl.diffusion import mixtures, process, times
from diffrl.diffusion.process import Process
from diffrl.diffusion.sampling import sample, start
from diffrl.errors import UserError
from diffrl.evaluate import frechet, grids, judges, plots
from diffrl.evaluate.wasserstein import sliced_wasserstein
from diffrl.recipes import denoising, digests, images, judging, scores
from diffrl.recipes import results as results_lib
from diffrl.recipes.images import EvalConfig, ImageConfig, Session
from diffrl.recipes.networks import UNetConfig
from diffrl.recipes.solvers import Method, SolverConfig, methods, still_at_the_end
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import init_distributed

GRIDS = ("linear", "quadratic", "karras", "log_snr")
FOLLOWED = 64  # images whose path is compared with the probability flow's
PICTURED = 2  # images of each budget in the picture


@dataclasses.dataclass
class Config:
    """The model, the grid, and how many network calls a sample may cost."""

    model: str = config_lib.leaf("", "workdir of a trained image model; if empty, `image` is trained")
    image: ImageConfig = dataclasses.field(default_factory=images.digits_config)
    grid: str = config_lib.leaf("linear", "linear, quadratic, karras or log_snr")
    grid_budget: int = config_lib.leaf(20, "network calls for which the mixture is walked on all grids", at_least=1)
    sigma_min: float = config_lib.leaf(0.002, "the least sigma / alpha of karras and log_snr", above=0)
    sigma_max: float = config_lib.leaf(80.0, "and the greatest", above=0)
    budgets: tuple[int, ...] = config_lib.leaf(
        (4, 6, 8, 10, 15, 20, 35, 50, 100), "network calls, on the mixture", at_least=1
    )
    image_budgets: tuple[int, ...] = config_lib.leaf((5, 7, 10, 15, 25, 50), "network calls, on the images", at_least=1)
    reference_steps: int = config_lib.leaf(500, "of Heun, to find where the probability flow ends", at_least=1)
    points: int = config_lib.leaf(
        8192, "samples of the mixture; a quarter of them are followed to the flow's end", at_least=4
    )
    solver: SolverConfig = dataclasses.field(default_factory=SolverConfig)
    methods: tuple[str, ...] = config_lib.leaf((), "only these samplers; all if empty", free=True)


def digits() -> Config:
    """8x8 digits on a CPU: a network small enough to be trained in a minute and called a thousand times in another."""
    config = Config()
    config.image.unet = UNetConfig(channels=24, multipliers=(1, 2), blocks=1, attention=(4,), groups=8)
    config.image.train = TrainConfig(steps=600, ema_decay=0.99, sample_every=0, checkpoint_every=200)
    config.image.sample.batch = 360
    return config


def cifar10() -> Config:
    """A trained CIFAR-10 model, on a GPU: half an hour."""
    return Config(
        image=ImageConfig(eval=EvalConfig(judge="resnet", samples=5000)),
        image_budgets=(5, 7, 10, 15, 25, 50, 100, 250),
        reference_steps=250,
        points=2**15,
    )


def make_grid(config: Config, name: str, p: Process, steps: int) -> np.ndarray:
    """`steps` steps from noise to t = 0, float32 [steps + 1]."""
    first = 1.0 if float(p.alpha(jnp.ones(()))) > 0 else 0.999
    options = {
        "linear": lambda: times.linear_grid(steps, first),
        "quadratic": lambda: times.quadratic_grid(steps, first),
        "karras": lambda: times.karras_grid(p, steps, config.sigma_min, config.sigma_max),
        "log_snr": lambda: times.log_snr_grid(p, steps, config.sigma_min, config.sigma_max),
    }
    return np.asarray(denoising.choose("grid", name, options)())


# --- What is sampled from --------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A process and a denoiser, the samples that are drawn and how they are measured."""

    process: Process
    denoiser: Callable[[Any], Callable]  # params -> denoiser
    params: Any
    shape: tuple[int, ...]
    labels: np.ndarray | None
    num: int
    batch: int
    followed: int  # the first samples, compared with the probability flow
    budgets: tuple[int, ...]
    grids: tuple[str, ...]  # those that are compared at one budget
    measure: Callable[[np.ndarray], dict[str, float]]
    real: dict[str, float]  # what `measure` says of as many true samples
    made_by: dict[str, Any]  # what the scores depend on


def make_drawer(problem: Problem, method: Method, longest: int, devices: Any) -> Callable:
    """(grid, number of samples) -> samples [num, ...]: the same noise for every method and grid."""

    @jax.jit
    def chunk(params, part, grid, steps):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), part["id"])
        x = start(problem.process, keys, (len(part["id"]), *problem.shape), grid[0])
        sampler = method.make(problem.process, problem.denoiser(params), steps)
        return sample(still_at_the_end(sampler), keys, x, grid, part.get("label"))

    def generate(grid: np.ndarray, num: int) -> np.ndarray:
        steps = len(grid) - 1
        padded = np.pad(grid, (0, longest - steps))
        labels = None if problem.labels is None else problem.labels[:num]

        def part(ids_and_labels):
            return chunk(problem.params, ids_and_labels, padded, np.float32(steps))

        return denoising.in_chunks(part, labels, num, problem.batch, devices)

    return generate


def mixture_problem(config: Config) -> Problem:
    """25 Gaussians on a square under the cosine process; its denoiser is exact."""
    p = process.cosine()
    exact = mixtures.mixture(np.ones(25), toy.grid_means(), np.full(25, toy.GRID_STD**2))
    one, other = (np.asarray(mixtures.draw(exact, jax.random.key(i), config.points)) for i in (1, 2))
    return Problem(
        p, lambda _: mixtures.denoiser(exact, p), (), (2,), None, config.points, config.points, config.points // 4,
        config.budgets, GRIDS, lambda x: {"wasserstein": sliced_wasserstein(x, one)},
        {"wasserstein": sliced_wasserstein(other, one)}, made_by(config, "image_budgets"),
    )  # fmt: skip


def made_by(config: Config, *others: str) -> dict[str, Any]:
    """What the scores of all problems depend on, without the leaves `others` that some do not."""
    model = [path for path in config_lib.leaves(config) if path.startswith("image.")]
    return digests.settings(config, without=("model", *model, *others))


def image_session(config: Config, run: config_lib.Run) -> Session:
    """The session of `config.model`, with this experiment's scores, or of a model of our own in a folder beside."""
    if not config.model:
        place = digests.own_folder(run, "model", images.trained_by(config.image))
        return images.open_session(config.image, place)
    session = images.open_trained(config.model)
    session.config.eval, session.config.sample.batch = config.image.eval, config.image.sample.batch
    return session


def image_problem(config: Config, session: Session) -> Problem:
    """The model's images, by class where it can; not guided and not clipped: the flow is the network's own."""
    held_out = judging.held_out_source(session)
    judge = judging.make_judge(session, held_out) if held_out is not None else None
    if held_out is None or judge is None:
        raise UserError(
            "samples are measured by a judge beside held-out images: set --config.image.eval and its weights"
        )
    model, num = session.model, min(session.config.eval.samples, held_out.length)
    reference = judging.moments(judge, session.source)
    labels = None if model.num_classes is None else np.resize(np.arange(model.num_classes, dtype=np.int32), num)

    def measure(x, labels=labels):
        if not np.isfinite(x).all():
            return {"frechet": float("inf"), "recognised": 0.0}
        verdict = {} if labels is None else {"recognised": judges.agreement(judge, x, labels)}
        return {"frechet": frechet.frechet_distance(frechet.moments(judge.features, [x]), reference), **verdict}

    def denoiser(params):
        denoise = denoising.make_denoiser(model.diffusion, model.apply, params)
        return (lambda x, t, cond: denoise(x, t, cond)[0]) if model.diffusion.learned else denoise

    current = images.restored_state(session) if config.model else images.train(session)
    trained = {"step": int(current.step), "weights": digests.weights(current.ema)}  # it may train on
    asked = {"model": digests.settings(session.config), "eval": dataclasses.asdict(session.config.eval)}
    return Problem(
        model.diffusion.process, denoiser, current.ema, model.shape, labels, num, session.config.sample.batch,
        min(FOLLOWED, num), config.image_budgets, (), measure, measure(*judging.spread(held_out, num)),
        made_by(config, "budgets", "grid_budget", "points") | asked | trained,
    )  # fmt: skip


# --- The measurement -------------------------------------------------------------------------------------------------


def measure(
    config: Config, problem: Problem, method: Method, ends: np.ndarray, devices: Any
) -> tuple[dict, np.ndarray]:
    """{"rows": scores for each budget, "grids": for each grid}, and the first samples of each budget."""
    draw = make_drawer(problem, method, method.steps(max(*problem.budgets, config.grid_budget)), devices)

    def grid(name: str, budget: int) -> np.ndarray:
        return make_grid(config, name, problem.process, method.steps(budget))

    rows, first = [], []
    for budget in problem.budgets:
        steps, x = method.steps(budget), draw(grid(config.grid, budget), problem.num)
        row = {"budget": budget, "steps": steps, "calls": method.calls * (steps - 1) + 1, **problem.measure(x)}
        if method.follows:
            row["rms"] = float(np.sqrt(np.mean((x[: problem.followed] - ends) ** 2)))
        rows.append(row)
        first.append(x[:PICTURED])
    others = {name: problem.measure(draw(grid(name, config.grid_budget), problem.num)) for name in problem.grids}
    return {"rows": rows, "grids": others}, np.concatenate(first)


def measure_missing(
    config: Config, problem: Problem, chosen: dict[str, Method], devices: Any, folder: pathlib.Path
) -> dict[str, dict]:
    """The rows that the folder holds, with those of the methods that it lacked."""
    path = folder / "results.json"
    found = results_lib.load(path, {})
    todo = [name for name in chosen if name not in found]
    if not todo:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    truth = make_drawer(problem, methods(config.solver)["Heun (flow)"], config.reference_steps, devices)
    ends = truth(make_grid(config, config.grid, problem.process, config.reference_steps), problem.followed)
    for name in tqdm(todo, desc="x".join(map(str, problem.shape)), unit="sampler", leave=False):
        found[name], first = measure(config, problem, chosen[name], ends, devices)
        if first.ndim == 4:
            np.save(folder / f"{name}.npy", first)
        results_lib.save(path, found)  # last: a method that it holds is done
    return found


def check(config: Config) -> None:
    """Raises UserError for what would fail only after the training."""
    for name, budgets in (("budgets", config.budgets), ("image_budgets", config.image_budgets)):
        if not budgets:
            raise UserError(f"--config.{name}=(): expected at least one number of network calls")
    for name in (config.grid, *GRIDS):
        make_grid(config, name, process.cosine(), 2)


def main(config: Config, run: config_lib.Run) -> None:
    # Whatever the end needs is checked before the training, not after it.
    check(config)
    known = methods(config.solver)
    chosen = {name: denoising.choose("methods", name, known) for name in config.methods or known}
    scores.check(config.image.eval)
    session = image_session(config, run)

    of_images = image_problem(config, session)  # trains the model
    results: dict[str, Any] = {"settings": {**config_lib.to_dict(config), "methods": None}}
    for kind, problem in {"mixture": mixture_problem(config), "images": of_images}.items():
        able = {name: method for name, method in chosen.items() if method.plane or kind == "images"}
        folder = digests.own_folder(run, kind, problem.made_by).workdir
        results[kind] = measure_missing(config, problem, able, session.devices, folder)
        results[f"{kind}, real"], results[f"{kind}, made by"] = problem.real, problem.made_by
    results_lib.save(run.workdir / "results.json", results)
    report(results, chosen, session.config.data.name, folder, run)
    print(f"everything lies in {run.workdir}")


# --- The report ------------------------------------------------------------------------------------------------------


def report(results: dict, chosen: dict[str, Method], data: str, samples: pathlib.Path, run: config_lib.Run) -> None:
    """The plot, the picture and the tables; stdout has the tables of sample quality."""
    plot(results, chosen, data, run.workdir / "quality.png")
    strips = np.concatenate([np.load(samples / f"{name}.npy") for name in chosen])
    picture = grids.image_grid(strips, PICTURED * len(results["settings"]["image_budgets"]))
    grids.save_png(run.workdir / "samples.png", grids.label_rows(picture, list(chosen)))

    def of_budget(problem: str, score: str, title: str, form: str) -> str:
        rows = measured(results, problem, chosen, score)
        cells = {name: [form.format(row[score]) for row in found] for name, found in rows.items()}
        real = results[f"{problem}, real"].get(score)
        title = f"{title}; true samples: {form.format(real)}" if real is not None else title
        return table(title, "network calls, at most", budgets(results, problem), cells)

    of_quality = [
        of_budget("mixture", "wasserstein", "Mixture: sliced Wasserstein distance to exact samples", "{:.4f}"),
        of_budget("images", "frechet", f"{data}: Fréchet distance on the judge's features", "{:.2f}"),
    ]
    budget, by_name = results["settings"]["grid_budget"], results["mixture"]
    of_grid = {
        name: [f"{by_name[name]['grids'][grid]['wasserstein']:.4f}" for grid in GRIDS]
        for name in chosen
        if name in by_name
    }
    others = [
        of_budget("mixture", "rms", "Mixture: RMS distance to the flow's end", "{:.1e}"),
        of_budget("images", "rms", f"{data}: RMS distance to the flow's end", "{:.1e}"),
        of_budget("images", "recognised", f"{data}: recognised as their class", "{:.1%}"),
        table(f"Mixture: sliced Wasserstein distance at {budget} network calls", "grid", GRIDS, of_grid),
    ]
    (run.workdir / "table.md").write_text("\n".join(of_quality + others))
    print("\n".join(of_quality))


def table(title: str, corner: str, columns: Sequence, rows: Mapping[str, list[str]]) -> str:
    """A titled table in Markdown; nothing where there are no rows."""
    lines = [title, "", f"| {corner} | {' | '.join(map(str, columns))} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n" if rows else ""


def measured(results: dict, problem: str, chosen: Iterable[str], score: str) -> dict[str, list[dict]]:
    """The rows of those methods that have the score."""
    rows = {name: results[problem][name]["rows"] for name in chosen if name in results[problem]}
    return {name: found for name, found in rows.items() if score in found[0]}


def budgets(results: dict, problem: str) -> list[int]:
    return results["settings"]["budgets" if problem == "mixture" else "image_budgets"]


def plot(results: dict, chosen: dict[str, Method], data: str, path: pathlib.Path) -> None:
    """Exact denoiser left, network right; from above the solvers' distance to where the flow ends and to the data, and
    that of the samplers with noise, on the same scale.
    """
    figure, axes = plots.panels(3, 2, 4.2, 2.8)
    columns = [
        ("mixture", "wasserstein", "exact denoiser: 25 Gaussians", "sliced Wasserstein distance"),
        ("images", "frechet", f"trained network: {data}", "Fréchet distance to the data"),
    ]
    for (solved, quiet, noisy), (problem, score, title, ylabel) in zip(axes.T, columns, strict=True):
        draw(solved, chosen, measured(results, problem, chosen, "rms"), "rms", follows=True)
        rows = measured(results, problem, chosen, score)
        for panel, follows in ((quiet, True), (noisy, False)):
            draw(panel, chosen, rows, score, follows)
            real = results[f"{problem}, real"][score]
            panel.axhline(real, color="black", linewidth=0.9, linestyle=":", label="true samples")
        noisy.sharey(quiet)
        ticks: list[int] = []
        for budget in budgets(results, problem):
            if not ticks or budget >= 1.4 * ticks[-1]:  # there is room for its number
                ticks.append(budget)
        for panel in (solved, quiet, noisy):
            panel.set(xscale="log", yscale="log", ylabel=ylabel)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.set_xticks([], minor=True)
        solved.yaxis.set_minor_formatter("")
        solved.set_ylabel("RMS distance to the flow's end")
        solved.set_title(title, loc="left", fontsize=11)
        noisy.set_xlabel("network calls per sample")
        # What diverges leaves the frame, so that the others can be told apart.
        top = np.median([found[0][score] for found in rows.values()]) if rows else np.inf
        if np.isfinite(top):
            noisy.set_ylim(top=5 * top)
    for panel, title in ((axes[0, 1], "without noise"), (axes[2, 1], "with noise (without: grey)")):
        beside = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "alignment": "left"}
        panel.legend(title=title, frameon=False, fontsize=9, **beside)
    plots.save(path, figure)


def draw(panel: Any, chosen: dict[str, Method], rows: dict[str, list[dict]], score: str, follows: bool) -> None:
    """A line for each method that follows the flow, or for each that does not over the others in grey."""
    for name, found in rows.items():
        method = chosen[name]
        points = [row["calls"] for row in found], [row[score] for row in found]
        if method.follows == follows:
            panel.plot(*points, color=method.colour, marker="o", markersize=3.5, linewidth=1.4, label=name)
        elif method.follows:
            panel.plot(*points, color="#D5D5D5", linewidth=1.0, zorder=1)


PRESETS = {"digits": digits, "cifar10": cifar10}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
