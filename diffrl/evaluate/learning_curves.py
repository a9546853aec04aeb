"""Learning curves over a few seeds: interquartile means and bootstrapped intervals (Agarwal et al., arXiv:2108.13264).

A mean over five runs follows its one failure and a median forgets three runs; the interquartile mean drops the best
and the worst quarter and averages what is left.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from diffrl.evaluate import plots


class Curve(NamedTuple):
    """Scores [P, S] of S seeds at P points, `steps` [P] of the environment."""

    steps: Any
    scores: Any


class Estimate(NamedTuple):
    """The interquartile mean over seeds and its 95 % interval, [P] each."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def interquartile_mean(scores: Any) -> np.ndarray:
    """Over the last axis: the mean without the lowest and the highest quarter, rounded down."""
    return stats.trim_mean(np.asarray(scores, np.float64), 0.25, axis=-1)


def estimate(scores: Any, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Of scores [P, S]; the percentiles of the mean over seeds drawn with replacement.  One seed has no interval."""
    scores = np.asarray(scores, np.float64)
    num = scores.shape[-1]
    draws = np.random.default_rng(seed).integers(num, size=(resamples, num))
    means = np.stack([interquartile_mean(row[draws]) for row in scores])
    low, high = np.percentile(means, [2.5, 97.5], axis=-1)
    return Estimate(interquartile_mean(scores), low, high)


def draw(axes: Any, curves: Mapping[str, Curve], threshold: float | None = None) -> None:
    """Lines with bands into matplotlib's axes, and a dotted line at `threshold`."""
    for i, (name, curve) in enumerate(curves.items()):
        colour = plots.COLOURS[i % len(plots.COLOURS)]
        found = estimate(curve.scores)
        axes.plot(curve.steps, found.mean, color=colour, linewidth=1.6, label=name)
        axes.fill_between(curve.steps, found.low, found.high, color=colour, alpha=0.2, linewidth=0)
    if threshold is not None:
        axes.axhline(threshold, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("environment steps of a seed")
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)


def plot(
    path: str | pathlib.Path, curves: Mapping[str, Curve], *, title: str = "", threshold: float | None = None
) -> None:
    """One picture of `curves`."""
    figure, grid = plots.panels(1, 1, 6.4, 4.0)
    axes = grid[0, 0]
    draw(axes, curves, threshold)
    axes.set_ylabel("return of an episode")
    axes.set_title(title, loc="left", fontsize=11)
    plots.save(path, figure)
