"""The modes of an experiment that is a diffusion model of images: train, sample, eval."""

import math
from typing import Any

import jax
import numpy as np

from diffrl.config import Run
from diffrl.data.source import Source
from diffrl.evaluate import grids
from diffrl.recipes import bits, images, judging, results, scores
from diffrl.recipes.images import ImageConfig
from diffrl.train.state import TrainState

COLUMNS, ROWS = 10, 20  # of the picture of --mode=sample, at most


def main(config: ImageConfig, run: Run) -> None:
    """What every mode of an image experiment does."""
    session = images.open_session(config, run)
    {"train": train, "sample": sample, "eval": evaluate}[run.mode](session)
    print(f"everything lies in {run.workdir}")


def train(session: images.Session) -> None:
    """Trains, draws the final grid and scores it."""
    # Whatever the end needs is checked before the training, not after it.
    scores.check(session.config.eval, session.source)
    images.check_averages(session.config)
    held_out = judging.held_out_source(session)
    key = jax.random.key(session.config.sample.seed)
    generate = session.generator(key)
    current = images.train(session)
    labels, num = images.class_labels(session.model, COLUMNS)
    made = generate(images.averaged(session, current), labels, num)
    grids.save_png(session.workdir / "samples.png", images.labelled_grid(session, made, labels, COLUMNS))
    images.plot_loss(session)
    score(session, current, held_out, bound=False)


def sample(session: images.Session) -> None:
    """Draws images with the newest checkpoint's averaged parameters."""
    current = images.restored_state(session)
    count, classes = session.config.sample.count, session.model.num_classes
    labels = None if classes is None else np.sort(np.resize(np.arange(classes, dtype=np.int32), count))
    key = jax.random.key(session.config.sample.seed)
    made = session.generator(key)(images.averaged(session, current), labels, count)
    shown = pictured(labels, count)
    picture = images.labelled_grid(session, made[shown], None if labels is None else labels[shown], min(COLUMNS, count))
    grids.save_png(session.workdir / "samples.png", picture)
    if jax.process_index() == 0:
        given: Any = {} if labels is None else {"label": labels}
        np.savez_compressed(session.workdir / "samples.npz", x=grids.to_uint8(made), **given)
    print(f"{count} samples of step {int(current.step)}: samples.npz, and {shown.sum()} of them in samples.png")


def pictured(labels: np.ndarray | None, count: int) -> np.ndarray:
    """Which of `count` samples a picture has room for, bool [count]; labels, if there are any, rise."""
    if labels is None:
        return np.arange(count) < ROWS * COLUMNS
    return (labels < ROWS) & (np.arange(count) - np.searchsorted(labels, labels) < COLUMNS)


def evaluate(session: images.Session) -> None:
    """Scores the newest checkpoint, bits/dim included."""
    held_out = judging.held_out_source(session)
    score(session, images.restored_state(session), held_out, bound=True)


def score(session: images.Session, current: TrainState, held_out: Source | None, bound: bool) -> None:
    """Measures, prints and writes eval.json, beside what it holds of the same step already."""
    if held_out is None:
        return
    params = images.averaged(session, current)
    measured = {"step": int(current.step), **scores.judge_samples(session, params, held_out)}
    if bound and session.codec is None:  # latents have a density of their own, which says nothing about pixels
        measured |= bits.variational_bound(session, params, held_out)
        measured |= bits.exact(session, params, held_out)
    if jax.process_index() == 0:
        path = session.workdir / "eval.json"
        before = results.load(path, {})
        known = before if before.get("step") == measured["step"] else {}
        results.save(path, known | {name: _finite(value) for name, value in measured.items()})
    print(scores.report(measured))


def _finite(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
