"""Plots into files: curves and point clouds, without matplotlib's global state and without a display.

Colours are those of Okabe & Ito, told apart by colour-blind readers too.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffrl.errors import UserError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
Series = tuple[Any, Any]


def curves(
    path: str | pathlib.Path,
    series: Mapping[str, Series],
    xlabel: str,
    ylabel: str,
    *,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = False,
    smooth: int = 1,
) -> None:
    """Draws lines {name: (x [N], y [N])} into an image file; a single line gets no legend.

    Args:
        path: its ending decides the format.
        log_x, log_y: logarithmic axes.
        markers: a dot on each point, for few measurements.
        smooth: a running mean over so many points is drawn over the faint original (losses).
    """
    figure, axes = _figure(xlabel, ylabel, title)
    for i, (name, (x, y)) in enumerate(series.items()):
        x, y = np.asarray(x), np.asarray(y, np.float64)
        colour = COLOURS[i % len(COLOURS)]
        window = min(smooth, len(y))
        if window > 1:
            axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
            x, y = x[window - 1 :], np.convolve(y, np.full(window, 1 / window), mode="valid")
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o" if markers else None, markersize=4, label=name)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    _save(path, figure, axes, legend=len(series) > 1)


def ranking(
    path: str | pathlib.Path, values: Mapping[str, tuple[float, float]], xlabel: str, *, title: str = ""
) -> None:
    """Draws {name: (value, spread)} as dots with bars, one row each, the largest on top."""
    rows = sorted(values.items(), key=lambda item: item[1][0])
    figure, axes = _figure(xlabel, "", title)
    centres, spreads = zip(*(pair for _, pair in rows), strict=True)
    axes.errorbar(centres, range(len(rows)), xerr=spreads, fmt="o", color=COLOURS[0], capsize=3)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    _save(path, figure, axes, legend=False)


def points(
    path: str | pathlib.Path,
    series: Mapping[str, Any],
    xlabel: str = "",
    ylabel: str = "",
    *,
    title: str = "",
) -> None:
    """Draws clouds {name: [N, 2]}, axes to one scale: two-dimensional data beside its samples."""
    figure, axes = _figure(xlabel, ylabel, title)
    for i, (name, cloud) in enumerate(series.items()):
        cloud = np.asarray(cloud)
        colour = COLOURS[i % len(COLOURS)]
        axes.scatter(cloud[:, 0], cloud[:, 1], s=6, color=colour, alpha=0.5, linewidths=0, label=name)
    axes.set_aspect("equal", adjustable="datalim")
    _save(path, figure, axes, legend=len(series) > 1)


def panels(
    rows: int, columns: int, width: float = 3.2, height: float = 2.6, **options: Any
) -> tuple[Figure, np.ndarray]:
    """An empty figure in this style and its axes [rows, columns], to draw into and then to `save`.

    Args:
        width, height: of one panel, in inches.
        options: of matplotlib's `Figure.subplots`, such as sharex.
    """
    figure = Figure(figsize=(columns * width, rows * height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def save(path: str | pathlib.Path, figure: Figure) -> None:
    """Writes a figure, on the first process only, and makes its folder; raises UserError if it cannot."""
    if jax.process_index() != 0:
        return
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"plot {path}: cannot be written ({error}); choose a writable folder") from error


def _figure(xlabel: str, ylabel: str, title: str) -> tuple[Figure, Axes]:
    figure, grid = panels(1, 1, 6.4, 4.0)
    axes = grid[0, 0]
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    return figure, axes


def _save(path: str | pathlib.Path, figure: Figure, axes: Axes, legend: bool) -> None:
    if legend:
        axes.legend(frameon=False, fontsize=9, markerscale=2)
    save(path, figure)
