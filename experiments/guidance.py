"""Guidance: what each kind of it buys in fidelity, and what it pays in diversity.

    python -m experiments.guidance                            # handwritten digits: minutes on two CPU cores
    python -m experiments.guidance --preset=cifar10 --config.model.data.dir=DIR --config.model.eval.judge_weights=NPZ

Trains a class-conditional model, a weaker one and a classifier of noisy images, then sweeps the scale of

    classifier-free   Ho & Salimans, 2022                     autoguidance   Karras et al., 2024
    interval          Kynkaanniemi et al., 2024               classifier     Dhariwal & Nichol, 2021
    rescale           Lin et al., 2024                        through x0     Bansal et al., 2023
    APG               Sadat et al., 2025

Every point is judged by a classifier of real images: the share recognised as their class, precision and recall
(Kynkaanniemi et al., 2019) and the Fréchet distance on its features; and in pixels, relative to held-out images, by the
spread within a class and the contrast (standard deviation of all pixels).  All curves start at the conditional model,
which the classifier guides too (ADM's best setting): what they show is where each goes from there.

Expected on digits at scale 1.5: precision rises from 0.93 to 0.97 or more; recall falls from 0.84 to 0.66 with
classifier-free guidance, to 0.73 in an interval or with APG, and to 0.77 with autoguidance (`--config.sets=3`).

Ends with tradeoff.png, table.md, results.json and sweep-DIGEST/samples/METHOD.png (one row per scale, the same noise in
all).  A second run of the same command takes up the training, or the method, it was at; one with another config
(--accept_changes) uses only those networks and scores that were made with it.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffrl import config as config_lib
from diffrl.data.catalog import DataConfig
from diffrl.diffusion import classifier_guidance, guidance
from diffrl.diffusion.process import Process
from diffrl.diffusion.sampling import Sampler
from diffrl.errors import UserError
from diffrl.evaluate import grids, plots
from diffrl.recipes import denoising, digests, fidelity, images, judging, noisy_classifier, scores
from diffrl.recipes import results as results_lib
from diffrl.recipes.denoising import DiffusionConfig, SampleConfig
from diffrl.recipes.fidelity import Ruler
from diffrl.recipes.images import EvalConfig, ImageConfig, Session
from diffrl.recipes.networks import UNetConfig
from diffrl.recipes.noisy_classifier import ClassifierConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import init_distributed
from diffrl.train.optim import OptimConfig

PICTURED = 20  # samples of each scale in a method's picture
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which the noisy classifier's accuracy is reported


@dataclasses.dataclass
class Config:
    """The models, the scales that are swept, and what the methods have beside a scale."""

    model: ImageConfig = dataclasses.field(default_factory=images.digits_config)
    weak_channels: int = config_lib.leaf(8, "width of autoguidance's weaker network", at_least=1)
    weak_steps: int = config_lib.leaf(100, "and its updates", at_least=1)
    classifier: ClassifierConfig = dataclasses.field(default_factory=ClassifierConfig)
    methods: tuple[str, ...] = config_lib.leaf((), "only these; all if empty", free=True)
    scales: tuple[float, ...] = config_lib.leaf(
        (1.0, 1.5, 2.0, 3.0, 5.0), "1 is the plain conditional model", at_least=0
    )
    classifier_scales: tuple[float, ...] = config_lib.leaf(
        (0.0, 1.0, 3.0, 8.0), "of classifier and through x0: 0 is the plain conditional model", at_least=0
    )
    low: float = config_lib.leaf(-2.0, "interval: the least log SNR that is guided")
    high: float = config_lib.leaf(3.0, "interval: the log SNR from which on nothing is guided")
    phi: float = config_lib.leaf(
        0.7, "rescale: the share brought to the conditional estimate's standard deviation", at_least=0, at_most=1
    )
    eta: float = config_lib.leaf(0.0, "APG: what is kept along the conditional estimate", at_least=0, at_most=1)
    radius: float = config_lib.leaf(2.5, "APG: the longest difference of the two estimates", above=0)
    beta: float = config_lib.leaf(-0.5, "APG: momentum", above=-1, below=1)
    sets: int = config_lib.leaf(
        1, "sets of model.eval.samples images (or as many as are held out) that a point is the mean of", at_least=1
    )


def digits() -> Config:
    """8x8 digits on a CPU."""
    config = Config()
    config.model.unet.channels = 16  # small enough to sweep, and to leave guidance something to do
    config.model.train = TrainConfig(steps=600, ema_decay=0.99, sample_every=0, checkpoint_every=200)
    config.model.sample = SampleConfig(steps=16, batch=355)
    return config


def cifar10() -> Config:
    """CIFAR-10 with EDM's preconditioning and grid, on one modern GPU: an hour or two."""
    model = ImageConfig(
        data=DataConfig(name="cifar10", flip=True),
        unet=UNetConfig(head_dim=64, scale_shift=True, dropout=0.1, dtype="bfloat16"),
        diffusion=DiffusionConfig(process="ve", prediction="edm", times="log_normal", weight="edm"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1000, schedule="cosine"),
        train=TrainConfig(steps=16_000, batch_size=512, inner=10, ema_decay=0.9995, sample_every=0),
        sample=SampleConfig(steps=32, grid="karras", batch=1000),
        eval=EvalConfig(judge="resnet", samples=5000),
    )
    classifier = ClassifierConfig(64, (1, 2, 2), blocks=2, groups=32, steps=8000)
    return Config(model, weak_channels=64, weak_steps=2000, classifier=classifier, radius=20.0)


