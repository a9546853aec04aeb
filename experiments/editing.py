"""Editing with a diffusion prior: in-painting, super-resolution, deblurring, SDEdit; one unconditional model for all.

    python -m experiments.editing                                # digits: four minutes on two CPU cores
    python -m experiments.editing --config.model=WORKDIR         # with the model of an experiments.ddpm run
    python -m experiments.editing --preset=faces --config.base.data.dir=olivetti_64x64.npz \\
        --config.lpips_weights=lpips_v0.1_alexnet_flax_hwio.npz  # 64x64 faces, on a GPU

Held-out images lose pixels in four ways, are made smaller, or blurred under noise, and are restored by replacement
(Song et al., 2021), RePaint (Lugmayr et al., 2022), DDNM (Wang et al., 2023), PiGDM (Song et al., 2023) and DPS (Chung
et al., 2023).  SDEdit (Meng et al., 2022) makes images of crude collages, from several start times.

Ends with table.md and results.json (PSNR where nothing was known, misfit |A x - y|, the share of restored images that
a classifier of real ones still recognises, LPIPS, network calls and time) and with one picture a task.  On digits PiGDM
is the best or within the error of it, RePaint beats replacement at several times its calls, and SDEdit's collages come
nearer to real images, and farther from themselves, as the start time rises.  A second run of the same command restores
anew with the model that it finds; one with another config (--accept_changes) takes only a model that was made with it.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrl import config as config_lib
from diffrl.data.catalog import DataConfig, make_source
from diffrl.data.source import Source
from diffrl.diffusion import constraints, guidance, operators, samplers, times
from diffrl.diffusion.operators import Operator
from diffrl.diffusion.sampling import fold, normal, sample, sample_keys
from diffrl.errors import UserError
from diffrl.evaluate import frechet, grids, judges, lpips
from diffrl.pretrained import lpips_alexnet
from diffrl.recipes import denoising, digests, images, judging, restoration, scores
from diffrl.recipes import results as results_lib
from diffrl.recipes.images import EvalConfig, ImageConfig, Session
from diffrl.recipes.networks import UNetConfig
from diffrl.recipes.restoration import RestorationConfig
from diffrl.recipes.training import TrainConfig
from diffrl.train.mesh import init_distributed
from diffrl.train.optim import OptimConfig

# What a sample's key is folded with for the noise of its measurement: no step's number, nor a purpose of `sampling`'s.
NOISE = np.uint32(2**32 - 101)


@dataclasses.dataclass
class Config:
    """The model, what is done to the images, and how it is undone."""

    base: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    restoration: RestorationConfig = dataclasses.field(default_factory=RestorationConfig)
    model: str = config_lib.leaf("", "workdir of a trained experiments.ddpm run; empty trains `base`", free=True)
    lpips_weights: tuple[str, ...] = config_lib.leaf(
        (), "the .npz of LPIPS with its AlexNet, or one of each; none leaves LPIPS out", free=True
    )
    tasks: tuple[str, ...] = config_lib.leaf((), "only these; all if empty", free=True)
    methods: tuple[str, ...] = config_lib.leaf((), "only these; all if empty", free=True)
    count: int = config_lib.leaf(48, "held-out images", free=True, at_least=2)
    columns: int = config_lib.leaf(10, "images in a picture", free=True, at_least=1)
    factor: int = config_lib.leaf(2, "super-resolution: how much smaller", free=True, at_least=2)
    blur: float = config_lib.leaf(0.8, "deblurring: standard deviation in pixels", free=True, above=0)
    noise: float = config_lib.leaf(
        0.05, "deblurring: standard deviation of the noise on the blurred image", free=True, at_least=0
    )
    collages: int = config_lib.leaf(355, "held-out images that SDEdit's collages are made of", free=True, at_least=2)
    strengths: tuple[float, ...] = config_lib.leaf(
        (0.2, 0.4, 0.6, 0.8), "SDEdit's start times, between 0 (data) and 1 (noise)", free=True, above=0, below=1
    )
    seed: int = config_lib.leaf(0, "of masks and samples", free=True, at_least=0)


def digits() -> Config:
    """8x8 digits on a CPU."""
    base = images.digits_config()
    base.conditional = False
    base.train = dataclasses.replace(base.train, steps=600, sample_every=0)
    return Config(base, RestorationConfig(steps=40))


def faces() -> Config:
    """The Olivetti faces, 400 of 64x64, on a GPU; every tenth is held out."""
    base = ImageConfig(
        conditional=False,
        data=DataConfig(name="npz", flip=True),
        unet=UNetConfig(channels=64, multipliers=(1, 2, 3), blocks=2, attention=(16,), dropout=0.1, dtype="bfloat16"),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=500, schedule="cosine"),
        train=TrainConfig(steps=10_000, batch_size=64, ema_decay=0.999, sample_every=2000),
        eval=EvalConfig(judge="none"),
    )
    restore = RestorationConfig(steps=200, jump=10, resample=10)
    return Config(base, restore, count=40, columns=6, factor=4, blur=2.0)


PRESETS = {"digits": digits, "faces": faces}


def main(config: Config, run: config_lib.Run) -> None:
    # Whatever the end needs is checked before the training, not after it.
    session, held_out = open_model(config, run)
    check(config, session)
    perceptual = None
    if config.lpips_weights:
        apply, weights = lpips_alexnet.load(*config.lpips_weights)
        jax.eval_shape(apply, weights, np.zeros((1, *session.model.shape)))

        def perceptual(a, b):
            return lpips.measure(apply, weights, a, b)

    params = (images.restored_state if config.model else images.train)(session).ema
    judge = judging.make_judge(session, held_out)
    bench = Bench(session, params, *judging.spread(held_out, config.count), judge, perceptual)
    collages = bench._replace(originals=judging.spread(held_out, config.collages)[0])
    results = {
        "restoration": restore_all(config, bench, run.workdir),
        "sdedit": edit_all(config, collages, run.workdir),
    }
    results_lib.save(run.workdir / "results.json", results)
    text = table(bench, **results)
    (run.workdir / "table.md").write_text(text)
    print(text)
    print(f"everything lies in {run.workdir}")


def open_model(config: Config, run: config_lib.Run) -> tuple[Session, Source]:
    """The model's session and images that it has not seen: the test split, or else every tenth."""
    if config.model:
        session = images.open_trained(config.model)
    else:
        # The split, too: where there is none of that name, the model does not see every tenth image.
        made_by = images.trained_by(config.base) | {"split": config.base.eval.split}
        session = images.open_session(config.base, digests.own_folder(run, "model", made_by))
    try:
        return session, make_source(session.config.data, session.config.eval.split)
    except UserError as error:
        if config.model:
            raise UserError(f"no images that {config.model} has not seen: {error}") from error
    held_out = np.arange(session.source.length) % 10 == 9
    return session._replace(source=_subset(session.source, ~held_out)), _subset(session.source, held_out)


