"""Few-step models: consistency distillation and training (Song et al., 2023; Song & Dhariwal, 2024) and progressive
distillation (Salimans & Ho, 2022), against their teacher's DDIM at the same number of network calls.

    python -m experiments.distillation                       # a checkerboard, about three minutes of two CPU cores
    python -m experiments.distillation --preset=digits       # 8x8 digits by class, about 15 minutes

One network (v-prediction, cosine process) learns to denoise and is the teacher.  From it start a consistency model that
takes the teacher's midpoint steps for its pairs, one that takes none (its pairs share their noise; N grows by the
curriculum), and students of 16, 8, 4, 2 and 1 steps, each distilled from the one before.

The scores are the sliced Wasserstein distance of samples to as many held-out points, and their precision: the share
that lies as close to a held-out point as its third neighbour does.  Expected on the checkerboard: the teacher's DDIM at
1, 4 and 32 calls has a distance of 0.47, 0.13 and 0.018; in one call consistency distillation 0.010 and progressive
distillation what its teacher needs 32 for; training data 0.009.  Consistency training is the slowest to learn: 0.017 in
one call and 0.015 in four, with a precision of 85 % and 91 % where training data have 98 %.

Ends with a table (table.md, results.json), a plot of distance against network calls (quality.png) and the samples
(samples.png).  A second run of the same command goes on where the first stopped; one with another config
(--accept_changes) uses only those models that were trained with it.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl import config as config_lib
from diffrl.data.catalog import DataConfig, make_source
from diffrl.data.pipeline import loader, to_unit
from diffrl.data.prefetch import Prefetch
from diffrl.data.source import Source
from diffrl.diffusion import consistency, distillation, prediction, samplers, times
from diffrl.diffusion.sampling import sample, start
from diffrl.errors import UserError
from diffrl.evaluate import grids, plots, precision_recall
from diffrl.evaluate.wasserstein import sliced_wasserstein
from diffrl.nets.mlp import MLP
from diffrl.recipes import denoising, digests, images, results
from diffrl.recipes.denoising import DiffusionConfig
from diffrl.recipes.images import ImageConfig, Model
from diffrl.recipes.networks import UNetConfig
from diffrl.train import loop, mesh, optim, state, step
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.optim import OptimConfig
from diffrl.train.state import Aux

TEACHER, DISTILLED, TRAINED, PROGRESSIVE = (
    "teacher, DDIM",
    "consistency distillation",
    "consistency training",
    "progressive distillation",
)


@dataclasses.dataclass
class Config:
    """Data, network, and how long each model learns."""

    seed: int = config_lib.leaf(0, "of parameters, batches and samples", at_least=0)
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(name="toy:checkerboard"))
    width: int = config_lib.leaf(128, "of the perceptron, for points in the plane", at_least=1)
    depth: int = config_lib.leaf(4, "its hidden layers", at_least=1)
    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)  # for images
    optim: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(learning_rate=2e-3, warmup_steps=100, schedule="cosine")
    )
    batch_size: int = config_lib.leaf(512, "of every update", at_least=1)
    inner: int = config_lib.leaf(50, "updates per dispatch; divides the numbers of updates", free=True, at_least=1)
    teacher_steps: int = config_lib.leaf(4000, "updates of the teacher", at_least=1)
    consistency_steps: int = config_lib.leaf(4000, "updates of each consistency model", at_least=1)
    stage_steps: int = config_lib.leaf(1000, "updates of each of the progressive students", at_least=1)
    rungs: int = config_lib.leaf(32, "N of consistency distillation", at_least=1)
    huber: float = config_lib.leaf(0.03, "c of consistency distillation's pseudo-Huber metric", above=0)
    curriculum: tuple[int, ...] = config_lib.leaf((10, 1280), "first and last N of consistency training", at_least=1)
    first_student: int = config_lib.leaf(16, "steps of the first progressive student, a power of 2", at_least=4)
    samples: int = config_lib.leaf(8192, "drawn for each score; at most the held-out split", free=True, at_least=15)


def digits() -> Config:
    """scikit-learn's digits, conditional on their class."""
    base = images.digits_config()
    return Config(
        data=base.data,
        unet=base.unet,
        optim=dataclasses.replace(base.optim, learning_rate=1e-3),
        batch_size=128,
        inner=10,
        teacher_steps=1500,
        consistency_steps=1500,
        stage_steps=300,
    )