# --- The methods -----------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What the methods are made of: denoisers with labels, and `make`, which turns a denoiser into a sampler."""

    config: Config
    process: Process
    make: Callable
    denoise: Callable
    weak: Callable
    log_prob: Callable  # of the noisy classifier
    null: int


def classifier_free(parts: Parts, scale: Any, combine: Callable = guidance.linear) -> Sampler:
    return parts.make(guidance.classifier_free(parts.denoise, scale, parts.null, combine))


def interval(parts: Parts, scale: jax.Array) -> Sampler:
    return classifier_free(parts, guidance.interval(parts.process, scale, parts.config.low, parts.config.high))


def rescale(parts: Parts, scale: jax.Array) -> Sampler:
    return classifier_free(parts, scale, guidance.rescale(parts.config.phi))


def apg(parts: Parts, scale: jax.Array) -> Sampler:
    pair = guidance.against_null(parts.denoise, parts.null)
    combine = guidance.project(parts.config.eta, parts.config.radius)
    return guidance.momentum(parts.make, pair, scale, combine, parts.config.beta)


def autoguidance(parts: Parts, scale: jax.Array) -> Sampler:
    return parts.make(guidance.autoguidance(parts.denoise, parts.weak, scale))


def classifier(parts: Parts, scale: jax.Array) -> Sampler:
    return parts.make(classifier_guidance.classifier(parts.process, parts.denoise, parts.log_prob, scale))


def through_x0(parts: Parts, scale: jax.Array) -> Sampler:
    """The same classifier, but of the estimate of x_0, at t = 0."""

    def log_prob(x0, t, label):
        return parts.log_prob(x0, jnp.zeros_like(t), label)

    return parts.make(classifier_guidance.through_x0(parts.process, parts.denoise, log_prob, scale))


METHODS = {
    "classifier-free": classifier_free,
    "interval": interval,
    "rescale": rescale,
    "APG": apg,
    "autoguidance": autoguidance,
    "classifier": classifier,
    "through x0": through_x0,
}
LIKELIHOODS = ("classifier", "through x0")


# --- The sweep -------------------------------------------------------------------------------------------------------


class Sessions(NamedTuple):
    """The three networks."""

    model: Session
    weak: Session
    classifier: Session