def _subset(source: Source, chosen: np.ndarray) -> Source:
    rows = np.flatnonzero(chosen)
    return source._replace(length=len(rows), fetch=lambda indices: source.fetch(rows[indices]))


def check(config: Config, session: Session) -> None:
    """Raises UserError for what could not be done with the trained model."""
    scores.check(session.config.eval, session.source)
    tasks(config, session.model.shape)
    restoration_methods(config, session)


# --- What is done to the images --------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A measurement of images.  operator: made of the mask, which only in-painting has."""

    name: str
    operator: Callable[[Any], Operator]
    mask: np.ndarray | None = None
    noise: float = 0.0


def tasks(config: Config, shape: tuple[int, ...]) -> list[Task]:
    """Those that `config.tasks` names, or all; raises UserError where the images' size does not divide."""
    height, width, channels = shape
    whole = height, width, channels
    row, column = np.indices((height, width))
    middle = (abs(2 * row - height + 1) < height / 2) & (abs(2 * column - width + 1) < width / 2)
    scattered = np.random.default_rng(config.seed).random((height, width)) < 0.3
    known = {
        "right half hidden": column < width // 2,
        "middle hidden": ~middle,
        "7 pixels in 10 hidden": scattered,
        "every other row hidden": row % 2 == 0,
    }
    smaller, blurred = operators.downsample(whole, config.factor), operators.blur(whole, config.blur, "reflect")
    every = [
        *(Task(name, lambda m: operators.mask(m, shape), mask[..., None]) for name, mask in known.items()),
        Task(f"{config.factor} times smaller", lambda _: smaller),
        Task("blurred under noise", lambda _: blurred, noise=config.noise),
    ]
    return list(_only("tasks", config.tasks, {task.name: task for task in every}).values())