class Problem(NamedTuple):
    """What all models share."""

    config: Config
    source: Source
    model: Model
    workdir: pathlib.Path


def build(config: Config, source: Source) -> Model:
    """A perceptron for points in the plane; for images the U-Net, conditional on the labels."""
    if len(source.shape) == 3:
        return images.build(ImageConfig(data=config.data, unet=config.unet), source)
    network = MLP(source.shape[0], config.width, config.depth)

    def init(key):
        return network.init(key, jnp.zeros((1, *source.shape)), jnp.zeros(1))["params"]

    def apply(params, x, t, label, keys):
        del label, keys
        return network.apply({"params": params}, x, t)

    return Model(apply, init, denoising.make_diffusion(DiffusionConfig(), fourier=True), source.shape, None)


def network(model: Model, params: Any) -> Callable:
    """(x, t, label) -> v."""
    return lambda x, t, label: model.apply(params, x, model.diffusion.network_time(t), label, None)


def denoiser(model: Model, params: Any) -> Callable:
    return prediction.denoiser(model.diffusion.head, network(model, params))


# --- Losses ----------------------------------------------------------------------------------------------------------


def label_of(model: Model, batch: dict) -> Any:
    return batch["label"] if model.num_classes is not None else None


def distilled_loss(config: Config, model: Model) -> Callable:
    """Consistency distillation: the teacher's parameters are `state.frozen`, the target's `state.ema`."""
    process, head = model.diffusion.process, model.diffusion.head
    pairs = consistency.neighbours(consistency.even_ladder(), times.uniform(0.0), config.rungs)
    metric = consistency.pseudo_huber(config.huber)

    def loss(params, state, batch, keys):
        teacher = distillation.midpoint_solver(process, denoiser(model, state.frozen))
        objective = consistency.consistency_distillation(process, head, pairs, teacher, metric)
        models = network(model, params), network(model, state.ema)
        value, metrics = objective(*models, batch["x"], label_of(model, batch), keys)
        return value.mean(), Aux(metrics)

    return loss


def trained_loss(config: Config, model: Model) -> Callable:
    """Improved consistency training: the model is its own target, and N follows `state.step`."""
    process, head = model.diffusion.process, model.diffusion.head
    ladder, draw = consistency.karras_ladder(process), times.log_normal(process, -1.1, 2.0)
    metric, weight = consistency.pseudo_huber(), consistency.inverse_gap(process)

    def loss(params, state, batch, keys):
        num = consistency.curriculum(state.step, config.consistency_steps, *config.curriculum)
        objective = consistency.consistency_training(
            process, head, consistency.neighbours(ladder, draw, num), metric, weight
        )
        models = network(model, params), network(model, params)
        value, metrics = objective(*models, batch["x"], label_of(model, batch), keys)
        return value.mean(), Aux(metrics)

    return loss


def progressive_loss(model: Model) -> Callable:
    """Progressive distillation: teacher and number of steps are `state.frozen`."""
    process, head = model.diffusion.process, model.diffusion.head

    def loss(params, state, batch, keys):
        teacher = distillation.ddim_solver(process, denoiser(model, state.frozen["teacher"]))
        objective = distillation.progressive(process, head, teacher, state.frozen["num"])
        value, metrics = objective(network(model, params), batch["x"], label_of(model, batch), keys)
        return value.mean(), Aux(metrics)

    return loss


# --- Training --------------------------------------------------------------------------------------------------------

# The leaves that one kind of model depends on and the teacher, from which all begin, does not.
DISTILLED_BY = ("consistency_steps", "rungs", "huber")
TRAINED_BY = ("consistency_steps", "curriculum")
STAGED_BY = ("stage_steps", "first_student")


def digest(config: Config, own: tuple[str, ...]) -> str:
    """Of all that a model depends on: the teacher's settings, and those of its `own`."""
    others = {*DISTILLED_BY, *TRAINED_BY, *STAGED_BY} - set(own)
    return digests.digest(digests.settings(config, without=others))