def open_sessions(config: Config, run: config_lib.Run) -> Sessions:
    """Each in a folder of its own, where it resumes by itself."""
    weak = copy.deepcopy(config.model)
    weak.unet.channels, weak.train.steps = config.weak_channels, config.weak_steps
    folder = functools.partial(digests.own_folder, run)
    classifier_folder = folder("classifier", noisy_classifier.trained_by(config.classifier, config.model))
    return Sessions(
        images.open_session(config.model, folder("model", images.trained_by(config.model))),
        images.open_session(weak, folder("weak", images.trained_by(weak))),
        noisy_classifier.open_session(config.classifier, config.model, classifier_folder),
    )


def make_generator(config: Config, sessions: Sessions, method: Callable, classes: int) -> Callable:
    """(params of the three networks, scale, labels [N]) -> images [N, H, W, C], of the same noise for every scale.

    The scale is an argument of the compiled program: a sweep compiles once.
    """
    model, devices, settings = sessions.model.model, sessions.model.devices, config.model.sample
    grid = denoising.make_grid(model.diffusion, settings, config.model.diffusion.table_steps)
    key = jax.random.key(settings.seed)

    @jax.jit
    def chunk(params, part, scale):
        parts = Parts(
            config,
            model.diffusion.process,
            lambda denoise: denoising.make_sampler(model.diffusion, settings, denoise, None),
            denoising.make_denoiser(model.diffusion, model.apply, params.model),
            denoising.make_denoiser(model.diffusion, sessions.weak.model.apply, params.weak),
            classifier_guidance.label_log_prob(
                lambda x, t: noisy_classifier.logits(sessions.classifier, params.classifier, x, t)
            ),
            classes,
        )
        sampler = method(parts, scale)
        return denoising.draw(sampler, model.diffusion, grid, key, part["id"], model.shape, part["label"])

    def generate(params, scale, labels):
        return denoising.in_chunks(
            lambda part: chunk(params, part, np.float32(scale)), labels, len(labels), settings.batch, devices
        )

    return generate


def sweep(config: Config, name: str, generate: Callable, classes: int, ruler: Ruler, run: config_lib.Run) -> list[dict]:
    """A row of mean scores for each scale of one method, and its picture."""
    rows, strips = [], []
    scales = config.classifier_scales if name in LIKELIHOODS else config.scales
    labels = np.resize(np.arange(classes, dtype=np.int32), ruler.num * config.sets)
    for scale in tqdm(scales, desc=name, unit="scale", leave=False):
        made = generate(scale, labels)
        rows.append({"scale": scale, **ruler.measure(made, labels)})
        strips.append(made[:PICTURED])
    picture = grids.image_grid(np.concatenate(strips), len(strips[0]))
    path = run.workdir / "samples" / f"{name.replace(' ', '_')}.png"
    grids.save_png(path, grids.label_rows(picture, [f"{scale:g}" for scale in scales]))
    return rows


def check(config: Config) -> None:
    """Raises UserError for what would fail only after the training, or silently mean something else."""
    noisy = config.classifier
    for name, value, good, remedy in (
        ("scales", config.scales, config.scales, "at least one scale"),
        ("classifier_scales", config.classifier_scales, config.classifier_scales, "at least one scale"),
        ("low", config.low, config.low < config.high, f"a value below high={config.high}"),
        ("classifier.multipliers", noisy.multipliers, noisy.multipliers, "one for each level"),
    ):
        if not good:
            raise UserError(f"--config.{name}={value}: expected {remedy}")
    if noisy.channels * noisy.multipliers[-1] % noisy.heads:
        width = noisy.channels * noisy.multipliers[-1]
        raise UserError(f"--config.classifier.heads={noisy.heads}: expected a divisor of the last level's {width}")