# --- How it is undone, and how well ----------------------------------------------------------------------------------


class Bench(NamedTuple):
    """A trained model, and what its work is compared with."""

    session: Session
    params: Any
    originals: np.ndarray  # [N, H, W, C] in [-1, 1]
    labels: np.ndarray | None
    judge: judges.Judge | None
    perceptual: Callable[[np.ndarray, np.ndarray], np.ndarray] | None  # LPIPS, [N]


def restoration_methods(config: Config, session: Session) -> dict[str, restoration.Method]:
    """Those that `config.methods` names, or all, on a linear grid."""
    diffusion = session.model.diffusion
    settings = dataclasses.replace(session.config.sample, steps=config.restoration.steps, grid="linear")
    grid = denoising.make_grid(diffusion, settings, session.config.diffusion.table_steps)
    every = restoration.methods(config.restoration, diffusion.process, grid)
    return _only("methods", config.methods, every)


def _only(what: str, names: tuple[str, ...], every: dict[str, Any]) -> dict[str, Any]:
    return {name: denoising.choose(what, name, every) for name in names or every}


def restore_all(config: Config, bench: Bench, workdir: pathlib.Path) -> list[dict]:
    """Every task by every method that can, with a picture a task."""
    model, results = bench.session.model, []
    keys = sample_keys(jax.random.key(config.seed), len(bench.originals))
    programs: dict[tuple[str, str], Any] = {}
    for task in tasks(config, model.shape):
        operator = task.operator(task.mask)
        y = operator.forward(jnp.asarray(bench.originals))
        y = y + task.noise * normal(fold(keys, NOISE), y)
        rows = {"pseudo-inverse": np.asarray(operators.pseudo_inverse(operator, y))}
        results.append(
            {"task": task.name, "method": "pseudo-inverse", **quality(bench, task, y, rows["pseudo-inverse"])}
        )
        for name, method in restoration_methods(config, bench.session).items():
            if method.inpaints and task.mask is None:
                continue
            print(f"{task.name}: {name}", file=sys.stderr)
            arguments = (bench.params, keys, y, task.mask)
            program = (name, task.name if task.mask is None else "mask")
            if program not in programs:
                restore = restoration.restorer(model, method, task.operator, task.noise)
                programs[program] = restore.lower(*arguments).compile()
            began = time.perf_counter()
            rows[name] = np.asarray(programs[program](*arguments))
            cost = {
                "seconds": time.perf_counter() - began,
                "calls": int((np.diff(method.grid) < 0).sum()),
                "gradients": method.gradients,
            }
            results.append({"task": task.name, "method": name, **quality(bench, task, y, rows[name]), **cost})
        save_rows(workdir / f"{task.name.replace(' ', '_')}.png", {"original": bench.originals, **rows}, config.columns)
    return results