def fit(
    problem: Problem,
    name: str,
    loss: Callable,
    params: Any,
    steps: int,
    frozen: Any = None,
    ema_decay: float = 0.99,
    own: tuple[str, ...] = (),
) -> Any:
    """The averaged parameters after `steps` updates of a loss, from the newest checkpoint where there is one.

    own: the leaves beside the teacher's that the model depends on.
    """
    config, devices = problem.config, mesh.make_mesh()
    optimizer = optim.make(config.optim, steps)
    fresh = mesh.place(devices, state.create(params, optimizer, jax.random.key(config.seed), frozen=frozen))
    data = Prefetch(
        loader(problem.source, config.batch_size, seed=config.seed, devices=devices.size),
        mesh.put_batch(devices, inner=config.inner > 1),
        inner=config.inner,
    )
    update = step.make_update(loss, optimizer, ema_decay=ema_decay, ema_warmup=False)
    program = mesh.compile_repeated(step.global_step(update), devices, fresh, config.inner)
    checkpoints = Checkpoints(problem.workdir / "checkpoints" / f"{name}-{digest(config, own)}", keep=1)
    try:
        return loop.fit(
            program,
            loop.resume(checkpoints, fresh, data),
            data,
            steps=steps,
            inner=config.inner,
            checkpoints=checkpoints,
            desc=name,
        ).ema
    finally:
        data.close()
        checkpoints.close()


def train(problem: Problem) -> dict[str, dict[int, Callable]]:
    """{method: {network calls: (keys, x, label) -> samples}}, all models trained."""
    config, model = problem.config, problem.model
    process = model.diffusion.process
    begin = model.init(jax.random.fold_in(jax.random.key(config.seed), 1))
    classic = denoising.make_loss(model.diffusion, model.apply, model.num_classes, 0.0)
    teacher = fit(problem, "teacher", classic, begin, config.teacher_steps)
    steps = config.consistency_steps
    # The average is the target: what is learned at a rung reaches the next after 1 / (1 - decay) steps.
    distilled = fit(
        problem, "distilled", distilled_loss(config, model), teacher, steps, teacher, ema_decay=0.9, own=DISTILLED_BY
    )
    trained = fit(problem, "trained", trained_loss(config, model), teacher, steps, own=TRAINED_BY)
    students, last, num = {}, teacher, config.first_student
    while num >= 1:
        frozen = {"teacher": last, "num": jnp.asarray(num)}
        last = fit(problem, f"student_{num}", progressive_loss(model), last, config.stage_steps, frozen, own=STAGED_BY)
        students[num], num = last, num // 2

    def walks(make, params_by_steps):
        def walk(params, num):
            grid = times.linear_grid(num)
            run = jax.jit(lambda params, *given: draw(make(process, denoiser(model, params)), problem, grid, *given))
            return lambda keys, label: run(params, keys, label)

        return {num: walk(params, num) for num, params in sorted(params_by_steps.items())}

    return {
        TEACHER: walks(samplers.ddim, dict.fromkeys((1, 2, 4, 8, 16, 32), teacher)),
        DISTILLED: walks(consistency.consistency_sampler, dict.fromkeys((1, 2, 4), distilled)),
        TRAINED: walks(consistency.consistency_sampler, dict.fromkeys((1, 2, 4), trained)),
        PROGRESSIVE: walks(samplers.ddim, students),
    }


def draw(sampler, problem: Problem, grid, keys, label):
    x = start(problem.model.diffusion.process, keys, (len(keys), *problem.model.shape), grid[0])
    return sample(sampler, keys, x, grid, label)


# --- Scores ----------------------------------------------------------------------------------------------------------