def measured_by(config: Config) -> dict:
    """What the scores depend on: of the free leaves, on how long the model is trained, sampled from and judged."""
    model = config.model
    free = {"steps": model.train.steps, "sample": dataclasses.asdict(model.sample)}
    return digests.settings(config) | free | {"eval": dataclasses.asdict(model.eval)}


def main(config: Config, run: config_lib.Run) -> None:
    # Whatever the end needs is checked before the training, not after it.
    check(config)
    chosen = {name: denoising.choose("methods", name, METHODS) for name in config.methods or METHODS}
    scores.check(config.model.eval)
    sessions = open_sessions(config, run)
    for session in sessions:
        jax.eval_shape(session.model.init, jax.random.key(0))  # finds groups that do not divide a width
    classes = sessions.model.model.num_classes
    if classes is None or config.model.diffusion.learned_variance:
        raise UserError("the methods compare estimates of x_0 given a label: use labelled data and no learned variance")
    held_out = judging.held_out_source(sessions.model)
    if held_out is None:
        raise UserError(f"{config.model.data.name} has no {config.model.eval.split!r}: set --config.model.eval.split")
    ruler, real = fidelity.make_ruler(sessions.model, held_out)
    generators = {name: make_generator(config, sessions, method, classes) for name, method in chosen.items()}
    params = Sessions(*(images.train(session).ema for session in sessions))

    measured = digests.own_folder(run, "sweep", measured_by(config))
    path = measured.workdir / "results.json"
    results = results_lib.load(path, {})
    if not results:
        path.parent.mkdir(parents=True, exist_ok=True)
        x, labels = fidelity.labelled(held_out, held_out.length)
        known = noisy_classifier.accuracies(sessions.classifier, params.classifier, x, labels, TIMES)
        settings = {**config_lib.to_dict(config), "methods": None}
        results = {"settings": settings, "real": real, "classifier_accuracy": known, "methods": {}}
    for name in [name for name in generators if name not in results["methods"]]:
        rows = sweep(config, name, functools.partial(generators[name], params), classes, ruler, measured)
        results["methods"][name] = rows
        results_lib.save(path, results)
    results_lib.save(run.workdir / "results.json", results)
    report(results, list(chosen), ruler.judge.name, run)


def report(results: dict, names: list[str], judge: str, run: config_lib.Run) -> None:
    """The plot and the table."""
    rows = {name: results["methods"][name] for name in names}
    real = {"scale": np.nan, **results["real"]}
    curves = {
        name: ([row["recall"] for row in points], [row["precision"] for row in points])
        for name, points in [*rows.items(), ("held-out images", [real])]
    }
    axes = (f"recall on features of {judge} (diversity)", "precision (fidelity)")
    title = "What guidance trades, from the plain model (right) to the largest scale"
    plots.curves(run.workdir / "tradeoff.png", curves, *axes, title=title, markers=True)
    points = [("held-out images", real), *((name, row) for name in names for row in rows[name])]
    accuracy = [f"{value:.0%} at t = {t}" for t, value in zip(TIMES, results["classifier_accuracy"], strict=True)]
    text = f"{table(points, judge)}\nNoisy classifier on held-out images: {', '.join(accuracy)}.\n"
    (run.workdir / "table.md").write_text(text)
    print(text)
    print(f"everything lies in {run.workdir}")


def table(rows: list[tuple[str, dict]], judge: str) -> str:
    """A Markdown table."""
    lines = [
        f"| method | scale | recognised | precision | recall | FD-{judge} | spread | contrast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows:
        scale = "" if np.isnan(row["scale"]) else f"{row['scale']:g}"
        lines.append(
            f"| {name} | {scale} | {row['recognised']:.1%} | {row['precision']:.3f} | {row['recall']:.3f} "
            f"| {row['frechet']:.2f} | {row['spread']:.3f} | {row['contrast']:.3f} |"
        )
    return "\n".join(lines) + "\n"


PRESETS = {"digits": digits, "cifar10": cifar10}

if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