def quality(bench: Bench, task: Task, y: jax.Array, restored: np.ndarray) -> dict[str, float]:
    """The numbers of one restoration."""
    where = np.broadcast_to(True if task.mask is None else ~task.mask, restored.shape)
    square = ((restored - bench.originals) ** 2).mean(axis=(1, 2, 3), where=where)
    psnr = 10.0 * np.log10(4.0 / np.maximum(square, 1e-10))  # of the range [-1, 1]
    misfit = np.asarray(task.operator(task.mask).forward(jnp.asarray(restored)) - y)
    found = {
        "psnr": float(psnr.mean()),
        "psnr_stderr": float(psnr.std() / np.sqrt(len(psnr))),
        "misfit": float(np.sqrt((misfit**2).mean())),
    }
    if bench.judge is not None:
        found["recognised"] = judges.agreement(bench.judge, restored, bench.labels)
    if bench.perceptual is not None:
        found["lpips"] = float(bench.perceptual(restored, bench.originals).mean())
    return found


def edit_all(config: Config, bench: Bench, workdir: pathlib.Path) -> list[dict]:
    """SDEdit of collages, the left half of one image beside the right half of the next."""
    model, originals = bench.session.model, bench.originals
    process, half = model.diffusion.process, originals.shape[2] // 2
    collage = np.concatenate([originals[:, :, :half], np.roll(originals, -1, axis=0)[:, :, half:]], axis=2)
    keys = sample_keys(jax.random.key(config.seed), len(collage))

    @jax.jit
    def edit(params, t):
        x = constraints.sdedit_start(process, keys, jnp.asarray(collage), t)
        sampler = samplers.ancestral(process, guidance.clip(restoration.unconditional(model, params)))
        return jnp.clip(sample(sampler, keys, x, times.linear_grid(config.restoration.steps, t)), -1.0, 1.0)

    rows = {"collage": collage} | {f"t = {t:g}": np.asarray(edit(bench.params, t)) for t in config.strengths}
    save_rows(workdir / "sdedit.png", rows, config.columns)
    results: list[dict] = [
        {"start": name, "distance": float(np.sqrt(((x - collage) ** 2).mean()))} for name, x in rows.items()
    ]
    if bench.judge is not None:
        features, real = bench.judge.features, judging.moments(bench.judge, bench.session.source)
        results.append({"start": "held-out images"})
        for result, x in zip(results, [*rows.values(), originals], strict=True):
            result["frechet"] = frechet.frechet_distance(frechet.moments(features, [x]), real)
    return results


def save_rows(path: pathlib.Path, rows: dict[str, np.ndarray], columns: int) -> None:
    """A picture with one row of images per name."""
    columns = min(columns, min(len(x) for x in rows.values()))
    picture = grids.image_grid(np.concatenate([x[:columns] for x in rows.values()]), columns)
    grids.save_png(path, grids.label_rows(picture, list(rows)))


def table(bench: Bench, restoration: list[dict], sdedit: list[dict]) -> str:
    """Both tables in Markdown."""
    judge = bench.judge.name if bench.judge is not None else "no judge"
    lines = [
        f"| images | method | PSNR, dB | misfit | recognised ({judge}) | LPIPS | network calls | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in restoration:
        calls = f"{row['calls']}{' with gradient' if row['gradients'] else ''}" if "calls" in row else ""
        lines.append(
            f"| {row['task']} | {row['method']} | {row['psnr']:.1f} ± {row['psnr_stderr']:.1f} | {row['misfit']:.3f} "
            f"| {_number(row, 'recognised', '.0%')} | {_number(row, 'lpips', '.3f')} | {calls} "
            f"| {_number(row, 'seconds', '.1f')} |"
        )
    lines += ["", f"| SDEdit from | distance to the collage | FD ({judge}) |", "|---|---|---|"]
    for row in sdedit:
        lines.append(f"| {row['start']} | {_number(row, 'distance', '.3f')} | {_number(row, 'frechet', '.2f')} |")
    note = f"{len(bench.originals)} held-out images; PSNR over the pixels that were not known, ± its standard error."
    if bench.perceptual is None:
        note += "  No LPIPS: --config.lpips_weights names no file."
    return "\n".join([*lines, "", note]) + "\n"


def _number(row: dict, name: str, style: str) -> str:
    return format(row[name], style) if name in row else ""


if __name__ == "__main__":
    config_lib.run(main, PRESETS, setup=init_distributed)