def evaluate(problem: Problem, methods: dict[str, dict[int, Callable]]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """A row for each method and number of network calls, after one for training data; and the samples by name."""
    held_out = make_source(problem.config.data, "test")
    num = min(problem.config.samples, held_out.length, problem.source.length)
    real, data = (source.fetch(np.arange(num)) for source in (held_out, problem.source))
    points = to_unit(real["x"]).reshape(num, -1)
    radius = precision_recall.radii(points, k=3)

    def row(name: str, calls: int, x: np.ndarray) -> dict:
        x = x.reshape(num, -1)
        distance = sliced_wasserstein(x, points, directions=256)
        precision = precision_recall.covered(x, points, radius)
        return {"method": name, "calls": calls, "distance": distance, "precision": precision}

    keys = jax.random.split(jax.random.key(problem.config.seed + 1), num)
    samples = {"data": to_unit(data["x"])}
    rows = [row("data", 0, samples["data"])]
    for name, walks in methods.items():
        for calls, walk in walks.items():
            x = samples[f"{name}, {calls}"] = np.asarray(walk(keys, label_of(problem.model, real)))
            rows.append(row(name, calls, x))
    return rows, samples


def table(rows: list[dict], num: int) -> str:
    """Markdown: methods down, network calls across."""
    calls = sorted({row["calls"] for row in rows} - {0})
    cells = {(row["method"], row["calls"]): f"{row['distance']:.4f} ({row['precision']:.0%})" for row in rows}
    lines = [f"| network calls | {' | '.join(map(str, calls))} |", "|---" * (len(calls) + 1) + "|"]
    for name in dict.fromkeys(row["method"] for row in rows[1:]):
        lines.append(f"| {name} | {' | '.join(cells.get((name, n), '') for n in calls)} |")
    return "\n".join(lines) + (
        f"\n\nSliced Wasserstein distance (and precision) of {num} samples to held-out data; training data: "
        f"{cells['data', 0]}.\n"
    )


def draw_samples(problem: Problem, samples: dict[str, np.ndarray]) -> None:
    """Methods down, 1, 2 and 4 network calls across; the data first."""
    path, columns = problem.workdir / "samples.png", (1, 2, 4)
    rows = [["data"] * 3] + [[f"{name}, {n}" for n in columns] for name in (TEACHER, DISTILLED, TRAINED, PROGRESSIVE)]
    if len(problem.model.shape) == 3:
        blocks = [np.concatenate([samples[name][5 * i : 5 * i + 5] for i, name in enumerate(row)]) for row in rows]
        names = ["data", *(f"{row[0].rpartition(',')[0]}: 1, 2, 4" for row in rows[1:])]
        grids.save_png(path, grids.label_rows(grids.image_grid(np.concatenate(blocks), 15), names))
        return
    figure, axes = plots.panels(len(rows), len(columns), 2.2, 2.3, sharex=True, sharey=True)
    for panel, name in zip(axes.flat, [name for row in rows for name in row], strict=True):
        panel.scatter(*samples[name][:4000].T, s=1, linewidths=0, alpha=0.5, color=plots.COLOURS[0])
        panel.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        panel.set_title(name, fontsize=8)
    plots.save(path, figure)


def check(config: Config) -> None:
    """Raises UserError for what would fail only after the teacher's training."""
    first = config.first_student
    if first & (first - 1):
        raise UserError(f"first_student={first}: choose a power of 2")
    if len(config.curriculum) != 2 or config.curriculum[0] > config.curriculum[1]:
        raise UserError(f"curriculum={config.curriculum}: choose two numbers of rungs, the smaller first")
    for name, steps in (
        ("teacher_steps", config.teacher_steps),
        ("consistency_steps", config.consistency_steps),
        ("stage_steps", config.stage_steps),
    ):
        if steps % config.inner:
            raise UserError(f"{name}={steps}: choose a multiple of inner={config.inner}")
        optim.make(config.optim, steps)


def main(config: Config, run: config_lib.Run) -> None:
    check(config)
    source = make_source(config.data)
    problem = Problem(config, source, build(config, source), run.workdir)
    rows, samples = evaluate(problem, train(problem))
    text = table(rows, len(samples["data"]))
    results.save(run.workdir / "results.json", rows)
    (run.workdir / "table.md").write_text(text)
    names = dict.fromkeys(row["method"] for row in rows[1:])
    lines = {name: np.array([(r["calls"], r["distance"]) for r in rows if r["method"] == name]).T for name in names}
    calls = [row["calls"] for row in rows[1:]]
    lines["data"] = np.array([[1, max(calls)], [rows[0]["distance"]] * 2])
    plots.curves(
        run.workdir / "quality.png", {name: tuple(line) for name, line in lines.items()}, "network calls",
        "sliced Wasserstein distance", title=source.name, log_x=True, log_y=True, markers=True,
    )  # fmt: skip
    draw_samples(problem, samples)
    print(text)
    print(f"everything lies in {run.workdir}")


PRESETS = {"checkerboard": Config, "digits": digits}

if __name__ == "__main__":
    config_lib.run(main, PRESETS)
